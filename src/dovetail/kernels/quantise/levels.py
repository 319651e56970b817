"""The tables: what each code stands for, in [-1, 1], ascending."""

from __future__ import annotations

import torch

# The 4-bit NormalFloat as published (Dettmers et al. 2023, appendix E; eq. 4 is its construction): quantiles of
# N(0, 1) on both sides of an exact zero, divided by the largest.
NF4: tuple[float, ...] = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def dynamic() -> tuple[float, ...]:
    """The 256 values of dynamic tree quantisation (Dettmers et al. 2022, 8-bit optimizers, section 1.3), in fp32.

    A byte is a sign, z zeros, a one, and 6 - z bits of a fraction that split [0.1, 1] evenly; its value is the middle
    of its share times 10^-z. Zero and one take the two bytes that are left over.
    """
    found = [torch.tensor([0.0, 1.0], device="cpu")]
    for zeros in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (6 - zeros) + 1, dtype=torch.float32, device="cpu")
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0**-zeros
        found += [middles, -middles]
    return tuple(torch.cat(found).sort().values.tolist())


DYNAMIC = dynamic()
