"""`dovetail`: one line of help a command, errors for people, exit codes 0, 1 (the run failed), 2 (the input) and 130
(interrupted)."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from dovetail.cli.app import app
from dovetail.cli.failure import Failure, failure_of
from dovetail.cli.pipes import piped
from dovetail.errors import DovetailError, RunError, UserError


def main() -> None:
    """Entry point: takes --debug and --import FILE anywhere, then runs a command. Where that fails and --json was given,
    the last line says so: {"error": {"what", "where", "remedy"}}."""
    argv, debug, imports = _split(sys.argv[1:])
    failure: Failure | None = None
    with piped():
        try:
            for path in imports:
                import_file(path)
            from dovetail.cli import adapt, algo, bench, data, data_scenes, inspect, run  # noqa: F401  (they register their commands)

            app(args=argv, prog_name="dovetail", standalone_mode=True)
        except BaseException as error:
            if debug and isinstance(error, Exception):
                raise
            failure = failure_of(error)
        with contextlib.suppress(SystemExit):  # nobody reads it
            try:
                if failure is not None:
                    _say(failure, as_json="--json" in argv)
                sys.stdout.flush()
            except RunError as error:  # what was printed has not arrived
                failure = Failure(error.exit_code, error.what, error.where, error.remedy)
                _say(failure, as_json=False)
    sys.exit(failure.code if failure else 0)


def _say(failure: Failure, as_json: bool) -> None:
    if not failure.said:
        label = "unexpected error:" if failure.unexpected else "error:"
        text = Text.assemble((label, "bold red"), " ", str(failure))
        Console(stderr=True, highlight=False, soft_wrap=True).print(text)
    if as_json:
        print(json.dumps(failure.to_dict()))


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
