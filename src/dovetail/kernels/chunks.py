"""What recurrences with a matrix state share: rows in chunks, products inside a chunk, the state across.

A row of T tokens is written as (..., N, L, ...): N chunks of L. Sums of logarithms of decays are made over exactly the
tokens that they speak of, never as a difference of two sums: their exponentials are at most 1, and nothing cancels.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F


def cut(x: Tensor, size: int) -> Tensor:
    """(B,H,T,...) -> (B,H,N,size,...), zeros behind the last token."""
    missing = -x.shape[2] % size
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, missing))
    return x.unflatten(2, (-1, size))


def joined(x: Tensor, length: int) -> Tensor:
    """`cut` undone: (B,H,N,L,D) -> (B,H,length,D)."""
    return x.flatten(2, 3)[:, :, :length]


def between(x: Tensor) -> Tensor:
    """Σ_{j<m<=i} x_m of x (..., L) for each pair: (..., i, j), 0 where j >= i."""
    L = x.shape[-1]
    later = torch.ones(L, L, dtype=torch.bool, device=x.device).tril(-1)  # [m, j]: m > j
    return x[..., :, None].expand(*x.shape, L).masked_fill(~later, 0.0).cumsum(-2)


def begun(reset: Tensor, size: int) -> Tensor:
    """How many documents have begun in a chunk up to and with each of its tokens: reset (B,T) -> (B,1,N,size)."""
    return cut(reset[:, None].long(), size).cumsum(-1)


def without_autocast(x: Tensor) -> torch.autocast | nullcontext[None]:
    """Products stay in the type of their factors: a state in bf16 would lose what it was given."""
    return torch.autocast(x.device.type, enabled=False) if x.device.type in ("cpu", "cuda") else nullcontext()


def autocasts(x: Tensor) -> bool:
    """Whether products of x would be in autocast's type."""
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def padded(width: int, most: int | None = None) -> int:
    """A tile's width that holds `width` numbers: a power of two, 16 at least, as products want; no more than `most`."""
    found = max(16, 1 << (width - 1).bit_length())
    return found if most is None else min(found, most)


def ceil_div(n: int, size: int) -> int:
    """Blocks of `size` that hold n. On the host triton.cdiv takes a fifth of the time of a launch."""
    return -(-n // size)


@cache
def roomy(device: torch.device) -> bool:
    """Whether a processor's shared memory is as large as an H100's."""
    return device.type != "cuda" or torch.cuda.get_device_properties(device).shared_memory_per_block_optin > 200 * 1024
