"""Steps replayed as CUDA graphs: the same losses as without, where there is a GPU; elsewhere what is asked and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dovetail.errors import SpecError, UserError
from dovetail.objectives.base import Loss, Term
from dovetail.training import Recipe, fit
from dovetail.training.optim import set_rate
from training.small import recipe

MIXERS: dict[str, dict[str, Any]] = {
    "attention": {"kind": "attention", "heads": 2},
    "window": {"kind": "attention", "heads": 2, "mask": {"kind": "window", "size": 8}},
    "gau": {"kind": "gau", "position": "rope"},
    "flash": {"kind": "flash", "chunk": 16, "position": "rope"},
    "linear": {"kind": "linear", "heads": 2},
    "performer": {"kind": "performer", "heads": 2, "redraw": 2},
    "gla": {"kind": "gla", "heads": 2},
    "delta_net": {"kind": "delta_net", "heads": 2},
    "mamba": {"kind": "mamba"},
    "s4": {"kind": "s4"},
    "s4d": {"kind": "s4d"},
    "hippo": {"kind": "hippo"},
    "lstm": {"kind": "lstm"},
}


BY_DOCUMENT = ("s4", "s4d", "lstm")  # the host counts the documents of a packed row, and they run one by one


def losses(folder: Path, mixer: dict[str, Any], **train: Any) -> list[float]:
    """Of every step, in fp32 without dropout, whose random numbers a graph draws in another order."""
    data = recipe(folder, steps=8, **train)
    if mixer["kind"] in BY_DOCUMENT:
        data["data"]["train"].pop("separator")
    data["model"]["blocks"] = {"mixer": mixer}
    fit(data, progress=False)
    rows = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("name", MIXERS)
def test_losses_are_those_without_a_graph(name: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"device": "cuda", "accumulate": 2 if name == "attention" else 1, "ema": 0.5}
    eager = losses(tmp_path / "eager", MIXERS[name], **more)
    graphed = losses(tmp_path / "graphed", MIXERS[name], graph=True, **more)
    torch.testing.assert_close(torch.tensor(graphed), torch.tensor(eager), rtol=2e-4, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_what_the_host_counts_cannot_be_captured(tmp_path: Path) -> None:
    data = recipe(tmp_path, steps=8, device="cuda", graph=True)
    data["model"]["blocks"] = {"mixer": MIXERS["lstm"]}
    with pytest.raises(UserError, match="cannot be captured as a CUDA graph"):
        fit(data, progress=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_resumed_with_a_graph(tmp_path: Path) -> None:
    mixer, more = MIXERS["attention"], {"device": "cuda", "graph": True, "save_every": 5, "keep": 9}
    whole = losses(tmp_path, mixer, **more)
    data = recipe(tmp_path, steps=8, **more)
    data["model"]["blocks"] = {"mixer": mixer}
    for newer in sorted((tmp_path / "out" / "checkpoints").iterdir())[1:]:
        newer.rename(tmp_path / newer.name)
    (tmp_path / "out" / "result.json").unlink()
    resumed = fit(data, resume=True, progress=False)
    assert resumed.loss == pytest.approx(whole[-1], rel=2e-4)


def test_auto_is_no_graph_on_a_cpu_and_true_is_refused(tmp_path: Path) -> None:
    mixer = MIXERS["attention"]
    assert losses(tmp_path / "auto", mixer, graph="auto") == losses(tmp_path / "none", mixer)
    with pytest.raises(SpecError, match="no CUDA graphs on this device"):
        losses(tmp_path / "true", mixer, graph=True)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"adapter": {"kind": "adalora"}}, "does something else from step to step"),
        ({"adapter": {"kind": "bottleneck", "drop": True}}, "does something else from step to step"),
        ({"train": {"checkpointing": 2}}, "made again"),
        ({"train": {"plain": True}}, "train.graph turns one on"),
    ],
)
def test_what_a_graph_cannot_do_is_refused(more: dict[str, Any], what: str, tmp_path: Path) -> None:
    data = recipe(tmp_path, graph="auto")
    data["train"] |= more.get("train", {})
    with pytest.raises(SpecError, match=what):
        Recipe.load(data | {name: value for name, value in more.items() if name != "train"})


def test_rates_and_counts_may_be_tensors() -> None:
    """As a graph wants them, which reads what stands there when it is replayed."""
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([{"params": [weight], "lr": 1.0, "peak": 0.5}], lr=1.0)
    rate = torch.tensor(3.0)
    optimizer.param_groups[0]["lr"] = rate
    set_rate(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == 0.25
    loss = Loss({"a": Term(torch.tensor(6.0), torch.tensor(2)), "b": Term(torch.tensor(1.0), torch.tensor(0))})
    given = {"a": 4, "b": 0}
    assert float(loss.total({n: torch.tensor(float(c)) for n, c in given.items()})) == float(loss.total(given)) == 2.5
