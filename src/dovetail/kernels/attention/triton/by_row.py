"""What is added to scores where it depends on the query as well as on the distance (Shaw's keys, DeBERTa's positions).

`values` (B,H,T,W) has a row a query, an entry a distance from `reach` behind it to `onward` ahead, W = reach + onward + 1;
at the ends stands what is there and beyond. A row further down begins an entry further left: of a tile that is nearer
than both ends the entries are a block whose rows are W - 1 apart, read where it lies. In a tile beyond an end all keys of a
query get one number. A query's gradient there has one key an entry, so that it is stored and not added up, and all others
at the ends. DeBERTa's positions to content are the same of keys (`keyed`), whose gradient arises where keys hold the tile.
"""

# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from dovetail.kernels.attention.triton.tiles import added, entries


@triton.jit
def lines(values, n, N, reach, onward):  # type: ignore[no-untyped-def]
    """Where distance 0 of queries n stands, `values` being a head's; of those from N on, where that of the last."""
    return values + tl.minimum(n, N - 1).to(tl.int64) * (reach + onward + 1) + reach


@triton.jit
def line(entry, unit, CONTENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """What all keys beyond an end get: one number a query, or, of a table, one for all."""
    found = tl.load(entry)
    if CONTENT:
        found = found.to(tl.float32) * unit
    return found


@triton.jit
def term(  # type: ignore[no-untyped-def]
    table, away, reach, onward, unit, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TURNED: tl.constexpr,
    ASSEMBLY: tl.constexpr, CONTENT: tl.constexpr, BY_KEY: tl.constexpr,
):  # fmt: skip
    """What a tile (ROWS queries, COLUMNS keys; TURNED: keys, queries) gets whose first key is `away` from its first query.
    CONTENT: table has the `lines` of its queries; or, BY_KEY, of its keys."""
    if CONTENT:
        if TURNED:
            apart = tl.arange(0, ROWS)[:, None] - tl.arange(0, COLUMNS)[None, :]
            least, most = away - COLUMNS + 1, away + ROWS - 1
        else:
            apart = tl.arange(0, COLUMNS)[None, :] - tl.arange(0, ROWS)[:, None]
            least, most = away - ROWS + 1, away + COLUMNS - 1
        own = tl.expand_dims(table, 0 if TURNED != BY_KEY else 1)
        if (least >= -reach) & (most <= onward):
            found = _entry(own + away + apart.to(tl.int64), ASSEMBLY)
        else:
            found = _entry(own + tl.minimum(tl.maximum(away + apart, -reach), onward), ASSEMBLY)
        found *= unit
    else:
        found = added(table, away, reach, ROWS, COLUMNS, TURNED, ASSEMBLY)
    return found


@triton.jit
def term_at(  # type: ignore[no-untyped-def]
    table, i, j, reach, onward, unit, TURNED: tl.constexpr, ASSEMBLY: tl.constexpr, CONTENT: tl.constexpr, BY_KEY: tl.constexpr,
):  # fmt: skip
    """What any i and j get that broadcast against each other."""
    if CONTENT:
        own = tl.expand_dims(table, 0 if TURNED != BY_KEY else 1)
        found = _entry(own + tl.minimum(tl.maximum(j - i, -reach), onward), ASSEMBLY) * unit
    else:
        found = entries(table, i, j, reach, ASSEMBLY)
    return found


@triton.jit
def kept(d_lines, ds, away, reach, onward, unit):  # type: ignore[no-untyped-def]
    """Stores the gradient ds (queries, keys) of the entries that stand for one distance alone. A pair that is not seen has
    none, and may be as far apart as one that is: of another document."""
    here = (away > -reach) & (away < onward) & (ds != 0)
    found = (ds * (unit * 0.6931471805599453)).to(d_lines.dtype.element_ty)
    tl.store(d_lines[:, None] + away, found, mask=here)


@triton.jit
def ended(d_lines, left, right, within, reach, onward, unit):  # type: ignore[no-untyped-def]
    """Stores the gradient of both ends, sums of ds."""
    factor = unit * 0.6931471805599453
    tl.store(d_lines - reach, (left * factor).to(d_lines.dtype.element_ty), mask=within)
    tl.store(d_lines + onward, (right * factor).to(d_lines.dtype.element_ty), mask=within)


@triton.jit
def _entry(entry, ASSEMBLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """What stands there, in fp32. A load of Triton's own would go through shared memory to where the scores are."""
    if ASSEMBLY:
        if entry.dtype.element_ty.primitive_bitwidth == 16:
            found = tl.inline_asm_elementwise(
                "ld.global.nc.b16 $0, [$1];",
                "=h,l",
                [entry.to(tl.int64)],
                dtype=entry.dtype.element_ty,
                is_pure=True,
                pack=1,
            )
        else:
            found = tl.inline_asm_elementwise(
                "ld.global.nc.f32 $0, [$1];", "=f,l", [entry.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1
            )
    else:
        found = tl.load(entry)
    return found.to(tl.float32)
