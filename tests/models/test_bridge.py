"""The encoder's last states handed over: torch.nn's two recurrences in a row; padding, decoding, beams, refusals."""

from __future__ import annotations

from typing import Any

import peers
import pytest
import torch
from torch import Tensor, nn

import dovetail as dt
from dovetail.errors import BuildError, RunError
from dovetail.models import rnn
from dovetail.parts.norm import RmsNorm

VOCAB, TARGET_VOCAB, DIM, DEPTH = 23, 19, 6, 3
CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}
CROSS = {"kind": "attention", "position": "none", "heads": 1}


def drawn(vocab: int, *shape: int) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(vocab))


SOURCE, TARGET = drawn(VOCAB, 3, 8), drawn(TARGET_VOCAB, 3, 7)
LENGTHS = torch.tensor([8, 3, 1])
RIGHT = torch.arange(8) < LENGTHS[:, None]  # padding on the right


def pair(cell: Any, hidden: int | None = None) -> tuple[Any, nn.Module, nn.Module]:
    """Ours, and torch.nn's encoder and decoder of the same weights, fp64."""
    model = dt.build(rnn.sequence_to_sequence_by_state(VOCAB, DIM, DEPTH, cell, decoder_vocab=TARGET_VOCAB))
    ours = dict(model.double().named_parameters())
    sides = [CELLS[cell](DIM, DIM, DEPTH, batch_first=True, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        for side, peer in zip(("encoder", "decoder"), sides, strict=True):
            for name, p in peer.named_parameters():
                kind, layer = name.rsplit("_l", 1)
                p.copy_(ours[f"{side}.blocks.{layer}.mixer.{kind}_l0"])
    return model, sides[0], sides[1]


def left(tokens: Tensor) -> Tensor:
    """Rows padded on the right, padded on the left instead."""
    return torch.stack([row.roll(8 - int(n)) for row, n in zip(tokens, LENGTHS, strict=True)])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equals_torch_nn(cell: str, padding: str, checkpointing: bool) -> None:
    """Outputs and every gradient; each row of padded sources against the row alone."""
    model, encoder, decoder = pair(cell)
    model.train()
    model.encoder.checkpointing = model.decoder.checkpointing = checkpointing
    tables = [m.table.weight.detach().clone().requires_grad_() for m in (model.embedding, model.decoder_embedding)]
    head = model.head_part.linear
    lengths = [8] * 3 if padding == "none" else LENGTHS.tolist()
    rows = []
    for b, n in enumerate(lengths):
        _, last = encoder(tables[0][SOURCE[b : b + 1, :n]])
        rows.append(decoder(tables[1][TARGET[b : b + 1]], last)[0])
    ref = torch.cat(rows) @ head.weight.detach().T + head.bias.detach()
    source, mask = {"none": (SOURCE, None), "right": (SOURCE, RIGHT), "left": (left(SOURCE), left(RIGHT))}[padding]
    out = model(source, TARGET, attention_mask=mask).logits
    peers.close(out, ref, 1e-12)
    w = torch.randn_like(ref)
    (out * w).sum().backward(), (ref * w).sum().backward()
    peers.close(model.embedding.table.weight.grad, tables[0].grad, 1e-11)  # type: ignore[arg-type]
    peers.close(model.decoder_embedding.table.weight.grad, tables[1].grad, 1e-11)  # type: ignore[arg-type]
    for side, peer in (("encoder", encoder), ("decoder", decoder)):
        for name, p in peer.named_parameters():
            kind, layer = name.rsplit("_l", 1)
            ours = getattr(getattr(model, side).blocks[int(layer)].mixer, f"{kind}_l0")
            assert p.grad is not None and p.grad.abs().max() > 0
            peers.close(ours.grad, p.grad, 1e-11, f"{side} {name}")
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("looks_back", [False, True])
def test_decoding_is_the_forward(cell: str, looks_back: bool) -> None:
    """In steps and pieces; after a reorder, a snapshot, and padded targets; with attention beside the bridge too."""
    spec = rnn.sequence_to_sequence_by_state(VOCAB, DIM, DEPTH, cell, decoder_vocab=TARGET_VOCAB)  # type: ignore[arg-type]
    if looks_back:
        spec = dt.override(spec, {"decoder.blocks.2.cross": CROSS})
    model: Any = dt.build(spec, dtype=torch.float64)
    order = torch.tensor([2, 2, 0, 1])
    with torch.no_grad():
        full = model(SOURCE, TARGET, attention_mask=RIGHT).logits
        for cuts in ([7], [1] * 7, [2, 5]):
            state = model.new_state(3, 7)
            model.encode(left(SOURCE), left(RIGHT), state=state)
            steps = [model.decode(part, state=state).logits for part in TARGET.split(cuts, 1)]
            peers.close(torch.cat(steps, 1), full, 1e-12, f"{cuts}")
        state = model.new_state(3, 7)
        first = model(SOURCE, TARGET[:, :3], attention_mask=RIGHT, state=state).logits
        peers.close(first, full[:, :3], 1e-12)
        kept = state.snapshot()
        state.reorder(order)
        peers.close(model.decode(TARGET[order, 3:], state=state).logits, full[order, 3:], 1e-12, "reordered")
        peers.close(model.decode(TARGET[:, 3:], state=kept).logits, full[:, 3:], 1e-12, "snapshot")
        padded = torch.cat([TARGET[:, :2], TARGET], 1)
        real = torch.ones_like(padded)
        real[:, :2] = 0
        late = model(SOURCE, padded, attention_mask=RIGHT, decoder_attention_mask=real).logits
        peers.close(late[:, 2:], full, 1e-12, "targets padded on the left")


def best_of_beams(model: Any, source: list[int], beams: int, length: int) -> list[int]:
    """Beam search without a state: the whole forward of every candidate at every step."""
    rows, scores = torch.full((1, 1), model.spec.decoder_start), torch.zeros(1, dtype=torch.float64)
    for _ in range(length):
        p = model(torch.tensor([source] * len(rows)), rows).logits[:, -1].log_softmax(-1) + scores[:, None]
        scores, at = p.flatten().topk(beams)
        rows = torch.cat([rows[at // p.shape[1]], at[:, None] % p.shape[1]], 1)
    return rows[0, 1:].tolist()


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generation_starts_from_the_source(beams: int) -> None:
    """Sources of uneven length, read once into a state that the beams then share."""
    spec = rnn.sequence_to_sequence_by_state(VOCAB, DIM, 2, "lstm").replace(decoder_start=1)
    model: Any = dt.build(spec, dtype=torch.float64)
    dice = torch.Generator().manual_seed(1)
    for p in model.parameters():  # wide and without biases, so that the source decides
        p.normal_(generator=dice).mul_(float(p.dim() > 1))
    sources = [row[:n].tolist() for row, n in zip(SOURCE, LENGTHS.tolist(), strict=True)]
    wanted = [best_of_beams(model, source, beams, 6) for source in sources]
    assert len({tuple(row) for row in wanted}) == 3
    assert dt.generate(model, None, sources, max_new_tokens=6, temperature=0.0, beams=beams).tolist() == wanted


def test_the_spec_says_it_and_the_own_layout_keeps_it(tmp_path: Any) -> None:
    model: Any = dt.build(rnn.sequence_to_sequence_by_state(VOCAB, DIM, 2, "gru"))
    dt.save(model, tmp_path, format="dovetail")
    again: Any = dt.load(tmp_path)
    assert again.spec == model.spec and again.spec.to_dict()["bridge"] == "last_state"
    with torch.no_grad():
        assert torch.equal(again(SOURCE, TARGET).logits, model(SOURCE, TARGET).logits)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bridge": None}, "no block of the decoder looks at the encoder"),
        ({"decoder.blocks.1.mixer": "attention"}, "this layer is none"),
        ({"encoder.blocks.*.mixer.bidirectional": True}, "both ends"),
        ({"decoder.blocks.*.mixer": "gru"}, "LSTM of 6 to start a GRU of 6"),
        ({"decoder.blocks.0.mixer.hidden": 8}, "LSTM of 6 to start a LSTM of 8"),
        ({"decoder": {"kind": "stack", "depth": 1, "blocks": "recurrent", "norm": None}}, "2 layers to start 1"),
        ({"encoder.norm": {"kind": "rms"}}, "no effect"),
        ({"encoder.blocks.1.feedforward": "mlp"}, "no effect"),
        ({"encoder.blocks.1.mixer.hidden": 8, "decoder.blocks.1.mixer.hidden": 8}, "no effect"),
    ],
    ids=str,
)
def test_refusals(change: dict[str, Any], match: str) -> None:
    spec = rnn.sequence_to_sequence_by_state(VOCAB, DIM, 2)
    with pytest.raises(BuildError, match=match):
        dt.build(dt.override(spec, change))


def test_what_reads_the_output_gives_it_an_effect() -> None:
    spec = rnn.sequence_to_sequence_by_state(VOCAB, DIM, 2)
    spec = dt.override(spec, {"encoder.norm": RmsNorm(), "decoder.blocks.1.cross": CROSS})
    model: Any = dt.build(spec)
    model(SOURCE, TARGET).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_decoding_before_the_source_is_refused() -> None:
    model: Any = dt.build(rnn.sequence_to_sequence_by_state(VOCAB, DIM, 2))
    state = model.new_state(3, 7)
    with torch.no_grad(), pytest.raises(RunError, match="no source was read"):
        model.decode(TARGET, state=state)
    with pytest.raises(RunError, match="gradients"):
        model.encode(SOURCE, state=state)


@pytest.mark.parametrize("cell", CELLS)
def test_autocast(cell: Any) -> None:
    model, _, _ = pair(cell)
    model.float()
    for mask in (None, RIGHT):
        full = model(SOURCE, TARGET, attention_mask=mask).logits
        with torch.autocast("cpu", torch.bfloat16):
            low = model(SOURCE, TARGET, attention_mask=mask).logits
        low.float().sum().backward()
        peers.close(low.float(), full, 0.05)
