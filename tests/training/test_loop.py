"""The loop: accumulation, clipping, decay groups, EMA, NaN, evaluation, what it leaves behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import dovetail as dt
from dovetail import hub
from dovetail.errors import DataError, DivergedError, RunError, SpecError
from dovetail.training import Recipe, fit, loop
from dovetail.training.loop import Run, evaluate
from dovetail.training.optim import Average, adamw, clip, update
from dovetail.training.setup import set_up
from training.small import recipe


def run(folder: Path, **train: Any) -> Run:
    data = recipe(folder, **train)
    data["model"]["blocks"] = {}  # no dropout: what is compared draws no noise
    data["data"]["pack"] = "none"  # ragged rows
    return Run(set_up(Recipe.load(data)), folder / "out")


def test_accumulation_equals_one_batch(tmp_path: Path) -> None:
    """8 x 1 row == 1 x 8 rows to fp32 rounding, on ragged rows."""
    runs = [run(tmp_path, batch=8), run(tmp_path, batch=1, accumulate=8)]
    for r in runs:
        r.model.train()
    rows = runs[0].batches.rows
    assert len({len(rows[i].tokens) for i in range(len(rows))}) > 3  # ragged indeed
    for _ in range(4):
        (a, norm_a, tokens_a), (b, norm_b, tokens_b) = (r.one_step() for r in runs)
        assert tokens_a == tokens_b
        torch.testing.assert_close(a, b, rtol=2e-6, atol=0)
        torch.testing.assert_close(norm_a, norm_b, rtol=2e-5, atol=0)
    for (name, p), q in zip(runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5, msg=name)


def test_one_step_is_torch_adamw_on_the_mean_loss(tmp_path: Path) -> None:
    """Loss, clipping and update against torch written out plainly."""
    r = run(tmp_path, batch=3, clip=0.5, warmup=4, weight_decay=0.2)
    twin = dt.build(r.model.spec, seed=0).train()
    batch = run(tmp_path, batch=3).batches.next()
    kinds = {n: p.dim() >= 2 and "embedding" not in n for n, p in twin.named_parameters()}
    groups = [
        {"params": [p for n, p in twin.named_parameters() if kinds[n] is decayed], "weight_decay": 0.2 * decayed}
        for decayed in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2 / 4, betas=(0.9, 0.95), foreach=False, fused=False)
    inputs = {k: v for k, v in batch.items() if k == "segments"}
    loss = nn.functional.cross_entropy(twin(batch["tokens"], **inputs).logits.flatten(0, 1), batch["labels"].flatten())
    loss.backward()
    norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    optimizer.step()
    r.model.train()
    got, got_norm, _ = r.one_step()
    torch.testing.assert_close(got, loss.detach())
    torch.testing.assert_close(got_norm, norm)
    assert norm > 0.5
    for (name, p), q in zip(r.model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)


def test_checkpointing_and_bf16_change_little_or_nothing(tmp_path: Path) -> None:
    plain, again, rough = run(tmp_path), run(tmp_path, checkpointing=True), run(tmp_path, autocast="bf16")
    assert again.model.checkpointing and not plain.model.checkpointing and rough.precision == "bf16"
    for _ in range(3):
        a, b, c = (r.one_step()[0] for r in (plain, again, rough) if r.model.train() is not None)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
        torch.testing.assert_close(a, c, rtol=3e-2, atol=0)


def test_decay_groups_and_mup_rates() -> None:
    spec = {"kind": "decoder", "vocab": 40, "dim": 32, "depth": 2, "init": {"kind": "mup", "base": 16}}
    model = dt.build(spec)
    optimizer = adamw(model, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3)
    names = {id(p): n for n, p in model.named_parameters()}
    told = {names[id(p)]: (g["peak"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert told.keys() == set(names.values())
    assert told["embedding.table.weight"] == (0.1, 0.0)
    assert told["head_part.linear.weight"] == (0.1, 0.3)
    assert told["norm.weight"] == (0.1, 0.0)
    assert told["blocks.0.mixer.qkv.weight"] == (pytest.approx(0.1 * 16 / 32), 0.3)
    down = model.blocks[0].feedforward.down
    assert told["blocks.0.feedforward.down.weight"][0] == pytest.approx(0.1 * 16 / down.in_features)


def test_vectors_in_tables_do_not_decay() -> None:
    def undecayed(model: nn.Module) -> set[str]:
        groups = adamw(model, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3).param_groups
        free = {id(p) for g in groups if not g["weight_decay"] for p in g["params"]}
        return {n for n, p in model.named_parameters() if id(p) in free and p.dim() > 1}

    def decoder(position: Any) -> Any:
        mixer = {"kind": "attention", "heads": 2, "position": position}
        return dt.build({"kind": "decoder", "vocab": 40, "dim": 16, "depth": 1, "blocks": {"mixer": mixer}})

    for position, tables in (("transformer_xl", "uv"), ("xlnet", "uvse"), ({"kind": "prefix", "length": 3}, "kv")):
        names = {f"blocks.0.mixer.position.{name}" for name in tables}
        assert undecayed(decoder(position)) == names | {"embedding.table.weight"}
    for adapter, name in (
        ({"kind": "prompt", "length": 3}, "weight"),
        ({"kind": "p_tuning", "length": 3}, "embedding"),
        ({"kind": "prefix", "length": 3}, "sources.decoder.weight"),
        ({"kind": "prefix", "length": 3, "hidden": 8}, "sources.decoder.embedding"),
    ):
        model = dt.adapt(decoder("rope"), adapter)
        assert undecayed(model) == {f"front.adapters.default.{name}"}


def test_clip_equals_torch() -> None:
    ours, theirs = ([nn.Parameter(torch.randn(n, 3)) for n in (4, 7)] for _ in range(2))
    for limit in (0.7, 100.0):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        torch.testing.assert_close(clip(ours, limit), nn.utils.clip_grad_norm_(theirs, limit))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [0.0, 0.5, 1e3])
@pytest.mark.parametrize("read_after", [False, True])
def test_a_step_clips_as_it_goes(dtype: torch.dtype, limit: float, read_after: bool) -> None:
    """The clip inside the fused optimiser's pass is `clip` and a step: weights, norm, and gradients that are read after."""
    ours, theirs = ([nn.Parameter(torch.linspace(-1, 1, 3 * n).view(n, 3).to(dtype)) for n in (4, 7)] for _ in range(2))
    one, other = (torch.optim.AdamW(p, lr=1e-2, fused=True) for p in (ours, theirs))
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        wanted = clip(theirs, limit)
        other.step()
        found = update(one, ours, limit, read_after)
        assert found.dtype == torch.float32 and torch.equal(found, wanted)
        for a, b in zip(ours, theirs, strict=True):
            assert not read_after or torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
            torch.testing.assert_close(a, b)
    assert not hasattr(one, "grad_scale")


def test_average_is_the_formula_and_swaps_back() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    average = Average([("p", p)], 0.75)
    expected = p.detach().clone()
    for step in range(3):
        p.data = p.data + step
        average.live = {"p": p}
        average.update()
        expected = 0.75 * expected + 0.25 * p.detach()
    torch.testing.assert_close(average.shadow["p"], expected)
    live = p.detach().clone()
    average.swap()
    assert torch.equal(p.detach(), expected) and torch.equal(average.shadow["p"], live)
    average.swap()
    assert torch.equal(p.detach(), live)


@pytest.mark.parametrize("pack", ["documents", "none"])
def test_learns_and_leaves_a_loadable_model(tmp_path: Path, pack: str) -> None:
    data = recipe(tmp_path, steps=60, batch=8, lr=2e-2, eval_every=30, warmup=5)
    data["data"]["pack"] = pack
    result = fit(data, progress=False)
    out = tmp_path / "out"
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [x["loss"] for x in log if "loss" in x]
    assert len(losses) == 60 and losses[-1] < 0.6 * losses[0] and losses[0] == pytest.approx(math.log(300), rel=0.05)
    assert [x["step"] for x in log if "held_out_nats" in x] == [30, 60]
    assert all(x["tokens_per_s"] > 0 and 0 < x["mfu"] < 1 and x["peak_bytes"] > 0 for x in log if "loss" in x)
    assert result.held_out is not None and result.held_out["nats"] < 0.6 * math.log(300)
    assert result.to_dict() == json.loads((out / "result.json").read_text())
    assert Recipe.parse(yaml.safe_load((out / "recipe.yaml").read_text())) == Recipe.load(data)
    model, tokenizer = hub.load(out), hub.load_tokenizer(out)
    ids = torch.tensor([tokenizer.encode("def f12(x):\n    return x *")])
    assert tokenizer.decode(model(ids).logits[0, -1].argmax(-1, keepdim=True).tolist()) == " "
    assert list(out.glob("tensorboard/events*"))


def test_evaluation_equals_the_mean_over_all_labels(tmp_path: Path) -> None:
    r = run(tmp_path)
    rows = r.parts.rows(r.parts.train)
    got = evaluate(r.model, r.objective, rows, batch=7)
    total = count = 0.0
    with torch.no_grad():
        for i in range(len(rows)):
            tokens, labels, _ = (torch.from_numpy(x)[None] for x in rows[i])
            logits = r.model.eval()(tokens).logits.double()
            if int((labels != -100).sum()):
                total += float(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
                count += int((labels != -100).sum())
    assert got["tokens"] == count and got["nats"] == pytest.approx(total / count, rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(got["nats"]))


def test_nan_names_the_step_and_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    plain = Run.one_step

    def poisoned(self: Run) -> Any:
        if self.step == 4:
            next(self.model.parameters()).data.fill_(math.nan)
        return plain(self)

    monkeypatch.setattr(Run, "one_step", poisoned)
    with pytest.raises(RunError, match=r"(?s)loss is nan at step 5.*step-00000003 is intact"):
        fit(recipe(tmp_path, save_every=3), progress=False)
    assert not (tmp_path / "out/checkpoints/step-00000006").exists()
    assert hub.load(tmp_path / "out/checkpoints/step-00000003").norm.weight.isfinite().all()


def test_diverging_run_stops(tmp_path: Path) -> None:
    """No mock: a rate that overflows fp32."""
    with pytest.raises(RunError, match="at step"):
        fit(recipe(tmp_path, lr=1e30, clip=0.0, weight_decay=0.0), progress=False)


def test_an_evaluation_that_fails_costs_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    """The checkpoint is there before it; the scores that are missing are made when the run goes on."""
    data = recipe(tmp_path, steps=4, save_every=2, eval_every=2)
    whole = fit(data | {"out": str(tmp_path / "whole")}, progress=False)
    for at in (2, 4):
        plain = loop.evaluate

        def fails(*arguments: Any, **options: Any) -> Any:
            raise MemoryError

        monkeypatch.setattr(loop, "evaluate", fails)
        with pytest.raises(MemoryError):
            fit(data, resume=at > 2, progress=False)
        monkeypatch.setattr(loop, "evaluate", plain)
        assert (tmp_path / f"out/checkpoints/step-0000000{at}").is_dir()
        if at == 2:  # dies in the next evaluation, after the one that was missing
            calls = [fails, plain]
            monkeypatch.setattr(loop, "evaluate", lambda *a, calls=calls, **k: calls.pop()(*a, **k))
            with pytest.raises(MemoryError):
                fit(data, resume=True, progress=False)
            monkeypatch.setattr(loop, "evaluate", plain)
    assert fit(data, resume=True, progress=False).held_out == whole.held_out
    logs = [[json.loads(x) for x in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("whole", "out")]
    one, two = ([(x["step"], x.get("held_out_nats"), x.get("loss")) for x in log] for log in logs)
    assert one == two


@pytest.mark.parametrize("what", ["score", "weights"])
def test_what_is_not_finite_is_no_result(tmp_path: Path, monkeypatch: Any, what: str) -> None:
    plain = Run.one_step

    def last(self: Run) -> Any:
        found = plain(self)
        if what == "weights" and self.step == 3:
            next(self.model.parameters()).data[0] = math.inf
        return found

    monkeypatch.setattr(Run, "one_step", last)
    if what == "score":
        monkeypatch.setattr(loop, "evaluate", lambda *_, **__: {"nats": math.nan})
    said = "held-out score is nan nats after step 4" if what == "score" else "weights are not finite after step 4"
    with pytest.raises(DivergedError, match=said):
        fit(recipe(tmp_path, steps=4, save_every=2), progress=False)
    assert not (tmp_path / "out/model.safetensors").exists()
    assert (tmp_path / "out/checkpoints/step-00000002").is_dir()


def test_held_out_text_is_another_and_has_labels(tmp_path: Path) -> None:
    data = recipe(tmp_path)
    with pytest.raises(DataError, match="learnt by heart"):
        fit(data, [f"data.held_out.path={tmp_path / 'text'}"], progress=False)
    (tmp_path / "held_out").write_text("")
    with pytest.raises(DataError, match="corpus is empty"):
        fit(data, progress=False)


def test_fine_tunes_a_checkpoint(tmp_path: Path) -> None:
    fit(recipe(tmp_path / "a", steps=3), progress=False)
    data = recipe(tmp_path / "b", steps=2, lr=1e-9) | {"model": str(tmp_path / "a/out"), "tokenizer": None}
    fit(data, progress=False)
    old, new = hub.load(tmp_path / "a/out"), hub.load(tmp_path / "b/out")
    for (name, p), q in zip(old.named_parameters(), new.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6, msg=name)
    assert (tmp_path / "b/out/tokenizer.json").read_bytes() == (tmp_path / "a/out/tokenizer.json").read_bytes()


def test_refusals(tmp_path: Path) -> None:
    data = recipe(tmp_path)
    (tmp_path / "one").write_text("<sep>".join("abc"))
    for overrides, error, message in [
        (["out=null"], SpecError, "no folder"),
        (["out=''"], SpecError, "no folder"),
        (["model.vocab=17"], SpecError, "ids and the model 17"),
        (["tokenizer=null"], SpecError, "no tokenizer"),
        ([f"data.train.path={tmp_path / 'nowhere'}"], DataError, "nowhere"),
    ]:
        with pytest.raises(error, match=message):
            fit(data, overrides, progress=False)
