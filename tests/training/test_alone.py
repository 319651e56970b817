"""Two processes never write one run: neither the ranks of torchrun, nor two runs into one folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import dovetail as dt
from dovetail.errors import RunError, SpecError, UserError
from dovetail.hub import atomic
from dovetail.training import checkpoint, fit
from dovetail.training.alone import alone_in
from dovetail.training.meters import Log
from training.small import recipe


def test_ranks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"(?s)2 processes.*without torchrun"):
        fit(recipe(tmp_path), progress=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert fit(recipe(tmp_path, steps=1), progress=False).steps == 1


def test_a_second_run_into_a_folder_is_refused(tmp_path: Path) -> None:
    data, out = recipe(tmp_path, steps=1), tmp_path / "out"
    with alone_in(out), pytest.raises(UserError, match="another run writes into this folder"):
        assert (tmp_path / ".out.lock").exists()
        fit(data, progress=False)
    assert not out.exists(), "what stayed empty goes"
    fit(data, progress=False)
    left = tmp_path / ".out.lock"
    assert not left.exists()
    left.mkdir()  # what a kill leaves
    assert fit(data, resume=True, progress=False).steps == 1 and not left.exists()
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"):
        fit(data, [f"out={tmp_path / 'file'}"], progress=False)


def test_a_disk_that_fills_up_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is that cannot be written; other files' errors are not the folder's."""
    data, out = recipe(tmp_path, steps=1), tmp_path / "out"

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Log, "write", full)
        with pytest.raises(RunError, match=r"(?s)cannot be written: No space left.*out.*free some space"):
            fit(data, progress=False)
    fit(data, progress=False)
    log = (out / "log.jsonl").read_text()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", lambda path, *_, **__: full(path.write_bytes(b"")))
        with pytest.raises(OSError, match="No space left"):
            Log(out, 1)
    assert (out / "log.jsonl").read_text() == log
    (out / "result.json").unlink()
    (out / "result.json").mkdir()
    with pytest.raises(RunError, match=r"(?s)Is a directory.*result\.json"):
        fit(data, resume=True, progress=False)
    with pytest.raises(FileNotFoundError), alone_in(out):
        (tmp_path / "elsewhere").read_text()


def test_the_model_is_not_trained_over_itself(tmp_path: Path) -> None:
    fit(recipe(tmp_path, steps=1), progress=False)
    data = recipe(tmp_path, steps=1) | {"model": str(tmp_path / "out"), "tokenizer": None}
    with pytest.raises(SpecError, match="written over the one that it starts from"):
        fit(data | {"out": str(tmp_path / "cache/../out")}, progress=False)


def test_a_checkpoint_that_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    model = dt.build({"kind": "decoder", "vocab": 8, "dim": 8, "depth": 1})
    optimizer = torch.optim.AdamW(model.parameters())
    part = tmp_path / "checkpoints/.step-00000001.part"
    part.mkdir(parents=True)
    (part / "theirs").touch()
    held = atomic.lock(part)
    with pytest.raises(RunError, match="another process writes a checkpoint"):
        checkpoint.save(tmp_path, 1, model, optimizer, None, {}, 2)
    assert (part / "theirs").exists()
    os.close(held)  # it died
    assert checkpoint.save(tmp_path, 1, model, optimizer, None, {}, 2).is_dir() and not part.exists()
