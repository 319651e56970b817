"""What weights in codes cost the bundled model: nats a token on the held-out modules of the standard library, in fp32 on a
CPU, against the weights as they are.

The head and the embedding stay as they are, as `dovetail.surgery.quantise` leaves them. The error is that of the mean of
the paired differences, over rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from common import ROOT, main, row
from torch import Tensor

import dovetail as dt
from dovetail.data.pydoc import Pydoc
from dovetail.parts.storage.base import Stored
from dovetail.report.measure import rows_of, token_nats
from dovetail.surgery import quantise

BENCHMARK = {"threads": 2, "minutes": 2}
TARGET = ROOT / "assets" / "pydoc-llama"
LENGTH, ROWS = 512, 96
STORAGES: dict[str, Any] = {
    "int8, a scale a row": "int8", "int4, groups of 128": "int4", "int4, groups of 32": {"kind": "int4", "block": 32},
    "nf4, blocks of 64, double": "nf4", "nf4, blocks of 64": {"kind": "nf4", "double": False},
}  # fmt: skip


@cache
def rows() -> Tensor:
    """(ROWS, LENGTH + 1) from evenly spaced places of the held-out text."""
    tokenizer = dt.load_tokenizer(TARGET)
    ids = [i for text in Pydoc(split="held_out").documents() for i in tokenizer.encode(text)]
    every = rows_of(torch.tensor(ids), LENGTH)
    return every[torch.linspace(0, len(every) - 1, ROWS).long()].contiguous()


def model(storage: Any = None) -> tuple[Any, dict[str, float]]:
    """The bundled model in fp32 and the relative error of each quantised map."""
    made = dt.load(TARGET, dtype="float32").eval()
    return made, {} if storage is None else quantise(made, storage)


def check() -> None:
    """Each storage's logits are those of the same model with the weights that its codes say."""
    tokens = rows()[:1, :64]
    for name, storage in STORAGES.items():
        (coded, _), (dense, _) = model(storage), model()
        for path, m in coded.named_modules():
            if isinstance(m, Stored):
                dense.get_submodule(path.removesuffix(".stored")).weight.data.copy_(m.dense())
        with torch.no_grad():
            ours, theirs = coded(tokens).logits, dense(tokens).logits
        assert float((ours - theirs).abs().max()) < 1e-3, name


def measure() -> Iterator[dict[str, Any]]:
    """A row for each storage; bits_per_weight is of the quantised maps, constants and tables with them."""
    exact = token_nats(model()[0], rows())
    print(f"{exact.numel():,} tokens of {len(rows())} rows; as they are: {float(exact.mean()):.4f} nats a token")
    for name, storage in STORAGES.items():
        made, errors = model(storage)
        maps = [m for m in made.modules() if isinstance(m, Stored)]
        bits = sum(m.bits_per_weight * m.shape.numel() for m in maps) / sum(m.shape.numel() for m in maps)
        nats = token_nats(made, rows())
        by_row = (nats - exact).mean(1)
        yield row(
            f"{name}, {exact.numel():,} tokens", "nats/token", round(float(nats.mean()), 4),
            round(float(exact.mean()), 4), "the weights as they are (bf16 on disk)", smaller=True,
            more_nats=round(float(by_row.mean()), 5), error=round(float(by_row.std() / len(by_row) ** 0.5), 5),
            bits_per_weight=round(bits, 3), weight_error=round(sum(errors.values()) / len(errors), 4),
        )  # fmt: skip


if __name__ == "__main__":
    main(__file__)
