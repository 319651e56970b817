"""N-grams: exactness on whole corpora, speed of queries beside kenlm in one process, counting in bounded memory.

dovetail bench ngram               all of it, counting 1000 MB first: the peak of memory is the whole process's
python bench/ngram.py exact        50,000 probabilities an order, orders 3 and 5, against dictionaries (a minute)
python bench/ngram.py speed        queries: a text as strings, and as ids; kenlm's Model.score of its sentences beside
python bench/ngram.py count MB     counting of about so many megabytes, 256 MiB for sorting; peak memory of the process

The text of `count` is made from real text: the lines of the novels (or of the corpora that are there), drawn again and
again in a random order until the size is reached. So the vocabulary and the frequencies of words are real, and as
within-line n-grams repeat, the number of distinct n-grams grows less than with new text; what sorting holds does not
depend on it, but the disk and the merging would be used more.
"""

from __future__ import annotations

import json
import lzma
import math
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np

from dovetail.stats import NGram
from dovetail.stats.ngram import count_file, tokenise

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
BENCHMARK = {
    "packages": {"kenlm": "kenlm"},
    "data": [
        "../shared/data/tinyshakespeare/input.txt", "../shared/data/wikitext2/valid.txt",
        "../shared/data/wikitext2/test.txt", "../shared/data/novels/train_25.txt.xz",
    ],
    "minutes": 8,
}  # fmt: skip
CORPORA = {"Tiny Shakespeare": "tinyshakespeare/input.txt", "WikiText-2 valid": "wikitext2/valid.txt"}
MEMORY = 256 << 20


def exact() -> list[dict[str, Any]]:
    """Largest difference of p over 50,000 n-grams of each order (all where there are fewer), and of sums from 1 over 200
    contexts of the text."""
    sys.path.insert(0, str(ROOT / "tests"))
    from stats.ngram_oracles import SlowKneserNey

    rows = []
    for name, path in CORPORA.items():
        sentences = tokenise((DATA / path).read_text(), "word")
        for order in (3, 5):
            model, slow = NGram.fit(sentences, order), SlowKneserNey(sentences, order)
            worst, asked, names = 0.0, 0, model.vocabulary.names
            for n in range(1, order + 1):
                rng = np.random.default_rng(n)
                some = rng.permutation(model.trie.size(n))[:50_000]
                p = np.exp(model.logp[n - 1][some])
                for gram, ours in zip(model.trie.columns(n)[:, some].T.tolist(), p.tolist(), strict=True):
                    *context, word = (names[i] for i in gram)
                    if word != "<s>":
                        worst, asked = max(worst, abs(ours - slow.p(word, tuple(context)))), asked + 1
            stream = [t for s in sentences for t in s]
            at = np.random.default_rng(0).integers(0, len(stream) - order, 200)
            sums = [model.distribution(stream[i : i + order - 1]).sum() for i in at]
            rows.append(
                {
                    "case": f"{name}, order {order}", "metric": "max |Δp|", "ours": worst,
                    "peer": "formula (dictionaries, fp64)", "theirs": 0.0, "ratio": None, "target": 1e-6, "met": worst <= 1e-6,
                    "asked": asked, "ngrams": list(model.sizes), "worst_sum": max(abs(s - 1) for s in sums),
                }
            )  # fmt: skip
    return rows


def speed() -> list[dict[str, Any]]:
    """ns a token of a WikiText-2 test text under models of its validation text; kenlm reads our ARPA file."""
    import kenlm

    text = (DATA / "wikitext2/test.txt").read_text()
    lines = [line for line in text.split("\n") if line.strip()]
    rows = []
    for order in (3, 5):
        model = NGram.fit_file(DATA / "wikitext2/valid.txt", order)
        with tempfile.TemporaryDirectory() as folder:
            model.save_arpa(Path(folder) / "a.arpa")
            peer = kenlm.Model(str(Path(folder) / "a.arpa"))
        joined, ids = "\n".join(lines), model._flat(text)[0]
        ours = model.sentence_logprobs(joined) / math.log(10)
        np.testing.assert_allclose(ours, [peer.score(line) for line in lines], rtol=1e-5)
        found = common.interleaved(
            {
                "kenlm": lambda p=peer: [p.score(line) for line in lines],
                "text": lambda m=model, t=joined: m.sentence_logprobs(t),
                "ids": lambda m=model, i=ids: m.score(i),
            },
            rounds=15,
        )
        tokens = int((ids != 1).sum())
        peers = found["kenlm"][0] / tokens * 1e9
        for case in ("text", "ids"):
            ours, spread = (x / tokens * 1e9 for x in found[case])
            name = "kenlm Model.score of strings"
            more = {"tokens": tokens, "spread": spread, "target_ratio": 0.5}
            rows.append(common.row(f"order {order}, {case}", "ns/token", ours, peers, name, smaller=True, **more))
    return rows


def counting(megabytes: int, order: int = 3) -> list[dict[str, Any]]:
    """Seconds and peak resident memory (with Python, numpy, torch) of counting."""
    base = _peak()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text"
        size = _text(path, megabytes << 20)
        start = time.perf_counter()
        vocabulary, counts = count_file(path, order, memory=MEMORY, folder=folder)
        seconds = time.perf_counter() - start
        with counts:
            row = {
                "case": f"counting {size / 2**20:.0f} MiB of words, order {order}", "metric": "MB/s",
                "ours": size / 1e6 / seconds, "peer": "none", "theirs": 0, "ratio": None, "seconds": seconds,
                "tokens": counts.tokens, "vocabulary": len(vocabulary), "rows": [r.size for r in counts.rows],
                "peak_MiB": _peak() / 1024, "peak_before_MiB": base / 1024, "for_sorting_MiB": MEMORY >> 20,
                "text": "lines of the 25 novels, drawn at random with replacement",
            }  # fmt: skip
    return [row]


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _text(path: Path, size: int) -> int:
    """Writes lines drawn at random until `size` bytes; how many were written."""
    with lzma.open(DATA / "novels/train_25.txt.xz", "rb") as file:
        lines = [line + b"\n" for line in file.read().split(b"\n") if line.strip()]
    rng, written = np.random.default_rng(0), 0
    with path.open("wb") as out:
        while written < size:
            part = b"".join([lines[i] for i in rng.integers(0, len(lines), 100_000)])
            out.write(part)
            written += len(part)
    return written


def check() -> None:
    """Every n-gram of a text of a thousand lines against dictionaries."""
    sys.path.insert(0, str(ROOT / "tests"))
    from stats.ngram_oracles import SlowKneserNey

    sentences = tokenise((DATA / CORPORA["Tiny Shakespeare"]).read_text(), "word")[:1000]
    model, slow = NGram.fit(sentences, 3), SlowKneserNey(sentences, 3)
    names = model.vocabulary.names
    for n in (1, 2, 3):
        for gram, logp in zip(model.trie.columns(n).T.tolist(), model.logp[n - 1].tolist(), strict=True):
            *context, word = (names[i] for i in gram)
            assert word == "<s>" or abs(math.exp(logp) - slow.p(word, tuple(context))) < 1e-6, (word, context)


def measure() -> Iterator[dict[str, Any]]:
    yield from counting(1000)
    yield from exact()
    yield from speed()


def main() -> None:
    """Replaces the rows of what was run in docs/results/ngram.json, and keeps the others."""
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    made = {"exact": exact, "speed": speed, "count": lambda: counting(int(sys.argv[2]))}
    if what not in made:
        common.main(__file__)
    rows = made[what]()
    old = ROOT / "docs/results/ngram.json"
    kept = json.loads(old.read_text())["rows"] if old.exists() else []
    new = {row["case"] for row in rows}
    common.write("ngram", [*(r for r in kept if r["case"] not in new), *rows], "dovetail bench ngram")


if __name__ == "__main__":
    main()
