"""LogN around every sort of position; NTK by digits; KeyNorm and cosine attention with it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dovetail.errors import BuildError
from dovetail.parts.context import Context
from oracles import oracle_for
from parts.making import make

T, M = 13, 5  # tokens, and the trained length
WIDE = torch.float64


def attention(position: Any, **fields: Any) -> Any:
    spec = {"kind": "attention", "heads": 4, "kv_heads": 2, "position": position} | fields
    return make("mixer", spec, dtype=WIDE, dim=32, context=M).eval()


def scale_queries(layer: Any, factor: Tensor) -> Any:
    """The layer with its queries times `factor` (T,), by other means than a position."""
    project = layer._project

    def scaled(x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = project(x, ctx)
        return q * factor[:, None, None], k, v

    def whole(x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        q, k, v = scaled(x, ctx)
        return *layer.position.rotate(q, k, ctx.coords, ctx), v, q, k

    layer._project, layer._whole = scaled, whole
    return layer


INNER: list[Any] = [
    "rope",
    {"kind": "rope", "width": 0.5, "layout": "interleaved", "scaling": {"kind": "yarn", "factor": 4.0}},
    {"kind": "rope", "scaling": {"kind": "dynamic", "factor": 2.0}},
    {"kind": "rerope", "window": 3},
    {"kind": "leaky_rerope", "window": 3, "factor": 2.0, "scaling": {"kind": "ntk_mixed", "factor": 2.0}},
    {"kind": "streaming_llm", "window": 3, "sinks": 2},
    "none",
    "alibi",
    "t5_buckets",
    {"kind": "deberta", "buckets": 4, "max_distance": 8},
    "shaw",
    {"kind": "prefix", "length": 2, "position": {"kind": "rerope", "window": 3}},
    "added",
]


@oracle_for("position", "logn")
@pytest.mark.parametrize("clip", [True, False], ids=["clip", "trained"])
@pytest.mark.parametrize("inner", INNER, ids=lambda p: p if isinstance(p, str) else "-".join(map(str, p.values()))[:40])
def test_queries_take_the_factor_and_the_position_inside_does_the_rest(inner: Any, clip: bool) -> None:
    """Outputs and gradients are those of the inner position alone with queries times log_m(i + 1)."""
    factor = torch.arange(1, T + 1, dtype=WIDE).log() / math.log(M)
    factor = factor.clamp_min(1) if clip else factor
    ours, theirs = attention({"kind": "logn", "clip": clip, "position": inner}), attention(inner)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(ours.get_parameter(name.replace("position.", "position.position.")))
    scale_queries(theirs, factor)
    x, weights = torch.randn(2, T, 32, dtype=WIDE), torch.randn(2, T, 32, dtype=WIDE)
    results = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        out = layer(leaf, Context.of(2, T, x.device))
        results.append(
            [out, *torch.autograd.grad((out * weights).sum(), [leaf, *layer.parameters()], allow_unused=True)]
        )
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    if clip:
        short = Context.of(2, M, x.device)
        plain = attention(inner)
        plain.load_state_dict({n.replace("position.position.", "position."): p for n, p in ours.state_dict().items()})
        assert torch.equal(ours(x[:, :M], short), plain(x[:, :M], short)), "within the trained length nothing changes"


def test_the_factor_follows_positions_in_padded_and_packed_rows() -> None:
    layer = attention({"kind": "logn", "position": "none"})
    segments = torch.tensor([[-1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    ctx = Context.of(1, T, torch.device("cpu"), segments=segments)
    found = layer.position.factor(ctx.side, WIDE)[0, :, 0, 0]
    n = torch.tensor([1, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7, 8, 9], dtype=WIDE)
    torch.testing.assert_close(found, (n.log() / math.log(M)).clamp_min(1))


def test_narrow_queries_are_rounded_once() -> None:
    position = make("position", {"kind": "logn", "trained": 3, "position": "none"}, head_dim=8)
    q = torch.randn(1, 40, 2, 8).bfloat16()
    ctx = Context.of(1, 40, q.device)
    exact = q.double() * position.factor(ctx.side, WIDE)
    assert torch.equal(position.rotate(q, q, ctx.coords, ctx)[0], exact.float().bfloat16())


@pytest.mark.parametrize(
    ("spec", "slot", "says"),
    [
        ({"kind": "logn"}, {}, "trained length"),
        ({"kind": "logn", "trained": 1}, {}, "trained length of 1"),
        ({"kind": "logn", "trained": 8}, {"causal": False}, "later ones"),
        ({"kind": "logn", "trained": 8}, {"memory_dim": 4}, "cross-attention"),
        ({"kind": "logn", "trained": 8, "position": {"kind": "learned", "length": 8}}, {}, "'learned' works by embed"),
    ],
)
def test_refusals(spec: dict[str, Any], slot: dict[str, Any], says: str) -> None:
    with pytest.raises(BuildError, match=says):
        make("position", spec, head_dim=8, **slot)


@oracle_for("rope_scaling", "ntk_fixed", "ntk_mixed", "ntk")
@pytest.mark.parametrize("dim", [2, 8, 64])
@pytest.mark.parametrize("factor", [1.0, 3.0, 8.0])
def test_ntk_by_digits(dim: int, factor: float) -> None:
    """n in a mixed base: digit m is n / (β^(m-1) λ_1 ... λ_m), the λ product exp(a m^b), all of them together factor."""
    beta, theta = 10_000.0 ** (2 / dim), []
    for kind, b in (("ntk_fixed", 1.0), ("ntk_mixed", 0.625), ("ntk_mixed", 0.3)):
        a = math.log(factor) / (dim / 2) ** b
        theta = [1 / (beta ** (m - 1) * math.exp(a * m**b)) for m in range(1, dim // 2 + 1)]
        fields = {"b": b} if kind == "ntk_mixed" else {}
        found = make("position", {"kind": "rope", "scaling": {"kind": kind, "factor": factor} | fields}, head_dim=dim)
        torch.testing.assert_close(found.inverse.double(), torch.tensor(theta, dtype=WIDE), rtol=2e-6, atol=0)
        assert theta[-1] == pytest.approx(beta ** (1 - dim / 2) / factor), "the slowest is divided by factor"
    if dim > 2:
        # The source's NTK-RoPE-old, n / (β λ)^(m-1) with λ = factor^(2/d), is a rope of theta·factor; bloc97's, which
        # `ntk` is, takes λ = factor^(2/(d-2)) (kexue.fm/archives/9675).
        old = make("position", {"kind": "rope", "theta": 10_000.0 * factor}, head_dim=dim).inverse
        expected = [(beta * factor ** (2 / dim)) ** -(m - 1) for m in range(1, dim // 2 + 1)]
        torch.testing.assert_close(old.double(), torch.tensor(expected, dtype=WIDE), rtol=2e-6, atol=0)
        ntk = make("position", {"kind": "rope", "scaling": {"kind": "ntk", "factor": factor}}, head_dim=dim).inverse
        expected = [(beta * factor ** (2 / (dim - 2))) ** -(m - 1) for m in range(1, dim // 2 + 1)]
        torch.testing.assert_close(ntk.double(), torch.tensor(expected, dtype=WIDE), rtol=2e-6, atol=0)


@oracle_for("norm", "l2")
@pytest.mark.parametrize("gain", [None, 3.5])
def test_l2_is_torchs_normalize(gain: float | None) -> None:
    norm = make("norm", {"kind": "l2", "gain": gain}, dtype=WIDE)
    assert len(list(norm.parameters())) == (gain is not None)
    x = torch.randn(4, 16, dtype=WIDE, requires_grad=True)
    ours, theirs = norm(x), (gain or 1.0) * F.normalize(x, dim=-1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weights = torch.randn_like(ours)
    a, b = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def dense(layer: Any, x: Tensor, scale: Tensor | float, on: str) -> Tensor:
    """exp(scale · q · k) with rope on directions alone, by the formula."""
    q, k, v = layer.qkv(x).split([32, 16, 16], -1)
    q, k, v = (t.unflatten(-1, (-1, 8)) for t in (q, k, v))
    q = F.normalize(q, dim=-1) if on != "key" else q
    k = F.normalize(k, dim=-1) if on != "query" else k
    ctx = Context.of(*x.shape[:2], x.device)
    q, k = make("position", "rope", head_dim=8).rotate(q, k, ctx.coords, ctx)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    s = scale * (q @ k.mT)
    s = s.masked_fill(torch.ones(s.shape[-2:]).triu(1).bool(), -math.inf)
    return layer.out((s.softmax(-1) @ v).transpose(1, 2).flatten(-2))


LAMBDA = 4 * math.log(256)  # of cosine attention, n fixed at half of a trained length of 512
COSINE: dict[str, tuple[dict[str, Any], Any, str]] = {
    "KeyNorm": ({"qk_norm": "l2", "qk_norm_on": "key", "scale": 1.0}, 1.0, "key"),
    "QueryNorm": ({"qk_norm": "l2", "qk_norm_on": "query", "scale": 1.0}, 1.0, "query"),
    "CosA": ({"qk_norm": "l2", "scale": LAMBDA}, LAMBDA, "both"),
    "CosA, learned": ({"qk_norm": {"kind": "l2", "gain": LAMBDA**0.5}, "scale": 1.0}, LAMBDA, "both"),
    "CosA-log n": (
        {"qk_norm": "l2", "scale": 4 * math.log(512), "position": {"kind": "logn", "trained": 512, "clip": False}},
        4 * torch.arange(1, T + 1, dtype=WIDE).log()[:, None],
        "both",
    ),
    "KeyNorm-log n": (
        {
            "qk_norm": "l2",
            "qk_norm_on": "key",
            "scale": 1.0,
            "position": {"kind": "logn", "trained": 512, "clip": False},
        },
        torch.arange(1, T + 1, dtype=WIDE).log()[:, None] / math.log(512),
        "key",
    ),
}


@oracle_for("norm", "l2")
@pytest.mark.parametrize("name", COSINE)
def test_keynorm_and_cosine_attention(name: str) -> None:
    """kexue.fm/archives/9859, outputs and gradients."""
    fields, scale, on = COSINE[name]
    layer = attention(**({"position": "rope"} | fields))
    x = torch.randn(2, T, 32, dtype=WIDE, requires_grad=True)
    ours, theirs = layer(x, Context.of(2, T, x.device)), dense(layer, x, scale, on)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    weights = torch.randn_like(ours)
    pairs = zip(*(torch.autograd.grad((y * weights).sum(), [x, layer.qkv.weight]) for y in (ours, theirs)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_a_norm_of_nothing_is_refused() -> None:
    with pytest.raises(BuildError, match="qk_norm_on='key' without a qk_norm"):
        attention("rope", qk_norm_on="key")
