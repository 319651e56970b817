"""Which tiles are best for attention of one decoding step on this GPU: first they are compiled, by many processes at once.

    python bench/decode_attention_sweep.py [WIDTH...]     64, 128, 512 (latents); all if none is given

What it finds is written into src/dovetail/kernels/attention/triton/split_keys.py (NARROW) by hand.
"""

from __future__ import annotations

import sys

import torch
from common import captured, interleaved
from decode_attention import BF16, CAUSAL, DEVICE, Case, made, queries, state
from torch import Tensor
from tuning import compiled_choices

from dovetail.kernels.attention import BoundMask, Coords, Side, triton
from dovetail.kernels.attention.triton import split_keys

# By width: rows, columns, warps, stages; and what is timed.
TILES = {
    64: [
        (64, 32, 4, 3), (64, 64, 2, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 8, 3), (64, 128, 4, 2),
        (64, 128, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3), (64, 256, 4, 2), (64, 256, 8, 3),
    ],
    128: [
        (64, 32, 2, 3), (64, 32, 4, 3), (64, 32, 4, 4), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 8, 2),
        (64, 64, 8, 3), (64, 128, 4, 2), (64, 128, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3),
    ],
    512: [
        (64, 16, 8, 2), (64, 16, 8, 3), (64, 32, 8, 2), (64, 32, 8, 3), (64, 32, 16, 2), (64, 64, 8, 2), (64, 64, 16, 2),
        (32, 32, 4, 2), (32, 32, 8, 2), (32, 32, 8, 3), (16, 32, 4, 2), (16, 32, 4, 3), (16, 64, 8, 2),
    ],
}  # fmt: skip
RESIDENT = (1, 2, 3, 4)
FILLED = [(1, 512), (1, 4096), (1, 32768), (32, 512), (32, 4096), (64, 8192)]  # rows, tokens that each holds
CASES = {width: [Case(B, n, width) for B, n in FILLED] for width in (64, 128)}
CASES[512] = [Case(B, n, 576, H, 1) for B, n, H in ((1, 4096, 128), (16, 16384, 128), (32, 4096, 16))]
Job = tuple[int, tuple[int, int, int, int]]


@torch.no_grad()
def compiled(job: Job) -> str:
    """Compiles into the cache on disk, with one split and with several; empty where it could, else why not."""
    width, tile = job
    kept, divided = split_keys.NARROW[width], split_keys.divided
    split_keys.NARROW[width] = split_keys.Tiles(*tile, 2)
    order = torch.arange(1024, device=DEVICE)[None]
    mask = BoundMask(CAUSAL, Coords(Side(order[:, -1:]), Side(order)))
    try:
        for H, G, widths in dict.fromkeys((case.H, case.G, case.widths) for case in CASES[width]):
            q, (k, v) = queries(1, 1, H, widths[0], BF16), state(1, G, widths, 1024, BF16)
            for splits in (1, 3):
                split_keys.divided = lambda *_, n=splits: n
                ours(q, k, v, mask)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    finally:
        split_keys.NARROW[width], split_keys.divided = kept, divided
    return ""


def ours(q: Tensor, k: Tensor, v: Tensor, mask: BoundMask) -> Tensor:
    return triton.decode(q, k, v, mask, None, 0.1)


def measured(case: Case, width: int, choices: list[split_keys.Tiles]) -> dict[split_keys.Tiles, float]:
    """Microseconds of a layer for each choice."""
    work, found = made(case), {}
    for choice in choices:
        split_keys.NARROW[width] = choice
        times = interleaved({"": captured(lambda: work.step(ours))}, rounds=5, warmup=1)
        found[choice] = 1e6 * times[""][0] / len(work.layers)
    return found


@torch.no_grad()
def sweep(widths: list[int]) -> None:
    """For each width the choices by the mean of their times over the best time of each case."""
    jobs: list[Job] = [(width, tile) for width in widths for tile in TILES[width]]
    failed = compiled_choices(compiled, jobs) if DEVICE == "cuda" else {job: compiled(job) for job in jobs}
    for job, why in failed.items():
        if why:
            print(f"D{job[0]} {job[1]}: {why}", flush=True)
    for width in widths:
        kept, cases, found = split_keys.NARROW[width], CASES[width], {}
        choices = [split_keys.Tiles(*tile, n) for tile in TILES[width] if not failed[width, tile] for n in RESIDENT]
        for case in cases:
            found[case] = measured(case, width, choices)
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
        split_keys.NARROW[width] = kept
        best = {case: min(times.values()) for case, times in found.items()}
        mean = {c: sum(times[c] / best[case] for case, times in found.items()) / len(cases) for c in choices}
        for choice in sorted(choices, key=mean.__getitem__)[:20] + [kept] * (kept in mean):
            times = "  ".join(f"{found[case][choice]:.1f}" for case in cases)
            note = " (as it stands)" if choice == kept else ""
            print(f"{width} {mean[choice]:.3f} {choice}: {times} us{note}", flush=True)
        for case, times in found.items():
            choice = min(times, key=times.__getitem__)
            speed = case.size() / times[choice] / 1e3
            print(f"{case.name}: {times[choice]:.1f} us, {speed:.0f} GB/s by {choice}", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    sweep([int(width) for width in sys.argv[1:]] or list(TILES))
