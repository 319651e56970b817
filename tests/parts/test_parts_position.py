"""Positions: RoPE in both layouts, at partial width, every scaling; sinusoidal and learned tables."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as interleaved
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as partial
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

import dovetail as dt
from dovetail.errors import BuildError
from dovetail.parts.context import Context
from oracles import oracle_for
from parts.making import make

D, T = 8, 13


def rope(**fields: Any) -> Any:
    return make("position", {"kind": "rope"} | fields, head_dim=D, context=16)


def turned(module: Any, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    ctx = Context.of(*q.shape[:2], q.device, positions=positions)
    return module.rotate(q, k, ctx.coords, ctx)


def tables(dim: int, positions: Tensor, doubled: bool = True) -> tuple[Tensor, Tensor]:
    angle = positions[..., None].float() / 10_000.0 ** (torch.arange(0, dim, 2).float() / dim)
    angle = torch.cat([angle, angle], -1) if doubled else angle.repeat_interleave(2, -1)
    return angle.cos(), angle.sin()


@oracle_for("position", "rope")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rope_is_llamas_coheres_and_neoxs(dtype: torch.dtype) -> None:
    q, k = torch.randn(2, T, 4, D).to(dtype), torch.randn(2, T, 2, D).to(dtype)
    positions = torch.stack([torch.arange(T), torch.arange(T) + 5])
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    llama = LlamaRotaryEmbedding(LlamaConfig(hidden_size=4 * D, num_attention_heads=4))
    theirs = apply_rotary_pos_emb(q, k, *llama(q, positions), unsqueeze_dim=2)
    for a, b in zip(turned(rope(), q, k, positions), theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    cos, sin = (t.to(dtype) for t in tables(D, positions, doubled=False))
    theirs = interleaved(q, k, cos, sin, unsqueeze_dim=2)
    for a, b in zip(turned(rope(layout="interleaved"), q, k, positions), theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    cos, sin = (t.to(dtype) for t in tables(D // 2, positions))
    theirs = partial(q, k, cos, sin, unsqueeze_dim=2)
    for a, b in zip(turned(rope(width=0.5), q, k, positions), theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_scores_depend_on_the_distance_alone(layout: str) -> None:
    """The property that defines RoPE (eq. 11), and theta, in fp64 over shifted positions."""
    module = rope(layout=layout, theta=77.0)
    assert torch.allclose(module.inverse, 77.0 ** (-torch.arange(0, D, 2) / D))
    q, k = torch.randn(1, T, 1, D, dtype=torch.float64), torch.randn(1, T, 1, D, dtype=torch.float64)

    def scores(shift: int) -> Tensor:
        a, b = turned(module, q, k, (torch.arange(T) + shift)[None])
        return a[:, :, 0] @ b[:, :, 0].mT

    torch.testing.assert_close(scores(0), scores(9), rtol=1e-5, atol=1e-5)


PEERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # ours, transformers'
    "linear": ({"factor": 4.0}, {"factor": 4.0}),
    "dynamic": ({"factor": 4.0}, {"factor": 4.0}),
    "yarn": ({"factor": 4.0}, {"factor": 4.0, "original_max_position_embeddings": 64}),
    "yarn ends": (
        {"factor": 8.0, "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False, "attention_factor": 1.3},
        {"factor": 8.0, "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False, "attention_factor": 1.3,
         "original_max_position_embeddings": 64},
    ),
    "yarn mscale": (
        {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.2},
        {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.2, "original_max_position_embeddings": 64},
    ),
    "llama3": (
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "longrope": (
        {"factor": 4.0, "short_factor": [1.0 + i / 9 for i in range(16)], "long_factor": [1.0 + i for i in range(16)]},
        {"factor": 4.0, "short_factor": [1.0 + i / 9 for i in range(16)], "long_factor": [1.0 + i for i in range(16)],
         "original_max_position_embeddings": 64},
    ),
}  # fmt: skip


@oracle_for("rope_scaling", "linear", "dynamic", "yarn", "llama3", "longrope")
@pytest.mark.parametrize("case", PEERS)
@pytest.mark.parametrize("length", [40, 64, 65, 200])
def test_scalings_are_transformers(case: str, length: int) -> None:
    """Inverse frequencies and the factor on cos and sin, below, at and beyond the trained 64."""
    kind, (ours, theirs) = case.split()[0], PEERS[case]
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=64,
        rope_parameters={"rope_type": kind, "rope_theta": 500.0} | theirs,
    )  # fmt: skip
    inverse, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    part = {"kind": "rope", "theta": 500.0, "scaling": {"kind": kind} | ours}
    module = make("position", part, head_dim=32, context=64)
    mine, my_factor = module.scaling.frequencies(32, 500.0, 64, torch.tensor(length), torch.device("cpu"))
    torch.testing.assert_close(mine, inverse, rtol=1e-6, atol=0)
    assert my_factor == pytest.approx(factor, rel=1e-9)
    # And through the module: cos and sin of the last position, times the factor.
    ctx = Context.of(1, length, torch.device("cpu"))
    cos, sin = module.tables(ctx.side, torch.float32, ctx)
    angle = (length - 1) * inverse
    torch.testing.assert_close(cos[0, -1, 0], angle.cos() * factor, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sin[0, -1, 0], angle.sin() * factor, rtol=1e-4, atol=1e-4)


@oracle_for("rope_scaling", "ntk")
def test_ntk_divides_the_lowest_frequency_and_keeps_the_highest() -> None:
    scaled = rope(scaling={"kind": "ntk", "factor": 4.0}).inverse.double()
    i = torch.arange(D // 2, dtype=torch.float64)
    torch.testing.assert_close(scaled, (10_000.0 * 4.0 ** (D / (D - 2))) ** (-2 * i / D), rtol=1e-5, atol=0)
    plain = rope().inverse.double()
    assert scaled[0] == plain[0] == 1 and scaled[-1].item() == pytest.approx(plain[-1].item() / 4, rel=1e-5)


def test_frequencies_stay_fp32_through_casts_and_the_meta_device() -> None:
    """Built on the meta device, materialised, cast to bf16 and back: always the table of a fresh fp32 rope."""
    for scaling in (None, {"kind": "yarn", "factor": 4.0, "original": 64}, {"kind": "dynamic", "factor": 2.0}):
        mixer = {"kind": "attention", "heads": 2, "position": {"kind": "rope", "scaling": scaling}}
        model = dt.build(
            {"kind": "decoder", "vocab": 8, "dim": 64, "context": 64, "depth": 1, "blocks": {"mixer": mixer}}
        )
        module = model.blocks[0].mixer.position
        fresh = module.inverse.clone()
        dim = torch.arange(0, 32, 2).double()
        if scaling is None:
            torch.testing.assert_close(fresh.double(), 10_000.0 ** (-dim / 32), rtol=1e-6, atol=0)
        for change in (model.bfloat16, model.half, model.double, model.float):
            change()
            assert module.inverse.dtype == torch.float32 and torch.equal(module.inverse, fresh)
        assert not any("inverse" in name for name in model.state_dict())


def test_rope_refuses_what_it_cannot_turn() -> None:
    with pytest.raises(BuildError, match="pairs"):
        make("position", {"kind": "rope", "width": 0.4}, head_dim=8)
    with pytest.raises(BuildError, match="trained length"):
        make("position", {"kind": "rope", "scaling": {"kind": "yarn", "factor": 2.0}}, head_dim=8)
    with pytest.raises(BuildError, match="factor"):
        make("position", {"kind": "rope", "scaling": {"kind": "linear", "factor": 0.5}}, head_dim=8)
    longrope = {"kind": "longrope", "short_factor": [1.0], "long_factor": [1.0], "original": 8}
    with pytest.raises(BuildError, match="short_factor has 1 entries"):
        make("position", {"kind": "rope", "scaling": longrope}, head_dim=8)


@oracle_for("position", "sinusoidal", "none")
def test_sinusoidal_is_the_formula_and_marians() -> None:
    x = torch.randn(2, T, 16)
    ctx = Context.of(2, T, x.device)
    ours = make("position", "sinusoidal").embed(x, ctx) - x
    for p in range(T):
        for i in range(8):
            angle = p / 10_000 ** (2 * i / 16)
            assert ours[0, p, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert ours[0, p, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)
    marian = MarianSinusoidalPositionalEmbedding(T, 16)
    with torch.no_grad():
        marian.weight.copy_(marian.create_weight())
    half = make("position", {"kind": "sinusoidal", "layout": "half"}).embed(torch.zeros(2, T, 16), ctx)
    torch.testing.assert_close(half[0], marian(torch.Size([2, T])), rtol=1e-5, atol=1e-5)
    assert torch.equal(make("position", "none").embed(x, ctx), x)
    with pytest.raises(BuildError, match="width of 15"):
        make("position", "sinusoidal", dim=15)


@oracle_for("position", "learned")
def test_learned_is_barts_and_gpt2s() -> None:
    """BART skips two rows; GPT-2 none. Positions follow padding and packing."""
    bart = BartLearnedPositionalEmbedding(20, 16)
    ours = make("position", {"kind": "learned", "length": 20, "offset": 2})
    plain = make("position", "learned", context=20)
    with torch.no_grad():
        bart.weight.copy_(ours.table.weight)
    x = torch.zeros(2, T, 16)
    ctx = Context.of(2, T, x.device)
    torch.testing.assert_close(ours.embed(x, ctx), bart(torch.zeros(2, T)).expand(2, -1, -1))
    segments = torch.tensor([[-1, 0, 0, 0, 1, 1], [0, 0, 1, 2, 2, -1]])
    packed = plain.embed(torch.zeros(2, 6, 16), Context.of(2, 6, x.device, segments=segments))
    expected = plain.table.weight[torch.tensor([[0, 0, 1, 2, 0, 1], [0, 1, 0, 0, 1, 0]])]
    real = segments >= 0
    assert torch.equal(packed[real], expected[real])
    with pytest.raises(BuildError, match="length"):
        make("position", "learned")


def test_a_position_in_the_wrong_place_is_refused() -> None:
    base = {"kind": "decoder", "vocab": 8, "dim": 16, "context": 8}
    with pytest.raises(BuildError, match="never calls"):
        dt.build(base | {"position": "rope"} | {"blocks": {"mixer": "attention"}})
    with pytest.raises(BuildError, match="never calls"):
        dt.build(base | {"blocks": {"mixer": {"kind": "attention", "position": "learned"}}})
