"""Commands that do: train, generate, swap, compare."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dovetail.cli.adapt import extracted
from dovetail.cli.app import app
from dovetail.cli.checks import (
    check_format,
    check_out,
    check_readable,
    check_resumable,
    check_text,
    device_named,
    dtype_to_compute_in,
    refuse,
)
from dovetail.cli.drafting import draft_of
from dovetail.cli.inspect import AllowKey, Dtype, Json, _read
from dovetail.cli.machine import finite, to_json
from dovetail.errors import UserError

console = Console()
aside = Console(stderr=True)  # what is said about a text is no part of it


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A training recipe (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="path=value ..., e.g. train.steps=40 out=runs/a")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in out.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model by a recipe."""
    from dovetail.training import fit
    from dovetail.training.recipe import Recipe

    whole = Recipe.load(recipe, overrides or [])
    if resume:
        check_resumable(whole.out)
    result = fit(whole, resume=resume)
    print(to_json(result.to_dict()) if as_json else f"saved to {result.out}")


@app.command()
def generate(
    path: Annotated[str, typer.Argument(help="Directory of a model, or hub id.")],
    prompt: Annotated[list[str], typer.Option("--prompt", help="The prompt; repeat it for a batch.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 64,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy. 1 unless given, and 0 with --beams, which are not drawn.")
    ] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    min_p: Annotated[float | None, typer.Option()] = None,
    repetition_penalty: Annotated[float, typer.Option()] = 1.0,
    beams: Annotated[int, typer.Option(help="Beam search when above 1.")] = 1,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.")] = None,
    seed: Annotated[int | None, typer.Option(help="Reproduces a sampled text (0 unless given).")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the chat template.")] = False,
    draft: Annotated[
        str,
        typer.Option("--draft", help="Speculate: lookup, ngram:FILE (.arpa over ids, or a text), or a model's path."),
    ] = "",
    draft_tokens: Annotated[int | None, typer.Option(help="So many tokens are drafted at a time.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the step: slow to begin, then fast.")] = False,
    storage: Annotated[str, typer.Option(help="Keep the blocks' weights in codes: int8, int4, nf4.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "",
    dtype: Dtype = "",
    as_json: Json = False,
    allow_key: AllowKey = None,
) -> None:
    """Sample from a model."""
    from dovetail.hub import load, load_tokenizer
    from dovetail.hub.remote import resolve
    from dovetail.sampling import Sampling, Speculation, sample, stream
    from dovetail.surgery import quantise

    refuse("generating without --draft", ["--draft-tokens"] if draft_tokens is not None and not draft else [])
    for given in (*prompt, *(stop or ())):
        check_text(given, "--prompt" if given in prompt else "--stop")
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": (1.0 if beams == 1 else 0.0) if temperature is None else temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "beams": beams,
        "stop": tuple(stop or ()),
    }
    if options["temperature"] > 0 or seed is not None:
        options["seed"] = seed or 0
    sampling = Sampling.of(**options)  # which says what contradicts, before anything is loaded
    on = device_named(device)
    how: dict[str, Any] = {"dtype": dtype_to_compute_in(dtype, on), "device": on, "allow_keys": allow_key or []}
    folder = resolve(path)
    tokenizer = load_tokenizer(folder)
    prompts = [tokenizer.chat([{"role": "user", "content": p}]) for p in prompt] if chat else prompt
    model = load(folder, **how)
    if told := model.origin.decoding:
        aside.print(f"not applied, of what the model says of generating: {', '.join(told)}", style="dim", markup=False)
    if storage:
        quantise(model, storage)
    guess = draft_of(draft, draft_tokens, model, tokenizer, **how) if draft else None
    if len(prompts) == 1 and beams == 1 and not as_json:  # as it comes
        pieces = stream(model, tokenizer, prompts[0], draft=guess, compile=compile, **options)
        before = _dim(prompt[0])  # shown with the first piece: what is refused is refused first
        while True:
            try:
                print(before + next(pieces), end="", flush=True)
                before = ""
            except StopIteration as end:
                print(before)
                if guess:
                    aside.print(str(end.value), style="dim", highlight=False)
                return
    result = sample(model, tokenizer, prompts, sampling, draft=guess, compile=compile)
    assert result.texts is not None
    drafted = result.speculation or ()
    if as_json:
        rows: list[dict[str, Any]] = [{"prompt": p, "text": t} for p, t in zip(prompt, result.texts, strict=True)]
        for row, found in zip(rows, drafted):
            row["draft"] = found.to_dict()
        print(to_json(rows))
        return
    for p, t in zip(prompt, result.texts, strict=True):
        print(_dim(p) + t)  # rich would break lines, and change tabs and :words:
    if drafted:
        aside.print(str(Speculation.total(drafted)), style="dim", highlight=False)


def _dim(prompt: str) -> str:
    return typer.style(prompt, dim=True) if sys.stdout.isatty() else prompt


@app.command()
def swap(
    path: Annotated[str, typer.Argument(help="Directory of a model, or hub id.")],
    changes: Annotated[
        list[str],
        typer.Argument(help="path=value ..., e.g. 'blocks.*.mixer.kv_heads=2'; with --extract, the tuned model."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Where the new model goes.")],
    text: Annotated[Path | None, typer.Option("--text", help="A text to measure before and after on.")] = None,
    heal: Annotated[
        Path | None, typer.Option("--heal", help="YAML {data: corpus, train: {...}}: train a little after the swap.")
    ] = None,
    fresh: Annotated[
        list[str] | None, typer.Option("--fresh", help="Path of parts that start at random, e.g. 'blocks.*.mixer'.")
    ] = None,
    extract: Annotated[
        bool, typer.Option("--extract", help="BASE TUNED: what training changed, as a LoRA for the base.")
    ] = False,
    rank: Annotated[int | None, typer.Option(help="Of the extracted LoRA.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Instead: the share of the squared norm it keeps, e.g. 0.9.")
    ] = None,
    targets: Annotated[
        list[str] | None, typer.Option("--target", help="What to extract (every linear map but the head unless given).")
    ] = None,
    format: Annotated[
        str, typer.Option(help='"hf" (the published layout; PEFT\'s with --extract) or "dovetail".')
    ] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "",
    as_json: Json = False,
    allow_key: AllowKey = None,
) -> None:
    """Put other parts into a model, carry the weights over, and report what it cost."""
    if extract:
        refuse("--extract", [n for n, v in {"--text": text, "--heal": heal, "--fresh": fresh}.items() if v])
        if len(changes) != 1:
            raise UserError(f"{len(changes)} models beside the base", remedy="write --extract BASE TUNED")
        extracted(
            path, changes[0], out, rank=rank, energy=energy, targets=targets,
            format=format, device=device_named(device), allow=allow_key or [], as_json=as_json,
        )  # fmt: skip
        return
    refuse("a swap", [n for n, v in {"--rank": rank, "--energy": energy, "--target": targets}.items() if v is not None])
    from dovetail.errors import CheckpointError, ConfigError
    from dovetail.hub import load, load_tokenizer, save
    from dovetail.hub.remote import resolve
    from dovetail.report import html
    from dovetail.report.swap import swap as do
    from dovetail.spec import parse_assignment
    from dovetail.training.recipe import read_yaml

    check_out(out, model=path)
    check_format(format, ("hf", "dovetail"))
    on = device_named(device)
    folder = resolve(path)
    model = load(folder, device=on, allow_keys=allow_key or [])
    texts = None
    tokenizer = None
    if text is not None:
        check_readable(text, "--text")
        texts, tokenizer = [_read(text)], load_tokenizer(folder)
    how = None if heal is None else read_yaml(heal)
    asked: dict[str, Any] = {}
    for where, value in map(parse_assignment, changes):
        if where in asked:
            raise UserError(
                f"{where} is given twice", remedy="give each path once: what is inside has a path of its own"
            )
        asked[where] = value
    new, report = do(model, asked, texts=texts, tokenizer=tokenizer, heal=how, fresh=fresh or [])
    chosen = format or "hf"
    try:
        save(new, out, format=chosen, tokenizer_from=folder)  # type: ignore[arg-type]
    except (ConfigError, CheckpointError):
        if format:
            raise
        chosen = "dovetail"
        save(new, out, format="dovetail", tokenizer_from=folder)
    data = report.to_dict() | {"out": str(out), "format": chosen}
    (out / "swap-report.json").write_text(json.dumps(finite(data), indent=2) + "\n", encoding="utf-8")
    (out / "swap-report.html").write_text(html.page(report), encoding="utf-8")
    if as_json:
        print(to_json(data))
        return
    console.print(report)
    if chosen == "dovetail" and not format:
        print("saved in Dovetail's own layout: the published one cannot say this model")
    print(f"saved to {out}")


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(help="A comparison recipe (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="path=value ...")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where index.html and report.json go.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs at a time, of a recipe whose arms train.")] = 1,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Run only this arm, of a recipe with `base` or `at`; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run arms side by side (of one model, of one training recipe under `base`, or against lengths `at`): one report."""
    from dovetail.report.compare import compare as run
    from dovetail.report.scaling import is_scaling, scaling
    from dovetail.report.study import is_study, study

    if out is not None:
        check_out(out)
    result: Any
    if is_study(recipe):
        result = study(recipe, out=out, overrides=overrides or [], only=only or [], jobs=jobs)
    elif is_scaling(recipe):
        refuse("a recipe that measures against length", ["--jobs"] if jobs != 1 else [])
        result = scaling(recipe, out=out, overrides=overrides or [], only=only or [])
    else:
        given = {"--jobs": jobs != 1, "--only": bool(only)}
        refuse("a recipe whose arms do not train", [name for name, said in given.items() if said])
        result = run(recipe, out=out, overrides=overrides or [])
    if as_json:
        print(to_json(result.to_dict()))
