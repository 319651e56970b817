"""Adapters where a part uses a weight otherwise than by calling its map: as a matrix, or some of its rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_models import VOCAB, decoder, stir, tokens

import dovetail as dt
from dovetail.adapters import Lora, adapt, off, remove
from dovetail.errors import SpecError
from dovetail.parts.adaptable import adaptables


@torch.no_grad()
@pytest.mark.parametrize("init", ["normal", "ntk"])
def test_a_bias_on_latent_keys_and_values_is_seen_while_decoding(init: str) -> None:
    """Where the maps are absorbed, keys' share falls out of the softmax and values' is added behind it."""
    mixer = {"kind": "latent", "rank": 6, "heads": 2, "rope_dim": 4}
    model = dt.build(
        {"kind": "decoder", "vocab": VOCAB, "dim": 32, "depth": 2, "init": init, "blocks": {"mixer": mixer}}
    ).eval()
    adapt(model, {"kind": "bitfit", "add": True, "targets": ["kv_up"]})
    stir(model, 2.0)
    x = tokens(length=24)
    wanted, state = model(x).logits, model.new_state(2, 24)
    parts = [x[:, :16], *x[:, 16:].split(1, 1)]
    assert torch.allclose(torch.cat([model(part, state=state).logits for part in parts], 1), wanted, atol=1e-5)
    with off(model):
        assert (model(x).logits - wanted).abs().max() > 0.1


@pytest.mark.parametrize(
    "mixer", ["hippo", {"kind": "attention", "heads": 2, "position": "transformer_xl"}], ids=["hippo", "xl"]
)
def test_a_map_that_is_read_as_a_matrix_gets_no_bias_and_no_dropout(mixer: Any) -> None:
    model = dt.build({"kind": "decoder", "vocab": VOCAB, "dim": 32, "depth": 1, "blocks": {"mixer": mixer}})
    target = "told" if mixer == "hippo" else "position.r"
    for spec in ({"kind": "bitfit", "add": True, "targets": [target, "down"]}, {"kind": "bitfit", "targets": [target]}):
        with pytest.raises(SpecError, match=r"(?s)as a matrix alone.*leave it out"):
            adapt(model, spec)
    adapt(model, {"kind": "bitfit", "add": True})
    x, places = tokens(), [place for _, place in adaptables(model) if place.active]
    assert not any(getattr(place, "read_whole", False) for place in places)
    stir(model)
    with torch.no_grad():
        wanted = model(x).logits
        for place in places:  # every one of them does something
            place.active = ()
            assert not torch.equal(model(x).logits, wanted)
            place.active = ("default",)
    remove(model)
    for kind in ("lora", "dora", "adalora"):
        adapt(model, {"kind": kind, "dropout": 0.1})
        for _, place in adaptables(model):
            whole = getattr(place, "read_whole", False)
            assert all(a.drop == (0.0 if whole else 0.1) for a in place.attached().values() if hasattr(a, "drop"))
        remove(model)


def test_dropout_is_there_where_rows_of_a_fused_map_are_used_alone() -> None:
    """Queries and keys that read other vectors than values do, each by its own rows."""
    model = adapt(decoder(), Lora(rank=2, targets=("qkv",), dropout=0.5))
    stir(model)
    place, x = model.blocks[0].mixer.qkv, torch.randn(2, 400, 32)
    with torch.no_grad():
        wanted = place(x)[..., 16:40]
        assert torch.allclose(place.rows(x, 16, 40), wanted, atol=1e-5)
        model.train()
        drawn = torch.stack([place.rows(x, 16, 40) for _ in range(64)])
    assert not torch.equal(drawn[0], drawn[1])
    assert (drawn.mean(0) - wanted).mean().abs() < 4 * drawn.std() / drawn.numel() ** 0.5
