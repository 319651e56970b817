"""The original Transformer against torch.nn.Transformer with the same weights; recurrent systems against torch.nn."""

from __future__ import annotations

import math
from typing import Any

import peers
import pytest
import torch
from torch import Tensor, nn

import dovetail as dt
from dovetail.errors import CheckpointError
from dovetail.models import rnn
from dovetail.models.transformer import transformer
from dovetail.parts.norm import LayerNorm
from oracles import oracle_for

VOCAB, DIM, HEADS, HIDDEN = 23, 12, 3, 20
SOURCE = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
TARGET = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(4))


def sinusoids(length: int, dim: int) -> Tensor:
    """PE(p, 2i) = sin(p / 10000^(2i/d)), PE(p, 2i+1) = cos of the same: section 3.5, in fp64."""
    table = torch.zeros(length, dim, dtype=torch.float64)
    for p in range(length):
        for i in range(0, dim, 2):
            angle = p / 10_000 ** (i / dim)
            table[p, i], table[p, i + 1] = math.sin(angle), math.cos(angle)
    return table


def layer_weights(peer: Any, ours: str, cross: bool) -> dict[str, Tensor]:
    """One torch layer's weights under our names."""
    out = {
        f"{ours}.mixer.qkv.weight": peer.self_attn.in_proj_weight,
        f"{ours}.mixer.out.weight": peer.self_attn.out_proj.weight,
    }
    if cross:
        q, kv = peer.multihead_attn.in_proj_weight.split([DIM, 2 * DIM])
        out |= {f"{ours}.cross.q.weight": q, f"{ours}.cross.kv.weight": kv}
        out |= {f"{ours}.cross.out.weight": peer.multihead_attn.out_proj.weight}
    norms = ["mixer", "cross", "feedforward"] if cross else ["mixer", "feedforward"]
    pairs = {f"norm_{name}": f"norm{i + 1}" for i, name in enumerate(norms)}
    for a, b in (pairs | {"feedforward.up": "linear1", "feedforward.down": "linear2"}).items():
        module = getattr(peer, b)
        out |= {f"{ours}.{a}.weight": module.weight, f"{ours}.{a}.bias": module.bias}
    return out


@oracle_for("model", "encoder_decoder")
def test_equals_torch_nn_transformer() -> None:
    """Outputs and gradients in fp64; torch's final norms are the stacks' norms."""
    torch.manual_seed(0)
    peer = nn.Transformer(DIM, HEADS, 2, 3, HIDDEN, dropout=0.0, batch_first=True, dtype=torch.float64)
    for layer in (*peer.encoder.layers, *peer.decoder.layers):
        for attention in (layer.self_attn, getattr(layer, "multihead_attn", layer.self_attn)):
            nn.init.zeros_(attention.in_proj_bias), nn.init.zeros_(attention.out_proj.bias)
            attention.in_proj_bias.requires_grad_(False), attention.out_proj.bias.requires_grad_(False)
    table = nn.Parameter(torch.randn(VOCAB, DIM, dtype=torch.float64))

    spec = transformer(VOCAB, DIM, 2, HEADS, HIDDEN, dropout=0.0)
    decoder = spec.decoder.replace(depth=3, blocks=(spec.decoder.blocks[0],) * 3, norm=LayerNorm())  # type: ignore[attr-defined]
    spec = spec.replace(encoder=spec.encoder.replace(norm=LayerNorm()), decoder=decoder)
    ours = dt.build(spec, dtype=torch.float64)
    names = {"embedding.table.weight": table}
    for side, layers in (("encoder", peer.encoder), ("decoder", peer.decoder)):
        for i, layer in enumerate(layers.layers):
            names |= layer_weights(layer, f"{side}.blocks.{i}", side == "decoder")
        names |= {f"{side}.norm.weight": layers.norm.weight, f"{side}.norm.bias": layers.norm.bias}
    assert names.keys() == dict(ours.named_parameters()).keys()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.copy_(names[name])

    def embed(tokens: Tensor) -> Tensor:
        return table[tokens] * math.sqrt(DIM) + sinusoids(tokens.shape[1], DIM)

    mask = torch.arange(9)[None] < torch.tensor([9, 6])[:, None]
    causal = torch.ones(7, 7, dtype=torch.bool).triu(1)
    h = peer(embed(SOURCE), embed(TARGET), tgt_mask=causal, src_key_padding_mask=~mask, memory_key_padding_mask=~mask)
    ref = h @ table.T
    out = ours(SOURCE, TARGET, attention_mask=mask).logits
    peers.close(out, ref, 1e-6)
    weight = torch.randn(ref.shape, dtype=ref.dtype)
    (out * weight).sum().backward(), (ref * weight).sum().backward()
    grads = {n: t.grad for n, t in names.items() if t.is_leaf}
    for i, layer in enumerate(peer.decoder.layers):
        q, kv = layer.multihead_attn.in_proj_weight.grad.split([DIM, 2 * DIM])
        grads |= {f"decoder.blocks.{i}.cross.q.weight": q, f"decoder.blocks.{i}.cross.kv.weight": kv}
    for name, p in ours.named_parameters():
        assert p.grad is not None
        peers.close(p.grad, grads[name], 1e-5, name)


def test_decoding() -> None:
    model = dt.build(transformer(VOCAB, DIM, 2, HEADS, HIDDEN), dtype=torch.float64)
    check_decoding(model)


def check_decoding(model: Any) -> None:
    with torch.no_grad():
        full = model(SOURCE, TARGET).logits
        for cuts in ([7], [1] * 7, [2, 5]):
            state = model.new_state(2, 7)
            model.encode(SOURCE, state=state)
            steps = [model.decode(part, state=state).logits for part in TARGET.split(cuts, 1)]
            peers.close(torch.cat(steps, 1), full, 1e-9, f"decoding in {cuts}")


@oracle_for("block", "recurrent")
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("tied", [False, True])
def test_recurrent_language_model(cell: str, tied: bool) -> None:
    """Embedding, torch.nn's stacked recurrence, linear head: outputs, gradients; decoding and padding."""
    torch.manual_seed(0)
    model = dt.build(rnn.language_model(VOCAB, 6, 3, cell, tied=tied), dtype=torch.float64)  # type: ignore[arg-type]
    peer = (nn.LSTM if cell == "lstm" else nn.GRU)(6, 6, 3, batch_first=True, dtype=torch.float64)
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in peer.named_parameters():
            kind, layer = name.rsplit("_l", 1)
            ours[f"blocks.{layer}.mixer.{kind}_l0"].copy_(p)
    table = model.embedding.table.weight.detach().clone().requires_grad_()
    head = model.head_part.linear if not tied else None
    h = peer(table[SOURCE])[0]
    ref = h @ table.T if head is None else h @ head.weight.detach().T + head.bias.detach()
    out = model(SOURCE).logits
    peers.close(out, ref, 1e-12)
    out.square().sum().backward(), ref.square().sum().backward()
    peers.close(model.embedding.table.weight.grad, table.grad, 1e-12)  # type: ignore[arg-type]
    for name, p in peer.named_parameters():
        kind, layer = name.rsplit("_l", 1)
        peers.close(ours[f"blocks.{layer}.mixer.{kind}_l0"].grad, p.grad, 1e-12, name)  # type: ignore[arg-type]
    peers.check_decoding(model, SOURCE, 1e-12)
    peers.check_padding(model, SOURCE, 1e-12)
    peers.check_packing(model, SOURCE, 1e-12)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_recurrent_sequence_to_sequence(cell: str, tmp_path: Any) -> None:
    """torch.nn's two-way encoder and decoder with one head of attention; decoding, and the native layout."""
    torch.manual_seed(0)
    model = dt.build(rnn.sequence_to_sequence(VOCAB, 6, 1, cell), dtype=torch.float64)  # type: ignore[arg-type]
    kind = nn.LSTM if cell == "lstm" else nn.GRU
    encoder = kind(6, 6, bidirectional=True, batch_first=True, dtype=torch.float64)
    decoder = kind(6, 6, batch_first=True, dtype=torch.float64)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for side, peer in (("encoder", encoder), ("decoder", decoder)):
            for name, p in peer.named_parameters():
                p.copy_(weights[f"{side}.blocks.0.mixer.{name}"])
        table = weights["embedding.table.weight"]
        memory = encoder(table[SOURCE])[0] @ weights["encoder.blocks.0.mixer.out.weight"].T
        h = decoder(table[TARGET])[0]
        k, v = (memory @ weights["decoder.blocks.0.cross.kv.weight"].T).chunk(2, -1)
        q = h @ weights["decoder.blocks.0.cross.q.weight"].T
        found = (q @ k.transpose(1, 2) / math.sqrt(6)).softmax(-1) @ v
        h = h + found @ weights["decoder.blocks.0.cross.out.weight"].T
        ref = h @ weights["head_part.linear.weight"].T + weights["head_part.linear.bias"]
        peers.close(model(SOURCE, TARGET).logits, ref, 1e-12)
    check_decoding(model)
    with pytest.raises(CheckpointError, match="no published layout"):
        dt.save(model, tmp_path / "hf")
    dt.save(model, tmp_path / "own", format="dovetail")
    with torch.no_grad():
        assert torch.equal(dt.load(tmp_path / "own")(SOURCE, TARGET).logits, model(SOURCE, TARGET).logits)
