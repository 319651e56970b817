"""Commands that look: list, show, eval, preflight."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dovetail.cli.app import app
from dovetail.cli.checks import check_readable, device_named, device_to_plan_for, dtype_to_compute_in, refuse
from dovetail.cli.machine import to_json
from dovetail.errors import UserError, did_you_mean

console = Console()
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output, last line.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Dtype to compute in (fp32 on CPU, the stored one on GPUs).")]
AllowKey = Annotated[list[str] | None, typer.Option("--allow-key", help="A config key that may be ignored.")]


@app.command("list")
def list_parts(
    category: Annotated[str | None, typer.Argument(help="One category: mixer, position, norm, ...")] = None,
    as_json: Json = False,
) -> None:
    """What there is: every registered part by category; layouts of checkpoints; arrangements of layers."""
    from dovetail import adapters, data, objectives  # noqa: F401  (they register their kinds, as the parts do)
    from dovetail.spec import entries
    from dovetail.spec.registry import categories

    beside = _beside()
    known = [*categories(), *beside]
    if category is not None and category not in known:
        raise UserError(f"no category {category!r}", remedy=did_you_mean(category, known))
    parts = [e for e in entries() if category in (None, e.category)]
    others = {name: rows for name, rows in beside.items() if category in (None, name)}
    if as_json:
        found: dict[str, list[dict[str, Any]]] = {}
        for e in parts:
            known = {"kind": e.kind, "source": e.source, "oracle": e.oracle, "decode": e.decode, **e.capabilities}
            found.setdefault(e.category, []).append(known)
        print(to_json(found | others))
        return
    table = Table("category", "kind", "what", "source", box=None, header_style="bold")
    for e in parts:
        table.add_row(*map(escape, (e.category, e.kind, (e.cls.__doc__ or "").strip().splitlines()[0], e.source)))
    for name, rows in others.items():
        for row in rows:
            table.add_row(*map(escape, (name, row["kind"], row["what"], row["source"])))
    console.print(table)


def _beside() -> dict[str, list[dict[str, Any]]]:
    """What has a name and is no part: layouts that checkpoints come in, and changes of a spec that differ by layer."""
    from dovetail.models.family import FAMILIES
    from dovetail.surgery.hybrid import ARRANGEMENTS

    layouts = [
        {"kind": f.name, "what": f"checkpoints whose {f.file} is of {', '.join(f.model_types) or 'its form'}",
         "source": f.read.__module__, "model_types": list(f.model_types), "file": f.file}
        for f in FAMILIES.values()
    ]  # fmt: skip
    arrangements = [
        {"kind": name, "what": (make.__doc__ or "").splitlines()[0] + f" `dovetail.surgery.{name}`", "source": source}
        for name, (make, source) in ARRANGEMENTS.items()
    ]
    return {"arrangement": arrangements, "layout": layouts}


@app.command()
def show(
    path: Annotated[str, typer.Argument(help="Directory of a model, hub id, or YAML spec.")],
    plan: Annotated[bool, typer.Option("--plan", help="Which kernel runs each layer, and why.")] = False,
    device: Annotated[str, typer.Option(help="Device to plan for.")] = "",
    dtype: Annotated[str, typer.Option(help="Type to plan for: float32 on CPU, bfloat16 on CUDA unless given.")] = "",
    as_json: Json = False,
    allow_key: AllowKey = None,
) -> None:
    """What this is: the tree of a model, its size and its plan. Reads no weights."""
    from dovetail.hub.files import dtype_named
    from dovetail.models import build
    from dovetail.training.flops import flops_per_token, parameter_count

    refuse("showing without --plan", [n for n, v in {"--device": device, "--dtype": dtype}.items() if v and not plan])
    where = device_to_plan_for(device)
    kind = dtype or ("bfloat16" if where.startswith("cuda") else "float32")
    computed = dtype_named(kind)
    spec = _spec_of(path, allow_key or [])
    model = build(spec, weights=False)
    length = getattr(spec, "context", None) or 2048
    facts: dict[str, Any] = {
        "parameters": parameter_count(model),
        "context": getattr(spec, "context", None),
        "flops_per_token": flops_per_token(model, length),
    }
    plans = _plans(model.to(computed), where, length) if plan else None
    if as_json:
        data = facts | {"spec": spec.to_dict()}
        if plans is not None:
            data["plan_dtype"] = kind
            data["plan"] = [
                {"layers": span, "use": use, "path": path, "why": why, "reference": plain}
                for span, use, path, why, plain in plans
            ]
        print(to_json(data))
        return
    print(spec)  # as it is: rich would break its lines
    console.print(
        f"\n{facts['parameters']:,} parameters, context {facts['context'] or 'unbounded'}, "
        f"{facts['flops_per_token'] / 1e6:,.1f} MFLOP a token at length {length}"
    )
    if plans is not None:
        table = Table(
            "layers",
            "use",
            "kernel",
            "why",
            box=None,
            header_style="bold",
            title=f"plan on {where} in {kind}",
            title_justify="left",
        )
        for span, use, path, why, plain in plans:
            table.add_row(*map(escape, (span, use, f"{path} (reference)" if plain else path, why)))
        console.print(table)


@app.command("eval")
def evaluate(
    path: Annotated[str, typer.Argument(help="Directory of a model, or hub id.")],
    text: Annotated[Path, typer.Option("--text", help="A UTF-8 text file.")],
    length: Annotated[
        int | None, typer.Option(min=1, help="Window in tokens (the model's context unless given).")
    ] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Step of the window (half of it unless given).")] = None,
    ngram: Annotated[
        Path | None, typer.Option("--ngram", help="A text like it: n-grams fitted on that, as the trivial rival.")
    ] = None,
    ngram_order: Annotated[int | None, typer.Option(min=1, help="n of --ngram (3 unless given).")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "",
    dtype: Dtype = "",
    as_json: Json = False,
    allow_key: AllowKey = None,
) -> None:
    """Score one model on a text: nats per token and perplexity."""
    from dovetail.hub import load, load_tokenizer
    from dovetail.hub.remote import resolve
    from dovetail.report.evaluate import evaluate as score

    check_readable(text, "--text")
    if ngram is not None:
        check_readable(ngram, "--ngram")
    refuse("scoring without --ngram", ["--ngram-order"] if ngram is None and ngram_order is not None else [])
    on = device_named(device)
    computed = dtype_to_compute_in(dtype, on)
    folder = resolve(path)
    model = load(folder, dtype=computed, device=on, allow_keys=allow_key or [])
    tokenizer = load_tokenizer(folder)
    whole = _read(text)  # once: it may be a pipe
    result = score(model, tokenizer, whole, length=length, stride=stride)
    if ngram is not None:
        from dovetail.report.ngram_rival import ngram_rival

        found = ngram_rival(tokenizer, _read(ngram), whole, ngram_order or 3)
        result |= {f"ngram_{name}": value for name, value in found.items()}
    if as_json:
        print(to_json(result))
        return
    for name, value in result.items():
        console.print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}", highlight=False)


@app.command()
def preflight(
    recipe: Annotated[Path, typer.Argument(help="A training recipe (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="path=value ...")] = None,
    as_json: Json = False,
) -> None:
    """Will it fit, how long will it take: the first batch in colour, memory and time predicted."""
    from dovetail.training.preflight import preflight as run

    result = run(recipe, overrides or [])
    if as_json:
        print(to_json(result.to_dict()))
    else:
        console.print(result)


def _spec_of(path: str, allow: list[str]) -> Any:
    from dovetail.hub.load import read_config
    from dovetail.hub.remote import resolve
    from dovetail.spec import Spec
    from dovetail.training.recipe import read_yaml

    file = Path(path)
    if file.suffix in (".yaml", ".yml", ".json") and file.is_file():
        _read(file)  # it says what is not UTF-8
        data = read_yaml(file)
        return Spec.parse("model", data.get("model", data) if isinstance(data, dict) else data, where=str(file))
    return read_config(resolve(path), allow)[0]


def _plans(model: Any, device: str, length: int) -> list[tuple[str, str, str, str, bool]]:
    """(module path with * for layers that agree, use, kernel, why, whether that is plain torch for want of a kernel)."""
    import re

    rows: dict[tuple[str, str, str, str, bool], list[str]] = {}
    for name, module in model.named_modules():
        if hasattr(module, "plans"):
            star = re.sub(r"blocks\.\d+", "blocks.*", name)
            for use, chosen in module.plans(device, length).items():
                key = (star, use, chosen.path, chosen.why, chosen.falls_back(device))
                rows.setdefault(key, []).append(name)
    out = []
    for (star, use, path, why, plain), names in rows.items():
        layers = sorted({int(n) for name in names for n in re.findall(r"blocks\.(\d+)", name)})
        total = sum(1 for s, u, *_ in rows if (s, u) == (star, use))
        span = star if total == 1 else f"{star} {layers}"
        out.append((span, use, path, why, plain))
    return out


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}", remedy="convert it to UTF-8") from None
