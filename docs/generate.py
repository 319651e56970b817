"""Writes docs/generated: a page for every registered part, tables of pairs, of kernels and of docs/results/*.json.

Run by `make docs`. Everything on the pages comes from the registry, from the part's own docstring and
fields, or from running it; nothing is typed twice. A spec that a page shows has been built first.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import shutil
import sys
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import algorithms_pictures
import gallery
import pairs
import served
import torch
import yaml
from matplotlib import pyplot as plt
from measured import own_pages, result_lines, results_page
from pictures import BUNDLED, CONTEXT, DIM, draw
from pydantic.fields import FieldInfo

import dovetail as dt
from dovetail.adapters import AdapterSpec
from dovetail.errors import BuildError, DataError, DovetailError
from dovetail.parts.init import Normal
from dovetail.report.bench import benchmarks
from dovetail.spec import Entry, Slot, Spec, entries
from dovetail.spec.spec import field_category
from dovetail.surgery import quantise
from dovetail.surgery.maps import map_entries
from dovetail.training.recipe import Recipe, read_yaml

DOCS = Path(__file__).resolve().parent
OUT = DOCS / "generated"

# Where a part of each category is put to be shown in a model. The key of a step is its field.
HOMES: dict[str, str] = {
    "block": "blocks", "mixer": "blocks.mixer", "feedforward": "blocks.feedforward", "norm": "blocks.norm",
    "activation": "blocks.feedforward.activation", "position": "blocks.mixer.position", "init": "init",
    "rope_scaling": "blocks.mixer.position.scaling", "mask": "blocks.mixer.mask", "embedding": "embedding",
    "head": "head", "normaliser": "blocks.mixer.normaliser", "feature_map": "blocks.mixer.feature_map",
}  # fmt: skip
HOSTS = {"mixer": "attention", "feedforward": "glu", "position": "rope"}  # kinds of the parts on the way
# The same for parts that need tokens on a grid: a step is a field of the container, "stage" one of its stages.
GRID_HOMES = {"mixer": "stage.blocks.mixer", "position": "stage.blocks.mixer.mixer.position", "resample": "between"}

# Values of required fields in examples, by name; other fields keep their defaults.
EXAMPLES: dict[str, Any] = {
    "vocab": 256, "dim": 64, "size": 8, "length": 6, "step": 4, "stride": 4, "before": 3, "after": 2, "gain": 0.5,
    "base": "normal", "roles": ("residual",), "rules": ({"kind": "causal"}, {"kind": "window", "size": 8}),
    "rank": 16, "sections": (4, 6, 6), "path": "notes.txt", "paths": ("notes.txt", "more.txt"),
    "features": 1, "classes": 10, "split": "train", "short_factor": (1.0,) * (DIM // 2), "long_factor": tuple(1.0 + i / 4 for i in range(DIM // 2)),
}  # fmt: skip
# What a kind needs beyond that, or what shows it better than its defaults.
KINDS: dict[tuple[str, str], dict[str, Any]] = {
    ("mixer", "window"): {"size": 7, "shift": 3},
    ("mixer", "linformer"): {"length": 64},
    ("mask", "random_blocks"): {"size": 4, "count": 1},
    ("mask", "fixed"): {"stride": 4},
    ("mask", "or"): {"rules": ({"kind": "window", "size": 8}, {"kind": "prefix", "length": 2})},
    ("image_embedding", "patch"): {"size": 4},
    ("corpus", "folder"): {"path": "notes"},
    ("corpus", "jsonl"): {"path": "notes.jsonl"},
    ("corpus", "mnist"): {"path": "mnist"},
    ("corpus", "pixels"): {"of": {"kind": "mnist", "path": "mnist", "split": "train"}, "permutation": 0},
    ("pooling", "concat"): {"of": ("first", "mean")},
    ("adapter", "bitfit"): {"add": True},  # the bundled model has no biases
    ("adapter", "fusion"): {"of": ("first", "second")},
    ("corpus", "echoed"): {"corpus": {"kind": "text", "path": "book.txt"}},
    ("corpus", "controlled"): {"codes": ("Books",), "corpora": ({"kind": "text", "path": "books.txt"},)},
    ("model", "encoder_decoder"): {
        "encoder": {"depth": 2},
        "decoder": {"depth": 2, "blocks": {"cross": {"kind": "attention", "position": "none"}}},
    },
}
INCLUDED = (
    "speculative",
    "contrastive",
    "decode_cpu",
    "decode_gpu",
)  # files of docs/results whose tables stand in pages that are written by hand
# Files of docs/results whose tables belong on a part's own page.
MEASURED = {
    ("adapter", "lora"): ("lora_gpu",),
    ("storage", "nf4"): ("lora_gpu", "quantised_quality"),
    ("storage", "int8"): ("quantised_quality",),
    ("storage", "int4"): ("quantised_quality",),
}
# Masks that hide nothing in a causal place alone, which a model refuses: shown together with a window.
WITH_A_WINDOW = {"mask": ("full", "causal")}


def example(entry: Entry) -> Spec:
    """The part with its defaults, and example values where it has none. Raises DataError for an unknown field."""
    fields: dict[str, Any] = {"kind": entry.kind} | KINDS.get((entry.category, entry.kind), {})
    for name, info in entry.cls.model_fields.items():
        if info.is_required() and name not in fields:
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


def in_a_model(entry: Entry, spec: Spec) -> tuple[dict[str, Any], Spec, str]:
    """(plain data that holds the part, the same parsed, what to say of it). Built on the meta device to be sure.

    Raises DovetailError where nothing that holds the part can be built.
    """
    given = _short(spec)
    grid = entry.capabilities.get("causal") is False or entry.category in ("image_embedding", "resample")
    if entry.category == "objective":
        return in_a_recipe({"objective": given}, "objective")
    if entry.category == "corpus":
        return in_a_recipe({"data": {"train": given}}, "data.train")
    if getattr(spec, "needs", ()):
        return (
            given,
            spec,
            "The part alone: it stands on adapters that the model has, and a recipe trains one at a time.",
        )
    if entry.category == "adapter":
        return in_a_recipe({"adapter": given}, "adapter")
    if entry.category == "lora_init":
        return in_a_recipe({"adapter": {"kind": "lora", "start": given}}, "adapter")
    if entry.category == "storage":
        return in_a_recipe({"storage": given, "adapter": {"kind": "lora"}}, "storage")
    if entry.category == "model":
        return given, dt.build(given, weights=False).spec, "Defaults left out."
    if entry.category == "pooling":
        whole = {"kind": "encoder", "vocab": 256, "dim": DIM, "context": CONTEXT, "depth": 2, "pooling": given}
        return whole, dt.build(whole, weights=False).spec, "An encoder that has it: what its `pooler_output` is."
    if grid:
        return on_a_grid(entry, given)
    if entry.category == "container":
        _on_meta(spec, causal=True)
        return given, spec, "The part alone: a decoder is one such container between an embedding and a head."
    model: dict[str, Any] = {"kind": "decoder", "vocab": 256, "dim": DIM, "context": CONTEXT, "depth": 2}
    if entry.category == "position" and "embed" in _hooks(spec):  # what is added to the token vectors: the stack's
        model |= {"position": given, "blocks": {"mixer": {"kind": "attention", "position": "none"}}}
    else:
        if entry.category == "normaliser":
            model["blocks"] = {"mixer": {"kind": "gau"}}
        if entry.category == "feature_map":
            model["blocks"] = {"mixer": {"kind": "linear"} | ({} if spec.positive else {"normalise": False})}
        if entry.kind in WITH_A_WINDOW.get(entry.category, ()):
            given = {"kind": "and", "rules": [given, {"kind": "window", "size": 8}]}
        _put(model, HOMES[entry.category].split("."), given)
    if "streams" in entry.capabilities:
        model["streams"] = entry.capabilities["streams"]
    note = "A whole model that has it; the part alone is what stands there under its field."
    return model, dt.build(model, weights=False).spec, note


def on_a_grid(entry: Entry, given: dict[str, Any]) -> tuple[dict[str, Any], Spec, str]:
    """`in_a_model` for parts that read an image's tokens."""
    if entry.category not in GRID_HOMES:
        spec = Spec.parse(entry.category, given)
        _on_meta(spec)
        return given, spec, "The part alone."
    stage: dict[str, Any] = {"depth": 2, "norm": None, "blocks": {"mixer": {"kind": "window", "size": 7}}}
    whole: dict[str, Any] = {"kind": "stages", "stage": stage}
    _put(whole, GRID_HOMES[entry.category].split("."), given)
    stage = whole.pop("stage")
    whole["stages"] = [stage, json.loads(json.dumps(stage))]  # not the same object, which YAML would alias
    spec = Spec.parse("container", whole)
    _on_meta(spec)
    return whole, spec, "Two stages that have it; the part alone is what stands there under its field."


def in_a_recipe(change: dict[str, Any], field: str) -> tuple[dict[str, Any], Spec, str]:
    """`in_a_model` for what stands beside a model in a recipe: `recipes/lora.yaml` if it has an adapter, or `tiny.yaml`."""
    recipe = read_yaml(DOCS.parent / "recipes" / ("lora.yaml" if "adapter" in change else "tiny.yaml"))
    for name, value in change.items():
        recipe[name] = recipe[name] | value if isinstance(value, dict) and name == "data" else value
    parsed = Recipe.parse(recipe)
    part = parsed.data.train if field == "data.train" else getattr(parsed, field)
    return change, part, f"The part of a recipe that has it: its field `{field}`."


def _hooks(spec: Spec) -> frozenset[str]:
    """What a position works by; it may want a line of tokens (causal) or a grid (not)."""
    with torch.device("meta"):
        try:
            return spec.build(Slot(dim=DIM, head_dim=DIM, context=CONTEXT, vocab=256, init=Normal())).hooks
        except BuildError:
            return spec.build(Slot(dim=DIM, head_dim=DIM, context=CONTEXT, init=Normal(), causal=False)).hooks


def _on_meta(spec: Spec, causal: bool = False) -> None:
    with torch.device("meta"):
        Slot(dim=DIM, causal=causal, context=CONTEXT, init=Normal()).build(spec, "part")


def _put(model: dict[str, Any], steps: list[str], given: dict[str, Any]) -> None:
    """Puts `given` at `steps`, with the parts on the way that it needs."""
    for step in steps[:-1]:
        model = model.setdefault(step, {"kind": HOSTS[step]} if step in HOSTS else {})
    model[steps[-1]] = given


def part_page(entry: Entry) -> str:
    """The page of one part, its picture saved beside it."""
    spec = example(entry)
    lines = [f"# {entry.kind}", "", f"*{entry.category}* · `{entry.cls.__name__}`", ""]
    if isinstance(spec, AdapterSpec):  # a file each, which begins by saying the idea
        lines += [_text(sys.modules[entry.cls.__module__].__doc__ or "").split("\n")[0], ""]
    for cls in entry.cls.__mro__:
        if cls in (Spec, AdapterSpec):
            break
        if "__doc__" in vars(cls) and cls.__doc__:
            lines += ([] if cls is entry.cls else [f"From `{cls.__name__}`:", ""]) + [_text(cls.__doc__), ""]
    model, whole, note = in_a_model(entry, spec)
    figure = draw(spec, whole)
    figure.savefig(OUT / "parts" / entry.category / f"{entry.kind}.png", dpi=110)
    plt.close(figure)
    lines += [f"![{entry.kind}]({entry.kind}.png)", ""]
    capable = ", ".join(f"{name}: {value}" for name, value in sorted(entry.capabilities.items()))
    whole_rows = entry.category == "pooling" or entry.capabilities.get("causal") is False
    decode = "none: it reads whole rows" if whole_rows else entry.decode
    decode = "" if entry.category in ("objective", "corpus") else decode
    facts = [("source", entry.source), ("tested against", entry.oracle), ("decode", decode), ("can", capable)]
    if isinstance(spec, AdapterSpec):
        facts += adapter_facts(spec)
    lines += ["| | |", "| --- | --- |", *(f"| {name} | {_cell(value)} |" for name, value in facts if value), ""]
    if entry.cls.model_fields:
        rows = [(n, _type(entry.cls, n), _default(i)) for n, i in entry.cls.model_fields.items()]
        lines += ["## Fields", "", "| field | type | default |", "| --- | --- | --- |"]
        lines += [f"| `{name}` | {kind} | {default} |" for name, kind, default in rows] + [""]
    text = yaml.safe_dump(model, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True)
    lines += ["## A spec to paste", "", note, "", "```yaml", text.rstrip(), "```", ""]
    lines += in_python(entry, spec)
    measured = [(name, None) for name in MEASURED.get((entry.category, entry.kind), ())]
    measured += [("adapter_sweep", entry.kind)] if entry.category == "adapter" else []
    for name, kind in measured:
        lines += ["## Measured", "", *result_lines(DOCS / "results" / f"{name}.json", kind=kind)]
    return "\n".join(lines)


def adapter_facts(spec: AdapterSpec) -> list[tuple[str, str]]:
    """What the table of an adapter's page says beyond that of other parts."""
    starts = "yes" if spec.identity else "no"
    merges = "yes: `dt.merge`" if spec.mergeable else "no: it is no change of weights"
    return [("in PEFT", spec.peft_type or "has no name"), ("merges", merges), ("starts as the model was", starts)]


def in_python(entry: Entry, spec: Spec) -> list[str]:
    """The same in Python, for what stands on a model. It is done to the bundled model first."""
    if entry.category not in ("adapter", "lora_init", "storage"):
        return []
    given, model = _short(spec), dt.load(BUNDLED)
    code = ["import dovetail as dt", "", 'model = dt.load("assets/pydoc-llama")']
    if entry.category == "storage":
        quantise(model, given)
        code[1:1] = ["from dovetail.surgery import quantise"]
        code.append(f"errors = quantise(model, {given!r})  # path -> relative error")
    else:
        given = {"kind": "lora", "start": given} if entry.category == "lora_init" else given
        needs = getattr(spec, "needs", ())
        name: dict[str, Any] = {"name": entry.kind} if needs else {}
        for other in needs:
            dt.adapt(model, "bottleneck", name=other)
            code.append(f'dt.adapt(model, "bottleneck", name="{other}")')
        dt.adapt(model, given, **name)
        code.append(f"dt.adapt(model, {given!r}{''.join(f', name={n!r}' for n in name.values())})")
    return ["In Python:", "", "```python", *(line.replace("'", '"') for line in code), "```", ""]


def maps_table() -> str:
    """The registered weight maps, with the classes of exactness that each can give."""
    lines = ["| part | from | to | gives | what it does | source |", "| --- | --- | --- | --- | --- | --- |"]
    for m in map_entries():
        first = (m.function.__doc__ or "").strip().split("\n\n")[0]
        said = (m.category, f"`{m.old}`", f"`{m.new}`", ", ".join(m.gives), first, m.source)
        lines.append("| " + " | ".join(map(_cell, said)) + " |")
    return "\n".join([*lines, ""])


def category_page(category: str, found: list[Entry]) -> str:
    """The table of one category."""
    rows = [f"| [{e.kind}]({e.kind}.md) | {_cell(_first(e))} | {_cell(e.source)} |" for e in found]
    head = [f"# {category}", "", "| kind | what it is | source |", "| --- | --- | --- |"]
    return "\n".join([*head, *rows, ""])


def main() -> None:
    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(dt.__path__, "dovetail."):  # what no other room imports registers too
        if not module.name.startswith("dovetail.cli") and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
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
    (OUT / "maps.md").write_text(maps_table(), encoding="utf-8")
    (OUT / "pairs.md").write_text(pairs.page(), encoding="utf-8")
    (OUT / "kernels.md").write_text(served.page(), encoding="utf-8")
    drawn = algorithms_pictures.write(OUT / "algorithms")
    gallery.write(OUT / "scenes")
    (OUT / "measured").mkdir()
    for name in INCLUDED:
        lines = result_lines(DOCS / "results" / f"{name}.json")
        (OUT / "measured" / f"{name}.md").write_text("\n".join(lines), encoding="utf-8")
    files = sorted((DOCS / "results").glob("*.json"))
    (OUT / "results.md").write_text(results_page(files, benchmarks().values()), encoding="utf-8")
    for name, text in own_pages(files).items():
        (OUT / name).write_text(text, encoding="utf-8")
    print(f"docs/generated: {len(entries())} parts, {len(files)} results, {drawn} pictures of algorithms")


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
    several = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    bare = [get_args(a)[0] if get_origin(a) is Annotated else a for a in several]
    texts = ["null" if a is type(None) else str(a) if get_args(a) else getattr(a, "__name__", str(a)) for a in bare]
    texts = [re.sub(r"Annotated\[(\w+), FieldInfo\([^]]*\]\)\]", r"\1", text) for text in texts]
    return " or ".join(f"`{text.replace('typing.', '').replace('|', 'or')}`" for text in texts)


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "*required*"
    value = info.default
    if isinstance(value, Spec):
        return f"`{value.kind}`"
    if isinstance(value, tuple) and value and isinstance(value[0], Spec):
        return ", ".join(f"`{item.kind}`" for item in value)
    return "null" if value is None else f"`{value!r}`"


def _first(entry: Entry) -> str:
    return (entry.cls.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")


def _text(doc: str) -> str:
    lines = [line.strip() for line in doc.strip().splitlines()]
    return "\n".join(lines).replace("&", "&amp;").replace("<", "&lt;")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


if __name__ == "__main__":
    try:
        main()
    except DovetailError as error:
        sys.exit(f"make docs: {error}")
