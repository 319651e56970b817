"""A byte-level BPE tokenizer trained here, and what a corpus needs of any tokenizer: documents to ids."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from dovetail.errors import DataError, RunError
from dovetail.hub import Tokenizer, load_tokenizer

BOS, EOS, MASK = "<|begin|>", "<|end|>", "<|mask|>"


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of each document between the tokenizer's begin and (first) end token, as far as it has them."""
    before, after = document_marks(tokenizer)
    return [before + e.ids + after for e in tokenizer.fast.encode_batch_fast(texts, add_special_tokens=False)]


def document_marks(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """(ids before, ids after) a document: begin and end, or BERT's [CLS] and [SEP] for a tokenizer that has neither."""
    before, after = [] if tokenizer.bos_id is None else [tokenizer.bos_id], list(tokenizer.eos_ids[:1])
    if before or after:
        return before, after
    found = [tokenizer.fast.token_to_id(tokenizer.special.get(role, "")) for role in ("cls_token", "sep_token")]
    first, last = ([] if i is None else [i] for i in found)
    return first, last


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer and the ids it puts around documents."""
    known = f"{tokenizer.fast.to_str()}{tokenizer.bos_id}{tokenizer.eos_ids[:1]}"
    if tokenizer.bos_id is None and not tokenizer.eos_ids:
        known += f"{document_marks(tokenizer)}"
    return hashlib.sha256(known.encode()).hexdigest()


def train_tokenizer(documents: Iterable[str], vocab: int, folder: str | Path, mask: bool = False) -> Tokenizer:
    """A byte-level BPE of `vocab` ids (Sennrich et al. 2016; Radford et al. 2019), written to `folder`.

    Digits stand alone, so that a number is spelled the same everywhere. Every text can be encoded: the 256 bytes
    are in. Encoding a prompt begins it with the begin token. mask: with a token to hide others behind. Raises DataError for a vocabulary below 258, or an
    empty corpus.
    """
    special = [BOS, EOS, MASK] if mask else [BOS, EOS]
    least = 256 + len(special)
    if vocab < least:
        raise DataError(
            f"a byte-level vocabulary of {vocab}",
            remedy=f"give at least {least}: 256 bytes and {'three' if mask else 'two'} marks",
        )
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    fast.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in documents:
            seen += len(text)
            yield text

    fast.train_from_iterator(counted(), trainer)
    if not seen:
        raise DataError("the corpus to train a tokenizer on is empty", remedy="give it some text")
    begin = (BOS, fast.token_to_id(BOS))
    fast.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[begin]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    } | ({"mask_token": MASK} if mask else {})
    save_whole(fast, config, Path(folder))
    return load_tokenizer(folder)


def save_whole(fast: FastTokenizer, config: dict[str, Any], folder: Path) -> None:
    """Saves a tokenizer so that another process sees it whole or not at all: several may make the same one.

    Raises RunError when the disk gives out, or nothing can be written there.
    """
    parts = {name: folder / f"{name}.{os.getpid()}.part" for name in ("tokenizer_config.json", "tokenizer.json")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        parts["tokenizer_config.json"].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        fast.save(str(parts["tokenizer.json"]))
        for name, part in parts.items():
            part.replace(folder / name)
    except Exception as error:  # the library has no class of its own for what the disk says
        raise RunError(
            f"the tokenizer could not be written: {getattr(error, 'strerror', None) or error}",
            where=str(folder),
            remedy="free some space, or give another folder: data.cache, DOVETAIL_CACHE",
        ) from error
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink()
