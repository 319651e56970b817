"""Reads what is said of a scene, in either language, and finds what it means by the scene's columns alone.

Written apart from what says it: places are the middles of boxes, sizes shapely's areas, and who hides whom is depth
and overlap of the whole masks.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import shapely

from dovetail.data.scenes import COLORS, SHAPES, Scene

NUMBERS = {
    "en": ["no", "one", "two", "three", "four", "five", "six", "seven", "eight"],
    "zh": ["零", "一", "两", "三", "四", "五", "六", "七", "八"],
}
ORDINALS = {"second": 2, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7}
ORDINALS |= dict(zip("二三四五六七", range(2, 8)))
EN_COLORS, ZH_COLORS = [c.name for c in COLORS], [c.chinese for c in COLORS]
ZH_SHAPES = [s.chinese for s in SHAPES]


def noun(text: str) -> tuple[int | None, int | None]:
    """(color, label) of a noun in the singular or plural; None: any. Raises ValueError for one that is none."""
    if re.search("[一-鿿]", text):
        found = re.fullmatch(rf"({'|'.join(ZH_COLORS)})?(?:的?图形|({'|'.join(ZH_SHAPES)}))", text)
        if not found:
            raise ValueError(text)
        color, shape = found.groups()
        return None if color is None else ZH_COLORS.index(color), None if shape is None else ZH_SHAPES.index(shape)
    words = text.split()
    colors = [w for w in words if w in EN_COLORS]
    rest = " ".join(w for w in words if w not in EN_COLORS)
    color = EN_COLORS.index(colors[0]) if colors else None
    if rest in ("shape", "shapes"):
        return color, None
    labels = [i for i, s in enumerate(SHAPES) if rest in (s.name, s.plural)]
    if len(colors) > 1 or len(labels) != 1:
        raise ValueError(text)
    return color, labels[0]


class Reading:
    def __init__(self, scene: Scene):
        self.scene = scene
        boxes = scene.boxes
        self.middles = np.stack([(boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2], 1)
        self.areas = [shapely.Polygon(p).area for p in scene.polygons]

    def matching(self, text: str) -> list[int]:
        color, label = noun(text)
        pairs = zip(self.scene.colors.tolist(), self.scene.labels.tolist())
        return [i for i, (c, k) in enumerate(pairs) if color in (None, c) and label in (None, k)]

    def stands(self, relation: str, a: int, b: int) -> bool:
        dx, dy = self.middles[a] - self.middles[b]
        overlap = bool((self.scene.full_masks[a] & self.scene.full_masks[b]).any())
        before = self.scene.depth[a] > self.scene.depth[b]
        return {
            "left": dx < 0 and -dx >= abs(dy), "right": dx > 0 and dx >= abs(dy),
            "above": dy < 0 and -dy >= abs(dx), "below": dy > 0 and dy >= abs(dx),
            "front": overlap and before, "behind": overlap and not before,
        }[relation]  # fmt: skip

    def meant(self, text: str) -> list[int]:
        """All things that a phrase can mean."""
        form, groups = _form(text)
        if form == "plain":
            return self.matching(groups["a"])
        among = self.matching(groups["a"])
        if form in ("left", "right", "above", "below", "front", "behind"):
            beside = self.meant(groups["b"])
            assert len(beside) == 1, text
            return [i for i in among if i != beside[0] and self.stands(form, i, beside[0])]
        if form in ("largest", "smallest"):
            return [(max if form == "largest" else min)(among, key=lambda i: self.areas[i])]
        axis = 0 if form.endswith(("leftmost", "rightmost", "left")) else 1
        order = sorted(among, key=lambda i: self.middles[i][axis])
        if form.startswith("counted"):
            return [order[ORDINALS[groups["n"]] - 1]]
        return [order[0 if form in ("leftmost", "topmost") else -1]]


_SIDES_EN = {"to the left of": "left", "to the right of": "right", "above": "above", "below": "below", "in front of": "front", "behind": "behind"}  # fmt: skip
_SIDES_ZH = {"左边": "left", "右边": "right", "上方": "above", "下方": "below"}
_MOST_ZH = {"最左边": "leftmost", "最右边": "rightmost", "最上面": "topmost", "最下面": "bottommost", "最大": "largest", "最小": "smallest"}  # fmt: skip


def _form(text: str) -> tuple[str, dict[str, str]]:
    """(how the phrase tells its thing, its pieces)."""
    if text.startswith("the "):
        if found := re.fullmatch(rf"the (?P<a>.+?) ({'|'.join(_SIDES_EN)}) (?P<b>the .+)", text):
            return _SIDES_EN[found[2]], found.groupdict()
        if found := re.fullmatch(r"the (leftmost|rightmost|topmost|bottommost|largest|smallest) (?P<a>.+)", text):
            return found[1], found.groupdict()
        if found := re.fullmatch(r"the (?P<n>\w+) (?P<a>.+) from the (left|top)", text):
            return f"counted {found[3]}", found.groupdict()
        return "plain", {"a": text.removeprefix("the ")}
    if found := re.fullmatch(rf"({'|'.join(_MOST_ZH)})的(?P<a>.+)", text):
        return _MOST_ZH[found[1]], found.groupdict()
    if found := re.fullmatch(r"从(左|上)数第(?P<n>.)个(?P<a>.+)", text):
        return f"counted {'left' if found[1] == '左' else 'top'}", found.groupdict()
    if found := re.fullmatch(rf"(?P<b>.+?)({'|'.join(_SIDES_ZH)})的(?P<a>.+)", text):
        return _SIDES_ZH[found[2]], found.groupdict()
    if found := re.fullmatch(r"被(?P<b>.+)挡住的(?P<a>.+)", text):
        return "behind", found.groupdict()
    if found := re.fullmatch(rf"挡住(?P<b>.*?(?:{'|'.join(ZH_SHAPES)}|图形))的(?P<a>.+)", text):
        return "front", found.groupdict()
    return "plain", {"a": text}


def caption_counts(text: str, language: str) -> tuple[dict[tuple[Any, Any], int], str, int | None]:
    """({(color, label): count}, the background's name, how many things in all if that is said)."""
    if language == "en":
        text = text[0].lower() + text[1:].removesuffix(".")
        ground = re.search(r" on a (\w+) background", text)
        assert ground
        head, _, things = text.replace(ground[0], "").rpartition(": ")
        things = things.removeprefix("there is ").removeprefix("there are ")
        total = NUMBERS["en"].index(head.split()[0].replace("a", "one", head.split()[0] == "a")) if head else None
        items = re.split(r", | and ", things)
        found = {}
        for item in items:
            number, _, name = item.partition(" ")
            found[noun(name)] = 1 if number in ("a", "an") else NUMBERS["en"].index(number)
        return found, ground[1], total
    ground = re.search(r"(..)背景上|背景是(..)", text)
    assert ground
    head = re.search(r"背景上有(.)个图形：", text)
    things = re.sub(r"^..背景上有(.个图形：)?|^图中有|，背景是..|。$", "", text)
    found = {noun(item[2:]): NUMBERS["zh"].index(item[0]) for item in re.split("[、和]", things) if item[1] == "个"}
    return found, ground[1] or ground[2], NUMBERS["zh"].index(head[1]) if head else None


def answer(reading: Reading, text: str, language: str, grounds: list[str]) -> str:
    """The answer to a question, worked out anew."""
    scene = reading.scene
    yes, no = ("是", "否") if language == "zh" else ("yes", "no")
    colors, shapes = (ZH_COLORS, ZH_SHAPES) if language == "zh" else (EN_COLORS, [s.name for s in SHAPES])
    if text in ("What color is the background?", "背景是什么颜色？"):
        return grounds[scene.background]
    if found := re.fullmatch(r"How many (.+) are there\?|图中有几个(.+)？", text):
        return str(len(reading.matching(found[1] or found[2])))
    if found := re.fullmatch(r"Is there an? (.+)\?|图中有(.+)吗？", text):
        return yes if reading.matching(found[1] or found[2]) else no
    if found := re.fullmatch(r"What color is (.+)\?|(.+)是什么颜色？", text):
        (i,) = reading.meant(found[1] or found[2])
        return colors[scene.colors[i]]
    if found := re.fullmatch(r"What shape is (.+)\?|(.+)是什么形状？", text):
        (i,) = reading.meant(found[1] or found[2])
        return shapes[scene.labels[i]]
    found = re.fullmatch(rf"Is (the .+) ({'|'.join(_SIDES_EN)}) (the .+)\?", text)
    if found:
        one, relation, other = found[1], _SIDES_EN[found[2]], found[3]
    elif found := re.fullmatch(r"(.+)被(.+)挡住了吗？", text):
        one, relation, other = found[1], "behind", found[2]
    elif found := re.fullmatch(r"(.+)挡住了(.+)吗？", text):
        one, relation, other = found[1], "front", found[2]
    else:
        found = re.fullmatch(rf"(.+)在(.+)的({'|'.join(_SIDES_ZH)})吗？", text)
        assert found, text
        one, relation, other = found[1], _SIDES_ZH[found[3]], found[2]
    (a,), (b,) = reading.meant(one), reading.meant(other)
    return yes if reading.stands(relation, a, b) else no
