"""The shared matrix, part 1: what every registered part owes: an oracle, a source, a spec that round-trips, a start."""

from __future__ import annotations

import json

import pytest
import torch

from dovetail.spec import Entry, Spec
from matrix.harness import (
    GRID_PLACES,
    OUTSIDE,
    PLACES,
    all_entries,
    arrangement,
    build,
    build_on_grid,
    build_spec,
    example,
    in_a_model,
    name,
    on_a_grid,
)  # fmt: skip
from oracles import claims

ENTRIES = all_entries()
each = pytest.mark.parametrize("e", ENTRIES, ids=name)


def check(e: Entry) -> None:
    """An oracle, a source, a test that claims the oracle, and a category that the matrix can exercise."""
    assert e.oracle.strip(), f"{e.category} {e.kind} names no oracle"
    assert e.source.strip(), f"{e.category} {e.kind} names no source"
    assert e.category in {*PLACES, *GRID_PLACES, *OUTSIDE}, f"the matrix does not know how to exercise a {e.category}"
    assert (e.category, e.kind) in claims(), f'no test is marked @oracle_for("{e.category}", "{e.kind}")'


@each
def test_has_oracle_and_source(e: Entry) -> None:
    check(e)


def test_a_part_without_an_oracle_fails() -> None:
    known = next(e for e in ENTRIES if e.kind == "rms")
    check(known)
    bare = {"decode": "exact", "capabilities": {}, "cls": known.cls}
    for category, kind, oracle, complaint in [
        ("norm", "rms", "", "names no oracle"),
        ("norm", "never_tested", "formula: x", "no test is marked"),
        ("gizmo", "rms", "formula: x", "does not know how to exercise"),
    ]:
        with pytest.raises(AssertionError, match=complaint):
            check(Entry(category=category, kind=kind, oracle=oracle, source="here", **bare))


def test_claims_name_registered_parts() -> None:
    unknown = set(claims()) - {(e.category, e.kind) for e in ENTRIES}
    assert not unknown, f"tests claim oracles for parts that are not registered: {sorted(unknown)}"


@each
def test_spec_survives_json(e: Entry) -> None:
    part = Spec.parse(e.category, example(e))
    assert Spec.parse(e.category, json.loads(json.dumps(part.to_dict()))) == part
    if e not in in_a_model():
        return
    whole = arrangement(e)
    assert Spec.parse(whole.category, json.loads(json.dumps(whole.to_dict()))) == whole
    assert e.kind in str(whole) or e.kind in str(part)


@pytest.mark.parametrize("e", in_a_model(), ids=name)
def test_start_depends_on_seed_and_path_only(e: Entry) -> None:
    spec = arrangement(e)
    torch.manual_seed(1)
    first = dict(build_spec(spec).named_parameters())
    torch.manual_seed(2)
    again = dict(build_spec(spec).named_parameters())
    assert all(torch.equal(p, again[n]) for n, p in first.items())
    other = dict(build(e, seed=1).named_parameters())
    assert any(not torch.equal(p, other[n]) for n, p in first.items())
    if e.category == "model":
        return
    # Another part elsewhere: the last layer's feed-forward. What is not that keeps its start.
    last = f"blocks.{len(spec.blocks) - 1}.feedforward"  # type: ignore[attr-defined]
    blocks = list(spec.blocks)  # type: ignore[attr-defined]
    blocks[-1] = blocks[-1].replace(feedforward={"kind": "mlp", "hidden": 40})
    changed = dict(build_spec(spec.replace(blocks=tuple(blocks))).named_parameters())
    kept = [n for n in first if last not in n]
    assert kept and all(torch.equal(first[n], changed[n]) for n in kept)


@pytest.mark.parametrize("e", on_a_grid(), ids=name)
def test_start_on_a_grid_depends_on_seed_and_path_only(e: Entry) -> None:
    torch.manual_seed(1)
    first = dict(build_on_grid(e).named_parameters())
    torch.manual_seed(2)
    assert all(torch.equal(p, first[n]) for n, p in build_on_grid(e).named_parameters())
    assert any(not torch.equal(p, first[n]) for n, p in build_on_grid(e, seed=1).named_parameters())
