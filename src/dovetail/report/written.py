"""A report in its folder, and on the screen; what was measured before, kept in a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from dovetail.hub import atomic
from dovetail.report.render import WIDTH


def write(result: Any, page: str, target: Path, quiet: bool) -> None:
    """index.html (`page`) and report.json (`result.to_dict()`) into `target`, both or neither; shown unless quiet."""
    with atomic.atomic_folder(target) as scratch:
        (scratch / "index.html").write_text(page, encoding="utf-8")
        data = json.dumps(result.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        (scratch / "report.json").write_text(data + "\n", encoding="utf-8")
    if not quiet:
        screen = Console(highlight=False)
        screen = screen if screen.is_terminal else Console(highlight=False, width=WIDTH)
        screen.print(result)
        screen.print(f"\nreport: {target / 'index.html'}", soft_wrap=True, markup=False)


def keep(path: Path, found: Mapping[str, Any]) -> None:
    """`found` into a file, whole or not at all: the process may be killed at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")
    scratch.replace(path)


def kept(path: Path, key: str, say: Callable[[str], object] | None = None) -> dict[str, Any] | None:
    """What was found under this key before; None for nothing, and where the file cannot be read, which is said."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if found.get("key") == key else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        if say is not None:
            say(f"{path} cannot be read, and counts as nothing: {error}")
        return None
