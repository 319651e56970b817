"""Names of arms in any script and with any sign: in folders, recipes, tables and plots."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dovetail.report import plots
from dovetail.report.render import as_text, grid
from dovetail.report.scaling import Scaling
from dovetail.report.study_page import Found, Row, page
from dovetail.report.study_recipe import Study, override_of, slug
from dovetail.training.recipe import overridden

NAMES = ["lora [r=8]", "x [/y]", r"$\frac$", "$a$ and $b$", "_hidden", "门控 :smile:", "=", r"back\\"]


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("S4, 60 epochs", "s4-60-epochs"),
        ("RoPE + YaRN 2.0", "rope-yarn-2.0"),
        ("a_b", "a-b"),
        ("基线", "基线"),
        ("门控 (深)", "门控-深"),
        ("Cafe\u0301", "caf\u00e9"),
        ("हिन्दी", "हिन्दी"),
        ("..", ""),
        ("😀", ""),
    ],
)
def test_folders(name: str, folder: str) -> None:
    assert slug(name) == folder


def test_arms_may_have_chinese_names() -> None:
    model = {"kind": "decoder", "vocab": 8, "dim": 8, "depth": 1}
    arms = [{"name": "基线"}, {"name": "门控"}]
    assert len(Scaling.load({"name": "s", "model": model, "arms": arms, "at": [4, 8]}).arms) == 2


@pytest.mark.parametrize(
    "value", ["😀 {prompt}", "基 {prompt}", "a\u2028b\x85c\x7fd\ufeffe", "\\ud83d\\ude00", ["𝛼", {"𝛽": 1e-5}]]
)
def test_an_override_keeps_its_signs(value: Any) -> None:
    assert overridden({}, [override_of("a", value)], ["a"], "")["a"] == value


def test_a_study_keeps_the_signs_of_a_change(tmp_path: Path) -> None:
    (tmp_path / "pairs").write_text('{"prompt": "a", "completion": "b"}\n')
    base = {"model": {"kind": "decoder"}, "data": {"train": {"kind": "pairs", "path": str(tmp_path / "pairs")}}}
    arms = [{"name": "a", "change": {"data.train.prompt": "😀 {prompt}"}}]
    asked = Study.load({"name": "s", "base": base | {"train": {"steps": 1}}, "arms": arms})
    assert asked.recipe(asked.arms[0], 0).data.train.prompt == "😀 {prompt}"  # type: ignore[attr-defined]


def found(names: list[str]) -> Found:
    rows = tuple(Row(n, {"nats": (2.0 + i, 0.0)}, i + 1, 9, {"peak_bytes": 1.0}) for i, n in enumerate(names))
    return Found("a [/b]", "d", "cpu", {}, "c", (0, 1), "nats", {"nats": "nats"}, rows, None, None, (), {}, "o")


def test_tables_show_names_as_they_are() -> None:
    text = str(found(NAMES))
    assert all(name in text for name in NAMES) and "a [/b]" in text
    table = grid("a [/b]", title="[/c]")
    table.add_row("[red]d")
    assert {"a [/b]", "[/c]", "[red]d"} <= {line.strip() for line in as_text(table).splitlines()}


def test_plots_show_names_as_they_are() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = page(found(NAMES)).split("<svg")[1].split("</svg>")[0]
        series = {name: ([1.0, 2.0], [1.0, i + 1.0]) for i, name in enumerate(NAMES)}
        colours = plots.palette(NAMES, {})
        drawn = [
            svg,
            plots.lines(series, x="x", y="y", colours=colours),
            plots.powers(series, x="x", y="y", colours=colours),
        ]
    for one in drawn:
        assert [text for text in re.findall(r">([^<>]*)</text>", one) if text in NAMES] == NAMES


def test_no_two_arms_of_a_ladder_look_alike() -> None:
    names = [f"arm {i}" for i in range(23)]
    healed = {f"{name}, healed": name for name in names}
    colours = plots.palette([*names, *healed], healed)
    shapes = plots._shapes(colours, healed)
    looks = {name: (colours[name], shapes[name]) for name in colours}
    assert len({looks[name] for name in names}) == 23
    assert all(looks[name] == looks[other] for name, other in healed.items())
    assert [shapes[name] for name in names[:10]] == list("os^DvPX*<>")


def test_a_ratio_is_above_1_where_ours_is_better() -> None:
    titles = {"nats": "nats", "bleu": "BLEU"}
    ours = Row("ours", {"nats": (2.0, 0.0), "bleu": (4.0, 0.0)}, 1, 1, {}, diverged=(1,))
    rival = Row("rival", {"nats": (3.0, 0.0), "bleu": (2.0, 0.0)}, 0, 0, {})
    rows = replace(found([]), rows=(ours,), rival=rival, titles=titles).to_dict()["rows"]
    assert [row["ratio"] for row in rows[:2]] == [1.5, 2.0]
    assert [row["seeds"] for row in rows[:2]] == [[0], [0]], "those that the mean is of"
