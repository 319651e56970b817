"""Products with one vector that take in what stands beside them: the operation against fp64, and in a traced step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import dovetail as dt
from dovetail.kernels import gate, linear
from dovetail.kernels.gate import reference
from dovetail.kernels.installed import TRITON
from dovetail.kernels.linear import beside
from dovetail.sampling import Captured

pytestmark = pytest.mark.skipif(not TRITON, reason="Triton is not installed")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NARROW = torch.bfloat16 if GPU else torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
@pytest.mark.parametrize("width", [64, 2100])
@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("normed", [False, True])
def test_the_operation_is_its_formula(normed: bool, activation: str | None, width: int, dtype: torch.dtype) -> None:
    from dovetail.kernels.linear import vector

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype)

    x, weight, scale = made(width), (made(10, width) / width**0.5), made(width) if normed else None
    for residual in (None, made(5 if activation else 10)):
        wide = x.double()
        if scale is not None:
            wide = wide / (wide.square().mean() + 1e-3).sqrt() * scale.double()
        right = weight.double() @ wide
        right = right if activation is None else reference.gated(right, activation)
        right = right if residual is None else right + residual.double()
        found = vector.step(x, weight, scale, 1e-3, activation, residual, True)
        rounded = 4 * torch.finfo(dtype).eps * max(1.0, float(right.abs().max()))
        torch.testing.assert_close(found.double(), right, rtol=0, atol=rounded)


@pytest.mark.parametrize(
    "change, taken",
    [({}, 6), ({"blocks.*.feedforward.activation": "gelu"}, 5), ({"norm": "layer", "blocks.*.norm": "layer"}, 3)],
)
def test_a_step_takes_in_what_it_can(change: dict[str, Any], taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two norms and a gate, two sums a layer, the last norm: all of a LLaMA's; the scores are those without, and what
    writes to the state is still there."""
    blocks = {"mixer": {"kind": "attention", "heads": 2}, "feedforward": {"kind": "glu", "hidden": 24}}
    spec = {"kind": "decoder", "vocab": 30, "dim": 16, "depth": 1, "context": 16, "blocks": blocks}
    model = dt.build(spec, seed=0, device=DEVICE, dtype=NARROW).eval()
    model = dt.build(dt.override(model.spec, change), seed=0, device=DEVICE, dtype=NARROW).eval()
    monkeypatch.setattr(gate, "_path", lambda both, activation: "triton")  # as on CUDA, where it traces otherwise
    monkeypatch.setattr(
        linear, "_by_vector", lambda x, w, b: x.numel() == w.shape[1] and b is None and isinstance(w, nn.Parameter)
    )
    found, counts = [], []
    for fused in (False, True):
        runner = Captured(model, 1, 12)

        def compiled(graph: fx.GraphModule, inputs: Any, fused: bool = fused) -> Any:
            assert linear._stepping
            if fused:
                counts.append(beside.take_in(graph))
            return graph

        monkeypatch.setattr(runner, "_compile", compiled)
        torch.compiler.reset()
        run = runner.read([[1, 2, 3]], 6)
        found.append(torch.stack([run(torch.tensor([token], device=DEVICE)).clone() for token in (5, 9, 11)]))
    largest = float(found[0].abs().max())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=8 * torch.finfo(NARROW).eps * largest)
    assert counts == [taken]
    torch.compiler.reset()
