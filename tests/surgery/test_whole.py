"""Changes of a whole model: norms folded, scales absorbed, heads tied and untied, weights pruned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from surgery_models import DIM, EXACT, gap, gpt2, llama, made, tokens

import dovetail as dt
from dovetail import surgery
from dovetail.errors import SpecError


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("block", [{}, {"kind": "parallel"}, {"kind": "parallel", "shared": True}], ids=str)
def test_folded_layer_norms_are_rms_norms(tied: bool, block: dict[str, Any]) -> None:
    old = gpt2(tied, block)
    done = surgery.fold_norms(old)
    assert {m.exactness for m in done.moves} == {"exact"} and not done.reinitialised and not done.approximated
    assert gap(old, done.model) < EXACT
    kinds = {type(m).__name__ for m in done.model.modules() if "Norm" in type(m).__name__}
    assert "RmsNormModule" in kinds and "LayerNormModule" not in kinds
    table = done.model.embedding.table.weight
    assert float(table.data.mean(-1).abs().max()) < 1e-12, "the stream has no mean"
    assert done.model.spec.head.kind == "linear" and done.model.spec.head.bias
    assert gap(old, surgery.absorb_scales(done.model).model) < EXACT


def test_folding_gives_biases_where_there_were_none() -> None:
    bare = {
        "mixer": {"kind": "attention", "heads": 4, "position": "t5_buckets"},
        "feedforward": {"kind": "glu", "hidden": 20},
    }
    old = gpt2(False, bare, position="none", norm={"kind": "layer", "affine": False})
    done = surgery.fold_norms(old)
    assert gap(old, done.model) < EXACT
    block = done.model.spec.blocks[0]
    assert block.mixer.bias == "qkv" and block.feedforward.bias and not done.model.spec.head.bias
    narrow = surgery.fold_norms(gpt2().to(torch.bfloat16)).model
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}


def test_norms_that_cannot_be_folded_say_why() -> None:
    for changes, why in (
        ({"position": "sinusoidal"}, "has no weights"),
        ({"norm_in": {"kind": "layer"}}, "stack's entry"),
        ({"norm": {"kind": "rms"}}, "where a LayerNorm is expected"),
        ({"block": {"kind": "post"}}, "a 'post' block"),
        ({"block": {"mixer": {"kind": "lstm"}}}, "a 'lstm'"),
    ):
        with pytest.raises(SpecError, match=why):
            surgery.fold_norms(gpt2(**changes))
    with pytest.raises(SpecError, match="only a decoder"):
        surgery.fold_norms(dt.build({"kind": "encoder_decoder", "vocab": 9, "dim": 8}))
    with pytest.raises(SpecError, match="norm 'layer'"):
        surgery.absorb_scales(gpt2())


def test_absorbed_scales_are_ones() -> None:
    gemma = {"kind": "rms", "offset": 1.0, "cast": "after"}
    block = {"mixer": {"kind": "attention", "heads": 4}, "feedforward": {"kind": "glu"}, "norm": gemma}
    for old, last in ((made({"blocks": block, "norm": gemma}), 0.0), (llama(), 1.0)):
        done = surgery.absorb_scales(old)
        assert gap(old, done.model) < EXACT and {m.exactness for m in done.moves} == {"exact"}
        assert all(torch.all(p == last) for n, p in done.model.named_parameters() if "norm" in n)
    tied = surgery.absorb_scales(llama(head={"kind": "ref", "path": "embedding"})).model
    assert not torch.all(tied.norm.weight == 1) and torch.all(tied.blocks[0].norm_mixer.weight == 1)


def test_untying_is_exact_and_tying_goes_back() -> None:
    old = gpt2()
    free = surgery.untie(old)
    assert gap(old, free.model) == 0 and [m.exactness for m in free.moves] == ["exact"]
    assert free.model.head_part.linear.weight is not free.model.embedding.table.weight
    assert gap(old, surgery.tie(free.model).model) == 0, "two equal tables are one again"
    other = llama()
    table, head = other.embedding.table.weight.data, other.head_part.linear.weight.data
    for rows, wanted in (("mean", (table + head) / 2), ("embedding", table), ("head", head)):
        done = surgery.tie(other, rows)  # type: ignore[arg-type]
        torch.testing.assert_close(done.model.embedding.table.weight.data, wanted, rtol=0, atol=1e-12)
        (move,) = done.moves
        assert move.exactness == "approximate" and done.dropped == ["head_part.linear.weight"]
        assert done.approximated == ["embedding.table.weight"]
        assert move.errors["table.weight"] == pytest.approx(float((wanted - table).norm() / table.norm()))
        assert move.errors["head"] == pytest.approx(float((wanted - head).norm() / head.norm()))
    for call, model, why in (
        (surgery.untie, other, "its own already"),
        (surgery.tie, old, "tied already"),
        (lambda m: surgery.tie(m, "both"), other, "rows is 'both'"),
    ):
        with pytest.raises(SpecError, match=why):
            call(model)  # type: ignore[operator]


def test_pruned_heads_are_heads_that_send_nothing() -> None:
    old = llama()
    score = [torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    done = surgery.prune_heads(old, 1, importance=score)
    mixer = done.model.spec.blocks[0].mixer
    assert (mixer.heads, mixer.kv_heads, mixer.head_dim) == (2, 1, 6)
    silent = llama()
    for i, gone in enumerate((0, 1, 0)):
        weight = silent.blocks[i].mixer.out.weight.data
        weight[:, gone * 12 : (gone + 1) * 12] = 0  # a group is two query heads of 6
        before = old.blocks[i].mixer.out.weight.data
        expected = float((weight - before).norm() / before.norm())
        assert done.moves[i].errors["out.weight"] == pytest.approx(expected)
    assert gap(silent, done.model) < EXACT and gap(old, done.model) > 1e-3
    assert set(done.moves[0].errors) == {"qkv.weight", "out.weight"} and done.moves[0].exactness == "approximate"
    assert surgery.prune_heads(gpt2(), 3).model.spec.blocks[0].mixer.heads == 3
    weakest = llama()
    for block in weakest.blocks:
        block.mixer.out.weight.data[:, :12] *= 1e-3
        block.mixer.qkv.weight.data[[*range(12), *range(24, 30), *range(36, 42)]] *= 1e-3
    assert gap(weakest, surgery.prune_heads(weakest, 1).model) < 0.02, "the group of small weights goes"


def test_pruned_neurons_are_neurons_that_send_nothing() -> None:
    for make in (llama, gpt2):
        old, silent = make(), make()
        keep = [sorted({(7 * i + j) % 20 for j in range(13)}) for i in range(3)]
        score = [torch.zeros(20).index_fill(0, torch.tensor(k), 1.0) for k in keep]
        done = surgery.prune_neurons(old, 13, importance=score)
        for i, k in enumerate(keep):
            gone = [j for j in range(20) if j not in k]
            silent.blocks[i].feedforward.down.weight.data[:, gone] = 0
        assert gap(silent, done.model) < EXACT and gap(old, done.model) > 1e-3
        assert done.model.spec.blocks[2].feedforward.hidden == 13
        by_path = surgery.transplant(old, dt.override(old.spec, {"blocks.*.feedforward.hidden": 13})).model
        same = surgery.prune_neurons(old, 13).model
        assert all(torch.equal(a, b) for a, b in zip(by_path.parameters(), same.parameters(), strict=True))


def test_magnitude_pruning_leaves_the_largest() -> None:
    old = llama()
    done = surgery.magnitude_prune(old, 0.4)
    assert done.model.spec == old.spec and len(done.moves) == 3 * 4 == len(done.approximated)
    for move in done.moves:
        before, after = (m.get_submodule(move.path).weight.data for m in (old, done.model))
        zero = after == 0
        assert int(zero.sum()) == round(0.4 * before.numel()) == move.count
        assert torch.equal(after[~zero], before[~zero]) and before[zero].abs().max() <= before[~zero].abs().min()
        assert move.errors["weight"] == pytest.approx(float((after - before).norm() / before.norm()))
        x = torch.randn(50, before.shape[1], dtype=before.dtype)
        sent = (x @ (after - before).T).norm(dim=-1)
        assert torch.all(sent <= move.errors["weight"] * before.norm() * x.norm(dim=-1)), "the bound holds"
    assert torch.equal(done.model.head_part.linear.weight, old.head_part.linear.weight)
    sparse = surgery.magnitude_prune(old, (2, 4), within="blocks.1")
    assert {m.path.split(".")[1] for m in sparse.moves} == {"1"}
    groups = sparse.model.blocks[1].mixer.out.weight.data.unflatten(1, (-1, 4))
    whole = old.blocks[1].mixer.out.weight.data.unflatten(1, (-1, 4))
    assert torch.all((groups != 0).sum(-1) == 2)
    torch.testing.assert_close(groups.abs().sum(-1), whole.abs().topk(2, -1).values.sum(-1))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: surgery.prune_heads(llama(), 3), "kv_heads is 3"),
        (lambda: surgery.prune_heads(llama(), 1, importance=[torch.ones(2)]), "1 layers for a model of 3"),
        (lambda: surgery.prune_heads(llama(), 1, importance=[torch.ones(4)] * 3), "shape"),
        (lambda: surgery.prune_heads(made({"blocks": {"mixer": "lstm"}}), 1), "'lstm' has no heads"),
        (
            lambda: surgery.prune_heads(
                gpt2(block={"mixer": {"kind": "attention", "heads": 4, "position": "t5_buckets"}}), 2
            ),
            "position 't5_buckets' holds something for each head",
        ),
        (lambda: surgery.prune_neurons(llama(), 21), "hidden is 21"),
        (lambda: surgery.prune_neurons(made({"blocks": {"feedforward": None}}), 2), "no neurons"),
        (
            lambda: surgery.absorb_scales(
                made({"blocks": {"mixer": {"kind": "attention", "position": "deberta"}, "norm": {"kind": "rms"}}})
            ),
            "through the mixer's own maps",
        ),
        (lambda: surgery.magnitude_prune(llama(), 1.5), "a share of 1.5"),
        (lambda: surgery.magnitude_prune(llama(), (4, 4)), "4 of every 4"),
        (lambda: surgery.magnitude_prune(llama(), (2, 7)), "no multiple of 7"),
        (lambda: surgery.magnitude_prune(llama(), 0.5, within="blockss"), "no linear map"),
    ],
)
def test_refusals(call: Any, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        call()


def test_a_pruned_model_decodes_and_trains() -> None:
    model = surgery.prune_heads(llama(), 1).model
    loss = model(tokens()).logits.logsumexp(-1).mean()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        state = model.new_state(2, 16)
        steps = [model(part, state=state).logits for part in tokens().split([6, 1, 9], 1)]
        torch.testing.assert_close(torch.cat(steps, 1), model(tokens()).logits, rtol=0, atol=1e-9)
    assert model.blocks[0].mixer.out.weight.shape == (DIM, 12)
