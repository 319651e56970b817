"""Skip-gram and CBOW: every step against autograd on a loss summed pair by pair, and what training finds."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dovetail.errors import DivergedError, UserError
from dovetail.stats import Corpus, SkipGram, WordVectors
from dovetail.stats.words import hierarchical, negative, training
from dovetail.stats.words.windows import Windows, bands, windows
from stats import planted

CASES = [{"method": method, "loss": loss} for method in ("skipgram", "cbow") for loss in ("negative", "hierarchical")]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus.read(planted.sentences(), min_count=1)


def some_windows(corpus: Corpus, tile: int, tokens: int = 300) -> Windows:
    rng = torch.Generator().manual_seed(1)
    kept = corpus.vocabulary.kept(0.01)
    return windows(corpus.ids[:tokens], corpus.sentence[:tokens], kept, 3, tile, rng)


def test_windows_stay_in_their_sentence(corpus: Corpus) -> None:
    """Dense windows from the definition: same sentence, same radius to both sides, itself left out."""
    rng = torch.Generator().manual_seed(2)
    text = windows(corpus.ids[:150], corpus.sentence[:150], None, 4, 16, rng)
    mask, near = text.rows(bands(16, 4), 0, 10), text.rows(bands(1, 4), 0, 10).flatten(0, 1)
    size = mask.sum(-1, keepdim=True)
    torch.testing.assert_close(text.rows(bands(16, 4, mean=True), 0, 10) * size, mask)
    assert size[..., 0].equal(text.sizes(0, 10).float())
    assert text.centres(0, 10).flatten()[:150].equal(corpus.ids[:150])
    radii = set()
    for i in range(160):
        tile, place = divmod(i, 16)
        seen = [tile * 16 + column - 4 for column in mask[tile, place].nonzero().flatten().tolist()]
        assert seen == [i + offset - 4 for offset in near[i].nonzero().flatten().tolist()]
        if i >= 150:
            assert not seen
            continue
        radius = max((abs(j - i) for j in seen), default=0)
        whole = [j for j in range(i - radius, i + radius + 1) if 0 <= j < 150 and j != i]
        assert seen == [j for j in whole if corpus.sentence[j] == corpus.sentence[i]]
        assert all(corpus.ids[j] == text.halos(tile, tile + 1)[0, j - tile * 16 + 4] for j in seen)
        radii.add(radius)
    assert radii == {1, 2, 3, 4}


def test_frequent_words_are_dropped_at_their_rate() -> None:
    ids = torch.tensor([0, 1, 2]).repeat(20_000)
    kept = torch.tensor([0.1, 0.5, 1.0])
    text = windows(ids, torch.zeros_like(ids), kept, 5, 32, torch.Generator().manual_seed(0))
    stayed = text.sizes(0, len(text.left)).flatten() > 0
    share = text.centres(0, len(text.left)).flatten()[stayed].bincount() / 20_000
    torch.testing.assert_close(share, kept, atol=0.02, rtol=0)  # five sigma is 0.018


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['method']}-{c['loss']}")
def test_a_step_is_the_gradient_of_the_loss_by_pairs(corpus: Corpus, case: dict[str, str]) -> None:
    """lr 1 moves both matrices by exactly minus autograd's gradient of the loss, summed in loops."""
    cls = {"skipgram": training.SkipGram, "cbow": training.Cbow}[case["method"]]
    model: Any = training._Model(corpus, cls(dim=6, window=3, loss=case["loss"]), torch.device("cpu"), 0)  # type: ignore[arg-type]
    start = [torch.randn_like(table) for table in (model.inputs, model.outputs)]
    model.inputs, model.outputs = (table.clone() for table in start)
    if case["loss"] == "hierarchical":
        model.rate.fill_(1)  # the plain sum; what is damped is tested below
    text = some_windows(corpus, model.tile)
    rng = torch.Generator().manual_seed(5)
    model.step(text, 1, 3, 1.0, rng)
    rng.manual_seed(5)
    noise = negative.noise_words(model.noise, (2, model.shared), rng) if case["loss"] == "negative" else None
    tables = [table.double().requires_grad_() for table in start]
    loss = by_pairs(text, tables[0], tables[1], noise, getattr(model, "paths", None), case["method"] == "cbow")
    for moved, table, gradient in zip((model.inputs, model.outputs), start, torch.autograd.grad(loss, tables)):
        torch.testing.assert_close((table - moved).double(), gradient, atol=3e-5, rtol=1e-5)
        assert gradient.abs().max() > 0.1


def by_pairs(
    text: Windows, inputs: Tensor, outputs: Tensor, noise: Tensor | None, paths: Any, cbow: bool, begin: int = 1
) -> Tensor:
    """The loss of tiles 1 and 2, a pair at a time."""
    tile = text.tile
    loss = inputs.new_zeros(())
    for i in range(begin * tile, (begin + 2) * tile):
        t, p = divmod(i, tile)
        word = int(text.stream[i + text.window])
        around = [i + o for o in range(-int(text.left[t, p]), int(text.right[t, p]) + 1) if o]
        context = [int(text.stream[j + text.window]) for j in around]
        if not context:
            continue
        if cbow:
            pairs = [(inputs[context].mean(0), word)]
        elif noise is not None:
            pairs = [(inputs[word], other) for other in context]
        else:
            pairs = [(inputs[other], word) for other in context]
        for x, target in pairs:
            if noise is not None:
                terms = logsigmoid(-(outputs[noise[t - begin]] @ x))
                loss = loss - logsigmoid(outputs[target] @ x) - terms.sum() * 5 / len(terms)
            else:
                length = int(paths.length[target])
                sign = 2 * paths.label[target, :length].double() - 1
                loss = loss - logsigmoid(sign * (outputs[paths.node[target, :length]] @ x)).sum()
    return loss


def test_gradients_in_double_precision() -> None:
    n, tile, halo, m, d = 2, 4, 8, 3, 5
    x, y = torch.randn(n, tile, d).double().requires_grad_(), torch.randn(n, halo + m, d).double().requires_grad_()
    mask, weight = torch.randint(0, 2, (n, tile, halo)).double(), torch.rand(n, tile).double()
    score = x @ y.mT
    loss = -(logsigmoid(score[..., :halo]) * mask).sum() - (logsigmoid(-score[..., halo:]) * weight[..., None]).sum()
    with torch.no_grad():
        ours = negative.skipgram_gradient(x, y, mask, weight)
    for a, b in zip(ours, torch.autograd.grad(loss, (x, y))):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0)


def test_huffman_codes_are_optimal_and_prefix_free() -> None:
    counts = torch.randint(1, 900, (57,), generator=torch.Generator().manual_seed(0)).sort(descending=True).values
    paths = hierarchical.huffman(counts)
    gensim = pytest.importorskip("gensim")
    peer = gensim.models.Word2Vec(hs=1, negative=0, min_count=1)
    peer.build_vocab_from_freq({f"w{i}": int(c) for i, c in enumerate(counts)})
    theirs = sum(len(peer.wv.get_vecattr(f"w{i}", "code")) * int(c) for i, c in enumerate(counts))
    assert int((paths.length * counts).sum()) == theirs
    codes = sorted(
        "".join(str(int(bit)) for bit in label[:n]) for label, n in zip(paths.label.tolist(), paths.length.tolist())
    )
    assert not any(longer.startswith(code) for code, longer in pairwise(codes))
    shares = torch.zeros(len(counts)).index_put_((paths.node,), paths.share)
    passing = torch.zeros(len(counts)).double()
    for node, n, count in zip(paths.node, paths.length.tolist(), counts.tolist()):
        passing[node[:n]] += count / counts.sum()
    torch.testing.assert_close(shares.double(), passing, atol=1e-6, rtol=0)
    # every input gives a distribution over words: turns at a node are complements
    score = (torch.randn(len(counts), 6).double() @ torch.randn(6).double())[paths.node]
    sign = 2 * paths.label.double() - 1
    on_path = torch.arange(paths.node.shape[1]) < paths.length[:, None]
    p = torch.where(on_path, torch.sigmoid(sign * score), 1.0).prod(1)
    assert p.sum().item() == pytest.approx(1, abs=1e-12)


def test_a_node_on_every_path_takes_no_steps_too_long(corpus: Corpus) -> None:
    """Its rate makes a batch's pairs count as 32."""
    model: Any = training._Model(corpus, SkipGram(loss="hierarchical", batch=64, window=5), torch.device("cpu"), 0)
    assert model.rate[:, 0].tolist() == pytest.approx([32 / (64 * 6)] * len(corpus.vocabulary))
    assert model.rate.max() == 1


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['method']}-{c['loss']}")
def test_planted_topics_are_found(corpus: Corpus, case: dict[str, Any]) -> None:
    vectors = WordVectors.fit(corpus, dim=16, epochs=5, lr=0.05, sample=0, batch=64, **case)
    assert planted.found(vectors) > 0.95
    untrained = WordVectors(vectors.words, torch.randn(len(vectors), 16, generator=torch.Generator().manual_seed(0)))
    assert planted.found(untrained) < 0.3


def test_the_seed_decides_with_one_worker(corpus: Corpus) -> None:
    first, again, other = (WordVectors.fit(corpus, dim=8, epochs=1, seed=s).matrix for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_threads_train_the_same_matrices(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "STRETCH", 2048)
    seen: list[int] = []
    before = torch.get_num_threads()
    more = {"lr": 0.05, "sample": 0, "batch": 32, "workers": 2}
    vectors = WordVectors.fit(corpus, "cbow", dim=16, epochs=5, progress=lambda done, _: seen.append(done), **more)
    assert planted.found(vectors) > 0.8  # every word is in every batch, so that threads lose some updates here
    assert seen[-1] == 5 * len(corpus.ids)
    assert seen == sorted(seen)
    assert torch.get_num_threads() == before


def test_what_cannot_be_asked(corpus: Corpus) -> None:
    for wrong, message in [
        ({"method": "skipgrm"}, "did you mean 'skipgram'"),
        ({"windw": 3}, "did you mean 'window'"),
        ({"method": "pmi", "negative": 3}, "pmi has no option 'negative'"),
        ({"loss": "hierarchical", "negative": 3}, "draws no noise"),
        ({"method": SkipGram(), "dim": 3}, "say them inside"),
        ({"dim": 0}, "at least 1"),
        ({"min_count": 2}, "has its words already"),
        ({"workers": 2, "device": "meta"}, "threads are for the CPU"),
    ]:
        with pytest.raises(UserError, match=message):
            WordVectors.fit(corpus, **wrong)
    with pytest.raises(DivergedError, match="not finite"):
        WordVectors.fit(corpus, dim=8, epochs=1, lr=1e30)
