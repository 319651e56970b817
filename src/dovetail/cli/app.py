"""The Typer application that the command files register with."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="dovetail",
    help="Arrange, load, train, swap and compare Transformer-family models.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
