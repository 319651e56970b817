"""Mock windows: elements lie where they are said to lie, and an instruction means one of them."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.data import Windows
from dovetail.data.scenes import ROLES, Window
from dovetail.data.scenes.widgets import THEMES, written
from dovetail.errors import DataError

GOLDEN = "53a84ab451b5be89a4b9f1aaf5c20fe50c901b1a740d979a1d8d1f1477a5e191"  # of the first windows, made once
windows = st.builds(
    lambda size, seed, language, index: Windows(size, seed, language, 10**9)[index],
    st.sampled_from([192, 256, 301]), st.integers(0, 2**63), st.sampled_from(["en", "zh"]), st.integers(0, 10**9 - 1),
)  # fmt: skip
often = settings(max_examples=80, deadline=None, derandomize=True)


def test_the_first_windows_are_the_same_everywhere() -> None:
    found = hashlib.sha256()
    for language in ("en", "zh"):
        for row in Windows(language=language, count=10):  # type: ignore[arg-type]
            found.update(np.ascontiguousarray(row.image).tobytes())
            found.update(f"{row.boxes.astype(int).tolist()}{row.texts}{row.points.tolist()}{row.instructions}".encode())
    assert found.hexdigest() == GOLDEN


@often
@given(windows)
def test_what_lies_on_top(row: Window) -> None:
    """By painting the boxes anew, in their order; a menu's own edge is nobody's."""
    size, boxes = row.size, row.boxes.astype(int)
    assert (boxes == row.boxes).all() and (boxes >= 0).all() and (boxes <= size).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= 8).all()
    top = np.full((size, size), -1)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        top[y0:y1, x0:x1] = i
    edge = np.zeros((size, size), bool)
    items = boxes[row.roles == ROLES.index("menu item")]
    if len(items):
        x0, y0 = items[:, :2].min(0) - 1
        x1, y1 = items[:, 2:].max(0) + 1
        edge[y0:y1, x0:x1] = True
        edge[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] = False
    np.testing.assert_array_equal(row.top[~edge], top[~edge])
    assert (row.top[edge] == -1).all()
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        on_top = row.top[y0:y1, x0:x1] == i
        x, y = row.points[i]
        if on_top.any():
            assert x0 < x < x1 and y0 < y < y1 and (x % 1, y % 1) == (0.5, 0.5)
            assert row.top[int(y), int(x)] == i
        else:
            assert (x, y) == (-1, -1)
        assert row.visible[i] == on_top.mean()


@often
@given(windows)
def test_an_instruction_means_one_element(row: Window) -> None:
    assert row.chosen in row.instructions and row.instruction == row.chosen.text
    assert len({i.text for i in row.instructions}) == len(row.instructions)
    for said in row.instructions:
        role = ROLES[row.roles[said.element]]
        x0, y0, x1, y1 = row.boxes[said.element]
        assert x0 < said.x < x1 and y0 < said.y < y1 and row.top[int(said.y), int(said.x)] == said.element
        assert (said.action == "type") == bool(said.value) and said.value in said.text
        quoted = re.findall('["“](.*?)["”]', said.text)[0 if row.language == "zh" else -1]  # the other is what to type
        if role == "button" and ("right" in said.text or "右边" in said.text):
            (named,) = _of(row, "button", quoted)
            assert row.boxes[named, 2] < x0 and row.boxes[named, 1] == y0
            between = (row.boxes[:, 1] == y0) & (row.boxes[:, 0] > row.boxes[named, 0]) & (row.boxes[:, 0] < x0)
            assert not (between & (row.roles == ROLES.index("button"))).any()
        else:
            assert _of(row, role, quoted) == [said.element]
        verb = {
            "button": ("Click", "点击"), "field": ("Click", "点击"), "list": ("Open", "打开"), "close": ("Close", "关闭"),
            "minimize": ("Minimize", "最小化"), "menu item": ("Choose", "在打开的菜单中选择"),
            "menu": ("Close", "收起") if row.states[said.element] == "open" else ("Open", "打开"),
            "checkbox": ("Uncheck", "取消勾选") if row.states[said.element] == "checked" else ("Check", "勾选"),
        }[role]  # fmt: skip
        assert said.text.startswith(verb if said.action == "click" else ("Type", "在")), said.text


def _of(row: Window, role: str, text: str) -> list[int]:
    return [i for i, (r, t) in enumerate(zip(row.roles, row.texts)) if ROLES[r] == role and t == text]


@often
@given(windows)
def test_elements_show_what_they_say(row: Window) -> None:
    """The word stands inside the element (beside it for a field or a list), letter by letter, in the ink's colour."""
    theme = next(t for t in THEMES if (row.image[:, row.top == -1] == np.array(t.desk)[:, None]).all(0).any())
    ink = (row.image == np.array(theme.ink)[:, None, None]).all(0)
    for i, (role, text) in enumerate(zip(row.roles, row.texts)):
        if row.visible[i] < 1 or ROLES[role] not in ("button", "menu item", "checkbox", "field", "list", "menu"):
            continue
        x0, y0, x1, y1 = row.boxes[i].astype(int)
        if ROLES[role] in ("field", "list"):
            x0, x1 = x0 - written(text).shape[1] - 4, x0 - 4
            if not np.isin(row.top[y0:y1, x0:x1], (0,)).all():  # the label is covered
                continue
        assert _stands(written(text), ink[y0:y1, x0:x1]), (ROLES[role], text)


def _stands(word: np.ndarray, ink: np.ndarray) -> bool:
    places = np.lib.stride_tricks.sliding_window_view(ink, word.shape)
    return bool((places == word).all((2, 3)).any())


def test_the_world_is_wide() -> None:
    rows = list(Windows(count=150))
    assert {int(r) for row in rows for r in row.roles} == set(range(len(ROLES)))
    assert {s for row in rows for s in row.states} == {"", "checked", "open"}
    assert {ROLES[row.roles[row.target]] for row in rows} == set(ROLES) - {"window"}
    covered = sum(bool((row.visible[row.roles > 0] < 1).any()) for row in rows)
    assert 0.2 < covered / len(rows) < 0.8
    assert any((row.points == -1).all(1).any() for row in rows)  # some are hidden altogether
    texts = [i.text for row in Windows(count=20, language="zh") for i in row.instructions]
    assert all(re.search("[一-鿿]", text) for text in texts)


def test_small_windows_are_refused() -> None:
    with pytest.raises(DataError, match="192"):
        Windows(size=128)
