"""What every benchmark shares: interleaved medians in one process, and the result file's format."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dovetail


def device_name() -> str:
    """The GPU's name, or the CPU's core count and whether it multiplies bf16 in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return f"CPU, {torch.get_num_threads()} threads{', AMX' if amx else ''}"


def interleaved(
    cases: dict[str, Callable[[], Any]], rounds: int = 5, warmup: int = 1
) -> dict[str, tuple[float, float]]:
    """Seconds of each case, (median, spread): cases take turns, so that a slow minute hits all of them alike."""
    for _ in range(warmup):
        for run in cases.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            _sync()
            start = time.perf_counter()
            run()
            _sync()
            times[name].append(time.perf_counter() - start)
    return {name: (statistics.median(t), max(t) - min(t)) for name, t in times.items()}


def row(
    case: str, metric: str, ours: float, theirs: float, peer: str, *, smaller: bool = False, **more: Any
) -> dict[str, Any]:
    """One result; ratio is above 1 where ours is better."""
    ratio = theirs / ours if smaller else ours / theirs
    return {
        "case": case,
        "metric": metric,
        "ours": ours,
        "peer": peer,
        "theirs": theirs,
        "ratio": round(ratio, 3),
        **more,
    }


def write(name: str, rows: list[dict[str, Any]], command: str, out: Path | None = None) -> None:
    """docs/results/NAME.json (or under `out`), and the rows on the screen."""
    versions = {"torch": torch.__version__, "dovetail": dovetail.__version__, "python": platform.python_version()}
    try:
        import transformers

        versions["transformers"] = transformers.__version__
    except ImportError:
        pass
    data = {
        "name": name,
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "versions": versions,
        "command": command,
        "rows": rows,
    }
    folder = out or Path(__file__).parent.parent / "docs" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    for r in rows:
        print(
            f"{r['case']:42} {r['metric']:12} ours {r['ours']:>10.4g}  {r['peer']} {r['theirs']:>10.4g}  ratio {r['ratio']}"
        )


def _sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
