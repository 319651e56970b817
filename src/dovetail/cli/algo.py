"""`dovetail algo`: the algorithms under the house, each a command of its own.

A topic is one file, `algo_NAME.py`, with one function that registers here; its module is added to `TOPICS`.
"""

from __future__ import annotations

import importlib

import typer

from dovetail.cli.app import app

algo = typer.Typer(
    name="algo",
    help="The algorithms under the house: n-grams, words, geometry, arrivals, extrema.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(algo)

TOPICS: tuple[str, ...] = (  # modules dovetail.cli.algo_NAME, one line each
    "arrivals",
    "extrema",
    "geometry",
    "ngram",
    "words",
    "boxes",
    "masks",
)

for _topic in TOPICS:
    importlib.import_module(f"dovetail.cli.algo_{_topic}")
