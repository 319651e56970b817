"""How commands end: what is said of a failure and its last line as JSON, interrupts, memory, pipes that are closed."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dovetail.cli.failure import failure_of
from dovetail.cli.machine import to_json
from dovetail.cli.main import main
from dovetail.cli.pipes import Piped
from dovetail.training import loop

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `dovetail ARGS` in this process: (exit code, stdout, stderr)."""

    def call(*args: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dovetail", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return call


def last(out: str) -> Any:
    return json.loads(out.strip().splitlines()[-1])


def train(out: Path, *more: str) -> tuple[Any, ...]:
    small = ("train.batch=2", "train.length=32", "train.eval_every=0", "train.eval_batches=1", f"out={out}")
    return ("train", ROOT / "recipes/tiny.yaml", *small, *more)


def test_a_failure_is_the_last_line_of_json(run: Run) -> None:
    code, out, err = run("show", "./nowhere", "--json")
    assert code == 2 and "what to do" in err
    error = last(out)["error"]
    assert set(error) == {"what", "where", "remedy"} and "nowhere" in error["what"] and error["remedy"]
    code, out, err = run("show", "./nowhere", "--jsn", "--json")
    assert code == 2 and "--jsn" in last(out)["error"]["what"] and "Traceback" not in err
    assert run("show", "./nowhere")[1] == ""


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"), 1, "20.00 GiB more"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000 bytes."),
            1,
            "4.0 GB",
        ),
        (MemoryError(), 1, "the memory does not suffice"),
        (BrokenPipeError(32, "of a worker"), 1, "unexpected error: BrokenPipeError"),
        (ZeroDivisionError("x [/y]"), 1, "unexpected error: ZeroDivisionError: x [/y]"),
    ],
)
def test_what_commands_raise(run: Run, monkeypatch: Any, raised: BaseException, code: int, says: str) -> None:
    def fails(*_: Any) -> None:
        raise raised

    monkeypatch.setattr("dovetail.cli.inspect._spec_of", fails)
    found, out, err = run("show", "x", "--json")
    assert found == code and says in err and last(out)["error"]["what"] in err


def test_an_interrupted_training_is_saved_and_goes_on(run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    plain = loop.Run.one_step

    def interrupted(run: loop.Run) -> Any:
        if run.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(run)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
    with monkeypatch.context() as patched:
        patched.setattr(loop.Run, "one_step", interrupted)
        code, out, err = run(*train(tmp_path / "a", "train.steps=3", "--json"))
    signal.signal(signal.SIGINT, before)
    error = last(out)["error"]
    assert code == 1 and "told to stop after step 2 of 3" in err
    assert Path(error["where"]).is_dir() and "--resume" in error["remedy"]
    code, out, err = run(*train(tmp_path / "a", "train.steps=3", "--resume"))
    assert code == 0 and out.strip() == f"saved to {tmp_path / 'a'}", err


def test_there_must_be_something_to_resume(run: Run, tmp_path: Path) -> None:
    code, _, err = run(*train(tmp_path / "none", "--resume"))
    assert code == 2 and "no checkpoint to go on from" in err and "leave out --resume" in err
    assert not (tmp_path / "none").exists()


def unread(mode: str = "w") -> Any:
    """A pipe's writing end, which nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, mode)


def test_streams_that_nobody_reads() -> None:
    with unread() as pipe:
        spoken = Piped(pipe, ends=False)
        print("one", file=spoken, flush=True)
        print("two", file=spoken, flush=True)
    with unread() as pipe:
        with pytest.raises(SystemExit) as end:
            print("one", file=Piped(pipe, ends=True), flush=True)
        assert end.value.code == 0


def test_a_pipe_that_is_closed_ends_a_listing_well_and_no_training(run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    with unread() as pipe, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", pipe)
        assert run("list", "--json")[0] == 0
    with unread() as pipe, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", pipe)
        code, out, _ = run(*train(tmp_path / "a", "train.steps=2", "train.log_every=1", "--json"))
        assert code == 0 and last(out)["steps"] == 2


def test_a_listing_into_head() -> None:
    found = subprocess.run(
        f"{sys.executable} -m dovetail list --json | head -c 1; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert (found.returncode, found.stderr) == (0, "")


def test_ends_that_are_no_failures() -> None:
    assert failure_of(SystemExit(0)) is None and failure_of(SystemExit()) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_a_full_disk_is_told(run: Run, monkeypatch: Any) -> None:
    for args in (("list",), ("list", "mask", "--json"), ("list", "mask")):
        with open("/dev/full", "w") as full, monkeypatch.context() as patched:  # noqa: PTH123
            patched.setattr(sys, "stdout", full)
            code, _, err = run(*args)
        assert code == 1 and err.startswith("error: the output cannot be written: No space left"), err


def test_streams_that_were_closed_before(run: Run, monkeypatch: Any) -> None:
    for name in ("stdout", "stderr"):
        with monkeypatch.context() as patched:
            patched.setattr(sys, name, None)
            assert run("list", "mask")[0] == 0


def test_json_in_an_encoding_that_lacks_its_characters(run: Run, monkeypatch: Any) -> None:
    told = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", told)
        assert run("show", "./\U0001f680\xe9", "--json")[0] == 2
        print(to_json({"text": "\U0001f680\xe9", "nats": math.inf}))
    told.seek(0)
    assert [json.loads(line) for line in told.read().splitlines()][1] == {"text": "\U0001f680\xe9", "nats": None}
