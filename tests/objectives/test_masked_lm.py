"""The masked-language-model loss against torch's and transformers' own; which models it refuses; a run that resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import dovetail as dt
from dovetail.errors import SpecError
from dovetail.objectives.masked_lm import MaskedLm
from dovetail.objectives.next_token import NextToken
from dovetail.spec import Spec
from dovetail.training import checkpoint, fit, preflight
from oracles import oracle_for
from training.small import recipe

V = 23
ENCODER = {"kind": "encoder", "vocab": V, "dim": 16, "depth": 2, "context": 32, "position": "learned"}
TRAINED = {"kind": "encoder", "dim": 16, "depth": 2, "blocks": {"dropout": 0.1}}


def batch() -> dict[str, torch.Tensor]:
    labels = torch.randint(0, V, (3, 12)).masked_fill(torch.rand(3, 12) < 0.7, -100)
    return {"tokens": torch.randint(0, V, (3, 12)), "labels": labels}


@oracle_for("objective", "masked_lm")
@pytest.mark.parametrize("mask", [False, True])
def test_equals_cross_entropy_over_all_logits(mask: bool) -> None:
    model, given = dt.build(ENCODER, dtype=torch.float64, seed=1), batch()
    if mask:
        given["attention_mask"] = (torch.arange(12) < torch.tensor([12, 7, 9])[:, None]).long()
        given["labels"] = given["labels"].masked_fill(given["attention_mask"] == 0, -100)
    inputs = {k: v for k, v in given.items() if k not in ("tokens", "labels")}
    logits = model(given["tokens"], **inputs).logits
    wanted = F.cross_entropy(logits.flatten(0, 1), given["labels"].flatten(), reduction="sum")
    loss = MaskedLm()(model, given)
    assert MaskedLm().counts(given) == {"masked_lm": int(loss.terms["masked_lm"].count)}
    torch.testing.assert_close(loss.terms["masked_lm"].sum, wanted)
    hits = (logits.argmax(-1) == given["labels"]).sum()
    assert int(loss.metrics["correct"][0]) == int(hits)
    parameters = list(model.parameters())
    a = torch.autograd.grad(loss.total(), parameters)
    b = torch.autograd.grad(wanted / (given["labels"] != -100).sum(), parameters)
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_equals_the_loss_of_transformers(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=V, hidden_size=8, num_attention_heads=2, num_hidden_layers=2, intermediate_size=12)
    theirs = BertForMaskedLM(config).double().eval()
    theirs.save_pretrained(tmp_path)
    given = batch()
    ours = MaskedLm()(dt.load(tmp_path), given).total()
    theirs = theirs(input_ids=given["tokens"], labels=given["labels"]).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)  # theirs is summed in fp32


def test_models_that_look_the_wrong_way_are_refused(tmp_path: Path) -> None:
    given = batch()
    decoder = dt.build({"kind": "decoder", "vocab": V, "dim": 16})
    with pytest.raises(SpecError, match=r"masked_lm asks .* a model that writes \(decoder\)"):
        MaskedLm()(decoder, given)
    with pytest.raises(SpecError, match=r"next_token asks a model that looks ahead \(encoder\)") as caught:
        NextToken()(dt.build(ENCODER), given)
    assert caught.value.where == "objective" and "masked_lm" in str(caught.value.remedy)
    data = recipe(tmp_path)
    with pytest.raises(SpecError, match="masked_lm asks"):
        fit(data | {"objective": "masked_lm"}, progress=False)
    with pytest.raises(SpecError, match="next_token asks"):
        fit(data | {"model": TRAINED}, progress=False)
    with pytest.raises(SpecError, match="shares of one"):
        Spec.parse("objective", {"kind": "masked_lm", "masked": 0.9, "random": 0.2})


@pytest.mark.parametrize("pack", ["documents", "none"])
def test_stopped_and_resumed_is_bitwise_the_same(pack: str, tmp_path: Path) -> None:
    """Over the end of an epoch, with dropout and accumulation; evaluation asks the same questions each time."""
    data = recipe(tmp_path, steps=9, save_every=4, accumulate=2, batch=4, keep=9, eval_batches=0, eval_every=9)
    data |= {"model": TRAINED, "objective": "masked_lm"}
    data["data"]["pack"] = pack
    lines = (tmp_path / "text").read_text().split("<sep>")[: 48 if pack == "none" else 60]
    (tmp_path / "text").write_text("<sep>".join(lines))
    whole = fit(data | {"out": str(tmp_path / "whole")}, progress=False)
    cut = tmp_path / "cut"
    fit(data | {"out": str(cut)}, progress=False)
    for later in checkpoint.found(cut)[1:]:  # as if it had been killed after step 4
        shutil.rmtree(later)
    (kept,) = checkpoint.found(cut)
    state = json.loads((kept / "state.json").read_text())
    assert state["step"] == 4 and state["sampler"]["position"] > 0
    resumed = fit(data | {"out": str(cut)}, progress=False, resume=True)
    assert resumed.loss == whole.loss and resumed.held_out == whole.held_out
    a, b = dt.load(tmp_path / "whole"), dt.load(cut)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert a.spec.kind == "encoder"


def test_it_learns_and_preflight_shows_what_is_asked(tmp_path: Path) -> None:
    data = recipe(tmp_path, steps=60, batch=8, eval_batches=4)
    data |= {"model": TRAINED | {"blocks": {}, "position": "learned"}, "objective": "masked_lm"}
    result = fit(data, progress=False)
    assert result.held_out is not None and result.held_out["nats"] < 4.5 < torch.tensor(300.0).log()
    seen: Any = preflight(data)
    labels = int((seen.batch["labels"] != -100).sum())
    assert 0.1 * seen.batch["tokens"].numel() < labels < 0.2 * seen.batch["tokens"].numel()
    console = seen.__rich__().renderables[0]
    green = sum(len(console.plain[s.start : s.end]) for s in console.spans if s.style == "green")
    assert 0 < green < len(console.plain) / 2


def test_work_of_an_encoder_is_counted_as_it_is_done() -> None:
    """All keys are seen, the head is asked for its share alone; torch counts the same for the forward."""
    from torch.utils.flop_counter import FlopCounterMode

    from dovetail.training.flops import flops_per_token, head_weights

    model = dt.build(ENCODER)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.zeros(2, 16, dtype=torch.long))
    assert flops_per_token(model, 16) * 32 == counter.get_total_flops()
    assert head_weights(model) == 16 * 16 + 16 * V
    saved = flops_per_token(model, 16) - flops_per_token(model, 16, asked=MaskedLm(share=0.25).asked)
    assert saved == pytest.approx(2 * 0.75 * (16 * 16 + 16 * V))


def test_a_compiled_model_gives_the_same_loss_of_packed_rows() -> None:
    torch.compiler.reset()
    model = dt.build(ENCODER | {"pooling": "mean"}, seed=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in range(3):  # other counts of labels every time
        torch.manual_seed(seed)
        given = batch() | {"segments": torch.tensor([[0] * 5 + [1] * 4 + [-1] * 3] * 3)}
        given["labels"] = given["labels"].masked_fill(given["segments"] < 0, -100)
        a, b = MaskedLm()(compiled, given).total(), MaskedLm()(model, given).total()
        torch.testing.assert_close(a, b)
        one, other = (torch.autograd.grad(x, list(model.blocks.parameters())) for x in (a, b))
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y)


def test_what_writes_or_scores_texts_refuses_an_encoder() -> None:
    from dovetail.errors import BuildError, UserError
    from dovetail.report.measure import check_model

    model = dt.build(ENCODER)
    with pytest.raises(BuildError, match="reads whole rows"):
        dt.generate(model, None, torch.zeros(1, 4, dtype=torch.long), max_new_tokens=2)
    with pytest.raises(UserError, match="'encoder' is not measured"):
        check_model(model)
    assert set(model.blocks[0].mixer.plans("cpu", 32)) == {"training, prefill", "padded or packed", "positions"}
