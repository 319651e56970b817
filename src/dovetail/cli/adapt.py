"""dovetail adapt: train an adapter, merge one, list what there is; and the mode of swap that extracts one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dovetail.cli.app import app
from dovetail.cli.checks import check_format, check_out, check_resumable, device_named, refuse
from dovetail.cli.inspect import AllowKey, Json, _spec_of
from dovetail.cli.machine import to_json
from dovetail.errors import CheckpointError, ConfigError, UserError

console = Console()
SHOWN = 12  # lines of what an extraction leaves out; the report holds all


@app.command()
def adapt(
    path: Annotated[
        str | None, typer.Argument(help="Directory of a model, or hub id; with --list, an adapter's.")
    ] = None,
    recipe: Annotated[Path | None, typer.Argument(help="A training recipe (YAML) with an adapter: section.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="path=value ..., e.g. adapter.rank=8")] = None,
    merge: Annotated[
        str | None, typer.Option("--merge", help="Directory of an adapter to merge into the model.")
    ] = None,
    as_list: Annotated[
        bool, typer.Option("--list", help="What adapters there are, what one is, or what a model's targets are called.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Where the adapter, or the merged model, goes.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in out.")] = False,
    device: Annotated[str, typer.Option(help="To merge on: cpu, cuda, ...")] = "",
    as_json: Json = False,
    allow_key: AllowKey = None,
) -> None:
    """Train an adapter on a model by a recipe, merge one into it, or list what there is."""
    modes = {"a recipe": recipe is not None, "--merge": merge is not None, "--list": as_list}
    asked = [name for name, said in modes.items() if said]
    if len(asked) != 1:
        raise UserError(
            f"{' and '.join(asked) or 'nothing'} to do",
            remedy="give a recipe to train by, --merge ADAPTER --out DIR, or --list",
        )
    given = {"--resume": resume, "--out": out is not None, "--device": device, "--allow-key": allow_key}
    reads = {
        "a recipe": ("--resume", "--out"),
        "--merge": ("--out", "--device", "--allow-key"),
        "--list": ("--allow-key",),
    }
    refuse(asked[0], [name for name, said in given.items() if said and name not in reads[asked[0]]])
    if as_list:
        _list(path, allow_key or [], as_json)
        return
    if path is None:
        raise UserError("no model", remedy="give its directory, or a hub id, first")
    if merge is not None:
        if out is None:
            raise UserError("no folder for the merged model", where="--out", remedy="give --out DIR")
        check_out(out, model=path)
        data = _merge(path, merge, out, device_named(device), allow_key or [])
    else:
        assert recipe is not None
        data = _train(path, recipe, overrides or [], out, resume)
    if as_json:
        print(to_json(data))
    else:
        print(f"merged, and saved to {out}" if merge is not None else f"saved to {data['out']}")


def _train(path: str, recipe: Path, overrides: list[str], out: Path | None, resume: bool) -> dict[str, Any]:
    from dovetail.hub.remote import resolve
    from dovetail.training import fit
    from dovetail.training.recipe import Recipe, TokenizerTraining

    said = [f"model={json.dumps(str(resolve(path)))}", *overrides]
    if out is not None:
        said.append(f"out={json.dumps(str(out))}")
    whole = Recipe.load(recipe, said)
    if whole.adapter is None:
        raise UserError(
            "the recipe has no adapter",
            where=str(recipe),
            remedy="add adapter: {kind: lora}, or train all with dovetail train",
        )
    if isinstance(whole.tokenizer, TokenizerTraining):
        raise UserError(
            "the recipe trains a tokenizer, whose ids mean nothing to a trained model",
            where=f"{recipe}: tokenizer",
            remedy="leave it out: the model has its own (tokenizer=null)",
        )
    if resume:
        check_resumable(whole.out)
    return fit(whole, resume=resume).to_dict()


def _merge(path: str, adapter: str, out: Path, device: str, allow: list[str]) -> dict[str, Any]:
    from dovetail.adapters import adapters, load_adapter, merge_and_forget
    from dovetail.hub import load, save
    from dovetail.hub.remote import resolve

    folder = resolve(path)
    model = load(folder, device=device, allow_keys=allow)
    load_adapter(model, resolve(adapter))
    (spec,) = adapters(model).values()
    merge_and_forget(model)
    chosen = "hf"
    try:
        save(model, out, format="hf", tokenizer_from=folder)
    except (ConfigError, CheckpointError):
        chosen = "dovetail"
        save(model, out, format="dovetail", tokenizer_from=folder)
    return {"out": str(out), "format": chosen, "adapter": spec.to_dict()}


def _list(path: str | None, allow: list[str], as_json: bool) -> None:
    from dovetail.adapters.files import NATIVE, PEFT
    from dovetail.hub.remote import resolve
    from dovetail.spec import entries

    if path is not None:
        folder = resolve(path)
        here = (folder / PEFT).exists() or (folder / NATIVE).exists()
        facts = _adapter(folder) if here else _targets(str(folder), allow)
        if as_json:
            print(to_json(facts))
        elif here:
            for name, value in facts.items():
                shown = ", ".join(value) if isinstance(value, list) else value
                console.print(f"{name}: {shown}", highlight=False, markup=False)
        else:
            console.print(
                _table(
                    ("target", "places", "shape"), [(t["target"], t["places"], t["shape"]) for t in facts["targets"]]
                )
            )
        return
    known: list[Any] = [e for e in entries() if e.category == "adapter"]
    rows = [(e.kind, _line(e.cls), "yes" if e.cls.mergeable else "no", e.cls.peft_type or "", e.source) for e in known]
    columns = ("kind", "what", "merges", "PEFT", "source")
    if as_json:
        print(to_json({"adapters": [dict(zip(columns, row, strict=True)) for row in rows]}))
    else:
        console.print(_table(columns, rows))


def _adapter(folder: Path) -> dict[str, Any]:
    """What an adapter's directory holds."""
    from dovetail.adapters.files import read

    spec, stored = read(folder)
    said = spec.to_dict()
    found = {"kind": spec.kind, "rank": said.pop("rank", None), "targets": said.pop("targets", None)}
    found |= {name: value for name, value in said.items() if name != "kind" and value not in (None, {}, [])}
    found["parameters"] = sum(t.numel() for t in stored.values())
    return {name: value for name, value in found.items() if value is not None}


def _targets(path: str, allow: list[str]) -> dict[str, Any]:
    """What the weights of a model may be called as targets: last steps of names, with how many they mean."""
    from dovetail.adapters.base import places
    from dovetail.adapters.factors import label
    from dovetail.models import build

    found: Counter[tuple[str, str]] = Counter()
    for site in places(build(_spec_of(path, allow), weights=False)):
        place: Any = site.place
        for segment in site.segments:
            width = getattr(place, "in_features", None) or place.embedding_dim
            found[label(segment).rsplit(".", 1)[-1], f"{segment.stop - segment.start} x {width}"] += 1
    return {"targets": [{"target": t, "places": str(n), "shape": shape} for (t, shape), n in found.items()]}


def extracted(
    base: str, tuned: str, out: Path, *, rank: int | None, energy: float | None, targets: list[str] | None,
    format: str, device: str, allow: list[str], as_json: bool,
) -> None:  # fmt: skip
    """`dovetail swap --extract`: the LoRA that turns `base` into `tuned`, saved to `out` with its account."""
    from dovetail.adapters import extract, save_adapter
    from dovetail.adapters.files import check_room
    from dovetail.hub import load
    from dovetail.hub.remote import resolve

    check_out(out)
    check_format(format, ("hf", "peft", "dovetail"))
    check_room(out)
    folder = resolve(base)
    models = [load(f, device=device, allow_keys=allow) for f in (folder, resolve(tuned))]
    model, account = extract(*models, rank=rank, energy=energy, targets=tuple(targets) if targets else None)
    chosen = format or "hf"
    try:
        save_adapter(model, out, format="peft" if chosen == "hf" else chosen)  # type: ignore[arg-type]
    except ConfigError:
        if format:
            raise
        chosen = "dovetail"
        save_adapter(model, out, format="dovetail")
    data = account.to_dict() | {"layers": account.layers, "out": str(out), "format": chosen}
    (out / "extract-report.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print(to_json(data))
        return
    changed = [s for s in account.segments if s.rank]
    rows = [(name, f"{error:.4f}") for name, error in account.layers.items()]
    console.print(_table(("layer", "relative error"), rows))
    spread = sorted({s.rank for s in changed})
    ranks = str(spread[0]) if len(spread) == 1 else f"{spread[0]} to {spread[-1]}"
    console.print(
        f"{len(changed)} of {len(account.segments)} maps changed; rank {ranks}, {account.parameters:,} parameters",
        highlight=False,
    )
    left = [f"{u.name} (relative change {u.change:.2e})" for u in account.uncovered]
    left += [f"{where}: {a} in the base, {b} in the tuned model" for where, a, b in account.settings]
    if left:
        more = [f"... and {len(left) - SHOWN} more in extract-report.json"] if len(left) > SHOWN else []
        text = "\n  ".join([*left[:SHOWN], *more])
        console.print(
            f"the tuned model differs besides, and the adapter leaves that out:\n  {text}",
            highlight=False,
            markup=False,
        )
    print(f"saved to {out}")


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(*columns, box=None, header_style="bold")
    for row in rows:
        table.add_row(*map(escape, row))  # a formula's [P; x] is no markup
    return table


def _line(cls: type[Any]) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]
