"""Checkpoints of several dtypes run, near what one of fp32 gives, and come back as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dovetail as dt

ATTENTION = {"kind": "attention", "heads": 2, "kv_heads": 1}
LLAMA = {"kind": "decoder", "vocab": 24, "dim": 16, "depth": 2, "context": 32, "blocks": {"mixer": ATTENTION}}
TIED = LLAMA | {"head": {"kind": "ref", "path": "embedding"}}
QWEN3 = LLAMA | {"blocks": {"mixer": ATTENTION | {"qk_norm": "rms"}}}


def t5(folder: Path) -> Path:
    import transformers as hf

    sizes: Any = {"vocab_size": 24, "d_model": 16, "d_kv": 6, "d_ff": 20, "num_heads": 2, "num_layers": 2}
    sizes["decoder_start_token_id"] = 0
    hf.T5ForConditionalGeneration(hf.T5Config(**sizes)).save_pretrained(folder)
    return folder


def mix(folder: Path, base: torch.dtype, wide: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """The checkpoint in `base`, but for what is `wide`."""
    path = folder / "model.safetensors"
    tensors = {name: t if wide(name) else t.to(base) for name, t in load_file(path).items()}
    assert len({t.dtype for t in tensors.values()}) == 2
    save_file(tensors, path, metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("spec", "wide", "stays"),
    [
        (LLAMA, lambda name: "norm" in name, True),
        (QWEN3, lambda name: "norm" in name, True),
        (TIED, lambda name: "norm" in name, True),
        (LLAMA, lambda name: "lm_head" in name, True),
        (LLAMA, lambda name: "down_proj" in name, True),
        (None, lambda name: ".wo." in name, True),  # T5 as transformers saves it in fp16
        (LLAMA, lambda name: "0.self_attn.q_proj" in name, False),
        (TIED, lambda name: "embed" in name, False),
    ],
)
def test_mixtures(spec: Any, wide: Any, stays: bool, base: torch.dtype, tmp_path: Path) -> None:
    folder = t5(tmp_path / "m") if spec is None else dt.save(dt.build(spec), tmp_path / "m")
    stored = mix(folder, base, wide)
    model, plain = dt.load(folder), dt.load(folder, dtype=torch.float32)
    assert (len({p.dtype for p in model.parameters()}) == 2) == stays
    x = torch.arange(9)[None] % 24
    sides = (x, x) if spec is None else (x,)
    with torch.no_grad():
        ours, theirs = model(*sides).logits.float(), plain(*sides).logits
    assert float((ours - theirs).abs().max()) < 0.03 * float(theirs.abs().max())
    assert dt.generate(model, None, x, max_new_tokens=3, eos=(23,)).shape[0] == 1
    again = load_file(dt.save(model, tmp_path / "again") / "model.safetensors")
    assert all(again[n].dtype == t.dtype and torch.equal(again[n], t) for n, t in stored.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_mixture_that_was_cast_since(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = dt.save(dt.build(LLAMA), tmp_path / "m")
    mix(folder, torch.bfloat16, lambda name: "norm" in name or "lm_head" in name)
    x = torch.arange(9)[None]
    with torch.no_grad():
        ours = copy.deepcopy(dt.load(folder)).to(dtype)(x).logits
        assert torch.equal(ours, dt.load(folder, dtype=dtype)(x).logits)


def test_one_dtype_needs_nothing(tmp_path: Path) -> None:
    model = dt.load(dt.save(dt.build(LLAMA), tmp_path / "m"))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
