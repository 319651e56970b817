"""Overrides by path, differences, and the printed tree.

A path is dotted field names; inside a sequence an index, a slice `0:4` or `*`:
`blocks.*.mixer.position`. A path that matches nothing is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from dovetail.errors import SpecError, did_you_mean
from dovetail.spec import registry
from dovetail.spec.documents import Loader
from dovetail.spec.spec import Spec, field_category


def override(spec: Spec, changes: Mapping[str, Any]) -> Spec:
    """`spec` with each path set to its value. The value is a Spec, plain data, or a kind's name.

    Where the part found there names a field that it `adopts` for, a kind of that field's category goes into the
    field: `{kind: yarn}` on a rope becomes its `scaling`. What a new kind does not say it takes from the part found
    there, where both say that they share it: `{kind: rerope}` on a rope has the rope's theta and scaling, `linear` on an
    attention its heads and its position; and a kind that stands around another (`logn`) is put around it. No other part moves from where it was put.
    Raises SpecError for a path that matches nothing, a value that does not fit, or a change to one
    side of a ref only.
    """
    changed = spec
    for path, value in changes.items():
        changed = _set(changed, path.split("."), value, "", None)
    _check_refs(spec, changed)
    return changed


def parse_assignment(text: str) -> tuple[str, Any]:
    """`path=value` as typed on a command line; the value is YAML. Raises SpecError."""
    path, sign, value = text.partition("=")
    if not sign or not path:
        raise SpecError(f"{text!r} is not an override", remedy="write path=value, e.g. blocks.*.mixer.kv_heads=2")
    try:
        return path.strip(), yaml.load(value, Loader)
    except yaml.YAMLError as error:
        raise SpecError(f"the value of {path} is not YAML: {error}", where=text) from None


def walk(spec: Spec, path: str = "") -> Iterator[tuple[str, Spec]]:
    """Every part of the tree with its path, the root first."""
    yield path, spec
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        here = f"{path}.{name}" if path else name
        if isinstance(value, Spec):
            yield from walk(value, here)
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                if isinstance(item, Spec):
                    yield from walk(item, f"{here}.{i}")


def get(spec: Spec, path: str) -> Any:
    """What stands at a path without wildcards. Raises SpecError."""
    here: Any = spec
    for step in path.split(".") if path else []:
        if isinstance(here, tuple):
            here = here[_index(step, len(here), path)[0]]
        else:
            here = getattr(here, _field(here, step, path))
    return here


def diff(old: Spec, new: Spec) -> list[tuple[str, Any, Any]]:
    """(path, old value, new value) wherever two trees differ; a part that came or went is one line of text.

    Layers that differ in the same way are folded into one line with `*` where all layers agree.
    """
    rows = list(_differences(old, new, ""))
    folded: dict[tuple[str, str, str], list[tuple[str, Any, Any]]] = {}
    for path, x, y in rows:
        star = ".".join("*" if step.isdigit() else step for step in path.split("."))
        folded.setdefault((star, repr(x), repr(y)), []).append((path, x, y))
    out: list[tuple[str, Any, Any]] = []
    for (star, _, _), group in folded.items():
        layers = len(getattr(new, "blocks", ()) or ())
        whole = len(group) > 1 and len(group) == layers
        out.extend([(star, group[0][1], group[0][2])] if whole else group)
    return out


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Spec) and isinstance(new, Spec) and type(old) is type(new):
        for name in type(old).model_fields:
            yield from _differences(getattr(old, name), getattr(new, name), f"{path}.{name}" if path else name)
    elif (
        isinstance(old, tuple)
        and isinstance(new, tuple)
        and len(old) == len(new)
        and any(isinstance(i, Spec) for i in new)
    ):
        for i, (x, y) in enumerate(zip(old, new, strict=True)):
            yield from _differences(x, y, f"{path}.{i}")
    elif old != new:
        yield path, brief(old), brief(new)


def brief(value: Any) -> Any:
    """A part in one line, `yarn(factor=4.0)`; plain values as they are."""
    if isinstance(value, tuple) and value and isinstance(value[0], Spec):
        return ", ".join(f"{span}: {brief(item)}" for span, item in fold(value))
    if not isinstance(value, Spec):
        return value
    shown = []
    for name, info in type(value).model_fields.items():
        entry = getattr(value, name)
        if entry != info.default:
            shown.append(f"{name}={brief(entry)}")
    return f"{value.kind}({', '.join(shown)})" if shown else value.kind


def tree(spec: Spec, name: str = "", indent: int = 0) -> str:
    """The tree as text, one part a line with its own values; equal neighbours in a sequence are folded."""
    values, children = [], []
    for field in type(spec).model_fields:
        value = getattr(spec, field)
        default = type(spec).model_fields[field].default
        if isinstance(value, Spec):
            children.append((field, value))
        elif isinstance(value, tuple) and value and isinstance(value[0], Spec):
            children.extend((f"{field}.{span}", item) for span, item in fold(value))
        elif value != default:
            values.append(f"{field}={value}")
    label = f"{name}: " if name else ""
    lines = ["  " * indent + f"{label}{spec.kind}" + (f"  ({', '.join(values)})" if values else "")]
    lines.extend(tree(child, field, indent + 1) for field, child in children)
    return "\n".join(lines)


def fold(items: tuple[Any, ...]) -> list[tuple[str, Any]]:
    """Runs of equal neighbours as (range, item): "3" for one, "0:4" for several, "*" for all."""
    runs: list[tuple[int, int, Any]] = []
    for i, item in enumerate(items):
        if runs and runs[-1][2] == item:
            runs[-1] = (runs[-1][0], i + 1, item)
        else:
            runs.append((i, i + 1, item))
    if len(runs) == 1 and len(items) > 1:
        return [("*", items[0])]
    return [(str(a) if b == a + 1 else f"{a}:{b}", item) for a, b, item in runs]


def _set(spec: Spec, steps: list[str], value: Any, path: str, dim: int | None) -> Spec:
    dim = getattr(spec, "dim", None) or dim  # the width that the innermost part around the place says
    head, rest = _field(spec, steps[0], path), steps[1:]
    here = f"{path}.{head}" if path else head
    current = getattr(spec, head)
    if isinstance(current, tuple) and rest:
        items = list(current)
        for i in _index(rest[0], len(items), here):
            where = f"{here}.{i}"
            if len(rest) == 1:
                items[i] = _fit(field_category(type(spec), head), items[i], value, where, dim)
            elif isinstance(items[i], Spec):
                items[i] = _set(items[i], rest[1:], value, where, dim)
            else:
                raise SpecError(f"nothing to set at {'.'.join(steps)!r}", where=where)
        return spec.replace(**{head: tuple(items)})
    if rest:
        if not isinstance(current, Spec):
            raise SpecError(f"{here} holds {current!r}, which has no field {rest[0]!r}", where=here)
        return spec.replace(**{head: _set(current, rest, value, here, dim)})
    return spec.replace(**{head: _fit(field_category(type(spec), head), current, value, here, dim)})


def _fit(category: str | None, current: Any, value: Any, where: str, dim: int | None) -> Any:
    """`value` as `category`, or placed into the field that `current` adopts its kind for."""
    if category is None or value is None or (isinstance(current, tuple) and isinstance(value, (list, tuple))):
        return value
    kind = (
        value
        if isinstance(value, str)
        else value.get("kind")
        if isinstance(value, Mapping)
        else getattr(value, "kind", None)
    )
    fits = getattr(value, "category", "") == category or kind == "ref" or kind in registry.kinds(category)
    if not fits and isinstance(current, Spec) and current.adopts is not None:
        inner = field_category(type(current), current.adopts)
        if inner and kind in registry.kinds(inner):
            return current.replace(**{current.adopts: Spec.parse(inner, value, f"{where}.{current.adopts}")})
    if not isinstance(value, Spec) and kind in registry.kinds(category):
        known = value if isinstance(value, Mapping) else {}
        value = _taken(current, registry.entry(category, str(kind)).cls, dim) | {"kind": kind, **known}
    return Spec.parse(category, value, where)


def _taken(current: Any, cls: type[Spec], dim: int | None) -> dict[str, Any]:
    """What a new part of class `cls` takes from the part at its place, unless it says otherwise."""
    if not isinstance(current, Spec) or current.kind == "ref":
        return {}
    if cls.around is not None:
        return {cls.around: getattr(current, cls.around) if type(current) is cls else current}
    return {} if type(current) is cls else {n: v for n, v in current.hands_on(dim).items() if n in cls.keeps}


def _field(spec: Any, name: str, path: str) -> str:
    if not isinstance(spec, Spec) or name not in type(spec).model_fields:
        kind = getattr(spec, "kind", type(spec).__name__)
        known = type(spec).model_fields if isinstance(spec, Spec) else []
        raise SpecError(f"{kind} has no field {name!r}", where=path or "the root", remedy=did_you_mean(name, known))
    return name


def _index(step: str, length: int, path: str) -> list[int]:
    try:
        if step == "*":
            found = list(range(length))
        elif ":" in step:
            found = list(range(length))[slice(*(int(p) if p else None for p in step.split(":")))]
        else:
            found = [range(length)[int(step)]]
    except (ValueError, IndexError, TypeError):  # the last: more than two colons
        found = []
    if not found:
        raise SpecError(
            f"{step!r} matches none of {length} entries", where=path, remedy="use an index, a slice such as 0:4, or *"
        )
    return found


def _check_refs(old: Spec, new: Spec) -> None:
    """Refuses a change under a shared part that its refs did not ask for, and refs that point nowhere."""
    for path, part in walk(new):
        if part.kind != "ref":
            continue
        target = getattr(part, "path", "")
        try:
            owner = get(new, target)
        except SpecError:
            raise SpecError(
                f"the ref at {path} points to {target!r}, which is not there",
                where=path,
                remedy=f"set {path} to a part of its own, or its path to where the shared part stands",
            ) from None
        try:
            same_ref, before = get(old, path) == part, get(old, target)
        except SpecError:
            continue
        if same_ref and before != owner:
            raise SpecError(
                f"{target} is shared with {path}; swapping one side of a ref is refused",
                where=target,
                remedy=f"set {path} too (to a part of its own)",
            )


def check_shared(spec: Spec) -> None:
    """Raises SpecError for a ref to a part of another category than its place takes.

    A part may also stand where its registration says so (`also="head"`: an embedding is a tied head).
    """
    for path, part in walk(spec):
        if part.kind != "ref":
            continue
        wanted, owner = _place_category(spec, path), part
        seen: set[str] = set()
        while isinstance(owner, Spec) and owner.kind == "ref":
            target = getattr(owner, "path", "")
            if target in seen:
                raise SpecError(f"the ref at {path} leads back to itself", where=path, remedy="point it to a part")
            seen.add(target)
            try:
                owner = get(spec, target)
            except SpecError:
                owner = None  # no part of the tree: the build says so if nothing stands there
        if not isinstance(owner, Spec):
            continue
        if wanted not in (owner.category, registry.entry_of(owner).capabilities.get("also")):
            raise SpecError(
                f"the ref at {path} points to a {owner.category} ({owner.kind}) where a {wanted} belongs",
                where=path,
                remedy=f"point it to a {wanted}",
            )


def _place_category(spec: Spec, path: str) -> str | None:
    """The category that the field at `path` holds."""
    steps = path.split(".")
    if steps[-1].isdigit():  # an entry of a sequence
        steps.pop()
    owner = get(spec, ".".join(steps[:-1]))
    return field_category(type(owner), steps[-1])


def selected(selection: str, depth: int, where: str = "blocks") -> list[int]:
    """Layer numbers named by "0", "1:", "::2", "0:4" or "*" out of `depth`."""
    return _index(selection, depth, where)
