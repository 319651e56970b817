"""`dovetail algo extrema`: sliding extrema, peaks and the largest gap of a column of numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dovetail.cli.algo import algo
from dovetail.cli.inspect import Json
from dovetail.cli.machine import to_json
from dovetail.errors import UserError

console = Console()


@algo.command()
def extrema(
    numbers: Annotated[Path, typer.Argument(help="A number a line, or JSON lines.")],
    field: Annotated[str | None, typer.Option(help="The field of a JSON line that has the number.")] = None,
    window: Annotated[int, typer.Option(help="Numbers in a window; odd, with the peak in the middle.")] = 5,
    threshold: Annotated[
        float | None, typer.Option(help="Least height of a peak (the middle of the largest gap unless given).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Sliding maxima and minima (with --json), peaks, and the largest gap of a column of numbers."""
    from dovetail.stats import largest_gap, peaks, read_numbers, sliding_max, sliding_min

    if threshold is not None and not math.isfinite(threshold):
        raise UserError(f"a threshold of {threshold}", where="--threshold", remedy="give a number")
    x = read_numbers(numbers, field)
    gap = largest_gap(x) if len(x) > 1 else None
    if threshold is None:
        if gap is None:
            raise UserError("one number has no gap that suggests a threshold", remedy="add --threshold NUMBER")
        threshold = float(gap.threshold)
    at = peaks(x, window, threshold).nonzero().flatten().tolist()
    found = [{"place": place, "value": float(x[place])} for place in at]
    if as_json:
        data = {
            "numbers": len(x),
            "window": window,
            "threshold": threshold,
            "peaks": found,
            "gap": gap and {name: float(value) for name, value in gap._asdict().items()},
            "max": sliding_max(x, window, align="centred").tolist(),
            "min": sliding_min(x, window, align="centred").tolist(),
        }
        print(to_json(data))
        return
    if gap is not None:
        above = int((x > gap.threshold).sum())
        console.print(
            f"largest gap {float(gap.width):.6g}, from {float(gap.low):.6g} to {float(gap.high):.6g}: "
            f"{above:,} of {len(x):,} numbers above {float(gap.threshold):.6g}",
            highlight=False,
        )
    console.print(f"{len(found):,} peaks of {threshold:.6g} or more, {window // 2 + 1} or more apart", highlight=False)
    table = Table("place", "value", box=None, header_style="bold")
    for peak in found:
        table.add_row(str(peak["place"]), f"{peak['value']:.6g}")
    if found:
        console.print(table)
