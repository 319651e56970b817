"""From ids to text while they come: no half characters, no half stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

HALF = "\ufffd"  # what a decoder puts where bytes of a character are still missing
PATIENCE = 4  # tokens that a character can have; bytes that are no character by then are shown as they are


class Tokenizer(Protocol):
    """What decoding asks of a tokenizer."""

    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def pad_id(self) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class Detokeniser:
    """Text deltas of one row. They join to what decoding prompt and new tokens at once adds to the prompt.

    Only a window is decoded at each token: the last whole piece, for context (a decoder strips the space in
    front of its first token), and what came since. Windows begin where a character does.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.ids = list(prompt)
        text = tokenizer.decode(self.ids)
        self.out = text.rstrip(HALF)  # the window's text that is out
        self.start = 0  # where the window begins
        self.whole = len(self.ids) if self.out == text else 0  # the last known place between characters
        self.waiting = 0  # tokens in a row after which the text ended in a broken character

    def add(self, token: int) -> str:
        """The text that `token` completes, possibly none."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids[self.start :])
        safe = text.rstrip(HALF)
        self.waiting = 0 if safe == text else self.waiting + 1
        if self.waiting >= PATIENCE and len(safe) <= len(self.out) < len(text):
            return self._give_up(text)
        # Byte fallback shows a whole run as broken while its end is: then `safe` is shorter than what is out.
        new = safe[len(self.out) :]
        if new:
            self.out, self.waiting = safe, 0
        if new and safe == text:
            self.start, self.whole = self.whole, len(self.ids)
            self.out = self.tokenizer.decode(self.ids[self.start :])
        return new

    def flush(self) -> str:
        """What is left when no more tokens come."""
        return self._give_up(self.tokenizer.decode(self.ids[self.start :]))

    def _give_up(self, text: str) -> str:
        """Everything, broken bytes too; the next window begins after it."""
        new, self.out, self.waiting = text[len(self.out) :], "", 0
        self.start = self.whole = len(self.ids)
        return new


class TextRow:
    """One row's text, cut before the first stop string. `add` gives what is safe to show."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: tuple[str, ...], eos: tuple[int, ...]):
        self.detokeniser = Detokeniser(tokenizer, prompt)
        self.stop, self.eos = stop, frozenset(eos)
        self.held = ""  # text that may turn out to begin a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that can be shown now. An eos id has no text; after the end nothing has."""
        if self.stopped or token in self.eos:
            return ""
        return self._show(self.detokeniser.add(token))

    def flush(self) -> str:
        """The rest, once the row has ended."""
        if self.stopped:
            return ""
        shown = self._show(self.detokeniser.flush())
        rest, self.held = self.held, ""
        return shown + rest

    def _show(self, new: str) -> str:
        text = self.held + new
        cuts = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if cuts:
            self.stopped, self.held = True, ""
            return text[: min(cuts)]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
