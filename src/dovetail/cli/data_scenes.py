"""`dovetail data scenes`: rows of the procedural world as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dovetail.cli.data import data
from dovetail.cli.inspect import Json
from dovetail.errors import UserError, did_you_mean


@data.command("scenes")
def draw_scenes(
    out: Annotated[Path, typer.Option("--out", help="A new folder for images/, rows.jsonl and features.json.")],
    count: Annotated[int, typer.Option(help="How many rows.")] = 1000,
    of: Annotated[str, typer.Option("--of", help="scenes, windows or clips.")] = "scenes",
    size: Annotated[int | None, typer.Option(help="Pixels a side (128, 256 or 64 unless given).")] = None,
    seed: Annotated[int, typer.Option(help="Other rows for every seed.")] = 0,
    split: Annotated[str, typer.Option(help="train, validation or test: other rows each.")] = "train",
    language: Annotated[str, typer.Option(help="Of the texts: en or zh.")] = "en",
    as_json: Json = False,
) -> None:
    """Draw pictures, windows or clips with exact labels: PNG and JSON Lines."""
    from dovetail.data.scenes import Clips, Scenes, Windows, write_rows

    tables: dict[str, Any] = {"scenes": Scenes, "windows": Windows, "clips": Clips}
    if of not in tables:
        raise UserError(f"nothing is called {of!r}", where="--of", remedy=did_you_mean(of, tables))
    given = {} if size is None else {"size": size}
    table = tables[of](seed=seed, language=language, count=count, split=split, **given)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    aside = Console(stderr=True)
    quiet = as_json or not aside.is_terminal
    with Progress(*columns, console=aside, disable=quiet, transient=True) as progress:
        task = progress.add_task(of, total=count)
        write_rows(table, out, lambda done: progress.update(task, completed=done))
    if as_json:
        print(json.dumps({"out": str(out), "of": of, "rows": count, "size": table.size}))
        return
    print(f"{count:,} {of} of {table.size} pixels a side, saved to {out}")
