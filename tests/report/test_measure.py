"""Losses and divergences against brute force; every question asked once, with the context it is promised."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dovetail as dt
from dovetail import report
from dovetail.errors import DataError, RunError
from dovetail.report.measure import by_position, divergence, layer_errors, quality, rows_of, spans, token_nats
from dovetail.report.text import recut, rows_within


def rows(count: int, length: int, vocab: int = 280) -> torch.Tensor:
    return torch.randint(vocab, (count, length))


def test_token_nats_is_the_cross_entropy_of_the_logits(model: Any) -> None:
    x = rows(5, 21)
    with torch.no_grad():
        logits = model(x[:, :-1]).logits
    wanted = torch.nn.functional.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none")
    torch.testing.assert_close(token_nats(model, x), wanted, rtol=1e-5, atol=1e-5)


def test_windows_of_stride_one_show_exactly_the_last_tokens(model: Any) -> None:
    x, see = rows(2, 20), 6
    got = token_nats(model, x, see=see, stride=1)
    for row in range(2):
        for question in range(19):
            past = x[row : row + 1, max(0, question + 1 - see) : question + 1]
            with torch.no_grad():
                wanted = -model(past).logits[0, -1].log_softmax(-1)[x[row, question + 1]]
            torch.testing.assert_close(got[row, question], wanted, rtol=1e-4, atol=1e-4)


@given(st.integers(1, 90), st.integers(1, 40), st.data())
def test_spans_ask_every_question_once_and_keep_their_promise(questions: int, see: int, data: st.DataObject) -> None:
    window = min(see, questions)
    stride = data.draw(st.integers(1, window))
    asked: list[int] = []
    for begin, first in spans(questions, see, stride):
        assert begin >= 0 and begin + window <= questions
        asked += range(first, begin + window)
        if begin:
            assert first - begin + 1 >= window - stride + 1  # tokens that its first question sees
    assert asked == list(range(questions))


def test_the_first_window_asks_all_its_questions() -> None:
    assert spans(10, 4, 2) == [(0, 0), (2, 4), (4, 6), (6, 8)]
    assert spans(3, 4, None) == [(0, 0)]
    with pytest.raises(DataError, match="stride of 5"):
        spans(10, 4, 5)


def test_windows_leave_the_first_window_as_it_is_and_change_what_comes_after(model: Any) -> None:
    x = rows(3, 41)
    whole, cut = token_nats(model, x), token_nats(model, x, see=10)
    torch.testing.assert_close(whole[:, :10], cut[:, :10], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole[:, 10:], cut[:, 10:], atol=1e-4)


def test_divergence_is_the_kl_of_the_reference_from_the_model(model: Any) -> None:
    other = dt.build(model.spec, seed=5)
    x = rows(4, 17)
    with torch.no_grad():
        p, q = (m.double()(x).logits.log_softmax(-1) for m in (model, other))
    wanted = float((q.exp() * (q - p)).sum(-1).mean())
    assert divergence(model.float(), other.float(), x) == pytest.approx(wanted, rel=1e-4)
    assert divergence(model, model, x) == pytest.approx(0.0, abs=1e-6)


def test_buckets_weigh_to_the_mean_and_the_mode_is_put_back(model: Any) -> None:
    model.train()
    nats = token_nats(model, rows(4, 30))
    assert model.training
    found = quality(nats, buckets=7)
    assert found.nats == pytest.approx(float(nats.double().mean()))
    assert sum(b.nats * b.count for b in found.by_position) / found.tokens == pytest.approx(found.nats)
    assert found.error == pytest.approx(float(nats.double().mean(1).std()) / 2)
    assert [b.start for b in by_position(nats, 1000)] == list(range(29))


def test_shorter_rows_ask_the_same_questions() -> None:
    documents = [torch.arange(0, 400), torch.arange(1000, 1050), torch.arange(2000, 2500)]
    long = rows_within(documents, 80, 80 * 6)
    short = recut(long, 20)
    assert long.shape == (6, 81) and short.shape == (24, 21)
    assert sorted(long[:, 1:].flatten().tolist()) == sorted(short[:, 1:].flatten().tolist())
    assert bool((long.diff(dim=1) == 1).all()), "no row runs across two documents"
    with pytest.raises(DataError, match="the longest has 500"):
        rows_within(documents, 500, 10)
    with pytest.raises(DataError, match="do not fill"):
        rows_of(torch.arange(5), 5)


def test_bad_rows_are_refused(model: Any) -> None:
    with pytest.raises(DataError, match="outside the model's vocabulary"):
        token_nats(model, torch.full((1, 4), 280))
    with pytest.raises(DataError, match="shape"):
        token_nats(model, torch.zeros(4, 1, dtype=torch.long))
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="not finite"):
        token_nats(model, rows(1, 5))


def test_the_files_of_the_room_import_each_other_in_one_order() -> None:
    """No circle, those among imports for type checkers alone included."""
    folder = Path(report.__file__).parent
    graph: dict[str, set[str]] = {}
    for path in folder.glob("[a-z]*.py"):
        found = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.module]
        inside = [n for n in found if str(n.module).startswith("dovetail.report")]
        graph[path.stem] = {str(n.module).split(".")[2] for n in inside if n.module != "dovetail.report"}
        graph[path.stem] |= {a.name for n in inside if n.module == "dovetail.report" for a in n.names}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("results") < order.index("compare") and set(order) == set(graph)


def test_hidden_states_layer_by_layer(model: Any) -> None:
    """Zero against itself; against another the formula, token by token; left out with a reason where depths differ."""
    tokens = rows(3, 8)
    assert layer_errors(model, model, tokens).errors == (0.0,) * len(model.blocks)
    other = dt.build(model.spec, seed=1).eval()
    states: dict[Any, list[torch.Tensor]] = {model: [], other: []}
    for one, kept in states.items():
        hooks = [b.register_forward_hook(lambda m, i, o, kept=kept: kept.append(o.double())) for b in one.blocks]
        with torch.no_grad():
            one(tokens)
        for hook in hooks:
            hook.remove()
    wanted = [((h - r).norm(dim=-1) / r.norm(dim=-1)).mean().item() for h, r in zip(states[other], states[model])]
    found = layer_errors(other, model, tokens)
    assert found.errors == pytest.approx(wanted, rel=1e-4) and found.errors[found.worst] == max(found.errors)
    deeper = dt.build(model.spec.replace(depth=model.spec.depth + 1, blocks=model.spec.blocks[:1])).eval()
    assert not layer_errors(deeper, model, tokens).errors and "blocks here" in layer_errors(deeper, model, tokens).why
