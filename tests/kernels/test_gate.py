"""The gate's kernels against the plain twin in fp64, and what compilers make of them.

Without a GPU these run in Triton's interpreter, which cuts bf16 off instead of rounding it, so that fp16 stands for
narrow types; bench/gate.py checks bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dovetail as dt
from dovetail.errors import DataError
from dovetail.kernels import counted, gate, twins
from dovetail.kernels.gate import ACTIVATIONS, gated, plan, reference
from dovetail.kernels.installed import TRITON
from dovetail.training.fused import standing
from dovetail.training.simulate import step_bytes

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NARROW = torch.bfloat16 if GPU else torch.float16
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed")


def kernels(both: Tensor, activation: str) -> Tensor:
    from dovetail.kernels.gate import operator

    return operator.gated(both, activation)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of a GPU."""
    pytest.importorskip("triton")
    monkeypatch.setattr(counted, "_for", "cuda")


def made(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Tensor:
    return (scale * torch.randn(shape, dtype=torch.float64)).to(DEVICE, dtype).requires_grad_()


def errors(run: Callable[[Tensor, str], Tensor], both: Tensor, up: Tensor, activation: str) -> list[float]:
    """Those of the output and of the gradient against the twin in fp64, as shares of the largest entry."""
    wide = both.detach().double().requires_grad_()
    out, right = run(both, activation), reference.gated(wide, activation)
    assert out.dtype == both.dtype and out.shape == right.shape
    (found,), (wanted,) = torch.autograd.grad(out, both, up), torch.autograd.grad(right, wide, up.double())
    assert found.dtype == both.dtype
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in ((out, right), (found, wanted))]


@needs_triton
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_twin(activation: str) -> None:
    """fp32: ragged and whole tiles, rows that are slices of wider ones, a gradient without strides."""
    wide = made(3, 4, 90)
    for both in (wide, wide[..., 7:81], made(2, 2 * 1100), made(6, 16).T.T[::2], made(40, 4)):
        h = both.shape[-1] // 2
        for up in (torch.randn(*both.shape[:-1], h, device=DEVICE), torch.ones((), device=DEVICE).expand(*both.shape[:-1], h)):  # fmt: skip
            assert max(errors(kernels, both, up, activation)) < 2e-6


@needs_triton
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_narrow_types_are_rounded_once(activation: str) -> None:
    """No further from fp64 than half a unit in the last place, where the plain formula rounds what it makes between."""
    both, up = made(30, 300, dtype=NARROW), torch.randn(30, 150, device=DEVICE).to(NARROW)
    wide = both.detach().double().requires_grad_()
    right = reference.gated(wide, activation)
    wanted = right.detach(), torch.autograd.grad(right, wide, up.double())[0]
    out = kernels(both, activation)
    unit = torch.finfo(NARROW).eps / 2
    for found, exact in zip((out, torch.autograd.grad(out, both, up)[0]), wanted, strict=True):
        far = (found.double() - exact).abs() / (exact.abs() * unit + 1e-6)
        assert far.max() < 1.01
    ours, plain = errors(kernels, both, up, activation), errors(reference.gated, both, up, activation)
    assert all(a <= 1.01 * b for a, b in zip(ours, plain, strict=True))


@needs_triton
@pytest.mark.filterwarnings("ignore:overflow")  # of a square, whose exponential is 0
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_number_is_too_large(activation: str) -> None:
    """Gates up to the type's largest; and rows of which there are none."""
    largest = torch.finfo(torch.float32).max
    gates = torch.tensor([0.0, 12.0, 88.0, 105.0, 1e13, 1e20, largest], device=DEVICE)
    both = torch.cat([gates, -gates, torch.ones(14, device=DEVICE)]).requires_grad_()
    found = kernels(both, activation)
    (d,) = torch.autograd.grad(found, both, torch.ones_like(found))
    wide = both.detach().double().requires_grad_()
    right = reference.gated(wide, activation)
    (wanted,) = torch.autograd.grad(right, wide, torch.ones_like(right))
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(d.double(), wanted.nan_to_num(0.0), rtol=1e-5, atol=1e-6)
    none = made(0, 5, 8)
    out = kernels(none, activation)
    assert out.shape == (0, 5, 4) and torch.autograd.grad(out.sum(), none)[0].shape == none.shape


@pytest.mark.usefixtures("forced")
def test_equals_torch_and_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    both = made(5, 22)
    found, theirs = gated(both, "sigmoid"), F.glu(both.roll(11, -1))  # whose gate is the second half
    torch.testing.assert_close(found, theirs)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), both), torch.autograd.grad(theirs.sum(), both))
    mlp = LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2)).to(DEVICE)
    spec = {"kind": "decoder", "vocab": 9, "dim": 16, "depth": 1, "blocks": {"feedforward": {"kind": "glu", "hidden": 24}}}  # fmt: skip
    ours: Any = dt.build(spec).blocks[0].feedforward.to(DEVICE)
    with torch.no_grad():
        ours.gate_up.weight.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        ours.down.weight.copy_(mlp.down_proj.weight)
    x = made(2, 3, 16, scale=1.0)
    leaves = [[x, ours.gate_up.weight, ours.down.weight], [x, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]]  # fmt: skip
    called: list[Any] = []
    ours.activation.register_forward_hook(lambda *_: called.append(1))
    y, z = ours(x), mlp(x)
    torch.testing.assert_close(y, z)
    assert not called  # the kernel's path
    (dx, gates, down), (their_dx, first, second, third) = (
        torch.autograd.grad(out.square().sum(), given) for out, given in zip((y, z), leaves, strict=True)
    )
    for a, b in ((dx, their_dx), (gates, torch.cat([first, second])), (down, third)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
def test_a_projected_gate_is_not_kept(dtype: torch.dtype) -> None:
    """Output and gradients are those of the two apart; what is kept is gate|up and the weight. Frozen weights go apart."""
    both, weight, kept = made(2, 5, 12, dtype=dtype), made(7, 6, dtype=dtype, scale=0.5), list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        out = gate.projected(both, "silu", weight)
    assert [t.data_ptr() for t in kept] == [both.data_ptr(), weight.data_ptr()]
    apart = F.linear(gated(both, "silu"), weight)
    assert torch.equal(out, apart)
    up = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(y, (both, weight), up) for y in (out, apart))
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1])
    frozen = gate.projected(both, "silu", weight.detach())
    assert torch.equal(torch.autograd.grad(frozen, both, up)[0], wanted[0])


@pytest.mark.usefixtures("forced")
def test_a_projected_gate_under_autocast() -> None:
    """Everything in its type, the gate too where what comes in is wider; gradients in the types of what was given."""
    both, weight = made(2, 5, 12), made(7, 6, scale=0.5)
    with torch.autocast(DEVICE, NARROW):
        out = gate.projected(both, "silu", weight)
    assert out.dtype == NARROW
    wanted = F.linear(gated(both.double(), "silu"), weight.double())
    eps = torch.finfo(NARROW).eps
    torch.testing.assert_close(out.double(), wanted, rtol=4 * eps, atol=4 * eps)
    up = torch.randn_like(out)
    grads = (torch.autograd.grad(y, (both, weight), up.to(y.dtype)) for y in (out, wanted))
    for a, b in zip(*grads, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b.float(), rtol=8 * eps, atol=8 * eps)


@pytest.mark.usefixtures("forced")
def test_a_map_that_is_more_than_a_product_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with adapters, a bias, codes or a listener, or behind dropout, gets what the gate makes."""
    layer: Any = dt.build(tiny("silu")).blocks[0].feedforward.to(DEVICE)
    x, asked = made(3, 8), list[int]()
    monkeypatch.setattr(gate, "projected", lambda *given: (asked.append(1), F.linear(gated(*given[:2]), given[2]))[1])
    plain = layer(x)
    assert asked == [1]
    handle = layer.down.register_forward_hook(lambda *_: asked.append(2))
    assert torch.equal(layer(x), plain) and asked == [1, 2]
    handle.remove()
    layer.drop = 0.5
    assert not torch.equal(layer.train()(x), plain) and torch.equal(layer.eval()(x), plain) and asked == [1, 2, 1]


def captured(run: Callable[..., Tensor], given: list[Tensor]) -> tuple[list[Tensor], list[fx.GraphModule]]:
    """Output and gradients of run(*given) compiled whole, by Inductor's partition, and its graphs."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition as partition

    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=partition)
    out = torch.compile(run, fullgraph=True, backend=backend)(*given)
    found = [out, *torch.autograd.grad(out.square().mean(), given)]
    torch.compiler.reset()
    return found, graphs


def names(graph: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
def test_compiled_a_projected_gate_is_made_again(again: bool) -> None:
    """Whole graphs; one operation in the backward, which hands the gate's output to the product with it."""
    T, C, H = 64, 8, 16

    def block(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return x + gate.projected(F.linear(x.sin(), w), "silu", v)

    def run(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return checkpoint(block, x, w, v, use_reentrant=False) if again else block(x, w, v)  # type: ignore[return-value]

    given = [made(T, C), made(2 * H, C, scale=0.3), made(C, H, scale=0.3)]
    found, (forward, backward) = captured(run, given)
    handed = [
        tuple(n.meta["val"].shape) for n in forward.graph.find_nodes(op="output")[0].args[0] if hasattr(n, "meta")
    ]
    assert (T, H) not in handed and ((T, 2 * H) in handed) is not again
    backwards = names(backward)
    assert backwards.count("dovetail.gate_backward_again.default") == 1 and not any(
        "silu" in name for name in backwards
    )
    eager = run(*given)
    for a, b in zip(found, [eager, *torch.autograd.grad(eager.square().mean(), given)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
def test_compiled_the_backward_is_one_operation(again: bool) -> None:
    """Forward is plain torch, backward has neither a cat nor the activation's; and memory is counted as it stands."""
    T, C, H = 64, 8, 16

    def block(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return x + F.linear(gated(F.linear(x.sin(), w), "silu"), v)

    def run(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return checkpoint(block, x, w, v, use_reentrant=False) if again else block(x, w, v)  # type: ignore[return-value]

    given = [made(T, C), made(2 * H, C, scale=0.3), made(C, H, scale=0.3)]
    found, (forward, backward) = captured(run, given)
    assert not any("dovetail" in name for name in names(forward)) and any("silu" in name for name in names(forward))
    backwards = names(backward)
    assert backwards.count("dovetail.gate_backward.default") == 1
    assert not any(name.split(".")[1] in ("cat", "silu_backward") for name in backwards if "." in name)
    assert sum("mm" in name for name in backwards) == (5 if again else 4)
    eager = run(*given)
    for a, b in zip(found, [eager, *torch.autograd.grad(eager.square().mean(), given)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if not again:  # handed over: both, out, and dropped one by one; at the operation d_out and d_both beside both
        assert 4 * T * 2 * H <= standing(backward) <= 4 * (T * 3 * H + 2 * C * H + T * C)


@pytest.mark.usefixtures("forced")
def test_eager_ways() -> None:
    """What is kept, without gradients, under autocast, once alone."""
    from dovetail.kernels.gate import operator

    both, kept = made(3, 8), list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        out = gated(both, "gelu")
    assert [t.data_ptr() for t in kept] == [both.data_ptr()]
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet():
            assert torch.equal(gated(both, "gelu"), out) and not gated(both, "gelu").requires_grad
    layer, x = nn.Linear(4, 8).to(DEVICE), made(3, 4)
    with torch.autocast(DEVICE, NARROW):
        found = gated(layer(x), "silu")
    assert found.dtype == NARROW and torch.autograd.grad(found.sum(), x)[0].dtype == torch.float32
    (first,) = torch.autograd.grad(out.sum(), both, create_graph=True)
    with pytest.raises(RuntimeError, match=r"gate_backward.*not differentiable"):
        first.sum().backward()
    for op, args in ((operator._forward.op, (both, "relu")), (operator._backward.op, (out.detach(), both.detach(), "relu"))):  # fmt: skip
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
    with pytest.raises(DataError, match="gate 'tanh'"):
        gated(both, "tanh")
    with pytest.raises(DataError, match="width 7"):
        gated(both[:, :7], "silu")


def test_plans() -> None:
    for given, path in (
        (("silu", "cuda", torch.bfloat16), "triton" if TRITON else "plain"),
        (("silu", "cuda", torch.float64), "plain"), ((None, "cuda", torch.bfloat16), "plain"), (("silu", "cpu"), "plain"),
    ):  # fmt: skip
        assert plan(*given).path == path and plan(*given).why
    with twins.plain():
        assert plan("silu", "cuda").why == twins.WHY
    known = {kind: dt.build(tiny(kind)).blocks[0].feedforward.plans("cuda", 9)["gate"] for kind in dt.registry("activation")}  # fmt: skip
    assert {kind for kind, found in known.items() if found.path == "triton"} == (set(ACTIVATIONS) if TRITON else set())
    assert known["prelu"].falls_back("cuda") and not known["prelu"].falls_back("cpu")


def tiny(activation: str) -> dict[str, Any]:
    blocks = {"mixer": "attention", "feedforward": {"kind": "glu", "hidden": 64, "activation": activation}}
    return {"kind": "decoder", "vocab": 16, "dim": 8, "depth": 2, "blocks": blocks}


@needs_triton
def test_a_counted_step_keeps_what_the_device_does() -> None:
    """Eager: act(gate) of each layer is not kept on CUDA; the fields of a formula are no name."""
    plain, own = (step_bytes(dt.build(tiny("silu")), batch=2, length=64, device=d) for d in ("cpu", "cuda"))
    act = 4 * 2 * 64 * 64
    assert plain - own >= act
    x = torch.randn(3, 8)
    layer: Any = dt.build(tiny("leaky_relu")).blocks[0].feedforward
    first, second = layer.gate_up(x).chunk(2, -1)
    assert layer.formula is None and torch.equal(layer(x), layer.down(F.leaky_relu(first, 0.01) * second))
