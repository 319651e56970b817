"""N steps == k + kill -9 + resume + (N - k), bitwise; and no failed save ever costs the last good checkpoint."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dovetail import hub
from dovetail.errors import RunError, SpecError, StoppedError
from dovetail.training import checkpoint, fit, loop
from training.small import recipe

# A child that begins with what is imported here takes seconds less; but autograd's threads of a GPU bear no fork.
CHILD: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")


def _fit_and_die(data: dict[str, Any], where: str, at: int) -> None:
    torch.set_num_threads(1)
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    if where == "step":
        plain_step = loop.Run.one_step

        def one_step(run: loop.Run) -> Any:
            if run.step == at:
                die()
            return plain_step(run)

        loop.Run.one_step = one_step
    elif where == "export":
        checkpoint.atomic._keep = lambda *_: die()
    else:
        plain_sync, calls = checkpoint.atomic.sync, itertools.count(1)

        def sync(*arguments: Any) -> Any:
            if next(calls) == at:
                die()
            return plain_sync(*arguments)

        checkpoint.atomic.sync = sync
    fit(data, progress=False)


def killed(data: dict[str, Any], where: str, at: int) -> None:
    """Runs `fit` in a process that kills itself with SIGKILL before step `at`, in the at-th file's sync, or when the
    trained model stands in `out` and what was there beside it."""
    child = CHILD.Process(target=_fit_and_die, args=(data, where, at))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL


def everything(folder: Path) -> tuple[dict[str, torch.Tensor], Any, dict[str, Any]]:
    state = json.loads((folder / "state.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    if (folder / "ema.safetensors").exists():
        tensors |= {f"ema.{k}": v for k, v in load_file(folder / "ema.safetensors").items()}
    return tensors, torch.load(folder / "optimizer.pt", weights_only=True), state


def assert_bitwise(a: Path, b: Path) -> None:
    (weights_a, optim_a, state_a), (weights_b, optim_b, state_b) = everything(a), everything(b)
    assert weights_a.keys() == weights_b.keys() and state_a == state_b
    for name, tensor in weights_a.items():
        assert torch.equal(tensor, weights_b[name]), name
    assert optim_a["optimizer"]["param_groups"] == optim_b["optimizer"]["param_groups"]
    for i, moments in optim_a["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, optim_b["optimizer"]["state"][i][name])
    assert torch.equal(optim_a["rng"]["torch"], optim_b["rng"]["torch"])


def test_killed_and_resumed_is_bitwise_the_same(tmp_path: Path) -> None:
    """Dropout, EMA, accumulation and a schedule in play; killed two steps after the last save."""
    options: dict[str, Any] = {"steps": 8, "save_every": 3, "ema": 0.9, "accumulate": 2, "warmup": 2, "keep": 9}
    data = recipe(tmp_path, **options)
    whole = fit(data | {"out": str(tmp_path / "whole")}, progress=False)
    killed(data, "step", 5)
    out = tmp_path / "out"
    assert [p.name for p in checkpoint.found(out)] == ["step-00000003"]
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] == 5
    resumed = fit(data, resume=True, progress=False)
    assert_bitwise(tmp_path / "whole/checkpoints/step-00000008", out / "checkpoints/step-00000008")
    assert (resumed.loss, resumed.held_out) == (whole.loss, whole.held_out)
    one, other = (load_file(p / "model.safetensors") for p in (tmp_path / "whole", out))
    assert all(torch.equal(one[k], other[k]) for k in one)
    steps = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    losses = {x["step"]: x["loss"] for x in steps if "loss" in x}
    lines = (tmp_path / "whole/log.jsonl").read_text().splitlines()
    assert losses == {x["step"]: x["loss"] for x in map(json.loads, lines) if "loss" in x}
    assert len([x for x in steps if "loss" in x]) == 8


def test_told_to_stop_it_saves_and_goes_on_bitwise(tmp_path: Path, monkeypatch: Any) -> None:
    data = recipe(tmp_path, steps=4)
    fit(data | {"out": str(tmp_path / "whole")}, progress=False)
    plain, before = loop.Run.one_step, signal.getsignal(signal.SIGTERM)

    def told(run: loop.Run) -> Any:
        if run.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(run)

    monkeypatch.setattr(loop.Run, "one_step", told)
    with pytest.raises(StoppedError, match="after step 2 of 4"):
        fit(data, progress=False)
    monkeypatch.undo()
    out = tmp_path / "out"
    assert [p.name for p in checkpoint.found(out)] == ["step-00000002"]
    assert signal.getsignal(signal.SIGTERM) is before
    fit(data, resume=True, progress=False)
    assert_bitwise(tmp_path / "whole/checkpoints/step-00000004", out / "checkpoints/step-00000004")


def test_killed_in_the_middle_of_a_save(tmp_path: Path) -> None:
    """The first save is whole (13 syncs); the second dies while its files are synced under the hidden name."""
    data = recipe(tmp_path, save_every=2)
    killed(data, "save", 20)
    out = tmp_path / "out"
    (last,) = checkpoint.found(out)
    assert last.name == "step-00000002" and list((out / "checkpoints").glob(".step-00000004.part"))
    assert hub.load(last).spec.dim == 16
    fit(data, resume=True, progress=False)
    whole = fit(data | {"out": str(tmp_path / "whole")}, progress=False)
    assert_bitwise(out / "checkpoints/step-00000006", Path(whole.out) / "checkpoints/step-00000006")
    assert not list((out / "checkpoints").glob(".step-*"))


def test_killed_while_the_trained_model_takes_its_place(tmp_path: Path) -> None:
    data = recipe(tmp_path, steps=2)
    killed(data, "export", 0)
    assert list(tmp_path.glob(".out.*.old/checkpoints/step-00000002")) and not checkpoint.found(tmp_path / "out")
    with pytest.raises(SpecError, match="holds a run already"):
        fit(data, progress=False)
    before = (tmp_path / "out/log.jsonl").read_text()
    result = fit(data, resume=True, progress=False)
    assert result.tokens == 2 * 2 * 32 and result.held_out is not None  # no step was taken again
    assert (tmp_path / "out/log.jsonl").read_text() == before
    assert not list(tmp_path.glob(".out.*")) and hub.load(tmp_path / "out").spec.dim == 16


@pytest.mark.parametrize("boundary", ["replace", "fsync"])
def test_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: Any, boundary: str) -> None:
    """ENOSPC at the rename, or when the second checkpoint's data is flushed."""
    data = recipe(tmp_path, save_every=2)
    real = getattr(os, boundary)

    def full(*arguments: Any) -> Any:
        if (tmp_path / "out/checkpoints/.step-00000004.part").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, boundary, full)
    with pytest.raises(RunError, match=r"(?s)step 4 could not be written.*No space left.*step-00000002 is intact"):
        fit(data, progress=False)
    monkeypatch.undo()
    (last,) = checkpoint.found(tmp_path / "out")
    assert hub.load(last).spec.dim == 16
    assert fit(data, resume=True, progress=False).steps == 6


def _fit_limited(cases: list[tuple[dict[str, Any], int]], said: Any) -> None:
    """In a child: what `fit` says where no file may be longer than the limit from the save of step 4 on."""
    torch.set_num_threads(1)
    plain = loop.Run.save
    for data, limit in cases:

        def save(run: loop.Run, limit: int = limit) -> Any:
            if run.step == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            return plain(run)

        loop.Run.save = save
        try:
            fit(data, progress=False)
        except RunError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            said.send(error.what)


def test_a_write_that_the_system_cuts_short(tmp_path: Path) -> None:
    """Writes that really fail (RLIMIT_FSIZE) inside the libraries that write tensors: RunError, nothing half done."""
    limits = (9_000, 60_000)  # stops model.safetensors; lets it pass and stops optimizer.pt
    cases = [(recipe(tmp_path / str(limit), save_every=2), limit) for limit in limits]
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = CHILD.Process(target=_fit_limited, args=(cases, theirs))
    child.start()
    child.join(120)
    for _ in cases:
        assert ours.poll() and "step 4 could not be written" in ours.recv()
    for data, _ in cases:
        root = Path(data["out"]) / "checkpoints"
        assert [p.name for p in root.iterdir()] == ["step-00000002"]
        assert hub.load(root / "step-00000002").spec.dim == 16


def test_resume_needs_the_same_recipe(tmp_path: Path) -> None:
    data = recipe(tmp_path, steps=2)
    fit(data, progress=False)
    with pytest.raises(SpecError, match="holds a run already"):
        fit(data, progress=False)
    with pytest.raises(SpecError, match=r"train\.lr was 0\.01"):
        fit(data, ["train.lr=0.5"], resume=True, progress=False)
    kept = tmp_path / "out/checkpoints/step-00000002/state.json"
    state = json.loads(kept.read_text())
    assert state["recipe"]["train"].pop("compile") is False  # as before there was such an option
    kept.write_text(json.dumps(state))
    with pytest.raises(SpecError, match=r"train\.compile was None"):
        fit(data, ["train.compile=true"], resume=True, progress=False)
    again = fit(data, ["train.log_every=5"], resume=True, progress=False)
    assert again.steps == 2 and again.loss > 0


def test_old_checkpoints_go(tmp_path: Path) -> None:
    fit(recipe(tmp_path, save_every=1, keep=2), progress=False)
    assert [p.name for p in checkpoint.found(tmp_path / "out")] == ["step-00000005", "step-00000006"]


def test_resume_with_nothing_saved_starts_anew(tmp_path: Path) -> None:
    started = time.time()
    assert fit(recipe(tmp_path, steps=1), resume=True, progress=False).steps == 1
    assert (tmp_path / "out/model.safetensors").stat().st_mtime >= started - 1
