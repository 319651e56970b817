"""Products with codes: int4 against its formula and torch's own, the kernels against fp64, a model that decodes from codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dovetail as dt
from dovetail.adapters import adapt
from dovetail.kernels import quantise
from dovetail.kernels.quantise import reference
from dovetail.parts.storage.base import Storage
from dovetail.parts.storage.int4 import Int4
from dovetail.parts.storage.int8 import Int8
from dovetail.parts.storage.nf4 import Nf4
from dovetail.surgery import quantise as keep
from oracles import oracle_for

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NARROW = torch.bfloat16 if GPU else torch.float16  # the interpreter has no bf16 of its own
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
SPECS: dict[str, Storage] = {
    "int4-32": Int4(block=32),
    "int4-64": Int4(block=64),
    "int8": Int8(),
    "int8-32": Int8(block=32),
    "nf4": Nf4(block=32),
    "nf4-plain": Nf4(block=32, double=False),
}
each = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def formula(weight: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, zeros) of a matrix of whole groups by the docstring's formulas, in fp64 with the scale in bf16."""
    groups = weight.double().view(len(weight), -1, block)
    least, most = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scale = ((most - least) / 15).bfloat16().double()
    zero = (-least / scale).round().clamp(0, 15)
    codes = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
    return codes.flatten(1), scale, zero


@oracle_for("storage", "int4")
@pytest.mark.parametrize("block", [32, 64, 128])
def test_int4_has_the_codes_of_its_formula_and_the_product_of_torch(block: int) -> None:
    weight, x = torch.randn(32, 256) + 0.3, torch.randn(5, 256)
    ours: Any = Int4(block=block).store(weight)
    codes, scale, zero = formula(weight, block)
    unpacked = torch.stack([ours.codes >> 4, ours.codes & 15], 2).flatten(1)
    assert (unpacked == codes).float().mean() > 0.999 and (unpacked.double() - codes).abs().max() <= 1  # ties in fp32
    assert torch.equal(ours.scale.double(), scale) and torch.equal(ours.zero.double(), zero)
    # torch's: w = (code - 8) · scale + zero, in a packed layout of its own
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpacked.int(), 1)
    theirs = torch.stack([ours.scale.float(), (8 - ours.zero.float()) * ours.scale.float()], 2).transpose(0, 1)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, block, theirs.contiguous())
    torch.testing.assert_close(ours.linear(x), y, rtol=1e-5, atol=1e-4)


def test_int4_is_within_half_a_step_and_keeps_a_sign_that_all_share() -> None:
    for weight in (torch.randn(7, 100), torch.rand(7, 100) + 5, -torch.rand(7, 100)):
        ours: Any = Int4(block=32).store(weight)
        step = ours.scale.float().repeat_interleave(32, 1)[:, :100]
        # the zero is rounded to a step, and so up to half a step of an end is cut off besides
        assert ((ours.dense() - weight).abs() <= step * 1.05).all()
        assert ((ours.dense() - weight).abs() <= step * 0.5001).float().mean() > 0.9
        assert ours.scale.shape == (7, 4) and ours.codes.shape == (7, 64)  # the last group is filled up
        assert (ours.codes[:, -14:] == (ours.zero[:, -1:] * 17)).all()  # with zeros: weights 100 to 127


def test_packing_and_pieces_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(4, 2)
    rows = quantise.Rows(quantise.pack(codes.flatten()).view(4, 16), torch.ones(4, 1), 32)
    assert torch.equal(quantise.dequantise_rows(rows, 32, torch.float32), codes.float())
    weight = torch.randn(40, 50).bfloat16()
    at_once = [*quantise.quantise_int4(weight, 16), Int4(block=16).store(weight).dense()]
    monkeypatch.setitem(reference._PIECE, "cpu", 200)
    pieces = [*quantise.quantise_int4(weight, 16), Int4(block=16).store(weight).dense()]
    assert all(torch.equal(a, b) for a, b in zip(at_once, pieces, strict=True))


@each
def test_rows_say_what_dense_says(spec: Storage) -> None:
    ours = spec.store(torch.randn(6, 64))
    assert ours.group is not None
    torch.testing.assert_close(
        quantise.dequantise_rows(ours.rows(), 64, torch.float32), ours.dense(), rtol=1e-6, atol=0
    )
    x, bias = torch.randn(2, 3, 64), torch.randn(6)
    torch.testing.assert_close(reference.linear(x, ours.rows(), bias), ours.linear(x, bias), rtol=1e-5, atol=1e-5)


def expected(x: Tensor, stored: Any, bias: Tensor | None) -> Tensor:
    y = x.double() @ stored.dense(torch.float64).t()
    return y if bias is None else y + bias.double()


@each
@pytest.mark.parametrize(
    ("vectors", "out", "dtype"), [(1, 13, torch.float32), (1, 8, NARROW), (3, 33, torch.float32), (17, 5, NARROW)]
)
def test_kernel_equals_fp64(spec: Storage, vectors: int, out: int, dtype: torch.dtype) -> None:
    linear = kernel()
    stored = spec.store(torch.randn(out, 96, device=DEVICE))
    x = torch.randn(2 * vectors, 96, device=DEVICE).to(dtype)[::2]  # rows apart
    bias = torch.randn(out, device=DEVICE).to(dtype) if vectors != 3 else None
    y = linear(x, stored.rows(), bias)
    assert y.dtype == dtype and y.shape == (vectors, out)
    theirs = expected(x, stored, bias)
    assert (y.double() - theirs).abs().max() <= TOLERANCE[dtype] * theirs.abs().max()


@pytest.mark.parametrize("vectors", [1, 2])
def test_kernel_takes_widths_that_fill_no_group_and_columns_apart(vectors: int) -> None:
    linear = kernel()
    for spec, width in ((Int4(block=32), 49), (Int8(), 49), (Int4(), 200), (Int4(block=8), 8)):
        stored = spec.store(torch.randn(9, width, device=DEVICE))
        x = torch.randn(width, 4, vectors, device=DEVICE)[:, 0].t()  # its columns apart
        theirs = expected(x, stored, None)
        # one vector's int4 codes come as 16 (Σ x (1 + q/16) - Σ x), of whose digits four bits cancel
        tolerance = 3e-6 * (16 if vectors == 1 and spec.kind == "int4" else 1)
        assert (linear(x, stored.rows()) - theirs).abs().max() <= tolerance * theirs.abs().max()


@each
def test_shares_of_k_are_added(spec: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = kernel()
    from dovetail.kernels.quantise import triton_linear

    monkeypatch.setattr(triton_linear, "LEAST_STEPS", 1)
    monkeypatch.setattr(triton_linear, "WIDE", triton_linear.Tiles(16, 16, 4, 2))
    stored, bias = (
        spec.store(torch.randn(20, 112 if spec.kind == "int8" and spec.block is None else 96, device=DEVICE)),
        torch.randn(20, device=DEVICE),
    )
    x = torch.randn(4, stored.shape[1], device=DEVICE)
    y, theirs = linear(x, stored.rows(), bias), expected(x, stored, bias)
    assert (y - theirs).abs().max() <= 3e-6 * theirs.abs().max()
    assert torch.equal(y, linear(x, stored.rows(), bias))  # the same each time


def kernel() -> Any:
    pytest.importorskip("triton")
    return quantise.linear


SPEC = {
    "kind": "decoder", "vocab": 40, "dim": 32, "depth": 2, "context": 32,
    "blocks": {"mixer": {"kind": "attention", "heads": 2, "position": "rope"}, "feedforward": {"kind": "glu", "hidden": 64}},
}  # fmt: skip


def tiny(storage: Storage | None) -> Any:
    torch.manual_seed(0)
    model = dt.build(SPEC, device=DEVICE).eval()
    if storage is not None:
        keep(model, storage)
    return model


def greedy(model: Any, new: int = 6) -> list[list[int]]:
    return dt.generate(model, None, torch.arange(5)[None], max_new_tokens=new, temperature=0).tolist()


@pytest.mark.parametrize("spec", [Int4(block=32), Int8()], ids=["int4", "int8"])
def test_a_model_decodes_adapts_and_comes_back_from_a_file(spec: Storage, tmp_path: Path) -> None:
    model, dense = tiny(spec), tiny(None)
    for path, m in model.named_modules():
        if getattr(m, "stored", None) is not None:
            dense.get_submodule(path).weight.data.copy_(m.dense())
    assert greedy(model) == greedy(dense)
    save_file(model.state_dict(), tmp_path / "codes.safetensors")
    again = tiny(spec)
    for buffer in again.buffers():
        buffer.zero_()
    again.load_state_dict(load_file(tmp_path / "codes.safetensors"))
    tokens = torch.arange(6, device=DEVICE)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    adapt(model, {"kind": "lora", "rank": 2})
    model(tokens).logits.sum().backward()
    grads = [p.grad for n, p in model.named_parameters() if "adapters" in n and p.requires_grad]
    assert grads and all(g is not None for g in grads) and any(g.abs().sum() > 0 for g in grads)


def test_a_model_decodes_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens as by the dense weights, every map of every step through the kernel."""
    linear, calls, known = kernel(), [], quantise.plan_linear
    model = tiny(Int4(block=32))
    monkeypatch.setattr(quantise, "linear", lambda *args: calls.append(len(args[0])) or linear(*args))
    monkeypatch.setattr(quantise, "plan_linear", lambda device, *rest: known("cpu", *rest))
    dense = greedy(model, 3)
    assert not calls
    monkeypatch.setattr(quantise, "plan_linear", lambda device, *rest: known("cuda", *rest))
    assert greedy(model, 3) == dense
    maps = sum(m.stored is not None for m in model.modules() if hasattr(m, "stored"))
    assert len(calls) == 3 * maps


def test_without_gradients_the_plan_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what a GPU's plan says, here: eager, compiled whole, and not where gradients are taken."""
    kernel()
    stored = Int4(block=32).store(torch.randn(8, 48, device=DEVICE))
    x, calls = torch.randn(2, 1, 48, device=DEVICE), []
    real = quantise.linear
    monkeypatch.setattr(quantise, "linear", lambda *args: calls.append(1) or real(*args))
    known = quantise.plan_linear
    monkeypatch.setattr(quantise, "plan_linear", lambda device, *rest: known("cuda", *rest))
    theirs = stored.linear(x)
    assert not calls
    with torch.inference_mode():
        torch.testing.assert_close(stored.linear(x), theirs, rtol=1e-5, atol=1e-5)
    assert calls
    monkeypatch.setattr(quantise, "linear", real)
    torch.compiler.reset()
    with torch.no_grad():
        run = torch.compile(lambda x: stored.linear(x).relu(), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(run(x), theirs.relu(), rtol=1e-5, atol=1e-5)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert stored.linear(x).dtype == torch.bfloat16


def test_plan_says_why() -> None:
    pytest.importorskip("triton")
    bf16 = torch.bfloat16
    plan = quantise.plan_linear
    assert plan("cuda", 1, bf16, 128, 4096).path == plan("cuda", 32, torch.float32, 4104, 4104).path == "triton"
    for why, given in {
        "not on CUDA": ("cpu", 1, bf16, 128, 4096), "more than 32": ("cuda", 33, bf16, 128, 4096),
        "ends of rows": ("cuda", 1, bf16, None, 4096), "powers of two": ("cuda", 1, bf16, 48, 4096),
        "of at least 32": ("cuda", 1, bf16, 16, 4096), "at least 32": ("cuda", 2, bf16, 16, 16),
        "fp64": ("cuda", 1, torch.float64, 128, 4096), "or none": ("cuda", 0, bf16, 128, 4096),
    }.items():  # fmt: skip
        found = plan(*given)
        assert found.path == "dense" and why in found.why
    assert Int8(block=64).store(torch.randn(4, 40)).group is None and Nf4().store(torch.randn(4, 96)).group is None
