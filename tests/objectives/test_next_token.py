"""The chunked cross-entropy against torch's, values and gradients; sums and counts over ragged micro-batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dovetail as dt
from dovetail.errors import DataError, SpecError
from dovetail.kernels.linear.accumulate import add_product
from dovetail.objectives import next_token
from dovetail.objectives.next_token import NextToken, cross_entropy, through_head
from dovetail.spec import Spec
from oracles import oracle_for

V = 37


def tiny(tied: bool = True, **more: Any) -> Any:
    head = {"kind": "ref", "path": "embedding"} if tied else {"kind": "linear", "bias": True}
    return dt.build({"kind": "decoder", "vocab": V, "dim": 16, "depth": 2, "head": head} | more, seed=3).train()


def plain(h: torch.Tensor, head: Any, labels: torch.Tensor, smoothing: float, z: float) -> torch.Tensor:
    """The definition, by torch's own cross-entropy over all logits at once."""
    logits = head(h).to(torch.float64 if h.dtype == torch.float64 else torch.float32)
    loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum", label_smoothing=smoothing)
    return loss + z * torch.logsumexp(logits[labels != -100], -1).square().sum()


@oracle_for("objective", "next_token")
@pytest.mark.parametrize("smoothing, z", [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_cross_entropy_in_chunks(monkeypatch: Any, smoothing: float, z: float, bias: bool) -> None:
    monkeypatch.setitem(next_token._CHUNK, "cpu", 70 * V)  # 200 rows: two whole chunks and a rest
    head = nn.Linear(16, V, bias=bias).double()
    h = torch.randn(200, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, V, (200,)).masked_fill(torch.rand(200) < 0.3, -100)
    inputs = [h, *head.parameters()]
    expected = plain(h, head, labels, smoothing, z)
    wanted = torch.autograd.grad(expected / 7, inputs)
    total, nats, hits = cross_entropy(head, h, labels, smoothing, z)
    got = torch.autograd.grad(total / 7, inputs)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(nats, plain(h, head, labels, 0.0, 0.0).detach())
    assert int(hits) == int(((head(h).argmax(-1) == labels) & (labels != -100)).sum())
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tied", [True, False])
def test_model_gradients_equal_the_plain_twin(monkeypatch: Any, tied: bool) -> None:
    """Through a whole model in fp32, a tied table getting both its shares."""
    monkeypatch.setitem(next_token._CHUNK, "cpu", 64 * V)
    model = tiny(tied)
    tokens, labels = torch.randint(0, V, (3, 50)), torch.randint(0, V, (3, 50))
    labels[0, :20] = -100
    out = F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    wanted = torch.autograd.grad(out, list(model.parameters()))
    loss = NextToken()(model, {"tokens": tokens, "labels": labels})
    torch.testing.assert_close(loss.terms["next_token"].sum, out)
    assert int(loss.terms["next_token"].count) == 130 == NextToken().counts({"labels": labels})["next_token"]
    for a, b in zip(torch.autograd.grad(loss.terms["next_token"].sum, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_follows_whatever_the_head_is() -> None:
    """An adapted, partly frozen head: only what takes gradients gets them, and nothing is bypassed."""
    base, down, up = nn.Linear(16, V), nn.Linear(16, 4, bias=False), nn.Linear(4, V, bias=False)
    base.requires_grad_(False)

    def head(h: torch.Tensor) -> torch.Tensor:
        return base(h) + up(down(h))

    h, labels = torch.randn(90, 16, requires_grad=True), torch.randint(0, V, (90,))
    inputs = [h, down.weight, up.weight]
    wanted = torch.autograd.grad(plain(h, head, labels, 0.0, 0.0), inputs)
    got = torch.autograd.grad(cross_entropy(head, h, labels)[0], inputs)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bf16_gradients_stay_near_fp32() -> None:
    head, labels = nn.Linear(32, 101, bias=False), torch.randint(0, 101, (300,))
    h = torch.randn(300, 32, requires_grad=True)
    exact, *_ = cross_entropy(head, h, labels)
    wanted = torch.autograd.grad(exact, [h, head.weight])
    with torch.autocast("cpu", torch.bfloat16):
        rough, *_ = cross_entropy(head, h, labels)
    got = torch.autograd.grad(rough, [h, head.weight])
    assert abs(rough.item() - exact.item()) < 2e-3 * exact.item()
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 2e-2 * b.norm()


def test_never_holds_all_logits() -> None:
    """The widest tensor that saving for the backward keeps is far below (N, V)."""
    head, h = nn.Linear(8, 5000, bias=False), torch.randn(4000, 8, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        total, *_ = cross_entropy(head, h, torch.randint(0, 5000, (4000,)))
    assert max(kept) <= next_token._CHUNK["cpu"] < h.shape[0] * 5000
    assert total.requires_grad


@pytest.mark.parametrize("chunks", [1, 5])
def test_the_heads_gradient_is_as_wide_as_it_must_be(monkeypatch: Any, chunks: int) -> None:
    """A bf16 head: several chunks add up in fp32 and are rounded once, one chunk has no fp32 copy."""
    monkeypatch.setitem(next_token._CHUNK, "cpu", 640 // chunks * 101)
    head, labels = nn.Linear(32, 101, bias=False).bfloat16(), torch.randint(0, 101, (640,))
    h = torch.randn(640, 32).bfloat16().requires_grad_()
    kept: list[torch.dtype] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        total, *_ = cross_entropy(head, h, labels)
    found = torch.autograd.grad(total / 640, [h, head.weight])
    assert (torch.float32 in kept) == (chunks > 1)
    wide = nn.Linear(32, 101, bias=False)
    wide.load_state_dict(head.float().state_dict())
    x = h.detach().float().requires_grad_()
    wanted = torch.autograd.grad(F.cross_entropy(wide(x), labels), [x, wide.weight])
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.bfloat16 and (a.float() - b).norm() < 1e-2 * b.norm()


def test_without_gradients_nothing_is_differentiated() -> None:
    head = nn.Linear(8, 50)
    with torch.no_grad():
        total, nats, _ = cross_entropy(head, torch.randn(70, 8), torch.randint(0, 50, (70,)))
    assert not total.requires_grad and torch.equal(total, nats)


def test_all_ignored_gives_zero_and_no_gradient() -> None:
    head, h = nn.Linear(8, 50), torch.randn(70, 8, requires_grad=True)
    total, *_ = cross_entropy(head, h, torch.full((70,), -100))
    total.backward()
    assert total.item() == 0.0 and h.grad is not None and not h.grad.any()


def test_padding_and_packing_pass_through_to_the_model() -> None:
    """Two documents packed in a row lose and learn exactly what they do in rows of their own."""
    model = tiny()
    a, b = torch.randint(0, V, (1, 9)), torch.randint(0, V, (1, 6))
    label = lambda x: torch.cat([x[:, 1:], torch.full((1, 1), -100)], 1)  # noqa: E731
    apart = [NextToken()(model, {"tokens": x, "labels": label(x)}).terms["next_token"].sum for x in (a, b)]
    wanted = torch.autograd.grad(apart[0] + apart[1], list(model.parameters()))
    segments = torch.tensor([[0] * 9 + [1] * 6 + [-1] * 3])
    pad = torch.zeros(1, 3, dtype=torch.long)
    batch = {
        "tokens": torch.cat([a, b, pad], 1),
        "labels": torch.cat([label(a), label(b), pad - 100], 1),
        "segments": segments,
    }
    packed = NextToken()(model, batch).terms["next_token"]
    torch.testing.assert_close(packed.sum, apart[0] + apart[1])
    assert int(packed.count) == 13
    for x, y in zip(torch.autograd.grad(packed.sum, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_encoder_decoder_batches() -> None:
    """decoder_tokens go to the model by name; labels stand beside the decoder's positions."""
    seen: dict[str, Any] = {}

    class Both(nn.Module):
        head = nn.Linear(8, V)

        def forward(self, tokens: Any, decoder_tokens: Any = None, *, logits: bool = True) -> Any:
            seen.update(tokens=tokens.shape, decoder=decoder_tokens.shape, logits=logits)
            return SimpleNamespace(last_hidden_state=torch.randn(*decoder_tokens.shape, 8), aux={})

    batch = {"tokens": torch.zeros(2, 9), "decoder_tokens": torch.zeros(2, 5), "labels": torch.zeros(2, 5).long()}
    loss = NextToken()(Both(), batch)
    assert seen == {"tokens": (2, 9), "decoder": (2, 5), "logits": False} and int(loss.terms["next_token"].count) == 10
    with pytest.raises(DataError, match="do not stand beside"):
        NextToken()(Both(), batch | {"labels": torch.zeros(2, 4).long()})


def test_total_divides_by_global_counts() -> None:
    model = tiny()
    tokens = torch.randint(0, V, (2, 8))
    loss = NextToken()(model, {"tokens": tokens, "labels": tokens})
    torch.testing.assert_close(loss.total(), loss.terms["next_token"].sum / 16)
    torch.testing.assert_close(loss.total({"next_token": 64}), loss.terms["next_token"].sum / 64)


def test_spec_is_strict() -> None:
    assert Spec.parse("objective", "next_token") == NextToken()
    with pytest.raises(SpecError, match="smoothing"):
        Spec.parse("objective", {"kind": "next_token", "smothing": 0.1})


def test_a_frozen_head_over_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under an adapter nothing of the head learns: hidden states still get their gradient, chunk after chunk."""
    from dovetail.objectives import next_token

    monkeypatch.setattr(next_token, "_CHUNK", {"cpu": 64, "cuda": 64})
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 20, bias=False).double().requires_grad_(False)
    h, labels = torch.randn(200, 8, dtype=torch.float64, requires_grad=True), torch.randint(0, 20, (200,))
    total = next_token.cross_entropy(head, h, labels)[0]
    wanted = torch.nn.functional.cross_entropy(head(h), labels, reduction="sum")
    ours, theirs = (torch.autograd.grad(loss, h)[0] for loss in (total, wanted))
    assert torch.allclose(total, wanted) and torch.allclose(ours, theirs, atol=1e-12)


class Tied(nn.Module):
    """Ids to vectors and back by the same rows."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.table = nn.Embedding(23, 8, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.table.weight)


@pytest.mark.parametrize("head", ["untied", "tied", "adapted", "bias", "scaled before"])
def test_products_add_up_a_plain_heads_gradient(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp64, several chunks: by products where the head is one, as autograd goes elsewhere; the same either way."""
    monkeypatch.setitem(next_token._CHUNK, "cpu", 64 * 23)
    added: list[Any] = []
    monkeypatch.setattr(next_token, "add_product", lambda *a: added.append(a) or add_product(*a))
    base = Tied(torch.float64) if head == "tied" else nn.Linear(8, 23, bias=head == "bias").double()
    low = nn.Linear(8, 23, bias=False).double()
    heads = {"adapted": lambda x: base(x) + low(x), "scaled before": lambda x: base(2 * x)}
    run, learn = heads.get(head, base), [*base.parameters(), *(low.parameters() if head == "adapted" else [])]
    ids, labels = torch.randint(0, 23, (150,)), torch.randint(0, 23, (150,))
    h = base.table(ids) if isinstance(base, Tied) else torch.randn(150, 8, dtype=torch.float64)
    found = torch.autograd.grad(cross_entropy(run, h, labels)[0], learn)
    h = base.table(ids) if isinstance(base, Tied) else h
    wanted = torch.autograd.grad(F.cross_entropy(run(h), labels, reduction="sum"), learn)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert len(added) == (3 if head in ("untied", "tied") else 0)


def test_an_autocast_heads_gradient_is_added_up_unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casts do not keep a head from being a product: its fp32 weight's gradient is of the 16-bit factors."""
    monkeypatch.setitem(next_token._CHUNK, "cpu", 64 * 23)
    added: list[Any] = []
    monkeypatch.setattr(next_token, "add_product", lambda *a: added.append(a) or add_product(*a))
    head, h, labels = nn.Linear(8, 23, bias=False), torch.randn(150, 8), torch.randint(0, 23, (150,))
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(cross_entropy(head, h, labels)[0], head.weight)
    (wanted,) = torch.autograd.grad(F.cross_entropy(head(h), labels, reduction="sum"), head.weight)
    assert [x.dtype for _, x, *_ in added] == [torch.bfloat16] * 3 and found.dtype == torch.float32
    assert (found - wanted).norm() < 1e-2 * wanted.norm()


def test_any_loss_goes_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """`through_head` alone knows of products, whatever is computed from the logits."""
    monkeypatch.setitem(next_token._CHUNK, "cpu", 64 * 23)
    head, h = nn.Linear(8, 23, bias=False).double(), torch.randn(150, 8, dtype=torch.float64, requires_grad=True)
    total = through_head(head, h, lambda y, rows: (y.square().sum()[None], 2 * y))[0]
    found = torch.autograd.grad(total, [h, head.weight])
    for a, b in zip(found, torch.autograd.grad(head(h).square().sum(), [h, head.weight]), strict=True):
        torch.testing.assert_close(a, b)
