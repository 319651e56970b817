"""What goes with what: positions with mixers in every model, at a stack, and with rope scalings. Used by generate.py.

Every cell is tried: the smallest model is built and run, and where nothing sees the future it decodes a step. Rows and
columns come from the registry: mixers are those with a field for a position (or for a mixer that has one), places are
where the models' own defaults have a mixer or a position, and a container of grids stands for the models of images.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

import dovetail as dt
from dovetail.errors import BuildError, DataError, DovetailError, SpecError
from dovetail.models.build import is_causal, materialise
from dovetail.parts.context import Context
from dovetail.parts.init import Normal
from dovetail.parts.weights import initialise
from dovetail.spec import Entry, Slot, Spec, entries, entry
from dovetail.spec.spec import field_category

LENGTH, SIDE = 10, 4  # tokens of a text; side of an image's grid, and of a window of it
# What a part's fields of these names get, the others keep their defaults. Windows and trained lengths end before LENGTH.
FIELDS: dict[str, Any] = {
    "heads": 2, "key_dim": 8, "rank": 8, "rope_dim": 8, "size": SIDE, "height": SIDE, "window": 4, "sinks": 2, "trained": 4,
    "length": 16, "sections": (1, 1, 2), "factor": 2.0, "original": 8, "short_factor": (1.0,) * 4,
    "long_factor": (1.0, 2.0, 3.0, 4.0),
}  # fmt: skip
KINDS: dict[tuple[str, str], dict[str, Any]] = {  # what a kind needs beyond that: "width" is a share elsewhere
    ("position", "axial"): {"width": SIDE},
    ("position", "relative_bias_2d"): {"width": SIDE},
}
# The same for the models around them.
WHOLE: dict[str, Any] = {
    "vocab": 17, "dim": 16, "depth": 1, "context": 32, "feedforward": None, "init": {"kind": "normal", "std": 0.25},
}  # fmt: skip
NEEDED = WHOLE | {"features": 3, "classes": 5}  # where a model cannot do without


ABOUT = (
    "Every cell was tried when this page was made, in the smallest model that has both, with the defaults of each part.",
    "*works*: a forward has run and, where nothing sees the future, a decoding step gave what the whole row gives.",
    "*works, no state*: it cannot decode. *refused*: the build says why and what to do instead, see the number.",
)


@dataclass(frozen=True)
class Place:
    """Somewhere in a small model (or container of a grid): its name, plain data of the whole, and the way there."""

    name: str
    category: str
    data: dict[str, Any]
    way: tuple[str | int, ...]

    def holding(self, part: dict[str, Any]) -> dict[str, Any]:
        """The whole with `part` there."""
        whole = copy.deepcopy(self.data)
        _step(whole, self.way[:-1])[self.way[-1]] = part
        return whole

    def asks(self, kind: str) -> dict[str, Any]:
        """What the mixer that stands here by default is told, save its position, as far as `kind` has such fields."""
        usual, fields = _step(self.data, self.way), entry("mixer", kind).cls.model_fields
        told = {}
        for name, info in entry("mixer", usual["kind"]).cls.model_fields.items():
            plain = info.default.to_dict() if isinstance(info.default, Spec) else info.default
            if name in fields and name != "position" and not info.is_required() and usual[name] != plain:
                told[name] = usual[name]
        return told


@dataclass(frozen=True)
class Outcome:
    """What became of a pair. forward: it runs, and has no state to decode with; refused: when built; fails: a defect."""

    verdict: Literal["works", "forward", "refused", "fails"]
    error: Exception | None = None

    def reason(self, kind: str) -> str:
        """What was wrong and what to do, in a row about `kind`."""
        if not isinstance(self.error, DovetailError):
            return repr(self.error)
        what = self.error.what.replace(f"position {kind!r}", "it")
        what = f"it{what.removeprefix(kind)}" if what.startswith(f"{kind} ") else what
        listed = isinstance(self.error, SpecError)  # whose remedy is the names of the part's fields
        return what if listed or not self.error.remedy else f"{what}; what to do: {self.error.remedy}"


@dataclass(frozen=True)
class Table:
    """title, what is in its rows and columns, and the outcome of each."""

    title: str
    about: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[Outcome, ...]]


def page() -> str:
    """All tables, with each distinct reason once below them."""
    reasons: dict[str, int] = {}
    lines = ["# What goes with what", "", *ABOUT, ""]
    for table in tables():
        lines += [f"## {table.title}", "", table.about, "", f"| | {' | '.join(table.columns)} |"]
        lines += [f"| --- |{' --- |' * len(table.columns)}"]
        for kind, row in table.rows.items():
            cells = " | ".join(_cell(outcome, kind, reasons) for outcome in row)
            lines.append(f"| [{kind}](parts/position/{kind}.md) | {cells} |")
        lines.append("")
    lines += ["## Reasons", ""]
    lines += [f'{number}. <span id="reason-{number}"></span>{_escaped(said)}' for said, number in reasons.items()]
    return "\n".join([*lines, ""])


@cache
def tables() -> tuple[Table, ...]:
    """Position in each mixer by place, position at the stack by model, position by rope scaling."""
    found = [_in_mixers(outer, inner) for outer, inner in mixers()]
    at_stack = [place for place in places() if place.way[-1] == "position"]
    rows = {e.kind: tuple(tried(place.holding(example(e)), place) for place in at_stack) for e in _all("position")}
    about = "`stack.position`: what becomes of the token vectors before the first block."
    found.append(Table("At the stack", about, tuple(place.name for place in at_stack), rows))
    return (*found, _scalings())


def _in_mixers(outer: str | None, inner: str) -> Table:
    among = [place for place in places() if place.way[-1] != "position"]
    rows = {}
    for e in _all("position"):
        outcomes = []
        for place in among:
            part = example(entry("mixer", inner), position=example(e))
            part = part if outer is None else example(entry("mixer", outer), mixer=part)
            outcomes.append(tried(place.holding(part | place.asks(part["kind"])), place))
        rows[e.kind] = tuple(outcomes)
    about = f"The `position` of a mixer `{inner}`" + (f" inside a `{outer}`." if outer else ".")
    return Table(title(outer, inner), about, tuple(place.name for place in among), rows)


def _scalings() -> Table:
    """In the first place of all, a decoder's attention."""
    place = next(place for place in places() if place.way[-1] == "mixer")
    rows = {
        e.kind: tuple(
            tried(
                place.holding(
                    example(entry("mixer", "attention"), position=example(e) | {"scaling": example(scaling)})
                ),
                place,
                exact=scaling.decode == "exact",
            )
            for scaling in _all("rope_scaling")
        )
        for e in _all("position")
    }
    columns = tuple(scaling.kind for scaling in _all("rope_scaling"))
    return Table("Rope scalings", f"The `scaling` of a position, in the attention of a {place.name}.", columns, rows)


def tried(whole: dict[str, Any], place: Place, exact: bool = True) -> Outcome:
    """Builds and runs it. exact: whether a step must give what the whole row gives."""
    try:
        model: Any = dt.build(whole) if place.category == "model" else _container(whole)
    except (BuildError, SpecError) as error:
        return Outcome("refused", error)
    except Exception as error:  # any other is what the table is there to find
        return Outcome("fails", error)
    try:
        with torch.no_grad():
            return _run(model, place, exact)
    except Exception as error:
        return Outcome("fails", error)


def _run(model: Any, place: Place, exact: bool) -> Outcome:
    if place.category != "model":
        model(torch.randn(2, SIDE * SIDE, WHOLE["dim"]), Context.on_grid(SIDE, SIDE, torch.device("cpu")))
        return Outcome("works")
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH) * 7 % WHOLE["vocab"]
    if entry("model", model.spec.kind).capabilities.get("reads") == "values":
        model(torch.randn(2, LENGTH, NEEDED["features"]))
        return Outcome("works")
    reads = hasattr(model, "encode")
    full = (model(tokens, tokens) if reads else model(tokens)).logits
    if entry("model", model.spec.kind).capabilities.get("targets"):
        model(tokens, ranks=torch.arange(LENGTH).expand(2, -1), targets=tokens[:, :3] % LENGTH)
    if not is_causal(model) or "encoder" in place.way:
        return Outcome("works")
    try:
        state = model.new_state(2, LENGTH)
    except BuildError as error:
        return Outcome("forward", error)
    if reads:
        model.encode(tokens, state=state)
    call = model.decode if reads else model
    call(tokens[:, :-1], state=state)
    last = call(tokens[:, -1:], state=state).logits
    apart = (last[:, 0] - full[:, -1]).abs().max().item()
    if exact and apart > 1e-4 * max(1.0, full.abs().max().item()):
        return Outcome("fails", AssertionError(f"a decoding step is {apart:.2g} off"))
    return Outcome("works")


def _container(whole: dict[str, Any]) -> Any:
    slot = Slot(dim=WHOLE["dim"], causal=False, init=Normal(std=0.25))
    with torch.device("meta"):
        module = slot.build(Spec.parse("container", whole), "container")
    materialise(module, "cpu")
    initialise(module, 0)
    return module.eval()


@cache
def places() -> tuple[Place, ...]:
    """Where a mixer or a position stands in the defaults of every model, and of every container of grids."""
    found = []
    for e in (*_all("model"), *(c for c in _all("container") if c.capabilities.get("grid"))):
        needed = {name: NEEDED[name] for name, info in e.cls.model_fields.items() if info.is_required()}
        data = _small(Spec.parse(e.category, {"kind": e.kind} | needed).to_dict())
        for way in _ways(data):
            side = [step for step in way if step in ("encoder", "decoder", "cross")]
            found.append(Place(" ".join([e.kind, *side]).replace("_", "-"), e.category, data, way))
    return tuple(found)


def mixers() -> list[tuple[str | None, str]]:
    """(wrapper or None, mixer) for every mixer with a field for a position, and for those around another: their default."""
    having: list[tuple[str | None, str]] = [(None, e.kind) for e in _all("mixer") if _holds(e, "position")]
    return having + [(e.kind, e.cls.model_fields["mixer"].default.kind) for e in _all("mixer") if _holds(e, "mixer")]


def title(outer: str | None, inner: str) -> str:
    """Of the table of a mixer."""
    return f"{outer} of {inner}" if outer else inner


def example(e: Entry, **parts: Any) -> dict[str, Any]:
    """Plain data of a small part. Raises DataError for a required field of a name that is not known here."""
    given = {name: FIELDS[name] for name in e.cls.model_fields if name in FIELDS}
    given |= KINDS.get((e.category, e.kind), {}) | parts
    for name, info in e.cls.model_fields.items():
        if info.is_required() and name not in given:
            raise DataError(
                f"{e.category} {e.kind!r} needs {name!r}, of which the table of pairs knows no example",
                where="docs/pairs.py, FIELDS",
                remedy=f"add one for {name!r}, or give the field a default",
            )
    return {"kind": e.kind} | given


def _small(data: Any) -> Any:
    """Plain data of a model with the sizes of WHOLE all the way down, and one stage of several."""
    if isinstance(data, list):
        return [_small(item) for item in data[:1]]
    if not isinstance(data, dict):
        return data
    return {key: WHOLE[key] if key in WHOLE else _small(value) for key, value in data.items()}


def _ways(data: Any, way: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """To the mixers of blocks (not the mixers inside those), and to the positions of stacks."""
    if isinstance(data, list):
        for i, item in enumerate(data):
            yield from _ways(item, (*way, i))
    elif isinstance(data, dict):
        for key, value in data.items():
            if key in ("mixer", "cross", "position"):
                if value is not None:
                    yield (*way, key)
            else:
                yield from _ways(value, (*way, key))


def _step(data: Any, way: tuple[str | int, ...]) -> Any:
    for step in way:
        data = data[step]
    return data


def _holds(e: Entry, category: str) -> bool:
    return any(field_category(e.cls, name) == category for name in e.cls.model_fields)


def _all(category: str) -> list[Entry]:
    return [e for e in entries() if e.category == category]


def _cell(outcome: Outcome, kind: str, reasons: dict[str, int]) -> str:
    if outcome.verdict == "works":
        return "works"
    number = reasons.setdefault(outcome.reason(kind), len(reasons) + 1)
    said = {"forward": "works, no state", "refused": "refused", "fails": "**fails**"}[outcome.verdict]
    return f"{said} [{number}](#reason-{number})"


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("{", "&#123;")
