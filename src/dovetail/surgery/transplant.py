"""transplant: a model of a new spec with every weight that can be carried, and an account of the rest."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.errors import SpecError
from dovetail.models import build
from dovetail.spec import Spec
from dovetail.surgery.maps import Exactness, find_map


@dataclass(frozen=True)
class Move:
    """What happened to one part's weights. count: scalars."""

    path: str
    exactness: Exactness
    how: str
    count: int


@dataclass
class Transplant:
    """The new model and the account: parameter names carried, re-initialised, and dropped from the old one."""

    model: Any
    moves: list[Move] = field(default_factory=list)
    carried: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def transplant(model: Any, new: Spec, *, seed: int = 0, fresh: Iterable[str] = (), rival: bool = False) -> Transplant:
    """A model of spec `new` that carries the weights of `model` (which stays as it is).

    A parameter is carried when the part that owns it is of the same kind at the same path and has the same shape,
    or when a weight map gives it; otherwise it starts anew from (seed, path). fresh: paths (with *) whose weights
    start anew on purpose. rival: what maps only approximate starts anew too, the trivial rival of the map.
    Raises SpecError when a fresh path matches nothing.
    """
    weight = next(model.parameters())
    grown = build(new, seed=seed, device=weight.device)
    old_parts, new_parts = _parts(model), _parts(grown)
    old, result = dict(model.named_parameters()), Transplant(grown)
    wanted = dict(grown.named_parameters())
    anew = _matching(fresh, wanted)
    settled: set[str] = set()
    lost: set[str] = set()  # of a shape that fits, but a map says that they mean something else now
    used: set[str] = set()
    for path, part in new_parts.items():
        before = old_parts.get(path)
        prefix = f"{path}." if path else ""
        own = [n for n in wanted if n.startswith(prefix) and _owner(n, new_parts) == path and n not in anew]
        if before is None or before == part or not own:
            continue
        mapping = find_map(before, part)
        local = {n.removeprefix(prefix): t.data for n, t in old.items() if _owner(n, old_parts) == path}
        mapped = None if mapping is None else mapping(before, part, local, getattr(new, "dim", 0))
        if mapped is None:
            continue
        lost |= {n for n in own if n.removeprefix(prefix) not in mapped.tensors}
        for name, value in mapped.tensors.items():
            target = wanted[prefix + name]
            rows = mapped.approximate.get(name, []) if rival else []
            _fill(target, value, rows)
            settled.add(prefix + name)
            used.add(prefix + name)
            (result.reinitialised if rows else result.carried).append(prefix + name)
        if not mapped.tensors:
            continue
        how = "re-initialised in place of: " + mapped.how if rival and mapped.approximate else mapped.how
        exactness: Exactness = "reinitialised" if rival and mapped.approximate else mapped.exactness
        result.moves.append(Move(path, exactness, how, sum(t.numel() for t in mapped.tensors.values())))
    for name, target in wanted.items():
        if name in settled:
            continue
        there = old.get(name)
        owner = _owner(name, new_parts)
        same = owner in old_parts and old_parts[owner].kind == new_parts[owner].kind
        if name not in anew | lost and there is not None and same and there.shape == target.shape:
            _fill(target, there.data, [])
            result.carried.append(name)
            used.add(name)
        else:
            result.reinitialised.append(name)
    result.dropped = sorted(old.keys() - used)
    groups: dict[str, list[str]] = {}
    for name in result.reinitialised:
        if name not in settled:
            groups.setdefault(_owner(name, new_parts), []).append(name)
    for path, names in groups.items():
        why = "its weights mean something else there" if lost.issuperset(names) else "nothing to carry it from"
        how = "on request" if anew.issuperset(names) else why
        result.moves.append(Move(path, "reinitialised", how, sum(wanted[n].numel() for n in names)))
    for name, target in wanted.items():
        dtype = old[name].dtype if name in old else weight.dtype
        if target.dtype != dtype:
            target.data = target.data.to(dtype)
    grown.train(model.training)
    if hasattr(model, "origin"):
        grown.origin = copy.copy(model.origin)
    return result


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


def _owner(name: str, parts: dict[str, Spec]) -> str:
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
