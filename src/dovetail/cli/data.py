"""`dovetail data`: what is done to training text before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dovetail.cli.app import app
from dovetail.cli.checks import check_file, refuse
from dovetail.cli.inspect import Json
from dovetail.cli.machine import to_json
from dovetail.errors import UserError, did_you_mean

data = typer.Typer(
    name="data",
    help="Training data: filter text by quality, draw scenes, windows and clips.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data)


@data.callback()
def _group() -> None:
    """Makes `filter` a command of its own while it is the only one."""


@data.command("filter")
def filter_text(
    source: Annotated[Path, typer.Argument(help="JSON Lines (.jsonl), or text with a separator between documents.")],
    reference: Annotated[Path, typer.Option("--reference", help="Text that is good: the model is fitted on it.")],
    out: Annotated[Path, typer.Option("--out", help="Where the kept documents go, in the form of the source.")],
    high: Annotated[float, typer.Option(help="Keep perplexities up to this quantile.")] = 0.5,
    low: Annotated[float, typer.Option(help="Keep perplexities from this quantile.")] = 0.0,
    order: Annotated[int, typer.Option(min=1, help="n of the n-grams.")] = 3,
    unit: Annotated[str, typer.Option(help="word, character or byte (character for Chinese).")] = "word",
    field: Annotated[str | None, typer.Option(help="Where JSON Lines hold the text (text unless given).")] = None,
    separator: Annotated[
        str | None, typer.Option(help=r"Between documents of a text file; \n is a line end (\n\n unless given).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Keep the documents that read like a reference, by perplexity under an n-gram model."""
    from dovetail.data.filter import filter_documents
    from dovetail.stats import NGram
    from dovetail.stats.ngram import UNITS

    if unit not in UNITS:
        raise UserError(f"no unit {unit!r}", where="--unit", remedy=did_you_mean(unit, UNITS))
    if source.suffix == ".jsonl":
        refuse("JSON Lines", ["--separator"] if separator is not None else [])
    else:
        refuse("a text file", ["--field"] if field is not None else [])
    check_file(out, "--out", (source, reference))
    texts, pieces, between = _documents(source, field or "text", r"\n\n" if separator is None else separator)
    model = NGram.fit_file(reference, order, unit=unit)  # type: ignore[arg-type]
    found = filter_documents(texts, model, low=low, high=high)
    kept = [piece for piece, keep in zip(pieces, found.keep, strict=True) if keep]
    try:
        out.write_text(between.join(kept) + ("\n" if between == "\n" else ""), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror or error}", where=str(out)) from None
    facts: dict[str, Any] = {
        "documents": len(texts),
        "kept": len(kept),
        "perplexity_from": found.bounds[0],
        "perplexity_to": found.bounds[1],
        "characters_kept": sum(len(t) for t, keep in zip(texts, found.keep, strict=True) if keep)
        / sum(map(len, texts)),
        "out": str(out),
        "notes": list(model.notes),
    }
    if as_json:
        print(to_json(facts))
        return
    print(
        f"kept {facts['kept']} of {facts['documents']} documents ({facts['characters_kept']:.1%} of the characters): "
        f"perplexity {found.bounds[0]:.1f} to {found.bounds[1]:.1f}\nsaved to {out}"
    )
    for note in model.notes:
        print(note)


def _documents(source: Path, field: str, separator: str) -> tuple[list[str], list[str], str]:
    """(texts, what is written for each, what stands between)."""
    from dovetail.data.corpus import json_objects, no_text, read_text

    if source.suffix != ".jsonl":
        between = separator.replace("\\n", "\n")
        if not between:
            raise UserError("an empty separator", where="--separator", remedy=r"give e.g. '\n\n' or '\n'")
        text = read_text(source)
        between = between if between in text else between.replace("\n", "\r\n")
        texts = [part for part in text.split(between) if part.strip()]
        return texts, texts, between
    texts, lines = [], []
    for where, row in json_objects(source):
        text = row.get(field)
        if not isinstance(text, str):
            raise no_text(field, row, where, "set --field to one of")
        texts.append(text)
        lines.append(json.dumps(row, ensure_ascii=False))
    return texts, lines, "\n"
