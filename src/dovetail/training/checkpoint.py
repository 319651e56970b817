"""Checkpoints of a run: everything that the next step depends on, put in place in one move.

checkpoints/step-00000040/ holds the model in Dovetail's own layout (loadable by itself; under an adapter only what
is trained, which resuming puts on the same base), optimizer.pt
(tensors and plain numbers only: read with weights_only=True), state.json and, with EMA, ema.safetensors.
It is written under a hidden name, synced, and renamed: a kill or a full disk leaves the last one intact.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dovetail import hub
from dovetail.adapters import adapters
from dovetail.adapters.many import learned
from dovetail.errors import CheckpointError, RunError
from dovetail.hub import atomic, files
from dovetail.training.optim import Average

FOLDER = "checkpoints"


def save(
    out: Path,
    step: int,
    model: Any,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Writes the checkpoint after `step` steps and drops all but the newest `keep`. Raises RunError."""
    root = out / FOLDER
    final, part = root / f"step-{step:08d}", root / f".step-{step:08d}.part"
    if final.exists():
        return final
    _refuse_another(root)
    lock = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        for stale in root.glob(".*step-*"):  # what a kill left behind
            shutil.rmtree(stale)
        if adapters(model):
            part.mkdir()
            lock = _locked(part)
            files.write_weights(part, learned(model))
        else:
            hub.save(model, part, format="dovetail", tokenizer_from=out)
            lock = _locked(part)
        torch.save({"optimizer": optimizer.state_dict(), "rng": _rng_tensors()}, part / "optimizer.pt")
        if average is not None:
            save_file({k: v.cpu().contiguous() for k, v in average.shadow.items()}, part / "ema.safetensors")
        text = json.dumps(state | {"step": step, "rng": _rng_plain()})
        (part / "state.json").write_text(text, encoding="utf-8")
        for path in (*part.iterdir(), part):
            atomic.sync(path)
        part.replace(final)
        atomic.sync(root)
        for old in found(out)[:-keep]:
            hidden = old.with_name(f".{old.name}.old")  # half a deletion must not look like a checkpoint
            old.replace(hidden)
            shutil.rmtree(hidden)
    except (OSError, SafetensorError, RuntimeError, RunError) as error:
        # torch.save reports a failed write as a RuntimeError of its zip writer.
        shutil.rmtree(part, ignore_errors=True)
        last = found(out)
        raise RunError(
            f"the checkpoint of step {step} could not be written: {_reason(error)}",
            where=str(final),
            remedy="free some space and resume"
            + (f"; {last[-1].name} is intact" if last else "; no earlier checkpoint exists"),
        ) from error
    finally:
        if lock is not None:
            os.close(lock)
    return final


def _locked(part: Path) -> int | None:
    """A descriptor that holds the lock of a folder; None where the system has no such locks (NFS)."""
    try:
        return atomic.lock(part)
    except OSError:
        return None


def _refuse_another(root: Path) -> None:
    """Raises RunError where another process is at work on a checkpoint of this run."""
    for part in root.glob(".*step-*"):
        try:
            os.close(atomic.lock(part))
        except BlockingIOError:
            raise RunError(
                "another process writes a checkpoint of this run", where=str(part), remedy="let one of them alone go on"
            ) from None
        except OSError:
            pass  # gone, or no locks here


def found(out: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted((out / FOLDER).glob("step-*"))


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises CheckpointError."""
    return files.read_json(folder / "state.json")


def restore(folder: Path, model: Any, optimizer: torch.optim.Optimizer, average: Average | None) -> dict[str, Any]:
    """Loads everything into a freshly made run; returns the state given to `save`. Raises CheckpointError."""
    state = read_state(folder)
    stored, _ = files.read_weights(folder)
    _copy(learned(model) if adapters(model) else dict(model.named_parameters()), stored, folder)
    try:
        saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        if average is not None:
            _copy(average.shadow, load_file(folder / "ema.safetensors"), folder)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"the optimiser's state does not fit: {error}", where=str(folder)) from error
    _set_rng(saved["rng"], state["rng"])
    return state


@torch.no_grad()
def _copy(into: dict[str, Any], stored: dict[str, torch.Tensor], folder: Path) -> None:
    different = sorted(into.keys() ^ stored.keys())
    different += [n for n in into.keys() & stored.keys() if into[n].shape != stored[n].shape]
    if different:
        raise CheckpointError(
            f"the checkpoint is of another model: {', '.join(different[:4])} differ",
            where=str(folder), remedy="resume with the recipe that wrote it",
        )  # fmt: skip
    for name, tensor in into.items():
        tensor.copy_(stored[name])


def _reason(error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None or cause.__context__ is not None:
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    if isinstance(cause, OSError):
        return cause.strerror or str(cause)
    return str(error).splitlines()[0]


@contextmanager
def same_random() -> Iterator[None]:
    """What is drawn inside changes nothing of what is drawn after it."""
    tensors, plain = _rng_tensors(), _rng_plain()
    try:
        yield
    finally:
        _set_rng(tensors, plain)


def _set_rng(tensors: dict[str, Any], plain: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available() and len(tensors["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(tensors["cuda"])
    version, keys, gauss = plain["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, at, has_gauss, cached = plain["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), at, has_gauss, cached))  # noqa: NPY002


def _rng_tensors() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def _rng_plain() -> dict[str, Any]:
    name, keys, at, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 (a user's part may draw from it)
    return {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), at, has_gauss, gauss]}
