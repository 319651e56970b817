"""Which kernel runs an attention, and why: decided from static facts, never from data."""

from __future__ import annotations

from functools import lru_cache

import torch

from dovetail.kernels import twins
from dovetail.kernels.attention import triton
from dovetail.kernels.attention.bands import TILE
from dovetail.kernels.attention.coords import BoundMask, Coords, Rule, Side
from dovetail.kernels.attention.score import Score
from dovetail.kernels.installed import TRITON
from dovetail.kernels.plan import Plan

_BAND = 64  # queries from which bands win on a CPU
_SPARSE = (
    0.35  # share of tiles below which bands win on a CPU in fp32: a tile costs them up to twice what it costs SDPA
)
_TILE = 256  # widest head of which FlexAttention holds a tile of outputs


def plan(
    *,
    device: str,
    dtype: torch.dtype,
    queries: int,
    width: int = 0,
    mask: BoundMask | None,
    score: Score | None,
    dropout: float = 0.0,
) -> Plan:
    """Chooses the path for one attention call. All arguments are static in a built model. width: of the widest of
    a head's query, key and value; 0 where that is no more than usual."""
    if twins.asked():
        return Plan("reference", twins.WHY)
    plain = score is None or score.plain
    hides = mask is not None and not mask.full
    if plain and device == "cpu" and dtype == torch.bfloat16 and queries >= _BAND and not dropout:
        return Plan("bands", "bf16 on CPU: bands of queries over a scratch that all layers use")
    if device == "cuda" and triton.OWN and not dropout and TRITON:
        if "decode" in triton.OWN and triton.decodes(mask, score, queries, width, dtype):
            return Plan(
                "split keys", "few queries: own kernels, which split the keys among programs and read what is filled"
            )
        kind = triton.kind(mask, score, width, dtype)
        if kind in triton.OWN:
            return Plan("triton", _WHY[kind])
    if plain and not hides:
        return Plan("sdpa", "nothing is masked: fused attention without a mask")
    if plain and mask is not None and mask.causal:
        return Plan("sdpa", "plain causal over aligned tokens: fused attention, is_causal")
    if score is not None and score.value_terms is not None:
        return Plan("tiled", "value terms need the probabilities: plain attention in tiles of queries")
    if plain and device == "cuda" and queries >= _flex_from() and not dropout and width <= _TILE:
        return Plan("flex", "a mask beyond causal on CUDA: FlexAttention skips the empty tiles")
    share = 1.0
    if plain and device == "cpu" and queries >= 2 * TILE and not dropout and not torch.compiler.is_compiling():
        assert mask is not None
        share = visited(mask.rule, mask.at.q.order.shape[1], mask.at.k.order.shape[1])
    if share <= _SPARSE:
        return Plan(
            "bands", f"a mask that leaves all but {share:.0%} of the tiles empty: bands of queries, which skip them"
        )
    if plain:
        return Plan("sdpa", "a mask beyond causal: fused attention with the mask as booleans")
    if score is not None and score.gridded:
        return Plan("sdpa", "terms of rows and columns: fused attention over queries and keys wider by their number")
    if score is not None and score.cap is None:
        return Plan("sdpa", "additive terms: fused attention with the terms as a bias")
    return Plan("tiled", "a soft cap is not additive: plain attention in tiles of queries, recomputed in the backward")


_WHY = {
    "table": "a score that depends on the distance: own kernels, whose table is O(T)",
    "rows": "a score that depends on the query and the distance: own kernels, which read its rows where they lie",
    "documents": "documents or padding: own kernels, which pass over tiles that hold nothing",
    "window": "a mask that is a band of distances: own kernels, which walk its tiles alone",
    "dilated": "a mask of every n-th token: own kernels, to which tokens n apart are a row of their own",
    "plain": "own kernels",
}


def _flex_from() -> int:
    """Queries from which FlexAttention is worth its compilation: seconds for every new shape, mask and mode of autograd,
    where torch.compile is not making the whole model's graph anyway. Rows of one length come back in training alone."""
    if torch.compiler.is_compiling():
        return 128
    return 1024 if torch.is_grad_enabled() else 8192


def visited(rule: Rule, queries: int, keys: int) -> float:
    """Share of the tiles that hold anything where the queries are the last of `keys` tokens, none padded or packed."""
    return _visited(rule, -(-queries // TILE), -(-keys // TILE))


@lru_cache(maxsize=256)
def _visited(rule: Rule, rows: int, columns: int) -> float:
    order = torch.arange(columns * TILE, device="cpu")[None]
    q = Side(order[:, -rows * TILE :] if rows <= columns else torch.arange(rows * TILE, device="cpu")[None])
    return BoundMask(rule, Coords(q, Side(order))).tiles(TILE).float().mean().item()
