"""Mock windows: where each element is, what lies on top of what, and what to click for an instruction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import numpy as np

from dovetail.data.scenes.draws import Draws
from dovetail.data.scenes.table import Feature, Language, Row, Split, Table
from dovetail.data.scenes.widgets import ROLES, THEMES, Canvas, Element, written

TITLES = ("Settings", "Editor", "Mailer", "Player", "Notes", "Photos", "Accounts", "Reports")
DIALOGS = ("Warning", "Confirm", "Notice", "Question", "Problem")
MESSAGES = ("File not found.", "Are you sure?", "Disk is full.", "Connection lost.", "Low battery.")
MENUS = ("File", "Edit", "View", "Tools", "Help", "Format", "Insert")
ITEMS = ("Copy", "Paste", "Undo", "Redo", "Rename", "Find", "Select all", "New tab", "Properties", "Zoom in")
FIELDS = ("Name", "Email", "City", "Phone", "Street", "Company", "User", "Subject", "Path", "Age")
LISTS = ("Font", "Theme", "Units", "Printer", "Region", "Voice", "Size")
CHOICES = ("Default", "Small", "Large", "None", "First", "Second")
CHECKS = ("Show grid", "Dark mode", "Mute", "Sync files", "Wrap lines", "Auto update", "Keep logs", "Beta")
BUTTONS = (
    "Save", "Cancel", "Apply", "Open", "Print", "Export", "Import", "Reset", "Delete", "Send", "Search", "Update",
    "Upload", "Share", "Retry", "OK", "Next", "Back", "Stop",
)  # fmt: skip
VALUES = ("Ada", "Turing", "London", "42", "Beijing", "7 Elm Rd", "555-0199", "ada@a.org", "Hopper", "notes")

_SAYS = {
    "en": {
        "button": 'Click the "{t}" button.', "beside": 'Click the button directly to the right of "{t}".',
        "field": 'Click the "{t}" field.', "type": 'Type "{v}" into the "{t}" field.', "list": 'Open the "{t}" list.',
        "checkbox": 'Check the "{t}" box.', "checked": 'Uncheck the "{t}" box.', "menu": 'Open the "{t}" menu.',
        "open": 'Close the "{t}" menu.', "menu item": 'Choose "{t}" from the open menu.',
        "close": 'Close the "{t}" window.', "minimize": 'Minimize the "{t}" window.',
    },
    "zh": {
        "button": "点击“{t}”按钮。", "beside": "点击“{t}”右边紧挨着的按钮。", "field": "点击“{t}”输入框。",
        "type": "在“{t}”输入框中输入“{v}”。", "list": "打开“{t}”下拉列表。", "checkbox": "勾选“{t}”复选框。",
        "checked": "取消勾选“{t}”复选框。", "menu": "打开“{t}”菜单。", "open": "收起“{t}”菜单。",
        "menu item": "在打开的菜单中选择“{t}”。", "close": "关闭“{t}”窗口。", "minimize": "最小化“{t}”窗口。",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """text asks for `action` at the point (x, y) in pixels, which lies in element number `element`, on top of all else;
    value: what is to be typed there, "" for a click."""

    text: str
    action: Literal["click", "type"]
    element: int
    x: float
    y: float
    value: str = ""


class Window(Row):
    """A screen of S pixels a side with a window, sometimes a dialog before it or an open menu. A mapping from column to
    value, and the same as attributes; N elements in the order in which they were painted."""

    columns = (
        "image", "roles", "texts", "states", "boxes", "visible", "points", "instructions", "instruction", "action",
        "value", "target", "point",
    )  # fmt: skip

    def __init__(self, draws: Callable[[str], Draws], size: int, language: Language):
        self._draws, self.size, self.language = draws, size, language
        canvas = draw_screen(draws("layout"), size)
        self.elements: list[Element] = canvas.elements
        self.top: np.ndarray = canvas.top
        self.image: np.ndarray = np.ascontiguousarray(canvas.image.transpose(2, 0, 1))

    @property
    def roles(self) -> np.ndarray:
        """(N,) int64: numbers of `ROLES`."""
        return np.array([ROLES.index(e.role) for e in self.elements], np.int64)

    @property
    def texts(self) -> tuple[str, ...]:
        """What is written on each or beside it; a window's title for the window and its two buttons."""
        return tuple(e.text for e in self.elements)

    @property
    def states(self) -> tuple[str, ...]:
        """ "checked", "open" or "" of each."""
        return tuple(e.state for e in self.elements)

    @property
    def boxes(self) -> np.ndarray:
        """(N,4) float64: xyxy along pixel edges."""
        return np.array([e.box for e in self.elements], np.float64)

    @cached_property
    def visible(self) -> np.ndarray:
        """(N,) float64: the share of each box's pixels where the element itself is on top; a window lies under its own."""
        boxes = np.array([e.box for e in self.elements])
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        seen = np.bincount(self.top[self.top >= 0], minlength=len(areas))
        return seen / areas

    @cached_property
    def points(self) -> np.ndarray:
        """(N,2) float64: a pixel's centre (x, y) inside each box where the element is on top: the middle one if that
        is, else one that is; (-1, -1) where none is."""
        found = np.full((len(self.elements), 2), -1.0)
        for i, element in enumerate(self.elements):
            x0, y0, x1, y1 = element.box
            x, y = (x0 + x1) // 2, (y0 + y1) // 2
            if self.top[y, x] != i:
                rows, columns = np.nonzero(self.top[y0:y1, x0:x1] == i)
                if not len(rows):
                    continue
                middle = len(rows) // 2
                x, y = x0 + int(columns[middle]), y0 + int(rows[middle])
            found[i] = x + 0.5, y + 0.5
        return found

    @cached_property
    def instructions(self) -> tuple[Instruction, ...]:
        """Everything that can be asked for: of elements that are seen whole, in the order of the elements."""
        draws, says = self._draws("instructions"), _SAYS[self.language]
        found: list[Instruction] = []
        for i, e in enumerate(self.elements):
            if e.role == "window" or self.visible[i] < 1:
                continue
            x, y = self.points[i].tolist()
            form = e.state if e.state in says else e.role
            found.append(Instruction(says[form].format(t=e.text), "click", i, x, y))
            if e.role == "field":
                value = draws.pick(VALUES)
                found.append(Instruction(says["type"].format(t=e.text, v=value), "type", i, x, y, value))
            if e.beside is not None and self.visible[e.beside] == 1:
                found.append(Instruction(says["beside"].format(t=self.elements[e.beside].text), "click", i, x, y))
        return tuple(found)

    @cached_property
    def chosen(self) -> Instruction:
        """The one of `instructions` that stands in the columns of one value."""
        return self._draws("chosen").pick(self.instructions)

    @property
    def instruction(self) -> str:
        return self.chosen.text

    @property
    def action(self) -> str:
        """ "click" or "type"."""
        return self.chosen.action

    @property
    def value(self) -> str:
        """What is to be typed, or ""."""
        return self.chosen.value

    @property
    def target(self) -> int:
        """Number of the element that is meant."""
        return self.chosen.element

    @property
    def point(self) -> np.ndarray:
        """(2,) float64: (x, y) to click at; any other point of the target where it is on top will do as well."""
        return np.array([self.chosen.x, self.chosen.y])


def draw_screen(draws: Draws, size: int) -> Canvas:
    """A window with rows of fields, lists, boxes to check and buttons; what a word says is on one element alone."""
    canvas = Canvas(size, draws.pick(THEMES))
    width, height = (draws.between(size * 4 // 5, size - 4) for _ in range(2))
    x0, y0 = draws.below(size - width), draws.below(size - height)
    x1, y1 = x0 + width, y0 + height
    canvas.window(draws.pick(TITLES), (x0, y0, x1, y1))
    y, opened, bar = y0 + 17, None, []
    if draws.below(3):
        names = draws.sample(MENUS, draws.between(2, 3))
        opened = draws.below(len(names)) if draws.below(3) == 0 else None
        bar = canvas.menus(names, x0 + 3, y, opened)
        y += 16
    _rows(canvas, draws, (x0 + 6, y + 4, x1 - 6, y1 - 4))
    if opened is not None:
        left = canvas.elements[bar[opened]].box
        canvas.items(draws.sample(ITEMS, draws.between(2, 5)), left[0], left[3])
    elif draws.below(3) == 0:
        _dialog(canvas, draws)
    return canvas


def _rows(canvas: Canvas, draws: Draws, box: tuple[int, int, int, int]) -> None:
    """Rows from the top of the box down, as many as fit; buttons stand in the last."""
    x0, y, x1, y1 = box
    fields, lists, checks = (draws.sample(words, len(words)) for words in (FIELDS, LISTS, CHECKS))
    label = max(written(name).shape[1] for name in (*FIELDS, *LISTS)) + 6
    while y + 20 <= y1 - 22 and draws.below(8):
        kind = draws.below(3)
        left = x0 + label
        right = draws.between(left + 60, x1)
        if kind == 0 and fields:
            canvas.field(fields.pop(), draws.pick(("", "", *VALUES)), (left, y, right, y + 15))
        elif kind == 1 and lists:
            canvas.chooser(lists.pop(), draws.pick(CHOICES), (left, y, right, y + 15))
        elif checks:
            canvas.checkbox(checks.pop(), draws.below(2) == 1, x0 + draws.below(12), y + 1)
        y += draws.between(19, 25)
    y = draws.between(y, max(y, y1 - 19)) if y + 17 <= y1 else y1 - 17
    x, before = x0 + draws.below(16), None
    for name in draws.sample(BUTTONS[:-4], draws.between(1, 3)):
        width = written(name).shape[1] + draws.between(8, 16)
        if x + width > x1:
            break
        before = canvas.button(name, (x, y, x + width, y + 17), beside=before)
        x += width + draws.between(4, 12)


def _dialog(canvas: Canvas, draws: Draws) -> None:
    """A small window on the other, with a message and two buttons whose words the other has not."""
    message = draws.pick(MESSAGES)
    width = max(written(message).shape[1] + 24, 104)
    x0, y0 = draws.between(2, canvas.size - width - 2), draws.between(2, canvas.size - 66)
    canvas.window(draws.pick(DIALOGS), (x0, y0, x0 + width, y0 + 62))
    canvas.write(x0 + 10, y0 + 22, message, canvas.theme.ink)
    first, second = draws.sample(BUTTONS[-4:], 2)
    before = canvas.button(first, (x0 + 10, y0 + 40, x0 + 48, y0 + 56))
    canvas.button(second, (x0 + 54, y0 + 40, x0 + 92, y0 + 56), beside=before)


class Windows(Table[Window]):
    """Mock windows with click targets and instructions; see `Window` for the columns and `Table` for the arguments.

    What is written on a window is in Latin letters in either language: the bundled font has no others. At least 192
    pixels a side, 256 unless given.
    """

    row = Window
    least = 192

    def __init__(
        self,
        size: int = 256,
        seed: int = 0,
        language: Language = "en",
        count: int | None = None,
        split: Split = "train",
    ):
        super().__init__(size, seed, language, count, split)

    def draw(self, index: int) -> Window:
        return Window(partial(self.draws, index), self.size, self.language)

    @property
    def features(self) -> dict[str, Feature]:
        s = self.size
        one = {
            "text": "string",
            "action": "string",
            "element": "int64",
            "x": "float64",
            "y": "float64",
            "value": "string",
        }
        return {
            "image": Feature("uint8", (3, s, s), "no anti-aliasing"),
            "roles": Feature("int64", (None,), "what each element is", ROLES),
            "texts": Feature("string", (None,), "what is written on it or beside it"),
            "states": Feature("string", (None,), "checked, open or nothing"),
            "boxes": Feature("float64", (None, 4), "xyxy in pixels"),
            "visible": Feature("float64", (None,), "share of its pixels that are on top"),
            "points": Feature("float64", (None, 2), "a place to click, (-1, -1) where there is none"),
            "instructions": Feature(one, (None,), "all that can be asked for"),
            "instruction": Feature("string", (), "one of them"),
            "action": Feature("string", (), "click or type"),
            "value": Feature("string", (), "what to type"),
            "target": Feature("int64", (), "number of the element that is meant"),
            "point": Feature("float64", (2,), "x, y to click at"),
        }
