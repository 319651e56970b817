"""What `import dovetail as dt` offers: every name is there, and the heavier ones come on first use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import dovetail as dt


def test_every_name_is_there() -> None:
    assert all(getattr(dt, name) is not None for name in dt.__all__)


def test_adapters_come_on_first_use() -> None:
    code = (
        "import sys, dovetail as dt\n"
        "assert 'dovetail.adapters' not in sys.modules and 'dovetail.training' not in sys.modules\n"
        "assert dt.adapters.Lora(rank=4).kind == 'lora' and callable(dt.adapt) and callable(dt.merge)\n"
        "assert 'lora' in dt.registry('adapter')\n"
        "import dovetail.training, dovetail.report, dovetail.cli.main\n"
        "assert 'torch._dynamo' not in sys.modules, 'the compiler takes seconds to import'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_adapt_save_load_merge(tmp_path: Path) -> None:
    model = dt.build(
        {"kind": "decoder", "vocab": 16, "dim": 16, "depth": 1, "blocks": {"mixer": {"kind": "attention"}}}
    )
    x = torch.randint(0, 16, (1, 5))
    start = model(x).logits
    dt.adapt(model, dt.adapters.Lora(rank=2))
    assert torch.equal(model(x).logits, start)
    for parameter in dt.adapters.trainable(model).values():
        parameter.data.normal_(std=0.3)
    want = model(x).logits
    dt.save_adapter(model, tmp_path / "a", format="dovetail")
    dt.save_adapter(model, tmp_path / "a")  # takes the other's place, whole
    dt.load_adapter(dt.adapters.remove(model), tmp_path / "a")
    assert torch.equal(model(x).logits, want) and not torch.equal(want, start)
    assert (dt.merge(model)(x).logits - want).abs().max() <= 1e-5 * want.abs().max()
