"""COCO's run-length encoding of masks, compressed and not, byte for byte as pycocotools writes it.

A mask is read column by column; the runs alternate, zeros first (a first run of 0 where the first pixel is set). The
compressed form writes each run, from the fourth on as the difference to the run before the last one, in groups of five
bits, lowest first, one printable character a group: bit 5 says that more follow, bit 4 of the last group is the sign.
Source: the COCO data format; the oracle is pycocotools.mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dovetail.errors import DataError
from dovetail.geometry.masks import check_size, mask_stack

Rle = dict[str, Any]  # {"size": [height, width], "counts": bytes (compressed) or a list of int (not)}
BITS, LOW, MORE, SIGN, ZERO = 5, 31, 32, 16, 48  # bits a group, their mask, the two flags, the character of 0
LONGEST = 7  # groups of a number: 35 bits hold the difference of any two runs of a mask below 2^32 pixels


def rle_encode(masks: Tensor, *, compressed: bool = True) -> Rle | list[Rle]:
    """Run lengths of a mask (H, W) -> {"size": [H, W], "counts": ...}, or of masks (N, H, W) -> a list of them.

    counts are bytes as pycocotools.mask.encode gives them (`.decode()` makes the string that stands in JSON), or the
    list of run lengths with compressed=False. Pixels are 0 or 1: bool, integer or float.
    Raises DataError for another shape, or a pixel that is neither 0 nor 1. Exact.
    """
    stack, single = mask_stack(masks, "rle_encode")
    count, height, width = stack.shape
    flat = stack.cpu().numpy().transpose(0, 2, 1).reshape(count, height * width)
    turns = flat.copy()  # pixels unlike the one before; before the first there is a zero
    turns[:, 1:] ^= flat[:, :-1]
    row, place = turns.nonzero()
    last = np.cumsum(turns.sum(1) + 1) - 1  # of each mask's runs; the end of the mask closes it
    ends = np.full(len(place) + count, height * width, dtype=np.int64)
    ends[np.arange(len(place)) + row] = place
    runs = np.diff(ends, prepend=0)
    runs[last[:-1] + 1] = ends[last[:-1] + 1]
    parts = _compress(runs, last + 1) if compressed else [part.tolist() for part in np.split(runs, last[:-1] + 1)]
    made = [{"size": [height, width], "counts": part} for part in parts[:count]]
    return made[0] if single else made


def rle_decode(rles: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Tensor:
    """The bool mask (H, W) of one run-length encoding, or (N, H, W) of several of equal size.

    counts may be bytes, a string or a list of run lengths. Raises DataError for unlike sizes, an empty list, keys other
    than size and counts, characters that are none of the code's, and runs that do not fill the mask. Exact.
    """
    single = isinstance(rles, Mapping)
    several = [rles] if single else list(rles)
    if not several:
        raise DataError("no run lengths to decode", where="rle_decode", remedy="an empty list has no size: give one")
    runs, sizes = zip(*(_read(rle, f"rle_decode, item {i}") for i, rle in enumerate(several)))
    if len(set(sizes)) > 1:
        raise DataError(
            f"masks of unlike sizes {sorted(set(sizes))[:4]}",
            where="rle_decode",
            remedy="decode those of one image together, or one by one",
        )
    height, width = sizes[0]
    values = np.concatenate([np.arange(len(part)) % 2 == 1 for part in runs])
    flat = np.repeat(values, np.concatenate(runs))
    masks = torch.from_numpy(flat.reshape(len(several), width, height).transpose(0, 2, 1).copy())
    return masks[0] if single else masks


def rle_area(rles: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Tensor:
    """Pixels set, int64: () of one run-length encoding, (N,) of several, without decoding them. Raises as rle_decode."""
    single = isinstance(rles, Mapping)
    several = [rles] if single else list(rles)
    areas = torch.tensor(
        [int(_read(rle, f"rle_area, item {i}")[0][1::2].sum()) for i, rle in enumerate(several)], dtype=torch.long
    )
    return areas[0] if single else areas


def _compress(runs: np.ndarray, stops: np.ndarray) -> list[bytes]:
    """The characters of all masks' runs; `stops` are the ends of each mask's part of `runs`."""
    if not len(stops):
        return []
    starts = np.concatenate([[0], stops[:-1]])
    place = np.arange(len(runs)) - np.repeat(starts, stops - starts)
    value = runs.copy()
    later = np.flatnonzero(place > 2)
    value[later] -= runs[later - 2]
    size = np.where(value < 0, ~value, value)
    groups = np.ones_like(size)
    for shift in range(BITS - 1, int(size.max(initial=0)).bit_length(), BITS):  # one bit of each number is its sign
        groups += size >> shift > 0
    first = np.cumsum(groups) - groups
    k = np.arange(groups.sum()) - np.repeat(first, groups)
    bits = np.repeat(value, groups) >> (BITS * k) & LOW
    more = np.where(k < np.repeat(groups, groups) - 1, MORE, 0)
    text = ((bits | more) + ZERO).astype(np.uint8).tobytes()
    cuts = [0, *np.cumsum(groups)[stops - 1].tolist()]
    return [text[a:b] for a, b in pairwise(cuts)]


def _read(rle: Mapping[str, Any], where: str) -> tuple[np.ndarray, tuple[int, int]]:
    """(run lengths, (height, width)), checked. Raises DataError."""
    if set(rle) != {"size", "counts"}:
        raise DataError(
            f"a run-length encoding has the keys size and counts, not {sorted(map(str, rle))}",
            where=where,
            remedy='give {"size": [height, width], "counts": ...}, in COCO annotations the field "segmentation"',
        )
    size = list(rle["size"])
    if len(size) != 2:
        raise DataError(f"size {size} is not [height, width]", where=where, remedy="give two whole numbers")
    height, width = size
    check_size(height, width, where)
    counts = rle["counts"]
    if isinstance(counts, str | bytes):
        runs = _expand(counts.encode("latin-1", "replace") if isinstance(counts, str) else counts, where)
    elif all(isinstance(n, int) for n in counts):
        runs = np.array(counts, dtype=np.int64)
    else:
        raise DataError("counts hold what is no whole number", where=where, remedy="give run lengths, or a string")
    if (runs < 0).any() or runs.sum() != height * width:
        raise DataError(
            f"runs of {int(runs.sum())} pixels{' (some negative)' if (runs < 0).any() else ''} for a mask of"
            f" {height} x {width} = {height * width}",
            where=where,
            remedy="size is [height, width]; look whether the counts were cut, or belong to another image",
        )
    return runs, (height, width)


def _expand(text: bytes, where: str) -> np.ndarray:
    """The run lengths that compressed counts stand for. Raises DataError."""
    code = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - ZERO
    final = (code & MORE) == 0
    if len(code) == 0 or (code < 0).any() or (code >= 2 * MORE).any() or not final[-1]:
        raise DataError(
            "counts are no complete COCO code",
            where=where,
            remedy=f"characters lie between {chr(ZERO)!r} and {chr(ZERO + 2 * MORE - 1)!r}; look for a cut or re-encoded string",
        )
    starts = np.concatenate([[0], np.flatnonzero(final)[:-1] + 1])
    groups = np.diff(starts, append=len(code))
    if groups.max() > LONGEST:
        raise DataError("a run is longer than 2^32 pixels", where=where, remedy="the string is no COCO code")
    k = np.arange(len(code)) - np.repeat(starts, groups)
    value = np.add.reduceat((code & LOW) << (BITS * k), starts)
    value -= np.where(code[final] & SIGN, np.int64(1) << (BITS * groups), 0)
    value[1::2] = np.cumsum(value[1::2])  # from the fourth on: differences to the run before the last
    value[2::2] = np.cumsum(value[2::2])
    return value
