"""From documents to rows of tokens that can be scored, and the hash that names them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import DataError, UserError
from dovetail.report.measure import rows_of


def encoded(tokenizer: Any, text: str) -> tuple[Tensor, int]:
    """Ids (N,) of a document, begun with the tokenizer's own BOS where it has one; and bytes (UTF-8) before the
    first token that is predicted."""
    encoding = tokenizer.fast.encode(text)
    ids, before = list(encoding.ids), 0
    if tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids = [tokenizer.bos_id, *ids]
    elif encoding.offsets:
        before = len(text[: encoding.offsets[0][1]].encode("utf-8"))  # offsets of an added token are (0, 0)
    return torch.tensor(ids, dtype=torch.long), before


def documents_of(tokens: Tensor | None, texts: str | Sequence[str] | None, tokenizer: Any) -> list[Tensor]:
    """Documents as ids (N,), from (N,) or (R,T) tokens or from texts. Raises UserError for both or a lack."""
    if tokens is not None and texts is not None:
        raise UserError("both tokens and texts to measure on", remedy="give one of them")
    if tokens is not None:
        return [tokens] if tokens.dim() == 1 else list(tokens)
    if texts is None:
        return []
    if tokenizer is None:
        raise UserError("texts without a tokenizer", remedy="pass tokenizer=dt.load_tokenizer(folder), or tokens")
    return [encoded(tokenizer, text)[0] for text in ([texts] if isinstance(texts, str) else texts)]


def rows_within(documents: Sequence[Tensor], length: int, tokens: int) -> Tensor:
    """Rows (R, length + 1), none across two documents: about `tokens` / length of them, spread evenly over all.

    Raises DataError when no document is long enough.
    """
    long = [document for document in documents if document.shape[0] > length]
    if not long:
        most = max((d.shape[0] for d in documents), default=0)
        raise DataError(
            f"no document has {length + 1} tokens (the longest has {most})",
            remedy="give longer texts, or score at a shorter length",
        )
    rows = torch.cat([rows_of(document, length) for document in long])
    wanted = min(max(1, tokens // length), rows.shape[0])
    return rows[torch.linspace(0, rows.shape[0] - 1, wanted).round().long()]


def recut(rows: Tensor, length: int) -> Tensor:
    """The same questions in shorter rows: (R, T) -> (R', length + 1). A rest that fills no row is left out."""
    return torch.cat([rows_of(row, length) for row in rows])


def tokens_hash(rows: Tensor) -> str:
    """SHA-256 of the ids as int64, little-endian, with the shape: names exactly what was scored."""
    digest = hashlib.sha256(str(tuple(rows.shape)).encode())
    digest.update(rows.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def text_hash(text: str) -> str:
    """SHA-256 of the UTF-8 bytes."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
