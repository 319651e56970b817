"""Attention, blocks, the stack and the decoder against torch.nn and transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXRotaryEmbedding

import dovetail as dt
from dovetail.errors import BuildError
from dovetail.parts import containers
from dovetail.parts.context import Context
from oracles import oracle_for
from parts.making import make

B, T, C = 2, 7, 16
PLAIN = Context.of(B, T, torch.device("cpu"))


def noise(module: Any) -> Any:
    """Every parameter away from its start, so that no bias or norm weight is trivial."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module


def agree(y: Tensor, z: Tensor, x: Tensor) -> None:
    torch.testing.assert_close(y, z, rtol=1e-9, atol=1e-11)
    w = torch.randn_like(z)
    a, b = (torch.autograd.grad((t * w).sum(), x, retain_graph=True)[0] for t in (y, z))
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def stream() -> Tensor:
    return torch.randn(B, T, C, dtype=torch.float64, requires_grad=True)


@oracle_for("mixer", "attention")
@pytest.mark.parametrize("cross", [False, True])
def test_attention_is_torchs(cross: bool) -> None:
    """nn.MultiheadAttention, self (causal) and cross (padded memory of another width)."""
    slot: dict[str, Any] = {"memory_dim": 12} if cross else {}
    ours = noise(make("mixer", {"kind": "attention", "heads": 4, "bias": "all", "position": "none"},
                      dtype=torch.float64, **slot))  # fmt: skip
    theirs = nn.MultiheadAttention(C, 4, batch_first=True, dtype=torch.float64, kdim=12 if cross else None,
                                   vdim=12 if cross else None)  # fmt: skip
    with torch.no_grad():
        theirs.out_proj.load_state_dict(ours.out.state_dict())
        if cross:
            theirs.q_proj_weight.copy_(ours.q.weight)
            theirs.k_proj_weight.copy_(ours.kv.weight[:C])
            theirs.v_proj_weight.copy_(ours.kv.weight[C:])
            theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.kv.bias]))
        else:
            theirs.in_proj_weight.copy_(ours.qkv.weight)
            theirs.in_proj_bias.copy_(ours.qkv.bias)
    x = stream()
    if not cross:
        future = torch.ones(T, T).triu(1) > 0
        agree(ours(x, PLAIN), theirs(x, x, x, attn_mask=future)[0], x)
        return
    memory, segments = torch.randn(B, 5, 12, dtype=torch.float64), torch.tensor([[0] * 5, [-1, -1, 0, 0, 0]])
    agree(ours(x, PLAIN.with_memory(memory, segments)), theirs(x, memory, memory, key_padding_mask=segments < 0)[0], x)


def test_attention_settings_are_refused_where_they_cannot_work() -> None:
    for part, complaint in [({"heads": 4, "kv_heads": 3}, "share"), ({"heads": 3}, "divide")]:
        with pytest.raises(BuildError, match=complaint):
            make("mixer", {"kind": "attention"} | part)
    with pytest.raises(BuildError, match="mask"):
        part = {"kind": "attention", "position": "none", "mask": {"kind": "window", "size": 2}}
        make("mixer", part, memory_dim=8)


@oracle_for("block", "pre", "post")
@oracle_for("container", "stack")
@pytest.mark.parametrize("kind", ["pre", "post"])
@pytest.mark.parametrize("causal", [False, True])
def test_stacks_are_torchs_encoders(kind: str, causal: bool) -> None:
    part = {"depth": 2, "norm": "layer", "blocks": {
        "kind": kind, "norm": "layer", "feedforward": {"kind": "mlp", "hidden": 24, "activation": "relu"},
        "mixer": {"kind": "attention", "heads": 4, "bias": "all", "position": "none"}}}  # fmt: skip
    ours = noise(make("container", part, dtype=torch.float64, causal=causal, depth=2))
    layer = nn.TransformerEncoderLayer(C, 4, 24, 0.0, batch_first=True, norm_first=kind == "pre", dtype=torch.float64)
    theirs = nn.TransformerEncoder(layer, 2, nn.LayerNorm(C, dtype=torch.float64), enable_nested_tensor=False)
    with torch.no_grad():
        theirs.norm.load_state_dict(ours.norm.state_dict())
        for mine, peer in zip(ours.blocks, theirs.layers, strict=True):
            peer.self_attn.in_proj_weight.copy_(mine.mixer.qkv.weight)
            peer.self_attn.in_proj_bias.copy_(mine.mixer.qkv.bias)
            for a, b in [(peer.self_attn.out_proj, mine.mixer.out), (peer.linear1, mine.feedforward.up),
                         (peer.linear2, mine.feedforward.down), (peer.norm1, mine.norm_mixer),
                         (peer.norm2, mine.norm_feedforward)]:  # fmt: skip
                a.load_state_dict(b.state_dict())
    x, future = stream(), (torch.ones(T, T).triu(1) > 0) if causal else None
    agree(ours(x, PLAIN), theirs(x, mask=future), x)
    real = torch.tensor([[1] * T, [1] * 4 + [0] * (T - 4)])
    if not causal:
        padded = ours(x, Context.of(B, T, x.device, attention_mask=real))
        expected = theirs(x, src_key_padding_mask=real == 0)
        torch.testing.assert_close(padded[real > 0], expected[real > 0])


@oracle_for("block", "parallel")
@pytest.mark.parametrize("shared", [False, True])
def test_parallel_is_neoxs(shared: bool) -> None:
    """x + attention(norm1 x) + mlp(norm2 x); GPT-J's form has one norm for both."""
    part = {"kind": "parallel", "shared": shared, "norm": "layer", "feedforward": {"kind": "mlp", "hidden": 24},
            "mixer": {"kind": "attention", "heads": 2, "bias": "all", "position": {"kind": "rope", "width": 0.25}}}  # fmt: skip
    ours = noise(make("block", part, dtype=torch.float64))
    config = GPTNeoXConfig(hidden_size=C, num_attention_heads=2, intermediate_size=24, use_parallel_residual=True,
                           hidden_act="gelu", layer_norm_eps=1e-5, attn_implementation="eager",
                           rope_parameters={"rope_type": "default", "rope_theta": 10000.0,
                                            "partial_rotary_factor": 0.25})  # fmt: skip
    theirs = GPTNeoXLayer(config, 0).double().eval()
    with torch.no_grad():
        # NeoX keeps q, k, v of a head together.
        heads = ours.mixer.qkv.weight.view(3, 2, 8, C).transpose(0, 1).reshape(3 * C, C)
        bias = ours.mixer.qkv.bias.view(3, 2, 8).transpose(0, 1).reshape(3 * C)
        theirs.attention.query_key_value.load_state_dict({"weight": heads, "bias": bias})
        for a, b in [(theirs.attention.dense, ours.mixer.out), (theirs.mlp.dense_h_to_4h, ours.feedforward.up),
                     (theirs.mlp.dense_4h_to_h, ours.feedforward.down), (theirs.input_layernorm, ours.norm_mixer),
                     (theirs.post_attention_layernorm, ours.norm_feedforward)]:  # fmt: skip
            a.load_state_dict(b.state_dict())
    x = stream()
    tables = GPTNeoXRotaryEmbedding(config)(x, torch.arange(T)[None])
    future = torch.zeros(1, 1, T, T, dtype=torch.float64).masked_fill(torch.ones(T, T).triu(1) > 0, -torch.inf)
    out = theirs(x, attention_mask=future, position_embeddings=tables)
    out = out[0] if isinstance(out, tuple) else out
    torch.testing.assert_close(ours(x, PLAIN), out, rtol=1e-5, atol=1e-6)  # their tables are fp32
    assert len(list(ours.parameters())) == (10 if shared else 12)


@oracle_for("block", "sandwich", "deepnorm")
@pytest.mark.parametrize("kind", ["pre", "post", "sandwich", "parallel", "deepnorm"])
def test_blocks_are_their_formulas(kind: str) -> None:
    ours = noise(
        make("block", {"kind": kind, "mixer": {"kind": "attention", "heads": 2}}, dtype=torch.float64, depth=5)
    )
    x = stream()
    f, g = (lambda h: ours.mixer(h, PLAIN)), ours.feedforward
    m, n = ours.norm_mixer, ours.norm_feedforward
    if kind == "pre":
        y = x + f(m(x))
        y = y + g(n(y))
    elif kind == "post":
        y = m(x + f(x))
        y = n(y + g(y))
    elif kind == "sandwich":
        y = x + ours.after_mixer(f(m(x)))
        y = y + ours.after_feedforward(g(n(y)))
    elif kind == "parallel":
        y = x + f(m(x)) + g(n(x))
    else:
        alpha = (2 * 5) ** 0.25
        y = m(alpha * x + f(x))
        y = n(alpha * y + g(y))
    agree(ours(x, PLAIN), y, x)


@oracle_for("model", "decoder")
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_decoder_is_llama(kv_heads: int) -> None:
    """Logits and every gradient; weights handed over by hand, so that this does not rest on the key map."""
    config = LlamaConfig(hidden_size=C, num_attention_heads=4, num_key_value_heads=kv_heads, num_hidden_layers=2,
                         intermediate_size=24, vocab_size=19, rms_norm_eps=1e-5, attn_implementation="eager")  # fmt: skip
    theirs = noise(LlamaForCausalLM(config).float())
    ours = dt.build({"kind": "decoder", "vocab": 19, "dim": C, "depth": 2, "norm": {"kind": "rms", "eps": 1e-5},
                     "blocks": {"mixer": {"kind": "attention", "heads": 4, "kv_heads": kv_heads},
                                "feedforward": {"kind": "glu", "hidden": 24},
                                "norm": {"kind": "rms", "eps": 1e-5}}})  # fmt: skip
    pairs = [(ours.embedding.table.weight, [theirs.model.embed_tokens.weight]),
             (ours.norm.weight, [theirs.model.norm.weight]), (ours.head_part.linear.weight, [theirs.lm_head.weight])]  # fmt: skip
    for mine, peer in zip(ours.blocks, theirs.model.layers, strict=True):
        a, f = peer.self_attn, peer.mlp
        pairs += [(mine.mixer.qkv.weight, [a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]),
                  (mine.mixer.out.weight, [a.o_proj.weight]), (mine.feedforward.down.weight, [f.down_proj.weight]),
                  (mine.feedforward.gate_up.weight, [f.gate_proj.weight, f.up_proj.weight]),
                  (mine.norm_mixer.weight, [peer.input_layernorm.weight]),
                  (mine.norm_feedforward.weight, [peer.post_attention_layernorm.weight])]  # fmt: skip
    assert len(pairs) == len(list(ours.parameters()))
    with torch.no_grad():
        for mine, peers in pairs:
            mine.copy_(torch.cat(peers))
    ids = torch.randint(0, 19, (B, T))
    y, z = ours(ids).logits, theirs(ids).logits
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4 * z.abs().max().item())
    w = torch.randn_like(z)
    (y * w).sum().backward()
    (z * w).sum().backward()
    for mine, peers in pairs:
        expected = torch.cat([p.grad for p in peers])
        torch.testing.assert_close(mine.grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_feed_forwards_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a compiler, a checkpointed stack takes them in pieces of the tokens: same outputs, same gradients."""
    spec: dict[str, Any] = {"kind": "decoder", "vocab": 64, "dim": 16, "depth": 2, "context": 16}
    model = noise(dt.build(spec | {"blocks": {"mixer": {"kind": "attention", "heads": 2}}}, seed=0)).train()
    tokens = torch.randint(0, 64, (2, 15))
    wanted = model(tokens).logits
    up = torch.randn_like(wanted)
    plain = torch.autograd.grad(wanted, list(model.parameters()), up)
    model.checkpointing = True
    monkeypatch.setattr(containers, "TOKENS", 8)  # 30 tokens: three pieces
    torch.compiler.reset()
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens).logits
    torch.testing.assert_close(found, wanted)
    for a, b in zip(torch.autograd.grad(found, list(model.parameters()), up), plain, strict=True):
        torch.testing.assert_close(a, b)
    x = torch.randn(2, 15, 16)
    block, took = model.blocks[0], []
    block.feedforward.register_forward_hook(lambda _, given, __: took.append(given[0].shape[1]))
    block(x, replace(Context.of(2, 15, x.device), pieces=4))
    assert took == [4, 4, 4, 3]
