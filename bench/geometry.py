"""Every operation of the plane in dovetail.geometry against its oracle on 10^5 random and adversarial cases.

`python bench/geometry.py CHECK ...` runs some of it: the checks are those of tests/geometry, and rows of checks that are
not named are kept as they stand in the result file. `CHECK:FIRST:LAST` runs its batches FIRST to LAST - 1 and adds what
it finds to the row that holds those before: simple_intersection, of which a batch has 500 pairs, takes 200 of them.
Errors are in units of 2^-53 times the scale that the operation's docstring names; exact operations have tolerance 0.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import main, write

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "geometry"))

from plane_agreement import CHECKS  # noqa: E402

BENCHMARK = {"threads": 1, "packages": {"shapely": "shapely"}, "minutes": 8}
CASES, AT_ONCE, SEED = 100_000, 10_000, 6


def measured(
    name: str, batches: range = range(CASES // AT_ONCE), before: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The row of one check, in batches with a seed each. before: the row of the batches before. Raises AssertionError
    where it fails."""
    found = [CHECKS[name](AT_ONCE, SEED + i) for i in batches]
    worst, one = max(f.worst for f in found), found[0]
    assert worst <= one.tolerance, (name, worst, one.tolerance)
    cases = sum(f.cases for f in found)
    if before is not None:
        if before["cases"] != batches.start * one.cases:
            raise SystemExit(f"{name}: {before['cases']:,} cases stand, batches {batches.start} on do not follow them")
        worst, cases = max(worst, before["ours"]), cases + before["cases"]
    return {
        "case": name, "metric": "worst error, 2^-53", "ours": worst, "peer": "tolerance", "theirs": one.tolerance,
        "ratio": round(one.tolerance / worst, 3) if worst else None, "cases": cases,
        "seed": SEED, "oracle": one.oracle, "also tried": one.peer or None,
        "its wrong answers": sum(int(f.peer_wrong) for f in found) if one.peer else None,
    }  # fmt: skip


def check() -> None:
    """Each operation on a hundred cases."""
    for name, one in CHECKS.items():
        found = one(100, SEED)
        assert found.worst <= found.tolerance, (name, found.worst, found.tolerance)


def measure() -> Iterator[dict[str, Any]]:
    yield from map(measured, CHECKS)


if __name__ == "__main__":
    if not {said.partition(":")[0] for said in sys.argv[1:]} & set(CHECKS):
        main(__file__)
    torch.set_num_threads(1)
    file = ROOT / "docs" / "results" / "geometry.json"
    rows = {row["case"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]} if file.exists() else {}
    for said in sys.argv[1:]:
        name, *ends = said.split(":")
        rows[name] = measured(name, range(*map(int, ends)), rows[name]) if ends else measured(name)
        write("geometry", [rows[n] for n in CHECKS if n in rows], "dovetail bench geometry")
