"""Which of Triton's assemblers is taken."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from dovetail.kernels import assembler
from dovetail.kernels.assembler import ASKED, take_later

pytestmark = pytest.mark.filterwarnings("error")


def says(ptxas: Path, release: str) -> None:
    ptxas.parent.mkdir(parents=True, exist_ok=True)
    ptxas.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.80\n")
    ptxas.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Those of a Triton with assemblers of 12.8 and 13.1, beside a driver of CUDA 13."""
    tools = tmp_path / "backends/nvidia/bin"
    says(tools / "ptxas", "12.8")
    says(tools / "ptxas-blackwell", "13.1")
    spec = ModuleSpec("triton", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(assembler, "_driver", lambda: 13)
    monkeypatch.setenv(ASKED, "")  # so that what is set is taken back
    return tools


@pytest.mark.parametrize("before", ["", None])
def test_the_later_one_is_taken(tools: Path, before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if before is None:
        monkeypatch.delenv(ASKED)
    take_later()
    assert os.environ[ASKED] == str(tools / "ptxas-blackwell")


def test_what_is_asked_for_stays(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ASKED, "/opt/ptxas")
    take_later()
    assert os.environ[ASKED] == "/opt/ptxas"


def test_nothing_is_done_without_a_driver(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembler, "_driver", lambda: 0)
    take_later()
    assert not os.environ[ASKED]


@pytest.mark.parametrize("driver", [12, 13])
def test_one_that_is_right_by_itself_stays(tools: Path, driver: int, monkeypatch: pytest.MonkeyPatch) -> None:
    says(tools / "ptxas", "12.9")
    monkeypatch.setattr(assembler, "_driver", lambda: driver)
    take_later()
    assert not os.environ[ASKED]


def test_a_triton_with_one_alone(tools: Path) -> None:
    (tools / "ptxas-blackwell").unlink()
    take_later()
    assert not os.environ[ASKED]


def test_a_driver_that_is_too_old_is_said(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembler, "_driver", lambda: 12)
    with pytest.warns(UserWarning, match=r"is of CUDA 13\.1, the driver of 12.*Update the driver"):
        take_later()
    assert not os.environ[ASKED]


@pytest.mark.parametrize("broken", ["not executable", "no program", "says nothing"])
def test_one_that_does_not_run_is_said(tools: Path, broken: str) -> None:
    later = tools / "ptxas-blackwell"
    if broken == "no program":
        later.write_bytes(b"\x7fELF\xff\xfe")
    else:
        later.write_text("#!/bin/sh\n")
    later.chmod(0o644 if broken == "not executable" else 0o755)
    with pytest.warns(UserWarning, match="does not run"):
        take_later()
    assert not os.environ[ASKED]


def test_the_driver_is_asked_without_initialising_cuda() -> None:
    """torch's own question does, and then a child cannot choose its devices."""
    asked = (
        "import ctypes, sys; torch._C._cuda_getDriverVersion = lambda: sys.exit(5)\n"
        "ctypes.CDLL = lambda name: sys.exit(3 if name == 'libcuda.so.1' else 4)\n"
        "import dovetail.kernels"
    )
    environ = {name: value for name, value in os.environ.items() if name != ASKED}
    ran = subprocess.run([sys.executable, "-c", "import torch; " + asked], env=environ, capture_output=True, text=True)
    assert ran.returncode == 3, ran.stderr
