"""Runs of a study in the process of the test: to begin one takes ten seconds, and that they do is tested once."""

from __future__ import annotations

from pathlib import Path

from dovetail.report.study import Study, _key, _run
from dovetail.report.study_recipe import slug


def run_here(asked: Study, *runs: tuple[str, int]) -> None:
    """Runs (arm, seed) as a study does before it is interrupted: `study` then goes on with the others."""
    arms = {arm.name: arm for arm in asked.arms}
    for name, seed in runs:
        folder = Path(asked.out) / "runs" / slug(name) / str(seed)
        _run(asked, arms[name], seed, _key(asked, arms[name], seed), folder, None)
