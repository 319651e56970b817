"""A report in its folder, and on the screen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from dovetail.hub import files
from dovetail.report.render import WIDTH


def write(result: Any, page: str, target: Path, quiet: bool) -> None:
    """index.html (`page`) and report.json (`result.to_dict()`) into `target`, both or neither; shown unless quiet."""
    with files.atomic_folder(target) as scratch:
        (scratch / "index.html").write_text(page, encoding="utf-8")
        data = json.dumps(result.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        (scratch / "report.json").write_text(data + "\n", encoding="utf-8")
    if not quiet:
        screen = Console(highlight=False)
        screen = screen if screen.is_terminal else Console(highlight=False, width=WIDTH)
        screen.print(result)
        screen.print(f"\nreport: {target / 'index.html'}", soft_wrap=True)
