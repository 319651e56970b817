"""What every benchmark shares: it stands in dovetail.report, where it is tested; here by the names that scripts use."""

from __future__ import annotations

import sys
from pathlib import Path

from dovetail.report.bench_rows import (
    ROOT,
    captured,
    ceilings,
    device_name,
    interleaved,
    often,
    peak_gb,
    replayed,
    row,
    write,
)

__all__ = [
    "ROOT", "captured", "ceilings", "device_name", "interleaved", "main", "often", "peak_gb", "replayed", "row", "write",
]  # fmt: skip


def main(file: str) -> None:
    """`python bench/NAME.py ...` is `dovetail bench NAME ...`."""
    from dovetail.cli.main import main as dovetail

    sys.argv = ["dovetail", "bench", Path(file).stem, *sys.argv[1:]]
    dovetail()
