"""Clips: what is said to happen is what changes from frame to frame, from the first frame to the last that it names."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.scene_reading import EN_COLORS, ZH_COLORS, noun
from dovetail.data import Clips
from dovetail.data.scenes import ACTIONS, BACKGROUNDS, COLORS, Clip
from dovetail.errors import DataError
from dovetail.geometry import polygons_to_mask

GOLDEN = "d6539c506290741c6ebdf781716d4d401d2e4fd5f04c71b52b50244b425aa3b4"  # of the first clips, made once
clips = st.builds(
    lambda size, seed, language, length, index: Clips(size, seed, language, 10**9, length=length)[index],
    st.sampled_from([64, 80]), st.integers(0, 2**63), st.sampled_from(["en", "zh"]), st.sampled_from([16, 32, 40]),
    st.integers(0, 10**9 - 1),
)  # fmt: skip
often = settings(max_examples=50, deadline=None, derandomize=True)
TURNED = [ACTIONS.index(name) for name in ("turn clockwise", "turn counterclockwise")]


def test_the_first_clips_are_the_same_everywhere() -> None:
    found = hashlib.sha256()
    for language in ("en", "zh"):
        for row in Clips(language=language, count=6):  # type: ignore[arg-type]
            found.update(np.ascontiguousarray(row.frames).tobytes())
            found.update(f"{row.labels.tolist()}{row.colors.tolist()}{row.actions}{row.caption}".encode())
    assert found.hexdigest() == GOLDEN


@often
@given(clips)
def test_frames_change_in_actions_and_only_there(row: Clip) -> None:
    changed = (row.frames[1:] != row.frames[:-1]).any(1)  # (T-1,H,W): frame t against t - 1
    acting = np.zeros(row.length, bool)
    for a in row.actions:
        assert 1 <= a.begin < a.end <= row.length and not acting[a.begin : a.end].any()
        acting[a.begin : a.end] = True
        assert (row.frame_actions[a.begin : a.end] == 1 + a.label).all()
    np.testing.assert_array_equal(changed.any((1, 2)), acting[1:])
    np.testing.assert_array_equal(row.frame_actions > 0, acting)
    assert 1 <= len(row.actions) <= 4 and [a.begin for a in row.actions] == sorted(a.begin for a in row.actions)
    for a in row.actions:  # what changes is where the thing that acts was or is, or what it uncovers there
        for t in range(a.begin, a.end):
            one = row.story.vertices[[t - 1, t], a.object]
            there = np.any([polygons_to_mask([torch.from_numpy(p / 16)], row.size, row.size).numpy() for p in one], 0)
            assert not (changed[t - 1] & ~there).any()


@often
@given(clips)
def test_things_do_what_is_said(row: Clip) -> None:
    middles = (row.boxes[..., :2] + row.boxes[..., 2:]) / 2
    widths = (row.boxes[..., 2:] - row.boxes[..., :2]).sum(-1)
    for a in row.actions:
        span = slice(a.begin - 1, a.end)  # from the frame before
        i, name = a.object, ACTIONS[a.label]
        (dx, dy), grown = np.diff(middles[span, i], axis=0).T, np.diff(widths[span, i])
        if name.startswith("move"):
            moved, still = {"left": (-dx, dy), "right": (dx, dy), "up": (-dy, dx), "down": (dy, dx)}[name.split()[1]]
            assert (moved >= 1).all() and (still == 0).all() and np.allclose(np.diff(moved), 0)
        elif name.startswith("turn"):
            points = row.story.vertices[span, i] - row.story.vertices[span, i].mean(1, keepdims=True)
            spokes = points[..., 0] + 1j * points[..., 1]
            turns = np.angle((spokes[1:] * spokes[:-1].conj()).sum(1))  # y down: clockwise on the screen is positive
            assert (np.abs(np.degrees(turns)) > 6).all() and (np.abs(np.degrees(turns)) < 13).all()
            assert ((turns > 0) == (name == "turn clockwise")).all()
        elif name in ("grow", "shrink"):
            assert (grown * (1 if name == "grow" else -1) > 0).all()
        elif name in ("appear", "vanish"):
            assert (
                row.present[:, i].tolist() == [(t >= a.begin) == (name == "appear") for t in range(row.length)]
                or (name == "vanish" and not row.present[a.begin :, i].any() and row.present[a.begin - 1, i])
                or (name == "appear" and not row.present[: a.begin, i].any() and row.present[a.begin, i])
            )
        else:
            assert row.colors[a.begin - 1, i] != row.colors[a.begin, i]
    for i in range(len(row.labels)):  # and nothing else: a thing changes in its own actions alone
        own = {t for a in row.actions if a.object == i for t in range(a.begin, a.end)}
        for t in sorted(set(range(1, row.length)) - own):
            assert (row.story.vertices[t, i] == row.story.vertices[t - 1, i]).all()
            assert row.colors[t, i] == row.colors[t - 1, i] and row.present[t, i] == row.present[t - 1, i]


@often
@given(clips)
def test_labels_agree_with_the_pixels(row: Clip) -> None:
    ground = np.array(BACKGROUNDS[row.background].rgb)
    for t in range(0, row.length, 3):
        image = np.empty((3, row.size, row.size), np.uint8)
        image[:] = ground[:, None, None]
        assert len(set(row.colors[t].tolist())) == len(row.labels)
        for i in np.argsort(row.depth):
            if not row.present[t, i]:
                assert not row.masks[t, i].any() and not row.boxes[t, i].any()
                continue
            polygon = row.story.vertices[t, i] / 16
            assert row.boxes[t, i].tolist() == [*polygon.min(0), *polygon.max(0)]
            image[:, polygons_to_mask([torch.from_numpy(polygon)], row.size, row.size).numpy()] = np.array(
                COLORS[row.colors[t, i]].rgb
            )[:, None]
        np.testing.assert_array_equal(row.frames[t], image)
        for i, color in enumerate(row.colors[t]):
            pixels = (row.frames[t] == np.array(COLORS[color].rgb)[:, None, None]).all(0)
            np.testing.assert_array_equal(row.masks[t, i], pixels if row.present[t, i] else np.zeros_like(pixels))


VERBS = {
    "moves left": 0, "moves right": 1, "moves up": 2, "moves down": 3, "turns clockwise": 4, "turns counterclockwise": 5,
    "grows": 6, "shrinks": 7, "appears": 8, "vanishes": 9, "向左移动": 0, "向右移动": 1, "向上移动": 2, "向下移动": 3,
    "顺时针旋转": 4, "逆时针旋转": 5, "变大": 6, "变小": 7, "出现": 8, "消失": 9,
}  # fmt: skip


@often
@given(clips)
def test_captions_say_what_happens_in_its_order(row: Clip) -> None:
    text = row.caption[0].lower() + row.caption[1:-1]
    said = text.split("，然后" if row.language == "zh" else ", then ")
    assert said == [a.text for a in row.actions]
    for action, sentence in zip(row.actions, said, strict=True):
        becomes = re.fullmatch(r"(.+?)(?: becomes |变成)(.+)", sentence)
        verb = next((v for v in VERBS if sentence.endswith(v)), "")
        name = becomes[1] if becomes else sentence.removesuffix(verb)
        color, label = noun(name.strip().removeprefix("the "))
        assert label == row.labels[action.object] and color == row.colors[action.begin - 1, action.object]
        if becomes:
            names = ZH_COLORS if row.language == "zh" else EN_COLORS
            assert (
                ACTIONS[action.label] == "change color" and names[row.colors[action.begin, action.object]] == becomes[2]
            )
        else:
            assert VERBS[verb] == action.label


def test_the_world_is_wide() -> None:
    rows = list(Clips(count=60))
    assert {a.label for row in rows for a in row.actions} == set(range(len(ACTIONS)))
    assert {len(row.actions) for row in rows} >= {1, 2, 3}
    assert {len(row.labels) for row in rows} == {2, 3, 4}


@pytest.mark.parametrize("given", [{"length": 8}, {"length": 1000}, {"size": 32}])
def test_what_cannot_be_shown_is_refused(given: Any) -> None:
    with pytest.raises(DataError):
        Clips(**given)
