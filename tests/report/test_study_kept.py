"""What a study keeps when it is stopped, killed or wrong, and what it makes of that the next time."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest

from dovetail.errors import RunError, SpecError, StoppedError
from dovetail.kernels import twins
from dovetail.report import study as studies
from dovetail.report.processes import processes, sigterm_handed_on
from dovetail.report.study import Study, _rows, study
from dovetail.training.loop import Run
from report.test_study_recall import recipe


@pytest.fixture()
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process."""
    monkeypatch.setattr(studies, "processes", lambda jobs: ThreadPoolExecutor(1))


def asked(folder: Path, arms: int = 1) -> dict[str, Any]:
    data = recipe(folder)
    return data | {"arms": data["arms"][:arms], "published": [], "seeds": [0]}


@pytest.fixture()
def file(tmp_path: Path, here: None) -> Path:
    """What the run of a study found."""
    study(asked(tmp_path), quiet=True)
    return tmp_path / "out/runs/attention/0/found.json"


def test_a_score_that_is_no_number_is_a_run_that_diverged(tmp_path: Path, file: Path) -> None:
    told = json.loads(file.read_text())
    for wrong in ({"metrics": {"nats": math.nan, "accuracy": 0.0}}, {"clock": {"points": [[1, math.inf]]}}):
        file.write_text(json.dumps(told | wrong))
        found = study(asked(tmp_path), quiet=True)  # which writes a report
        assert found.rows[0].diverged == (0,) and not found.rows[0].metrics
    assert "diverged" in (tmp_path / "out/report.json").read_text()


def test_a_run_whose_process_is_killed_says_so(tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> Any:
        raise BrokenProcessPool("A process in the process pool was terminated abruptly")

    monkeypatch.setattr(studies, "_run", killed)
    with pytest.raises(RunError, match="seed 0, was killed") as caught:
        study(asked(tmp_path), quiet=True)
    assert "fewer --jobs" in str(caught.value.remedy)


def test_a_variant_whose_loss_is_no_number_takes_no_other_with_it(tmp_path: Path) -> None:
    arm = Study.load(asked(tmp_path)).arms[0].model_copy(update={"variants": (type("V", (), {"name": "far"}),)})
    said = Study.load(asked(tmp_path) | {"seeds": [0, 1]})

    def run(loss: float) -> dict[str, Any]:
        spent = {"trainable": 1, "parameters": 1, "peak_bytes": 1, "state_bytes": None, "metrics": {}}
        return spent | {"variants": {"": {"metrics": {"loss": 1.0}}, "far": {"metrics": {"loss": loss}}}}

    own, far = _rows(said, arm, [run(2.0), run(math.nan)], rates=True)
    assert own.metrics == {"loss": (1.0, 0.0)} and own.diverged == ()
    assert far.metrics == {"loss": (2.0, 0.0)} and far.diverged == (1,)


def test_what_cannot_be_read_is_run_again_and_said(tmp_path: Path, file: Path, capfd: Any) -> None:
    whole = file.read_text()
    file.write_text(whole[:40])
    study(asked(tmp_path))
    assert json.loads(file.read_text())["metrics"] == json.loads(whole)["metrics"]
    assert capfd.readouterr().err.count("found.json cannot be read") == 1


def test_weights_go_only_when_what_they_told_is_written(tmp_path: Path, here: None, monkeypatch: Any) -> None:
    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(studies, "_tidy", killed)
        study(asked(tmp_path), quiet=True)
    folder = tmp_path / "out/runs/attention/0"
    assert json.loads((folder / "found.json").read_text())["metrics"] and (folder / "run").is_dir()
    written = (folder / "found.json").stat().st_mtime_ns
    study(asked(tmp_path), quiet=True)
    assert [path.name for path in folder.iterdir()] == ["found.json"]
    assert (folder / "found.json").stat().st_mtime_ns == written


def test_runs_say_where_they_were_made(tmp_path: Path, file: Path) -> None:
    own = json.loads(file.read_text())
    assert "tokens_per_s" in study(asked(tmp_path, arms=2), quiet=True).rows[1].spent
    file.write_text(json.dumps(own | {"device": "an abacus"}))
    found = study(asked(tmp_path, arms=2), quiet=True)
    assert found.device == f"an abacus; {own['device']}" and "an abacus: attention" in found.note
    assert all("tokens_per_s" not in row.spent for row in found.rows)
    alone = study(asked(tmp_path), quiet=True)
    assert alone.device == "an abacus" and "tokens_per_s" in alone.rows[0].spent


def test_a_plain_run_is_plain(tmp_path: Path, here: None, monkeypatch: Any) -> None:
    plain, seen = Run.one_step, []
    monkeypatch.setattr(Run, "one_step", lambda run: (seen.append(twins.asked()), plain(run))[1])
    data = asked(tmp_path)
    data["arms"].append({"name": "plain", "change": {"train.plain": True}})
    study(data, quiet=True)
    assert seen == [False, False, True, True] and not twins.asked()


def test_a_study_that_is_told_to_stop_begins_no_more_runs(tmp_path: Path, here: None, monkeypatch: Any) -> None:
    plain, begun, passed = Run.one_step, [], threading.Event()

    @contextmanager
    def handed_on() -> Any:
        """What a process would get, which a thread does not."""
        with sigterm_handed_on() as come:
            yield lambda: come() and not passed.set()

    def told(run: Run) -> Any:
        begun.append(run.step)
        if len(begun) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            assert passed.wait(10), "while the run goes on"
        return plain(run)

    monkeypatch.setattr(Run, "one_step", told)
    monkeypatch.setattr(studies, "sigterm_handed_on", handed_on)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="told to stop with 1 of 2 runs done"):
        study(asked(tmp_path, arms=2), quiet=True)
    assert signal.getsignal(signal.SIGTERM) is before and begun == [0, 1]
    assert len(study(asked(tmp_path, arms=2), quiet=True).rows) == 2 and begun == [0, 1, 0, 1]


def test_a_sigterm_reaches_the_processes_of_a_pool() -> None:
    with processes() as pool, sigterm_handed_on() as stopped:
        going = pool.submit(time.sleep, 60)
        assert not stopped() and len(active_children()) == 1
        os.kill(os.getpid(), signal.SIGTERM)
        while not wait([going], timeout=0.05).done:
            assert stopped()
        with pytest.raises(BrokenProcessPool):
            going.result()


@pytest.mark.parametrize("count", [1, 2])
def test_a_process_that_does_not_end_is_killed(count: int, monkeypatch: Any, capfd: Any) -> None:
    """The second of two ends, which breaks the pool: its work is done then, and the first still there."""
    monkeypatch.setattr("dovetail.report.processes.GRACE", 0.3)
    with processes(count) as pool, sigterm_handed_on() as stopped:
        going = [pool.submit(time.sleep, 60) for _ in range(count)]
        deaf = min(active_children(), key=lambda child: child.pid or 0)
        os.kill(deaf.pid or 0, signal.SIGSTOP)  # it gets no signal now but SIGKILL
        late = threading.Timer(4, deaf.kill)
        late.start()
        os.kill(os.getpid(), signal.SIGTERM)
        while wait(going, timeout=0.05).not_done:
            assert stopped()
    late.cancel()
    assert deaf.exitcode == -signal.SIGKILL and not active_children()
    assert f"process {deaf.pid} had not ended 0.3 s after" in capfd.readouterr().err


def test_a_sigterm_is_handed_on_after_an_error_of_one_run(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    begun, handed = threading.Event(), threading.Event()

    @contextmanager
    def handed_on() -> Any:
        with sigterm_handed_on() as come:
            yield lambda: come() and (handed.set() or True)

    def run(asked: Study, arm: Any, *_: Any) -> Any:
        if arm.name == "attention":
            assert begun.wait(3)
            raise SpecError("it does not fit")
        begun.set()
        time.sleep(0.2)  # the study hears of the other
        os.kill(os.getpid(), signal.SIGTERM)
        handed.wait(3)
        raise RuntimeError("the compiler ended")

    monkeypatch.setattr(studies, "processes", lambda jobs: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(studies, "sigterm_handed_on", handed_on)
    monkeypatch.setattr(studies, "_run", run)
    with pytest.raises(SpecError, match="does not fit"):
        study(asked(tmp_path, arms=2), jobs=2)
    assert handed.is_set()
    said = capfd.readouterr().err
    assert "it does not fit" in said and "still waited for: 1" in said  # at once, not when all have ended
    assert "RuntimeError: the compiler ended" in said


def test_a_run_that_falls_over_the_signal_to_stop_was_stopped(
    tmp_path: Path, here: None, monkeypatch: Any, capfd: Any
) -> None:
    def run(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("the compiler ended")  # whose processes got the signal too

    monkeypatch.setattr(studies, "_run", run)
    with pytest.raises(StoppedError, match="0 of 1 runs done"):
        study(asked(tmp_path))
    assert "RuntimeError: the compiler ended" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells a process of its parent's end")
def test_processes_end_with_the_one_that_began_them() -> None:
    script = (
        "import os, time, multiprocessing\n"
        "from dovetail.report.processes import processes\n"
        "if __name__ == '__main__':\n"
        "    pool = processes()\n"
        "    pid = pool.submit(os.getpid).result()\n"  # which is a process of its own, as every task has
        "    pool.submit(time.sleep, 600)\n"
        "    while not [c for c in multiprocessing.active_children() if c.pid != pid]: time.sleep(0.01)\n"
        "    time.sleep(8)\n"  # until that has begun
        "    print([c.pid for c in multiprocessing.active_children()][0], flush=True)\n"
        "    time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = Path(f"/proc/{int(parent.stdout.readline())}")
    assert child.exists()
    parent.kill()
    parent.wait()
    for _ in range(50):
        if not child.exists():
            return
        time.sleep(0.1)
    raise TimeoutError(f"{child} is still there")
