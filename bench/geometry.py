"""Every operation of the plane in dovetail.geometry against its oracle on 10^5 random and adversarial cases.

python bench/geometry.py [CHECK ...]

The checks are those of tests/geometry; rows of checks that are not named are kept as they stand in the result file.
Errors are in units of 2^-53 times the scale that the operation's docstring names; exact operations have tolerance 0.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from common import write

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "geometry"))

from plane_agreement import CHECKS  # noqa: E402

CASES, AT_ONCE, SEED = 100_000, 10_000, 6


def measured(name: str) -> dict[str, Any]:
    """The row of one check, in batches with a seed each. Raises AssertionError where it fails."""
    found = [CHECKS[name](AT_ONCE, SEED + i) for i in range(CASES // AT_ONCE)]
    worst, one = max(f.worst for f in found), found[0]
    assert worst <= one.tolerance, (name, worst, one.tolerance)
    return {
        "case": name, "metric": "worst error, 2^-53", "ours": worst, "peer": "tolerance", "theirs": one.tolerance,
        "ratio": round(one.tolerance / worst, 3) if worst else None, "cases": sum(f.cases for f in found),
        "seed": SEED, "oracle": one.oracle, "also tried": one.peer or None,
        "its wrong answers": sum(int(f.peer_wrong) for f in found) if one.peer else None,
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    file = ROOT / "docs" / "results" / "geometry.json"
    rows = {row["case"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]} if file.exists() else {}
    for name in sys.argv[1:] or CHECKS:
        rows[name] = measured(name)
        write("geometry", [rows[n] for n in CHECKS if n in rows], "python bench/geometry.py")
