"""The tiles of each kernel, for a sweep to fill: chosen by the kernel, the widest of a head's vectors, and what is asked."""

from __future__ import annotations

from typing import NamedTuple

import torch

WIDEST = 128  # of a head's queries, keys and values


class Tiles(NamedTuple):
    """rows: of the tile that a program holds. columns: of those that it walks. warps; stages: tiles on the way at a time."""

    rows: int
    columns: int
    warps: int
    stages: int


# kernel, and what is asked of it: {width: tiles}, in bf16 and fp16, on a processor with the shared memory of an H100.
# band: a bound behind; pair: two forms; table: a score by distance; rows: by query, or key, and distance
NARROW: dict[str, dict[int, Tiles]] = {
    "attend": {64: Tiles(64, 64, 4, 2), 128: Tiles(128, 64, 4, 2)},
    "attend band": {64: Tiles(64, 64, 4, 2), 128: Tiles(128, 64, 4, 2)},
    "attend pair": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 4, 3)},
    "attend table": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 4, 3)},
    "attend rows": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 4, 3)},
    "queries": {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 3)},
    "queries band": {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 2)},
    "queries pair": {64: Tiles(64, 32, 4, 3), 128: Tiles(64, 64, 4, 2)},
    "queries table": {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 2)},
    "queries rows": {64: Tiles(64, 32, 4, 3), 128: Tiles(64, 32, 4, 2)},
    "keys": {64: Tiles(64, 64, 4, 3), 128: Tiles(128, 64, 8, 3)},
    "keys band": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 32, 4, 3)},
    "keys pair": {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 32, 4, 3)},
    "keys table": {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 32, 4, 3)},
    "keys rows": {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 4, 2)},
    "diagonals table": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 4, 3)},
}
WIDE = Tiles(64, 32, 4, 1)  # of fp32, whose factors are three each on tensor cores, made in registers
SMALL = Tiles(64, 64, 4, 1)  # where shared memory is less than an H100's
ENDS = True  # whether tiles beyond the table's reach are walked by themselves, adding one number to all scores


def tiles(kernel: str, width: int, dtype: torch.dtype, roomy: bool) -> Tiles:
    """For heads padded to `width`. roomy: shared memory as an H100 has."""
    if dtype == torch.float32:
        return WIDE
    if not roomy:
        return SMALL
    return NARROW[kernel][64 if width <= 64 else 128]
