"""What has no effect or cannot work is refused by name: options of attention, cross-attention, states, tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dovetail as dt
from dovetail.errors import BuildError, DataError, RunError, SpecError, UserError
from dovetail.kernels.attention import Region, Score, attend_regions
from dovetail.parts.context import Context
from dovetail.spec import Spec

TOKENS = torch.arange(20).view(2, 10) % 16


def decoder(mixer: dict[str, Any] | None = None, **changes: Any) -> Any:
    base = {"kind": "decoder", "vocab": 16, "dim": 16, "depth": 1, "context": 8, "norm": "rms"}
    return dt.build(base | {"blocks": {"mixer": {"kind": "attention", "heads": 2} | (mixer or {})}} | changes)


@pytest.mark.parametrize(
    ("mixer", "what"),
    [
        ({"qk_norm_over": "all"}, "without a qk_norm"),
        ({"scale": 1.0, "position": "deberta"}, "sets the scale itself"),
        ({"mask": "full"}, "hides nothing"),
        ({"mask": {"kind": "or", "rules": ["causal", {"kind": "prefix", "length": 3}]}}, "hides nothing"),
        ({"head_dim": 2, "position": {"kind": "rope", "scaling": {"kind": "ntk", "factor": 2.0}}}, "single frequency"),
        ({"position": {"kind": "axial", "height": 2, "width": 2}}, "a causal place has a line of tokens"),
    ],
)
def test_options_of_attention_without_effect(mixer: dict[str, Any], what: str) -> None:
    with pytest.raises(BuildError, match=what):
        decoder(mixer)


@pytest.mark.parametrize(
    ("category", "given", "field"),
    [
        ("mixer", {"kind": "attention", "scale": 0.0}, "scale"),  # every score the same, or every product a NaN
        ("mixer", {"kind": "attention", "scale": -1.0}, "scale"),
        ("mixer", {"kind": "attention", "cap": 0.0}, "cap"),
        ("mixer", {"kind": "gau", "scale": -1.0}, "scale"),
        ("mixer", {"kind": "latent", "rank": 4, "scale": 0.0}, "scale"),
        ("mixer", {"kind": "latent", "rank": 4, "rope_dim": -2}, "rope_dim"),
        ("mixer", {"kind": "window", "size": 0}, "size"),
        ("feedforward", {"kind": "glu", "hidden": 0}, "hidden"),  # would be the default width
        ("feedforward", {"kind": "mlp", "hidden": -3}, "hidden"),
        ("feedforward", {"kind": "mlp", "dropout": 1.5}, "dropout"),
        ("image_embedding", {"kind": "patch", "size": 0}, "size"),
        ("resample", {"kind": "merge", "factor": 0}, "factor"),
        ("init", {"kind": "normal", "std": -0.1}, "std"),
        ("init", {"kind": "he", "gain": -1.0}, "gain"),
        ("init", {"kind": "mup", "base": 0}, "base"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_name(category: str, given: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError) as caught:
        Spec.parse(category, given)
    assert field in (caught.value.where or "")


@pytest.mark.parametrize("position", ["rope", "rerope", "deberta", {"kind": "axial", "height": 2, "width": 2}])
def test_positions_between_tokens_of_one_sequence_are_refused_in_a_cross_attention(position: Any) -> None:
    cross = {"kind": "attention", "position": position}
    with pytest.raises(BuildError, match="cross-attention") as caught:
        dt.build(
            {
                "kind": "encoder_decoder",
                "vocab": 16,
                "dim": 16,
                "decoder": {"kind": "stack", "blocks": {"cross": cross}},
            }
        )
    assert "none" in str(caught.value.remedy)


def test_a_shared_norm_needs_two_branches() -> None:
    with pytest.raises(BuildError, match="no feedforward"):
        decoder(blocks={"kind": "parallel", "shared": True, "feedforward": None})


def test_keys_given_to_a_mixer_that_reads_itself_are_refused() -> None:
    ctx, x = Context.of(1, 3, torch.device("cpu")), torch.randn(1, 3, 16)
    for mixer in ({}, {"kind": "latent", "rank": 4}):
        part = mixer if mixer else {"kind": "attention"}
        model = dt.build({"kind": "decoder", "vocab": 16, "dim": 16, "depth": 1, "blocks": {"mixer": part}})
        with pytest.raises(BuildError, match="keys or values"):
            model.blocks[0].mixer(x, ctx, keys=x)


@torch.no_grad()
def test_a_state_refuses_another_batch_and_a_senseless_length() -> None:
    model = decoder()
    state = model.new_state(2, 12)
    with pytest.raises(RunError, match="1 rows of tokens for a state of 2"):
        model(TOKENS[:1], state=state)
    model(TOKENS, state=state)
    with pytest.raises(RunError, match="-1"):
        state.truncate(-1)
    assert state.count == 10


@torch.no_grad()
def test_a_truncation_that_is_refused_forgets_nothing() -> None:
    window = {"mixer": {"kind": "attention", "mask": {"kind": "window", "size": 3}}}
    model = decoder(depth=2, blocks=[{"mixer": {"kind": "attention"}}, window])
    state = model.new_state(2, 12)
    model(TOKENS[:, :9], state=state)
    whole = state.snapshot()
    with pytest.raises(RunError, match="ring"):
        state.truncate(2)
    after = model(TOKENS[:, 9:], state=state).logits
    assert torch.equal(after, model(TOKENS[:, 9:], state=whole).logits)


@torch.no_grad()
def test_a_learned_table_ends_with_a_message() -> None:
    model = decoder({"position": "none"}, position="learned")
    model(TOKENS[:, :8])
    with pytest.raises(DataError, match="position 9 is beyond the learned table"):
        model(TOKENS)
    with pytest.raises(DataError, match="position 9 is beyond the learned table"):
        model(TOKENS, positions=torch.arange(10)[None].expand(2, -1))
    with pytest.raises(UserError, match="table ends at 8"):
        model.new_state(2, 9)


@pytest.mark.parametrize(("shape", "what"), [((2, 11), "have shape"), ((2, 10, 3), "3 axes")])
def test_positions_of_another_shape_are_refused(shape: tuple[int, ...], what: str) -> None:
    with pytest.raises(DataError, match=what):
        decoder()(TOKENS, positions=torch.zeros(shape, dtype=torch.long))


def test_value_terms_over_regions_are_refused() -> None:
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(BuildError, match="value terms"):
        attend_regions([Region(q, q, None, Score(value_terms=lambda p, a, b: p))], q)


def test_rerope_equals_rope_within_its_window_under_a_scaling_with_a_factor() -> None:
    """And beyond it: keys as far as the window must weigh by cos and sin times the same factor (YaRN's)."""
    yarn = {"kind": "yarn", "factor": 4.0}
    tokens = TOKENS[:, :6]
    rope = decoder({"position": {"kind": "rope", "scaling": yarn}}).double()
    for window in (6, 5):  # distances 0..5: with a window of 5 the far region holds distance 5 alone
        other = decoder({"position": {"kind": "rerope", "scaling": yarn, "window": window}}).double()
        torch.testing.assert_close(other(tokens).logits, rope(tokens).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("norm.eps", float("nan")),
        ("norm.eps", -1.0),
        ("norm.offset", float("nan")),
        ("norm", {"kind": "layer", "eps": float("nan")}),
        ("blocks.*.mixer.position.theta", float("nan")),
        ("blocks.*.mixer.position.theta", 0.0),
        ("blocks.*.mixer.position.theta", -1.0),
        ("blocks.*.mixer.position.scaling", {"kind": "yarn", "factor": float("nan")}),
        ("blocks.*.mixer.position.scaling", {"kind": "yarn", "factor": 2.0, "beta_fast": 0.0}),
        ("blocks.*.mixer.position.scaling", {"kind": "yarn", "factor": 2.0, "mscale": float("nan")}),
        ("blocks.*.mixer.position.scaling", {"kind": "llama3", "low_freq_factor": 4.0}),
        (
            "blocks.*.mixer.position.scaling",
            {"kind": "longrope", "short_factor": [0.0] * 4, "long_factor": [1.0] * 4},
        ),
        ("position", {"kind": "sinusoidal", "base": float("nan")}),
    ],
)
def test_numbers_that_no_norm_and_no_position_can_have(path: str, value: Any) -> None:
    with pytest.raises(UserError):
        dt.build(dt.override(decoder({"position": "rope"}).spec, {path: value}))


@pytest.mark.parametrize("blocks", [[], 3])
def test_blocks_that_are_none(blocks: Any) -> None:
    with pytest.raises(UserError, match="blocks is"):
        decoder(blocks=blocks)
