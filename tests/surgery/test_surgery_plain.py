"""What surgery refuses, and widths under schemes that scale a map by its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from surgery_models import DEPTH, EXACT, VOCAB, gap, gpt2, llama

import dovetail as dt
from dovetail import surgery
from dovetail.adapters import adapt, merge, merge_and_forget, remove
from dovetail.errors import SpecError

OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "same spec": lambda m: surgery.transplant(m, m.spec),
    "swap": lambda m: dt.swap(m, {"blocks.*.mixer.kv_heads": 4}, rounds=0),
    "drop_blocks": lambda m: surgery.drop_blocks(m, [1]),
    "grow_depth": lambda m: surgery.grow_depth(m, [*range(DEPTH), 0]),
    "extend_vocabulary": lambda m: surgery.extend_vocabulary(m, 2),
    "trim_vocabulary": lambda m: surgery.trim_vocabulary(m, range(VOCAB - 1)),
    "prune_heads": lambda m: surgery.prune_heads(m, 1),
    "prune_neurons": lambda m: surgery.prune_neurons(m, 8),
    "magnitude_prune": lambda m: surgery.magnitude_prune(m, 0.5),
    "absorb_scales": surgery.absorb_scales,
    "tie": surgery.tie,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_adapters_are_neither_dropped_nor_carried(name: str) -> None:
    model = adapt(llama(), {"kind": "lora", "rank": 2}, name="mine")
    with pytest.raises(SpecError, match=r"adapters stand on this model \(mine\)"):
        OPERATIONS[name](model)
    merge(model)
    with pytest.raises(SpecError, match="unmerge them, then merge_and_forget or remove"):
        OPERATIONS[name](model)


@pytest.mark.parametrize("name", OPERATIONS)
def test_weights_in_codes_are_not_drawn_anew(name: str) -> None:
    model = llama()
    surgery.quantise(model, "int8", leave=["*.out", "*.down"])  # so that every part still has some parameters
    with pytest.raises(SpecError, match=r"(?s)kept in codes.*blocks.0.mixer.qkv.*quantise the new one"):
        OPERATIONS[name](model)


def test_what_was_adapted_or_merged_for_good_is_carried() -> None:
    model = adapt(llama(), {"kind": "lora", "rank": 2})
    assert gap(model, surgery.transplant(remove(model), model.spec).model) == 0.0
    merged = merge_and_forget(adapt(llama(), {"kind": "lora", "rank": 2}))
    assert gap(merged, surgery.transplant(merged, merged.spec).model) == 0.0


def test_merged_weights_are_not_put_into_codes() -> None:
    """Unmerging would leave dense weights beside them."""
    model = merge(adapt(llama(), {"kind": "lora", "rank": 2}))
    with pytest.raises(SpecError, match="merged into this model"):
        surgery.quantise(model, "int8")


@pytest.mark.parametrize("model", [llama(init="ntk"), gpt2(init="ntk"), llama(init="mup")], ids=["glu", "mlp", "mup"])
def test_repeated_neurons_are_exact_where_a_map_is_divided_by_its_inputs(model: Any) -> None:
    done = surgery.transplant(model, dt.override(model.spec, {"blocks.*.feedforward.hidden": 45}))
    assert {m.exactness for m in done.moves} == {"exact"} and gap(model, done.model) < EXACT


@pytest.mark.parametrize("init", ["ntk", "mup"])
def test_an_mlp_as_a_glu_is_exact_there_too(init: str) -> None:
    block = {"feedforward": {"kind": "mlp", "hidden": 20, "bias": True, "activation": "silu"}}
    model = gpt2(block=block, init=init)
    glu = block["feedforward"] | {"kind": "glu", "hidden": 30}
    done = surgery.transplant(model, dt.override(model.spec, {"blocks.*.feedforward": glu}))
    assert gap(model, done.model) < EXACT


def test_pruning_what_is_silent_is_exact_there_too() -> None:
    model = llama(init="ntk")
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.out.weight[:, 12:] = 0  # of the second key/value head
            block.feedforward.down.weight[:, 11:] = 0
    heads = surgery.prune_heads(model, 1, importance=[torch.tensor([1.0, 0.0])] * DEPTH)
    neurons = surgery.prune_neurons(model, 11, importance=[torch.arange(20.0).flip(0)] * DEPTH)
    for done in (heads, neurons):
        assert gap(model, done.model) < EXACT
        assert all(m.errors[n] == 0.0 for m in done.moves for n in ("out.weight", "down.weight") if n in m.errors)


def test_another_parametrisation_is_refused() -> None:
    """The weights would fit, and give something else."""
    model = llama()
    with pytest.raises(SpecError, match=r"(?s)another init scheme.*leave init as it is"):
        surgery.transplant(model, dt.override(model.spec, {"init": "ntk"}))
    assert gap(model, surgery.transplant(model, dt.override(model.spec, {"init": "he"})).model) == 0.0


def test_another_scale_is_fine_for_what_starts_anew() -> None:
    model = dt.build({"kind": "decoder", "vocab": 32, "dim": 32, "depth": 1, "blocks": {"mixer": "attention"}})
    grown, _ = dt.swap(model, {"init": "ntk"}, fresh=["*"])
    assert grown.spec.init.kind == "ntk"
