"""Each term of the distillation against a plain formula in fp64, its refusals, and whole runs with a frozen teacher."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import dovetail as dt
from dovetail.data import train_tokenizer
from dovetail.errors import BuildError, SpecError
from dovetail.objectives import next_token
from dovetail.objectives.distillation import Distillation, divergence, evenly
from dovetail.parts.context import Context
from dovetail.spec import Spec
from dovetail.training import checkpoint, fit, loop, preflight
from oracles import oracle_for
from training.small import TEXT, recipe
from training.test_resume import assert_bitwise

V, C = 37, 16


def made(seed: int, depth: int = 2, **more: Any) -> Any:
    spec = {"kind": "decoder", "vocab": V, "dim": C, "depth": depth, "init": {"kind": "normal", "std": 0.3}} | more
    return dt.build(spec, seed=seed, dtype=torch.float64)


def batch(rows: int = 3, length: int = 9) -> dict[str, Tensor]:
    labels = torch.randint(0, V, (rows, length))
    labels[0, : length // 2] = -100
    return {"tokens": torch.randint(0, V, (rows, length)), "labels": labels}


def only(term: str, **more: Any) -> Distillation:
    fields = {"kind": "distillation", "logits": 0.0} | {term: 1.0} | more
    return Spec.parse("objective", fields)  # type: ignore[return-value]


def gradients(loss: Tensor, model: Any) -> list[Tensor]:
    wanted = list(model.parameters())
    return list(torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True, materialize_grads=True))


def same(got: Tensor, wanted: Tensor, model: Any) -> None:
    """Equal in fp64, gradients of every parameter too."""
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(got, model), gradients(wanted, model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def inside(model: Any, tokens: Tensor) -> tuple[list[Tensor], list[Tensor], Context]:
    """(what each block gives, what each mixer reads, the context), by running the model by hand."""
    ctx = Context.of(*tokens.shape, tokens.device)
    x, outputs, inputs = model.embed(model.embedding(tokens), ctx), [], []
    for block in model.blocks:
        inputs.append(block.norm_mixer(x))
        x = block(x, ctx)
        outputs.append(x)
    return outputs, inputs, ctx


@oracle_for("objective", "distillation")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_logits_equal_kl_div_in_chunks(monkeypatch: Any, temperature: float, direction: str) -> None:
    monkeypatch.setitem(next_token._CHUNK, "cpu", 70 * V)  # 200 rows: two whole chunks and a rest
    head, other = nn.Linear(C, V).double(), nn.Linear(C, V, bias=False).double()
    h, taught = torch.randn(200, C, dtype=torch.float64, requires_grad=True), torch.randn(200, C, dtype=torch.float64)
    real = torch.rand(200) < 0.7
    log_p = torch.log_softmax(head(h)[real] / temperature, -1)
    log_q = torch.log_softmax(other(taught)[real] / temperature, -1).detach()
    first, second = (log_p, log_q) if direction == "forward" else (log_q, log_p)  # kl_div(a, b) is KL(b || a)
    wanted = temperature**2 * F.kl_div(first, second, reduction="sum", log_target=True)
    got = divergence(head, h, other, taught, real, temperature, direction)
    torch.testing.assert_close(got, wanted)
    inputs = [h, *head.parameters()]
    for a, b in zip(torch.autograd.grad(got / 7, inputs), torch.autograd.grad(wanted / 7, inputs), strict=True):
        torch.testing.assert_close(a, b)


@oracle_for("objective", "distillation")
@pytest.mark.parametrize("distance", ["mean_square", "unit", "relative"])
def test_hidden_equals_the_formula(distance: str) -> None:
    student, teacher, data = made(1), made(2, depth=4), batch()
    got = only("hidden", hidden_distance=distance).taught_by(teacher)(student, data).terms["hidden"]
    real = data["labels"] != -100
    assert int(got.count) == int(real.sum()) and got.weight == 1.0
    ours, theirs = inside(student, data["tokens"])[0], inside(teacher, data["tokens"])[0]
    wanted = torch.zeros((), dtype=torch.float64)
    for s, t in ((ours[0][real], theirs[1][real].detach()), (ours[1][real], theirs[3][real].detach())):
        wanted = wanted + {
            "mean_square": lambda s, t: F.mse_loss(s, t, reduction="sum") / C,
            "unit": lambda s, t: (2 - 2 * F.cosine_similarity(s, t, dim=-1)).sum(),
            "relative": lambda s, t: ((s - t).norm(dim=-1) / t.norm(dim=-1)).square().sum(),
        }[distance](s, t) / 2  # fmt: skip
    same(got.sum, wanted, student)


@oracle_for("objective", "distillation")
@pytest.mark.parametrize("mixer", ["attention", "lstm"])
def test_transfer_feeds_the_students_mixers_what_the_teachers_read(mixer: str) -> None:
    """Any mixer on the student's side, and nothing but its mixers learns."""
    student, teacher, data = made(1, blocks={"mixer": mixer}), made(2), batch()
    objective = only("transfer", transfer_distance="mean_square", layers=[[1, 0]])
    got = objective.taught_by(teacher)(student, data).terms["transfer"].sum
    _, inputs, ctx = inside(teacher, data["tokens"])
    real = data["labels"] != -100
    t = teacher.blocks[0].mixer(inputs[0], ctx)[real].detach()
    wanted = F.mse_loss(student.blocks[1].mixer(inputs[0].detach(), ctx)[real], t, reduction="sum") / C
    same(got, wanted, student)
    moved = {n for (n, _), g in zip(student.named_parameters(), gradients(got, student), strict=True) if g.any()}
    assert moved and all(name.startswith("blocks.1.mixer.") for name in moved)


@pytest.mark.parametrize("term", ["logits", "hidden", "transfer"])
def test_a_teacher_that_is_the_student_teaches_nothing(term: str) -> None:
    student, teacher = made(1), made(1)
    for change in ({}, {"direction": "reverse", "temperature": 3.0}) if term == "logits" else ({},):
        loss = only(term, **change).taught_by(teacher)(student, batch()).total()
        assert loss.item() == 0.0 and not any(g.any() for g in gradients(loss, student))
    rough = only(term).taught_by(teacher.float())
    with torch.autocast("cpu", torch.bfloat16):
        loss = rough(student.float(), batch()).total()
    assert loss.item() == 0.0 and not any(g.any() for g in gradients(loss, student))


def test_terms_are_weighed_and_none_is_computed_in_vain() -> None:
    student, teacher, data = made(1), made(2), batch()
    weights = {"next_token": 0.5, "logits": 2.0, "hidden": 3.0, "transfer": 0.25}
    loss = Distillation(**weights).taught_by(teacher)(student, data)
    assert {name: term.weight for name, term in loss.terms.items()} == weights
    count = int((data["labels"] != -100).sum())
    assert Distillation(**weights).counts(data) == dict.fromkeys(weights, count)
    parts = {name: only(name).taught_by(teacher)(student, data).terms for name in ("logits", "hidden", "transfer")}
    assert all(list(terms) == [name] for name, terms in parts.items())
    cross = next_token.NextToken()(student, data).terms["next_token"].sum
    wanted = weights["next_token"] * cross + sum(weights[n] * terms[n].sum for n, terms in parts.items())
    same(loss.total(), wanted / count, student)
    calls: list[int] = []
    student.register_forward_hook(lambda *_: calls.append(1))
    learning = only("transfer").taught_by(teacher)(student, data)
    assert not calls and set(learning.metrics) == {"transfer"}, "the student's own stream is not needed"
    with torch.no_grad():
        assert set(only("transfer").taught_by(teacher)(student, data).metrics) == {"transfer", "nats", "correct"}
    assert calls == [1]


def test_recomputed_activations_give_the_same_gradients() -> None:
    student, teacher, data = made(1).train(), made(2), batch()
    objective = Distillation(next_token=1.0, hidden=1.0, transfer=1.0).taught_by(teacher)
    plain = objective(student, data).total()
    wanted = gradients(plain, student)
    student.checkpointing = True
    again = objective(student, data).total()
    torch.testing.assert_close(again, plain)
    for a, b in zip(gradients(again, student), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_student() -> None:
    student, teacher, data = made(1, depth=1), made(2, depth=1), batch()
    objective = Distillation(next_token=1.0, transfer=1.0).taught_by(teacher)
    compiled = torch.compile(student, backend="aot_eager")
    same(objective(compiled, data).total(), objective(student, data).total(), student)
    with pytest.raises(SpecError, match="inside a compiled model cannot be read"):
        only("hidden").taught_by(teacher)(compiled, data)


def test_padding_and_packing_pass_through_to_both() -> None:
    """Two documents packed in a row teach exactly what they do in rows of their own."""
    student, teacher = made(1), made(2)
    objective = Distillation(hidden=1.0, transfer=1.0).taught_by(teacher)
    a, b = torch.randint(0, V, (1, 9)), torch.randint(0, V, (1, 6))
    apart = [objective(student, {"tokens": x, "labels": x}).terms for x in (a, b)]
    packed = {
        "tokens": torch.cat([a, b, torch.zeros(1, 3, dtype=torch.long)], 1),
        "labels": torch.cat([a, b, torch.full((1, 3), -100)], 1),
        "segments": torch.tensor([[0] * 9 + [1] * 6 + [-1] * 3]),
    }
    got = objective(student, packed).terms
    for name in ("logits", "hidden", "transfer"):
        same(got[name].sum, apart[0][name].sum + apart[1][name].sum, student)


def test_layers_pair_by_share_of_the_depth() -> None:
    assert evenly(3, 3) == ((0, 0), (1, 1), (2, 2))
    assert evenly(4, 12) == ((0, 2), (1, 5), (2, 8), (3, 11))
    assert evenly(2, 5) == ((0, 2), (1, 4)) and evenly(4, 2) == ((0, 0), (1, 0), (2, 1), (3, 1))


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"logits": 0.0, "next_token": 1.0}, "nothing is learnt from the teacher"),
        ({"logits": 0.0, "hidden": 1.0, "temperature": 2.0}, "temperature has no effect: logits weigh 0"),
        ({"layers": [[0, 0]]}, "layers has no effect: hidden and transfer weigh 0"),
        ({"hidden_distance": "relative"}, "hidden_distance has no effect"),
        ({"hidden": 1.0, "layers": [[0, 0], [0, 1]]}, "each of the student's layers once"),
        ({"hidden": -1.0}, "greater than or equal to 0"),
        ({"tempratur": 2.0}, "did you mean 'temperature'"),
    ],
)
def test_a_spec_that_cannot_be_meant_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Spec.parse("objective", {"kind": "distillation", **fields})


def test_a_teacher_that_does_not_fit_is_refused() -> None:
    student, data = made(1), batch()
    with pytest.raises(SpecError, match="given no teacher"):
        Distillation()(student, data)
    with pytest.raises(SpecError, match="vocabulary has 37 ids and the teacher's 38"):
        Distillation().taught_by(made(2, vocab=38))(student, data)
    wide = made(2, dim=32)
    for term in ("hidden", "transfer"):
        with pytest.raises(BuildError, match="16 wide and the teacher's 32: a projection is needed"):
            only(term).taught_by(wide)(student, data)
    assert Distillation().taught_by(wide)(student, data).total() > 0, "logits need no equal width"
    with pytest.raises(SpecError, match="layer 1 of a student of 2 layers learns from layer 5 of a teacher of 2"):
        only("hidden", layers=[[1, 5]]).taught_by(made(2))(student, data)
    two = made(3, streams=2, blocks={"kind": "reversible"}, head={"kind": "linear"})
    with pytest.raises(BuildError, match="does not run its blocks one by one"):
        only("hidden").taught_by(two)(two, data)
    assert only("transfer").taught_by(student)(two, data).total() > 0, "mixers are fed one by one all the same"
    both = dt.build({"kind": "encoder_decoder", "vocab": V, "dim": C}, dtype=torch.float64)
    pair = data | {"decoder_tokens": data["tokens"]}
    with pytest.raises(BuildError, match="a model of 2 stacks"):
        only("hidden").taught_by(both)(both, pair)
    assert Distillation().taught_by(both)(both, pair).total() == 0


def taught(folder: Path, **train: Any) -> dict[str, Any]:
    """The tiny recipe with every term, and a teacher of its own on disk."""
    data = recipe(folder, **train)
    tokenizer = train_tokenizer(TEXT.split("<sep>"), 300, folder / "teacher")
    spec = data["model"] | {"vocab": tokenizer.vocab_size, "depth": 3}
    dt.save(dt.build(spec, seed=9), folder / "teacher", format="dovetail", tokenizer_from=folder / "teacher")
    terms = {"next_token": 0.5, "hidden": 0.5, "transfer": 0.5, "temperature": 2.0}
    objective = {"kind": "distillation", "teacher": str(folder / "teacher"), **terms}
    return data | {"tokenizer": str(folder / "teacher"), "objective": objective}


def test_a_run_learns_from_a_frozen_teacher_and_resumes_bitwise(tmp_path: Path, monkeypatch: Any) -> None:
    data = taught(tmp_path, save_every=2, ema=0.9, accumulate=2, keep=9)
    before = load_file(tmp_path / "teacher/model.safetensors")
    whole = fit(data | {"out": str(tmp_path / "whole")}, progress=False)
    assert whole.held_out is not None and {"nats", "logits", "hidden", "transfer"} <= set(whole.held_out)
    plain = loop.Run.one_step

    def dies(run: loop.Run) -> Any:
        if run.step == 5:
            raise KeyboardInterrupt
        return plain(run)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Run, "one_step", dies)
        fit(data, progress=False)
    out = tmp_path / "out"
    assert checkpoint.found(out)[-1].name == "step-00000004"
    resumed = fit(data, resume=True, progress=False)
    assert_bitwise(tmp_path / "whole/checkpoints/step-00000006", out / "checkpoints/step-00000006")
    assert (resumed.loss, resumed.held_out) == (whole.loss, whole.held_out)
    names = set(load_file(out / "checkpoints/step-00000006/model.safetensors"))
    assert names == {n for n, _ in dt.load(out / "checkpoints/step-00000006").named_parameters()}
    assert "blocks.2.norm_mixer.weight" in before and "blocks.2.norm_mixer.weight" not in names
    after = load_file(tmp_path / "teacher/model.safetensors")
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_micro_batches_are_the_batch(tmp_path: Path) -> None:
    """Four rows at once or one by one: the same loss and gradient norm of the first step, up to fp32 sums."""
    found = []
    for at, options in enumerate(({"batch": 4}, {"batch": 1, "accumulate": 4})):
        data = taught(tmp_path / str(at), steps=1, clip=0.0, **options)
        data["model"] = data["model"] | {"blocks": {}}  # without dropout, which draws by batch
        fit(data, progress=False)
        found.append(json.loads((Path(data["out"]) / "log.jsonl").read_text().splitlines()[0]))
    for name in ("loss", "grad_norm"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)


def test_a_run_refuses_what_does_not_fit(tmp_path: Path) -> None:
    data = taught(tmp_path)
    with pytest.raises(SpecError, match="distillation without a teacher"):
        fit(data | {"objective": "distillation"}, progress=False)
    train_tokenizer(["def other(words): pass\n" * 50], 300, tmp_path / "other")
    other = dt.build(data["model"] | {"vocab": 300})
    dt.save(other, tmp_path / "other", format="dovetail", tokenizer_from=tmp_path / "other")
    strange = {"kind": "distillation", "teacher": str(tmp_path / "other")}
    with pytest.raises(SpecError, match="the teacher reads text by another tokenizer"):
        fit(data | {"objective": strange}, progress=False)


def test_preflight_counts_the_teacher(tmp_path: Path) -> None:
    data = taught(tmp_path)
    found, alone = preflight(data), preflight(data | {"objective": "next_token"})
    size = 4 * sum(p.numel() for p in dt.load(tmp_path / "teacher").parameters())
    for a, b in zip(found.estimates, alone.estimates, strict=True):
        assert a.each["frozen teacher"] == size and a.total == pytest.approx(b.total + size)
    assert found.fits and found.dry_run is not None and found.dry_run["seconds"] > 0
    screen = Console(file=StringIO(), width=120)
    screen.print(found)
    assert "the objective's teacher, frozen" in screen.file.getvalue()  # type: ignore[attr-defined]
