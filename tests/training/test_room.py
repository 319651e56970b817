"""What a step holds, counted on fake tensors: against real steps here, and against peaks measured on a GPU."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

import dovetail as dt
from dovetail.adapters import adapt
from dovetail.kernels import twins
from dovetail.objectives.next_token import cross_entropy
from dovetail.parts.containers import StackModule
from dovetail.parts.storage.int4 import Int4
from dovetail.parts.storage.int8 import Int8
from dovetail.parts.storage.nf4 import Nf4
from dovetail.surgery import quantise
from dovetail.training import Recipe, preflight
from dovetail.training.device import autocast
from dovetail.training.room import Step, Uncounted, Way, choose, chosen_for, look, predict, states
from dovetail.training.setup import set_up
from dovetail.training.simulate import Live, faked, saved_bytes, step_bytes
from training.small import recipe

RESULTS = Path(__file__).parents[2] / "docs/results"
LLAMA = {
    "kind": "decoder", "vocab": 128_256, "dim": 2048, "depth": 16, "context": 4096,
    "head": {"kind": "ref", "path": "embedding"},
    "blocks": {
        "mixer": {"kind": "attention", "heads": 32, "kv_heads": 8, "head_dim": 64},
        "feedforward": {"kind": "glu", "hidden": 8192},
    },
}  # fmt: skip
LLAMA_8B = {
    "kind": "decoder", "vocab": 128_256, "dim": 4096, "depth": 32, "context": 2048,
    "blocks": {"mixer": {"kind": "attention", "heads": 32, "kv_heads": 8}, "feedforward": {"kind": "glu", "hidden": 14336}},
}  # fmt: skip


def tiny(**more: Any) -> Any:
    spec = {"kind": "decoder", "vocab": 300, "dim": 32, "depth": 3, "blocks": {"mixer": {"kind": "attention", "heads": 4, "kv_heads": 2}}}  # fmt: skip
    return dt.build(spec | more, seed=0).train()


def measured(name: str, case: str) -> float:
    """Bytes at the peak of a case of a results file."""
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    return next(r["peak_gb"] for r in rows if r["case"].endswith(case)) * 1e9


def test_nothing_fake_stays_for_a_real_step() -> None:
    """Kernels keep tables between calls: the next step would read numbers that are not there."""
    model, tokens = tiny(blocks={"mixer": {"kind": "hippo", "order": 20}}), torch.zeros(1, 40, dtype=torch.long)
    first = step_bytes(model, batch=2, length=40, device="cpu")
    with twins.plain():
        expected = model(tokens).logits
    torch.testing.assert_close(model(tokens).logits, expected)
    assert step_bytes(model, batch=2, length=40, device="cpu") == first


@pytest.mark.parametrize(
    "mixer, precision", [({"kind": "attention", "heads": 4, "kv_heads": 2}, "bf16"), ("gla", "bf16"), ("mamba", "bf16")]
)
def test_saved_tensors_and_peak_are_those_of_a_real_step(mixer: Any, precision: str) -> None:
    """To the byte: the same storages, counted in a step that runs and in one that does not."""
    model = tiny(blocks={"mixer": mixer})
    tokens = torch.zeros(2, 40, dtype=torch.long)

    def hidden(of: Any, tokens: torch.Tensor) -> torch.Tensor:
        with autocast(precision, torch.device("cpu")):
            return of(tokens, logits=False).last_hidden_state

    real = saved_bytes(lambda: hidden(model, tokens), [*model.parameters(), *model.buffers(), tokens])
    with FakeTensorMode():
        fake = faked(model).train()
        known = [*fake.parameters(), *fake.buffers(), tokens_there := torch.zeros(2, 40, dtype=torch.long)]
        assert saved_bytes(lambda: hidden(fake, tokens_there), known) == real
    live = Live([*model.parameters(), *model.buffers()])
    with live:
        with autocast(precision, torch.device("cpu")):
            h = model(torch.zeros(2, 40, dtype=torch.long), logits=False).last_hidden_state
            total = cross_entropy(model.head, h.flatten(0, -2), tokens.flatten())[0]
            del h
        total.backward()
    assert step_bytes(model, batch=2, length=40, device="cpu", precision=precision) == pytest.approx(
        live.peak, rel=0.01
    )


@pytest.mark.parametrize("case, compiled", [("eager", False), ("compiled", True)])
def test_predicts_peaks_measured_on_a_gpu(case: str, compiled: bool) -> None:
    """bench/train_gpu.py: weights, gradients and moments in bf16, 4 x 4096 tokens."""
    model = dt.build(LLAMA, weights=False).to(torch.bfloat16)
    way = predict(Step(model, 4, 4096, compiled=compiled), "cuda", 0)
    assert way.peak == pytest.approx(measured("train_gpu", case), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, again, compiled, nf4",
    [
        ("2048, eager, checkpointing", 1, False, False),
        ("nf4, eager, checkpointing", 1, False, True),
        ("2048, compiled, checkpointing", 1, True, False),
        ("compiled, memory free", 0, True, False),
        ("nf4, compiled, checkpointing", 1, True, True),
    ],
)
def test_predicts_peaks_of_lora_on_a_gpu(case: str, again: int, compiled: bool, nf4: bool) -> None:
    """bench/lora_gpu.py: bf16 base, fp32 adapters under autocast, 4 x 2048 tokens."""
    model = dt.build(LLAMA_8B, weights=False).to(torch.bfloat16)
    adapt(model, {"kind": "lora", "rank": 16})
    way = predict(
        Step(model, 4, 2048, precision="bf16", compiled=compiled, storage=Nf4() if nf4 else None), "cuda", again
    )
    assert way.peak == pytest.approx(measured("lora_gpu", case), rel=0.1)


@pytest.mark.parametrize("storage", [Int8(), Int4(block=32), Nf4()])
def test_weights_in_codes_are_those_of_a_quantised_model(storage: Any) -> None:
    blocks = {"mixer": {"kind": "attention"}, "feedforward": {"kind": "glu"}}
    spec = {"kind": "decoder", "vocab": 64, "dim": 64, "depth": 2, "blocks": blocks}
    model = dt.build(spec).requires_grad_(False)
    found = states(Step(model, 1, 8, storage=storage))["weights"]
    quantise(model, storage)
    assert found == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def test_every_nth_block() -> None:
    """The same loss and gradients, and less that is kept the more blocks are made again."""
    model, tokens = tiny(depth=4), torch.arange(20)[None]
    wanted = None
    for again in (0, 4, 2, 1):
        model.checkpointing = again
        grads = torch.autograd.grad(model(tokens).logits.square().mean(), list(model.parameters()))
        wanted = wanted or grads
        for a, b in zip(grads, wanted, strict=True):
            torch.testing.assert_close(a, b)
    kept = [step_bytes(model, batch=4, length=256, device="cpu", again=again) for again in (0, 1)]
    assert kept[1] < 0.6 * kept[0]


def test_chooses_the_fastest_that_fits() -> None:
    step = Step(tiny(depth=2), 4, 256)
    peaks = {again: predict(step, "cpu", again).peak for again in (0, 4, 1)}
    assert peaks[0] > peaks[4] > peaks[1]
    way = choose(step, "cpu", peaks[4] / 0.9 + 1)
    assert way is not None and (way.checkpointing, way.batch, way.peak) == (4, 4, peaks[4])
    fewer = choose(step, "cpu", peaks[1] / 0.9 - 1)
    assert isinstance(fewer, Way) and (fewer.batch, fewer.accumulate) == (2, 2) and "2 x 2 rows" in str(fewer)
    assert choose(step, "cpu", 2 * sum(states(step).values()) / 3) is None
    assert states(replace(step, average=True))["average"] * 2 == states(step)["moments"]


def asking(model: Any) -> Any:
    """The model with a question about its data before each forward, which no fake tensor answers."""
    model.blocks[0].register_forward_pre_hook(lambda _, given: float(given[0].detach().sum()) and None)
    return model


def test_says_why_a_step_is_not_counted(tmp_path: Path, monkeypatch: Any) -> None:
    step = Step(asking(tiny(depth=2)), 2, 16)
    for run in (lambda: predict(step, "cpu", 0), lambda: choose(step, "cpu", 1e12), lambda: look(step, "cpu", 1e12, 1)):
        with pytest.raises(Uncounted, match="DataDependentOutputException"):
            run()
    assert look(step, "cpu", 1e3, 1) is None  # too large whatever it holds
    with pytest.raises(Uncounted, match="only one stack"):
        predict(Step(torch.nn.Linear(2, 2), 2, 16), "cpu", 0)
    train = Recipe.load(recipe(tmp_path)).train
    assert chosen_for(step.model, train, "none", torch.device("cpu"), 1e12) == 1
    module: Any = sys.modules["dovetail.training.preflight"]
    on_paper = module._on_paper
    monkeypatch.setattr(module, "_on_paper", lambda recipe: asking(on_paper(recipe)))
    found, screen = preflight(recipe(tmp_path)), Console(file=StringIO(), width=300)
    screen.print(found)
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert found.fits and "not counted: without data the model ends in DataDependent" in text
    assert "_local_scalar_dense" in found.to_dict()["uncounted"] and found.to_dict()["step"] is None


def test_a_recipe_leaves_it_to_the_memory(tmp_path: Path, monkeypatch: Any) -> None:
    """Training and preflight choose alike, and preflight says what."""
    data = recipe(tmp_path, checkpointing="auto", length=256)
    assert set_up(Recipe.load(data)).model.checkpointing == 0
    free = preflight(data).way
    assert free is not None and free.checkpointing == 0
    for room, wanted in ((0.99 * free.peak / 0.9, 4), (1e3, 1)):  # counts may differ by one small tensor
        for where in ("setup", "preflight"):
            module = sys.modules[f"dovetail.training.{where}"]
            monkeypatch.setattr(module, "total_memory", lambda _, room=room: int(room))
        model = set_up(Recipe.load(data)).model
        assert [m.checkpointing for m in model.modules() if isinstance(m, StackModule)] == [wanted]
        if wanted == 4:
            found, screen = preflight(data), Console(file=StringIO(), width=200)
            screen.print(found)
            text = " ".join(screen.file.getvalue().split())  # type: ignore[attr-defined]
            assert found.fits and "chosen: eager, one block in 4 made again, 1 x 2 rows" in text
            assert found.to_dict()["step"]["checkpointing"] == 4
