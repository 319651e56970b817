"""FLASH's mixed chunk attention against an independent implementation's numbers and the paper's formula in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import dovetail as dt
from dovetail.errors import BuildError, RunError
from dovetail.parts.context import Context
from oracles import oracle_for
from parts.making import make

CPU = torch.device("cpu")
GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "flash.safetensors")
VIEWS = ("quad_q", "lin_q", "quad_k", "lin_k")  # the order of FLASH-pytorch's offset scales
SMALL = {"kind": "flash", "hidden": 9, "key_dim": 5, "chunk": 4, "position": "none"}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12, what: str = "") -> None:
    worst, largest = float((a - b).detach().abs().max()), float(b.detach().abs().max())
    assert worst <= tolerance * max(1.0, largest), f"{what}: {worst}"


def ours_of(given: dict[str, Tensor], views: tuple[str, ...], scales: str) -> dict[str, Tensor]:
    """FLASH-pytorch's parameters, or their gradients, by our names: they have v before u, and z in a map of its own."""
    wide = given["to_hidden.0.weight"].shape[0] // 2
    out = {}
    for name in ("weight", "bias"):
        v, u = given[f"to_hidden.0.{name}"].split(wide)
        out[f"uvz.{name}"] = torch.cat([u, v, given[f"to_qk.0.{name}"]])
        out[f"out.{name}"] = given[f"to_out.{name}" if f"to_out.{name}" in given else f"to_out.0.{name}"]
    for i, view in enumerate(views):
        out |= {f"{view}.weight": given[f"{scales}.gamma"][i], f"{view}.bias": given[f"{scales}.beta"][i]}
    return out


@oracle_for("mixer", "flash")
@oracle_for("normaliser", "laplace")
@pytest.mark.parametrize("case", ["flash.causal", "flash.both", "gau.laplace"])
def test_independent_numbers(case: str) -> None:
    """Outputs and all gradients, as lucidrains/FLASH-pytorch gives them without its bias by distance.

    Its causal linear part is not divided by the number of chunks, so its numbers are of two chunks.
    """
    key = f"{case}."
    given = {n.removeprefix(key): t for n, t in GOLDEN.items() if n.startswith(key)}
    spec: dict[str, Any] = SMALL
    views, scales = VIEWS, "qk_offset_scale"
    if case == "gau.laplace":
        spec = {"kind": "gau", "hidden": 9, "key_dim": 5, "normaliser": "laplace", "scale": 1.0, "position": "none"}
        views, scales = ("q_affine", "k_affine"), "offsetscale"
    unit = make("mixer", spec, dim=6, causal=case == "flash.causal", dtype=torch.float64)
    mine = dict(unit.named_parameters())
    theirs, pulls = (
        ours_of({n[2:]: t for n, t in given.items() if n.startswith(which)}, views, scales) for which in ("p.", "g.")
    )
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        mine[name].data.copy_(value)
    x = given["x"].requires_grad_()
    y = unit(x, Context.of(x.shape[0], x.shape[1], CPU))
    close(y, given["y"], what="output")
    grads = torch.autograd.grad((y * given["weight"]).sum(), [x, *mine.values()])
    close(grads[0], given["d_x"], what="x")
    for name, grad in zip(mine, grads[1:], strict=True):
        close(grad, pulls[name], what=name)


def formula(unit: Any, x: Tensor, causal: bool, chunk: int) -> Tensor:
    """One row (T,C) as the paper says it, chunk by chunk, every sum written out."""
    e, s = 9, 6
    u, v, z = torch.nn.functional.silu(x @ unit.uvz.weight.t() + unit.uvz.bias).split([e, e, s], -1)
    turn = torch.arange(len(x))[:, None] * 10_000.0 ** (-2 * torch.arange(s // 2, dtype=torch.float32) / s)
    turn = torch.polar(torch.ones_like(turn), turn).to(torch.complex128)

    def view(name: str) -> Tensor:
        part = getattr(unit, name)
        z_ = z * part.weight + part.bias
        turned = torch.complex(z_[:, : s // 2], z_[:, s // 2 :]) * turn
        return torch.cat([turned.real, turned.imag], 1)

    quad_q, quad_k, lin_q, lin_k = map(view, ("quad_q", "quad_k", "lin_q", "lin_k"))
    cuts = [slice(a, min(a + chunk, len(x))) for a in range(0, len(x), chunk)]
    out = []
    for g, own in enumerate(cuts):
        a = (quad_q[own] @ quad_k[own].t() / chunk).clamp(min=0) ** 2  # the authors' relu(qk / C)²
        quadratic = (a.tril() if causal else a) @ v[own]
        seen = cuts[:g] if causal else cuts
        summed = sum((lin_k[h].t() @ v[h] for h in seen), torch.zeros(s, e, dtype=x.dtype))
        tokens = sum(h.stop - h.start for h in seen)
        out.append(quadratic + lin_q[own] @ summed / max(1, tokens))
    return (u * torch.cat(out)) @ unit.out.weight.t() + unit.out.bias


@oracle_for("mixer", "flash")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("T", [1, 4, 6, 19])
def test_formula(T: int, causal: bool) -> None:
    """Alone, and as one of several documents of a row; gradients too."""
    unit = make("mixer", SMALL | {"key_dim": 6, "position": "rope"}, causal=causal, dtype=torch.float64)
    for p in unit.parameters():
        p.data = torch.randn_like(p) * 0.6
    x = torch.randn(T, 16, dtype=torch.float64, requires_grad=True)
    plain = formula(unit, x, causal, 4)
    other = torch.randn(3, 16, dtype=torch.float64)
    segments = torch.tensor([0] * 2 + [1] * T + [2])[None]
    ours = (
        unit(x[None], Context.of(1, T, CPU))[0],
        unit(torch.cat([other[:2], x, other[2:]])[None], Context.of(1, T + 3, CPU, segments=segments))[0, 2 : 2 + T],
    )
    weights = torch.randn_like(plain)
    inputs = [x, *unit.parameters()]
    expected = torch.autograd.grad((plain * weights).sum(), inputs, retain_graph=True, materialize_grads=True)
    for y in ours:
        close(y, plain, 1e-6)  # the angles are fp32
        for a, b in zip(
            torch.autograd.grad((y * weights).sum(), inputs, materialize_grads=True), expected, strict=True
        ):
            close(a, b, 1e-5)


def test_state_does_not_grow() -> None:
    spec = {"kind": "decoder", "vocab": 9, "dim": 16, "depth": 1, "blocks": {"mixer": SMALL, "feedforward": None}}
    model = dt.build(spec, dtype=torch.bfloat16)
    states = [model.new_state(2, capacity) for capacity in (8, 4096)]
    assert states[0].nbytes() == states[1].nbytes() == 2 * (2 * 5 * 9 * 4 + 4 * (5 + 9) * 2)
    with torch.no_grad():
        model(torch.zeros(2, 3, dtype=torch.long), state=states[0])
    with pytest.raises(RunError, match="cannot be truncated"):
        states[0].truncate(1)


@pytest.mark.parametrize(
    ("spec", "slot", "named"),
    [
        (SMALL, {"memory_dim": 16}, "encoder"),
        (SMALL | {"position": "t5_buckets"}, {}, "score"),
        (
            SMALL | {"key_dim": 4, "position": {"kind": "rope", "scaling": {"kind": "dynamic", "factor": 2.0}}},
            {"context": 8},
            "keeps no keys",
        ),
    ],
)
def test_refusals(spec: dict[str, Any], slot: dict[str, Any], named: str) -> None:
    with pytest.raises(BuildError, match=named):
        make("mixer", spec, **slot)


def test_plans_name_what_runs() -> None:
    causal = make("mixer", SMALL).plans("cpu", 512)
    assert [causal[use].path for use in causal] == ["chunked", "chunked", "recurrent"]
    assert "decoding" not in make("mixer", SMALL, causal=False).plans("cpu", 512)
