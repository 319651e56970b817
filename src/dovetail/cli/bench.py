"""`dovetail bench`: speed and exactness against peers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dovetail.cli.app import app
from dovetail.cli.checks import check_out
from dovetail.cli.inspect import Json
from dovetail.cli.machine import to_json
from dovetail.errors import RunError, UserError

if TYPE_CHECKING:
    from dovetail.report.bench import Benchmark

console = Console()


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Which; all: those that can run here.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where NAME.json goes (docs/results unless given).")] = None,
    only_list: Annotated[bool, typer.Option("--list", help="What there is; the same as no names.")] = False,
    as_json: Json = False,
) -> None:
    """Speed against peers: what there is to measure, or the ceilings, a check, and the times of those named."""
    from dovetail.report.bench import benchmarks, chosen, run, run_apart

    if only_list and names:
        raise UserError(f"--list beside {' '.join(names)}", where="dovetail bench", remedy="leave one of them out")
    known = benchmarks()
    if not names:
        if out is not None:
            raise UserError("--out without a benchmark", where="dovetail bench", remedy=f"name one: {', '.join(known)}")
        _list(list(known.values()), as_json)
        return
    asked = chosen(names, known)
    if out is not None:
        check_out(out)
    if len(asked) == 1:
        results = [run(asked[0], out)]
    else:
        minutes = sum(b.minutes for b in asked)
        print(f"{', '.join(b.name for b in asked)}: about {minutes:g} minutes", flush=True)
        results = [run_apart(b, out) for b in asked]
    if as_json:
        print(to_json([r for r in results if r is not None]))
    failed = [b.name for b, r in zip(asked, results, strict=True) if r is None]
    if failed:
        raise RunError(f"{len(failed)} of {len(asked)} benchmarks failed: {', '.join(failed)}")


def _list(known: list[Benchmark], as_json: bool) -> None:
    if as_json:
        told = [
            {
                "name": b.name, "about": b.about, "needs": b.needs(), "minutes": b.minutes, "writes": b.file,
                "lacks": [what for what, _ in b.lacks()],
            }
            for b in known
        ]  # fmt: skip
        print(to_json(told))
        return
    table = Table("name", "min", box=None, header_style="bold")
    table.add_column("here", max_width=16)
    table.add_column("what it measures")
    for b in known:
        here = "; ".join(what for what, _ in b.lacks()) or "can run"
        needs = f"\n[dim]needs {escape(', '.join(b.needs()))}[/]" if b.needs() else ""
        table.add_row(escape(b.name), f"{b.minutes:g}", escape(here), escape(b.about) + needs)
    console.print(table)
    console.print("\n`dovetail bench NAME ...` runs these, `dovetail bench all` those that can run here.")
