"""Speculative decoding on one CPU core against plain decoding of the same model: the bundled checkpoint on modules that it
was not trained on, one prompt at a time, by look-up, by n-grams of its training text, and by a smaller model where
recipes/pydoc_draft.yaml has made one. A forward over k tokens costs more than over one here ("forward" rows: how much), so
that fewer forwards are not as much less time.

Both sides are ours, in one process, interleaved, prompts read included.
Greedy text must be the same token for token, and with a draft that is not drawn the text for a seed too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from common import ROOT, interleaved, main, row

import dovetail as dt
from dovetail.data.pydoc import Pydoc
from dovetail.errors import RunError
from dovetail.sampling import DraftModel, NgramDraft, PromptLookup, Sampling, Speculation, sample
from dovetail.sampling.layout import vector_layout
from dovetail.stats import NGram

BENCHMARK = {"threads": 1, "data": ["assets/pydoc-llama"], "minutes": 4}
TARGET = ROOT / "assets" / "pydoc-llama"
SMALLER = (
    ROOT / "assets" / "pydoc-draft",
    ROOT / "runs" / "pydoc_draft",
)  # recipes/pydoc_draft.yaml; the first there is
PROMPTS, PROMPT, NEW, ROUNDS = 6, 192, 64, 4
VERIFIED = (3, 5, 9)  # tokens that the drafts below have verified at a time: their own and the newest
ORDER, SMOOTHING = 4, "witten-bell"


@cache
def model() -> Any:
    return dt.load(TARGET, dtype=torch.float32).eval()


@cache
def prompts() -> list[list[int]]:
    """PROMPT tokens of each of the first held-out modules that are long enough, from behind its header on."""
    tokenizer = dt.load_tokenizer(TARGET)
    long = (ids for text in Pydoc(split="held_out").documents() if len(ids := tokenizer.encode(text)) > 4 * PROMPT)
    return [ids[2 * PROMPT : 3 * PROMPT] for ids, _ in zip(long, range(PROMPTS))]


@cache
def drafts() -> dict[str, Any]:
    tokenizer = dt.load_tokenizer(TARGET)
    text = [tokenizer.encode(text) for text in Pydoc(split="train").documents()]
    grams = NGram.fit(text, ORDER, SMOOTHING, vocab=model().spec.vocab)
    found: dict[str, Any] = {
        "look-up, 3-grams, k 8": PromptLookup(3, 8),
        "look-up, 3-grams, k 3": PromptLookup(3, 3),
        "4-grams of the training text, k 4": NgramDraft(grams, 4),
        "4-grams of the training text, k 2": NgramDraft(grams, 2),
    }
    path = next((path for path in SMALLER if path.is_dir()), None)
    if path is not None:
        smaller = dt.load(path, dtype=torch.float32).eval()
        size = sum(p.numel() for p in smaller.parameters()) / 1e6
        found |= {f"model of {size:.1f} M, k {k}": DraftModel(smaller, k) for k in (2, 4)}
    return found


def options(temperature: float) -> Sampling:
    return Sampling.of(max_new_tokens=NEW, temperature=temperature, seed=0 if temperature else None)


def texts(
    draft: Any, temperature: float, after: Sequence[list[int]] | None = None
) -> tuple[list[list[int]], Speculation | None]:
    """The new tokens after every prompt, one at a time, and what the draft did over all. after: these prompts only."""
    made = [sample(model(), None, [ids], options(temperature), draft=draft) for ids in after or prompts()]
    told = [result.speculation[0] for result in made if result.speculation is not None]
    return [result.tokens[0].tolist() for result in made], Speculation.total(told) if told else None


def check() -> None:
    """The same tokens where they must be. Raises RunError otherwise."""
    for temperature in (0.0, 1.0):
        plain, _ = texts(None, temperature, prompts()[:2])
        for name, draft in drafts().items():
            if temperature and draft.drawn:
                continue
            if texts(draft, temperature, prompts()[:2])[0] != plain:
                raise RunError(f"other tokens than without a draft: {name}", where="bench/speculative.py")


def forwards() -> dict[int, float]:
    """Seconds of a forward over so many tokens behind a prompt, in the layout that decoding has."""
    with torch.inference_mode(), vector_layout(model(), 1, NEW):
        state = model().new_state(1, 2 * PROMPT)
        model()(torch.tensor(prompts()[:1]), state=state)

        def read(count: int) -> None:
            model()(torch.tensor([prompts()[1][:count]]), state=state)
            state.truncate(PROMPT)

        times = interleaved({str(k): (lambda k=k: read(k)) for k in (1, *VERIFIED)}, rounds=50)
    return {int(k): seconds for k, (seconds, _) in times.items()}


def measure() -> Iterator[dict[str, Any]]:
    costs = forwards()
    for k in VERIFIED:
        yield row(
            f"forward over {k} tokens",
            "ms",
            round(1e3 * costs[k], 3),
            round(1e3 * costs[1], 3),
            "over one",
            smaller=True,
        )
    made = PROMPTS * NEW
    for temperature, how in ((0.0, "greedy"), (1.0, "temperature 1")):
        told: dict[str, Speculation | None] = {}

        def run(name: str, draft: Any, temperature: float = temperature, told: Any = told) -> None:
            told[name] = texts(draft, temperature)[1]

        cases = {"plain": None} | drafts()
        times = interleaved({name: partial(run, name, draft) for name, draft in cases.items()}, rounds=ROUNDS)
        plain, _ = times.pop("plain")
        for name, (seconds, spread) in times.items():
            found = told[name]
            assert found is not None
            yield row(
                f"{name}, {how}", "tokens/s", round(made / seconds, 1), round(made / plain, 1), "plain decoding",
                spread=round(made * spread / seconds**2, 1), tokens_per_forward=round(found.tokens_per_forward, 2),
                acceptance=round(found.acceptance, 3), proposed=found.proposed,
            )  # fmt: skip


if __name__ == "__main__":
    main(__file__)
