"""transplant: a model of a new spec with every weight that can be carried, and an account of the rest."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.errors import SpecError
from dovetail.hub import mixed
from dovetail.models import build
from dovetail.spec import Spec
from dovetail.spec.registry import entries
from dovetail.surgery.maps import Exactness, Mapped, Place, find_map, map_entries, whole_maps
from dovetail.surgery.plain import check_plain, check_same_scales


@dataclass(frozen=True)
class Move:
    """What happened to one part's weights. count: scalars.

    errors: relative Frobenius errors |new - old| / |old| by weight, where they need no data.
    """

    path: str
    exactness: Exactness
    how: str
    count: int
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float | None:
        """The largest of the errors, or None where there is none to state."""
        return max(self.errors.values(), default=None)


@dataclass
class Transplant:
    """The new model and the account: parameter names carried, re-initialised, and dropped from the old one.

    approximated: names of which a trivial rival would draw anew at least some rows.
    """

    model: Any
    moves: list[Move] = field(default_factory=list)
    carried: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    approximated: list[str] = field(default_factory=list)


def transplant(model: Any, new: Spec, *, seed: int = 0, fresh: Iterable[str] = (), rival: bool = False) -> Transplant:
    """A model of spec `new` that carries the weights of `model` (which stays as it is).

    A parameter is carried when the part that owns it is of the same kind at the same path and has the same shape,
    or when a weight map gives it; otherwise it starts anew from (seed, path). fresh: paths (with *) whose weights
    start anew on purpose. rival: what maps only approximate starts anew too, the trivial rival of the map.
    Raises SpecError when a fresh path matches nothing, for a part of which nothing can be carried although fresh does
    not ask for a random start, for a model with adapters or weights in codes, and for another parametrisation (NTK, muP).
    """
    check_plain(model)
    weight = next(model.parameters())
    grown = build(new, seed=seed, device=weight.device)
    old_parts, new_parts = _parts(model), _parts(grown)
    old, result = {n: p.data for n, p in model.named_parameters()}, Transplant(grown)
    wanted = dict(grown.named_parameters())
    owners = {name: _owner(name, new_parts) for name in wanted}
    anew = _matching(fresh, wanted)
    check_same_scales(model, grown, anew)
    settled: set[str] = set()
    lost: dict[str, str] = {}  # of a shape that fits, but a map says that they mean something else now
    used: set[str] = set()
    maps = _mapped(model, grown, new, old, old_parts, new_parts, owners)
    for path, (own, mapped) in maps.items():
        asked = anew.intersection(own)
        if own and asked.issuperset(own):
            continue
        prefix = f"{path}." if path else ""
        lost |= {n: mapped.how for n in own if n.removeprefix(prefix) not in mapped.tensors}
        for name in (prefix + n for n in mapped.tensors):
            if name in asked:
                continue
            local = name.removeprefix(prefix)
            inexact = mapped.approximate.get(local, [])
            rows = mapped.drawn.get(local, []) + (inexact if rival else [])
            _fill(wanted[name], mapped.tensors[local], rows)
            settled.add(name)
            used.add(name)
            (result.reinitialised if rows else result.carried).append(name)
            result.approximated += [name] if inexact else []
        if own and not mapped.tensors:
            continue  # it starts anew below, or is refused
        redrawn = rival and bool(mapped.approximate)
        how = "re-initialised in place of: " + mapped.how if redrawn else mapped.how
        exactness: Exactness = "reinitialised" if redrawn else mapped.exactness
        count = sum(t.numel() for t in mapped.tensors.values())
        count -= sum((b - a) * mapped.tensors[n][0].numel() for n, rows in mapped.drawn.items() for a, b in rows)
        result.moves.append(Move(path, exactness, how, count, {} if redrawn else dict(mapped.errors)))
    for name, target in wanted.items():
        if name in settled:
            continue
        there, owner = old.get(name), owners[name]
        same = owner in old_parts and old_parts[owner].kind == new_parts[owner].kind
        if name not in anew and name not in lost and there is not None and same and there.shape == target.shape:
            _fill(target, there, [])
            result.carried.append(name)
            used.add(name)
        else:
            result.reinitialised.append(name)
    started = [name for name in result.reinitialised if name not in settled]
    inside = _inside([path for path, (_, mapped) in maps.items() if mapped.tensors], old, new_parts, old_parts, wanted)
    _refuse_lost(wanted, set(started), anew | inside, lost, old_parts, new_parts)
    result.dropped = sorted(old.keys() - used)
    groups: dict[str, list[str]] = {}
    for name in started:
        groups.setdefault(owners[name], []).append(name)
    for path, names in groups.items():
        other = lost.keys() & old.keys() >= set(names)
        why = "its weights mean something else there" if other else "nothing to carry it from"
        how = "on request" if anew.issuperset(names) else why
        result.moves.append(Move(path, "reinitialised", how, sum(wanted[n].numel() for n in names)))
    told = {*maps, *(move.path for move in result.moves)}
    result.moves += _gone(result.dropped, told, old_parts, new_parts)
    for name, target in wanted.items():
        dtype = old[name].dtype if name in old else weight.dtype
        if target.dtype != dtype:
            target.data = target.data.to(dtype)
    mixed.let_run(grown)
    grown.train(model.training)
    if hasattr(model, "origin"):
        grown.origin = copy.copy(model.origin)
    return result


def _mapped(
    model: Any,
    grown: Any,
    new: Spec,
    old: Mapping[str, Tensor],
    old_parts: Mapping[str, Spec],
    new_parts: Mapping[str, Spec],
    owners: Mapping[str, str],
) -> dict[str, tuple[list[str], Mapped]]:
    """By part: the parameters that it owns, and what the maps give for them. Maps of the whole model come first."""
    found: dict[str, Mapped] = {}
    for entry in whole_maps() if model.spec != new else []:
        found = (entry.function(model.spec, new, old) or {}) | found
    for path, part in new_parts.items():
        before = old_parts.get(path)
        mapping = None if before is None or path in found else find_map(before, part)
        if before is None or mapping is None:
            continue
        prefix = f"{path}." if path else ""
        local = {n.removeprefix(prefix): t for n, t in old.items() if _owner(n, old_parts) == path}
        module, stood = grown.get_submodule(path), model.get_submodule(path)
        if before == part and _shapes(module, local) == _shapes(stood, local):
            continue  # a part may also have other sizes because the model has: a table of positions, its context
        place = Place(getattr(new, "dim", 0), module, getattr(new, "context", None), stood)
        mapped = mapping(before, part, local, place)
        if mapped is not None:
            found[path] = mapped
    return {path: ([n for n, owner in owners.items() if owner == path], mapped) for path, mapped in found.items()}


def _gone(
    dropped: Iterable[str], told: set[str], old_parts: Mapping[str, Spec], new_parts: Mapping[str, Spec]
) -> list[Move]:
    """Of weights that are dropped from parts of which no move speaks: what the parts did with them is lost."""
    found: dict[str, list[str]] = {}
    for name in dropped:
        steps = _owner(name, old_parts).split(".")
        above = [".".join(steps[: n + 1]) for n in range(len(steps))]
        if not told.intersection(above):
            path = next((p for p in above if p in old_parts and p not in new_parts), above[-1])
            found.setdefault(path, []).append(name.removeprefix(f"{path}." if path else ""))
    how = {
        path: f"{', '.join(names)} dropped" if path in new_parts else f"the {old_parts[path].category} is gone"
        for path, names in found.items()
    }
    return [Move(path, "approximate", f"{said}: no bound", 0) for path, said in how.items()]


def _shapes(module: nn.Module, names: Iterable[str]) -> dict[str, torch.Size]:
    """Of those of a part's parameters that it has."""
    return {name: p.shape for name, p in module.named_parameters() if name in names}


def _refuse_lost(
    wanted: Mapping[str, Any],
    started: set[str],
    anew: set[str],
    lost: Mapping[str, str],
    old_parts: Mapping[str, Spec],
    new_parts: Mapping[str, Spec],
) -> None:
    """Raises SpecError for parts all of whose weights start anew although nobody asked: the outermost such part."""
    refused: list[str] = []
    for path in new_parts:
        prefix = f"{path}." if path else ""
        names = {n for n in wanted if n.startswith(prefix)}
        inside = any(path.startswith(f"{p}.") for p in refused)
        if names and names <= started and not names <= anew and not inside:
            refused.append(path)
    if not refused:
        return
    path = refused[0]
    before, part = old_parts.get(path), new_parts[path]
    prefix = f"{path}." if path else ""
    why = next((how for name, how in lost.items() if name.startswith(prefix)), None)
    if why is None:
        why = (
            "nothing stood there before"
            if before is None
            else f"no map leads from {before.kind!r} to {part.kind!r}"
            if before.kind != part.kind
            else "its sizes are others"
        )
    where = f"{path or 'the root'}" + (f" and {len(refused) - 1} more" if len(refused) > 1 else "")
    stars = re.sub(r"\.\d+(?=\.|$)", ".*", path) or "*"
    raise SpecError(
        f"nothing of the {part.category} at {where} can be carried: {why}",
        where=path or "the root",
        remedy=f"{_instead(before, part)}ask for a random start: fresh={[stars]}",
    )


def _inside(
    paths: Iterable[str],
    old: Mapping[str, Tensor],
    new_parts: Mapping[str, Spec],
    old_parts: Mapping[str, Spec],
    wanted: Iterable[str],
) -> set[str]:
    """Weights of the parts that a part of another kind, itself carried to these paths, brings where none had weights."""
    others = [p for p in paths if p in old_parts and old_parts[p].kind != new_parts[p].kind]
    found: set[str] = set()
    for path in new_parts:
        if any(path.startswith(f"{p}.") for p in others) and not any(name.startswith(f"{path}.") for name in old):
            found.update(name for name in wanted if name.startswith(f"{path}."))
    return found


def _instead(before: Spec | None, part: Spec) -> str:
    """What would carry weights in place of a refused swap."""
    category = part.category
    kept = before is not None and before.kind == part.kind
    if before is None and category == "block":
        return "add layers with surgery.grow_depth, or "
    if kept and category in ("embedding", "head"):
        return "change the ids with surgery.extend_vocabulary or trim_vocabulary, or "
    if kept and category == "mixer":
        return "remove whole heads with surgery.prune_heads, or "
    if before is None:
        return ""
    kinds = sorted({e.new for e in map_entries() if (e.category, e.old) == (category, before.kind) and e.new != "*"})
    if category == "mixer":  # one map for all that have heads, which they say by the fields that they keep
        kinds = [e.kind for e in entries() if e.category == category and set(e.cls.keeps) & set(before.keeps)]
        if part.kind in kinds and not kept:
            return "leave its heads out, so that those that were there stay, or "
    return f"from {before.kind!r} weights are carried to: {', '.join(kinds)}; or " if kinds and not kept else ""


def _fill(target: nn.Parameter, value: Tensor, keep_rows: list[tuple[int, int]]) -> None:
    """Copies `value`, leaving the given rows as they were drawn."""
    with torch.no_grad():
        drawn = [(a, b, target.data[a:b].clone()) for a, b in keep_rows]
        target.data = value.detach().clone()
        for a, b, rows in drawn:
            target.data[a:b] = rows.to(target.dtype)


def _parts(model: nn.Module) -> dict[str, Spec]:
    """Module path -> spec of every part of a model."""
    return {
        path: module.spec for path, module in model.named_modules() if isinstance(getattr(module, "spec", None), Spec)
    }  # type: ignore[misc]


def _owner(name: str, parts: Mapping[str, Spec]) -> str:
    """The deepest part that a parameter lies in."""
    steps = name.split(".")
    for end in range(len(steps) - 1, -1, -1):
        path = ".".join(steps[:end])
        if path in parts:
            return path
    return ""


def _matching(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    names = list(names)
    found: set[str] = set()
    for pattern in patterns:
        regex = re.compile(r"\.".join(r"[^.]+" if s == "*" else re.escape(s) for s in pattern.split(".")) + r"(\.|$)")
        hits = {n for n in names if regex.match(n)}
        if not hits:
            raise SpecError(f"{pattern!r} matches no parameter", remedy="use a module path such as blocks.*.mixer")
        found |= hits
    return found
