"""Mixers with a matrix state: the gated delta rule against transformers, the others against formulas in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from dovetail.errors import BuildError
from dovetail.parts.context import Context
from dovetail.parts.recurrent.borders import Borders
from dovetail.parts.recurrent.short_convolution import ShortConvolution
from dovetail.parts.state import Room, VectorState
from dovetail.spec import Slot
from oracles import oracle_for
from parts.making import make

CPU = torch.device("cpu")


def close(a: Tensor, b: Tensor, tolerance: float, what: str = "") -> None:
    worst, largest = float((a - b).detach().abs().max()), float(b.detach().abs().max())
    assert worst <= tolerance * max(1.0, largest), f"{what}: {worst}"


def same_gradients(ours: Tensor, theirs: Tensor, inputs: list[Tensor], tolerance: float) -> None:
    up = torch.randn_like(theirs)
    grads = [torch.autograd.grad((y * up).sum(), inputs) for y in (ours, theirs)]
    for i, (a, b) in enumerate(zip(*grads, strict=True)):
        close(a, b, tolerance, f"gradient {i}")


def interleaved(H: int, widths: list[int]) -> Tensor:
    """Rows of maps kept head by head, [q|k|v|z] of each, put into the order of maps, [q of every head | k ... ]."""
    parts = torch.arange(H * sum(widths)).view(H, -1).split(widths, 1)
    return torch.cat([part.flatten() for part in parts])


@oracle_for("mixer", "gated_delta_net")
@pytest.mark.parametrize("shared", [1, 2], ids=["a head each", "two values a key"])
@pytest.mark.parametrize("T", [5, 70])
def test_qwen3_next(T: int, shared: int) -> None:
    """Outputs and gradients of every weight, in fp32 as transformers computes it."""
    H, D, Dv = 2, 6, 4
    config = Qwen3NextConfig(
        hidden_size=16, num_hidden_layers=1, layer_types=["linear_attention"], linear_num_key_heads=H,
        linear_num_value_heads=H * shared, linear_key_head_dim=D, linear_value_head_dim=Dv, rms_norm_eps=1e-5,
    )  # fmt: skip
    theirs = Qwen3NextGatedDeltaNet(config, 0).float()
    spec = {"kind": "gated_delta_net", "heads": H, "value_heads": H * shared, "head_dim": D, "value_dim": Dv}
    ours = make("mixer", spec)
    qkvz = interleaved(H, [D, D, shared * Dv, shared * Dv])
    ba = interleaved(H, [shared, shared])
    split = ours.qkv.out_features
    theirs.in_proj_qkvz.weight.data[qkvz] = torch.cat([ours.qkv.weight, ours.gate.weight]).data
    theirs.in_proj_ba.weight.data[ba] = torch.cat([ours.beta.weight, ours.decay.weight]).data
    pairs = [
        (ours.convolution.weight, theirs.conv1d.weight),
        (ours.a_log, theirs.A_log),
        (ours.dt_bias, theirs.dt_bias),
        (ours.norm.weight, theirs.norm.weight),
        (ours.out.weight, theirs.out_proj.weight),
    ]
    ours.norm.weight.data.uniform_(0.5, 1.5)
    for mine, other in pairs:
        other.data.copy_(mine.data)
    x = torch.randn(2, T, 16, requires_grad=True)
    a, b = ours(x, Context.of(2, T, CPU)), theirs(x)
    close(a, b, 1e-5, "output")
    up = torch.randn_like(b)
    fused = [ours.qkv.weight, ours.gate.weight, ours.beta.weight, ours.decay.weight]
    grads = torch.autograd.grad((a * up).sum(), [x, *fused, *(m for m, _ in pairs)])
    other = torch.autograd.grad(
        (b * up).sum(), [x, theirs.in_proj_qkvz.weight, theirs.in_proj_ba.weight, *(t for _, t in pairs)]
    )
    maps, gates = other[1][qkvz], other[2][ba]
    expected = [other[0], maps[:split], maps[split:], gates[: H * shared], gates[H * shared :], *other[3:]]
    for i, (one, two) in enumerate(zip(grads, expected, strict=True)):
        close(one, two, 5e-5, f"gradient {i}")


@oracle_for("mixer", "gla")
@pytest.mark.parametrize("gate", ["silu", None])
def test_gated_linear_attention(gate: str | None) -> None:
    """Token by token and head by head in fp64."""
    H, D, Dv, T = 2, 3, 4, 9
    spec = {"kind": "gla", "heads": H, "head_dim": D, "value_dim": Dv, "gate_rank": 5, "gate": gate}
    unit = make("mixer", spec | {"gate_temperature": 2.0}, dtype=torch.float64)
    unit.decay_up.bias.data.normal_()
    unit.norm.weight.data.uniform_(0.5, 1.5)
    x = torch.randn(1, T, 16, dtype=torch.float64, requires_grad=True)
    wq, wk, wv = unit.qkv.weight.split([H * D, H * D, H * Dv])
    rows: list[list[Tensor]] = [[] for _ in range(T)]
    for h in range(H):
        S = torch.zeros(D, Dv, dtype=torch.float64)
        keyed, valued = slice(h * D, (h + 1) * D), slice(h * Dv, (h + 1) * Dv)
        for t in range(T):
            logits = (unit.decay_up.weight @ (unit.decay_down.weight @ x[0, t]) + unit.decay_up.bias)[keyed]
            S = torch.sigmoid(logits).sqrt()[:, None] * S + torch.outer(wk[keyed] @ x[0, t], wv[valued] @ x[0, t])
            o = S.T @ (wq[keyed] @ x[0, t]) / D**0.5
            o = o / (o.square().mean() + 1e-5).sqrt() * unit.norm.weight
            rows[t].append(o if gate is None else o * F.silu(unit.gate.weight[valued] @ x[0, t]))
    plain = torch.stack([unit.out.weight @ torch.cat(row) for row in rows])[None]
    ours = unit(x, Context.of(1, T, CPU))
    close(ours, plain, 1e-12)
    same_gradients(ours, plain, [x, *unit.parameters()], 1e-11)


@oracle_for("mixer", "delta_net")
@pytest.mark.parametrize(
    "options",
    [{}, {"convolution": None, "gate": "silu"}, {"value_heads": 4, "value_dim": 3, "beta_max": 2.0}],
    ids=["default", "gate, no convolution", "shared keys, negative eigenvalues"],
)
def test_delta_net(options: dict[str, Any]) -> None:
    """Token by token and head by head in fp64."""
    H, D, T = 2, 3, 9
    unit = make("mixer", {"kind": "delta_net", "heads": H, "head_dim": D} | options, dtype=torch.float64)
    Hv, Dv = unit.value_heads, unit.value_dim
    unit.norm.weight.data.uniform_(0.5, 1.5)
    x = torch.randn(1, T, 16, dtype=torch.float64, requires_grad=True)
    mixed = x[0] @ unit.qkv.weight.T
    if unit.convolution is not None:
        wide = F.pad(mixed.T[None], (3, 0))
        mixed = F.conv1d(wide, unit.convolution.weight, groups=mixed.shape[1])[0].T
    q, k, v = (t.unflatten(1, (n, -1)) for t, n in zip(F.silu(mixed).split([H * D, H * D, Hv * Dv], 1), (H, H, Hv)))
    beta = options.get("beta_max", 1.0) * torch.sigmoid(x[0] @ unit.beta.weight.T)
    rows: list[list[Tensor]] = [[] for _ in range(T)]
    for h in range(Hv):
        S = torch.zeros(D, Dv, dtype=torch.float64)
        for t in range(T):
            query, key = (y[t, h * H // Hv] for y in (q, k))
            query, key = (y / (y.square().sum() + 1e-6).sqrt() for y in (query, key))
            S = S - beta[t, h] * torch.outer(key, key @ S) + beta[t, h] * torch.outer(key, v[t, h])
            o = S.T @ query / D**0.5
            rows[t].append(o / (o.square().mean() + 1e-5).sqrt() * unit.norm.weight)
    plain = torch.stack([torch.cat(row) for row in rows])
    plain = plain if unit.gate is None else plain * F.silu(x[0] @ unit.gate.weight.T)
    plain = (plain @ unit.out.weight.T)[None]
    ours = unit(x, Context.of(1, T, CPU))
    close(ours, plain, 1e-12)
    same_gradients(ours, plain, [x, *unit.parameters()], 1e-10)


@pytest.mark.parametrize("kernel", [1, 4])
def test_short_convolution(kernel: int) -> None:
    """torch.nn.Conv1d over each document alone, whether packed, padded or fed in chunks."""
    conv = ShortConvolution(6, kernel, Slot(dim=6), bias=True).double()
    with torch.no_grad():
        for p in conv.parameters():
            p.normal_()
    x = torch.randn(2, 9, 6, dtype=torch.float64)

    def alone(x: Tensor) -> Tensor:
        wide = F.pad(x.transpose(1, 2), (kernel - 1, 0))
        return F.conv1d(wide, conv.weight, conv.bias, groups=6).transpose(1, 2)

    close(conv(x, Context.of(2, 9, CPU)), alone(x), 1e-14)
    segments = torch.tensor([[0, 0, -1, 0, 1, 1, 1, 1, 1], [-1, -1, 3, 3, 3, 3, 4, -1, -1]])
    y = conv(x, Context.of(2, 9, CPU, segments=segments))
    for b, n in ((0, 0), (0, 1), (1, 3), (1, 4)):
        here = segments[b] == n
        close(y[b, here], alone(x[b, here][None])[0], 1e-14)
    state = VectorState(last=conv.last(Room(2, 9, CPU, torch.float64)))
    with torch.no_grad():
        steps = [conv(part, Context.of(2, part.shape[1], CPU), state) for part in x.split([1, 2, 1, 5], 1)]
    close(torch.cat(steps, 1), alone(x), 1e-14)


def test_borders() -> None:
    """A first document goes on, others begin anew, padding does not end one."""
    found = Borders.between(torch.tensor([[-1, 0, -1, 0, 1, 1], [0, 1, 2, -1, 2, -1]]))
    assert found.real.int().tolist() == [[0, 1, 0, 1, 1, 1], [1, 1, 1, 0, 1, 0]]
    assert found.first.int().tolist() == [[0, 0, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0]]


@pytest.mark.parametrize("kind", ["gla", "delta_net", "gated_delta_net"])
def test_state_is_fp32_and_does_not_grow(kind: str) -> None:
    unit = make("mixer", {"kind": kind, "heads": 2}, dtype=torch.bfloat16)
    few, many = (unit.new_state(Room(3, n, CPU, torch.bfloat16)) for n in (8, 8192))
    assert few["matrix"].dtype == torch.float32 and few.nbytes() == many.nbytes()
    assert [p.path for p in unit.plans("cpu", 512).values()] == ["chunked", "step"]


def test_start_of_the_decay() -> None:
    """A in 1..16 and softplus(b) in 1e-3..0.1."""
    unit = make("mixer", {"kind": "gated_delta_net", "heads": 200, "head_dim": 1, "value_dim": 1})
    rate, step = unit.a_log.exp(), F.softplus(unit.dt_bias)
    assert 1 <= rate.min() < 2 and 15 < rate.max() <= 16.001
    assert 0.99e-3 <= step.min() < 1.2e-3 and 0.08 < step.max() <= 0.1001


@pytest.mark.parametrize(
    ("spec", "slot", "named"),
    [
        ({"kind": "gla"}, {"causal": False}, "both ways"),
        ({"kind": "delta_net"}, {"causal": False}, "both ways"),
        ({"kind": "gated_delta_net"}, {"memory_dim": 16}, "encoder"),
        ({"kind": "gla", "heads": 3}, {}, "do not divide"),
        ({"kind": "delta_net", "heads": 2, "value_heads": 3}, {}, "cannot share"),
    ],
)
def test_refusals(spec: dict[str, Any], slot: dict[str, Any], named: str) -> None:
    with pytest.raises(BuildError, match=named):
        make("mixer", spec, **slot)


def test_the_decays_of_several_heads_compile_whole() -> None:
    """Their gradient comes with the heads before the tokens, and the compiled backward must take it as it lies."""
    torch.compiler.reset()
    options = {"heads": 2, "head_dim": 3, "convolution": None, "gate": None}
    mixer: Any = make("mixer", {"kind": "gated_delta_net"} | options, dim=8, dtype=torch.float64)
    x, learned = torch.randn(2, 3, 8, dtype=torch.float64), [mixer.a_log, mixer.dt_bias, mixer.decay.weight]

    def run(x: Tensor) -> Tensor:
        return mixer(x, Context.of(2, 3, CPU)).square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(*(torch.autograd.grad(f(x), learned) for f in (compiled, run)), strict=True):
        close(ours, theirs, 1e-12)
