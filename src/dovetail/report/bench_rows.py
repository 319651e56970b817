"""What a benchmark measures with, and what it leaves: ceilings, interleaved medians, rows, the result file."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import dovetail

ROOT = Path(__file__).resolve().parents[3]  # of a source checkout; an installed package has no bench/ there
PRODUCTS = {"cuda": 8192, "cpu": 2048}  # (n, n) by (n, n)


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches at its best, which floors are computed from. Products in TFLOP/s (n, n) by (n, n), 2n³
    operations; copy in TB/s, bytes read and bytes written together."""

    bf16_matmul_tflops: float
    fp32_matmul_tflops: float
    copy_tbs: float

    def to_dict(self) -> dict[str, float]:
        """Plain data to three digits, for JSON."""
        return {name: float(f"{value:.3g}") for name, value in asdict(self).items()}


def ceilings(device: str | None = None) -> Ceilings:
    """Measured once a process for each device ("cpu" or "cuda"; CUDA where there is one unless given) and number of
    threads: products of PRODUCTS, a copy of 256 MiB."""
    where = device or _device()
    return _ceilings(where, PRODUCTS[where], torch.get_num_threads())


@cache
def _ceilings(device: str, n: int, threads: int) -> Ceilings:
    return measure_ceilings(device, n, 10 if device == "cuda" else 1)


def measure_ceilings(device: str, n: int, calls: int, copied: int = 2**28) -> Ceilings:
    """Medians over turns. calls: queued between two synchronisations, so that a launch is not what is measured; copied:
    bytes."""
    products = {dtype: torch.randn(n, n, device=device).to(dtype) for dtype in (torch.bfloat16, torch.float32)}
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def queued(run: Callable[[], Any]) -> Callable[[], None]:
        def many() -> None:
            for _ in range(calls):
                run()

        return many

    cases = {str(dtype): queued(lambda x=x: x @ x) for dtype, x in products.items()}
    cases["copy"] = queued(lambda: target.copy_(source))
    seconds = {name: median / calls for name, (median, _) in interleaved(cases, rounds=5).items()}
    bf16, fp32 = (2 * n**3 / seconds[str(dtype)] / 1e12 for dtype in products)
    return Ceilings(bf16, fp32, 2 * copied / seconds["copy"] / 1e12)


def device_name(device: str | None = None) -> str:
    """The GPU's name, or the CPU's thread count and whether it multiplies bf16 in hardware."""
    if (device or _device()) == "cuda":
        return torch.cuda.get_device_name()
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return f"CPU, {torch.get_num_threads()} threads{', AMX' if amx else ''}"


def interleaved(
    cases: Mapping[str, Callable[[], Any]], rounds: int = 5, warmup: int = 1
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


def often(run: Callable[[], Any], times: int) -> Callable[[], None]:
    """`run` so many times between two synchronisations, as kernels are queued in a real step."""

    def many() -> None:
        for _ in range(times):
            run()

    return many


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as a CUDA graph, captured after one call of it; itself where there is no CUDA. Raises RuntimeError for what
    cannot be captured."""
    if not torch.cuda.is_available():
        return run
    side = _side()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        run()
    return graph.replay


def replayed(cases: Mapping[str, Callable[[], Any]], times: int = 1) -> dict[str, Callable[[], Any]]:
    """Each of `cases` so many times, on CUDA captured as a graph: what is timed is the device, and not the host that
    starts its kernels. `often`, for all of them alike, where there is no CUDA or one cannot be captured."""
    queued: dict[str, Callable[[], Any]] = {name: often(run, times) for name, run in cases.items()}
    graphs = {}
    for name, run in queued.items():
        try:
            graphs[name] = captured(run)
        except RuntimeError as error:
            print(f"{name} cannot be captured, all are queued: {str(error).splitlines()[0]}", flush=True)
            return queued
    return graphs


def peak_gb(run: Callable[[], Any]) -> float:
    """Gigabytes at their highest above what was allocated before, such as the inputs; 0 without CUDA."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def row(
    case: str,
    metric: str,
    ours: float,
    theirs: float,
    peer: str,
    *,
    smaller: bool = False,
    target: float | None = None,
    target_ratio: float | None = None,
    target_within: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One result; ratio is above 1 where ours is better. Of what else there is, spread is the largest less the smallest
    of ours and floor the best that the ceilings allow, both in the metric's unit.

    smaller: of the metric, the smaller is the better. target: what ours is to reach, in the metric's unit;
    target_ratio: what the ratio is to reach; target_within: what part of the peer's ours may be above or below it, 0.15
    for 15%. `met` says whether it has.
    """
    ratio = theirs / ours if smaller else ours / theirs
    made = {"case": case, "metric": metric, "ours": ours, "peer": peer, "theirs": theirs, "ratio": round(ratio, 3)}
    if target is not None:
        made |= {"target": target, "met": ours <= target if smaller else ours >= target}
    if target_ratio is not None:
        made |= {"target_ratio": target_ratio, "met": made.get("met", True) and ratio >= target_ratio}
    if target_within is not None:
        near = abs(ours / theirs - 1) <= target_within
        made |= {"target_within": target_within, "met": made.get("met", True) and near}
    return made | more


def line(row: Mapping[str, Any]) -> str:
    """A row on the screen."""
    met = "" if "met" not in row else "  target met" if row["met"] else "  target not met"
    ours, theirs = (f"{row[side]:>10.4g}" for side in ("ours", "theirs"))
    return f"{row['case']:42} {row['metric']:12} ours {ours}  {row['peer']} {theirs}  ratio {row['ratio']}{met}"


def write(
    name: str, rows: Sequence[Mapping[str, Any]], command: str, out: Path | None = None, device: str | None = None
) -> Path:
    """docs/results/NAME.json (or under `out`), and the rows on the screen. device: "cpu" or "cuda", what was measured
    on; CUDA where there is one unless given."""
    file = save(f"{name}.json", result(name, rows, command, device), out)
    for each in rows:
        print(line(each))
    return file


def result(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    command: str,
    device: str | None = None,
    peers: Iterable[str] = ("transformers",),
) -> dict[str, Any]:
    """What a result file holds. peers: distributions whose versions it tells, where they are installed."""
    versions = {"torch": torch.__version__, "dovetail": dovetail.__version__, "python": platform.python_version()}
    for peer in peers:
        with suppress(metadata.PackageNotFoundError):
            versions[peer] = metadata.version(peer)
    return {
        "name": name,
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "versions": versions,
        "command": command,
        "ceilings": ceilings(device).to_dict(),
        "rows": list(rows),
    }


def save(file: str, data: Mapping[str, Any], out: Path | None = None) -> Path:
    """Writes `data` as docs/results/FILE of the checkout, or under `out`."""
    folder = out or ROOT / "docs" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return folder / file


@cache
def _side() -> torch.cuda.Stream:
    """One for all captures: what a call needs beforehand is then the same memory again."""
    return torch.cuda.Stream()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
