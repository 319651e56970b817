"""`dovetail algo arrivals`: draw the arrivals of a Poisson process, or judge a log of arrivals by one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dovetail.cli.algo import algo
from dovetail.cli.checks import refuse
from dovetail.cli.inspect import Json
from dovetail.cli.machine import to_json
from dovetail.errors import DataError, UserError

if TYPE_CHECKING:
    from dovetail.stats import Piecewise

console = Console()


@algo.command()
def arrivals(
    log: Annotated[
        Path | None, typer.Argument(help="A log to judge: a time a line (seconds, or ISO 8601), or JSON lines.")
    ] = None,
    field: Annotated[str | None, typer.Option(help="The field of a JSON line that has the time.")] = None,
    duration: Annotated[
        float | None, typer.Option(help="Seconds to draw; of a log, that it is all of [0, duration).")
    ] = None,
    bins: Annotated[
        int | None, typer.Option(min=1, help="Equal spans to count in (10 arrivals each unless given).")
    ] = None,
    confidence: Annotated[
        float | None, typer.Option(help="Of the interval of the rate of a log (0.95 unless given).")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Draw instead: arrivals per second, or from when: 0:5,60:20,120:5.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draw (0 unless given).")] = None,
    as_json: Json = False,
) -> None:
    """Poisson arrivals: draw request times for a load test (--rate, one a line), or fit and test a log of them."""
    if rate is None:
        if log is None:
            raise UserError(
                "neither a log nor a rate", remedy="give the file of a log, or --rate 5 --duration 60 to draw"
            )
        refuse("a log", ["--seed"] if seed is not None else [])
        _judge(log, field, duration, bins, 0.95 if confidence is None else confidence, as_json)
        return
    given = {"a log": log, "--field": field, "--bins": bins, "--confidence": confidence}
    refuse("--rate", [name for name, value in given.items() if value is not None])
    if duration is None:
        raise UserError("a rate without a duration", remedy="add --duration SECONDS")
    from dovetail.stats import PoissonProcess

    times = PoissonProcess(_rate(rate, duration)).arrivals(duration, seed or 0).tolist()
    if as_json:
        print(to_json({"rate": rate, "duration": duration, "seed": seed or 0, "arrivals": times}))
        return
    for time in times:
        print(repr(time))


def _rate(text: str, duration: float) -> float | Piecewise:
    """ "5", or "0:5,60:20": 5 a second, from second 60 on 20."""
    from dovetail.stats import Piecewise

    try:
        if ":" not in text:
            return float(text)
        starts, rates = zip(*(map(float, part.split(":")) for part in text.split(",")), strict=True)
    except ValueError:
        raise UserError(f"{text!r} is no rate", where="--rate", remedy="write 5, or 0:5,60:20,120:5") from None
    if starts[0] != 0:
        raise UserError(f"the rate begins at {starts[0]:g} s", where="--rate", remedy="begin with 0:")
    return Piecewise((*starts, duration), rates)


def _judge(
    log: Path, field: str | None, duration: float | None, bins: int | None, confidence: float, as_json: bool
) -> None:
    import torch

    from dovetail.stats import PoissonProcess, arrival_counts, counts_test, dispersion_test, read_arrivals, times_test

    times = read_arrivals(log, field)
    fit = PoissonProcess.fit(times, duration, confidence=confidence)
    first, last = fit.edges.tolist()
    inner = times if duration is not None else times[1:-1]  # the two that make the span do not count in it
    bins = bins or max(2, len(inner) // 10)
    edges = torch.linspace(first, last, bins + 1, dtype=torch.float64)
    counts = arrival_counts(inner[(inner >= first) & (inner < last)], edges)
    tests: dict[str, Any] = {}
    for name, test in (
        ("dispersion of counts", lambda: dispersion_test(counts)),
        ("counts are Poisson", lambda: counts_test(counts)),
        ("times are uniform", lambda: times_test(times, duration)),
    ):
        try:
            tests[name] = asdict(test())
        except DataError as error:  # too few for this one
            tests[name] = {"why": error.what}
    dispersion = float(counts.double().var() / counts.double().mean()) if bins > 1 and int(counts.sum()) else None
    found = {
        "arrivals": len(times), "from": first, "to": last, "rate": float(fit.rates), "low": float(fit.low),
        "high": float(fit.high), "confidence": confidence, "bins": bins, "index of dispersion": dispersion,
        "tests": tests,
    }  # fmt: skip
    if as_json:
        print(to_json(found))
        return
    console.print(
        f"{len(times):,} arrivals in {last - first:,.6g} s: {found['rate']:.4g} a second "
        f"({confidence:.0%} interval {found['low']:.4g} to {found['high']:.4g})",
        highlight=False,
    )
    if dispersion is not None:
        meaning = "1 is Poisson, above 1 they come in bunches, below 1 they keep apart"
        console.print(f"index of dispersion {dispersion:.3g} over {bins:,} spans ({meaning})", highlight=False)
    table = Table("test", "statistic", "p", box=None, header_style="bold")
    for name, test in tests.items():
        if "why" in test:
            table.add_row(name, "", test["why"])
        else:
            table.add_row(name, f"{test['statistic']:.4g}", f"{test['p']:.3g}")
    console.print(table)
