"""How the matrix exercises a part of each category: the smallest model that contains it.

A new part of a known category needs nothing here unless it has required fields with unusual names; a
new category needs a line in PLACES (or ALONE), without which the matrix fails for its parts.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dovetail
from dovetail.parts.containers import StackModule
from dovetail.parts.context import Context
from dovetail.parts.init import Normal
from dovetail.parts.outputs import Outputs
from dovetail.parts.state import Room, State
from dovetail.parts.weights import initialise
from dovetail.spec import Entry, Slot, Spec, entries, entry

VOCAB, DIM, DEPTH, CONTEXT, LENGTH = 17, 16, 2, 32, 12
AOT = "aot_eager_default_partitioner"  # as aot_eager; cutting the graph in two by torch's min-cut takes a tenth more

# What a required field of this name gets, and what a kind needs beyond that.
FIELDS: dict[str, Any] = {
    "vocab": VOCAB, "dim": DIM, "depth": DEPTH, "size": 4, "length": 2, "step": 2, "stride": 3, "before": 2,
    "after": 1, "path": "text.txt", "gain": 0.5, "roles": ["value", "residual"], "base": {"kind": "normal", "std": 0.25}, "rank": 4,
}  # fmt: skip
EXAMPLES: dict[tuple[str, str], dict[str, Any]] = {
    ("mixer", "attention"): {"heads": 4, "kv_heads": 2, "head_dim": 8},
    ("mixer", "lsh"): {"heads": 2, "buckets": 2, "rounds": 2, "chunk": 3},
    ("mixer", "flash"): {"key_dim": 8, "chunk": 3},
    ("mixer", "linformer"): {"heads": 2, "length": 60},
    ("mixer", "nystrom"): {"heads": 2, "landmarks": 3, "conv": 3},
    ("mask", "random_blocks"): {"count": 1},
    ("mask", "and"): {"rules": [{"kind": "window", "size": 5}, {"kind": "dilated", "step": 2}]},
    ("mask", "or"): {"rules": [{"kind": "window", "size": 3}, {"kind": "prefix", "length": 2}]},
    ("rope_scaling", "longrope"): {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]},
    ("position", "learned"): {"length": CONTEXT},
    ("init", "word_vectors"): {
        "path": str(Path(__file__).parents[1] / "golden" / "word_vectors.txt"),  # VOCAB rows of width DIM
        "base": {"kind": "normal", "std": 0.25},
    },
    ("position", "mrope"): {"sections": [1, 1, 2]},
    ("position", "rerope"): {"window": 4},  # LENGTH goes beyond the windows and trained lengths here
    ("position", "leaky_rerope"): {"window": 4},
    ("position", "inverse_leaky_rerope"): {"window": 4, "factor": 2.0},
    ("position", "streaming_llm"): {"window": 3, "sinks": 2},
    ("position", "logn"): {"trained": 4},
    ("mixer", "window"): {"size": 3, "shift": 1},
    ("model", "encoder_decoder"): {
        "encoder": {"depth": 1},
        "decoder": {"depth": 1, "blocks": {"cross": {"kind": "attention", "position": "none"}, "mixer": "attention"}},
    },
    ("model", "two_stream"): {
        "blocks": {"mixer": {"kind": "attention", "heads": 2, "mask": "permutation", "position": "xlnet"}},
    },
    ("model", "sequence_classifier"): {"features": VOCAB, "classes": VOCAB, "pooling": None},
    ("adapter", "fusion"): {"of": ["one", "two"]},
    ("pooling", "concat"): {"of": ["mean", "max"]},
    ("corpus", "files"): {"paths": ["a.txt", "b.txt"]},
    ("corpus", "mnist"): {"split": "train"},
    ("corpus", "pixels"): {"of": {"kind": "mnist", "path": "mnist", "split": "train"}},
    ("corpus", "echoed"): {"corpus": {"kind": "text", "path": "a.txt"}},
    ("corpus", "controlled"): {"codes": ["A"], "corpora": [{"kind": "text", "path": "a.txt"}]},
    ("objective", "distillation"): {
        "teacher": "a",
        "next_token": 0.5,
        "hidden": 0.25,
        "transfer": 2.0,
        "temperature": 2.0,
    },
}
INIT = {"kind": "normal", "std": 0.25}  # wide enough that every part changes the outputs


@cache
def _import_every_room() -> None:
    for module in pkgutil.walk_packages(dovetail.__path__, "dovetail."):
        if not module.name.startswith("dovetail.cli") and not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def all_entries() -> list[Entry]:
    """Every registered part, whichever room it is in (the command line registers nothing and is left alone)."""
    _import_every_room()
    return entries()


def in_a_model() -> list[Entry]:
    """Every part that stands in a language model."""
    return [e for e in all_entries() if e.category in PLACES and not _of_a_grid(e)]


def looking_back() -> list[Entry]:
    """Every part that stands in a model which sees no future, and so can write on."""
    return [e for e in in_a_model() if e.capabilities.get("causal") is not False]


def on_a_grid() -> list[Entry]:
    """Every part that needs tokens on a grid: an image's."""
    return [e for e in all_entries() if _of_a_grid(e)]


def _of_a_grid(e: Entry) -> bool:
    return e.category in GRID_PLACES and (e.category not in PLACES or e.capabilities.get("causal") is False)


def name(e: Entry) -> str:
    return f"{e.category}-{e.kind}"


def example(e: Entry) -> dict[str, Any]:
    """Plain data of a small spec of this part. Fails naming a required field that nothing here fills."""
    given = EXAMPLES.get((e.category, e.kind), {})
    if e.category == "rope_scaling":
        given = {"factor": 2.0, "original": 8} | given  # LENGTH goes beyond the trained 8
    for field, info in e.cls.model_fields.items():
        if info.is_required() and field not in given:
            assert field in FIELDS, f"tests/matrix/harness.py knows no example of {name(e)}'s field {field!r}"
            given = given | {field: FIELDS[field]}
    return {"kind": e.kind} | given


def _plain(depth: int) -> dict[str, Any]:
    attention = {"kind": "attention", "heads": 2, "position": {"kind": "rope"}}
    block = {"kind": "pre", "mixer": attention, "feedforward": {"kind": "glu", "hidden": 24}}
    common = {"vocab": VOCAB, "dim": DIM, "depth": depth, "context": CONTEXT}
    return {"kind": "decoder", **common, "init": INIT, "blocks": block}


def _position(model: dict[str, Any], part: dict[str, Any]) -> None:
    slot = Slot(dim=DIM, head_dim=DIM // 2, context=CONTEXT, vocab=VOCAB, init=Normal())
    with torch.device("meta"):
        hooks = slot.build(Spec.parse("position", part), "position").hooks
    if "embed" in hooks:
        model["position"] = part
        model["blocks"]["mixer"]["position"] = {"kind": "none"}
    else:
        model["blocks"]["mixer"]["position"] = part


def _beside_a_window(part: dict[str, Any]) -> dict[str, Any]:
    """A mask that hides nothing beyond causality is refused by itself; with a window it is one of several."""
    if part["kind"] in ("full", "causal"):
        return {"kind": "and", "rules": [part, {"kind": "window", "size": 5}]}
    return part


# Where a part of a category stands in the smallest decoder.
PLACES: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "mixer": lambda model, part: model["blocks"].update(mixer=part),
    "feedforward": lambda model, part: model["blocks"].update(feedforward=part),
    "activation": lambda model, part: model["blocks"]["feedforward"].update(activation=part),
    "norm": lambda model, part: (model["blocks"].update(norm=part), model.update(norm=part)),
    "block": lambda model, part: model["blocks"].update(part),
    "position": _position,
    "rope_scaling": lambda model, part: model["blocks"]["mixer"]["position"].update(scaling=part),
    "mask": lambda model, part: model["blocks"]["mixer"].update(mask=_beside_a_window(part)),
    "normaliser": lambda model, part: model["blocks"].update(mixer={"kind": "gau", "key_dim": 8, "normaliser": part}),
    "feature_map": lambda model, part: model["blocks"].update(
        mixer={"kind": "linear", "heads": 2, "feature_map": part, "normalise": part["kind"] != "identity"}
    ),
    "init": lambda model, part: model.update(init=part),
    "embedding": lambda model, part: model.update(embedding=part),
    "head": lambda model, part: model.update(head=part),
    "container": lambda model, part: None,
    "model": lambda model, part: None,
}
GRID_PLACES: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "image_embedding": lambda model, part: model.update(image_embedding=part),
    "resample": lambda model, part: model["container"].update(between=part),
    "container": lambda model, part: model["container"].update(part),
    "mixer": lambda model, part: [stage["blocks"].update(mixer=part) for stage in model["container"]["stages"]],
    "position": lambda model, part: [
        stage["blocks"]["mixer"]["mixer"].update(position=part) for stage in model["container"]["stages"]
    ],
}
ALONE = ("activation", "norm", "feedforward", "init")  # exercised by themselves too: maps of each position
OUTSIDE = (
    "objective",
    "corpus",
    "storage",
    "adapter",
    "lora_init",
    "pooling",
)  # stand beside a model, not in it: exercised by tests of their own


def arrangement(e: Entry, depth: int = DEPTH) -> Spec:
    """The spec of the smallest model (or container) that contains the part."""
    assert e.category in PLACES, f"tests/matrix/harness.py does not know how to exercise a {e.category}"
    if e.category in ("model", "container"):
        fields = {f for f in ("depth", "context", "init", "blocks") if f in e.cls.model_fields}
        return Spec.parse(e.category, {k: v for k, v in _plain(depth).items() if k in fields} | example(e))
    model = _plain(depth)
    PLACES[e.category](model, example(e))
    if "streams" in e.capabilities:
        model["streams"] = e.capabilities["streams"]
    return Spec.parse("model", model)


class Contained(nn.Module):
    """A container between an embedding and a head, called like a decoder."""

    def __init__(self, spec: Spec):
        super().__init__()
        slot = Slot(dim=DIM, depth=DEPTH, context=CONTEXT, init=Normal(std=0.25))
        self.embedding = slot.build(Spec.parse("embedding", "token"), "embedding", dim_out=VOCAB)
        self.container: StackModule = slot.build(spec, "container")
        self.head = slot.build(Spec.parse("head", "linear"), "head", dim_out=VOCAB)

    def forward(self, tokens: Tensor, *, state: State | None = None, **masks: Any) -> Outputs:
        start = 0 if state is None else state.start()
        ctx = Context.of(*tokens.shape, tokens.device, start=start, **masks)
        if state is not None:
            state.advance(ctx)
        h = self.container(self.embedding(tokens), ctx, state)
        return Outputs(logits=self.head.logits(h), last_hidden_state=h)

    def new_state(self, batch: int, capacity: int) -> State:
        room = Room(batch, capacity, torch.device("cpu"), next(self.parameters()).dtype)
        return State(self.container.new_layers(room), room)


class Seeing(nn.Module):
    """Images (B,3,H,W) -> tokens of the coarsest grid (B,N,C): patches, then stages of windows."""

    def __init__(self, e: Entry):
        super().__init__()
        attention = {"kind": "attention", "heads": 2, "position": {"kind": "relative_bias_2d"}}
        mixer = {"kind": "window", "size": 3, "shift": 1, "mixer": attention}
        block = {"kind": "pre", "norm": "layer", "mixer": mixer, "feedforward": {"kind": "mlp", "hidden": 24}}
        stage = {"kind": "stack", "depth": 1, "norm": None, "blocks": block}
        model: dict[str, Any] = {
            "image_embedding": {"kind": "patch", "size": 2},
            "container": {"kind": "stages", "stages": [copy.deepcopy(stage), stage], "between": {"kind": "merge"}},
        }
        GRID_PLACES[e.category](model, example(e))
        slot = Slot(dim=DIM, causal=False, init=Normal(std=0.25))
        self.embedding = slot.build(Spec.parse("image_embedding", model["image_embedding"]), "embedding")
        self.container = slot.build(Spec.parse("container", model["container"]), "container")

    def forward(self, images: Tensor) -> Tensor:
        return self.container(*self.embedding(images))


def build_on_grid(e: Entry, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Seeing:
    with torch.device("meta"):
        model = Seeing(e).to(dtype)
    model.to_empty(device="cpu")
    initialise(model, seed)
    return model.eval()


class Translating(nn.Module):
    """An encoder-decoder called like a decoder: every row translates the same source."""

    listens_at = "model.decoder_embedding"

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def _source(self, rows: int) -> Tensor:
        return torch.arange(3, 8)[None].expand(rows, -1)

    def forward(
        self, tokens: Tensor, *, state: State | None = None, attention_mask: Tensor | None = None, **packed: Any
    ) -> Outputs:
        if packed:
            pytest.skip("targets of one row share its source, so rows of an encoder-decoder cannot be packed")
        if state is not None:
            return self.model.decode(tokens, state=state, attention_mask=attention_mask)
        return self.model(self._source(tokens.shape[0]), tokens, decoder_attention_mask=attention_mask)

    def new_state(self, batch: int, capacity: int) -> State:
        state = self.model.new_state(batch, capacity)
        with torch.no_grad():
            self.model.encode(self._source(batch), state=state)
        return state


class Judging(nn.Module):
    """A classifier of values called like an encoder: an id is the unit vector of its number, a class of each token one."""

    listens_at = "model.read"

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.spec = model, model.spec

    def forward(self, tokens: Tensor, **masks: Any) -> Outputs:
        values = nn.functional.one_hot(tokens, VOCAB).to(self.model.read.weight.dtype)
        out = self.model(values, **masks)
        return replace(out, logits=out.class_logits)

    def new_state(self, batch: int, capacity: int) -> State:
        return self.model.new_state(batch, capacity)


def build(e: Entry, *, seed: int = 0, dtype: torch.dtype = torch.float64, depth: int = DEPTH) -> Any:
    """The smallest model of a part, called as model(tokens, ...) -> Outputs."""
    return build_spec(arrangement(e, depth), seed=seed, dtype=dtype)


def build_spec(spec: Spec, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    if spec.category == "model":
        model = dovetail.build(spec, seed=seed, dtype=dtype)
        if spec.kind == "sequence_classifier":
            return Judging(model)
        return Translating(model) if hasattr(model, "encode") else model
    with torch.device("meta"):
        model = Contained(spec).to(dtype)
    model.to_empty(device="cpu")
    initialise(model, seed)
    return model.eval()


@cache
def subject(category: str, kind: str) -> Any:
    """`build` in fp64, made once and never changed."""
    return build(entry(category, kind))


def alone(e: Entry, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A position-wise part by itself, (..., DIM) -> (..., DIM). An init shows in an MLP that it starts."""
    slot = Slot(dim=DIM, depth=DEPTH, init=Normal(std=0.25))
    part = Spec.parse(e.category, example(e))
    if e.category == "init":
        slot, part = replace(slot, init=part), Spec.parse("feedforward", {"kind": "mlp", "hidden": 24})
    with torch.device("meta"):
        module = slot.build(part, "part").to(dtype)
    module.to_empty(device="cpu")
    initialise(module, 0)
    return module


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, VOCAB, shape)


@contextmanager
def stream(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Changes what the embedding of the (target) tokens gives, and collects it; the last entry is the target's."""
    seen: list[Tensor] = []

    def hook(_: Any, __: Any, out: Tensor) -> Tensor:
        seen.append(change(out))
        return seen[-1]

    handle = model.get_submodule(getattr(model, "listens_at", "embedding")).register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """d loss / d parameter by name; zeros where the loss does not depend on it."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10, what: str = "") -> None:
    """max|a - b| <= tolerance * max(1, max|b|), both finite."""
    assert a.shape == b.shape, f"{what}: {tuple(a.shape)} against {tuple(b.shape)}"
    assert torch.isfinite(a).all(), f"{what}: not finite"
    worst = (a - b).abs().max().item() if a.numel() else 0.0
    limit = tolerance * max(1.0, b.abs().max().item() if b.numel() else 0.0)
    assert worst <= limit, f"{what}: differs by {worst:.3g}, allowed {limit:.3g}"
