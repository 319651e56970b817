"""A comparison from recipe to page: arms on the same questions, orders claimed only where they hold, errors by name."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import dovetail as dt
from dovetail.errors import DivergedError, SpecError, UserError
from dovetail.parts.weights import Linear
from dovetail.report import arms
from dovetail.report.arms import Trial, judge
from dovetail.report.measure import quality
from dovetail.report.recipe import Arm, Comparison, tokens_of
from dovetail.training.recipe import overridden

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, texts: dict[str, str]) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("recipe")
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    heal = {
        "data": {"kind": "text", "path": str(folder / "train.txt")},
        "train": {"steps": 4, "batch": 4, "length": 32, "lr": 5e-3, "autocast": "none"},
    }
    return {
        "name": "test",
        "model": {"path": str(checkpoint), "device": "cpu"},
        "data": {"corpus": {"kind": "text", "path": str(folder / "held_out.txt")}, "tokens": 1024},
        "arms": [
            {"name": "short"},
            {"name": "pooled", "swap": {"blocks.*.mixer.kv_heads": 2}, "heal": heal},
            {"name": "drawn", "swap": {"blocks.*.mixer.kv_heads": 2}, "redraw": True, "heal": heal, "rival_of": ["pooled"]},
            {"name": "long", "length": "4x"},
            {"name": "cut", "length": "4x", "truncate": 32, "rival_of": ["long"]},
        ],
        "speed": {"rounds": 2, "new": 4},
        "samples": ["the <joint>"],
        "sample_tokens": 5,
    }  # fmt: skip


@pytest.fixture(scope="session")
def result(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOVETAIL_CACHE", str(folder / "cache"))
        torch.manual_seed(0)
        return dt.compare(recipe, out=folder / "out", quiet=True)


def arm(result: Any, name: str) -> Any:
    return next(a for a in result.arms if a.name == name)


def test_arms_have_their_stages_and_seeds(result: Any) -> None:
    seeds = {a.name: a.seeds for a in result.arms}
    assert seeds == {
        "short": (0,), "pooled": (0,), "pooled, healed": (0, 1), "drawn": (0, 1), "drawn, healed": (0, 1), "long": (0,),
        "cut": (0,),
    }  # fmt: skip
    assert arm(result, "short").spread == 0.0 and arm(result, "drawn").spread > 0
    assert arm(result, "pooled, healed").nats < arm(result, "pooled").nats
    assert arm(result, "long").length == 128 and arm(result, "cut").see == 32
    assert arm(result, "cut").quality[0].context == (17, 32)
    tokens = {a.quality[0].tokens for a in result.arms}
    assert tokens == {1024}, "every arm answers the same number of questions"


def test_truncation_equals_the_short_arm_where_rows_begin(result: Any) -> None:
    short, long, cut = (arm(result, n).quality[0].by_position for n in ("short", "long", "cut"))
    assert cut[0].nats == pytest.approx(long[0].nats, rel=1e-5)
    assert len(short) == 16 and [b.stop for b in long][-1] == 128


def test_verdicts_rest_on_their_numbers(result: Any) -> None:
    found = {(v.arm, v.stage): v for v in result.verdicts}
    assert set(found) == {("pooled", "as it is"), ("pooled", "healed"), ("long", "as it is")}
    for v in found.values():
        suffix = "" if v.stage == "as it is" else ", healed"
        gap = arm(result, v.rival + suffix).nats - arm(result, v.arm + suffix).nats
        assert v.gap == pytest.approx(gap)
        claimed = abs(v.gap) > 2 * max(v.spread, v.error)
        assert (v.outcome != "unresolved") == claimed


def test_report_json_is_whole_and_in_the_results_format(result: Any) -> None:
    data = json.loads((Path(result.out) / "report.json").read_text())
    assert data == json.loads(json.dumps(result.to_dict()))
    assert {"name", "date", "device", "versions", "command", "rows"} <= set(data)
    quality_rows = [r for r in data["rows"] if r["metric"] == "nats/token"]
    assert [(r["case"], r["peer"]) for r in quality_rows] == [
        ("pooled", "drawn"), ("pooled, healed", "drawn, healed"), ("long", "cut"),
    ]  # fmt: skip
    for row in data["rows"]:
        assert row["ours"] > 0 and row["theirs"] > 0
        if row["metric"] == "nats/token":
            assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"]), "above 1 where ours is better"
    assert {r["peer"] for r in data["rows"] if "tokens/s" in r["metric"]} == {"short", "long"}
    assert re.fullmatch("[0-9a-f]{64}", data["text"]["tokens_sha256"])
    assert data["arms"][1]["diff"] == [["blocks.*.mixer.kv_heads", 4, 2]]


class Page(HTMLParser):
    """What a page holds: elements left open, ids, references inside and outside."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.inner: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("src", "href", "xlink:href"):
                (self.inner if (value or "").startswith("#") else self.fetched).append(value or "")
            self.inner += re.findall(r"url\((#[^)]*)\)", value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_from_elsewhere(result: Any) -> None:
    page = (Path(result.out) / "index.html").read_text()
    read = Page()
    read.feed(page)
    read.close()
    assert not read.open, "every element is closed"
    assert not read.fetched and "@import" not in page and not re.search(r"url\((?!#)", page), "nothing is fetched"
    assert not read.tags & {"script", "link", "img", "iframe", "image"}
    assert len(read.ids) == len(set(read.ids)), "ids of one plot are not those of another"
    assert {ref[1:] for ref in read.inner} <= set(read.ids), "and each finds its own"
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    lengths = {arm.length for arm in result.arms}
    assert "prefers-color-scheme: dark" in page and len(plots) == 2 * len(lengths) + 1
    labels = ("position in the row", "state bytes", "relative error of the hidden state")
    assert [sum(label in plot for plot in plots) for label in labels] == [len(lengths), len(lengths), 1], (
        "axes have labels"
    )
    for plot in plots:
        assert "nats/token" in plot or "block" in plot
        assert "currentColor" in plot and "#010203" not in plot and "#000000" not in plot, "ink is the page's"
    for fact in (*result.versions.values(), result.device, result.date, f"computed in {result.dtype}", "kv_heads"):
        assert fact in page
    assert "cut: 0 bytes per further token, as it is shown at most 32 at a time" in page
    assert "the &lt;joint&gt;" in page and "<joint>" not in page
    for said in (
        "Loss by position",
        "State and speed",
        "Orders",
        result.text["tokens_sha256"],
        "mean-pooled",
        "no measure of quality",
    ):
        assert said in page
    assert page.index("Loss by position") < page.index("State and speed") < page.index("<h2>Samples")


def test_the_terminal_leads_with_position_and_ends_with_samples(result: Any) -> None:
    text = str(result)
    places = [text.index(s) for s in ("loss by position", "state and speed", "orders", "samples (greedy")]
    assert places == sorted(places)
    assert "no measure of quality" in text
    assert "computed in float32; bytes are of weights and state in float32." in text
    assert max(map(len, text.splitlines())) <= 100


def trial(name: str, rows: list[list[float]], random: bool = False) -> Trial:
    nats = [torch.tensor(r)[:, None].expand(-1, 4) for r in rows]
    made = Trial(Arm(name=name), 4, None, None, None)
    made.nats["as it is"] = nats
    made.quality["as it is"] = [quality(n) for n in nats]
    made.random["as it is"] = random
    return made


def test_an_order_needs_twice_the_spread_over_seeds() -> None:
    ours = trial("ours", [[1.0, 1.1, 1.2], [1.2, 1.3, 1.4]], random=True)  # means 1.1 and 1.3: spread 0.2
    assert judge(ours, trial("near", [[1.48, 1.58, 1.68]]), "as it is").outcome == "unresolved"  # gap 0.38
    assert judge(ours, trial("far", [[1.7, 1.8, 1.9]]), "as it is").outcome == "beats its trivial rival"  # gap 0.6
    assert judge(ours, trial("better", [[0.5, 0.6, 0.7]]), "as it is").outcome == "loses to its trivial rival"
    once = trial("once", [[0.1, 0.1, 0.1]], random=True)
    found = judge(once, trial("far", [[5.0, 5.0, 5.0]]), "as it is")
    assert found.spread is None and found.outcome == "unresolved", "one seed claims nothing"


def test_an_order_needs_twice_the_error_over_rows() -> None:
    ours, rival = trial("ours", [[1.0, 2.0, 3.0]]), trial("rival", [[1.9, 2.0, 3.0]])
    found = judge(ours, rival, "as it is")
    assert found.gap == pytest.approx(0.3) and found.error == pytest.approx(0.3)
    assert found.outcome == "unresolved"
    assert judge(ours, trial("rival", [[1.3, 2.31, 3.29]]), "as it is").outcome == "beats its trivial rival"
    assert judge(trial("a", [[1.0]]), trial("b", [[2.0]]), "as it is").outcome == "unresolved", "one row claims nothing"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arm": []}, "did you mean 'arms'"),
        ({"model": {"path": "x", "devise": "cpu"}}, "did you mean 'device'"),
        ({"arms": [{"name": "a", "swapp": {}}]}, "did you mean 'swap'"),
        ({"arms": [{"name": "a", "length": "four"}]}, "multiple of the trained context"),
        ({"arms": [{"name": "a"}, {"name": "a"}]}, "two arms are called 'a'"),
        ({"arms": [{"name": "abc"}, {"name": "b", "rival_of": ["abd"]}]}, "did you mean 'abc'"),
        ({"arms": [{"name": "a"}, {"name": "b", "length": "2x", "rival_of": ["a"]}]}, "different lengths"),
        ({"arms": []}, "at least 1"),
        ({"seeds": [1, 1]}, "a seed stands twice"),
        ({"stride": 4, "arms": [{"name": "a"}]}, "stride has no effect"),
        ({"samples": []}, "sample_tokens has no effect"),
        ({"arms": [{"name": "a", "heal": {"data": {"kind": "pydoc"}, "train": {"stepz": 3}}}]}, "did you mean 'steps'"),
        (
            {"arms": [{"name": "a", "heal": {"data": {"kind": "pydoc"}, "train": {"steps": 3, "seed": 1}}}]},
            "leave it out",
        ),
    ],
)
def test_a_wrong_recipe_is_named(recipe: dict[str, Any], change: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as error:
        Comparison.load(recipe | change)
    assert said in str(error.value)
    assert error.value.exit_code == 2


def test_healing_on_the_scored_text_is_refused(recipe: dict[str, Any]) -> None:
    heal = {"data": recipe["data"]["corpus"], "train": {"steps": 1}}
    with pytest.raises(SpecError, match="healed on the text that it is scored on"):
        Comparison.load(recipe | {"arms": [{"name": "a", "heal": heal}]})


def test_options_without_effect_are_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    base = {k: v for k, v in recipe.items() if k not in ("samples", "sample_tokens")}
    for extra, said in (
        ({"truncate": "1x"}, "changes nothing"),
        ({"swap": {"blocks.*.mixer.position.theta": 5e4}, "redraw": True}, "redraw changes nothing"),
        ({"fresh": ["blocks.*.mixr"]}, "mixr"),
    ):
        with pytest.raises(SpecError, match=said):
            dt.compare(base | {"arms": [{"name": "a"} | extra]}, out=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_what_comes_last_is_checked_first(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(arms, "run", lambda *_, **__: pytest.fail("an arm was made"))
        for change, said in (
            ({"samples": ["wood " * 99]}, r"(?s)model's context is 32.*samples, arm 'short'"),
            ({"arms": [{"name": "a"}, {"name": "b", "swap": {"blocks.*.mixr": "gru"}}]}, r"(?s)mixr.*arm 'b'"),
            ({"ngram": {"data": {"kind": "text", "path": "nowhere"}}}, "nowhere"),
            ({"ngram": {"data": {"kind": "mnist", "path": ".", "split": "train"}}}, "'mnist'.*no text"),
            ({"data": {"corpus": {"kind": "mnist", "path": ".", "split": "train"}}}, "'mnist'.*no text"),
        ):
            with pytest.raises(UserError, match=said):
                dt.compare(recipe | change, out=tmp_path / "out", quiet=True)
    heal = recipe["arms"][1]["heal"]
    wild = heal | {"train": heal["train"] | {"lr": 1e30, "clip": 0.0}}
    with pytest.raises(DivergedError, match=r"(?s)nan.*while healing.*arm 'wild', seed 0.*heal.train.lr"):
        dt.compare(recipe | {"arms": [{"name": "wild", "heal": wild}]}, out=tmp_path / "out", quiet=True)


def test_overrides_reach_into_lists(recipe: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    found = Comparison.load(path, ["arms.4.truncate=16", "data.tokens=256", "seeds=[3]", "stride=1x"])
    assert found.arms[4].truncate == 16 and found.data.tokens == 256 and found.seeds == (3,)
    path.write_text("arms: &h {train: {steps: 1}}\nname: *h\n")
    assert overridden(path, ["name.train.steps=2"], ["name"], "")["arms"] == {"train": {"steps": 1}}, "aliases part"
    path.write_text(yaml.safe_dump(recipe))
    for bad in ("arms.9.truncate=1", "nonsense", "data.tokens.x=1", "dta.tokens=5"):
        with pytest.raises(SpecError):
            Comparison.load(path, [bad])
    assert tokens_of("4x", 32) == 128 and tokens_of("0.5x", 32) == 16 and tokens_of(7, None) == 7
    with pytest.raises(SpecError, match="without a trained length"):
        tokens_of("4x", None)
    with pytest.raises(SpecError, match="no recipe"):
        dt.compare(tmp_path / "missing.yaml")


def test_the_shipped_recipes_read() -> None:
    assert len(Comparison.load(ROOT / "recipes" / "ladder.yaml").arms) == 6
    found = Comparison.load(ROOT / "recipes" / "first.yaml")
    by_name = {a.name: a for a in found.arms}
    assert len(found.seeds) >= 2, "healed arms can only be ordered over seeds"
    rivals = {target for a in found.arms for target in a.rival_of}
    assert rivals == {a.name for a in found.arms if a.swap and not a.redraw} | {"4x: as it is"}
    healed = [a for a in found.arms if a.heal]
    assert len(healed) == 2 and healed[0].heal == healed[1].heal, "the rival is healed as the arm is"
    assert by_name["4x: truncated"].truncate == "1x"


def test_weights_in_codes_are_an_arm(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Fewer bytes, the same parameters, an error for every map, and what is scored is the quantised model."""
    arms = [{"name": "plain"}, {"name": "nf4", "storage": {"kind": "nf4", "block": 16}}]
    data = {k: v for k, v in recipe.items() if k not in ("samples", "sample_tokens")}
    found = dt.compare(data | {"arms": arms}, out=tmp_path / "out", quiet=True)
    plain, codes = (arm(found, name) for name in ("plain", "nf4"))
    assert codes.cost.size.parameters == plain.cost.size.parameters
    assert codes.cost.size.weight_bytes < 0.7 * plain.cost.size.weight_bytes
    assert codes.kl > 0 and codes.nats != plain.nats
    model = dt.load(recipe["model"]["path"])
    maps = sum(1 for m in model.modules() if isinstance(m, Linear)) - 1  # the head stays
    assert len(codes.moves) == maps and all(0 < move.error < 0.2 for move in codes.moves)
    heal = recipe["arms"][1]["heal"]
    with pytest.raises(SpecError, match="cannot be trained"):
        Comparison.load(data | {"arms": [arms[0], arms[1] | {"heal": heal}]})
