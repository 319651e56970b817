"""DeepSeek-V2: a latent state, an interleaved rotary slice, and a first layer unlike the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from contracts.skeleton import SINGLE, build, close, joined, keys, match, randomise
from dovetail.errors import BuildError
from dovetail.kernels import twins
from dovetail.models.keymap import Rename, Rule
from oracles import oracle_for

VOCAB, DIM, HEADS, NOPE, ROPE, VALUE, RANK, DENSE, SHARED = 19, 16, 2, 6, 4, 5, 8, 28, 10


def spec(query_rank: int | None = None, **mixer: Any) -> dict[str, Any]:
    norm = {"kind": "rms", "eps": 1e-6}
    latent = {
        "kind": "latent", "rank": RANK, "query_rank": query_rank, "heads": HEADS, "nope_dim": NOPE, "rope_dim": ROPE,
        "value_dim": VALUE, "norm": norm,
    } | mixer  # fmt: skip

    def block(layers: str, hidden: int) -> dict[str, Any]:
        return {"layers": layers, "mixer": latent, "norm": norm, "feedforward": {"kind": "glu", "hidden": hidden}}

    return {
        "kind": "decoder", "vocab": VOCAB, "dim": DIM, "depth": 2, "context": 32, "norm": norm,
        "blocks": [block("0", DENSE), block("1:", 2 * SHARED)], "init": {"kind": "normal", "std": 0.2},
    }  # fmt: skip


def oracle(query_rank: int | None) -> DeepseekV2ForCausalLM:
    """The second layer is a mixture whose routed experts are switched off: its two shared experts remain."""
    config = DeepseekV2Config(
        vocab_size=VOCAB, hidden_size=DIM, intermediate_size=DENSE, moe_intermediate_size=SHARED, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, kv_lora_rank=RANK, q_lora_rank=query_rank,
        qk_rope_head_dim=ROPE, qk_nope_head_dim=NOPE, v_head_dim=VALUE, head_dim=ROPE, first_k_dense_replace=1,
        n_routed_experts=2, n_shared_experts=2, num_experts_per_tok=1, routed_scaling_factor=0.0, n_group=1,
        topk_group=1, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    config._experts_implementation = "eager"
    return randomise(DeepseekV2ForCausalLM(config))  # type: ignore[return-value]


UNUSED = ("model.layers.1.mlp.gate.", "model.layers.1.mlp.experts.")


def rules(query_rank: int | None) -> list[Rule]:
    found = keys(("model.embed_tokens", "embedding.table"), ("model.norm", "norm"), ("lm_head", "head_part.linear"))
    for i in range(2):
        theirs, ours = f"model.layers.{i}", f"blocks.{i}"
        mlp, hidden = (f"{theirs}.mlp", DENSE) if i == 0 else (f"{theirs}.mlp.shared_experts", 2 * SHARED)
        if query_rank is None:
            found.append(Rename(f"{theirs}.self_attn.q_proj.weight", f"{ours}.mixer.q.weight"))
        else:
            found += keys(
                (f"{theirs}.self_attn.q_a_proj", f"{ours}.mixer.q_down"),
                (f"{theirs}.self_attn.q_a_layernorm", f"{ours}.mixer.q_norm"),
                (f"{theirs}.self_attn.q_b_proj", f"{ours}.mixer.q"),
            )
        found += keys(
            (f"{theirs}.self_attn.kv_a_proj_with_mqa", f"{ours}.mixer.kv_down"),
            (f"{theirs}.self_attn.kv_a_layernorm", f"{ours}.mixer.kv_norm"),
            (f"{theirs}.self_attn.kv_b_proj", f"{ours}.mixer.kv_up"),
            (f"{theirs}.self_attn.o_proj", f"{ours}.mixer.out"),
            (f"{theirs}.input_layernorm", f"{ours}.norm_mixer"),
            (f"{theirs}.post_attention_layernorm", f"{ours}.norm_feedforward"),
            (f"{mlp}.down_proj", f"{ours}.feedforward.down"),
        )
        found += joined([f"{mlp}.gate_proj", f"{mlp}.up_proj"], f"{ours}.feedforward.gate_up", [hidden] * 2)
    return found


@oracle_for("mixer", "latent")
@pytest.mark.parametrize("query_rank", [None, 7])
def test_outputs_and_gradients(query_rank: int | None) -> None:
    ours, theirs = build("model", spec(query_rank), dim=0), oracle(query_rank)
    tokens = torch.randint(VOCAB, (2, 13))
    match(
        ours, theirs, rules(query_rank), lambda: ours(tokens).logits, lambda: theirs(input_ids=tokens).logits,
        tol=SINGLE, unused=UNUSED,
    )  # fmt: skip


SCALED = {"kind": "rope", "layout": "interleaved", "scaling": {"kind": "dynamic", "factor": 2.0, "original": 32}}


@pytest.mark.parametrize(
    "mixer", [{}, {"mask": {"kind": "window", "size": 4}}, {"position": SCALED}], ids=["plain", "window", "raw cache"]
)
def test_absorbed_decoding_equals_the_expanded_forward(mixer: dict[str, Any]) -> None:
    """Few tokens attend in the latent; the whole sequence expands it."""
    ours = build("model", spec(**mixer), dim=0)
    tokens = torch.randint(VOCAB, (2, 13))
    with torch.no_grad():
        whole, state = ours(tokens).logits, ours.new_state(2, 16)
        parts = [ours(tokens[:, :5], state=state).logits, ours(tokens[:, 5:8], state=state).logits]
        parts += [ours(tokens[:, i : i + 1], state=state).logits for i in range(8, 13)]
    close(torch.cat(parts, 1), whole, 1e-12, "decoding")


@pytest.mark.parametrize("mixer", [{}, {"mask": {"kind": "window", "size": 4}}, {"position": SCALED}])
def test_both_forms_agree_and_the_count_chooses(mixer: dict[str, Any], monkeypatch: Any) -> None:
    """Chunks of every length by both forms, behind 5 tokens in uneven rows; the one with fewer multiplications is chosen."""
    ours = build("model", spec(**mixer), dim=0)
    module = type(ours.blocks[0].mixer)
    tokens, real = torch.randint(VOCAB, (2, 16)), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    used: list[str] = []
    for form in ("_absorbed", "_expanded"):
        plain = getattr(module, form)
        monkeypatch.setattr(module, form, lambda *given, f=form, plain=plain: used.append(f) or plain(*given))

    def chunk(new: int, absorbed: bool | None = None) -> tuple[torch.Tensor, int, str]:
        """(logits, multiplications, the form that all layers took)."""
        state = ours.new_state(2, 16)
        ours(tokens[:, :5], attention_mask=real, state=state)
        used.clear()
        with monkeypatch.context() as forced, twins.plain(), FlopCounterMode(display=False) as count:
            if absorbed is not None:
                forced.setattr(module, "_absorbs", lambda *_: absorbed)
            out = ours(tokens[:, 5 : 5 + new], state=state).logits
        (form,) = set(used)
        return out, count.get_total_flops(), form

    chosen = []
    with torch.no_grad():
        for new in range(1, 12):
            one, other, free = chunk(new, True), chunk(new, False), chunk(new)
            close(one[0], other[0], 1e-12, f"{new} tokens")
            assert free[1] == min(one[1], other[1]) and one[2:] + other[2:] == ("_absorbed", "_expanded")
            chosen.append(free[2])
    switch = chosen.index("_expanded")
    assert switch >= 3 and set(chosen[switch:]) == {"_expanded"}


def test_the_count_at_published_widths() -> None:
    """DeepSeek-V2's: absorbed up to 170 new tokens before many; a prefill is expanded."""
    sizes = {"rank": 512, "nope_dim": 128, "rope_dim": 64, "value_dim": 128}
    with torch.device("meta"):
        mixer = build("model", spec(**sizes), dim=0).blocks[0].mixer
    assert [n for n in range(1, 300) if mixer._fewer_operations(n, 10**6)] == list(range(1, 171))
    assert not any(mixer._fewer_operations(n, n) for n in (1, 2, 100))


def test_absorbed_decoding_knows_the_parametrisation() -> None:
    """Under NTK parametrisation every map divides by sqrt(fan_in), the absorbed ones too."""
    ours = build("model", spec() | {"init": {"kind": "ntk"}}, dim=0)
    tokens = torch.randint(VOCAB, (1, 6))
    with torch.no_grad():
        whole, state = ours(tokens).logits, ours.new_state(1, 6)
        parts = [ours(tokens[:, i : i + 1], state=state).logits for i in range(6)]
    close(torch.cat(parts, 1), whole, 1e-12, "decoding")


def test_the_state_is_the_latent() -> None:
    ours = build("model", spec(), dim=0)
    slots = 16 + 1  # one spare
    assert ours.new_state(2, 16).nbytes() == 2 * 2 * slots * (RANK + ROPE) * 8


def test_the_plan_says_what_is_absorbed() -> None:
    plans = build("model", spec(), dim=0).blocks[0].mixer.plans("cpu", 16)
    assert {use: p.path for use, p in plans.items()} == dict.fromkeys(plans, "sdpa")
    assert "absorbed" in plans["decoding"].why and "expanded" in plans["training, prefill"].why


def test_padding_on_the_left_changes_nothing() -> None:
    ours = build("model", spec(), dim=0)
    tokens = torch.randint(VOCAB, (1, 9))
    padded, real = torch.cat([tokens.new_zeros(1, 4), tokens], 1), torch.tensor([[0] * 4 + [1] * 9])
    close(ours(padded, attention_mask=real).logits[:, 4:], ours(tokens).logits, 1e-12, "left padding")


def test_positions_that_it_cannot_use_are_refused() -> None:
    for position in ("t5_buckets", "learned"):
        with pytest.raises(BuildError, match="never calls"):
            build("model", spec(position=position), dim=0)
