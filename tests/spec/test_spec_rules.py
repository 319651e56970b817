"""Rules of the tree: where an override may land, depths, lists of blocks, refs of the right category, ranges."""

from __future__ import annotations

from typing import Any

import pytest

import dovetail as dt
from dovetail.errors import SpecError
from dovetail.spec import Spec, get
from dovetail.spec.paths import parse_assignment

BASE = {"kind": "decoder", "vocab": 16, "dim": 16, "depth": 2, "context": 8, "blocks": {"mixer": "attention"}}


def spec(**changes: Any) -> Any:
    return Spec.parse("model", BASE | changes)


def test_only_an_adopting_part_takes_a_kind_of_another_category() -> None:
    scaled = dt.override(spec(), {"blocks.*.mixer.position": {"kind": "linear", "factor": 2.0}})
    assert get(scaled, "blocks.1.mixer.position.scaling").kind == "linear"
    for kind in ("rms", "causal"):  # a norm has one home in an attention (qk_norm), a mask another: neither is meant
        with pytest.raises(SpecError, match=f"no mixer of kind '{kind}'"):
            dt.override(spec(), {"blocks.*.mixer": kind})


def test_depth_follows_where_layers_agree_and_is_refused_with_a_remedy_where_they_differ() -> None:
    deeper = dt.override(spec(), {"depth": 5})
    assert len(deeper.blocks) == 5 and deeper == spec(depth=5)
    assert len(spec().replace(depth=1).blocks) == 1
    mixed = dt.override(spec(), {"blocks.0.dropout": 0.5})
    with pytest.raises(SpecError, match="set along with its depth"):
        dt.override(mixed, {"depth": 3})


def test_blocks_may_be_set_by_a_list_and_no_entry_of_it_may_be_idle() -> None:
    new = dt.override(spec(), {"blocks": [{"layers": "0", "dropout": 0.5}, {"layers": "1:"}]})
    assert [b.dropout for b in new.blocks] == [0.5, 0.0]
    assert spec(blocks=[{"layers": "*"}, {"layers": "0", "dropout": 0.5}]).blocks[0].dropout == 0.5
    with pytest.raises(SpecError, match="layers '0' has no effect"):
        spec(blocks=[{"layers": "0", "dropout": 0.5}, {"layers": "*"}])


def test_a_slice_of_layers_is_not_a_number_of_base_60() -> None:
    """1:3 would be layer 63, which deep models have."""
    path, value = parse_assignment("blocks=[{layers: '*'}, {layers: 1:3, dropout: 5e-1}]")
    new: Any = dt.override(spec(depth=70), {path: value})
    assert [i for i, block in enumerate(new.blocks) if block.dropout == 0.5] == [1, 2]
    assert [parse_assignment(f"a={text}")[1] for text in ("12:30.5", "-7", "1_000", "2.5")] == [
        "12:30.5",
        -7,
        1000,
        2.5,
    ]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"head": {"kind": "ref", "path": "norm"}}, "points to a norm .* where a head belongs"),
        ({"head": {"kind": "ref", "path": "head"}}, "leads back to itself"),
        (
            {
                "blocks": [
                    {"mixer": "attention"},
                    {"mixer": {"kind": "attention", "position": {"kind": "ref", "path": "blocks.0.mixer"}}},
                ]
            },
            "points to a mixer .* where a position belongs",
        ),
    ],
)
def test_a_ref_points_to_a_part_of_its_own_category(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(SpecError, match=what):
        dt.build(BASE | changes)
    dt.build(BASE | {"head": {"kind": "ref", "path": "embedding"}})  # a tied head


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("blocks.*.mixer.heads", 0),
        ("blocks.*.mixer.kv_heads", 0),
        ("blocks.*.mixer.dropout", 1.5),
        ("blocks.*.mixer.mask", {"kind": "window", "size": 0}),
        ("blocks.*.mixer.position.width", 2.0),
        ("blocks.*.dropout", -0.1),
        ("dropout", 1.0),
        ("vocab", 0),
    ],
)
def test_numbers_out_of_range_are_refused_and_never_replaced_by_a_default(path: str, value: Any) -> None:
    with pytest.raises(SpecError):
        dt.override(spec(), {path: value})
