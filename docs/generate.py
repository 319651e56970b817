"""Writes docs/generated: a page for every registered part, and tables of docs/results/*.json.

Run by `make docs`. Everything on the pages comes from the registry, from the part's own docstring and
fields, or from running it; nothing is typed twice. A spec that a page shows has been built first.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, get_args

import yaml
from matplotlib import pyplot as plt
from pictures import CONTEXT, DIM, draw
from pydantic.fields import FieldInfo

import dovetail as dt
from dovetail.errors import DataError, DovetailError
from dovetail.spec import Entry, Spec, entries
from dovetail.spec.spec import field_category

DOCS = Path(__file__).resolve().parent
OUT = DOCS / "generated"

# Where a part of each category is put to be shown in a model. The key of a step is its field.
HOMES: dict[str, str] = {
    "block": "blocks", "mixer": "blocks.mixer", "feedforward": "blocks.feedforward", "norm": "blocks.norm",
    "activation": "blocks.feedforward.activation", "position": "blocks.mixer.position", "init": "init",
    "rope_scaling": "blocks.mixer.position.scaling", "mask": "blocks.mixer.mask", "embedding": "embedding",
    "head": "head",
}  # fmt: skip
HOSTS = {"mixer": "attention", "feedforward": "glu", "position": "rope"}  # kinds of the parts on the way

# Values of required fields in examples, by name; other fields keep their defaults.
EXAMPLES: dict[str, Any] = {
    "vocab": 256, "dim": 64, "size": 8, "length": 6, "step": 4, "stride": 4, "before": 3, "after": 2, "gain": 0.5,
    "base": "normal", "roles": ("residual",), "rules": ({"kind": "causal"}, {"kind": "window", "size": 8}),
    "short_factor": (1.0,) * (DIM // 2), "long_factor": tuple(1.0 + i / 4 for i in range(DIM // 2)),
}  # fmt: skip


def example(entry: Entry) -> Spec:
    """The part with its defaults, and example values where it has none. Raises DataError for an unknown field."""
    fields: dict[str, Any] = {"kind": entry.kind}
    for name, info in entry.cls.model_fields.items():
        if info.is_required():
            if name not in EXAMPLES:
                raise DataError(
                    f"{entry.category} {entry.kind!r} needs {name!r}, of which the docs know no example",
                    where="docs/generate.py, EXAMPLES",
                    remedy=f"add one for {name!r}, or give the field a default",
                )
            fields[name] = EXAMPLES[name]
    if entry.category == "rope_scaling":
        fields["factor"] = 4.0
    return Spec.parse(entry.category, fields)


def in_a_model(spec: Spec) -> tuple[dict[str, Any], str]:
    """A whole spec that holds the part, built on the meta device to be sure, and what to say of it."""
    given = _short(spec)
    if spec.category in ("model", "container"):
        return given, "Defaults left out."
    root: dict[str, Any] = {"kind": "decoder", "vocab": 256, "dim": DIM, "context": CONTEXT, "depth": 2}
    steps = HOMES.get(spec.category, "").split(".")
    homes = [steps]
    if spec.category == "position":
        homes.append(["position"])  # what is added to the token vectors stands at the stack
    problem: DovetailError | None = None
    for home in homes if steps[0] else []:
        model = json.loads(json.dumps(root))
        here = model
        for step in home[:-1]:
            here = here.setdefault(step, {"kind": HOSTS[step]} if step in HOSTS else {})
        here[home[-1]] = given
        if home == ["position"]:
            model["blocks"] = {"mixer": {"kind": "attention", "position": "none"}}
        try:
            dt.build(model, weights=False)
        except DovetailError as error:
            problem = problem or error
        else:
            return model, "A whole model that has it; the part alone is what stands there under its field."
    if problem:
        print(f"  {spec.category} {spec.kind}: shown alone, since a decoder refuses it: {problem.what}")
    return given, "The part alone."


def part_page(entry: Entry) -> str:
    """The page of one part, its picture saved beside it."""
    spec = example(entry)
    lines = [f"# {entry.kind}", "", f"*{entry.category}* · `{entry.cls.__name__}`", ""]
    for cls in entry.cls.__mro__:
        if cls is Spec:
            break
        if "__doc__" in vars(cls) and cls.__doc__:
            lines += ([] if cls is entry.cls else [f"From `{cls.__name__}`:", ""]) + [_text(cls.__doc__), ""]
    figure = draw(spec)
    if figure is not None:
        figure.savefig(OUT / "parts" / entry.category / f"{entry.kind}.png", dpi=110)
        plt.close(figure)
        lines += [f"![{entry.kind}]({entry.kind}.png)", ""]
    capable = ", ".join(f"{name}: {value}" for name, value in sorted(entry.capabilities.items()))
    facts = [("source", entry.source), ("tested against", entry.oracle), ("decode", entry.decode), ("can", capable)]
    lines += ["| | |", "| --- | --- |", *(f"| {name} | {_cell(value)} |" for name, value in facts if value), ""]
    if entry.cls.model_fields:
        rows = [(n, _type(entry.cls, n), _default(i)) for n, i in entry.cls.model_fields.items()]
        lines += ["## Fields", "", "| field | type | default |", "| --- | --- | --- |"]
        lines += [f"| `{name}` | {kind} | {default} |" for name, kind, default in rows] + [""]
    model, note = in_a_model(spec)
    text = yaml.safe_dump(model, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True)
    lines += ["## A spec to paste", "", note, "", "```yaml", text.rstrip(), "```", ""]
    return "\n".join(lines)


def category_page(category: str, found: list[Entry]) -> str:
    """The table of one category."""
    rows = [f"| [{e.kind}]({e.kind}.md) | {_cell(_first(e))} | {_cell(e.source)} |" for e in found]
    head = [f"# {category}", "", "| kind | what it is | source |", "| --- | --- | --- |"]
    return "\n".join([*head, *rows, ""])


def results_page(files: list[Path]) -> str:
    """One table a file of docs/results, with what was run on what. Raises DataError for a file out of form."""
    lines = ["# Results", "", "Made from `docs/results/*.json`, which the code that measured wrote. `ratio` is above 1"]
    lines += ["where Dovetail is better, whatever the metric. Times on a CPU are comparable within one file only.", ""]
    if not files:
        lines += ["Nothing has been measured yet.", ""]
    for file in files:
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            rows, name = result["rows"], result["name"]
            facts = [result["date"], result["device"], ", ".join(f"{k} {v}" for k, v in result["versions"].items())]
            command = result["command"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"not a result: {error!r}", where=str(file), remedy="give name, date, device, versions, command, rows"
            ) from None
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += [f"## {name}", "", f"`{command}`", "", " · ".join(facts), ""]
        lines += ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
        lines += ["| " + " | ".join(_number(row.get(column)) for column in columns) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    by_category: dict[str, list[Entry]] = {}
    for entry in entries():
        by_category.setdefault(entry.category, []).append(entry)
    overview = ["# Parts", "", f"{len(entries())} parts in {len(by_category)} categories.", ""]
    overview += ["| category | kinds |", "| --- | --- |"]
    for category, found in by_category.items():
        folder = OUT / "parts" / category
        folder.mkdir(parents=True)
        for entry in found:
            (folder / f"{entry.kind}.md").write_text(part_page(entry), encoding="utf-8")
        (folder / "index.md").write_text(category_page(category, found), encoding="utf-8")
        links = ", ".join(f"[{e.kind}]({category}/{e.kind}.md)" for e in found)
        overview.append(f"| [{category}]({category}/index.md) | {links} |")
    (OUT / "parts" / "index.md").write_text("\n".join([*overview, ""]), encoding="utf-8")
    files = sorted((DOCS / "results").glob("*.json"))
    (OUT / "results.md").write_text(results_page(files), encoding="utf-8")
    print(f"docs/generated: {len(entries())} parts, {len(files)} results")


def _short(spec: Spec) -> dict[str, Any]:
    """Plain data with defaults left out, all the way down."""
    data: dict[str, Any] = {"kind": spec.kind}
    for name, info in type(spec).model_fields.items():
        value = getattr(spec, name)
        if value == info.default or (name == "blocks" and info.default == value[:1]):
            continue
        if isinstance(value, tuple):
            data[name] = [_short(item) if isinstance(item, Spec) else item for item in value]
        else:
            data[name] = _short(value) if isinstance(value, Spec) else value
    return data


def _type(cls: type[Spec], name: str) -> str:
    annotation, category = cls.model_fields[name].annotation, field_category(cls, name)
    if category:
        many = "list of " if "tuple" in str(annotation) else ""
        empty = " or null" if type(None) in get_args(annotation) else ""
        return f"{many}[{category}](../{category}/index.md){empty}"
    text = str(annotation) if get_args(annotation) else getattr(annotation, "__name__", str(annotation))
    text = text.replace("typing.", "").replace("None", "null")
    return f"`{text}`".replace("|", "or").replace(" or ", "` or `")


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "*required*"
    value = info.default
    if isinstance(value, Spec):
        return f"`{value.kind}`"
    if isinstance(value, tuple) and value and isinstance(value[0], Spec):
        return ", ".join(f"`{item.kind}`" for item in value)
    return "null" if value is None else f"`{value!r}`"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return "" if value is None else _cell(str(value))


def _first(entry: Entry) -> str:
    return (entry.cls.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")


def _text(doc: str) -> str:
    lines = [line.strip() for line in doc.strip().splitlines()]
    return "\n".join(lines).replace("&", "&amp;").replace("<", "&lt;")


def _cell(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    try:
        main()
    except DovetailError as error:
        sys.exit(f"make docs: {error}")
