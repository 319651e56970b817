"""Shared by all tests: one thread, offline, a seed, and this folder on the path (`from oracles import oracle_for`)."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():  # Triton's kernels run in its interpreter, which is chosen before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """What was imported stays, and compiling makes many small objects: a tenth of the time went into looking for garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # libraries in C complain at the end of what was never freed


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
