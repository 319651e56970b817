"""The shared matrix, part 4: compiled equals eager, narrow types stay near fp64, extremes stay finite, gradients check."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dovetail.parts.context import Context
from dovetail.spec import Entry
from matrix.harness import ALONE, AOT, DIM, alone, build, close, gradients, in_a_model, name, stream, subject, tokens

PARTS = in_a_model()
each = pytest.mark.parametrize("e", PARTS, ids=name)
pointwise = pytest.mark.parametrize("e", [e for e in PARTS if e.category in ALONE], ids=name)
INSIDE = ("block", "mixer", "position", "rope_scaling", "mask", "feature_map")
BOUND = {torch.float32: 2e-5, torch.bfloat16: 5e-2}  # of the largest value, through two layers


def smooth(e: Entry) -> bool:
    return bool(e.capabilities.get("differentiable", True))


def _compiled_equals_eager(e: Entry, backend: str) -> None:
    """Forward and gradients: of the part alone, else of the mixer or block that holds it, else of a one-layer model."""
    torch.compiler.reset()
    if e.category in ALONE:
        module: nn.Module = alone(e, torch.float32)
        x: Any = torch.randn(2, 5, DIM, requires_grad=True)
        run: Any = module
    else:
        module = build(e, dtype=torch.float32, depth=1)
        inside = module.blocks[0] if e.category in INSIDE else None
        if inside is None or (e.category == "position" and module.position.hooks) or "streams" in e.capabilities:
            x = tokens(2, 6)
            run = lambda x: module(x).logits  # noqa: E731
        else:
            module = inside if e.category == "block" else inside.mixer
            x = torch.randn(2, 6, DIM, requires_grad=True)
            run = lambda x: module(x, Context.of(*x.shape[:2], x.device))  # noqa: E731
    ours = torch.compile(run, fullgraph=True, backend=backend)(x)
    plain = run(x)
    close(ours, plain, 1e-5, "forward")
    if not plain.requires_grad:
        assert not smooth(e)
        return
    weights = torch.randn_like(plain)
    inputs = [p for p in [*module.parameters(), *([x] if x.is_floating_point() else [])] if p.requires_grad]
    a = torch.autograd.grad((ours * weights).sum(), inputs, allow_unused=True)
    b = torch.autograd.grad((plain * weights).sum(), inputs, allow_unused=True)
    for one, other in zip(a, b, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            close(one, other, 2e-5, "gradient")


@each
def test_compiled_equals_eager(e: Entry) -> None:
    _compiled_equals_eager(e, AOT)


@pytest.mark.slow
@each
def test_compiled_by_inductor_equals_eager(e: Entry) -> None:
    _compiled_equals_eager(e, "inductor")


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_narrow_types_stay_near_fp64(e: Entry, dtype: torch.dtype) -> None:
    """The same rounded weights and inputs in the narrow type and in fp64."""
    if e.category in ALONE:
        narrow: nn.Module = alone(e, torch.float32).to(dtype)
        x = torch.randn(2, 5, DIM).to(dtype)
        ours, wide = narrow(x), copy.deepcopy(narrow).double()(x.double())
        assert ours.dtype == dtype, f"{dtype} in, {ours.dtype} out"
    else:
        narrow, ids = build(e, dtype=torch.float32).to(dtype), tokens(2, 6)
        ours, wide = narrow(ids).logits, copy.deepcopy(narrow).double()(ids).logits
    scale = wide.abs().max().clamp_min(1e-3).item()
    close(ours.double() / scale, wide / scale, BOUND[dtype], str(dtype))


@each
def test_trains_under_autocast(e: Entry) -> None:
    """fp32 weights, products in bf16: outputs near those of fp32, and the gradient, of all parameters, in its direction."""
    model, ids = build(e, dtype=torch.float32), tokens(2, 6)
    outs, grads = [], []
    for on in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            outs.append(model(ids).logits.float())
        found = gradients(model, outs[-1].square().mean())
        grads.append(torch.cat([g.flatten().float() for g in found.values()]))
    scale = outs[1].abs().max().clamp_min(1e-3).item()
    close(outs[0] / scale, outs[1] / scale, 2 * BOUND[torch.bfloat16], "logits")
    assert torch.isfinite(grads[0]).all() and torch.cosine_similarity(*grads, dim=0) > 0.99


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scale", [1e4, 0.0], ids=["1e4", "zero"])
def test_extreme_inputs_stay_finite(e: Entry, dtype: torch.dtype, scale: float) -> None:
    model = build(e, dtype=dtype)
    with stream(model, lambda h: h * scale):
        logits = model(tokens(2, 6)).logits
    results = {"logits": logits, **gradients(model, logits.float().square().mean())}
    x = (torch.randn(2, 6, DIM) * scale).to(dtype)
    ctx = Context.of(2, 6, x.device)
    inner = [alone(e, torch.float32).to(dtype)] if e.category in ALONE else []
    mixers = [m.mixer for m in model.modules() if isinstance(getattr(m, "mixer", None), nn.Module)]
    for module in [*inner, *(mixers[:1] if e.category not in ALONE else [])]:
        module.zero_grad()
        x = x.detach().requires_grad_()
        y = module(x) if module in inner else module(x, ctx)
        results["output"] = y
        if y.requires_grad:
            results["gradient"] = torch.autograd.grad(y.float().mean(), x, allow_unused=True)[0]
    for what, value in results.items():
        assert value is None or torch.isfinite(value).all(), f"{what} is not finite"


@pointwise
def test_gradcheck(e: Entry) -> None:
    module, x = alone(e), torch.randn(3, DIM, dtype=torch.float64, requires_grad=True)
    if not smooth(e):
        assert not module(x).requires_grad
        return
    assert torch.autograd.gradcheck(module, (x,), fast_mode=True)


@pytest.mark.parametrize("e", [e for e in PARTS if e.category == "mixer"], ids=name)
def test_gradcheck_of_mixers(e: Entry) -> None:
    """By inputs, padded and packed too."""
    mixer = subject(e.category, e.kind).blocks[0].mixer
    x = torch.randn(2, 5, DIM, dtype=torch.float64, requires_grad=True)
    for masks in (
        {},
        {"attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])},
        {"segments": torch.tensor([[0, 0, 1, 1, 1], [4, 5, 5, 5, -1]])},
    ):
        ctx = Context.of(2, 5, x.device, **masks)
        assert torch.autograd.gradcheck(lambda x, ctx=ctx: mixer(x, ctx), (x,), fast_mode=True)
