"""Rotated overlap against shapely and against 60 digits, the published failures of others, and suppression by it."""

from __future__ import annotations

import math

import box_cases
import numpy as np
import pytest
import shapely
import shapely.affinity
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dovetail.geometry as geo
from dovetail.errors import DataError

DEGREE = math.pi / 180
# What others reported of float32 hulls (angles there in degrees or radians), and the value it should be.
PUBLISHED = {
    "detectron2#2154 0.600": (
        [296.6620178222656, 458.73883056640625, 23.515729904174805, 47.677001953125, 0.08795166015625 * DEGREE],
        [296.66201, 458.73882, 23.51573, 47.67702, 0.087951 * DEGREE],
        0.999999,
    ),
    "detectron2#2167 0.585": (
        [2563.7446289, 1436.7901611328125, 2174.703369140625, 214.09500122070312, 115.11834716796875 * DEGREE],
        [2563.7446289, 1436.790283203125, 2174.702880859375, 214.09495544433594, 115.1183547973632812 * DEGREE],
        0.999999,
    ),
    "mmcv#2621 0.333": (*[[0.0, 0.0, 180.6422271729, 136.3633728027, 0.9559648633]] * 2, 1.0),
    "mmcv#2952 -1.2e7": (
        [135.07, 406.72, 7.9445e-7, 1971.1, 1.7708],
        [151.008, 436.2173, 302.0159, 313.7347, 3.1184],
        2.5966449e-9,
    ),
    "mmcv#2952 6.05": (
        [135.07, 406.72, 7.9445e-7, 1.9711e10, 1.7708],
        [151.008, 436.2173, 302.0159, 313.7347, 3.1184],
        2.2283715e-9,
    ),
    "detectron2#4961 0.369": (
        [1010.5, 860.00012207, 12.20655537, 48.82622528, 55.00798035 * DEGREE],
        [1022.0, 870.49993896, 10.81665134, 43.26660919, 56.30992889 * DEGREE],
        0.0,
    ),
    "rotated_maskrcnn#46 0.333": (*[[672.4067, 290.7776, 791.0275, 38.9333, 34.1454 * DEGREE]] * 2, 1.0),
    "RRPN#44 1.35": ([46.83, 44.03, 3.9, 1.63, 0.0], [46.83, 44.03, 1.63, 3.9, 1.45], 0.8548336709),
    "Rotated_IoU#38 0": (*[[0.0, 0.0, 2.0, 2.0, math.pi / 4]] * 2, 1.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_failures(name: str) -> None:
    a, b, value = PUBLISHED[name]
    one, two = torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64)
    exact = box_cases.precise_rotated_iou(a, b)
    assert exact == pytest.approx(value, rel=1e-6, abs=2e-6 if value > 0.9 else 1e-16)
    for first, second in ((one, two), (two, one)):
        assert geo.rotated_iou(first, second).item() == pytest.approx(exact, rel=1e-6, abs=1e-14)
    if a == b:
        assert geo.rotated_iou(one, two).item() == 1.0
    # the same boxes rounded to float32 move by that rounding, no more
    single = geo.rotated_iou(one.float(), two.float()).item()
    assert single == pytest.approx(exact, rel=1e-4, abs=1e-12)


def test_equals_shapely_or_else_60_digits() -> None:
    """Where the two differ by more than 1e-11 exact arithmetic decides: GEOS misses whole overlaps of near-equal boxes."""
    a, b, _ = box_cases.rotated(3000, 1)
    found = geo.rotated_iou(a, b, pairwise=False).numpy()
    assert np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1
    differ = np.flatnonzero(np.abs(found - box_cases.exact_rotated_iou(a, b)) > 1e-11)
    assert len(differ) < 10
    for i in differ:
        assert found[i] == pytest.approx(box_cases.precise_rotated_iou(a[i].tolist(), b[i].tolist()), abs=1e-14)


def test_equals_60_digits() -> None:
    a, b, kinds = box_cases.rotated(150, 2)
    found = geo.rotated_iou(a, b, pairwise=False)
    for i, kind in enumerate(kinds):
        exact = box_cases.precise_rotated_iou(a[i].tolist(), b[i].tolist())
        assert found[i].item() == pytest.approx(exact, abs=1e-13 if kind == "thin" else 1e-14), (kind, a[i], b[i])


number = st.floats(-50, 50)
length = st.one_of(st.just(0.0), st.floats(1e-3, 50))


@settings(max_examples=100, deadline=None)
@given(st.tuples(number, number, length, length, number), st.tuples(number, number, length, length, number), number)
def test_properties(a: tuple[float, ...], b: tuple[float, ...], turn: float) -> None:
    """Symmetric, between 0 and 1, 1 with itself, unchanged by quarter turns with sides swapped and by moving both."""
    one, two = torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64)
    iou = geo.rotated_iou(one, two).item()
    assert 0 <= iou <= 1
    assert geo.rotated_iou(two, one).item() == pytest.approx(iou, abs=1e-9)
    assert geo.rotated_iou(one, one).item() == (1.0 if a[2] * a[3] > 0 else 0.0)
    quarter = one[:, [0, 1, 3, 2, 4]] + torch.tensor([0, 0, 0, 0, math.pi / 2], dtype=torch.float64)
    assert geo.rotated_iou(quarter, two).item() == pytest.approx(iou, abs=1e-9)
    both = [box + torch.tensor([turn, -turn, 0, 0, 0], dtype=torch.float64) for box in (one, two)]
    assert geo.rotated_iou(both[0], both[1]).item() == pytest.approx(iou, abs=1e-9)


def test_axis_aligned_boxes_are_rotated_boxes() -> None:
    a, b, _ = box_cases.boxes(260, 3)
    turned = [torch.cat([geo.convert_boxes(x, "xyxy", "cxcywh"), torch.zeros(260, 1)], 1) for x in (a, b)]
    plain = [geo.convert_boxes(x[:, :4], "cxcywh", "xyxy") for x in turned]
    torch.testing.assert_close(geo.rotated_iou(*turned), geo.box_iou(*plain), rtol=0, atol=1e-9)


def test_gradients() -> None:
    a, b, _ = box_cases.rotated(15 * 40, 4)
    random = slice(0, 15 * 40, 15)
    a, b = a[random], b[random]
    near = geo.rotated_iou(a, b, pairwise=False) > 0.01
    a, b = a[near][:6].requires_grad_(), b[near][:6].requires_grad_()
    assert len(a) == 6
    assert torch.autograd.gradcheck(lambda *x: geo.rotated_iou(*x, pairwise=False), (a, b), atol=1e-6)


def test_gradients_are_finite_everywhere() -> None:
    a, b, _ = box_cases.rotated(600, 5)
    a, b = a.requires_grad_(), b.requires_grad_()
    geo.rotated_iou(a, b, pairwise=False).sum().backward()
    assert a.grad is not None and a.grad.isfinite().all() and b.grad is not None and b.grad.isfinite().all()


def test_corners_there_and_back() -> None:
    boxes, _, _ = box_cases.rotated(600, 6)
    corners = geo.rotated_to_corners(boxes)
    scale = boxes.abs().amax(1)[:, None, None]
    torch.testing.assert_close(corners / scale, torch.from_numpy(box_cases.corners(boxes.numpy())) / scale)
    box = boxes[0].tolist()
    oracle = shapely.affinity.rotate(
        shapely.box(box[0] - box[2] / 2, box[1] - box[3] / 2, box[0] + box[2] / 2, box[1] + box[3] / 2),
        box[4],
        use_radians=True,
    )
    assert shapely.Polygon(corners[0]).symmetric_difference(oracle).area < 1e-9
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        back = geo.corners_to_rotated(corners[:, order])
        again = geo.rotated_to_corners(back)
        apart = (again[:, :, None] - corners[:, None]).square().sum(-1).amin(2).sqrt().amax(1) / scale[:, 0, 0]
        assert apart.max() < 1e-12
    torch.testing.assert_close(geo.corners_to_rotated(corners)[:, :4] / scale[:, 0], boxes[:, :4] / scale[:, 0])


def test_bounds_and_shared_area() -> None:
    a, b, _ = box_cases.rotated(300, 7)
    polygons = shapely.polygons(box_cases.corners(a.numpy()))
    scale = a.abs().amax(1, keepdim=True)
    torch.testing.assert_close(geo.rotated_bounds(a) / scale, torch.from_numpy(shapely.bounds(polygons)) / scale)
    shared = geo.rotated_intersection(a, b, pairwise=False)
    areas = a[:, 2] * a[:, 3], b[:, 2] * b[:, 3]
    iou = geo.rotated_iou(a, b, pairwise=False)
    torch.testing.assert_close(shared, iou * (areas[0] + areas[1]) / (1 + iou), rtol=1e-12, atol=0)


@pytest.mark.parametrize("threshold", [0.0, 0.1973, 0.5137, 0.8719])
@pytest.mark.parametrize("spread", [40.0, 300.0])
def test_nms_keeps_what_the_loop_keeps(threshold: float, spread: float) -> None:
    boxes, scores, classes = box_cases.crowd(160, int(spread), spread)
    for kinds in (None, classes):
        loop = box_cases.greedy_loop(box_cases.shapely_overlap(boxes), scores, threshold, kinds)
        assert geo.rotated_nms(boxes, scores, threshold, classes=kinds).tolist() == loop


def test_nms_in_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, sweeps and rounds give what one block gives."""
    from dovetail.geometry import rotated

    boxes, scores, classes = box_cases.crowd(300, 8, 60.0)
    whole = geo.rotated_nms(boxes, scores, 0.3137, classes=classes)
    for name, value in {"BLOCK": 37, "SWEPT": 50, "PAIRS": 16, "LAZY": 2}.items():
        monkeypatch.setattr(rotated, name, value)
        assert geo.rotated_nms(boxes, scores, 0.3137, classes=classes).tolist() == whole.tolist()


def test_nms_of_a_long_chain() -> None:
    """Each box overlaps the next: every other one stays, which takes as many rounds as there are boxes."""
    boxes = torch.tensor([[i * 0.5, 0.0, 1.0, 1.0, 0.0] for i in range(200)])
    assert geo.rotated_nms(boxes, torch.linspace(1, 0, 200), 0.3).tolist() == list(range(0, 200, 2))
    assert geo.rotated_nms(boxes, torch.ones(200), 1.0).tolist() == list(range(200))  # no IoU exceeds 1; ties in order
    assert geo.rotated_nms(boxes[:0], torch.zeros(0), 0.3).tolist() == []


def test_what_is_refused() -> None:
    good = torch.tensor([[0.0, 0, 1, 1, 0]])
    for bad, message in (
        (torch.zeros(1, 4), r"\(\.\.\., 5\)"),
        (torch.tensor([[0.0, 0, -1, 1, 0]]), "negative size"),
        (torch.tensor([[0.0, 0, 1, 1, float("nan")]]), "not finite"),
    ):
        for call in (geo.rotated_iou, geo.rotated_intersection):
            with pytest.raises(DataError, match=message):
                call(good, bad)
        with pytest.raises(DataError, match=message):
            geo.rotated_nms(bad, torch.ones(1), 0.5)
    with pytest.raises(DataError, match="no rectangle"):
        geo.corners_to_rotated(torch.tensor([[0.0, 0], [1, 0], [1.5, 1], [0, 1]]))
    with pytest.raises(DataError, match="no rectangle"):
        geo.corners_to_rotated(torch.tensor([[0.0, 0], [1, 0], [1, float("nan")], [0, 1]]))
