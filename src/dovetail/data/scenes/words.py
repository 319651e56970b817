"""Names of colours and shapes, and how English and Chinese put them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dovetail.data.scenes.shapes import SHAPES


@dataclass(frozen=True)
class Color:
    name: str
    chinese: str
    rgb: tuple[int, int, int]


COLORS: tuple[Color, ...] = (
    Color("red", "红色", (214, 40, 40)),
    Color("orange", "橙色", (247, 127, 0)),
    Color("yellow", "黄色", (252, 214, 40)),
    Color("green", "绿色", (42, 157, 73)),
    Color("cyan", "青色", (76, 201, 224)),
    Color("blue", "蓝色", (29, 78, 216)),
    Color("purple", "紫色", (123, 44, 191)),
    Color("pink", "粉色", (255, 140, 190)),
)
BACKGROUNDS: tuple[Color, ...] = (
    Color("white", "白色", (255, 255, 255)),
    Color("gray", "灰色", (128, 128, 128)),
    Color("black", "黑色", (0, 0, 0)),
)

_NUMBERS = {
    "en": ("no", "one", "two", "three", "four", "five", "six", "seven", "eight"),
    "zh": ("零", "一", "两", "三", "四", "五", "六", "七", "八"),
}
_ORDINALS = {
    "en": ("", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"),
    "zh": ("", "一", "二", "三", "四", "五", "六", "七", "八"),
}
# {a}: what is meant, {b}: what it is said to stand beside, {n}: an ordinal.
RELATIONS = {
    "en": {
        "left": "{a} to the left of {b}", "right": "{a} to the right of {b}", "above": "{a} above {b}",
        "below": "{a} below {b}", "front": "{a} in front of {b}", "behind": "{a} behind {b}",
    },
    "zh": {
        "left": "{b}左边的{a}", "right": "{b}右边的{a}", "above": "{b}上方的{a}", "below": "{b}下方的{a}",
        "front": "挡住{b}的{a}", "behind": "被{b}挡住的{a}",
    },
}  # fmt: skip
EXTREMES = {
    "en": {
        "left": "the leftmost {a}", "right": "the rightmost {a}", "above": "the topmost {a}",
        "below": "the bottommost {a}", "largest": "the largest {a}", "smallest": "the smallest {a}",
    },
    "zh": {
        "left": "最左边的{a}", "right": "最右边的{a}", "above": "最上面的{a}", "below": "最下面的{a}",
        "largest": "最大的{a}", "smallest": "最小的{a}",
    },
}  # fmt: skip
COUNTED = {
    "en": {"left": "the {n} {a} from the left", "above": "the {n} {a} from the top"},
    "zh": {"left": "从左数第{n}个{a}", "above": "从上数第{n}个{a}"},
}
ASKED = {
    "en": {
        "left": "Is {a} to the left of {b}?", "right": "Is {a} to the right of {b}?", "above": "Is {a} above {b}?",
        "below": "Is {a} below {b}?", "front": "Is {a} in front of {b}?", "behind": "Is {a} behind {b}?",
        "count": "How many {a} are there?", "exists": "Is there {a}?", "color": "What color is {a}?",
        "shape": "What shape is {a}?", "background": "What color is the background?", "yes": "yes", "no": "no",
    },
    "zh": {
        "left": "{a}在{b}的左边吗？", "right": "{a}在{b}的右边吗？", "above": "{a}在{b}的上方吗？",
        "below": "{a}在{b}的下方吗？", "front": "{a}挡住了{b}吗？", "behind": "{a}被{b}挡住了吗？",
        "count": "图中有几个{a}？", "exists": "图中有{a}吗？", "color": "{a}是什么颜色？",
        "shape": "{a}是什么形状？", "background": "背景是什么颜色？", "yes": "是", "no": "否",
    },
}  # fmt: skip


def shape_name(label: int, language: str) -> str:
    return SHAPES[label].chinese if language == "zh" else SHAPES[label].name


def color_name(color: int, language: str) -> str:
    return COLORS[color].chinese if language == "zh" else COLORS[color].name


def background_name(background: int, language: str) -> str:
    return BACKGROUNDS[background].chinese if language == "zh" else BACKGROUNDS[background].name


def noun(color: int | None, label: int | None, language: str, *, plural: bool = False) -> str:
    """ "small red triangles", "red shape"; "红色小三角形", "红色的图形". None: any."""
    if language == "zh":
        if label is None:
            return "图形" if color is None else f"{COLORS[color].chinese}的图形"
        return ("" if color is None else COLORS[color].chinese) + SHAPES[label].chinese
    said = (
        ("shapes" if plural else "shape") if label is None else SHAPES[label].plural if plural else SHAPES[label].name
    )
    size, _, rest = said.partition(" ")  # a size stands before the colour
    words = [size, *([] if color is None else [COLORS[color].name]), rest] if rest else [said]
    return " ".join(words if rest or color is None else [COLORS[color].name, said])


def definite(said: str, language: str) -> str:
    return said if language == "zh" else f"the {said}"


def indefinite(said: str, language: str) -> str:
    if language == "zh":
        return said
    return f"an {said}" if said[0] in "aeiou" else f"a {said}"


def ordinal(number: int, language: str) -> str:
    return _ORDINALS[language][number]


def counted(number: int, color: int | None, label: int | None, language: str) -> str:
    """ "two red squares", "a star"; "两个红色正方形"."""
    if language == "zh":
        return f"{_NUMBERS['zh'][number]}个{noun(color, label, 'zh')}"
    if number == 1:
        return indefinite(noun(color, label, "en"), "en")
    return f"{_NUMBERS['en'][number]} {noun(color, label, 'en', plural=True)}"


def listed(items: Sequence[str], language: str) -> str:
    """ "a, b and c"; "a、b和c"."""
    comma, last = ("、", "和") if language == "zh" else (", ", " and ")
    return comma.join(items[:-1]) + (last if len(items) > 1 else "") + items[-1]


def caption(groups: Sequence[tuple[int, int, int]], background: int, form: int, language: str) -> str:
    """A sentence that counts every (count, color, label), in one of three forms."""
    things = listed([counted(*group, language) for group in groups], language)
    total = counted(sum(count for count, _, _ in groups), None, None, language)
    where = background_name(background, language)
    if language == "zh":
        return (
            f"{where}背景上有{things}。",
            f"{where}背景上有{total}：{things}。",
            f"图中有{things}，背景是{where}。",
        )[form]
    be = "is" if groups[0][0] == 1 else "are"
    text = (f"{things} on a {where} background.", f"{total} on a {where} background: {things}.", f"there {be} {things} on a {where} background.")[form]  # fmt: skip
    return text[0].upper() + text[1:]
