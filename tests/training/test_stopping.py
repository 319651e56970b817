"""What a training does about SIGTERM and Ctrl-C."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dovetail.errors import StoppedError
from dovetail.training import checkpoint, fit, loop
from dovetail.training.stopping import sigterm_awaited
from training.small import recipe


@pytest.fixture(autouse=True)
def _as_in_a_terminal() -> Iterator[None]:
    """A shell starts what runs in the background with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_first_interrupt_is_awaited_and_a_second_ends_it(capfd: Any) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with sigterm_awaited() as told:
        assert not told()
        os.kill(os.getpid(), signal.SIGINT)
        assert told() and "Ctrl-C again" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_an_interrupt_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with sigterm_awaited() as told:
            os.kill(os.getpid(), signal.SIGINT)
            assert not told()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupted_training_saves_and_says_where(tmp_path: Path, monkeypatch: Any) -> None:
    plain = loop.Run.one_step

    def interrupted(run: loop.Run) -> Any:
        if run.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(run)

    monkeypatch.setattr(loop.Run, "one_step", interrupted)
    with pytest.raises(StoppedError, match="after step 2 of 4") as caught:
        fit(recipe(tmp_path, steps=4), progress=False)
    (kept,) = checkpoint.found(tmp_path / "out")
    assert caught.value.where == str(kept) and "--resume" in str(caught.value.remedy)
