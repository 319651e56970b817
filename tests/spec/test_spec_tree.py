"""Specs: paths and overrides, errors for people, differences, refs, the printed tree, the JSON schema."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dovetail as dt
from dovetail.errors import BuildError, SpecError
from dovetail.spec import Spec, get, json_schema, parse_assignment, register, registry, tree, walk
from dovetail.spec.spec import validate
from dovetail.training.recipe import Train

BASE = {"kind": "decoder", "vocab": 32, "dim": 16, "depth": 4, "context": 8, "blocks": {"mixer": "attention"}}


def spec(**changes: Any) -> Any:
    return Spec.parse("model", BASE | changes)


@pytest.mark.parametrize(
    ("path", "layers"),
    [("*", {0, 1, 2, 3}), ("0", {0}), ("-1", {3}), ("1:3", {1, 2}), ("::2", {0, 2}), ("2:", {2, 3})],
)
def test_override_by_index_slice_and_wildcard(path: str, layers: set[int]) -> None:
    old = spec()
    new = dt.override(old, {f"blocks.{path}.mixer.kv_heads": 1})
    assert {i for i in range(4) if new.blocks[i].mixer.kv_heads == 1} == layers
    assert old == spec() and all(b.mixer.kv_heads is None for b in old.blocks)  # the old tree stays as it was


def test_override_takes_specs_mappings_names_and_finds_the_home_of_a_part() -> None:
    for value in (dt.parts.LayerNorm(eps=0.5), {"kind": "layer", "eps": 0.5}):  # type: ignore[attr-defined]
        assert get(dt.override(spec(), {"blocks.*.norm": value}), "blocks.3.norm.eps") == 0.5
    assert get(dt.override(spec(), {"norm": "layer"}), "norm").kind == "layer"
    path, value = parse_assignment("blocks.*.mixer.position={kind: yarn, factor: 4}")
    new = dt.override(spec(), {path: value | {"factor": 4.0}})
    rope = get(new, "blocks.2.mixer.position")
    assert rope.kind == "rope" and rope.scaling.kind == "yarn" and rope.scaling.factor == 4.0
    assert get(dt.override(spec(), {"blocks.0.feedforward": None}), "blocks.0.feedforward") is None


@pytest.mark.parametrize(
    ("changes", "what", "where", "remedy"),
    [
        ({"blocks.*.mixr.heads": 2}, "no field 'mixr'", "blocks.0", "'mixer'"),
        ({"blocks.9.mixer.heads": 2}, "'9' matches none of 4", "blocks", "index"),
        ({"blocks.7:.mixer.heads": 2}, "matches none", "blocks", "slice"),
        ({"blocks.x.mixer.heads": 2}, "matches none", "blocks", "slice"),
        ({"blocks.*.mixer": "atention"}, "no mixer of kind 'atention'", "", "'attention'"),
        ({"blocks.*.mixer": "token"}, "no mixer of kind 'token'", "", "is a embedding"),
        ({"vocab.size": 2}, "no field 'size'", "vocab", ""),
        ({"dim": "wide"}, "valid integer", "dim", ""),
        ({"blocks.0.mixer.heads": 2.5}, "heads|integer", "heads", ""),
    ],
)
def test_a_wrong_override_names_the_place_and_the_nearest_name(
    changes: dict[str, Any], what: str, where: str, remedy: str
) -> None:
    with pytest.raises(SpecError, match=what) as caught:
        dt.override(spec(), changes)
    assert where in str(caught.value) and remedy in str(caught.value.remedy or "")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({"dimm": 3}, ["no field 'dimm'", "'dim'"]),
        ({"kind": "decodr"}, ["no model of kind", "'decoder'"]),
        ({"blocks": {"mixer": {"kind": "attention", "haeds": 3}}}, ["no field 'haeds'", "mixer", "'heads'"]),
        ({"blocks": {"mixer": {"heads": 3}}}, ["a mixer without 'kind'", "attention"]),
        ({"blocks": {"mixer": 5}}, ["a mixer cannot be 5"]),
        ({"vocab": "32"}, ["valid integer", "vocab"]),
        ({"depth": 0}, ["depth is 0"]),
        ({"blocks": [{"layers": "0", "mixer": "attention"}]}, ["no block is given for layers [1, 2, 3]"]),
        ({"blocks": [{"layers": "9", "mixer": "attention"}, {"layers": "*"}]}, ["layers '9'"]),
        ({"blocks": [{"mixer": "attention"}] * 3}, ["3 blocks for a depth of 4"]),
    ],
)
def test_a_wrong_spec_says_what_and_where(changes: dict[str, Any], pieces: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        spec(**changes)
    for piece in pieces:
        assert piece in str(caught.value), str(caught.value)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(SpecError, match="needs 'vocab'"):
        Spec.parse("model", {"kind": "decoder", "dim": 8})
    with pytest.raises(SpecError, match=r"norm .*stands where a mixer belongs"):
        Spec.parse("mixer", dt.parts.RmsNorm())  # type: ignore[attr-defined]


def test_blocks_expand_to_one_entry_a_layer_and_compress_again() -> None:
    mixed = spec(blocks=[{"layers": "0", "mixer": "gru"}, {"layers": "1:", "mixer": "attention"}])
    assert [b.mixer.kind for b in mixed.blocks] == ["gru", "attention", "attention", "attention"]
    assert [b["layers"] for b in mixed.to_dict()["blocks"]] == ["0", "1:4"]
    assert isinstance(spec().to_dict()["blocks"], dict)
    later = spec(blocks=[{"layers": "*", "mixer": "attention"}, {"layers": "::2", "mixer": "lstm"}])
    assert [b.mixer.kind for b in later.blocks] == ["lstm", "attention"] * 2  # the last word counts


def test_diff_folds_what_all_layers_share() -> None:
    old = spec()
    assert dt.diff(old, old) == []
    assert dt.diff(old, dt.override(old, {"blocks.*.mixer.kv_heads": 1})) == [("blocks.*.mixer.kv_heads", None, 1)]
    some = dt.diff(old, dt.override(old, {"blocks.1:3.mixer.kv_heads": 1, "dim": 32}))
    assert ("dim", 16, 32) in some
    assert {row for row in some if row[0] != "dim"} == {(f"blocks.{i}.mixer.kv_heads", None, 1) for i in (1, 2)}
    swapped = dt.diff(old, dt.override(old, {"blocks.*.mixer": "gru"}))
    assert swapped and all(path.startswith("blocks.*.mixer") for path, _, _ in swapped)
    assert any("attention" in str(a) and "gru" in str(b) for _, a, b in swapped)


def test_refs_are_built_once_and_one_sided_swaps_are_refused() -> None:
    tied = spec(head={"kind": "ref", "path": "embedding"})
    model = dt.build(tied)
    assert model.head_part is model.embedding
    assert len(list(model.parameters())) == len(list(dt.build(spec()).parameters())) - 1
    with pytest.raises(SpecError, match="one side of a ref") as caught:
        dt.override(tied, {"embedding.scale": 2.0})
    assert "head" in str(caught.value)
    both = dt.override(tied, {"embedding.scale": 2.0, "head": "linear"})
    assert both.head.kind == "linear" and both.embedding.scale == 2.0
    with pytest.raises(SpecError, match="points to 'nowhere'"):
        dt.override(tied, {"head": {"kind": "ref", "path": "nowhere"}})
    with pytest.raises(BuildError, match="nothing is built yet"):
        dt.build(spec(head={"kind": "ref", "path": "later"}))


def test_the_tree_shows_what_is_not_default_and_folds_equal_layers() -> None:
    text = tree(dt.override(spec(), {"blocks.0.mixer.kv_heads": 1, "norm.eps": 0.5}))
    assert text.splitlines()[0].startswith("decoder  (")
    assert "vocab=32" in text and "eps=0.5" in text
    assert "blocks.0: pre" in text and "blocks.1:4: pre" in text and text.count("kv_heads=1") == 1
    assert "blocks.*: pre" in str(spec())
    assert [path for path, _ in walk(spec())][:1] == [""]


def test_registration_is_checked() -> None:
    with pytest.raises(SpecError, match="registered twice"):

        @register("norm", "rms", oracle="x", source="y")
        class Other(Spec):
            pass

    with pytest.raises(SpecError, match="approximate: why"):
        register("norm", "new", oracle="x", source="y", decode="nearly")
    with pytest.raises(SpecError, match="did you mean 'norm'"):
        dt.registry("nrom")
    assert registry.entry("norm", "rms").cls is dt.parts.RmsNorm  # type: ignore[attr-defined]
    assert "other" not in dt.registry("norm")


@settings(max_examples=12, deadline=None)
@given(
    mixers=st.lists(st.sampled_from(["attention", "gru", {"kind": "attention", "mask": {"kind": "window", "size": 4}}]),
                    min_size=3, max_size=3),
    norm=st.sampled_from(["rms", "layer", {"kind": "rms", "cast": "after", "offset": 1.0}]),
    block=st.sampled_from(["pre", "post", "sandwich", "parallel", "deepnorm"]),
)  # fmt: skip
def test_any_arrangement_survives_json_and_yaml_and_fits_the_schema(mixers: list[Any], norm: Any, block: str) -> None:
    import yaml

    layers = [{"layers": str(i), "kind": block, "mixer": m, "norm": norm} for i, m in enumerate(mixers)]
    one = Spec.parse("model", BASE | {"depth": 3, "blocks": layers})
    data = json.loads(json.dumps(one.to_dict()))
    assert Spec.parse("model", data) == one == Spec.parse("model", yaml.safe_load(one.to_yaml()))
    VALIDATOR.validate(data)


VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def test_the_schema_takes_what_the_spec_takes_and_refuses_what_it_refuses() -> None:
    VALIDATOR.check_schema(json_schema())
    for data in (
        BASE,
        BASE | {"head": {"kind": "ref", "path": "embedding"}},
        BASE | {"norm": None, "norm_in": "layer"},
    ):
        VALIDATOR.validate(data)
        Spec.parse("model", data)
    for data in (
        BASE | {"dimm": 3},
        BASE | {"kind": "decodr"},
        BASE | {"vocab": "32"},
        BASE | {"blocks": {"mixer": {"kind": "attention", "haeds": 3}}},
        BASE | {"blocks": {"mixer": "rms"}},
        BASE | {"blocks": {"mixer": {"heads": 3}}},
        {"kind": "decoder", "dim": 8},
    ):
        assert not VALIDATOR.is_valid(data), data
        with pytest.raises(SpecError):
            Spec.parse("model", data)


@pytest.mark.parametrize("value", ["often", 1])
def test_a_field_of_several_kinds_names_them_all(value: object) -> None:
    with pytest.raises(SpecError) as caught:
        validate(Train, {"steps": 1, "checkpointing": value}, "train")
    assert "valid boolean" in caught.value.what and "'auto'" in caught.value.what
    assert caught.value.where == "train.checkpointing"
