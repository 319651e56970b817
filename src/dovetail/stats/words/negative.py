"""Negative sampling (Mikolov et al. 2013b, eq. 4), a tile at a time, with the gradients written out.

For an input vector x, a word y of its window and k words z drawn from the noise:  -log σ(x·y) - Σ log σ(-x·z).
The M noise words of a tile are shared by all its words, each term weighted so that a pair still has k of them in
expectation. A noise word that happens to be the right one is not skipped (eq. 4 does not skip it either).
"""

from __future__ import annotations

import torch
from torch import Tensor


def skipgram_gradient(x: Tensor, y: Tensor, mask: Tensor, weight: Tensor, rate: float = 1.0) -> tuple[Tensor, Tensor]:
    """`rate` times the gradients (dx, dy) of a tile's loss, summed over its pairs: every word predicts the words of its window.

    x: (n, T, d) input vectors of the words. y: (n, C + M, d) output vectors of the halo's C words, then of M noise
    words. mask: (n, T, C), 1 for a pair. weight: (n, T), of one noise term: pairs of the word times k / M.
    """
    halo = mask.shape[-1]
    g = (x @ y.mT).sigmoid_()  # d loss / d score: σ - 1 for a pair, weight·σ for noise
    g[..., :halo].sub_(1).mul_(mask)
    g[..., halo:].mul_(weight[..., None])
    g.mul_(rate)  # a third of the numbers that the gradients have
    return g @ y, g.mT @ x


def cbow_gradient(h: Tensor, y: Tensor, z: Tensor, weight: float, rate: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """`rate` times the gradients (dh, dy, dz) of tiles' loss: the mean of a window's input vectors predicts the word in
    its middle.

    h: (n T, d) means, 0 for a word that is left out. y: (n T, d) output vectors of the words; z: (n, M, d) of noise.
    weight: of a noise term, k / M. The mean's own 1 / size belongs into the input vectors' gradient (`means_gradient`),
    which word2vec and gensim leave out (İrsoy et al. 2021, eq. 5).
    """
    tiles = h.view(len(z), -1, h.shape[1])
    g_y = (h * y).sum(-1, keepdim=True).sigmoid_().sub_(1).mul_(rate)
    g_z = (tiles @ z.mT).sigmoid_().mul_(weight * rate)
    dh = torch.baddbmm((g_y * y).view_as(tiles), g_z, z)
    return dh.view_as(h), g_y * h, g_z.mT @ tiles


def noise_words(cumulative: Tensor, shape: tuple[int, int], rng: torch.Generator) -> Tensor:
    """Ids drawn from the noise by its cumulative sums, (V,) float64."""
    u = torch.rand(shape, generator=rng, device=cumulative.device, dtype=cumulative.dtype)
    return torch.searchsorted(cumulative, u).clamp_(max=len(cumulative) - 1)
