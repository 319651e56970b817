"""Stored weights: bitsandbytes' codes, a linear map that keeps no dense weight, and buffers that nothing rounds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dovetail.errors import CheckpointError, SpecError
from dovetail.parts.storage.base import Storage
from dovetail.parts.storage.int4 import Int4
from dovetail.parts.storage.int8 import Int8
from dovetail.parts.storage.nf4 import Nf4, StoredNf4
from dovetail.spec import Spec
from oracles import oracle_for

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "quantise.safetensors")
EPS = torch.finfo(torch.float32).eps
SPECS: list[Storage] = [
    Nf4(),
    Nf4(double=False),
    Nf4(block=32, double_block=2),
    Int8(),
    Int8(block=32),
    Int4(),
    Int4(block=32),
]
each = pytest.mark.parametrize("spec", SPECS, ids=["nf4", "nf4-plain", "nf4-32", "int8", "int8-32", "int4", "int4-32"])


def stored(spec: Storage, out: int = 12, dim: int = 40, dtype: torch.dtype = torch.float32) -> Any:
    return spec.store(torch.randn(out, dim).to(dtype))


@oracle_for("storage", "nf4")
@pytest.mark.parametrize(("name", "block"), [("small", 64), ("many", 32)])
def test_nf4_has_the_bits_of_bitsandbytes(name: str, block: int) -> None:
    given = {key.removeprefix(f"{name}."): t for key, t in GOLDEN.items() if key.startswith(f"{name}.")}
    weight = given["weight"]
    plain, double = Nf4(block=block, double=False).store(weight), Nf4(block=block).store(weight)
    assert isinstance(plain, StoredNf4) and isinstance(double, StoredNf4)
    for ours in (plain, double):
        assert torch.equal(ours.codes, given["codes"]) and torch.equal(ours.levels, GOLDEN["levels"])
    assert torch.equal(plain.absmax, given["absmax"])
    torch.testing.assert_close(double.absmax_mean, given["double.absmax_mean"], rtol=2 * EPS, atol=0)
    torch.testing.assert_close(double.absmax_scale, given["double.absmax_scale"], rtol=8 * EPS, atol=0)
    assert torch.equal(double.absmax_levels, GOLDEN["absmax_levels"])
    # Its second level finds the nearest value by a coarse table, so within 2e-5 of halfway it may take the other one.
    levels = double.absmax_levels
    scale = double.absmax_scale.repeat_interleave(256)[: len(plain.absmax)]
    scaled = (plain.absmax - double.absmax_mean) / scale
    from_halfway = (scaled[:, None] - (levels[1:] + levels[:-1]) / 2).abs().amin(1)
    clear = from_halfway > 2e-5
    assert clear.float().mean() > 0.98
    assert torch.equal(double.absmax[clear], given["double.absmax"][clear])
    if name == "small":
        assert torch.equal(plain.dense(), given["dense"])
        double.absmax, double.absmax_scale = given["double.absmax"], given["double.absmax_scale"]
        torch.testing.assert_close(double.dense(), given["double.dense"], rtol=4 * EPS, atol=0)


@oracle_for("storage", "int8")
def test_int8_has_the_bits_of_bitsandbytes() -> None:
    ours: Any = Int8().store(GOLDEN["small.weight"].half())
    assert torch.equal(ours.codes, GOLDEN["int8.codes"]) and torch.equal(ours.absmax, GOLDEN["int8.absmax"])
    torch.testing.assert_close(ours.dense(torch.float32), GOLDEN["int8.dense"], rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("spec", [s for s in SPECS if isinstance(s, Nf4) and s.double], ids=["nf4", "nf4-32"])
def test_double_quantisation_moves_a_weight_by_its_constant_at_most(spec: Nf4) -> None:
    """|level| <= 1, so no weight moves by more than its block's constant; that by half the widest share of [0.1, 1]."""
    weight = torch.randn(64, 640)
    plain, double = spec.replace(double=False).store(weight), spec.store(weight)
    assert isinstance(plain, StoredNf4) and isinstance(double, StoredNf4)
    moved = (double.constants() - plain.absmax).abs()
    scale = double.absmax_scale.repeat_interleave(spec.double_block)[: len(moved)]
    assert (moved <= scale * (0.9 / 64 / 2 * 1.001)).all() and moved.max() > 0
    by_block = (double.dense() - plain.dense()).abs().view(-1, spec.block).amax(1)
    assert (by_block <= moved + 4 * EPS * plain.absmax).all()


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dense_has_the_shape_and_type_of_the_weight(spec: Storage, dtype: torch.dtype) -> None:
    weight = torch.randn(5, 13).to(dtype)  # fills no block
    ours = spec.store(weight.requires_grad_())
    assert ours.shape == weight.shape and ours.dtype == ours.dense().dtype == dtype
    assert not any(buffer.requires_grad for buffer in ours.buffers()) and not list(ours.parameters())
    assert torch.equal(ours.dense(torch.float32).to(dtype), ours.dense())
    error = (ours.dense().double() - weight.detach().double()).norm() / weight.detach().double().norm()
    assert error < (0.02 if spec.kind == "int8" else 0.15)
    turned = spec.store(weight.t())  # not contiguous
    assert torch.equal(turned.dense(), spec.store(weight.t().contiguous()).dense())


@each
def test_zero_is_kept_exactly(spec: Storage) -> None:
    weight = torch.randn(8, 64)
    weight[2] = 0
    weight[:, 3] = 0
    assert not spec.store(weight).dense()[weight == 0].any()
    assert not spec.store(torch.zeros(3, 50)).dense().any()


@each
@pytest.mark.parametrize("shape", [(2, 3, 40), (40,), (0, 40)], ids=["batch", "vector", "empty"])
def test_linear_is_the_dense_linear_map(spec: Storage, shape: tuple[int, ...]) -> None:
    ours = stored(spec)
    x, bias = torch.randn(shape, requires_grad=True), torch.randn(12, requires_grad=True)
    theirs = F.linear(x, ours.dense(), bias)
    y, flow = ours.linear(x, bias), torch.randn_like(theirs)
    torch.testing.assert_close(y, theirs, rtol=0, atol=0)
    for a, b in zip(torch.autograd.grad(y, (x, bias), flow), torch.autograd.grad(theirs, (x, bias), flow)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@each
def test_linear_passes_gradcheck(spec: Storage) -> None:
    ours = stored(spec, 3, 10, torch.float64)
    x, bias = torch.randn(2, 10).double().requires_grad_(), torch.randn(3).double().requires_grad_()
    assert torch.autograd.gradcheck(ours.linear, (x, bias))
    assert torch.autograd.gradcheck(ours.linear, (x,))
    assert torch.autograd.gradgradcheck(ours.linear, (x, bias))


@each
def test_linear_saves_nothing_for_the_backward(spec: Storage) -> None:
    ours, x = stored(spec), torch.randn(3, 40, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        F.linear(x, ours.dense()).sum()
        assert saved, "the plain map saves its weight"
        saved.clear()
        y = ours.linear(x, torch.zeros(12, requires_grad=True))
    assert not saved
    y.sum().backward()
    torch.testing.assert_close(x.grad, ours.dense().sum(0).expand(3, 40))


@each
@pytest.mark.parametrize("stored_as", [torch.float32, torch.bfloat16])
def test_autocast_decides_the_type(spec: Storage, stored_as: torch.dtype) -> None:
    ours = stored(spec, dtype=stored_as)
    x, bias = torch.randn(3, 40, requires_grad=True), torch.randn(12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, theirs = ours.linear(x, bias), F.linear(x, ours.dense(torch.float32), bias)
        wide = ours.linear(x.double())
    assert y.dtype == torch.bfloat16 and wide.dtype == torch.float64
    assert torch.equal(y, theirs)
    flow = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, (x, bias), flow), torch.autograd.grad(theirs, (x, bias), flow)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    assert ours.linear(x).dtype == torch.float32  # outside, x decides


class Adapted(nn.Module):
    """A frozen stored map with a trained one of low rank beside it, as QLoRA has it."""

    def __init__(self, spec: Storage):
        super().__init__()
        self.base = stored(spec)
        self.down = nn.Parameter(torch.randn(4, 40) * 0.1)
        self.up = nn.Parameter(torch.randn(12, 4) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.base.linear(x)) + x @ self.down.t() @ self.up.t()


def _same_gradients(model: nn.Module, run: Any, tolerance: float = 1e-5) -> None:
    x = torch.randn(5, 40, requires_grad=True)
    inputs = [x, *model.parameters()]
    results = [(y, *torch.autograd.grad(y.square().sum(), inputs)) for y in (run(x), model(x))]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@each
def test_compiled_equals_eager(spec: Storage) -> None:
    torch.compiler.reset()
    model = Adapted(spec)
    _same_gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"))


@pytest.mark.slow
@each
def test_compiled_by_inductor_equals_eager(spec: Storage) -> None:
    torch.compiler.reset()
    model = Adapted(spec)
    _same_gradients(model, torch.compile(model, fullgraph=True))


@each
def test_recomputed_equals_kept(spec: Storage) -> None:
    model = Adapted(spec)
    _same_gradients(model, lambda x: checkpoint(model, x, use_reentrant=False))


@each
def test_files_give_the_same_back(spec: Storage, tmp_path: Path) -> None:
    ours = stored(spec, dtype=torch.bfloat16)
    save_file(ours.state_dict(), tmp_path / "weights.safetensors")
    again = spec.empty(ours.shape, torch.bfloat16)
    again.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(again.dense(), ours.dense())
    placed = spec.empty(ours.shape, torch.bfloat16, "meta")
    placed.load_state_dict(ours.state_dict(), assign=True)
    assert torch.equal(placed.dense(), ours.dense()) and torch.equal(copy.deepcopy(ours).dense(), ours.dense())
    with pytest.raises(RuntimeError, match="size mismatch"):
        spec.empty((13, 300)).load_state_dict(ours.state_dict())


@each
@pytest.mark.parametrize("how", ["half", "bfloat16", "double", "to", "type"])
def test_a_change_of_type_leaves_codes_and_constants(spec: Storage, how: str) -> None:
    ours = stored(spec)
    before, dense = {name: t.clone() for name, t in ours.state_dict().items()}, ours.dense()
    model = nn.Sequential(nn.Linear(2, 2))
    model.base = ours
    dtype = {"half": torch.float16, "double": torch.float64}.get(how, torch.bfloat16)
    getattr(model, how)(*([dtype] if how in ("to", "type") else []))
    assert model[0].weight.dtype == dtype and ours.dtype == dtype
    for name, buffer in ours.state_dict().items():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name]), name
    assert torch.equal(ours.dense(), dense.to(dtype))
    model.float()
    assert torch.equal(ours.dense(), dense)


@each
def test_meta_device(spec: Storage) -> None:
    ours = stored(spec)
    for ghost in (
        spec.empty((12, 40), device="meta"),
        spec.store(torch.empty(12, 40, device="meta")),
        copy.deepcopy(ours).to("meta"),
    ):
        kinds = {name: (t.shape, t.dtype) for name, t in ghost.state_dict().items()}
        assert kinds == {name: (t.shape, t.dtype) for name, t in ours.state_dict().items()}
        assert ghost.bits_per_weight == ours.bits_per_weight
        assert ghost.dense().is_meta and ghost.linear(torch.empty(3, 40, device="meta")).shape == (3, 12)
        ghost.to_empty(device="cpu").load_state_dict(ours.state_dict())
        assert torch.equal(ghost.dense(), ours.dense())
    with torch.device("meta"):
        assert all(buffer.is_meta for buffer in spec.empty((12, 40)).buffers())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_cpu(spec: Storage, dtype: torch.dtype) -> None:
    weight = torch.randn(256, 1000).to(dtype)
    ours, theirs = spec.store(weight), spec.store(weight.cuda())
    largest = float(weight.float().abs().max())
    for name, buffer in ours.cuda().state_dict().items():
        other = theirs.state_dict()[name]
        if buffer.is_floating_point():  # the mean of the constants is summed in another order
            torch.testing.assert_close(buffer, other, rtol=8 * EPS, atol=8 * EPS * largest)
        else:
            assert (buffer == other).float().mean() > (0.99 if name == "absmax" else 1 - EPS), name
    torch.testing.assert_close(ours.dense().cpu(), copy.deepcopy(ours).cpu().dense(), rtol=4 * EPS, atol=0)


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (Nf4(), 4 + 8 / 64 + 32 / (64 * 256)),
        (Nf4(double=False), 4 + 32 / 64),
        (Int8(), 8 + 32 / 4096),
        (Int8(block=64), 8 + 32 / 64),
        (Int4(), 4 + 24 / 128),
        (Int4(block=32), 4 + 24 / 32),
    ],
    ids=["nf4", "nf4-plain", "int8", "int8-64", "int4", "int4-32"],
)
def test_bits_per_weight(spec: Storage, bits: float) -> None:
    """Section 3 of QLoRA counts 0.127 bits a weight for constants quantised twice; tables add a little."""
    assert spec.empty((4096, 4096), device="meta").bits_per_weight == pytest.approx(bits, abs=1e-3)


@each
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_refuses_what_has_no_code(spec: Storage, value: float) -> None:
    weight = torch.randn(7, 70)
    weight[6, 69] = value
    with pytest.raises(CheckpointError, match=r"\(7, 70\) holds NaN or infinity"):
        spec.store(weight)
    with pytest.raises(CheckpointError, match="int64 tensor"):
        spec.store(torch.ones(3, 4, dtype=torch.long))
    with pytest.raises(CheckpointError, match="cannot be stored"):
        spec.store(torch.empty(0, 4))


def test_specs() -> None:
    assert Spec.parse("storage", "nf4") == Nf4()
    for wrong in ({"kind": "nf4", "block": 63}, {"kind": "nf4", "block": 0}, {"kind": "int8", "block": 0}, "fp4"):
        with pytest.raises(SpecError):
            Spec.parse("storage", wrong)
