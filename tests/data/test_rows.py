"""Rows and the sampler: every token once, no label across a seam, and a state that resumes exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.data import Batches, DocumentRows, PackedRows, Sampler, TokenSet
from dovetail.data.rows import IGNORED, collate
from dovetail.errors import DataError
from dovetail.parts.context import Context


def token_set(lengths: list[int]) -> TokenSet:
    """Documents whose ids count up through the whole set, so that a token says where it is from."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenSet(np.arange(offsets[-1], dtype=np.uint16), offsets, {})


def predictions(rows: PackedRows | DocumentRows) -> list[tuple[int, int]]:
    """Every (token, label) pair that is learnt."""
    return [
        (int(t), int(label))
        for i in range(len(rows))
        for t, label in zip(rows[i].tokens, rows[i].labels, strict=True)
        if label != IGNORED
    ]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda x: sum(x) > 1), st.integers(2, 16))
@settings(max_examples=60, deadline=None)
def test_each_token_is_predicted_once_and_never_across_a_seam(lengths: list[int], length: int) -> None:
    tokens = token_set(lengths)
    starts = set(tokens.offsets.tolist())
    wanted = [(i, i + 1) for i in range(len(tokens) - 1) if i + 1 not in starts]
    for rows in (PackedRows(tokens, length), DocumentRows(tokens, length)):
        assert sorted(predictions(rows)) == wanted
        for i in range(len(rows)):
            tokens_, labels, segments = rows[i]
            assert len(tokens_) == len(labels) == len(segments) <= length
            for t, segment in zip(tokens_[segments >= 0], segments[segments >= 0], strict=True):
                document = np.searchsorted(tokens.offsets, t, side="right")
                first = np.searchsorted(tokens.offsets, tokens_[0], side="right")
                assert segment == document - first
    packed = PackedRows(tokens, length)
    read = [int(t) for i in range(len(packed)) for t in packed[i].tokens[packed[i].segments >= 0]]
    assert read == list(range(len(read))) and len(read) >= len(tokens) - 1


def test_documents_without_a_label_have_no_row_of_their_own() -> None:
    rows = DocumentRows(token_set([1, 5, 0, 1, 2]), 4)
    assert [rows[i].tokens.tolist() for i in range(len(rows))] == [[1, 2, 3, 4], [7, 8]]
    assert not len(DocumentRows(token_set([1, 0]), 4))


def test_positions_restart_with_each_document() -> None:
    batch = collate([PackedRows(token_set([5, 4, 20]), 12)[0]])
    ctx = Context.of(1, 12, torch.device("cpu"), segments=batch["segments"])
    assert ctx.positions[0, :, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]


def test_segments_only_where_they_say_something() -> None:
    rows = PackedRows(token_set([24, 5]), 12)
    assert "segments" not in collate([rows[0], rows[1]])
    assert "segments" in collate([rows[0], rows[2]])


def test_ragged_rows_are_padded_on_the_right() -> None:
    rows = DocumentRows(token_set([3, 7]), 16)
    batch = collate([rows[0], rows[1]])
    assert batch["tokens"].shape == (2, 7) and rows.longest() == 1
    assert batch["segments"].tolist() == [[0] * 3 + [-1] * 4, [0] * 7]
    assert batch["labels"][0].tolist() == [1, 2] + [IGNORED] * 5


def test_sampler_sees_every_row_each_epoch_in_a_new_order() -> None:
    sampler = Sampler(10, seed=4)
    epochs = [sampler.take(10) for _ in range(3)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert Sampler(10, seed=4).take(10) == epochs[0] != Sampler(10, seed=5).take(10)


@given(st.integers(1, 9), st.integers(0, 40), st.integers(1, 25))
@settings(max_examples=40, deadline=None)
def test_sampler_resumes_exactly(rows: int, before: int, after: int) -> None:
    whole, cut = Sampler(rows, 1), Sampler(rows, 1)
    expected = whole.take(before + after)
    first = cut.take(before)
    fresh = Sampler(rows, 1)
    fresh.load(cut.state())
    assert first + fresh.take(after) == expected


def test_sampler_refuses_another_corpus() -> None:
    sampler = Sampler(10, 0)
    with pytest.raises(DataError, match="rows=10"):
        Sampler(11, 0).load(sampler.state())
    with pytest.raises(DataError, match="seed=0"):
        Sampler(10, 1).load(sampler.state())
    with pytest.raises(DataError, match="no row"):
        Sampler(0, 0)


def test_batches_follow_the_sampler() -> None:
    rows = PackedRows(token_set([50]), 8)
    batches = Batches(rows, Sampler(len(rows), 0), 3)
    order = Sampler(len(rows), 0).take(6)
    seen = [batches.next()["tokens"] for _ in range(2)]
    assert torch.cat(seen)[:, 0].tolist() == [i * 8 for i in order]
