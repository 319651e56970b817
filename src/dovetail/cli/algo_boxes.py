"""`dovetail algo boxes`: overlaps of boxes and rotated boxes, and what suppression keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dovetail.cli.algo import algo
from dovetail.cli.inspect import Json
from dovetail.cli.machine import to_json
from dovetail.errors import DataError, UserError

if TYPE_CHECKING:
    from torch import Tensor

console = Console()
FIELDS = {"box", "score", "class"}
SHOWN = 20  # pairs in print; --json has all


@algo.command()
def boxes(
    file: Annotated[
        Path,
        typer.Argument(help=escape('{"box": [x1, y1, x2, y2], "score": 0.9, "class": 3} a line; 5 numbers: rotated.')),
    ],
    form: Annotated[str, typer.Option("--format", help="Of 4 numbers: xyxy, xywh or cxcywh.")] = "xyxy",
    nms: Annotated[float | None, typer.Option(help="Suppress greedily above this IoU, classes apart.")] = None,
    as_json: Json = False,
) -> None:
    """Which boxes overlap, by how much (IoU; GIoU where they are not rotated), and what --nms keeps."""
    from dovetail import geometry as geo

    found, scores, classes = read_boxes(file)
    rotated = found.shape[1] == 5
    if rotated and form != "xyxy":
        raise UserError(f"--format {form} with rotated boxes", remedy="5 numbers are always cx, cy, w, h, radians")
    if nms is not None and scores is None:
        raise UserError(
            "--nms goes by scores, which the file has not", where=str(file), remedy='add "score" to each line'
        )
    if not rotated:
        found = geo.convert_boxes(found, form, "xyxy")  # pyright: ignore[reportArgumentType]
    overlap = geo.rotated_iou if rotated else geo.box_iou
    iou = overlap(found, found).triu(1)
    pairs: list[dict[str, Any]] = []
    for i, j in iou.nonzero().tolist():
        pairs.append({"of": [i, j], "iou": float(iou[i, j])})
        if not rotated:
            pairs[-1]["giou"] = float(geo.generalized_box_iou(found[i], found[j], pairwise=False))
    pairs.sort(key=lambda pair: -pair["iou"])
    kept = None
    if nms is not None and scores is not None:
        suppress = geo.rotated_nms if rotated else geo.nms
        kept = suppress(found, scores, nms, classes=classes).tolist()
    if as_json:
        print(to_json({"boxes": len(found), "rotated": rotated, "overlaps": pairs, "kept": kept}))
        return
    console.print(f"{len(found):,} {'rotated ' * rotated}boxes, {len(pairs):,} pairs that overlap", highlight=False)
    table = Table("boxes", "IoU", *([] if rotated else ["GIoU"]), box=None, header_style="bold")
    for pair in pairs[:SHOWN]:
        table.add_row("{}, {}".format(*pair["of"]), *(f"{pair[k]:.6f}" for k in ("iou", "giou") if k in pair))
    if pairs:
        console.print(table)
    if len(pairs) > SHOWN:
        console.print(f"and {len(pairs) - SHOWN:,} more (--json has all)", highlight=False)
    if kept is not None:
        console.print(f"kept at {nms}: {len(kept):,} of {len(found):,}: {', '.join(map(str, kept))}", highlight=False)


def read_boxes(file: Path) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(N, 4 or 5) float64 boxes, and scores and classes where every line has them. Raises DataError."""
    import torch

    rows = []
    for number, text in lines(file):
        where = f"{file}, line {number}"
        row = parsed(text, where)
        if "box" not in row or not set(row) <= FIELDS:
            raise DataError(
                f"fields {', '.join(sorted(row))}",
                where=where,
                remedy='a line has "box", and may have "score", "class"',
            )
        box = row["box"]
        if not isinstance(box, list) or len(box) not in (4, 5) or not all(map(is_number, box)):
            raise DataError(f"box {box}", where=where, remedy="give 4 numbers, or 5: cx, cy, w, h, radians")
        if not is_number(row.get("score", 0.0)) or not is_whole(row.get("class", 0)):
            raise DataError(
                "a score that is no number, or a class that is no whole one of 64 bits",
                where=where,
                remedy='write "score": 0.9, "class": 3',
            )
        if rows and (len(box), set(row)) != (len(rows[0]["box"]), set(rows[0])):
            raise DataError(
                "this box is of another sort than the first one", where=where, remedy="give all lines the same fields"
            )
        rows.append(row)
    if not rows:
        raise DataError("there is no box", where=str(file), remedy="write one a line")
    scores = torch.tensor([float(row["score"]) for row in rows], dtype=torch.float64) if "score" in rows[0] else None
    classes = torch.tensor([row["class"] for row in rows]) if "class" in rows[0] else None
    return torch.tensor([list(map(float, row["box"])) for row in rows], dtype=torch.float64), scores, classes


def is_number(value: Any) -> bool:
    """Whether it is finite, and of fp64's range."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e308


def is_whole(value: Any) -> bool:
    """Whether it is an int64."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def lines(file: Path) -> list[tuple[int, str]]:
    """The lines of a text that are not blank, with their numbers. Raises DataError."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}", remedy="give a file of JSON lines") from error
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def parsed(text: str, where: str) -> dict[str, Any]:
    """One line's object. Raises DataError."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"this is no JSON: {error}", where=where, remedy="write one object a line") from error
    if not isinstance(row, dict):
        raise DataError("this is no JSON object", where=where, remedy="write one object a line")
    return row
