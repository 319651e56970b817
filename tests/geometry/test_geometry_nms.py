"""Suppression against loops that do what the papers tell, one box at a time."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import box_cases
import pytest
import torch

import dovetail.geometry as geo
from dovetail.errors import DataError, UserError


@pytest.mark.parametrize("threshold", [0.0, 0.2931, 0.5177, 0.9013])
@pytest.mark.parametrize("spread", [30.0, 300.0])
def test_nms_keeps_what_the_loop_keeps(threshold: float, spread: float) -> None:
    boxes, scores, classes = box_cases.crowd(200, int(spread), spread, form="xyxy")
    for kinds in (None, classes):
        loop = box_cases.greedy_loop(box_cases.shapely_overlap(boxes), scores, threshold, kinds)
        assert geo.nms(boxes, scores, threshold, classes=kinds).tolist() == loop


def test_nms_in_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("dovetail.geometry.nms")  # the package's attribute of that name is the function
    boxes, scores, classes = box_cases.crowd(300, 8, 60.0, form="xyxy")
    whole = geo.nms(boxes, scores, 0.3137, classes=classes)
    monkeypatch.setattr(module, "BLOCK", 17)
    monkeypatch.setattr(module, "KEPT", 23)
    assert geo.nms(boxes, scores, 0.3137, classes=classes).tolist() == whole.tolist()


def test_nms_extremes() -> None:
    chain = torch.tensor([[i * 0.5, 0.0, i * 0.5 + 1, 1.0] for i in range(200)])
    assert geo.nms(chain, torch.linspace(1, 0, 200), 0.3).tolist() == list(range(0, 200, 2))
    same = torch.tensor([[0.0, 0, 1, 1]]).expand(9, 4)
    assert geo.nms(same, torch.ones(9), 0.5).tolist() == [0]  # ties: the first given
    assert geo.nms(same, torch.ones(9), 1.0).tolist() == list(range(9))  # no IoU exceeds 1
    assert geo.nms(same, torch.ones(9), 0.5, classes=torch.arange(9)).tolist() == list(range(9))
    assert geo.nms(same[:0], torch.zeros(0), 0.5).tolist() == []
    empty = torch.zeros(4, 4)
    assert geo.nms(empty, torch.ones(4), 0.0).tolist() == [0, 1, 2, 3]  # no area, no overlap


@pytest.mark.parametrize(
    ("given", "decay"),
    [
        ({"sigma": 0.5}, lambda u: math.exp(-u * u / 0.5)),
        ({"iou_threshold": 0.3137}, lambda u: 1 - u if u > 0.3137 else 1.0),
    ],
)
def test_soft_nms_is_the_loop(given: dict[str, float], decay: Callable[[float], float]) -> None:
    boxes, scores, classes = box_cases.crowd(120, 3, 80.0, form="xyxy")
    scores = torch.linspace(0.9, 0.1, 120, dtype=torch.float64)[torch.randperm(120)]  # no ties, which rounding decides
    for kinds in (None, classes):
        index, values = geo.soft_nms(boxes, scores, min_score=0.05, classes=kinds, **given)
        loop = box_cases.soft_loop(boxes, scores, decay, 0.05, kinds)
        assert index.tolist() == [i for i, _ in loop]
        torch.testing.assert_close(values, torch.tensor([s for _, s in loop], dtype=torch.float64), rtol=1e-9, atol=0)
    nothing = geo.soft_nms(boxes[:0], scores[:0], **given)
    assert [len(part) for part in nothing] == [0, 0]


@pytest.mark.parametrize("sigma", [0.5, None])
def test_matrix_nms_is_the_loop(sigma: float | None) -> None:
    rows = []
    for seed in (1, 2):
        boxes, scores, classes = box_cases.crowd(60, seed, 60.0, form="xyxy")
        iou = geo.box_iou(boxes, boxes)
        for kinds in (None, classes):
            found = geo.matrix_nms(iou, scores, sigma=sigma, classes=kinds)
            exact = torch.tensor(box_cases.matrix_loop(iou, scores, sigma, kinds), dtype=torch.float64)
            torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
        rows.append((iou, scores, classes, found))
    batch = [torch.stack(part) for part in zip(*rows)]
    found = geo.matrix_nms(batch[0], batch[1], sigma=sigma, classes=batch[2])
    torch.testing.assert_close(found, batch[3], rtol=0, atol=0)
    assert geo.matrix_nms(torch.zeros(0, 0), torch.zeros(0)).tolist() == []


def test_what_is_refused() -> None:
    box, score = torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1)
    with pytest.raises(UserError, match=r"iou_threshold is 1\.5"):
        geo.nms(box, score, 1.5)
    with pytest.raises(UserError, match="iou_threshold is nan"):
        geo.nms(box, score, float("nan"))
    with pytest.raises(DataError, match="scores must be floating point"):
        geo.nms(box, torch.ones(2), 0.5)
    with pytest.raises(DataError, match="scores must be finite"):
        geo.nms(box, torch.tensor([float("nan")]), 0.5)
    with pytest.raises(DataError, match=r"\(N, 4\)"):
        geo.nms(box[None], score, 0.5)
    with pytest.raises(DataError, match="classes must be whole numbers"):
        geo.nms(box, score, 0.5, classes=torch.ones(1))
    for both in ({}, {"sigma": 0.5, "iou_threshold": 0.5}):
        with pytest.raises(UserError, match="exactly one"):
            geo.soft_nms(box, score, **both)
    with pytest.raises(DataError, match="not negative"):
        geo.soft_nms(box, -score, sigma=0.5)
    with pytest.raises(UserError, match="sigma is 0"):
        geo.matrix_nms(torch.ones(1, 1), score, sigma=0)
    with pytest.raises(DataError, match="do not fit"):
        geo.matrix_nms(torch.ones(1, 2), score)
    with pytest.raises(DataError, match=r"outside \[0, 1\]"):
        geo.matrix_nms(-torch.ones(1, 1), score)
