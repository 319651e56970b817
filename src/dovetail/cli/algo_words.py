"""`dovetail algo words`: train word vectors on a text, or load them; ask and score them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from dovetail.cli.algo import algo
from dovetail.cli.checks import check_file, check_readable, device_named, refuse
from dovetail.cli.inspect import Json, _read
from dovetail.cli.machine import to_json
from dovetail.errors import UserError

console = Console()
OPTIONS = {"min_count": "--min-count", "device": "--device", "seed": "--seed", "progress": "nothing: it is shown"}


@algo.command()
def words(
    source: Annotated[Path, typer.Argument(help="A UTF-8 text to train on, or vectors: .bin, .vec, .w2v.")],
    method: Annotated[str, typer.Option(help="skipgram, cbow, pmi or glove.")] = "skipgram",
    option: Annotated[list[str] | None, typer.Option("--set", help="name=value of the method: dim=50.")] = None,
    min_count: Annotated[int, typer.Option(min=1, help="Rarer words are dropped.")] = 5,
    nearest: Annotated[list[str] | None, typer.Option(help="A word whose neighbours are shown.")] = None,
    analogy: Annotated[list[str] | None, typer.Option(help="'a b c': a is to b as c is to what?")] = None,
    rule: Annotated[str | None, typer.Option(help="Of analogies: 3cosadd (the default) or 3cosmul.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Answers to a question (8 unless given).")] = None,
    questions: Annotated[Path | None, typer.Option(help="Analogies to score, as questions-words.txt.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="Word pairs with people's scores.")] = None,
    save: Annotated[Path | None, typer.Option(help="word2vec's format: binary for .bin, else text.")] = None,
    device: Annotated[str, typer.Option(help="Where skipgram, cbow and glove train.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the training.")] = 0,
    as_json: Json = False,
) -> None:
    """Word vectors: train on a text or load them, then neighbours, analogies, scores."""
    from dovetail.stats import WordVectors

    analogies, lists = analogy or questions is not None, nearest or analogy
    refuse("words without --analogy or --questions", ["--rule"] if rule is not None and not analogies else [])
    refuse("words without --nearest or --analogy", ["--count"] if count is not None and not lists else [])
    rule, count = rule or "3cosadd", count or 8
    if save is not None:
        check_file(save, "--save", (source, questions, pairs))
    given = {"--set": option, "--method": method != "skipgram", "--min-count": min_count != 5, "--seed": seed}
    if source.suffix in (".bin", ".vec", ".w2v"):
        idle = [name for name, value in given.items() if value] + (["--device"] if device != "cpu" else [])
        if idle:
            raise UserError(f"{source} holds vectors, and {', '.join(idle)} say how to train", where="algo words")
        vectors = WordVectors.load(source)
    else:
        vectors = _train(source, method, option or [], min_count, device, seed)
    if save is not None:
        vectors.save(save)
    answers: dict[str, Any] = {"words": len(vectors), "dim": vectors.matrix.shape[1]}
    asked = {word: vectors.nearest(word, count) for word in nearest or []}
    for line in analogy or []:
        three = line.split()
        if len(three) != 3:
            raise UserError(f"{line!r} is not three words", where="--analogy", remedy="write 'man king woman'")
        asked[line] = vectors.analogy(*three, count=count, rule=rule)  # type: ignore[arg-type]
    answers["answers"] = asked
    if questions is not None:
        score = vectors.score_analogies(questions, rule)  # type: ignore[arg-type]
        answers["analogies"] = {
            "accuracy": score.accuracy, "asked": score.asked, "skipped": score.skipped,
            "sections": {name: {"right": right, "asked": total} for name, right, total in score.sections},
        }  # fmt: skip
    if pairs is not None:
        spearman, used, missing = vectors.score_similarity(pairs)
        answers["similarity"] = {"spearman": spearman, "pairs": used, "missing": missing}
    if as_json:
        print(to_json(answers))
    else:
        _show(answers)


def _train(source: Path, method: str, settings: list[str], min_count: int, device: str, seed: int) -> Any:
    import yaml

    from dovetail.spec.documents import Loader
    from dovetail.stats import WordVectors, sentences_of

    check_readable(source, "algo words")
    options: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"{setting!r} is not name=value", where="--set", remedy="write dim=50")
        if name in OPTIONS:
            raise UserError(f"{name} is no option of a method", where="--set", remedy=f"give {OPTIONS[name]}")
        try:
            options[name] = yaml.load(value, Loader)
        except yaml.YAMLError as error:
            raise UserError(f"the value of {name} is not YAML: {error}", where="--set", remedy="write dim=50") from None
    aside = Console(stderr=True)
    with Progress(console=aside, transient=True, disable=not aside.is_terminal) as bar:
        task = bar.add_task(escape(method), total=None)
        return WordVectors.fit(
            sentences_of(_read(source)), method, min_count=min_count, device=device_named(device), seed=seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total), **options,
        )  # fmt: skip


def _show(answers: dict[str, Any]) -> None:
    console.print(f"{answers['words']:,} words, width {answers['dim']}", highlight=False)
    table = Table("asked", box=None, header_style="bold")
    table.add_column("answers", overflow="fold")
    for question, found in answers["answers"].items():
        table.add_row(escape(question), escape("  ".join(f"{word} {score:.2f}" for word, score in found)))
    if answers["answers"]:
        console.print(table, highlight=False)
    if "analogies" in answers:
        score = answers["analogies"]
        console.print(
            f"analogies: {_or_none(score['accuracy'], '.1%')} of {score['asked']:,} ({score['skipped']:,} left out)",
            highlight=False,
        )
    if "similarity" in answers:
        score = answers["similarity"]
        console.print(
            f"similarity: {_or_none(score['spearman'], '.3f')} over {score['pairs']:,} pairs ({score['missing']:,} left out)",
            highlight=False,
        )


def _or_none(score: float, form: str) -> str:
    """A score that too few questions have is NaN."""
    return "none" if math.isnan(score) else format(score, form)
