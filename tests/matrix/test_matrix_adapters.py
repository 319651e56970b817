"""Every registered adapter, found through the registry, keeps what adapters promise."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from dovetail.spec import Entry
from matrix.harness import all_entries, name

sys.path.insert(0, str(Path(__file__).parent.parent / "adapters"))
import promises

# What a kind needs beside its defaults on a small decoder.
GIVEN: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3, "targets": ["qkv", "down", "embedding.table"]},
    "dora": {"rank": 2},
    "adalora": {"rank": 2},
    "bitfit": {"add": True},
    "fusion": {"of": ["one", "two"]},
    "prefix": {"length": 3},
    "prompt": {"length": 3},
    "p_tuning": {"length": 3},
}


def _two(model: Any) -> None:
    from dovetail.adapters import adapt

    for seed, other in enumerate(("one", "two")):
        adapt(model, "bottleneck", name=other, seed=seed)
        promises.shake(model, other, seed)


@pytest.mark.parametrize("entry", [e for e in all_entries() if e.category == "adapter"], ids=name)
def test_keeps_its_promises(entry: Entry, tmp_path: Path) -> None:
    cls: Any = entry.cls
    spec = {"kind": entry.kind} | GIVEN.get(entry.kind, {})
    before = _two if entry.kind == "fusion" else None
    promises.check(promises.decoder(), spec, tmp_path, before=before, identity=cls.identity, compiled=before is None)
