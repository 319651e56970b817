"""Windows drawn pixel by pixel: boxes, and text in Pillow's bundled bitmap font, which has no anti-aliasing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import ImageFont

Role = Literal[
    "window", "close", "minimize", "menu", "menu item", "field", "list", "checkbox", "button"
]  # fmt: skip
ROLES: tuple[Role, ...] = (
    "window", "close", "minimize", "menu", "menu item", "field", "list", "checkbox", "button"
)  # fmt: skip
Box = tuple[int, int, int, int]  # xyxy along pixel edges
Rgb = tuple[int, int, int]
LINE = 11  # pixels that a line of text is high


@dataclass(frozen=True)
class Theme:
    desk: Rgb
    face: Rgb
    bar: Rgb
    bar_ink: Rgb
    ink: Rgb
    paper: Rgb
    edge: Rgb
    button: Rgb


THEMES: tuple[Theme, ...] = (
    Theme((0, 128, 128), (192, 192, 192), (0, 0, 128), (255, 255, 255), (0, 0, 0), (255, 255, 255), (96, 96, 96), (210, 210, 210)),
    Theme((70, 90, 120), (245, 245, 245), (222, 226, 230), (33, 37, 41), (33, 37, 41), (255, 255, 255), (173, 181, 189), (206, 212, 218)),
    Theme((10, 10, 14), (40, 42, 54), (68, 71, 90), (248, 248, 242), (248, 248, 242), (25, 26, 33), (98, 114, 164), (68, 71, 90)),
    Theme((219, 229, 209), (253, 246, 227), (133, 153, 0), (255, 255, 255), (7, 54, 66), (255, 255, 255), (147, 161, 161), (238, 232, 213)),
)  # fmt: skip


@dataclass(frozen=True)
class Element:
    """text: what is written on it or beside it. state: "checked", "open" or "". beside: the number of the button on its
    left in a row of buttons, or None."""

    role: Role
    text: str
    box: Box
    state: str = ""
    beside: int | None = None


@lru_cache(maxsize=1)
def _font() -> ImageFont.ImageFont:
    return ImageFont.load_default_imagefont()


@lru_cache(maxsize=4096)
def written(text: str) -> np.ndarray:
    """(11, width) bool: the pixels of a line of Latin text."""
    mask = _font().getmask(text)
    width, height = mask.size
    return np.array(mask, np.uint8).reshape(height, width)[:LINE] > 0


class Canvas:
    """An image (S,S,3) uint8, the elements on it in the order in which they were painted, and `top` (S,S) int64: the
    number of the one on top at every pixel, -1 where there is none."""

    def __init__(self, size: int, theme: Theme):
        self.size, self.theme = size, theme
        self.image = np.empty((size, size, 3), np.uint8)
        self.image[:] = theme.desk
        self.top = np.full((size, size), -1, np.int64)
        self.elements: list[Element] = []

    def add(self, role: Role, text: str, box: Box, state: str = "", beside: int | None = None) -> int:
        """The number of a new element, which lies on all before it."""
        x0, y0, x1, y1 = box
        self.top[y0:y1, x0:x1] = len(self.elements)
        self.elements.append(Element(role, text, box, state, beside))
        return len(self.elements) - 1

    def fill(self, box: Box, color: Rgb, edge: Rgb | None = None) -> None:
        x0, y0, x1, y1 = box
        if edge is not None:
            self.image[y0:y1, x0:x1] = edge
            x0, y0, x1, y1 = x0 + 1, y0 + 1, x1 - 1, y1 - 1
        self.image[y0:y1, x0:x1] = color

    def write(self, x: int, y: int, text: str, color: Rgb) -> None:
        """A line whose upper left corner is (x, y); what does not fit in the image is cut off."""
        pixels = written(text)
        part = self.image[y : y + LINE, x : x + pixels.shape[1]]
        part[pixels[: part.shape[0], : part.shape[1]]] = color

    def button(self, text: str, box: Box, beside: int | None = None) -> int:
        self.fill(box, self.theme.button, self.theme.edge)
        width = written(text).shape[1]
        self.write(
            box[0] + (box[2] - box[0] - width) // 2, box[1] + (box[3] - box[1] - LINE) // 2, text, self.theme.ink
        )
        return self.add("button", text, box, beside=beside)

    def field(self, text: str, value: str, box: Box) -> int:
        """The label `text` stands to the left of the box, which alone is the element."""
        self.write(box[0] - written(text).shape[1] - 4, box[1] + 2, text, self.theme.ink)
        self.fill(box, self.theme.paper, self.theme.edge)
        self.write(box[0] + 3, box[1] + 2, value, self.theme.ink)
        return self.add("field", text, box)

    def chooser(self, text: str, value: str, box: Box) -> int:
        """A list that is closed: as a field, with an arrow."""
        self.write(box[0] - written(text).shape[1] - 4, box[1] + 2, text, self.theme.ink)
        self.fill(box, self.theme.paper, self.theme.edge)
        self.write(box[0] + 3, box[1] + 2, value, self.theme.ink)
        middle = box[2] - 8
        self.fill((box[2] - 14, box[1], box[2], box[3]), self.theme.button, self.theme.edge)
        for i in range(4):
            self.fill((middle - 3 + i, box[1] + 6 + i, middle + 4 - i, box[1] + 7 + i), self.theme.ink)
        return self.add("list", text, box)

    def checkbox(self, text: str, checked: bool, x: int, y: int) -> int:
        """The square and its label together are the element."""
        self.fill((x, y + 1, x + 10, y + 11), self.theme.paper, self.theme.edge)
        if checked:
            self.fill((x + 3, y + 4, x + 7, y + 8), self.theme.ink)
        self.write(x + 14, y, text, self.theme.ink)
        return self.add("checkbox", text, (x, y, x + 14 + written(text).shape[1], y + 12), "checked" if checked else "")

    def window(self, title: str, box: Box) -> int:
        """An empty window with a title bar of 15 pixels, a button to close it and one to minimize it."""
        x0, y0, x1, _ = box
        theme = self.theme
        self.fill(box, theme.face, theme.edge)
        number = self.add("window", title, box)
        self.fill((x0 + 1, y0 + 1, x1 - 1, y0 + 15), theme.bar)
        self.write(x0 + 5, y0 + 2, title, theme.bar_ink)
        for role, left in (("minimize", x1 - 28), ("close", x1 - 14)):
            part = (left, y0 + 2, left + 12, y0 + 14)
            self.fill(part, theme.button, theme.edge)
            if role == "minimize":
                self.fill((left + 3, y0 + 10, left + 9, y0 + 12), theme.ink)
            else:
                for i in range(6):
                    self.image[y0 + 5 + i, [left + 3 + i, left + 8 - i]] = theme.ink
            self.add(role, title, part)  # type: ignore[arg-type]
        return number

    def menus(self, names: Sequence[str], x: int, y: int, opened: int | None) -> list[int]:
        """A bar of menus, 14 pixels high; the one that is open is marked."""
        found = []
        for i, name in enumerate(names):
            width = written(name).shape[1] + 8
            box = (x, y, x + width, y + 14)
            if i == opened:
                self.fill(box, self.theme.paper, self.theme.edge)
            self.write(x + 4, y + 1, name, self.theme.ink)
            found.append(self.add("menu", name, box, "open" if i == opened else ""))
            x += width
        return found

    def items(self, names: Sequence[str], x: int, y: int) -> list[int]:
        """What an open menu holds, one under the other; it lies on what is there already."""
        width = max(written(name).shape[1] for name in names) + 12
        height = 15 * len(names) + 2
        self.fill((x, y, x + width, y + height), self.theme.paper, self.theme.edge)
        self.top[y : y + height, x : x + width] = -1  # its edge belongs to none of them
        found = []
        for i, name in enumerate(names):
            box = (x + 1, y + 1 + 15 * i, x + width - 1, y + 16 + 15 * i)
            self.write(x + 6, box[1] + 2, name, self.theme.ink)
            found.append(self.add("menu item", name, box))
        return found
