"""Windows around every word of a stretch of text, as a band: what skip-gram and CBOW read, prepared in whole tensors.

A tile is T neighbouring words; its halo is the tile with `window` words on either side. A word's window is then a
run of columns of a (T, T + 2 window) matrix, so that every pair of a tile comes out of one matrix product, and a
word's row is fetched once a tile instead of once a pair (compare Ji et al. 2016, which does it a window at a time).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """Tiles of T words. stream: (tiles T + 2 window,) int64 ids, padded by id 0. left, right: (tiles, T) int64, how
    many words a word's window holds on either side (0 and 0 for padding). start, stop below count tiles."""

    stream: Tensor
    left: Tensor
    right: Tensor
    window: int

    @property
    def tile(self) -> int:
        return self.left.shape[1]

    def near(self, start: int, stop: int) -> Tensor:
        """(n T + 2 window,) ids of the tiles and their surroundings, as they stand in the text."""
        return self.stream[start * self.tile : stop * self.tile + 2 * self.window]

    def centres(self, start: int, stop: int) -> Tensor:
        """(n, T) ids."""
        ids = self.near(start, stop)
        return ids[self.window : len(ids) - self.window].view(-1, self.tile)

    def halos(self, start: int, stop: int) -> Tensor:
        """(n, T + 2 window) ids of each tile with its surroundings."""
        return self.near(start, stop).unfold(0, self.tile + 2 * self.window, self.tile)

    def sizes(self, start: int, stop: int) -> Tensor:
        """(n, T) words in each window, without the one in the middle."""
        return self.left[start:stop] + self.right[start:stop]

    def rows(self, table: Tensor, start: int, stop: int) -> Tensor:
        """(n T / P, P, C) rows of a table of `bands` of P places that fit the windows of these tiles; P divides T.

        C is P + 2 window, or 2 window + 1 for a table of single words, whose columns are then by distance.
        """
        sides = self.window + 1
        row = (self.left[start:stop] * sides + self.right[start:stop]).view(-1, len(table) // sides**2)
        if row.shape[1] > 1:
            row += torch.arange(0, len(table), sides * sides, device=row.device)
        return table.index_select(0, row.view(-1)).view(*row.shape, -1)


def bands(tile: int, window: int, *, mean: bool = False) -> Tensor:
    """(T (window + 1)², T + 2 window) float32: what a word's window is as a row of a tile's matrix, whatever it is.

    By its place in the tile, then by how many words are left and right of it: 1 for a word of the window, itself
    left out; mean: 1 / size instead. Looking rows up costs a tenth of comparing distances anew for every tile.
    """
    side = torch.arange(window + 1)
    place = torch.arange(tile)[:, None, None, None]
    offset = torch.arange(tile + 2 * window) - window - place
    inside = (offset >= -side[:, None, None]) & (offset <= side[:, None]) & (offset != 0)
    table = inside.float().flatten(0, 2)
    return table / table.sum(1, keepdim=True).clamp(min=1) if mean else table


def means(x: Tensor, mean: Tensor) -> Tensor:
    """(n P, d) means over windows of the rows x (n P + 2 window, d) of a text and its surroundings.

    mean: (n, P, P + 2 window), a row of `bands` of means a word. No row of x is copied: tiles overlap where they lie.
    """
    return (mean @ x.unfold(0, mean.shape[2], mean.shape[1]).mT).flatten(0, 1)


def means_gradient(dh: Tensor, mean: Tensor) -> Tensor:
    """(n P + 2 window, d): what a gradient dh (n P, d) of `means` is for x. Where tiles overlap their shares add up."""
    tiles, places, halo = mean.shape
    dh = dh.view(tiles, places, -1)
    dx = dh.new_empty(tiles + (halo - 1) // places, places, dh.shape[2])
    torch.bmm(mean[..., :places].mT, dh, out=dx[:tiles])
    dx[tiles:] = 0
    for number, at in enumerate(range(places, halo, places), 1):
        some = mean[..., at : at + places].mT @ dh
        dx[number : number + tiles, : some.shape[1]] += some
    return dx.flatten(0, 1)[: tiles * places + halo - places]


def windows(
    ids: Tensor, sentence: Tensor, kept: Tensor | None, window: int, tile: int, rng: torch.Generator
) -> Windows:
    """Subsamples a stretch of text and draws every word's window from 1..window (Mikolov et al. 2013a, section 3.2).

    ids, sentence: (N,). kept: (V,) chances to survive; None keeps all. Windows end at their sentence's ends, after
    the subsampling, as in word2vec: dropped words make room for words farther away.
    """
    device = ids.device
    if kept is not None:
        stay = torch.rand(len(ids), generator=rng, device=device, dtype=kept.dtype) < kept.index_select(0, ids)
        stay = stay.nonzero()[:, 0]
        ids, sentence = ids.index_select(0, stay), sentence.index_select(0, stay)
    count = len(ids)
    place = torch.arange(count, device=device)
    first = torch.ones(count, dtype=torch.bool, device=device)
    first[1:] = sentence[1:] != sentence[:-1]
    starts = first.nonzero()[:, 0]
    ends = torch.cat([starts[1:], starts.new_tensor([count])])
    number = first.cumsum(0) - 1
    radius = (
        torch.rand(count, generator=rng, device=device).mul_(window).long().add_(1)
    )  # randint takes ten times as long
    left = torch.minimum(radius, place - starts.index_select(0, number))
    right = torch.minimum(radius, ends.index_select(0, number) - 1 - place)
    tiles = -(-count // tile)
    pad = tiles * tile - count
    left, right = (torch.nn.functional.pad(side, (0, pad)).view(tiles, tile) for side in (left, right))
    return Windows(torch.nn.functional.pad(ids, (window, window + pad)), left, right, window)
