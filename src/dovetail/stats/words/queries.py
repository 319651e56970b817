"""What vectors are asked: neighbours, analogies, and how well they agree with people.

All by cosine on rows of length 1. Sources: 3CosAdd and 3CosMul, Levy and Goldberg 2014 (eq. 3, 4; cosines shifted to
0..1 there); analogies by relation, Mikolov et al. 2013a, section 4.1; rank correlation, Spearman 1904.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dovetail.errors import DataError, UserError

Rule = Literal["3cosadd", "3cosmul"]
_BLOCK = 512  # questions whose scores of all words are held at once


def unit_rows(matrix: Tensor) -> Tensor:
    """(V, d) -> (V, d), rows of length 1; a row of zeros stays."""
    return matrix / matrix.norm(dim=1, keepdim=True).clamp(min=1e-30)


def analogy_scores(unit: Tensor, questions: Tensor, rule: Rule = "3cosadd") -> Tensor:
    """(Q, V) scores of "a is to b as c is to ?", the three words themselves at -inf.

    unit: (V, d) rows of length 1. questions: (Q, 3) ids a, b, c. 3cosadd: cos(x, b) - cos(x, a) + cos(x, c);
    3cosmul: cos(x, b) cos(x, c) / (cos(x, a) + 0.001), each cosine moved from -1..1 to 0..1.
    """
    if rule not in ("3cosadd", "3cosmul"):
        raise UserError(f"no rule {rule!r}", remedy="say 3cosadd or 3cosmul")
    a, b, c = (unit[questions[:, i]] for i in range(3))
    if rule == "3cosadd":
        scores = (b - a + c) @ unit.mT
    else:
        near_a, near_b, near_c = (((x @ unit.mT) + 1) / 2 for x in (a, b, c))
        scores = near_b * near_c / (near_a + 0.001)
    return scores.scatter_(1, questions, -torch.inf)


@dataclass(frozen=True)
class AnalogyScore:
    """Per section (name, right, asked), and in all. skipped: questions with a word that the vectors lack."""

    sections: tuple[tuple[str, int, int], ...]
    skipped: int

    @property
    def right(self) -> int:
        return sum(right for _, right, _ in self.sections)

    @property
    def asked(self) -> int:
        return sum(asked for _, _, asked in self.sections)

    @property
    def accuracy(self) -> float:
        return self.right / self.asked if self.asked else float("nan")


def score_analogies(unit: Tensor, index: dict[str, int], path: str | Path, rule: Rule = "3cosadd") -> AnalogyScore:
    """Accuracy on a file like questions-words.txt: ": section" lines, else four words, any case. Raises DataError."""
    lowered = _lowered(index)
    sections, skipped = [], 0
    for name, lines in _sections(path):
        known = [[lowered.get(word, -1) for word in line] for line in lines]
        asked = [ids for ids in known if min(ids) >= 0]
        skipped += len(known) - len(asked)
        right = 0
        for block in torch.tensor(asked, dtype=torch.int64, device=unit.device).reshape(-1, 4).split(_BLOCK):
            right += int((analogy_scores(unit, block[:, :3], rule).argmax(1) == block[:, 3]).sum())
        sections.append((name, right, len(asked)))
    return AnalogyScore(tuple(sections), skipped)


def score_similarity(unit: Tensor, index: dict[str, int], path: str | Path) -> tuple[float, int, int]:
    """(Spearman's rank correlation of cosines with people's scores, pairs used, pairs with an unknown word).

    The file: two words (any case) and a number on a line, by tabs or spaces; # begins a remark; a first line of names
    may stand above. Raises DataError.
    """
    lowered = _lowered(index)
    people, cosines, missing = [], [], 0
    for place, (number, line) in enumerate(_lines(path)):
        fields = line.split()
        try:
            first, second, score = fields[0].lower(), fields[1].lower(), float(fields[2])
        except (IndexError, ValueError):
            if place == 0 and len(fields) > 2:  # names of columns
                continue
            raise DataError(f"line {number} is not two words and a number", where=str(path)) from None
        if first in lowered and second in lowered:
            people.append(score)
            cosines.append(float(unit[lowered[first]] @ unit[lowered[second]]))
        else:
            missing += 1
    return spearman(torch.tensor(people), torch.tensor(cosines)), len(people), missing


def spearman(x: Tensor, y: Tensor) -> float:
    """Correlation of ranks of two (n,), equal values sharing their mean rank; nan below two values or without spread."""
    ranks = [_ranks(v.double().numpy()) for v in (x, y)]
    a, b = (r - r.mean() if len(r) else r for r in ranks)
    spread = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / spread if len(a) > 1 and spread else float("nan")


def _lowered(index: dict[str, int]) -> dict[str, int]:
    """Lower case to id; of words that differ in case alone the more frequent one, which comes first."""
    lowered: dict[str, int] = {}
    for word, i in index.items():
        lowered.setdefault(word.lower(), i)
    return lowered


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[group]


def _sections(path: str | Path) -> Iterator[tuple[str, list[Sequence[str]]]]:
    name, questions = "", []
    for number, line in _lines(path):
        if line.startswith(":"):
            if questions:
                yield name, questions
            name, questions = line[1:].strip(), []
            continue
        words = line.lower().split()
        if len(words) != 4:
            raise DataError(f"line {number} has {len(words)} words, not four", where=str(path))
        questions.append(words)
    if questions:
        yield name, questions


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    file = Path(path)
    if not file.is_file():
        raise DataError(f"no file {str(path)!r}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text: {error.reason}", where=str(path)) from None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            yield number, line
