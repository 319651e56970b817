"""Every registered weight map, held to the class of exactness that it states."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from surgery_models import CONTEXT, DIM, EXACT, gap, gau, gpt2, linear, llama

import dovetail as dt
from dovetail.errors import SpecError
from dovetail.surgery import transplant
from dovetail.surgery.maps import map_entries

MIXER, FEED, NORM = "blocks.*.mixer", "blocks.*.feedforward", "blocks.*.norm"
SINKS = {"kind": "or", "rules": [{"kind": "window", "size": 4}, {"kind": "prefix", "length": 2}]}
NO_BIAS = {"norm": {"kind": "layer", "bias": False}}
GLU = {"kind": "glu", "activation": "gelu", "bias": True}


@dataclass
class Case:
    """A swap that calls on one map. within: tokens up to which it is exact; None: it is not. seen: words of its move."""

    entry: tuple[str, str, str]
    old: Any
    changes: dict[str, Any]
    gives: str
    seen: str
    within: int | None = None
    fresh: tuple[str, ...] = ()
    errors: tuple[str, ...] = field(default=())


def exact(*args: Any, **more: Any) -> Case:
    return Case(*args[:3], "exact", args[3], CONTEXT, **more)


def inexact(*args: Any, **more: Any) -> Case:
    return Case(*args[:3], "approximate", args[3], **more)


ATTENTION, ANY = ("mixer", "attention", "attention"), ("mixer", "*", "*")
RESIZED = {kind: ("feedforward", kind, kind) for kind in ("mlp", "glu")}
GATED, POSITION, LENGTH = ("feedforward", "mlp", "glu"), ("position", "*", "*"), ("position", "learned", "learned")
CASES = [
    exact(ATTENTION, llama, {f"{MIXER}.kv_heads": 4}, "repeated to 4"),
    exact(ATTENTION, llama, {f"{MIXER}.bias": "all"}, "starts at zero"),
    inexact(ATTENTION, llama, {f"{MIXER}.kv_heads": 1}, "mean-pooled to 1", errors=("qkv.weight",)),
    inexact(ATTENTION, gpt2, {f"{MIXER}.bias": "out"}, "bias of qkv is dropped", errors=("qkv.bias",)),
    inexact(ATTENTION, llama, {f"{MIXER}.mask": {"kind": "window", "size": 5}}, "up to 5 tokens", within=5),
    inexact(
        ATTENTION,
        llama,
        {f"{MIXER}.mask": SINKS},
        "window of 4 with 2 sinks): exact for sequences of up to 6",
        within=6,
    ),
    inexact(ATTENTION, llama, {f"{MIXER}.mask": {"kind": "dilated", "step": 2}}, "no bound"),
    inexact(ATTENTION, llama, {f"{MIXER}.scale": 0.9}, "scaled or capped otherwise"),
    Case(
        ATTENTION,
        llama,
        {f"{MIXER}.heads": 3, f"{MIXER}.kv_heads": 3},
        "reinitialised",
        "on request",
        fresh=(MIXER,),
    ),
    exact(ANY, linear, {f"{MIXER}.kv_heads": 4}, "2 value heads repeated to 4"),
    exact(ANY, linear, {f"{MIXER}.bias": "all"}, "a bias of qkv starts at zero; a bias of out starts at zero"),
    inexact(ANY, linear, {f"{MIXER}.kv_heads": 1}, "2 key heads mean-pooled to 1", errors=("qkv.weight",)),
    inexact(ANY, linear, {f"{MIXER}.feature_map": "relu"}, "feature_map relu in place of elu1: no bound"),
    inexact(ANY, llama, {MIXER: "linear"}, "query, key, value, out are carried; linear in place of attention"),
    inexact(ANY, gpt2, {MIXER: "gla"}, "qkv is dropped; the bias of out is dropped", errors=("qkv.bias", "out.bias")),
    Case(
        ANY,
        linear,
        {f"{MIXER}.heads": 2, f"{MIXER}.kv_heads": 1},
        "reinitialised",
        "on request",
        fresh=(MIXER,),
    ),
    exact(RESIZED["mlp"], gpt2, {f"{FEED}.hidden": 33}, "20 neurons repeated to 33"),
    exact(RESIZED["glu"], llama, {f"{FEED}.hidden": 50, f"{FEED}.bias": True}, "repeated to 50"),
    inexact(RESIZED["glu"], llama, {f"{FEED}.hidden": 12}, "12 of 20", errors=("gate_up.weight", "down.weight")),
    inexact(RESIZED["mlp"], gpt2, {f"{FEED}.hidden": 19}, "19 of 20", errors=("up.weight", "up.bias", "down.weight")),
    inexact(RESIZED["mlp"], gpt2, {f"{FEED}.bias": False}, "bias of up is dropped", errors=("up.bias", "down.bias")),
    inexact(RESIZED["glu"], llama, {f"{FEED}.activation": "relu"}, "relu in place of silu"),
    exact(GATED, gpt2, {FEED: GLU | {"hidden": 20}}, "constant 1"),
    exact(GATED, gpt2, {FEED: GLU | {"hidden": 30}}, "constant 1"),
    inexact(GATED, gpt2, {FEED: GLU | {"hidden": 12}}, "12 of 20", errors=("up.weight", "up.bias", "down.weight")),
    exact(GATED, lambda: gpt2(init={"kind": "ntk"}), {FEED: GLU | {"hidden": 20}}, "constant 1"),
    inexact(GATED, gpt2, {FEED: GLU | {"hidden": 20, "bias": False}}, "starts anew", errors=("up.bias", "down.bias")),
    inexact(("norm", "layer", "rms"), gpt2, {NORM: {"kind": "rms", "eps": 1e-5}}, "mean stays in", errors=("bias",)),
    inexact(
        ("norm", "layer", "rms"),
        gpt2,
        {NORM: {"kind": "rms", "eps": 1e-5, "affine": False}},
        "scale and bias are lost",
        errors=("weight", "bias"),
    ),
    inexact(("norm", "rms", "layer"), llama, {NORM: {"kind": "layer", "eps": 1e-6}}, "mean is taken out"),
    inexact(
        ("norm", "rms", "layer"),
        lambda: llama(norm={"kind": "rms", "affine": False}),
        {"norm": {"kind": "layer", "eps": 1e-6}},
        "mean is taken out",
    ),
    exact(("embedding", "token", "token"), llama, {"embedding": {"kind": "token", "scale": 4.0}}, "multiplied by 0.25"),
    exact(("norm", "rms", "rms"), llama, {NORM: {"kind": "rms", "offset": 1.0}}, "beside an offset of 1"),
    exact(
        ("norm", "rms", "rms"),
        lambda: llama(norm={"kind": "rms", "affine": False}),
        {"norm": {"kind": "rms", "offset": 1.0}},
        "the scale begins at 1",
    ),
    inexact(("norm", "rms", "rms"), llama, {NORM: {"kind": "rms", "eps": 0.1}}, "eps 0.1 in place of 1e-06"),
    exact(
        ("norm", "layer", "layer"),
        lambda: gpt2(norm={"kind": "layer", "bias": False}),
        {"norm": {"kind": "layer"}},
        "the bias begins at 0",
    ),
    inexact(
        ("norm", "layer", "layer"),
        gpt2,
        {NORM: {"kind": "layer", "affine": False}},
        "the scale is lost: no bound; the bias is lost",
        errors=("weight", "bias"),
    ),
    Case(LENGTH, gpt2, {"position": {"kind": "learned", "length": 20}}, "approximate", "4 start anew", CONTEXT),
    Case(LENGTH, gpt2, {"position": {"kind": "learned", "length": 10}}, "exact", "first 10 of 16", 10),
    Case(LENGTH, gpt2, {"context": 20}, "approximate", "4 start anew", CONTEXT),
    Case(LENGTH, gpt2, {"context": 10}, "exact", "first 10 of 16", 10),
    inexact(POSITION, gpt2, {"position": "none", f"{MIXER}.position": "rope"}, "384 scalars are dropped: no bound"),
    inexact(POSITION, llama, {f"{MIXER}.position": "none"}, "none in place of rope: no bound"),
    inexact(("normaliser", "*", "*"), gau, {f"{MIXER}.normaliser": "softmax"}, "softmax in place of softmax_plus"),
    inexact(("mixer", "gau", "gau"), gau, {f"{MIXER}.activation": "gelu"}, "gelu in place of silu"),
    inexact(("mixer", "gau", "flash"), gau, {MIXER: "flash"}, "across them start anew"),
    inexact(("mixer", "gau", "gau"), gau, {f"{MIXER}.scale": 0.9}, "scaled otherwise"),
    inexact(("mixer", "gau", "gau"), gau, {f"{MIXER}.mask": {"kind": "window", "size": 3}}, "another mask"),
    exact(("head", "ref", "linear"), gpt2, {"head": {"kind": "linear"}}, "a head of its own"),
    exact(
        ("head", "ref", "linear"),
        lambda: gpt2(init={"kind": "mup", "base": 12}),
        {"head": {"kind": "linear", "bias": True}},
        "a head of its own",
    ),
    inexact(
        ("head", "linear", "ref"),
        llama,
        {"head": {"kind": "ref", "path": "embedding"}},
        "mean of embedding and head",
        errors=("table.weight", "head"),
    ),
    exact(
        ("norm", "layer", "rms"),
        lambda: gpt2(tied=False, block=NO_BIAS, **NO_BIAS),
        {NORM: {"kind": "rms", "eps": 1e-5}, "norm": {"kind": "rms", "eps": 1e-5}},
        "LayerNorm of a stream without a mean",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{'-'.join(c.entry)}: {c.seen}")
def test_a_map_is_what_it_says(case: Case) -> None:
    old = case.old()
    before = {n: p.clone() for n, p in old.named_parameters()}
    done = transplant(old, dt.override(old.spec, case.changes), fresh=case.fresh)
    moves = [m for m in done.moves if case.seen in m.how]
    assert moves and {m.exactness for m in moves} == {case.gives}, done.moves
    if case.gives == "exact":
        assert {m.exactness for m in done.moves} == {"exact"} and not done.approximated
    if case.within is not None:
        assert gap(old, done.model, case.within) < EXACT
        if case.gives == "approximate" and "anew" not in case.seen:
            assert gap(old, done.model, case.within + 1) > 1e-6, "it is exact beyond what it says"
    else:
        assert gap(old, done.model) > 1e-6, "it is exact, and says less"
    assert set(moves[0].errors) == set(case.errors)
    assert all(e > 0 for e in moves[0].errors.values())
    assert moves[0].error == (max(moves[0].errors.values()) if case.errors else None)
    assert all(torch.equal(p, before[n]) for n, p in old.named_parameters()), "the old model stays as it is"
    assert {p.dtype for p in done.model.parameters()} == {torch.float64}
    names = [n for n, _ in done.model.named_parameters()]
    assert sorted(done.carried + done.reinitialised) == sorted(names)
    given = [e for e in map_entries() if (e.category, e.old, e.new) == case.entry]
    assert any(case.gives in e.gives for e in given)


def test_every_map_and_every_class_has_a_case() -> None:
    shown = {(c.entry, c.gives) for c in CASES}
    stated = {((e.category, e.old, e.new), gives) for e in map_entries() for gives in e.gives}
    assert shown == stated and all(e.source for e in map_entries())


def test_stated_errors_are_those_of_the_weights() -> None:
    old = llama()
    pooled = transplant(old, dt.override(old.spec, {f"{MIXER}.kv_heads": 1}))
    kv = old.blocks[0].mixer.qkv.weight.data[DIM:]  # two heads of keys, two of values, 6 rows each
    mean = kv.unflatten(0, (2, 2, 6)).mean(1, keepdim=True).expand(2, 2, 6, DIM).flatten(0, 2)
    expected = float((kv - mean).norm() / kv.norm())
    assert pooled.moves[0].errors == {"qkv.weight": pytest.approx(expected)}
    fewer = transplant(old, dt.override(old.spec, {f"{FEED}.hidden": 12}))
    down, kept = old.blocks[1].feedforward.down.weight.data, fewer.model.blocks[1].feedforward.down.weight.data
    left = [i for i in range(20) if any(torch.equal(down[:, i], kept[:, j]) for j in range(12))]
    assert len(left) == 12 and left == sorted(left)
    zeroed = torch.zeros_like(down)
    zeroed[:, left] = down[:, left]
    assert fewer.moves[1].errors["down.weight"] == pytest.approx(float((down - zeroed).norm() / down.norm()))
    gate_up = old.blocks[1].feedforward.gate_up.weight.data.unflatten(0, (2, 20))
    norms = gate_up.square().sum((0, 2)) + down.square().sum(0)
    assert set(left) == set(norms.topk(12).indices.tolist()), "those of the largest weights"


def test_the_rival_of_fewer_neurons_is_drawn() -> None:
    old = llama()
    spec = dt.override(old.spec, {f"{FEED}.hidden": 12})
    assert sorted(transplant(old, spec).approximated) == sorted(n for n, _ in old.named_parameters() if ".feedf" in n)
    rival = transplant(old, spec, rival=True, seed=5)
    drawn = dt.build(spec, seed=5)
    for name in ("gate_up", "down"):
        ours, theirs = (getattr(m.blocks[2].feedforward, name).weight for m in (rival.model, drawn))
        torch.testing.assert_close(ours, theirs.double())
    window = transplant(old, dt.override(old.spec, {f"{MIXER}.mask": SINKS}))
    assert not window.approximated, "no weight is approximate: nothing to draw anew"


@torch.no_grad()
def test_a_window_with_sinks_decodes_as_it_trains() -> None:
    old = llama()
    new = transplant(old, dt.override(old.spec, {f"{MIXER}.mask": SINKS})).model
    ids = torch.arange(12)[None]
    state = new.new_state(1, 12)
    steps = [new(part, state=state).logits for part in ids.split([5, 1, 1, 5], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), new(ids).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "changes", "says", "remedy", "fresh"),
    [
        (llama, {"blocks.1.mixer": {"kind": "lstm"}}, "no map leads from 'attention' to 'lstm'", "attention", MIXER),
        (llama, {f"{MIXER}.heads": 3, f"{MIXER}.kv_heads": 3}, "another number or width", "prune_heads", MIXER),
        (llama, {f"{MIXER}.kv_heads": 4, f"{MIXER}.heads": 12}, "another number or width", "prune_heads", MIXER),
        (llama, {"vocab": 50}, "embedding at embedding and 1 more", "extend_vocabulary", "embedding"),
        (llama, {"depth": 4}, "nothing stood there before", "grow_depth", "blocks.3"),
        (llama, {"position": "learned"}, "no map leads from 'none' to 'learned'", "fresh=['position']", "position"),
        (gpt2, {f"{MIXER}.position": "t5_buckets"}, "blocks.0.mixer.position", "fresh=['blocks.*.mixer.position']", ""),
        (linear, {f"{MIXER}.heads": 2, f"{MIXER}.kv_heads": 1}, "heads of another number", "prune_heads", MIXER),
        (llama, {MIXER: "gau"}, "heads=1, head_dim=128", "performer", MIXER),
        (llama, {FEED: {"kind": "mlp"}}, "no map leads from 'glu' to 'mlp'", "glu", FEED),
    ],
)
def test_a_swap_that_carries_nothing_is_refused_unless_asked_for(
    make: Any, changes: dict[str, Any], says: str, remedy: str, fresh: str
) -> None:
    old = make()
    new = dt.override(old.spec, changes)
    with pytest.raises(SpecError) as failed:
        transplant(old, new)
    assert says in str(failed.value) and remedy in failed.value.remedy and "fresh" in failed.value.remedy
    path = fresh or failed.value.remedy.split("'")[-2]
    more = ["head_part"] if "vocab" in changes else []
    done = transplant(old, new, fresh=[path, *more])
    assert done.reinitialised and {m.how for m in done.moves if m.exactness == "reinitialised"} == {"on request"}
