"""Mixed chunk attention: relu² attention inside chunks, linear attention to the tokens of other chunks; one head.

Hua et al. 2022 (FLASH), section 3.2. B batch, T tokens; queries and keys (B,T,D), values (B,T,E). Chunks of `chunk`
tokens are counted from the first token of each document, so that a document gives the same alone, padded or packed.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from dovetail.kernels import twins
from dovetail.kernels.chunks import autocasts
from dovetail.kernels.installed import TRITON
from dovetail.kernels.mixed_chunk import chunked, reference
from dovetail.kernels.mixed_chunk.step import Past, after, step
from dovetail.kernels.plan import Plan

WIDEST = 256  # of queries and keys, of which a GPU's tiles hold whole ones; values may have any width


class Heads(NamedTuple):
    """The four views of the shared base, (B,T,D) each: inside chunks, and across them."""

    quad_q: Tensor
    quad_k: Tensor
    lin_q: Tensor
    lin_k: Tensor


def mixed_chunk(
    heads: Heads,
    v: Tensor,
    *,
    chunk: int,
    causal: bool,
    scale: float,
    order: Tensor,
    segments: Tensor | None = None,
    plain: bool = False,
    past: Past | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Past | None]:
    """(out (B,T,E), what to go on from, or None where `past` is):

        Σ_{j near i} relu(scale · quad_q_i·quad_k_j)² v_j / chunk  +  1/n_i Σ_{j across} (lin_q_i·lin_k_j) v_j

    near: in i's chunk, and j <= i where causal. across: in an earlier chunk where causal, else anywhere in i's
    document; n_i is how many these are (the linear part is 0 where there are none).

    order (B|1,T): real tokens of the same document before each. segments (B|1,T): documents, negative for padding; they
    may be interleaved where not causal. plain: a static promise that order is 0..T-1 and segments is None. past: causal
    rows go on from it; then segments may only tell padding. dropout: on the weights inside chunks. Everything is summed
    in fp32 or better, in which `out` is; the Triton form gives it in the type of its products, the widest of the inputs'
    or, under autocast, v's.
    """
    assert past is None or causal, "only causal rows go on"
    if v.shape[1] == 1 and past is not None and not plain:
        return step(*heads, v, past, order, segments, chunk, scale)
    dtype = v.dtype if autocasts(v) else reduce(torch.promote_types, (t.dtype for t in (*heads, v)))
    chosen = plan(
        v.shape[1], chunk=chunk, causal=causal, segments=not plain, state=past is not None, device=v.device.type,
        width=heads.quad_q.shape[2], dtype=dtype, dropout=dropout > 0,
    )  # fmt: skip
    if chosen.path == "reference":
        number = None if plain else segments
        out = reference.mixed_chunk(*heads, v, chunk=chunk, causal=causal, scale=scale, order=order, segments=number)
    elif chosen.path == "triton":
        from dovetail.kernels.mixed_chunk import triton

        out = triton.mixed_chunk(heads, v, chunk, causal, scale, order, segments, plain, dtype)
    elif plain:
        out = chunked.plain(*heads, v, chunk, causal, scale, dropout)
    else:
        out = chunked.ragged(*heads, v, chunk, causal, scale, order, segments, past, dropout)
    return out, None if past is None else after(heads.quad_k, heads.lin_k, v, past, order, segments, chunk)


def plan(
    tokens: int,
    *,
    chunk: int,
    causal: bool,
    segments: bool,
    state: bool,
    device: str = "cpu",
    width: int = 0,
    dtype: torch.dtype = torch.float32,
    dropout: bool = False,
) -> Plan:
    """tokens: at once. segments: whether rows are padded or packed, or go on. state: whether decoding. width: of queries
    and keys. dtype: of the products. dropout: whether weights are dropped."""
    if twins.asked() and not state and not dropout:
        return Plan("reference", twins.WHY)
    if state and tokens == 1:
        return Plan("recurrent", "one token: its own chunk's keys, and one product with the matrix of the earlier ones")
    fits = device == "cuda" and width <= WIDEST and dtype != torch.float64 and TRITON
    torch_only = _torch_only(causal, segments, state, dropout)
    if fits and not torch_only:
        return Plan("triton", f"on CUDA: chunks of {chunk} side by side, their weights in registers")
    note = f"; {torch_only}, which the Triton form has not" if fits else ""
    if segments:
        return Plan(
            "chunked", f"chunks of {chunk} begin with documents: tiles of so many, each beside its neighbours{note}"
        )
    how = "a sum of matrices from chunk to chunk" if causal else "one matrix of all chunks"
    return Plan("chunked", f"products inside chunks of {chunk}, {how}{note}")


def _torch_only(causal: bool, segments: bool, state: bool, dropout: bool) -> str:
    """What of a call only the torch form does."""
    if dropout:
        return "dropout"
    if segments and state:
        return "rows that go on from a state"
    return "documents both ways" if segments and not causal else ""


__all__ = ["Heads", "Past", "mixed_chunk", "plan", "reference"]
