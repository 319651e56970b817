"""Mixed chunk attention on a GPU: the pairs inside chunks and the matrix of the others in one kernel, chunks side by side.

out_i = Σ_{j near i} relu(f q_i·k_j)² v_j + S_i ᵀ q'_i with S the sum of k' vᵀ over earlier chunks, as linear attention
sums it for the starts of its spans, here chunks. The gradients have two forms: `reads` is the output and, with queries and
keys, values and gradients in each other's roles and time reversed, dv; `slopes` is dq and dq', and so dk and dk'. No
weights are kept, and no states: they are summed again in the backward, since they would take more memory than v.

Chunks that begin anywhere (rows padded or packed, or a size that no tile divides) lie across spans. Then pairs go
back to a border before the chunks of a span's tokens, where the state is read, and those of two chunks count linearly.

Products have factors in the inputs' type; sums are in fp32, and the state is read as its quotient by the chunk's size,
which fits fp16; the rest of 1/n_i, the number of earlier chunks, divides q' before.
"""

# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dovetail.kernels.chunks import ceil_div, padded, roomy, without_autocast
from dovetail.kernels.linear_attention import triton as linear
from dovetail.kernels.linear_attention.chunked import Rows
from dovetail.kernels.linear_attention.spans import sizes
from dovetail.kernels.mixed_chunk import triton_kernels as kernels
from dovetail.kernels.operation import operation

PRECISION = "ieee"  # of products of fp32 factors


class Tiles(NamedTuple):
    """rows, keys: tokens of a pair of tiles. columns: values at a time. warps, stages: of a program, tiles on the way to it."""

    rows: int
    keys: int
    columns: int
    warps: int
    stages: int


# By kernel, and whether products are on tensor cores. Vectors wider than 128, and chunks that begin anywhere, take half.
TILES = {
    ("reads", True): Tiles(128, 64, 256, 8, 3),
    ("slopes", True): Tiles(128, 64, 64, 8, 3),
    ("reads", False): Tiles(32, 16, 32, 4, 1),
    ("slopes", False): Tiles(32, 16, 32, 4, 1),
}
CUT = 64  # tokens, of which a span is a multiple where chunks begin anywhere
DEPTH = 32  # rows of a state that `reads` takes at a time, since columns of it all would fill the registers


class Places(NamedTuple):
    """Of rows whose chunks begin anywhere, (B,T) int32: where a token's chunk begins; documents of queries and of keys,
    as linear attention has them: those of padding are its neighbour's and -1."""

    begin: Tensor
    queries: Tensor
    keys: Tensor


def mixed_chunk(
    heads: tuple[Tensor, ...], v: Tensor, chunk: int, causal: bool, scale: float, order: Tensor, segments: Tensor | None,
    plain: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """(B,T,E) in `dtype`, of at most 32 bits, in which products are. Rows that are not `plain` are causal. See the package."""
    (B, T, _), wide = v.shape, torch.promote_types(dtype, torch.float32)
    quad_q, quad_k, lin_q, lin_k = heads
    places = None
    if causal:
        before = torch.arange(T, device=v.device)[None] // chunk if plain else order // chunk
        lin_q = lin_q.to(wide) / before.clamp_min(1).to(wide)[..., None]
        if not plain or chunk % 16:
            places = _places(B, T, chunk, order, segments)
    else:
        lin_q = lin_q.to(wide) * (chunk / T)
    given = [t.to(dtype) for t in (quad_q, quad_k, lin_q, lin_k, v)]
    return _run(*given, *(places or (None, None, None)), chunk, causal, scale)


def _places(B: int, T: int, chunk: int, order: Tensor, segments: Tensor | None) -> Places:
    real = torch.ones(B, T, dtype=torch.bool, device=order.device) if segments is None else segments.expand(B, T) >= 0
    document = torch.zeros(B, T, dtype=torch.int32, device=order.device)
    if segments is not None:
        found = Rows.of(segments.expand(B, T)).document
        assert found is not None
        document = found.to(torch.int32)
    at = torch.arange(T, device=order.device)
    first = real & (order.expand(B, T) % chunk == 0)
    begin = torch.where(first, at, 0).cummax(1).values
    # A mask may lie token by token, and `where` follows it.
    return Places(*(t.to(torch.int32).contiguous() for t in (begin.where(real, T), document, document.where(real, -1))))


@operation("mixed_chunk")
def _run(
    quad_q: Tensor, quad_k: Tensor, lin_q: Tensor, lin_k: Tensor, v: Tensor,
    begin: Tensor | None, queries: Tensor | None, keys: Tensor | None, chunk: int, causal: bool, scale: float,
) -> Tensor:  # fmt: skip
    quad_q, quad_k, lin_q, lin_k, v = map(_dense, (quad_q, quad_k, lin_q, lin_k, v))
    call, out = _Call(v, begin, queries, keys, chunk, causal, scale), _empty(v)
    call.reads(quad_q, quad_k, v, lin_q, lin_k, call.states(lin_k, v, reverse=False), out, reverse=False)
    return out


@operation("mixed_chunk_backward")
def _run_backward(
    quad_q: Tensor, quad_k: Tensor, lin_q: Tensor, lin_k: Tensor, v: Tensor,
    begin: Tensor | None, queries: Tensor | None, keys: Tensor | None, chunk: int, causal: bool, scale: float, up: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    quad_q, quad_k, lin_q, lin_k, v, up = map(_dense, (quad_q, quad_k, lin_q, lin_k, v, up))
    call = _Call(v, begin, queries, keys, chunk, causal, scale)
    dq, dk, dlq, dlk, dv = map(_empty, (quad_q, quad_k, lin_q, lin_k, v))
    states = call.states(lin_k, v, reverse=False)
    call.slopes(quad_q, quad_k, lin_k, up, v, states, dq, dlq, reverse=False)
    del states
    states = call.states(lin_q, up, reverse=True)
    call.slopes(quad_k, quad_q, lin_q, v, up, states, dk, dlk, reverse=True)
    call.reads(quad_k, quad_q, up, lin_k, lin_q, states, dv, reverse=True)
    return dq, dk, dlq, dlk, dv


@_run.register_fake
def _(quad_q, quad_k, lin_q, lin_k, v, *_):  # type: ignore[no-untyped-def]
    return _empty(v)


@_run_backward.register_fake
def _(quad_q, quad_k, lin_q, lin_k, v, *_):  # type: ignore[no-untyped-def]
    return tuple(map(_empty, (quad_q, quad_k, lin_q, lin_k, v)))


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.chunk, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, up: Tensor):  # type: ignore[no-untyped-def]
    return *_run_backward(*ctx.saved_tensors, ctx.chunk, ctx.causal, ctx.scale, up), *(None,) * 6


_run.register_autograd(_gradients, setup_context=_keep)


class _Call:
    """One call's spans, and its launches."""

    def __init__(
        self, v: Tensor, begin: Tensor | None, queries: Tensor | None, keys: Tensor | None, chunk: int, causal: bool,
        scale: float,
    ):  # fmt: skip
        self.B, self.T, self.E = v.shape
        self.causal, self.tensor_cores = causal, v.dtype != torch.float32
        self.span = chunk if begin is None else -(-chunk // CUT) * CUT
        self.N = -(-self.T // self.span)
        self.factor, self.shrink = scale * chunk**-0.5, 1 / chunk
        self.gates = linear.Gates(None, queries, keys)
        self.places = (begin, queries, keys)
        self.edges: dict[bool, Tensor | None] = {False: None, True: None}
        if begin is not None:
            self._cut(begin)

    def _cut(self, begin: Tensor) -> None:
        """The spans (B,N) whose starts the pairs of a span go back to; and the first span that a span's keys have no pair in."""
        own = torch.arange(self.N, dtype=torch.int32, device=begin.device)
        short = self.N * self.span - self.T
        least = torch.nn.functional.pad(begin, (0, short), value=self.T).unflatten(1, (self.N, -1)).amin(2) // self.span
        back = least.minimum(own).flip(1).cummin(1).values.flip(1).contiguous()
        onwards = torch.searchsorted(back, own.expand(self.B, -1).contiguous(), right=True)
        self.edges = {False: back, True: onwards.to(torch.int32)}

    def states(self, b: Tensor, c: Tensor, *, reverse: bool) -> Tensor:
        """Σ b cᵀ before each span, in the order of the walk, (B,1,N,D,E) in fp32; all of it / chunk, (B,D,E), where not causal."""
        if not self.causal:
            with without_autocast(b):
                return (b * self.shrink).mT @ c
        cut = sizes(self.B, self.T, max(b.shape[2], self.E), b.dtype)
        cut = cut._replace(span=self.span, tile=min(cut.tile, self.span & -self.span))
        return linear.entered(b[:, None], c[:, None], 1, self.gates, None, 0, None, cut, reverse=reverse)

    def reads(
        self, a: Tensor, b: Tensor, c: Tensor, la: Tensor, lb: Tensor, states: Tensor, out: Tensor, *, reverse: bool
    ) -> None:
        """out_i = Σ_{j near i} relu(f a_i·b_j)² c_j + la_i state."""
        tiles, common = self._common("reads", a)
        columns = min(tiles.columns, padded(self.E))
        with torch.cuda.device_of(a):
            kernels.reads[(self.B * self.N * ceil_div(self.span, tiles.rows) * ceil_div(self.E, columns),)](
                a, b, c, la, lb, states, out, *self.places, self.edges[reverse],
                *_strides(a, b, c, la, lb, out), *self._sizes(), COLUMNS=columns, DEPTH=min(DEPTH, common["WIDE"]),
                REVERSE=reverse, **common,
            )  # fmt: skip

    def slopes(
        self, a: Tensor, b: Tensor, lb: Tensor, up: Tensor, c: Tensor, states: Tensor, da: Tensor, dla: Tensor, *,
        reverse: bool,
    ) -> None:  # fmt: skip
        """The gradients of a and la in `reads`, of whose output `up` is the gradient."""
        tiles, common = self._common("slopes", a)
        columns = min(tiles.columns, padded(self.E))
        with torch.cuda.device_of(a):
            kernels.slopes[(self.B * self.N * ceil_div(self.span, tiles.rows),)](
                a, b, lb, up, c, states, da, dla, *self.places, self.edges[reverse],
                *_strides(a, b, lb, up, c, da, dla), *self._sizes(), COLUMNS=columns, REVERSE=reverse, **common,
            )  # fmt: skip

    def _sizes(self) -> tuple[int, int, int, int, float, float]:
        return self.T, self.N, self.N if self.causal else 1, self.span, self.factor, self.shrink if self.causal else 1.0

    def _common(self, kernel: str, a: Tensor) -> tuple[Tiles, dict[str, Any]]:
        """The tiles that fit the device and the span, and what both kernels are compiled for."""
        tiles, wide, longest = TILES[kernel, self.tensor_cores], padded(a.shape[2]), padded(self.span)
        if wide > 128:
            tiles = tiles._replace(rows=max(16, tiles.rows // 2), columns=max(32, tiles.columns // 2))
        if wide > 128 or self.places[0] is not None:
            tiles = tiles._replace(keys=max(16, tiles.keys // 2))
        if not roomy(a.device):
            rows, keys, columns = (max(16, n // 2) for n in tiles[:3])
            tiles = Tiles(rows, keys, columns, tiles.warps, 1)
        tiles = tiles._replace(rows=min(tiles.rows, longest), keys=min(tiles.keys, longest))
        even = self.T % self.span == self.span % tiles.rows == self.span % tiles.keys == 0
        return tiles, {
            "D": a.shape[2], "E": self.E, "WIDE": wide, "ROWS": tiles.rows, "KEYS": tiles.keys,
            "CAUSAL": self.causal, "RAGGED": self.places[0] is not None, "EVEN": even, "PRECISION": PRECISION,
            "num_warps": tiles.warps, "num_stages": tiles.stages,
        }  # fmt: skip


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _strides(*tensors: Tensor) -> list[int]:
    """Of rows and of tokens, of each."""
    return [n for t in tensors for n in t.stride()[:2]]
