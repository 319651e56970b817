"""dovetail algo ngram: fit an n-gram model on a text file; perplexity, suggestions, new text, an ARPA file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dovetail.cli.algo import algo
from dovetail.cli.checks import check_file, check_text, refuse
from dovetail.cli.inspect import Json
from dovetail.cli.machine import to_json
from dovetail.errors import UserError, did_you_mean


@algo.command()
def ngram(
    source: Annotated[Path, typer.Argument(help="A UTF-8 text file of any size to fit on, or an ARPA file (.arpa).")],
    order: Annotated[int | None, typer.Option(min=1, help="n of the n-grams (3 unless given).")] = None,
    smoothing: Annotated[
        str | None,
        typer.Option(
            help="mle, add-k, good-turing, witten-bell, kneser-ney, modified-kneser-ney (the default), stupid-backoff."
        ),
    ] = None,
    unit: Annotated[str, typer.Option(help="word (a line is a sentence), character or byte.")] = "word",
    perplexity: Annotated[Path | None, typer.Option("--perplexity", help="A text file to measure.")] = None,
    suggest: Annotated[str | None, typer.Option("--suggest", help="What comes after this text?")] = None,
    generate: Annotated[int | None, typer.Option("--generate", min=1, help="So many new tokens.")] = None,
    prompt: Annotated[str, typer.Option(help="What the new tokens go on with.")] = "",
    seed: Annotated[int | None, typer.Option(min=0, help="Reproduces a generated text (0 unless given).")] = None,
    arpa: Annotated[Path | None, typer.Option("--arpa", help="Save the model here, as an ARPA file.")] = None,
    memory: Annotated[
        int | None, typer.Option(min=1, help="MiB that counting may use before it goes to disk (1024 unless given).")
    ] = None,
    as_json: Json = False,
) -> None:
    """N-grams: fit, perplexity, next tokens, new text."""
    from dovetail.stats import NGram
    from dovetail.stats.ngram import UNITS, tokenise

    if unit not in UNITS:
        raise UserError(f"no unit {unit!r}", where="--unit", remedy=did_you_mean(unit, UNITS))
    idle = [name for name, given in {"--prompt": bool(prompt), "--seed": seed is not None}.items() if given]
    if idle and generate is None:
        raise UserError(f"{' and '.join(idle)} without --generate has no effect", remedy="give --generate 20")
    if arpa is not None:
        check_file(arpa, "--arpa", (source, perplexity))
    check_text(prompt, "--prompt")
    check_text(suggest or "", "--suggest")
    if source.suffix == ".arpa":
        given = {"--order": order, "--smoothing": smoothing, "--memory": memory}
        refuse("an ARPA file", [name for name, value in given.items() if value is not None])
        model = NGram.load_arpa(source, unit=unit)  # type: ignore[arg-type]
    else:
        model = NGram.fit_file(
            source,
            order or 3,
            smoothing or "modified-kneser-ney",
            unit=unit,
            memory=(memory or 1024) << 20,  # type: ignore[arg-type]
        )
    facts: dict[str, Any] = {"order": model.order, "ngrams": list(model.sizes), "notes": list(model.notes)}
    if arpa is not None:
        model.save_arpa(arpa)
        facts["arpa"] = str(arpa)
    if perplexity is not None:
        from dovetail.data.corpus import read_text

        text = read_text(perplexity)
        facts["perplexity"] = model.perplexity(text)
        facts["perplexity_without_oov"] = model.perplexity(text, oov=False)
        scores = model.sentences(text)
        facts["tokens"], facts["oov"] = sum(s.tokens for s in scores), sum(s.oov for s in scores)
    if suggest is not None:
        facts["suggestions"] = model.suggest(["<s>", *_tokens(suggest, tokenise, unit)], 5)
    if generate is not None:
        from dovetail.stats.ngram.vocabulary import text_of

        given = _tokens(prompt, tokenise, unit)
        new = model.generate(given, generate, seed=seed or 0)
        facts["text"] = text_of([*given, *new], unit)  # type: ignore[arg-type]
    if as_json:
        print(to_json(facts))
        return
    print(", ".join(f"{size:,} {n}-grams" for n, size in enumerate(model.sizes, 1)))
    for note in model.notes:
        print(note)
    if perplexity is not None:
        print(
            f"perplexity {facts['perplexity']:.2f} over {facts['tokens']:,} tokens, of which {facts['oov']:,} are "
            f"unknown; {facts['perplexity_without_oov']:.2f} without them"
        )
    for token, p in facts.get("suggestions", ()):
        print(f"{p:8.4f}  {token!r}")
    if generate is not None:
        print(facts["text"])
    if arpa is not None:
        print(f"saved to {arpa}")


def _tokens(text: str, tokenise: Any, unit: str) -> list[str]:
    return [token for sentence in tokenise(text, unit) for token in sentence]
