"""Hierarchical soft-max: a word as left and right turns on the way from the root of a Huffman tree.

p(w | x) = Π over the inner nodes of w's path of σ(±x·node), + where the turn's bit is 0 (Morin and Bengio 2005;
Mikolov et al. 2013b, section 2.1). Frequent words have short paths, so a pair costs about the entropy of the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Paths:
    """node: (V, L) int64, inner nodes from the root on; V - 1, which no tree of V words has, beyond a path's end.

    label: (V, L) float32, 1 where the bit is 0. length: (V,) int64. share: (V, L) float32, of all tokens, how many
    pass through the node; 0 beyond a path's end.
    """

    node: Tensor
    label: Tensor
    length: Tensor
    share: Tensor

    def to(self, device: torch.device | str) -> Paths:
        return Paths(self.node.to(device), self.label.to(device), self.length.to(device), self.share.to(device))


def huffman(counts: Tensor) -> Paths:
    """Paths of the Huffman tree of descending counts (V,), V >= 2. Linear time: the two smallest are always at the
    ends of two sorted queues, leaves and inner nodes (van Leeuwen 1976)."""
    words = len(counts)
    weight = counts.tolist()
    parent, bit = [0] * (2 * words - 1), [0] * (2 * words - 1)  # leaves 0..V-1, inner nodes after them as they arise
    leaf, inner = words - 1, words
    for made in range(words, 2 * words - 1):
        pair = []
        for _ in range(2):
            if leaf >= 0 and (inner >= made or weight[leaf] < weight[inner]):
                pair.append(leaf)
                leaf -= 1
            else:
                pair.append(inner)
                inner += 1
        weight.append(weight[pair[0]] + weight[pair[1]])
        parent[pair[0]] = parent[pair[1]] = made
        bit[pair[1]] = 1
    root = 2 * words - 2
    nodes, labels = [[] for _ in range(2 * words - 1)], [[] for _ in range(2 * words - 1)]
    for child in range(root - 1, -1, -1):
        up = parent[child]
        nodes[child] = [*nodes[up], up - words]
        labels[child] = [*labels[up], 1.0 - bit[child]]
    length = torch.tensor([len(n) for n in nodes[:words]])
    longest = int(length.max())
    node = torch.tensor([n + [words - 1] * (longest - len(n)) for n in nodes[:words]])
    label = torch.tensor([x + [0.0] * (longest - len(x)) for x in labels[:words]])
    passing = torch.tensor([*weight[words:], 0]) / weight[-1]
    return Paths(node, label, length, passing[node])


def skipgram_gradient(x: Tensor, p: Tensor, label: Tensor, on_path: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (dx, dp) of -log p summed over pairs: each word of a window predicts the path of the word in its middle.

    x: (B + 2w, d) input vectors of a stretch and its surroundings. p: (B, L, d) vectors of the nodes on the paths.
    label, on_path: (B, L). pair: (B, 2w + 1), 1 where the neighbour is in the window.
    """
    near = x.unfold(0, pair.shape[1], 1)  # (B, d, 2w + 1), a view
    g = ((p @ near).sigmoid_() - label[..., None]).mul_(on_path[..., None]).mul_(pair[:, None])
    each = g.mT @ p
    dx = torch.zeros_like(x)
    for offset in range(pair.shape[1]):
        dx[offset : offset + len(p)] += each[:, offset]
    return dx, g @ near.mT


def cbow_gradient(h: Tensor, p: Tensor, label: Tensor, on_path: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (dh, dp) of -log p: the mean of a window's input vectors predicts the path of the word in its middle.

    h: (B, d) means, 0 for a word that is left out. p: (B, L, d); label, on_path: (B, L).
    """
    g = (p @ h[..., None])[..., 0].sigmoid_().sub_(label).mul_(on_path)
    return (g[:, None] @ p)[:, 0], g[..., None] * h[:, None]
