"""A corpus whose neighbours are known: topics of words that only ever stand among themselves."""

from __future__ import annotations

import random

from dovetail.stats import WordVectors

TOPICS, EACH = 6, 8


def sentences(count: int = 1500, seed: int = 0) -> list[list[str]]:
    """Ten words of one topic a sentence, two of glue that every topic shares."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        topic = rng.randrange(TOPICS)
        words = [f"t{topic}w{rng.randrange(EACH)}" for _ in range(10)] + [f"glue{rng.randrange(3)}" for _ in range(2)]
        rng.shuffle(words)
        made.append(words)
    return made


def found(vectors: WordVectors) -> float:
    """The share of the nearest EACH - 1 words that are of the word's own topic; chance gives 0.14."""
    hits = total = 0
    for word in vectors.words:
        if word.startswith("t"):
            near = vectors.nearest(word, EACH - 1)
            hits += sum(other.split("w")[0] == word.split("w")[0] for other, _ in near)
            total += EACH - 1
    return hits / total
