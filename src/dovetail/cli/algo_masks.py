"""`dovetail algo masks`: area, box and rings of masks, their overlaps, and the way between polygons and run lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dovetail.cli.algo import algo
from dovetail.cli.algo_boxes import lines, parsed
from dovetail.cli.inspect import Json
from dovetail.errors import DataError, UserError

if TYPE_CHECKING:
    from torch import Tensor

console = Console()


@algo.command()
def masks(
    file: Annotated[
        Path,
        typer.Argument(
            help=escape('{"size": [h, w], "counts": "..."} or {"size": [h, w], "polygons": [[x, y, ...]]} a line.')
        ),
    ],
    rule: Annotated[
        str | None, typer.Option(help="How polygons become pixels: center (exact, the default), coco (as pycocotools).")
    ] = None,
    to: Annotated[str | None, typer.Option("--to", help="Write them as rle or polygons, a line each, instead.")] = None,
    as_json: Json = False,
) -> None:
    """Pixels, box and rings of each mask, IoU of each two; or the same masks in the other form."""
    from dovetail import geometry as geo

    if to not in (None, "rle", "polygons"):
        raise UserError(f"--to {to}", remedy="rle or polygons")
    if to is not None and as_json:
        raise UserError("--to writes JSON lines already", remedy="leave out --json")
    found = read_masks(file, rule)
    if to is not None:
        for mask in found:
            print(json.dumps(encoded(mask) if to == "rle" else outlined(mask)))
        return
    rows: list[dict[str, Any]] = [
        {
            "size": list(mask.shape),
            "area": int(geo.mask_area(mask)),
            "box": geo.mask_to_box(mask).tolist(),
            "rings": len(geo.mask_to_polygons(mask)),
        }
        for mask in found
    ]
    overlaps = [
        {"of": [i, j], "iou": iou}
        for i, a in enumerate(found)
        for j, b in enumerate(found[:i])
        if a.shape == b.shape and (iou := float(geo.mask_iou(a[None], b[None]))) > 0
    ]
    if as_json:
        print(json.dumps({"masks": rows, "overlaps": overlaps}))
        return
    table = Table("mask", "size", "pixels", "box", "rings", box=None, header_style="bold")
    for i, row in enumerate(rows):
        size, box = "{} x {}".format(*row["size"]), " ".join(f"{x:g}" for x in row["box"])
        table.add_row(str(i), size, f"{row['area']:,}", box, str(row["rings"]))
    console.print(table)
    for pair in overlaps:
        console.print("masks {} and {}: IoU".format(*sorted(pair["of"])), f"{pair['iou']:.6f}", highlight=False)


def encoded(mask: Tensor) -> dict[str, Any]:
    """The run lengths of a mask (H, W), for JSON."""
    from dovetail import geometry as geo

    rle = geo.rle_encode(mask)
    assert isinstance(rle, dict)
    return rle | {"counts": rle["counts"].decode()}


def outlined(mask: Tensor) -> dict[str, Any]:
    """The rings of a mask (H, W) as flat lists, for JSON."""
    from dovetail import geometry as geo

    return {"size": list(mask.shape), "polygons": [ring.flatten().tolist() for ring in geo.mask_to_polygons(mask)]}


def read_masks(file: Path, rule: str | None = None) -> list[Tensor]:
    """Bool (H, W) of every line. Raises DataError, and UserError for an unknown rule or one without a polygon."""
    from dovetail import geometry as geo

    found, polygons = [], 0
    for number, text in lines(file):
        where = f"{file}, line {number}"
        row = parsed(text, where)
        try:
            if set(row) == {"size", "counts"}:
                found.append(geo.rle_decode(row))
            elif set(row) == {"size", "polygons"}:
                height, width = row["size"]
                polygons += 1
                found.append(geo.polygons_to_mask(row["polygons"], height, width, rule=rule or "center"))  # pyright: ignore
            else:
                raise DataError(f"fields {', '.join(sorted(row))}", remedy='give "size", and "counts" or "polygons"')
        except DataError as error:
            raise DataError(error.what, where=where, remedy=error.remedy) from error
        except (TypeError, ValueError) as error:
            raise DataError(f"no mask: {error}", where=where, remedy='"size" is [height, width]') from error
    if rule is not None and not polygons:
        raise UserError(f"--rule {rule} is for polygons; here are run lengths", where=str(file), remedy="leave it out")
    if not found:
        raise DataError("there is no mask", where=str(file), remedy="write one a line")
    return found
