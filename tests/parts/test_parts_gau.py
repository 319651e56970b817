"""The gated attention unit against its authors' numbers, its normalisers against their formulas in fp64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.activations import LaplaceActivation

import dovetail as dt
from dovetail.errors import BuildError
from dovetail.kernels import laplace
from dovetail.kernels.attention import Region, Score
from dovetail.kernels.squared_relu import reference, squared_relu
from dovetail.parts.context import Context
from dovetail.parts.mask import Causal, Full, Mask, Window
from dovetail.spec import Spec
from oracles import oracle_for
from parts.making import make

CPU = torch.device("cpu")
GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "gau_alpha.safetensors")
NAMES = {"i_dense": "uvz", "o_dense": "out", "q_scaleoffset": "q_affine", "k_scaleoffset": "k_affine"}
KIND = {"softmax": "softmax", "softmax_plus": "softmax_plus", "squared_relu": {"kind": "relu2", "length": 9}}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12, what: str = "") -> None:
    worst, largest = float((a - b).detach().abs().max()), float(b.detach().abs().max())
    assert worst <= tolerance * max(1.0, largest), f"{what}: {worst}"


@oracle_for("mixer", "gau")
@oracle_for("normaliser", "softmax", "softmax_plus", "relu2")
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("method", list(KIND))
def test_authors_numbers(method: str, bias: bool) -> None:
    """Outputs and all gradients of rows with 9, 6 and 1 real tokens, as JunnYu/GAU-alpha-pytorch gives them."""
    key = f"unit.{method}.{'bias' if bias else 'plain'}."
    given = {n.removeprefix(key): t for n, t in GOLDEN.items() if n.startswith(key)}
    rope = {"kind": "rope", "layout": "interleaved"}
    spec = {"kind": "gau", "hidden": 20, "key_dim": 8, "bias": bias, "normaliser": KIND[method], "position": rope}
    unit = make("mixer", spec, dim=12, causal=False, dtype=torch.float64)
    mine = dict(unit.named_parameters())
    ours = {n: f"{NAMES[n.split('.')[0]]}.{n.split('.')[1]}" for n in (k[2:] for k in given if k.startswith("p."))}
    assert mine.keys() == set(ours.values())
    for theirs, name in ours.items():
        mine[name].data.copy_(given[f"p.{theirs}"])
    x = given["x"].requires_grad_()
    # Their relu² divides by each row's own length, so its numbers are of whole rows.
    mask = None if method == "squared_relu" else GOLDEN["unit.mask"]
    out = unit(x, Context.of(3, 9, CPU, attention_mask=mask))
    real = given["weight"] != 0
    # The angles of RoPE are fp32 here and there, and come by other operations: 1e-7 of an angle up to 8.
    close(out * real, given["y"] * real, 1e-6, "output")
    grads = torch.autograd.grad((out * given["weight"]).sum(), [x, *mine.values()])
    close(grads[0], given["d_x"], 1e-6, "x")
    back = {name: theirs for theirs, name in ours.items()}
    for name, grad in zip(mine, grads[1:], strict=True):
        close(grad, given[f"g.{back[name]}"], 1e-6, name)


def weights(spec: dict[str, Any] | str, scores: Tensor, seen: Tensor) -> Tensor:
    """What the formulas say of scores (T,S): row by row, key by key."""
    part: Any = Spec.parse("normaliser", spec)
    out = torch.zeros_like(scores)
    for i in range(scores.shape[0]):
        keys = seen[i].nonzero().flatten().tolist()
        if part.kind == "relu2":
            for j in keys:
                out[i, j] = scores[i, j].clamp(min=0) ** 2 / part.length
            continue
        if part.kind == "laplace":
            out[i, keys] = LaplaceActivation()(scores[i, keys])  # its constants have six digits
            continue
        factor = 1.0 if part.kind == "softmax" else math.log(max(len(keys), part.least)) / math.log(part.base)
        total = sum(torch.exp(factor * scores[i, j]) for j in keys)
        for j in keys:
            out[i, j] = torch.exp(factor * scores[i, j]) / total
    return out


@oracle_for("normaliser", "softmax", "softmax_plus", "relu2", "laplace")
@pytest.mark.parametrize("terms", [False, True], ids=["no terms", "terms"])
@pytest.mark.parametrize("rule", [Causal(), Full(), Causal() & Window(size=3)], ids=["causal", "full", "window"])
@pytest.mark.parametrize(
    "spec",
    [
        "softmax",
        "softmax_plus",
        {"kind": "softmax_plus", "base": 9, "least": 4},
        {"kind": "relu2", "length": 5},
        "laplace",
        {"kind": "laplace", "length": 5},
    ],
    ids=str,
)
def test_weights(spec: Any, rule: Mask, terms: bool) -> None:
    """By fp64 formula; what a position adds to the score is scaled with it."""
    T = 7
    module = make("normaliser", spec)
    q, k, v = (torch.randn(1, 1, T, n, dtype=torch.float64, requires_grad=True) for n in (4, 4, 6))
    bias = make("position", {"kind": "t5_buckets", "buckets": 8}, dtype=torch.float64, causal=rule != Full())
    ctx = Context.of(1, T, CPU)
    mask = ctx.bind(rule)
    score = bias.score(q, k, mask.at, ctx, None) if terms else None
    ready, prepared = module.prepare(q, score, mask)
    ours = module.mix([Region(k, v, mask, prepared)], ready, 0.5)[0, 0]
    scores = 0.5 * q[0, 0] @ k[0, 0].t()
    if module.spec.kind == "laplace":
        scores = scores / (module.length or mask.dense()[0, 0].sum(-1, keepdim=True))
    if terms:
        scores = scores + bias.score(q, k, mask.at, ctx, None).bias(mask.at, 0.5)[0, 0]
    plain = weights(spec, scores, mask.dense()[0, 0]) @ v[0, 0]
    tolerance = 2e-5 if module.spec.kind == "laplace" else 1e-12
    close(ours, plain, tolerance)
    up = torch.randn_like(plain)
    for a, b in zip(*(torch.autograd.grad((y * up).sum(), [q, k, v]) for y in (ours, plain)), strict=True):
        close(a, b, tolerance)


@pytest.mark.parametrize("normaliser", ["softmax_plus", {"kind": "relu2", "length": 16}], ids=["softmax_plus", "relu2"])
def test_rerope_in_a_gau(normaliser: Any) -> None:
    """Two regions against one dense product over min(i - j, window)."""
    T, window = 11, 4
    spec = {"kind": "gau", "hidden": 10, "key_dim": 6, "normaliser": normaliser}
    unit = make("mixer", spec | {"position": {"kind": "rerope", "window": window}}, dtype=torch.float64)
    x = torch.randn(1, T, 16, dtype=torch.float64)
    u, v, z = torch.nn.functional.silu(unit.uvz(x[0])).split([10, 10, 6], -1)
    q, k = unit.q_affine(z), unit.k_affine(z)
    scores = torch.zeros(T, T, dtype=torch.float64)
    frequency = 10_000.0 ** (-2 * torch.arange(3, dtype=torch.float32) / 6)
    for i in range(T):
        for j in range(i + 1):
            angle = (min(i - j, window) * frequency).double()
            a, b = torch.complex(q[i, :3], q[i, 3:]), torch.complex(k[j, :3], k[j, 3:])
            scores[i, j] = (a * b.conj() * torch.polar(torch.ones_like(angle), angle)).real.sum() / math.sqrt(6)
    plain = unit.out(u * (weights(normaliser, scores, torch.ones(T, T).tril() > 0) @ v))
    close(unit(x, Context.of(1, T, CPU))[0], plain, 1e-6)  # the angles are fp32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", [Causal(), Causal() & Window(size=70), Full()], ids=["causal", "window", "full"])
def test_bands(rule: Mask, dtype: torch.dtype) -> None:
    """relu² and laplace: three bands of queries against the plain twin, forward and backward; grouped heads, a score's
    terms."""
    T = 600
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    mask = Context.of(1, T, CPU).bind(rule)
    bias = make("position", {"kind": "t5_buckets", "buckets": 8}, heads=2, dtype=dtype)
    for score in (None, bias.score(None, None, mask.at, Context.of(1, T, CPU), None)):
        q, k, v = (torch.randn(1, h, T, n).to(dtype).requires_grad_() for h, n in ((2, 4), (1, 4), (1, 3)))
        for ours, plain in (
            (squared_relu(q, k, v, count=9, mask=mask, score=score), reference.attend(q, k, v, mask, score, 0.5, 9)),
            (
                laplace.laplace(q, k, v, mask=mask, score=score),
                laplace.reference.attend(q, k, v, mask, score, 0.5),
            ),
        ):
            assert ours.dtype == dtype
            close(ours.double(), plain.double(), tolerance)
            up = torch.randn_like(plain)
            for a, b in zip(*(torch.autograd.grad((y * up).sum(), [q, k, v]) for y in (ours, plain)), strict=True):
                close(a.double(), b.double(), tolerance)


def test_softmax_plus_keeps_sharpness() -> None:
    """Scores of one distribution: from 64 to 4,096 keys the weights' entropy grows less than half as fast."""

    def growth(kind: str) -> float:
        found = []
        for n in (64, 4096):
            scores = 4 * torch.randn(1, 1, 200, n, dtype=torch.float64)
            factor = 1.0 if kind == "softmax" else math.log(n) / math.log(512)
            q = make("normaliser", kind).prepare(torch.ones(1, 1, n, 1), None, Context.of(1, n, CPU).bind(Full()))[0]
            assert abs(float(q[0, 0, 0, 0]) - factor) < 1e-6
            p = (scores * float(q[0, 0, 0, 0])).softmax(-1)
            found.append(float(-(p * p.clamp_min(1e-300).log()).sum(-1).mean()))
        return found[1] - found[0]

    assert growth("softmax_plus") < 0.5 * growth("softmax")


def test_deberta_and_dropout_and_counts() -> None:
    """Content terms read the unit's own maps; counts of keys do not depend on the bands that they are made in."""
    spec = {"kind": "gau", "hidden": 8, "key_dim": 4, "dropout": 0.5, "position": {"kind": "deberta", "buckets": 4}}
    unit = make("mixer", spec, causal=False)
    x, ctx = torch.randn(1, 5, 16), Context.of(1, 5, CPU)
    close(unit.project(x[0], "key")[:, 0], unit.k_affine(unit.activation(unit.uvz(x))[0, :, 16:]), 1e-5)
    assert unit.eval()(x, ctx).isfinite().all()
    assert not torch.equal(unit.train()(x, ctx), unit(x, ctx))
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, -1], [2, -1, -1, 3, 3, 3, 3]])
    mask = Context.of(2, 7, CPU, segments=segments).bind(Causal() & Window(size=2))
    assert mask.counts().tolist() == [[1, 2, 2, 1, 2, 2, 0], [1, 0, 0, 1, 2, 2, 2]]
    assert torch.equal(mask.counts(3), mask.counts())


@pytest.mark.parametrize(
    ("spec", "slot", "named"),
    [
        ({"kind": "gau"}, {"memory_dim": 16}, "encoder"),
        ({"kind": "gau", "normaliser": "relu2"}, {}, "trained length"),
        ({"kind": "gau", "normaliser": {"kind": "softmax_plus", "base": 1}}, {}, "logarithm"),
        ({"kind": "gau", "scale": 1.0, "position": "deberta"}, {"causal": False}, "sets the scale"),
        ({"kind": "gau", "dropout": 0.1, "position": "rerope"}, {}, "dropout"),
        ({"kind": "gau", "position": "learned"}, {"context": 8}, "embed"),
        ({"kind": "gau", "mask": "causal"}, {}, "hides nothing"),
        ({"kind": "gau", "normaliser": "relu2", "position": "shaw"}, {"context": 8}, "value terms"),
    ],
)
def test_refusals(spec: dict[str, Any], slot: dict[str, Any], named: str) -> None:
    with pytest.raises(BuildError, match=named):
        make("mixer", spec, **slot)


def test_no_value_terms_without_a_softmax() -> None:
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(BuildError, match="value terms"):
        squared_relu(q, q, q, count=3, score=Score(value_terms=lambda p, a, b: p))


def test_plans_name_what_runs() -> None:
    model = dt.build({"kind": "decoder", "vocab": 9, "dim": 16, "depth": 1, "context": 8, "blocks": {"mixer": "gau"}})
    assert model.blocks[0].mixer.plans("cuda", 512)["training, prefill"].path == "sdpa"
    wide = dt.build(dt.override(model.spec, {"blocks.*.mixer.hidden": 512}))  # FlexAttention holds no such tile
    assert wide.blocks[0].mixer.plans("cuda", 2048)["padded or packed"].path == "sdpa"
    assert model.blocks[0].mixer.plans("cuda", 2048)["padded or packed"].path == "flex"
    values = dt.build(dt.override(model.spec, {"blocks.*.mixer.position": "shaw"}))
    assert values.blocks[0].mixer.plans("cuda", 512)["training, prefill"].path == "tiled"
    encoder = {"kind": "encoder", "vocab": 9, "dim": 16, "depth": 1, "blocks": {"mixer": "gau"}}
    assert "decoding" not in dt.build(encoder).blocks[0].mixer.plans("cuda", 512)
    model = dt.build(dt.override(model.spec, {"blocks.*.mixer.normaliser": "relu2"}))
    assert model.blocks[0].mixer.plans("cuda", 512)["decoding"].path == "bands"
