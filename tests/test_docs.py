"""What the pages of docs/ tell a reader to type: their Python is run, their recipes are parsed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dovetail.training.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "page", ["adapters", "surgery", "speculative", "contrastive", "extrapolation", "training-step"]
)
def test_the_python_of_a_page_runs_as_one_session(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 1
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    session: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, f"docs/{page}.md", "exec"), session)
    if page == "adapters":  # what the page says of what it prints
        torch.testing.assert_close(session["rows"][3], session["reference"][0], rtol=0, atol=1e-4)
        assert max(session["account"].layers.values()) < 1e-4
        assert 0 < max(session["errors"].values()) < 0.2
    elif page == "surgery":
        model, tokens = session["model"], session["tokens"]
        torch.testing.assert_close(session["deeper"].model(tokens).logits, model(tokens).logits, rtol=0, atol=1e-4)
        assert session["shorter"].model.spec.depth == model.spec.depth - 2


def test_the_shipped_recipe_of_an_adapter_reads_files_that_are_there() -> None:
    recipe = Recipe.load(ROOT / "recipes" / "lora.yaml")
    assert recipe.adapter is not None
    train, held_out = recipe.data.train, recipe.data.held_out
    assert all((ROOT / path).is_file() for path in [*train.paths, held_out.path])  # type: ignore[union-attr]
