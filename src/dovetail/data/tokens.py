"""Token sets: a corpus as ids in one memory-mapped file, with the place where each document begins.

NAME.json says dtype, counts and what it was made from; NAME.bin holds the ids (uint16, or uint32 above
65,536 ids), NAME.offsets.bin the starts of the documents and the end (int64). Of prompt-completion pairs,
NAME.prompts.bin holds how many of a document's ids are its prompt (uint32). Nothing is read into memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dovetail.data.corpus import Corpus
from dovetail.data.pairs import Pairs, encode_pairs
from dovetail.data.tokenizer import encode_documents, fingerprint
from dovetail.errors import DataError, RunError
from dovetail.hub import Tokenizer

_VERSION = 1
_TOGETHER = 64  # documents encoded at a time
Item = TypeVar("Item")


@dataclass(frozen=True)
class TokenSet:
    """tokens (N,) and offsets (documents + 1,), memory-mapped; meta as written in NAME.json.

    prompts (documents,): ids at the head of each document that are only read, never learnt; None unless the
    corpus is one of pairs.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    meta: dict[str, Any]
    prompts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    @staticmethod
    def open(path: str | Path) -> TokenSet:
        """From the path of NAME.json. Raises DataError when its files do not belong together."""
        path = Path(path)
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            tokens = np.memmap(path.with_suffix(".bin"), dtype=meta["dtype"], mode="r")
            offsets = np.memmap(path.with_suffix(".offsets.bin"), dtype="int64", mode="r")
            paired = meta.get("paired", False)
            prompts = np.memmap(path.with_suffix(".prompts.bin"), dtype="uint32", mode="r") if paired else None
            whole = (len(tokens), len(offsets) - 1) == (meta["tokens"], meta["documents"])
            whole = whole and (prompts is None or len(prompts) == meta["documents"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"not a token set: {error}", where=str(path), remedy="make it again") from None
        if not whole or meta["version"] != _VERSION:
            raise DataError("the files of this token set do not belong together", where=str(path), remedy="remake it")
        return TokenSet(tokens, offsets, meta, prompts)


def prepare(corpus: Corpus, tokenizer: Tokenizer, cache: str | Path | None = None) -> TokenSet:
    """The token set of a corpus, from the cache when text and tokenizer are the same as before.

    cache: a folder; DOVETAIL_CACHE or ~/.cache/dovetail unless given. Raises DataError for an empty corpus.
    """
    text, words = corpus.fingerprint(), fingerprint(tokenizer)
    name = hashlib.sha256(f"{_VERSION}{text}{words}".encode()).hexdigest()[:24]
    path = cache_folder(cache) / "tokens" / f"{name}.json"
    if path.is_file():
        return TokenSet.open(path)
    made = {"corpus": corpus.to_dict(), "text_sha256": text, "tokenizer_sha256": words}
    return write_tokens(path, corpus, tokenizer, made)


def cache_folder(given: str | Path | None = None) -> Path:
    """Where things that can be made again are kept: as given, DOVETAIL_CACHE, or ~/.cache/dovetail."""
    return Path(given or os.environ.get("DOVETAIL_CACHE") or Path.home() / ".cache" / "dovetail")


def write_tokens(path: Path, corpus: Corpus, tokenizer: Tokenizer, made: dict[str, Any]) -> TokenSet:
    """Encodes a corpus into the files of `path` (NAME.json). Empty documents are left out.

    NAME.json is put in place last, so that a set that was cut short is never opened. Raises DataError, and RunError
    when the disk gives out; whatever ends it leaves nothing unfinished behind.
    """
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 2**16 else "uint32")
    paired = isinstance(corpus, Pairs)
    finals = {name: path.with_suffix(f".{name}.bin") for name in ("offsets", "prompts")[: 1 + paired]}
    finals |= {"ids": path.with_suffix(".bin"), "meta": path}
    parts = {name: Path(f"{final}.{os.getpid()}.part") for name, final in finals.items()}  # two may make the same set
    offsets, prompts = [0], []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with parts["ids"].open("wb") as file:
            for ids, prompt in _encoded(corpus, tokenizer):
                file.write(np.asarray(ids, dtype).tobytes())
                offsets.append(offsets[-1] + len(ids))
                prompts.append(prompt)
            file.flush()
            os.fsync(file.fileno())
        if offsets[-1] < 2:
            raise DataError("the corpus is empty", where=str(made.get("corpus", path)), remedy="give it some text")
        parts["offsets"].write_bytes(np.asarray(offsets, "int64").tobytes())
        if paired:
            parts["prompts"].write_bytes(np.asarray(prompts, "uint32").tobytes())
        meta = {"version": _VERSION, "dtype": dtype.name, "tokens": offsets[-1], "documents": len(offsets) - 1}
        meta |= {"paired": paired} | made
        parts["meta"].write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        for name, final in finals.items():
            parts[name].replace(final)
    except OSError as error:
        raise RunError(
            f"the token set could not be written: {error.strerror or error}",
            where=str(path.parent),
            remedy="free some space, or give another folder: data.cache, DOVETAIL_CACHE",
        ) from error
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return TokenSet.open(path)


def _encoded(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
    """(ids, how many of them are prompt) of each document that is not empty."""
    if isinstance(corpus, Pairs):
        for pairs in _batched(corpus.pairs()):
            yield from ((before + after, len(before)) for before, after in encode_pairs(tokenizer, pairs))
    else:
        for texts in _batched(text for text in corpus.documents() if text):
            yield from ((ids, 0) for ids in encode_documents(tokenizer, texts))


def _batched(items: Iterable[Item]) -> Iterator[list[Item]]:
    stream = iter(items)
    while some := list(itertools.islice(stream, _TOGETHER)):
        yield some
