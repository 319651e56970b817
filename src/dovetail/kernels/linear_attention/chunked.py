"""Linear attention in chunks: matrix products inside a chunk, and one state (D,E) a head from chunk to chunk.

Spans of chunks are made again in the backward, so that O(T·D) and a state a span are kept, not a matrix of weights.
Work is linear in T. Everything is in fp32 or better.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK, SPAN = 128, 2048  # tokens
FLOOR = -40.0  # of a logarithm of decay: exp(-40) is nothing beside 1, and differences of sums keep their digits


class Rows(NamedTuple):
    """What is known of the tokens beside their vectors, each (B|1,T) or None: which are real, and whose document.

    Equal neighbours in `document` are of one document; padding belongs to the one before it (or the row's first).
    """

    real: Tensor | None
    document: Tensor | None

    @staticmethod
    def of(segments: Tensor | None) -> Rows:
        """segments (B,T): not falling along a row but for padding, which is negative."""
        if segments is None:
            return Rows(None, None)
        return Rows(segments >= 0, segments.clamp_min(0).cummax(1).values)

    def cut(self, a: int, b: int) -> Rows:
        return Rows(*(None if t is None else t[:, a:b] for t in self))

    def flip(self) -> Rows:
        return Rows(*(None if t is None else t.flip(1) for t in self))


def causal(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, rows: Rows, start: Tensor, strict: bool = False
) -> tuple[Tensor, Tensor]:
    """(B,H,T,E) and the last state (B,G,D,E). decay (B|1,G|1,T), logarithms. strict: without the token itself."""
    T = q.shape[2]
    before = None if rows.document is None else rows.document[:, :1]
    state, out = start, []
    for a in range(0, T, SPAN):
        b = min(a + SPAN, T)
        cut = (q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], None if decay is None else decay[..., a:b], rows.cut(a, b))
        if T <= SPAN:
            y, state = _span(*cut, before, state, strict)
        else:
            y, state = checkpoint(_span, *cut, before, state, strict, use_reentrant=False, preserve_rng_state=False)  # type: ignore[misc]
        before = None if rows.document is None else rows.document[:, b - 1 : b]
        out.append(y)
    return (out[0] if len(out) == 1 else torch.cat(out, 2)), state


def bidirectional(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """(B,H,T,E): every token of one's document. Two products where a row is one document, else there and back."""
    if rows.real is None:
        B, H, T, D = q.shape
        wide, G = torch.promote_types(q.dtype, torch.float32), k.shape[1]
        state = k.to(wide).transpose(-1, -2) @ v.to(wide)
        return (q.to(wide).reshape(B, G, H // G * T, D) @ state).view(B, H, T, -1)
    start = _empty(q, k, v)
    there, _ = causal(q, k, v, None, rows, start)
    back, _ = causal(q.flip(2), k.flip(2), v.flip(2), None, rows.flip(), start, strict=True)
    return there + back.flip(2)


def _empty(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=wide, device=q.device)


def _span(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    rows: Rows,
    before: Tensor | None,
    state: Tensor,
    strict: bool,
) -> tuple[Tensor, Tensor]:
    """`causal` over few chunks. before (B|1,1): the document that `state` (B,G,D,E) is of."""
    (B, H, T, D), G, wide = q.shape, k.shape[1], state.dtype
    R, C = H // G, min(CHUNK, T)
    n, short = -(-T // C), -T % C
    k = k.to(wide) if rows.real is None else k.to(wide) * rows.real[:, None, :, None]
    q, k, v = (F.pad(t.to(wide), (0, 0, 0, short)) if short else t.to(wide) for t in (q, k, v))
    q = q.view(B, G, R, n, C, D).transpose(2, 3)  # (B,G,n,R,C,D)
    k, v = k.unflatten(2, (n, C)), v.unflatten(2, (n, C))
    gates = _gates(decay, rows, before, wide, n, C, short)

    inside = (q.flatten(3, 4) @ k.transpose(-1, -2)).unflatten(3, (R, C))
    lower = torch.ones(C, C, dtype=torch.bool, device=q.device).tril(-1 if strict else 0)
    weigh = lower.to(wide) if gates is None else gates.pairs.masked_fill(~lower, 0)[:, :, :, None]
    out = (inside * weigh).flatten(3, 4) @ v

    added = (k if gates is None else k * gates.leaving[..., None]).transpose(-1, -2) @ v  # (B,G,n,D,E)
    entered = []
    for c in range(n):
        entered.append(state)
        kept = state if gates is None else state * gates.through[:, :, c, None, None]
        state = kept + added[:, :, c]
    reads = q if gates is None else q * gates.entering[:, :, :, None, :, None]
    out = out + reads.flatten(3, 4) @ torch.stack(entered, 2)
    return out.unflatten(3, (R, C)).transpose(2, 3).reshape(B, H, n * C, -1)[:, :, :T], state


class Gates(NamedTuple):
    """What is left on the way, factors in [0, 1]: from key to query in a chunk (B|1,G|1,n,C,C), from a key to the chunk's
    end and from its beginning to a query (..., n,C), and through it (..., n)."""

    pairs: Tensor
    leaving: Tensor
    entering: Tensor
    through: Tensor


def _gates(
    decay: Tensor | None, rows: Rows, before: Tensor | None, wide: torch.dtype, n: int, C: int, short: int
) -> Gates | None:
    if decay is None and rows.document is None:
        return None
    if decay is not None:
        step = decay.to(wide).clamp_min(FLOOR)
        step = step if rows.real is None else step.where(rows.real[:, None], 0.0)
        level = F.pad(step, (0, short)).unflatten(-1, (n, C)).cumsum(-1)
        lower = torch.ones(C, C, dtype=torch.bool, device=level.device).tril()
        pairs = (level[..., :, None] - level[..., None, :]).masked_fill(~lower, 0).exp()
        leaving, entering, through = (level[..., -1:] - level).exp(), level.exp(), level[..., -1].exp()
    else:
        assert rows.document is not None
        one = torch.ones(1, 1, n, C, dtype=wide, device=rows.document.device)
        pairs, leaving, entering, through = one[..., None], one, one, one[..., 0]
    if rows.document is not None:
        assert before is not None
        document = rows.document
        document = torch.cat([document, document[:, -1:].expand(-1, short)], 1) if short else document
        document = document[:, None].unflatten(-1, (n, C))  # (B,1,n,C)
        last = document[..., -1:]
        first = torch.cat([before[:, None, :, None], last[:, :, :-1]], 2)
        pairs = pairs * (document[..., :, None] == document[..., None, :])
        leaving, entering = leaving * (document == last), entering * (document == first)
        through = through * (first == last)[..., 0]
    return Gates(pairs, leaving, entering, through)
