"""Which of Triton's assemblers is taken."""

from __future__ import annotations

import importlib.util
import os
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from dovetail.kernels.assembler import ASKED, take_later

Triton = Path


@pytest.fixture
def triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Triton:
    """A Triton whose later assembler says that it is of release 13.1, and a driver of CUDA 13."""
    later = tmp_path / "backends/nvidia/bin/ptxas-blackwell"
    later.parent.mkdir(parents=True)
    later.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.1, V13.1.80\n")
    later.chmod(0o755)
    spec = ModuleSpec("triton", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13020, raising=False)
    monkeypatch.setenv(ASKED, "")  # so that what is set is taken back
    monkeypatch.delenv(ASKED)
    return later


def test_the_later_one_is_taken(triton: Triton) -> None:
    take_later()
    assert os.environ[ASKED] == str(triton)


def test_what_is_asked_for_stays(triton: Triton, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ASKED, "/opt/ptxas")
    take_later()
    assert os.environ[ASKED] == "/opt/ptxas"


@pytest.mark.parametrize("driver", [0, 12080])
def test_a_driver_that_is_too_old_or_missing(triton: Triton, driver: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    if driver:
        with pytest.warns(UserWarning, match="Update the driver"):
            take_later()
    else:
        take_later()
    assert ASKED not in os.environ


def test_a_triton_with_one_alone(triton: Triton) -> None:
    triton.unlink()
    take_later()
    assert ASKED not in os.environ
