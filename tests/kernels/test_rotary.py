"""Turned heads of one product: the kernels against the plain twin in fp64, and what compilers and positions make of them.

Without a GPU these run in Triton's interpreter, with fp16 for narrow types; bf16 is left to a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

import dovetail as dt
from dovetail.kernels import counted, rotary
from dovetail.kernels.installed import TRITON
from dovetail.kernels.rotary import Heads, Turning, reference
from dovetail.parts.context import Context
from dovetail.parts.position.rotary import RopeModule
from parts.making import make

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NARROW = torch.bfloat16 if GPU else torch.float16
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed")
SHAPES = [(Heads(4, 2, 16, 16), 16), (Heads(3, 1, 10, 6), 4), (Heads(1, 1, 2, 3), 2)]  # heads, entries turned


def tables(T: int, dim: int, dtype: torch.dtype, rows: int = 1) -> tuple[Tensor, Tensor]:
    angle = torch.randn(rows, T, 1, dim // 2, dtype=torch.float64, device=DEVICE)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def made(heads: Heads, dtype: torch.dtype, B: int = 2, T: int = 5) -> Tensor:
    total = (heads.queries + heads.keys) * heads.width + heads.keys * heads.value_width
    return torch.randn(B, T, total + 3, dtype=torch.float64, device=DEVICE).to(dtype)[..., :total].requires_grad_()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("heads, dim", SHAPES)
def test_equals_the_twin(heads: Heads, dim: int, layout: str, dtype: torch.dtype) -> None:
    """Rows that are slices, tables of all rows and of each, gradients as attention gives them: heads before tokens."""
    from dovetail.kernels.rotary import operator

    for rows in (1, 2):
        cos, sin = tables(5, dim, dtype, rows)
        x = made(heads, dtype)
        wide = x.detach().double().requires_grad_()
        found = operator.turned(x, heads, Turning(cos, sin, layout))
        right = reference.turned(wide, *heads, cos.double(), sin.double(), layout)
        up = [torch.randn_like(t.transpose(1, 2).contiguous()).transpose(1, 2) for t in found]
        (d_x,) = torch.autograd.grad(found, x, up)
        (d_wide,) = torch.autograd.grad(right, wide, [u.double() for u in up])
        eps = torch.finfo(dtype).eps
        for one, other in zip((*found, d_x), (*right, d_wide), strict=True):
            assert one.dtype == dtype and one.shape == other.shape
            torch.testing.assert_close(one.double(), other, rtol=eps, atol=4 * torch.finfo(torch.float32).eps)


@needs_triton
def test_operations_are_whole() -> None:
    from dovetail.kernels.rotary import operator

    (cos, sin), x = tables(5, 4, torch.float32), made(SHAPES[1][0], torch.float32).detach()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator._forward.op, (x, cos, sin, True, 3, 1, 10), test_utils=tests)
    parts = operator.turned(x, SHAPES[1][0], Turning(cos, sin))
    torch.library.opcheck(operator._backward.op, (*parts, cos, sin, True), test_utils=tests)


@needs_triton
def test_a_compiled_model_puts_the_gradient_together_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits and gradients of the plain model, and one operation a layer, in the backward alone."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    blocks = {"mixer": {"kind": "attention", "heads": 2, "kv_heads": 1, "position": "rope"}, "feedforward": None}
    model = dt.build({"kind": "decoder", "vocab": 17, "dim": 16, "depth": 2, "context": 16, "blocks": blocks})
    model.to(DEVICE)
    tokens = torch.randint(0, 17, (2, 16), device=DEVICE)
    seen: list[str] = []

    def kept(graph: fx.GraphModule, _: Any) -> Any:
        seen.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return make_boxed_func(graph)

    def run(call: Any) -> list[Tensor]:
        logits = call(tokens).logits
        return [logits.detach(), *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]

    wanted = run(model)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend=aot_autograd(fw_compiler=kept, bw_compiler=kept), fullgraph=True)
    monkeypatch.setattr(counted, "_for", "cuda")

    torch.testing.assert_close(run(compiled), wanted)
    assert [name for name in seen if "rotary" in name] == ["dovetail.rotary_backward.default"] * 2
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["rope", "xpos", "rerope", "alibi"])
def test_turning_is_what_rotate_does(kind: str) -> None:
    """Of those that say so; what does more than turning, or less, says nothing."""
    module: Any = make("position", kind, head_dim=8, heads=4, kv_heads=2)
    ctx = Context.of(2, 7, torch.device("cpu"))
    assert module.turns == (kind == "rope")
    if module.turns:
        turning = module.turning(ctx.side, torch.float32)
        q, k = torch.randn(2, 7, 4, module.dim), torch.randn(2, 7, 2, module.dim)
        for one, other in zip(module.rotate(q, k, ctx.coords, ctx), (q, k), strict=True):
            torch.testing.assert_close(one, rotary.turn(other, *turning))


def test_a_rotate_of_its_own_is_called() -> None:
    """A part that inherits from rope and rotates otherwise, without a word about `turning`."""

    class Doubled(RopeModule):
        def rotate(self, q: Tensor, k: Tensor, at: Any, ctx: Any) -> tuple[Tensor, Tensor]:
            q, k = super().rotate(q, k, at, ctx)
            return 2 * q, k

    mixer = make("mixer", {"kind": "attention", "heads": 2, "position": "rope"}, causal=True)
    x, ctx = torch.randn(1, 6, 16), Context.of(1, 6, torch.device("cpu"))
    plain = mixer(x, ctx)
    mixer.position.__class__ = Doubled
    assert not torch.allclose(mixer(x, ctx), plain)


@needs_triton
@pytest.mark.skipif(GPU, reason="the plan of a GPU, on a CPU")
def test_eager_models_take_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped heads, half of each turned, a checkpointed block: the logits and gradients of the plain model."""
    from dovetail.kernels.rotary import operator, triton

    position = {"kind": "rope", "width": 0.5}
    blocks = {"mixer": {"kind": "attention", "heads": 2, "kv_heads": 1, "position": position}, "feedforward": None}
    model = dt.build({"kind": "decoder", "vocab": 17, "dim": 16, "depth": 2, "context": 16, "blocks": blocks}).train()
    tokens, launched = torch.randint(0, 17, (1, 6)), []

    def run() -> list[Tensor]:
        logits = model(tokens).logits
        return [logits.detach(), *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]

    wanted, turned = run(), triton._turned
    monkeypatch.setattr(triton, "_turned", lambda *given: (launched.append(given[-1]), turned(*given))[1])
    monkeypatch.setattr(rotary, "device_type", lambda _: "cuda")
    for every, forwards in ((0, 2), (1, 4)):
        model.checkpointing = every
        launched.clear()
        torch.testing.assert_close(run(), wanted, rtol=1e-4, atol=1e-5)
        assert launched.count(1.0) == 2 * forwards and launched.count(-1.0) == 4
    x = torch.randn(1, 2, 24, requires_grad=True)
    q = operator.turned(x, Heads(1, 1, 8, 8), Turning(*tables(2, 8, torch.float32)))[0]
    (once,) = torch.autograd.grad(q.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable"):
        torch.autograd.grad(once.sum(), x)
