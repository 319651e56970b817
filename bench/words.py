"""Word vectors against gensim: words per second of training on two cores, and scores, on Wikipedia and novels.

`python bench/words.py --data ../shared/data [skipgram|cbow ...]`: same sentences, width, window, noise words, epochs
and threads, one process, runs in turns, each round with its own seed. Scores are of the trained vectors by the same
code for both: questions-words.txt within the vocabulary, and the pair files that gensim ships.
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
from gensim.models import Word2Vec
from gensim.test.utils import datapath

from dovetail.stats import Corpus, WordVectors, sentences_of

WIKI = "words/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SAME = {"dim": 100, "window": 5, "negative": 5, "sample": 1e-3}


def sentences(data: Path, share: float) -> list[list[str]]:
    """The Wikipedia slice an article a sentence, as gensim reads it; then the first part of the novels."""
    articles = WikiCorpus(str(data / WIKI), processes=1, dictionary={}).get_texts()
    with lzma.open(data / "novels" / "train_25.txt.xz", "rt", encoding="utf-8") as file:
        text = file.read()
    return [list(article) for article in articles] + list(sentences_of(text[: int(len(text) * share)]))


def ours(corpus: Corpus, method: str, epochs: int, seed: int, workers: int, device: str) -> tuple[WordVectors, float]:
    start = time.perf_counter()
    vectors = WordVectors.fit(corpus, method, epochs=epochs, seed=seed, workers=workers, device=device, **SAME)
    return vectors, time.perf_counter() - start


def theirs(text: list[list[str]], method: str, epochs: int, seed: int) -> tuple[WordVectors, float]:
    model = Word2Vec(
        vector_size=SAME["dim"], window=SAME["window"], negative=SAME["negative"], sample=SAME["sample"],
        min_count=5, sg=int(method == "skipgram"), workers=2, seed=seed + 1, epochs=epochs,
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


def measure(method: str, text: list[list[str]], corpus: Corpus, options: Any) -> list[dict[str, Any]]:
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
    rows = [common.row(f"{method}, {where}", "words/s", *both, peer, spread=spread, run=run_on, target="1.0x")]
    for name, values in found["ours"].items():
        a, b = statistics.mean(values), statistics.mean(found["theirs"][name])
        spreads = {side: round(max(found[side][name]) - min(found[side][name]), 2) for side in found}
        rows.append(
            common.row(f"{method}: {name}", "score, %", round(a, 2), round(b, 2), peer, points=round(a - b, 2),
                       spread=spreads["ours"], spread_theirs=spreads["theirs"], seeds=options.rounds,
                       target="within 2 points", run=run_on)
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("methods", nargs="*", default=["skipgram", "cbow"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--share", type=float, default=1.0, help="of the novels")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "results")
    options = parser.parse_args()
    torch.set_num_threads(2)
    text = sentences(options.data, options.share)
    corpus = Corpus.read(text)
    kept: list[dict[str, Any]] = []
    if (options.out / "words.json").is_file():  # a run has a method at a time, so that it stays short
        kept = json.loads((options.out / "words.json").read_text(encoding="utf-8"))["rows"]
    for method in options.methods:
        rows = measure(method, text, corpus, options)
        again = {(row["case"].split(",")[0].split(":")[0], row["run"]) for row in rows}
        kept = [r for r in kept if (r["case"].split(",")[0].split(":")[0], r["run"]) not in again] + rows
        common.write("words", kept, f"python bench/words.py {method} --epochs {options.epochs}", options.out)


if __name__ == "__main__":
    main()
