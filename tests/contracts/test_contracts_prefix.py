"""A prefix: keys and values of its own, turned by no position, as one more region of the attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from contracts.skeleton import SINGLE, TIGHT, build, close, joined, keys, match, randomise
from dovetail.errors import BuildError
from dovetail.models.keymap import Rename, Rule, Split
from dovetail.parts.context import Context
from oracles import oracle_for

VOCAB, DIM, HEADS, GROUPS, WIDTH, HIDDEN, PREFIX, LENGTH = 19, 16, 4, 2, 4, 24, 3, 11


def spec(**mixer: Any) -> dict[str, Any]:
    position = {"kind": "prefix", "length": PREFIX, "position": "rope"}
    attention = {"kind": "attention", "heads": HEADS, "kv_heads": GROUPS, "position": position} | mixer
    block = {"mixer": attention, "feedforward": {"kind": "glu", "hidden": HIDDEN}}
    init = {"kind": "normal", "std": 0.2}
    return {"kind": "decoder", "vocab": VOCAB, "dim": DIM, "depth": 2, "context": 32, "blocks": block, "init": init}


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=DIM, intermediate_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, max_position_embeddings=32, tie_word_embeddings=False, rms_norm_eps=1e-6,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Cached(nn.Module):
    """transformers with learned past_key_values."""

    def __init__(self) -> None:
        super().__init__()
        self.llama = llama()
        self.past = nn.ParameterList(nn.Parameter(torch.empty(PREFIX, GROUPS * WIDTH)) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        cache = DynamicCache()
        for layer in range(2):
            rows = [p.unflatten(-1, (GROUPS, WIDTH)).transpose(0, 1) for p in self.past[2 * layer : 2 * layer + 2]]
            k, v = (r.expand(tokens.shape[0], -1, -1, -1) for r in rows)
            cache.update(k, v, layer)
        return self.llama(input_ids=tokens, past_key_values=cache, use_cache=True).logits


def rules(top: str) -> list[Rule]:
    found = keys(
        (f"{top}model.embed_tokens", "embedding.table"),
        (f"{top}model.norm", "norm"),
        (f"{top}lm_head", "head_part.linear"),
    )
    for i in range(2):
        theirs, ours = f"{top}model.layers.{i}", f"blocks.{i}"
        sizes = [HEADS * WIDTH, GROUPS * WIDTH, GROUPS * WIDTH]
        found += joined([f"{theirs}.self_attn.{n}_proj" for n in "qkv"], f"{ours}.mixer.qkv", sizes)
        found += joined([f"{theirs}.mlp.{n}_proj" for n in ("gate", "up")], f"{ours}.feedforward.gate_up", [HIDDEN] * 2)
        found += keys(
            (f"{theirs}.self_attn.o_proj", f"{ours}.mixer.out"),
            (f"{theirs}.mlp.down_proj", f"{ours}.feedforward.down"),
            (f"{theirs}.input_layernorm", f"{ours}.norm_mixer"),
            (f"{theirs}.post_attention_layernorm", f"{ours}.norm_feedforward"),
        )
    return found


TABLES = tuple(f"blocks.{i}.mixer.position.{n}" for i in range(2) for n in "kv")


@oracle_for("position", "prefix")
def test_equals_transformers_with_a_learned_past() -> None:
    ours, theirs = build("model", spec(), dim=0), randomise(Cached())
    past: list[Rule] = [Rename(f"past.{i}", name) for i, name in enumerate(TABLES)]
    tokens = torch.randint(VOCAB, (2, LENGTH))
    match(ours, theirs, rules("llama.") + past, lambda: ours(tokens).logits, lambda: theirs(tokens), tol=SINGLE)


@oracle_for("position", "prefix")
def test_equals_peft() -> None:
    config = PrefixTuningConfig(num_virtual_tokens=PREFIX, task_type="CAUSAL_LM")
    theirs = get_peft_model(llama(), config)
    for p in theirs.parameters():
        p.requires_grad_()
    ours, theirs = build("model", spec(), dim=0), randomise(theirs)  # type: ignore[arg-type]
    past: list[Rule] = [Split("prompt_encoder.default.embedding.weight", TABLES, (GROUPS * WIDTH,) * 4, dim=1)]
    tokens = torch.randint(VOCAB, (2, LENGTH))
    run = lambda: theirs(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits  # noqa: E731
    match(ours, theirs, rules("base_model.") + past, lambda: ours(tokens).logits, run, tol=SINGLE)


@pytest.mark.parametrize("inner", ["rope", "none", {"kind": "t5_buckets", "buckets": 8, "max_distance": 9}])
def test_decoding_equals_the_whole_forward(inner: Any) -> None:
    ours = build("model", spec(position={"kind": "prefix", "length": PREFIX, "position": inner}), dim=0)
    tokens = torch.randint(VOCAB, (2, LENGTH))
    with torch.no_grad():
        whole, state = ours(tokens).logits, ours.new_state(2, LENGTH)
        parts = [ours(tokens[:, :4], state=state).logits, ours(tokens[:, 4:6], state=state).logits]
        parts += [ours(tokens[:, i : i + 1], state=state).logits for i in range(6, LENGTH)]
    close(torch.cat(parts, 1), whole, 1e-12, "decoding")


def test_score_and_cap_reach_every_region() -> None:
    """T5's table on the tokens, none on the prefix, and the soft cap on both, against the formula."""
    table = {"kind": "t5_buckets", "buckets": 8, "max_distance": 9}
    position = {"kind": "prefix", "length": PREFIX, "position": table}
    mixer = build("mixer", {"kind": "attention", "heads": 2, "cap": 1.5, "position": position}, dim=8)
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in mixer.qkv(x).chunk(3, -1))
    own_k, own_v = (t.unflatten(-1, (2, 4)).transpose(0, 1)[None] for t in (mixer.position.k, mixer.position.v))
    at = torch.arange(6)
    bias = mixer.position.position.table.weight[mixer.position.position.bucket(at[None] - at[:, None])].permute(2, 0, 1)
    scores = torch.cat([q @ own_k.transpose(-1, -2) / 2, q @ k.transpose(-1, -2) / 2 + bias], -1)
    scores = 1.5 * torch.tanh(scores / 1.5)
    scores[..., PREFIX:] += torch.full((6, 6), float("-inf")).triu(1)
    wanted = mixer.out((scores.softmax(-1) @ torch.cat([own_v, v], 2)).transpose(1, 2).flatten(-2))
    close(mixer(x, Context.of(1, 6, torch.device("cpu"))), wanted, TIGHT, "capped")


def test_padding_changes_nothing() -> None:
    ours = build("model", spec(), dim=0)
    tokens = torch.randint(VOCAB, (1, 6))
    padded, real = torch.cat([tokens.new_zeros(1, 4), tokens], 1), torch.tensor([[0] * 4 + [1] * 6])
    close(ours(padded, attention_mask=real).logits[:, 4:], ours(tokens).logits, 1e-12, "left padding")


def test_refusals() -> None:
    with pytest.raises(BuildError, match="dropout on the weights"):
        build("model", spec(dropout=0.1), dim=0)
    with pytest.raises(BuildError, match="works by rotate, which this place never calls"):
        build("mixer", {"kind": "attention", "position": "rope"}, dim=16, memory_dim=16)
