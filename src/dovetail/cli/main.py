"""`dovetail`: one line of help a command, errors for people, exit codes 0, 1 (the run failed) and 2 (the input)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from dovetail.cli.app import app
from dovetail.errors import DovetailError, UserError


def main() -> None:
    """Entry point: takes --debug and --import FILE anywhere, then runs a command."""
    argv, debug, imports = _split(sys.argv[1:])
    try:
        for path in imports:
            import_file(path)
        from dovetail.cli import adapt, algo, bench, data, data_scenes, inspect, run  # noqa: F401  (they register their commands)

        app(args=argv, prog_name="dovetail", standalone_mode=True)
    except DovetailError as error:
        if debug:
            raise
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {_plain(error)}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if debug:
            raise
        text = f"{type(error).__name__}: {error}"
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"[bold red]unexpected error:[/] {_plain(text)}\n  what to do: run again with --debug and report it"
        )
        sys.exit(1)


def import_file(path: str) -> None:
    """Runs a user's own Python file so that its parts register. Raises UserError when it is missing or fails."""
    file = Path(path)
    if not file.is_file():
        raise UserError(
            f"no file {path!r} to import", where="--import", remedy="give a Python file that registers parts"
        )
    spec = importlib.util.spec_from_file_location(f"dovetail_user_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except DovetailError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} failed while it was imported: {type(error).__name__}: {error}", where="--import"
        ) from error


def _split(argv: list[str]) -> tuple[list[str], bool, list[str]]:
    """(the rest, debug, files to import)."""
    rest: list[str] = []
    imports: list[str] = []
    debug = False
    items = iter(argv)
    for item in items:
        if item == "--debug":
            debug = True
        elif item == "--import":
            imports.append(next(items, ""))
        elif item.startswith("--import="):
            imports.append(item.removeprefix("--import="))
        else:
            rest.append(item)
    return rest, debug, imports


def _plain(value: Any) -> str:
    return str(value).replace("[", "\\[")
