"""IoU and its relatives against shapely and the formulas, their gradients, conversions, and what is refused."""

from __future__ import annotations

import box_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dovetail.geometry as geo
from dovetail.errors import DataError, UserError

MEASURES = ("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou")


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_measures_equal_the_oracle(name: str, dtype: torch.dtype) -> None:
    a, b, _ = box_cases.boxes(3000, 1)
    a, b = a.to(dtype), b.to(dtype)
    found = getattr(geo, name)(a, b, pairwise=False)
    assert found.dtype == dtype
    exact = torch.from_numpy(box_cases.exact_box_measures(a.double(), b.double())[name])
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=64 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", MEASURES)
def test_all_pairs_are_the_pairs(name: str) -> None:
    a, b, _ = box_cases.boxes(26, 2)
    measure = getattr(geo, name)
    every = measure(a.view(2, 13, 4), b.view(2, 13, 4)[:, :5])
    assert every.shape == (2, 13, 5)
    for i in range(2):
        one, two = a.view(2, 13, 4)[i], b.view(2, 13, 4)[i, :5]
        torch.testing.assert_close(every[i], measure(one[:, None], two[None], pairwise=False), rtol=0, atol=1e-15)
    assert measure(a[:0], b).shape == (0, 26)


@pytest.mark.parametrize("name", MEASURES)
def test_gradients(name: str) -> None:
    """Against finite differences; CIoU's against DIoU's and v's, its α being a constant."""
    torch.manual_seed(3)
    low = torch.rand(8, 2, dtype=torch.float64) * 4
    a = torch.cat([low, low + 1 + torch.rand(8, 2)], 1).requires_grad_()
    b = (a.detach() + torch.rand(8, 4) * 0.7).requires_grad_()
    if name != "complete_box_iou":
        assert torch.autograd.gradcheck(lambda *x: getattr(geo, name)(*x, pairwise=False), (a, b))
        return

    def aspect(x: torch.Tensor) -> torch.Tensor:
        return torch.atan((x[:, 2] - x[:, 0]) / (x[:, 3] - x[:, 1]))

    v = 4 / torch.pi**2 * (aspect(b) - aspect(a)) ** 2
    alpha = (v / (1 - geo.box_iou(a, b, pairwise=False) + v)).detach()
    written = geo.distance_box_iou(a, b, pairwise=False) - alpha * v
    found = geo.complete_box_iou(a, b, pairwise=False)
    torch.testing.assert_close(found, written, rtol=0, atol=1e-14)
    for ours, theirs in zip(torch.autograd.grad(found.sum(), (a, b)), torch.autograd.grad(written.sum(), (a, b))):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", MEASURES)
def test_gradients_are_finite_everywhere(name: str) -> None:
    a, b, _ = box_cases.boxes(1300, 4)
    a, b = a.requires_grad_(), b.requires_grad_()
    getattr(geo, name)(a, b, pairwise=False).sum().backward()
    assert a.grad is not None and a.grad.isfinite().all() and b.grad is not None and b.grad.isfinite().all()


def test_known_values() -> None:
    a, b = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 1, 3, 3]])
    assert geo.box_iou(a, b).item() == pytest.approx(1 / 7)
    assert geo.generalized_box_iou(a, b).item() == pytest.approx(1 / 7 - 2 / 9)
    assert geo.distance_box_iou(a, b).item() == pytest.approx(1 / 7 - 2 / 18)
    assert geo.complete_box_iou(a, b).item() == pytest.approx(1 / 7 - 2 / 18)
    assert geo.box_area(a).tolist() == [4.0]
    point = torch.zeros(1, 4)
    assert [getattr(geo, name)(point, point).item() for name in MEASURES] == [0.0] * 4


def test_dtypes() -> None:
    box = [[0, 0, 3, 2]]
    assert geo.box_iou(torch.tensor(box), torch.tensor(box)).dtype == torch.float64
    for half in (torch.float16, torch.bfloat16):
        assert geo.box_iou(torch.tensor(box, dtype=half), torch.tensor(box, dtype=half)).dtype == torch.float32
    # 2^53 + 1 has no float32: the difference of whole numbers survives
    wide = torch.tensor([[2**24, 0, 2**24 + 1, 1]])
    assert geo.box_area(wide).item() == 1.0


FORMATS = ("xyxy", "xywh", "cxcywh")
size = st.floats(0, 1e4, allow_subnormal=False)
place = st.floats(-1e4, 1e4, allow_subnormal=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(place, place, size, size), min_size=1, max_size=4), st.permutations(FORMATS))
def test_conversions_go_around(rows: list[tuple[float, ...]], order: list[str]) -> None:
    boxes = torch.tensor(rows, dtype=torch.float64)
    there = geo.convert_boxes(boxes, "xywh", order[0])  # pyright: ignore[reportArgumentType]
    for source, target in zip(order, [*order[1:], "xywh"]):
        if source == "xyxy":  # rounding may turn an empty box over
            there[:, 2:] = torch.maximum(there[:, 2:], there[:, :2])
        there = geo.convert_boxes(there, source, target)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(there, boxes, rtol=0, atol=1e-11)


def test_conversion_values() -> None:
    box = torch.tensor([1.0, 2, 4, 8])
    assert geo.convert_boxes(box, "xyxy", "xywh").tolist() == [1, 2, 3, 6]
    assert geo.convert_boxes(box, "xyxy", "cxcywh").tolist() == [2.5, 5, 3, 6]
    assert geo.convert_boxes(torch.tensor([2.5, 5, 3, 6]), "cxcywh", "xyxy").tolist() == [1, 2, 4, 8]
    assert geo.convert_boxes(torch.tensor([1, 2, 3, 6]), "xywh", "xyxy").tolist() == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (torch.zeros(3, 5), r"shape \(\.\.\., 4\), not \(3, 5\)"),
        (torch.tensor([[0.0, 0, 1, 1], [3.0, 0, 1, 1]]), "box 1 has a negative size"),
        (torch.tensor([[0.0, 0, 1, float("nan")]]), "box 0 is not finite"),
        (torch.tensor([[0.0, 0, 1, float("inf")]]), "box 0 is not finite"),
        (torch.tensor([[0.0, 0, 1e30, 1e30]]), "overflows"),
        (torch.zeros(1, 4, dtype=torch.bool), "cannot be torch.bool"),
        ([[0, 0, 1, 1]], "not list"),
    ],
)
def test_bad_boxes_are_refused(boxes: torch.Tensor, message: str) -> None:
    good = torch.tensor([[0.0, 0, 1, 1]])
    with pytest.raises(DataError, match=message) as error:
        geo.box_iou(good, boxes)
    assert error.value.where == "box_iou, b" and error.value.remedy


def test_bad_calls_are_refused() -> None:
    one = torch.tensor([0.0, 0, 1, 1])
    with pytest.raises(DataError, match="pairwise needs"):
        geo.box_iou(one, one[None])
    with pytest.raises(DataError, match="do not fit"):
        geo.box_iou(one.expand(2, 3, 4), one.expand(5, 3, 4))
    with pytest.raises(UserError, match="unknown box format 'xyhw'"):
        geo.convert_boxes(one, "xyhw", "xyxy")  # pyright: ignore[reportArgumentType]


def test_compiles_whole() -> None:
    a, b, _ = box_cases.boxes(26, 5)
    compiled = torch.compile(geo.generalized_box_iou, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b), geo.generalized_box_iou(a, b), rtol=0, atol=0)
