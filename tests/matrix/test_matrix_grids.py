"""The shared matrix for parts that need an image's grid: batches, compilation, narrow types, extremes, gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.parts.context import Context
from dovetail.spec import Entry
from matrix.harness import AOT, DIM, build_on_grid, close, gradients, name, on_a_grid

each = pytest.mark.parametrize("e", on_a_grid(), ids=name)


def images(rows: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    """15 x 13 pixels: neither patches, windows nor halves come out even."""
    return torch.randn(rows, 3, 15, 13).to(dtype)


@each
def test_an_image_does_not_see_its_neighbours(e: Entry) -> None:
    model, x = build_on_grid(e), images(3)
    together, alone = model(x), torch.cat([model(row[None]) for row in x])
    close(together, alone, what="outputs")
    w = torch.randn_like(alone)
    a, b = gradients(model, (together * w).sum()), gradients(model, (alone * w).sum())
    for key in a:
        close(a[key], b[key], what=key)


def _compiled(e: Entry, backend: str) -> None:
    """The part itself, or the mixer that holds it; a container whole."""
    torch.compiler.reset()
    model, x = build_on_grid(e, dtype=torch.float32), images(dtype=torch.float32)
    run: Any = model
    if e.category == "image_embedding":
        run = lambda x: model.embedding(x)[0]  # noqa: E731
    elif e.category != "container":
        x, mixer, between = (
            torch.randn(2, 56, DIM),
            model.container.stages[0].blocks[0].mixer,
            model.container.between[0],
        )

        def run(x: Tensor) -> Tensor:
            ctx = Context.on_grid(8, 7, x.device)
            return between(x, ctx)[0] if e.category == "resample" else mixer(x, ctx)

    ours, plain = torch.compile(run, fullgraph=True, backend=backend)(x), run(x)
    close(ours, plain, 1e-5, "forward")
    a, b = gradients(model, ours.square().sum()), gradients(model, plain.square().sum())
    for key in a:
        close(a[key], b[key], 5e-5, key)


@each
def test_compiled_equals_eager_on_a_grid(e: Entry) -> None:
    _compiled(e, AOT)


@pytest.mark.slow
@each
def test_compiled_by_inductor_equals_eager_on_a_grid(e: Entry) -> None:
    _compiled(e, "inductor")


@each
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 6e-2)], ids=["fp32", "bf16"])
def test_narrow_types_stay_near_fp64_on_a_grid(e: Entry, dtype: torch.dtype, bound: float) -> None:
    narrow, x = build_on_grid(e, dtype=torch.float32).to(dtype), images(dtype=dtype)
    ours, wide = narrow(x), copy.deepcopy(narrow).double()(x.double())
    scale = wide.abs().max().item()
    close(ours.double() / scale, wide / scale, bound, str(dtype))


@each
@pytest.mark.parametrize("scale", [1e4, 0.0])
def test_extreme_images_stay_finite(e: Entry, scale: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = build_on_grid(e, dtype=dtype)
        y = model(images(dtype=dtype) * scale)
        assert torch.isfinite(y).all()
        for key, g in gradients(model, y.float().square().mean()).items():
            assert torch.isfinite(g).all(), f"the gradient of {key} is not finite"


@each
def test_gradcheck_on_a_grid(e: Entry) -> None:
    model = build_on_grid(e)
    assert torch.autograd.gradcheck(model, (images(1)[..., :5, :7].requires_grad_(),), fast_mode=True)
