"""mkdocs hook: adds the generated pages to the navigation, which mkdocs.yml cannot list by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.exceptions import ConfigurationError


def on_config(config: Any) -> Any:
    """Appends algorithms, parts by category, pairs, results. Raises ConfigurationError before they were generated."""
    docs = Path(config["docs_dir"])
    parts = docs / "generated" / "parts"
    if not parts.is_dir():
        raise ConfigurationError("docs/generated is missing; run `make docs`, which makes it first")

    def page(path: Path) -> str:
        return path.relative_to(docs).as_posix()

    categories: list[Any] = [page(parts / "index.md")]
    for folder in sorted(p for p in parts.iterdir() if p.is_dir()):
        kinds = sorted(folder.glob("*.md"), key=lambda p: (p.stem != "index", p.stem))
        categories.append({folder.name: [page(p) if p.stem == "index" else {p.stem: page(p)} for p in kinds]})
    topics = sorted((docs / "algorithms").glob("*.md"), key=lambda p: (p.stem != "index", p.stem))
    config["nav"] += [{"Algorithms": [page(p) for p in topics]}]  # a page is called as its own heading says
    made = docs / "generated"
    config["nav"] += [{"Parts": categories}, {"What goes with what": page(made / "pairs.md")}]
    config["nav"] += [{"Which kernel runs": page(made / "kernels.md")}]
    plotted = sorted(path for path in made.glob("*.md") if path.stem not in ("maps", "pairs", "kernels", "results"))
    config["nav"] += [{"Results": [page(made / "results.md"), *({path.stem: page(path)} for path in plotted)]}]
    return config
