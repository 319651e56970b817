"""Launches the kernels: forward, and the four of the backward. Tensors are (B,heads,T,width) with any strides."""

# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from dovetail.kernels.attention.coords import Span
from dovetail.kernels.attention.triton import backward as back
from dovetail.kernels.attention.triton import diagonals as sides
from dovetail.kernels.attention.triton import forward as ahead
from dovetail.kernels.attention.triton import sizes, tiles
from dovetail.kernels.attention.triton.shapes import like
from dovetail.kernels.chunks import ceil_div, padded, roomy

PRECISION = "tf32x3"  # of products of fp32 factors: on tensor cores, about as exact as in fp32 units ("ieee")
PAD = 384  # entries of which a table is constant before and behind: at least the rows and columns of a tile together
LENGTHS = 256  # what rows of normalisers are a multiple of: of every tile
PROGRAMS = 2048  # from which walks of diagonals are not cut further
LOG2E = 1.4426950408889634


Places = tuple[Tensor, Tensor] | None  # order and segment of queries (R,2,T) and keys (R,2,S), int32; R is B or 1


class Second(NamedTuple):
    """Queries (B,H,T,D) and keys (B,G,S,D) of the same tokens in another form, in which they see each other within `span`,
    of whose pairs none is in the first form's."""

    q: Tensor
    k: Tensor
    span: Span


class Rows(NamedTuple):
    """What is added to the score of query i and a key at distance d: factor · values[..., i, d + back], values (B,H,T,W); at
    the ends, what is there and beyond. keyed (B,H,S,W): the same of key j, factor · keyed[..., j, d + back]."""

    values: Tensor
    keyed: Tensor | None
    back: int
    factor: float


def forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, places: Places, span: Span, scale: float,
    second: Second | None = None, content: Rows | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B,H,T,E) in q's type and lse (B,H,T) in fp32. table (H,2·reach+1). places: None where a row is one segment."""
    (B, H, T, _), E = q.shape, v.shape[3]
    out, lse = like(q, H, E), q.new_empty(B, H, T, dtype=torch.float32)
    if not (q.numel() and k.numel()):  # the copy engine cannot be told of nothing
        return out.zero_(), lse.fill_(-torch.inf)
    q, k, v = dense(q), dense(k), dense(v)
    asked = _Asked(q, k, v, table, places, span, second, content)
    cut = asked.tiles("attend")
    with torch.cuda.device_of(q):
        ahead.attend[(ceil_div(T, cut.rows) * B * H,)](
            described(q, cut.rows), described(k, cut.columns), described(v, cut.columns), described(out, cut.rows),
            lse, asked.table, asked.keyed, *asked.placed(cut), H, T, k.shape[2], scale * LOG2E, *asked.bounds, *asked.terms, *asked.second(cut),
            EVEN=k.shape[2] % cut.columns == 0, **asked.common(cut),
        )  # fmt: skip
    return out, lse


def backward(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, places: Places,
    out: Tensor, lse: Tensor, span: Span, scale: float, second: Second | None = None, content: Rows | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v and the table (in fp32; empty without one) or the content's values, and of the second q and k if
    there are any. out, lse: the forward's, or those of a softmax over more keys than k, of which this is the part (`regions.merge`)."""
    (B, H, T, D), (G, S), E = q.shape, k.shape[1:3], v.shape[3]
    if not (q.numel() and k.numel()):
        return _nothing(q, k, v, table, second, content)
    q, k, v, out, d_out = dense(q), dense(k), dense(v), dense(out), dense(d_out)
    asked = _Asked(q, k, v, table, places, span, second, content)
    d_q, d_k, d_v = like(q, H, D), like(k, G, D), like(v, G, E)
    d_second = () if second is None else (like(q, H, D), like(k, G, D))
    d_q2, d_k2 = d_second or (None, None)
    length = ceil_div(T, LENGTHS) * LENGTHS
    level, delta = (q.new_empty(B, H, length, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(q):
        back.deltas[(length // 64 * B * H,)](
            described(out, 64), described(d_out, 64), lse.contiguous(),
            None if d_lse is None else d_lse.contiguous(), level, delta, H, T, length,
            E=asked.E, ROWS=64, LEVELS=d_lse is not None, num_warps=4,
        )  # fmt: skip
        cut = asked.tiles("keys")
        d_keyed = None if asked.keyed is None else torch.zeros_like(asked.keyed)
        back.keys[(ceil_div(S, cut.rows) * B * G,)](
            described(q, cut.columns), described(k, cut.rows), described(v, cut.rows), described(d_out, cut.columns),
            described(d_k, cut.rows), described(d_v, cut.rows), level, delta, asked.table, asked.keyed, d_keyed,
            *asked.placed(cut, turned=True), H, T, S, length, scale * LOG2E, scale, *asked.bounds, *asked.terms,
            None if d_k2 is None else described(d_k2, cut.rows),
            *asked.second(cut, turned=True), **asked.common(cut),
        )  # fmt: skip
        cut = asked.tiles("queries")
        blocks = ceil_div(T, cut.rows)
        ends = q.new_empty(2, B * H, blocks, dtype=torch.float32) if asked.far else None
        if asked.table is not None and content is not None:
            ends = torch.zeros_like(asked.table)  # all of its gradient; what no pair reads stays zero
        back.queries[(blocks * B * H,)](
            described(q, cut.rows), described(k, cut.columns), described(v, cut.columns), described(d_out, cut.rows),
            described(d_q, cut.rows), level, delta, asked.table, ends, asked.keyed, *asked.placed(cut),
            H, T, S, length, scale * LOG2E, scale, *asked.bounds, *asked.terms,
            None if d_q2 is None else described(d_q2, cut.rows), *asked.second(cut),
            EVEN=S % cut.columns == 0, **asked.common(cut),
        )  # fmt: skip
        if content is not None:
            assert ends is not None
            return d_q, d_k, d_v, ends, *([] if d_keyed is None else [d_keyed])
        if table is None:
            return d_q, d_k, d_v, q.new_empty(0, dtype=torch.float32), *d_second
        d_table = _diagonals(asked, q, k, v, d_out, level, delta, scale)
    if ends is not None:
        left, right = ends.view(2, B, H, -1).sum((1, 3))
        d_table[:, 0], d_table[:, -1] = left, right
    return d_q, d_k, d_v, d_table


def _nothing(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, second: Second | None, content: Rows | None
) -> tuple[Tensor, ...]:
    """`backward` where there are no queries or no keys."""
    found = tuple(like(t, *t.shape[1::2]).zero_() for t in (q, k, v))
    if content is not None:
        return *found, *(t.new_zeros(t.shape) for t in content[:2] if t is not None)
    d_table = q.new_zeros((0,) if table is None else table.shape, dtype=torch.float32)
    return *found, d_table, *(() if second is None else [t.clone() for t in found[:2]])


def _diagonals(
    asked: _Asked, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, level: Tensor, delta: Tensor, scale: float
) -> Tensor:
    """The gradient of a table (H,2·reach+1), without its ends where they stand for more than themselves."""
    (B, H, T, _), S, span = q.shape, k.shape[2], asked.span
    cut = asked.tiles("diagonals")
    tile, reach = cut.rows, asked.reach
    bound = reach - 1 if asked.far else reach
    least, most = -min(bound, T - 1), min(bound, S - 1)
    if asked.places is not None:  # padding may lie between tokens that are near each other
        least, most = 1 - T, S - 1
    elif span.before is not None and not span.sinks:
        least = max(least, -span.before)
    if asked.places is None and span.after is not None:
        most = min(most, span.after)
    d_table = q.new_zeros(H, 2 * reach + 1, dtype=torch.float32)
    lowest, highest = least // tile, (most + tile - 1) // tile
    if most < least:
        return d_table
    count, blocks = highest - lowest + 1, ceil_div(T, tile)
    parts = max(1, min(ceil_div(blocks, 8), PROGRAMS // (B * H * count)))
    sums = q.new_empty(parts, B * H, count, 2, tile, dtype=torch.float32)
    tensors = (*(described(x, cut.rows) for x in (q, k, v, d_out)), level, delta, asked.table, sums)
    walk = (level.shape[2], scale * LOG2E, *asked.bounds, lowest, count, blocks, ceil_div(blocks, parts))
    common = {n: x for n, x in asked.common(cut).items() if n not in _WALKED}
    if asked.places is None:
        sides.diagonals[(count * B * H, parts)](*tensors, H, S, *walk, TILE=tile, EVEN=S % tile == 0, **common)
    else:
        q_at, k_at, q_step, k_step = asked.stepped()
        sides.placed_diagonals[(count * B * H, parts)](
            *tensors, d_table, q_at, k_at, q_step, k_step, H, T, S, *walk, TILE=tile, **common
        )
    sums = sums.view(parts * B, H, count, 2, tile).sum(0)
    line = F.pad(sums[:, :, 0], (0, 0, 1, 0)) + F.pad(sums[:, :, 1], (0, 0, 0, 1))  # from (lowest - 1)·tile on
    start = (lowest - 1) * tile
    a, b = max(least, start, -bound), min(most, start + (count + 1) * tile - 1, bound)
    d_table[:, a + reach : b + 1 + reach] += line.flatten(1)[:, a - start : b + 1 - start]
    return d_table


# nothing to walks of diagonals
_WALKED = ("ROWS", "COLUMNS", "TABLE", "PLACED", "PAIR", "BACK2", "AHEAD2", "SINKS2", "CONTENT", "KEYED")


class _Asked:
    """What the kernels of one call have in common."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, places: Places, span: Span,
        second: Second | None = None, content: Rows | None = None,
    ):  # fmt: skip
        self.other = None if second is None else Second(dense(second.q), dense(second.k), _bounded(second.span))
        self.places, self.span, self.fan, self.dtype = places, _bounded(span), q.shape[1] // k.shape[1], q.dtype
        self.D, self.E = padded(q.shape[3]), padded(v.shape[3])
        self.reach = 0 if table is None else table.shape[1] // 2
        self.far = table is not None and sizes.ENDS and self.reach < max(q.shape[2], k.shape[2]) - 1
        self.table = None
        if table is not None:
            line = table.detach().to(torch.float32)[None] * LOG2E
            self.table = F.pad(line, (PAD, PAD), mode="replicate")[0].contiguous()
        self.content, self.keyed, onward, unit = content is not None, None, self.reach, 1.0
        if content is not None:
            self.table, self.reach, self.far = content.values.detach().contiguous(), content.back, True
            self.keyed = None if content.keyed is None else content.keyed.detach().contiguous()
            onward, unit = content.values.shape[3] - 1 - self.reach, content.factor * LOG2E
        self.bounds = (self.span.before or 0, self.span.after or 0, self.span.sinks, self.reach)
        self.terms = (onward, unit)
        self.roomy = roomy(q.device)

    def tiles(self, kernel: str) -> sizes.Tiles:
        """Those of `sizes`, for this call."""
        named = kernel
        if self.content:
            named = f"{kernel} rows"
        elif self.table is not None:
            named = f"{kernel} table"
        elif self.other is not None:
            named = f"{kernel} pair"
        elif self.span.before is not None:
            named = f"{kernel} band"
        cut = sizes.tiles(named, max(self.D, self.E), self.dtype, self.roomy)
        assert cut.rows + cut.columns <= PAD and LENGTHS % cut.rows == LENGTHS % cut.columns == 0
        return cut

    def stepped(self) -> tuple[Tensor, Tensor, int, int]:
        """Places of queries and keys, and what leads from one row of them to the next."""
        assert self.places is not None
        q, k = self.places
        q_step, k_step = (t[0].numel() if t.shape[0] > 1 else 0 for t in (q, k))
        return q, k, q_step, k_step

    def placed(self, cut: sizes.Tiles, turned: bool = False) -> tuple[Tensor | int | None, ...]:
        """Places, and which tiles those of `cut` meet: of keys, or where it holds keys (turned) of queries."""
        if self.places is None:
            return None, None, None, 0, 0, 0
        q, k, q_step, k_step = self.stepped()
        found = self._cuts(cut, self.span, turned)
        return q, k, found, q_step, k_step, found.shape[1] if found.shape[0] > 1 else 0

    def second(self, cut: sizes.Tiles, turned: bool = False) -> tuple[Any, ...]:
        """What kernels take of the second form. turned: they hold its keys, and walk its queries."""
        if self.other is None:
            return None, None, None, 0, 0, 0
        q, k, span = self.other
        rows, columns = (cut.columns, cut.rows) if turned else (cut.rows, cut.columns)
        found = None if self.places is None else self._cuts(cut, span, turned)
        return described(q, rows), described(k, columns), found, span.before or 0, span.after or 0, span.sinks

    def _cuts(self, cut: sizes.Tiles, span: Span, turned: bool) -> Tensor:
        q, k, q_step, k_step = self.stepped()
        own, other = ((k, k_step), (q, q_step)) if turned else ((q, q_step), (k, k_step))
        rows, blocks = q.shape[0], ceil_div(own[0].shape[2], cut.rows)
        found = q.new_empty(rows, blocks, 5)
        tiles.cuts[(blocks * rows,)](
            own[0], other[0], found, own[0].shape[2], other[0].shape[2], own[1], other[1],
            span.before or 0, span.after or 0, span.sinks, ROWS=cut.rows, COLUMNS=cut.columns, TURNED=turned,
            BACK=span.before is not None, AHEAD=span.after is not None, SINKS=span.sinks > 0,
        )  # fmt: skip
        return found

    def common(self, cut: sizes.Tiles) -> dict[str, Any]:
        other = Span() if self.other is None else self.other.span
        return {
            "D": self.D, "E": self.E, "ROWS": cut.rows, "COLUMNS": cut.columns, "FAN": self.fan, "PAD": PAD,
            "BACK": self.span.before is not None, "AHEAD": self.span.after is not None, "SINKS": self.span.sinks > 0,
            "TABLE": self.table is not None, "FAR": self.far, "PLACED": self.places is not None, "PRECISION": PRECISION, "ASSEMBLY": _assembly(), "CONTENT": self.content, "KEYED": self.keyed is not None,
            "PAIR": self.other is not None, "BACK2": other.before is not None, "AHEAD2": other.after is not None, "SINKS2": other.sinks > 0,
            "num_warps": cut.warps, "num_stages": cut.stages,
        }  # fmt: skip


def _bounded(span: Span) -> Span:
    """Kernels add tokens' numbers to bounds in 32 bits, and 2^31 - 1 is a common way to say that there is no window."""
    before, after = (None if n is None else max(-(2**30), min(n, 2**30)) for n in span[:2])
    return span._replace(before=before, after=after, sinks=min(span.sinks, 2**30))


class _Description(TensorDescriptor):
    """One whose tensor is from `dense` or `like`: of what the constructor would ask again nothing is left."""

    def __post_init__(self) -> None:
        pass


def described(x: Tensor, rows: int) -> TensorDescriptor:
    """x (B,heads,T,width) as the copy engine reads it, `rows` of one head at a time."""
    shape = list(x.shape)
    strides = [step if n > 1 else shape[3] for n, step in zip(shape, x.stride(), strict=True)]
    return _Description(x, shape, strides, [1, 1, rows, padded(shape[3])])


def dense(x: Tensor) -> Tensor:
    """x itself where the copy engine can read it: aligned to 16 bytes, and none of its strides zero."""
    unit, (*steps, last) = 16 // x.element_size(), x.stride()
    assert x.numel() and x.shape[3] % unit == 0, "the copy engine moves whole 16 bytes"
    fits = last == 1 and x.data_ptr() % 16 == 0
    for n, step in zip(x.shape, steps, strict=False):
        fits = fits and (n == 1 or (step > 0 and step % unit == 0))
    return x if fits else x.clone(memory_format=torch.contiguous_format)


@cache
def _assembly() -> bool:
    """Whether tables are read by NVIDIA's own instruction: Triton would send such a load through shared memory."""
    return torch.version.hip is None and not knobs.runtime.interpret
