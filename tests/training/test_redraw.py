"""Performer's random features while training: drawn anew by the step, so that a resumed run is bitwise the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dovetail.training import fit, loop
from training.small import recipe


def test_redrawn_and_resumed_is_bitwise_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = {"kind": "performer", "heads": 2, "redraw": 2}
    data: dict[str, Any] = recipe(tmp_path, steps=5, save_every=3)
    data["model"]["blocks"]["mixer"] = mixer
    plain, draws = loop.Run.one_step, []

    def noting(run: Any) -> Any:
        step = plain(run)
        draws.append([m.drawn for m in run.stepped])
        return step

    def dying(run: Any) -> Any:
        if run.step == 4:
            raise KeyboardInterrupt
        return plain(run)

    monkeypatch.setattr(loop.Run, "one_step", noting)
    whole = fit(data | {"out": str(tmp_path / "whole")}, progress=False)
    assert draws == [[0, 0], [0, 0], [1, 1], [1, 1], [2, 2]]
    monkeypatch.setattr(loop.Run, "one_step", dying)
    with pytest.raises(KeyboardInterrupt):
        fit(data, progress=False)
    monkeypatch.setattr(loop.Run, "one_step", plain)
    resumed = fit(data, resume=True, progress=False)
    assert (resumed.loss, resumed.held_out) == (whole.loss, whole.held_out)
    one, other = (load_file(p / "model.safetensors") for p in (tmp_path / "whole", tmp_path / "out"))
    assert all(torch.equal(one[k], other[k]) for k in one)
    again = fit(data | {"out": str(tmp_path / "whole")}, resume=True, progress=False)  # after the last step
    assert again.held_out == whole.held_out, "scored as a loaded model is: with the first draw"
    mixer["redraw"] = 0
    kept = fit(data | {"out": str(tmp_path / "kept")}, progress=False)
    assert kept.loss != whole.loss
