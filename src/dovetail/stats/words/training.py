"""The loop of word2vec: stretches of text through SGD whose steps touch only the rows that a batch holds.

Each step is closed-form gradients of some tiles and `index_add_` into the two matrices; no autograd, no dense
gradient. Workers are threads that update the same matrices without locks (Recht et al. 2011, Hogwild): torch lets
go of the interpreter inside its operators. With one worker the result depends on the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dovetail.errors import DivergedError, UserError
from dovetail.stats.words import hierarchical, negative
from dovetail.stats.words.vocabulary import Corpus
from dovetail.stats.words.windows import Windows, bands, means, means_gradient, windows

STRETCH = 65_536  # tokens whose windows are prepared at once; no window crosses a stretch's ends
TILE_SKIPGRAM, TILE_CBOW = (
    32,
    64,
)  # words that share their noise words; of skip-gram, whose pairs come out of one product
# Noise words of a tile. A word of skip-gram has a noise word for each of its pairs to learn from, one of CBOW five.
SHARED_SKIPGRAM, SHARED_CBOW = 32, 16
PLACES = 16  # words of CBOW whose means come out of one product
# Pairs of a step that a node of the tree learns from in full. The root is on every path: the sum of a whole batch's
# gradients, all taken at the same point, would overshoot, so beyond this it counts as so many of their mean.
FULL = 32

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Word2Vec:
    """Options of skip-gram and CBOW (Mikolov et al. 2013a, 2013b).

    dim: width d of the vectors. window: the largest; each word draws its own from 1..window. epochs: passes.
    loss: "negative" (`negative` noise words a pair, drawn from counts ** noise_power; 5 and 0.75 unless given), or
    "hierarchical". lr: falls linearly to a ten-thousandth. sample: threshold of subsampling, 0 for none.
    workers: threads (CPU). batch: words a step; larger ones suit a GPU, and blur what frequent words learn.
    """

    dim: int = 100
    window: int = 5
    epochs: int = 5
    loss: Literal["negative", "hierarchical"] = "negative"
    negative: int | None = None
    noise_power: float | None = None
    lr: float | None = None
    sample: float = 1e-3
    workers: int = 1
    batch: int | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "window", "epochs", "negative", "workers", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}", remedy=f"give {name} of at least 1")
        if self.loss not in ("negative", "hierarchical"):
            raise UserError(f"no loss {self.loss!r}", remedy="say negative or hierarchical")
        if self.loss == "hierarchical" and (self.negative, self.noise_power) != (None, None):
            raise UserError("hierarchical soft-max draws no noise words", remedy="leave negative and noise_power out")
        if self.sample < 0 or (self.lr is not None and self.lr <= 0):
            raise UserError("sample is at least 0 and lr above 0", where=f"sample {self.sample}, lr {self.lr}")

    cbow = False


class SkipGram(Word2Vec):
    """A word predicts each word of its window."""


class Cbow(Word2Vec):
    """The mean of a window predicts the word in its middle."""

    cbow = True


def train(
    corpus: Corpus,
    options: Word2Vec,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """(V, d) float32 input vectors on the CPU. progress(tokens done, tokens in all) is called now and then.

    Raises UserError for several workers on a GPU, DivergedError when the vectors cease to be finite.
    """
    where = torch.device(device)
    if options.workers > 1 and where.type != "cpu":
        raise UserError(f"{options.workers} workers on {where}", remedy="threads are for the CPU: workers=1 here")
    model = _Model(corpus, options, where, seed)
    size = len(corpus.ids)
    pieces = [(epoch, at) for epoch in range(options.epochs) for at in range(0, size, STRETCH)]
    total = size * options.epochs
    done = 0

    def piece(number: int) -> int:
        epoch, at = pieces[number]
        return model.stretch(number, epoch, at, total)

    with _one_thread_each(options.workers if where.type == "cpu" else 0) as each:
        for tokens in each(piece, range(len(pieces))):
            done += tokens
            if progress is not None:
                progress(done, total)
    vectors = model.inputs.cpu()
    if not torch.isfinite(vectors).all():
        raise DivergedError("the word vectors are not finite", remedy="a smaller lr or batch")
    return vectors


class _Model:
    """The two matrices, and what a step reads beside them."""

    def __init__(self, corpus: Corpus, options: Word2Vec, device: torch.device, seed: int):
        vocabulary, dim = corpus.vocabulary, options.dim
        self.options, self.device, self.seed = options, device, seed
        self.ids, self.sentence = corpus.ids.to(device), corpus.sentence.to(device)
        rng = torch.Generator().manual_seed(seed)
        start = torch.rand(len(vocabulary), dim, generator=rng).mul_(2).sub_(1).div_(dim)
        self.inputs = start.to(device)
        self.outputs = torch.zeros(len(vocabulary), dim, device=device)
        self.kept = vocabulary.kept(options.sample).float().to(device) if options.sample else None
        self.lr = options.lr or (0.075 if options.cbow else 0.025)
        gpu, hierarchic = device.type != "cpu", options.loss == "hierarchical"
        single = hierarchic and not options.cbow  # reads windows by distance instead of by tiles
        self.tile = TILE_CBOW if options.cbow else TILE_SKIPGRAM
        places = PLACES if options.cbow else 1 if single else TILE_SKIPGRAM
        self.bands = bands(places, options.window, mean=options.cbow).to(device)
        if hierarchic:
            self.paths = hierarchical.huffman(vocabulary.counts).to(device)
            self.batch = options.batch or (1024 if gpu else 128)
            pairs = self.batch * (1 if options.cbow else options.window + 1)
            self.rate = (FULL / (pairs * self.paths.share)).clamp(max=1)
            self.step = self._hierarchical_cbow if options.cbow else self._hierarchical_skipgram
        else:
            power = 0.75 if options.noise_power is None else options.noise_power
            self.noise = vocabulary.noise(power).cumsum(0).to(device)
            self.negative = options.negative or 5
            self.shared = SHARED_CBOW if options.cbow else SHARED_SKIPGRAM
            self.batch = options.batch or (8192 if gpu else 1024 if options.cbow else 512)
            self.step = self._negative_cbow if options.cbow else self._negative_skipgram

    def stretch(self, number: int, epoch: int, at: int, total: int) -> int:
        """Trains on tokens at..at + STRETCH of the epoch; how many they are."""
        ids, sentence = self.ids[at : at + STRETCH], self.sentence[at : at + STRETCH]
        rng = torch.Generator(self.device).manual_seed((self.seed * 1_000_003 + number) & (2**63 - 1))
        text = windows(ids, sentence, self.kept, self.options.window, self.tile, rng)
        tiles, each = len(text.left), max(1, self.batch // self.tile)
        before = epoch * len(self.ids) + at
        for start in range(0, tiles, each):
            stop = min(start + each, tiles)
            past = (before + len(ids) * start / tiles) / total
            self.step(text, start, stop, self.lr * max(1 - past, 1e-4), rng)
        return len(ids)

    def _negative_skipgram(self, text: Windows, start: int, stop: int, lr: float, rng: torch.Generator) -> None:
        centres = text.centres(start, stop)
        noise = negative.noise_words(self.noise, (stop - start, self.shared), rng)
        others = torch.cat([text.halos(start, stop), noise], 1)
        weight = text.sizes(start, stop) * (self.negative / self.shared)
        x, y = _rows(self.inputs, centres), _rows(self.outputs, others)
        dx, dy = negative.skipgram_gradient(x, y, text.rows(self.bands, start, stop), weight, -lr)
        _add(self.inputs, centres, dx)
        _add(self.outputs, others, dy)

    def _negative_cbow(self, text: Windows, start: int, stop: int, lr: float, rng: torch.Generator) -> None:
        centres, near = text.centres(start, stop).flatten(), text.near(start, stop)
        noise = negative.noise_words(self.noise, (stop - start, self.shared), rng)
        x, y, z = _rows(self.inputs, near), _rows(self.outputs, centres), _rows(self.outputs, noise)
        mean = text.rows(self.bands, start, stop)
        dh, dy, dz = negative.cbow_gradient(means(x, mean), y, z, self.negative / self.shared, -lr)
        _add(self.inputs, near, means_gradient(dh, mean))
        _add(self.outputs, centres, dy)
        _add(self.outputs, noise, dz)

    def _hierarchical_skipgram(self, text: Windows, start: int, stop: int, lr: float, rng: torch.Generator) -> None:
        near = text.near(start, stop)
        node, label, on_path, rate = self._paths(text, start, stop)
        x, p = _rows(self.inputs, near), _rows(self.outputs, node)
        pair = text.rows(self.bands, start, stop).flatten(0, 1)
        dx, dp = hierarchical.skipgram_gradient(x, p, label, on_path, pair)
        _add(self.inputs, near, dx.mul_(-lr))
        _add(self.outputs, node, dp.mul_(-lr * rate[..., None]))

    def _hierarchical_cbow(self, text: Windows, start: int, stop: int, lr: float, rng: torch.Generator) -> None:
        near, mean = text.near(start, stop), text.rows(self.bands, start, stop)
        node, label, on_path, rate = self._paths(text, start, stop)
        x, p = _rows(self.inputs, near), _rows(self.outputs, node)
        dh, dp = hierarchical.cbow_gradient(means(x, mean), p, label, on_path)
        _add(self.inputs, near, means_gradient(dh, mean).mul_(-lr))
        _add(self.outputs, node, dp.mul_(-lr * rate[..., None]))

    def _paths(self, text: Windows, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(n T, L) each: nodes of the words' paths, labels, whether they count, rates; L is the longest among them."""
        words = text.centres(start, stop).flatten()
        length = self.paths.length[words]
        longest = int(length.max())
        on_path = (torch.arange(longest, device=self.device) < length[:, None]).float()
        tables = (self.paths.node, self.paths.label, self.rate)
        node, label, rate = (table[:, :longest].index_select(0, words) for table in tables)
        return node, label, on_path, rate


def _rows(table: Tensor, ids: Tensor) -> Tensor:
    return table.index_select(0, ids.reshape(-1)).view(*ids.shape, -1)


def _add(table: Tensor, ids: Tensor, rows: Tensor) -> None:
    """table[ids] += rows, those that come twice twice. On a CPU this takes 60% of index_add_'s time."""
    table.scatter_add_(0, ids.reshape(-1, 1).expand(-1, table.shape[1]), rows.reshape(-1, table.shape[1]))


@contextmanager
def _one_thread_each(workers: int) -> Iterator[Callable[..., Iterator[int]]]:
    """A `map` over so many threads, torch's own threads off meanwhile; 0 for a GPU: plain map."""
    if workers == 0:
        yield map  # type: ignore[misc]
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if workers == 1:
            yield map  # type: ignore[misc]
        else:
            with ThreadPoolExecutor(workers) as pool:
                yield pool.map
    finally:
        torch.set_num_threads(before)
