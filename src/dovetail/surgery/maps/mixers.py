"""One mixer for another: maps to queries, keys and values, and the one behind the heads, go to those of the same name.

What is a query, a key or a value is said by each fused map itself (`Linear.parts`), so no pair of mixers is named here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dovetail.parts.weights import Linear
from dovetail.spec import Spec
from dovetail.spec.paths import brief
from dovetail.spec.spec import field_category
from dovetail.surgery.maps.base import Exactness, Mapped, Place, Rows, map_entries, relative_error, weight_map

# Fields that change weights, not what is done with them, or nothing outside training.
_SIZES = {"heads", "kv_heads", "value_heads", "head_dim", "value_dim", "bias", "dropout"}


@dataclass(frozen=True)
class Piece:
    """Rows start..stop of the fused map `name`. role: "query", "key", "value", or another with its number.

    width: of one of the heads that they are; None where they are none.
    """

    role: str
    name: str
    start: int
    stop: int
    width: int | None


@dataclass(frozen=True)
class Heads:
    """What a mixer reads and writes by heads. count: of those that it writes; width of each: that of its values.

    Where a role has fewer heads than that, neighbours share one. out: the map behind them.
    """

    count: int
    key_width: int
    value_width: int
    pieces: Mapping[str, Piece]
    out: str

    def __str__(self) -> str:
        return f"heads={self.count}, head_dim={self.key_width}, value_dim={self.value_width}"


@dataclass
class _Carried:
    """A map's result while it grows. old, new: of what is pooled, by name of the tensor."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    drawn: Rows = field(default_factory=dict)
    pooled: Rows = field(default_factory=dict)
    old: dict[str, list[Tensor]] = field(default_factory=dict)
    new: dict[str, list[Tensor]] = field(default_factory=dict)
    roles: list[str] = field(default_factory=list)
    exact: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def heads_of(module: Any) -> Heads | None:
    """The heads of a mixer's module; None where it reads no queries, keys or values, such as an LSTM."""
    width, value_width = getattr(module, "head_dim", None), getattr(module, "value_dim", None)
    maps = {name: m for name, m in module.named_children() if isinstance(m, Linear)}
    outs = [name for name, m in maps.items() if m.parts[0][0] == "residual"]
    widths = {"query": width, "key": width, "value": value_width or width}
    pieces: dict[str, Piece] = {}
    for name, linear in maps.items():
        start = 0
        for number, (role, rows) in enumerate(linear.parts):
            key = role if role in widths else f"{name}.{number}"
            pieces[key] = Piece(key, name, start, start + rows, widths.get(role))
            start += rows
    if width is None or len(outs) != 1 or not pieces.keys() & widths.keys():
        return None
    value_width = widths["value"]
    assert value_width is not None
    return Heads(maps[outs[0]].in_features // value_width, width, value_width, pieces, outs[0])


@weight_map(
    "mixer",
    "*",
    "*",
    gives=("exact", "approximate", "reinitialised"),
    source="Kasai et al. 2021 (T2R), section 3; Zhang et al. 2024 (LoLCATs), section 3; "
    "Wang et al. 2024 (Mamba in the Llama), section 2.2",
)
def projections(old: Spec, new: Spec, tensors: Mapping[str, Tensor], place: Place) -> Mapped | None:
    """Any mixer of heads for any other: the maps to queries, keys and values and the one behind the heads are carried
    by their names. What the new mixer has beside them (gates, decays, convolutions, feature maps) starts anew, unless
    the old one has it by the same name and shape. The function is another, so the class is approximate: no bound.

    Fewer heads of a sort than before: the mean of those that share one; more: repeated, which is exact. Heads of another
    number or width share nothing. A bias that comes starts at zero; one that goes is lost. The same mixer with other
    numbers of key/value heads alone is exact where they are repeated.
    """
    before, after, same = heads_of(place.old), heads_of(place.module), old.kind == new.kind
    if before is None or after is None:
        without = new.kind if after is None else old.kind
        why = f"no map leads from {old.kind!r} to {new.kind!r}: {without} does not read the stream into heads of queries, keys and values"
        return _optioned(old, new, tensors, place) if same else Mapped({}, "reinitialised", why)
    found = _Carried()
    for name in dict.fromkeys(piece.name for piece in after.pieces.values()):
        _read(found, name, before, after, tensors, place, same)
    wanted, there = (sorted(set(heads.pieces) & {"query", "key", "value"}) for heads in (after, before))
    unlike = [role for role in wanted if role not in found.roles]
    if unlike == wanted and "out" not in found.roles:
        return Mapped({}, "reinitialised", f"heads of another number or width: {after}, where {old.kind} has {before}")
    _others(found, before, after, tensors, place)
    if "out" not in found.roles:
        unlike.append("out")
    found.lost += [f"{role} starts anew" for role in unlike]
    found.lost += [f"{role} is dropped" for role in there if role not in wanted]
    changed = _changed(old, new) if same else [f"{new.kind} in place of {old.kind}"]
    if same and not (found.exact or found.lost or changed):
        return None  # only the position or the dropout is another: the weights are carried as they are
    errors = {name: relative_error(torch.cat(found.old[name]), torch.cat(found.new[name])) for name in found.old}
    said = [f"{', '.join(found.roles)} are carried"] if not same else []
    words = "; ".join(said + found.exact + found.lost + [f"{what}: no bound" for what in changed])
    whole = {name: [(0, t.shape[0])] for name, t in found.tensors.items()}
    exactness: Exactness = "approximate" if found.lost or changed else "exact"
    return Mapped(found.tensors, exactness, words, found.pooled if same else whole, found.drawn, errors)


def _optioned(old: Spec, new: Spec, tensors: Mapping[str, Tensor], place: Place) -> Mapped | None:
    """A mixer without heads and with other options: the weights that fit as they are, which do something else."""
    shapes = {name: p.shape for name, p in place.module.named_parameters()}
    kept = {name: t for name, t in tensors.items() if shapes.get(name) == t.shape}
    changed = [f"{what}: no bound" for what in _changed(old, new)]
    return Mapped(kept, "approximate", "; ".join(changed)) if changed and kept else None


def _read(
    found: _Carried, name: str, before: Heads, after: Heads, tensors: Mapping[str, Tensor], place: Place, same: bool
) -> None:
    """One map of the new mixer that reads the stream, made of the pieces that the old one has."""
    linear, into = place.module.get_submodule(name), [p for p in after.pieces.values() if p.name == name]
    if name == after.out:
        _write(found, before, after, tensors, place)
        return
    taken = {p.role: before.pieces[p.role] for p in into if p.role in before.pieces and (p.width or same)}
    taken = {role: p for role, p in taken.items() if _fits(p, after.pieces[role], before, after, tensors, linear)}
    if not taken:
        return
    some = tensors[f"{next(iter(taken.values())).name}.weight"]
    for kind in ("weight", "bias"):
        tensor = f"{name}.{kind}"
        drawn = getattr(linear, kind)
        if drawn is None:
            _bias_lost(found, name, [p.name for p in taken.values()], tensors)
            continue
        parts: list[Tensor] = []
        for piece in into:
            start = drawn.detach()[piece.start : piece.stop].to(some)
            source = taken.get(piece.role)
            if source is None:
                found.lost += [f"{piece.stop - piece.start} rows of {name} start anew"] if kind == "weight" else []
                found.drawn.setdefault(tensor, []).append((piece.start, piece.stop))
                parts.append(start)
                continue
            rows = tensors.get(f"{source.name}.{kind}")
            if rows is None:
                said = f"a bias of {name} starts at zero"
                found.exact += [] if said in found.exact else [said]
                parts.append(torch.zeros_like(start))
                continue
            rows = rows[source.start : source.stop] * _ratio(place, source.name, name)
            parts.append(_regrouped(found, tensor, piece, rows, kind == "weight"))
        found.tensors[tensor] = torch.cat(parts)
    found.roles += [role for role in taken if role in ("query", "key", "value")]


def _write(found: _Carried, before: Heads, after: Heads, tensors: Mapping[str, Tensor], place: Place) -> None:
    """The map behind the heads."""
    linear = place.module.get_submodule(after.out)
    weight, bias = (tensors.get(f"{before.out}.{kind}") for kind in ("weight", "bias"))
    alike = (before.count, before.value_width) == (after.count, after.value_width)
    if weight is None or not alike or weight.shape != linear.weight.shape:
        return
    ratio = _ratio(place, before.out, after.out)
    found.tensors[f"{after.out}.weight"] = weight * ratio
    if linear.bias is not None:
        found.tensors[f"{after.out}.bias"] = weight.new_zeros(weight.shape[0]) if bias is None else bias * ratio
        found.exact += ["a bias of out starts at zero"] if bias is None else []
    else:
        _bias_lost(found, after.out, [before.out], tensors)
    found.roles.append("out")


def _others(found: _Carried, before: Heads, after: Heads, tensors: Mapping[str, Tensor], place: Place) -> None:
    """What else the old mixer has by the same name and shape: a gate, say."""
    read = {p.name for p in before.pieces.values() if p.width} | {p.name for p in after.pieces.values() if p.width}
    for name, parameter in place.module.named_parameters():
        there, owner = tensors.get(name), name.rpartition(".")[0]
        apart = owner not in read | {before.out, after.out} and name not in found.tensors
        if apart and there is not None and there.shape == parameter.shape:
            found.tensors[name] = there


def _fits(old: Piece, new: Piece, before: Heads, after: Heads, tensors: Mapping[str, Tensor], linear: Linear) -> bool:
    """Whether rows of one can stand where those of the other do."""
    weight = tensors.get(f"{old.name}.weight")
    if weight is None or weight.shape[1] != linear.in_features:
        return False
    rows, wanted = old.stop - old.start, new.stop - new.start
    if new.width is None:
        return rows == wanted
    pools = rows % wanted == 0 or wanted % rows == 0
    return before.count == after.count and old.width == new.width and pools


def _regrouped(found: _Carried, tensor: str, piece: Piece, rows: Tensor, main: bool) -> Tensor:
    """Rows (heads·width, ...) as the heads of `piece`: repeated, or the means of neighbours. main: what is said of it."""
    wanted, there = piece.stop - piece.start, rows.shape[0]
    if piece.width is None or wanted == there:
        return rows
    grouped, said = rows.unflatten(0, (-1, piece.width)), f"{piece.role} heads"
    have, want = there // piece.width, wanted // piece.width
    if want > have:
        found.exact += [f"{have} {said} repeated to {want}"] if main else []
        return grouped.repeat_interleave(want // have, 0).flatten(0, 1)
    wide = grouped.to(torch.promote_types(rows.dtype, torch.float32))
    mean = wide.unflatten(0, (want, -1)).mean(1).to(rows.dtype)
    found.lost += [f"{have} {said} mean-pooled to {want}"] if main else []
    found.pooled.setdefault(tensor, []).append((piece.start, piece.stop))
    found.old.setdefault(tensor, []).append(rows)
    found.new.setdefault(tensor, []).append(mean.repeat_interleave(have // want, 0).flatten(0, 1))
    return mean.flatten(0, 1)


def _bias_lost(found: _Carried, name: str, sources: list[str], tensors: Mapping[str, Tensor]) -> None:
    """Says that the old maps have a bias and the new one does not."""
    for source in dict.fromkeys(s for s in sources if f"{s}.bias" in tensors):
        weight, bias = tensors[f"{source}.weight"], tensors[f"{source}.bias"][:, None]
        found.old[f"{name}.bias"] = [torch.cat([weight, bias], 1)]
        found.new[f"{name}.bias"] = [torch.cat([weight, torch.zeros_like(bias)], 1)]
        found.lost.append(f"the bias of {source} is dropped")


def _ratio(place: Place, old: str, new: str) -> float:
    """What a carried weight is multiplied by, so that it acts as before (muP and NTK scale maps by their role)."""
    return place.old.get_submodule(old).multiplier / place.module.get_submodule(new).multiplier


def _changed(old: Spec, new: Spec) -> list[str]:
    """Options of one kind that are others now, beside sizes and parts of which another map speaks."""
    told = {entry.category for entry in map_entries()}
    names = [n for n in type(new).model_fields if n not in _SIZES and field_category(type(new), n) not in told]
    pairs = [(n, getattr(old, n), getattr(new, n)) for n in names]
    return [f"{n} {brief(b)} in place of {brief(a)}" for n, a, b in pairs if a != b]
