"""Word vectors against gensim: words per second of training on two cores, and scores, on Wikipedia and novels.

`python bench/words.py --data ../shared/data [METHOD ...]`, one of skipgram, cbow, skipgram-hs and cbow-hs (hierarchical
soft-max), pmi and glove: same sentences, width, window, noise words, epochs and threads, one process, runs in turns, each
round with its own seed. Scores are of the trained vectors by the same code for both: questions-words.txt within the
vocabulary, and the pair files that gensim ships. gensim has neither PMI nor GloVe: they are set against the scores of its
skip-gram with negative sampling, as they stand in the result file. Each method fits in five minutes by itself.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import lzma
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import torch
from gensim.corpora.wikicorpus import WikiCorpus
from gensim.models import KeyedVectors, Word2Vec
from gensim.test.utils import datapath

from dovetail.stats import Corpus, WordVectors, sentences_of

BENCHMARK = {
    "threads": 2,
    "packages": {"gensim": "gensim"},
    "data": ["../shared/data/words", "../shared/data/novels/train_25.txt.xz"],
    "minutes": 25,
}
PAIRS = Path(datapath("wordsim353.tsv"))
WIKI = "words/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SAME = {"dim": 100, "window": 5, "sample": 1e-3}
METHODS = ("skipgram", "cbow", "skipgram-hs", "cbow-hs", "pmi", "glove")
COUNTED = {"pmi": {"dim": 100, "window": 5}, "glove": {"dim": 100, "window": 10, "x_max": 10.0, "epochs": 8}}


def sentences(data: Path, share: float) -> list[list[str]]:
    """The Wikipedia slice an article a sentence, as gensim reads it; then the first part of the novels."""
    articles = WikiCorpus(str(data / WIKI), processes=1, dictionary={}).get_texts()
    with lzma.open(data / "novels" / "train_25.txt.xz", "rt", encoding="utf-8") as file:
        text = file.read()
    return [list(article) for article in articles] + list(sentences_of(text[: int(len(text) * share)]))


def ours(corpus: Corpus, method: str, epochs: int, seed: int, workers: int, device: str) -> tuple[WordVectors, float]:
    start = time.perf_counter()
    kind, _, tree = method.partition("-")
    loss: dict[str, Any] = {"loss": "hierarchical"} if tree else {"negative": 5}
    how = COUNTED.get(method) or SAME | loss | {"epochs": epochs, "workers": workers}
    vectors = WordVectors.fit(corpus, kind, seed=seed, device=device, **how)
    return vectors, time.perf_counter() - start


def theirs(text: list[list[str]], method: str, epochs: int, seed: int) -> tuple[WordVectors, float]:
    kind, _, tree = method.partition("-")
    model = Word2Vec(
        vector_size=SAME["dim"], window=SAME["window"], negative=0 if tree else 5, hs=int(bool(tree)),
        sample=SAME["sample"], min_count=5, sg=int(kind == "skipgram"), workers=2, seed=seed + 1, epochs=epochs,
    )  # fmt: skip
    model.build_vocab(text)
    start = time.perf_counter()
    model.train(text, total_examples=model.corpus_count, epochs=epochs)
    seconds = time.perf_counter() - start
    return WordVectors(model.wv.index_to_key, torch.from_numpy(model.wv.vectors.copy())), seconds


def scores(vectors: WordVectors, data: Path) -> Iterator[tuple[str, float]]:
    """In per cent."""
    yield "analogies", 100 * vectors.score_analogies(data / "words" / "questions-words.txt").accuracy
    yield "WordSim-353", 100 * vectors.score_similarity(datapath("wordsim353.tsv"))[0]
    yield "SimLex-999", 100 * vectors.score_similarity(datapath("simlex999.txt"))[0]


def check() -> None:
    """The same vectors score the same by gensim's own code, which the tables' scores are not made by."""
    vectors = KeyedVectors(vector_size=20)
    words = sorted({word for line in PAIRS.read_text().splitlines()[1:] for word in line.lower().split("\t")[:2]})
    vectors.add_vectors(words, torch.randn(len(words), 20).numpy())
    theirs = 100 * vectors.evaluate_word_pairs(str(PAIRS))[1][0]
    ours = 100 * WordVectors(words, torch.from_numpy(vectors.vectors)).score_similarity(PAIRS)[0]
    assert abs(ours - theirs) < 1e-6, (ours, theirs)


def measure() -> Iterator[dict[str, Any]]:
    for _, rows in by_method(asked([*METHODS, "--data", str(common.ROOT / "../shared/data")]), []):
        yield from rows


def compared(method: str, text: list[list[str]], corpus: Corpus, options: Any) -> list[dict[str, Any]]:
    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    found: dict[str, dict[str, list[float]]] = {"ours": {}, "theirs": {}}
    for seed in range(options.rounds):
        runs = {
            "ours": lambda seed=seed: ours(corpus, method, options.epochs, seed, options.workers, options.device),
            "theirs": lambda seed=seed: theirs(text, method, options.epochs, seed),
        }
        for side, run in runs.items():
            vectors, seconds = run()
            rates[side].append(corpus.raw * options.epochs / seconds)
            for name, value in scores(vectors, options.data):
                found[side].setdefault(name, []).append(value)
            print(f"{method} {side} seed {seed}: {rates[side][-1]:.0f} words/s", flush=True)
    where = f"{len(corpus.vocabulary)} words, {corpus.raw} tokens, {options.epochs} epochs"
    peer = f"gensim {importlib.metadata.version('gensim')}, 2 workers"
    run_on = f"{options.workers} workers" if options.device == "cpu" else options.device
    both = [statistics.median(rates[side]) for side in rates]
    spread = round(max(rates["ours"]) - min(rates["ours"]))
    rows = [common.row(f"{method}, {where}", "words/s", *both, peer, spread=spread, run=run_on, target_ratio=1.0)]
    for name, values in found["ours"].items():
        a, b = statistics.mean(values), statistics.mean(found["theirs"][name])
        spreads = {side: round(max(found[side][name]) - min(found[side][name]), 2) for side in found}
        rows.append(
            common.row(f"{method}: {name}", "score, %", round(a, 2), round(b, 2), peer, points=round(a - b, 2),
                       spread=spreads["ours"], spread_theirs=spreads["theirs"], seeds=options.rounds,
                       target=round(b - 2, 2), run=run_on)
        )  # fmt: skip
    return rows


def counted(method: str, corpus: Corpus, options: Any, skipgram: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Scores of a method that counts. skipgram: rows of gensim's skip-gram by name of the score."""
    found: dict[str, list[float]] = {}
    spent = []
    for seed in range(options.rounds):
        vectors, seconds = ours(corpus, method, options.epochs, seed, options.workers, options.device)
        spent.append(seconds)
        for name, value in scores(vectors, options.data):
            found.setdefault(name, []).append(value)
        print(f"{method} seed {seed}: {seconds:.0f} s", flush=True)
    rows = []
    for name, values in found.items():
        mean, peer = statistics.mean(values), skipgram[name]
        rows.append(
            common.row(f"{method}: {name}", "score, %", round(mean, 2), peer["theirs"],
                       f"{peer['peer']}: skip-gram, negative sampling", points=round(mean - peer["theirs"], 2),
                       spread=round(max(values) - min(values), 2), seeds=options.rounds, run=options.device,
                       seconds=round(statistics.median(spent), 1), options=COUNTED[method])
        )  # fmt: skip
    return rows


def asked(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("methods", nargs="*", default=["skipgram", "cbow"], help=f"of {', '.join(METHODS)}")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--share", type=float, default=1.0, help="of the novels")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "results")
    options = parser.parse_args()
    if unknown := [method for method in options.methods if method not in METHODS]:
        parser.error(f"no method {unknown[0]!r}, of {', '.join(METHODS)}")
    return options


def by_method(options: Any, kept: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(method, its rows) one after another, put into `kept` in place of those that it had there."""
    text = sentences(options.data, options.share)
    corpus = Corpus.read(text)
    for method in options.methods:
        # GloVe's steps are small: two threads wait more than they work.
        torch.set_num_threads(1 if method == "glove" else 2)
        if method in COUNTED:
            cases = {row["case"]: row for row in kept}
            peers = {name: cases[f"skipgram: {name}"] for name in ("analogies", "WordSim-353", "SimLex-999")}
            rows = counted(method, corpus, options, peers)
        else:
            rows = compared(method, text, corpus, options)
        again = {(row["case"].split(",")[0].split(":")[0], row["run"]) for row in rows}
        kept[:] = [r for r in kept if (r["case"].split(",")[0].split(":")[0], r["run"]) not in again] + rows
        yield method, rows


def main() -> None:
    """Some of the methods, their rows put into the result file: a run has a method at a time, so that it stays short."""
    options, kept = asked(), []
    if (options.out / "words.json").is_file():
        kept = json.loads((options.out / "words.json").read_text(encoding="utf-8"))["rows"]
    for method, _ in by_method(options, kept):
        common.write("words", kept, f"python bench/words.py {method} --epochs {options.epochs}", options.out)


if __name__ == "__main__":
    main()
