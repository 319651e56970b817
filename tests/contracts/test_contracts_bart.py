"""BART under beam search: reordering the state, its cross part included, equals computing everything again."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BartConfig, BartForConditionalGeneration

from contracts.skeleton import TIGHT, build, carry, close, joined, keys, match, randomise
from dovetail.models.keymap import Alias, Rename, Rule

VOCAB, DIM, HEADS, HIDDEN, CONTEXT = 21, 16, 2, 24, 24
BOTH = ("weight", "bias")


def spec() -> dict[str, Any]:
    mixer = {"kind": "attention", "heads": HEADS, "bias": "all", "position": "none"}
    feedforward = {"kind": "mlp", "hidden": HIDDEN, "activation": "gelu"}

    def stack(**cross: Any) -> dict[str, Any]:
        block = {"kind": "post", "mixer": mixer, "feedforward": feedforward} | cross
        position = {"kind": "learned", "offset": 2}
        return {"kind": "stack", "depth": 2, "norm_in": "layer", "norm": None, "position": position, "blocks": block}

    return {
        "kind": "encoder_decoder", "vocab": VOCAB, "dim": DIM, "context": CONTEXT, "encoder": stack(),
        "decoder": stack(cross=mixer), "init": {"kind": "normal", "std": 0.2},
    }  # fmt: skip


def oracle() -> BartForConditionalGeneration:
    config = BartConfig(
        vocab_size=VOCAB, d_model=DIM, encoder_layers=2, decoder_layers=2, encoder_attention_heads=HEADS, dropout=0.0,
        decoder_attention_heads=HEADS, encoder_ffn_dim=HIDDEN, decoder_ffn_dim=HIDDEN, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    return randomise(BartForConditionalGeneration(config))  # type: ignore[return-value]


def rules() -> list[Rule]:
    found: list[Rule] = [Rename("model.shared.weight", "embedding.table.weight")]
    found += [Alias(f"model.{s}.embed_tokens.weight", "model.shared.weight") for s in ("encoder", "decoder")]
    found.append(Alias("lm_head.weight", "model.shared.weight"))
    for side in ("encoder", "decoder"):
        top = f"model.{side}"
        found += keys((f"{top}.embed_positions", f"{side}.position.table"))
        found += keys((f"{top}.layernorm_embedding", f"{side}.norm_in"), kinds=BOTH)
        for i in range(2):
            theirs, ours = f"{top}.layers.{i}", f"{side}.blocks.{i}"
            found += joined([f"{theirs}.self_attn.{n}_proj" for n in "qkv"], f"{ours}.mixer.qkv", [DIM] * 3, BOTH)
            pairs = [
                (f"{theirs}.self_attn.out_proj", f"{ours}.mixer.out"),
                (f"{theirs}.self_attn_layer_norm", f"{ours}.norm_mixer"),
                (f"{theirs}.fc1", f"{ours}.feedforward.up"),
                (f"{theirs}.fc2", f"{ours}.feedforward.down"),
                (f"{theirs}.final_layer_norm", f"{ours}.norm_feedforward"),
            ]
            if side == "decoder":
                cross = f"{theirs}.encoder_attn"
                found += joined([f"{cross}.{n}_proj" for n in "kv"], f"{ours}.cross.kv", [DIM] * 2, BOTH)
                pairs += [(f"{cross}.q_proj", f"{ours}.cross.q"), (f"{cross}.out_proj", f"{ours}.cross.out")]
                pairs.append((f"{cross}_layer_norm", f"{ours}.norm_cross"))
            found += keys(*pairs, kinds=BOTH)
    return found


def source() -> tuple[torch.Tensor, torch.Tensor]:
    tokens, real = torch.randint(3, VOCAB, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    real[1, 6:] = 0
    return tokens, real


def test_outputs_and_gradients() -> None:
    ours, theirs = build("model", spec(), dim=0), oracle()
    (tokens, real), target = source(), torch.randint(3, VOCAB, (2, 7))
    match(
        ours,
        theirs,
        rules(),
        lambda: ours(tokens, target, attention_mask=real).logits,
        lambda: theirs(input_ids=tokens, attention_mask=real, decoder_input_ids=target).logits,
        tol=TIGHT,
    )


def test_reordered_beams_equal_recomputation() -> None:
    """Three beams of each of two sources, moved about for eight steps (between sources too), a snapshot on the way."""
    ours, theirs = build("model", spec(), dim=0), oracle()
    carry(theirs, ours, rules())
    tokens, real = source()
    with torch.no_grad():
        state = ours.new_state(2, CONTEXT)
        ours.encode(tokens, real, state=state)
        rows = torch.tensor([0, 0, 0, 1, 1, 1])
        state.reorder(rows)
        beams = torch.full((6, 1), 2)
        for step in range(8):
            logits = ours.decode(beams[:, -1:], state=state).logits[:, -1]
            wanted = theirs(input_ids=tokens[rows], attention_mask=real[rows], decoder_input_ids=beams).logits[:, -1]
            close(logits, wanted, TIGHT, f"step {step}")
            if step == 3:
                kept = (state.snapshot(), beams, rows)
            order = torch.randint(6, (6,))
            beams = torch.cat([beams[order], torch.randint(3, VOCAB, (6, 1))], 1)
            rows = rows[order]
            state.reorder(order)
        state, beams, rows = kept
        beams = torch.cat([beams, torch.randint(3, VOCAB, (6, 1))], 1)
        logits = ours.decode(beams[:, -1:], state=state).logits[:, -1]
        wanted = theirs(input_ids=tokens[rows], attention_mask=real[rows], decoder_input_ids=beams).logits[:, -1]
        close(logits, wanted, TIGHT, "after the snapshot")


def test_fewer_beams_than_before() -> None:
    """A beam search that ends for one source goes on with the other's rows alone."""
    ours = build("model", spec(), dim=0)
    tokens, real = source()
    target = torch.randint(3, VOCAB, (2, 5))
    with torch.no_grad():
        whole = ours(tokens, target, attention_mask=real).logits
        state = ours.new_state(2, CONTEXT)
        ours(tokens, target[:, :4], attention_mask=real, state=state)
        state.reorder(torch.tensor([1]))
        last = ours.decode(target[1:, 4:], state=state).logits
    close(last[:, 0], whole[1:, 4], 1e-12, "the row that is left")
