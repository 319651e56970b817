"""Axis-aligned boxes: conversions, and IoU with its generalised, distance and complete forms.

Boxes are (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2, in any one unit (pixels, or shares of the image); a box covers
(x2 - x1) · (y2 - y1), without the "+ 1" of boxes counted in whole pixels. float32 and float64 keep their dtype,
float16 and bfloat16 are computed and returned in float32, integers in float64. All is differentiable. What the values
must be (finite, no negative size) is checked, which waits for a GPU once; inside torch.compile only shapes are.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from dovetail.errors import DataError, UserError, did_you_mean

BoxFormat = Literal["xyxy", "xywh", "cxcywh"]
_FIELDS = {"xyxy": "x1, y1, x2, y2", "xywh": "x1, y1, w, h", "cxcywh": "cx, cy, w, h", "rotated": "cx, cy, w, h, angle"}


def convert_boxes(boxes: Tensor, source: BoxFormat, target: BoxFormat) -> Tensor:
    """(..., 4) boxes from one format to another: "xyxy" (x1, y1, x2, y2), "xywh" (x1, y1, w, h), "cxcywh" (centre, size).

    Raises UserError for an unknown format, DataError for a wrong shape, a negative size, NaN or infinity.
    Tolerance: a few roundings of the dtype. Source: the formats of Pascal VOC, COCO and DETR.
    """
    for name in (source, target):
        if name not in get_args(BoxFormat):
            raise UserError(
                f"unknown box format {name!r}",
                where="convert_boxes",
                remedy=did_you_mean(str(name), get_args(BoxFormat)),
            )
    boxes = checked_boxes(boxes, source, "convert_boxes")
    first, second = boxes[..., :2], boxes[..., 2:]
    if source == target:
        return boxes
    if source == "xyxy":
        low, size = first, second - first
    elif source == "xywh":
        low, size = first, second
    else:
        low, size = first - second / 2, second
    if target == "xyxy":
        return torch.cat([low, second if source == "xyxy" else low + size], -1)
    return torch.cat([low if target == "xywh" else low + size / 2, size], -1)


def box_area(boxes: Tensor) -> Tensor:
    """Area of (..., 4) xyxy boxes -> (...), in squared units. Raises DataError as `box_iou` does."""
    return _area(checked_boxes(boxes, "xyxy", "box_area"))


def box_iou(a: Tensor, b: Tensor, *, pairwise: bool = True) -> Tensor:
    """Intersection over union of xyxy boxes, in [0, 1]; 0 where both boxes are empty.

    pairwise: a (..., N, 4) and b (..., M, 4) -> (..., N, M), leading dimensions broadcast;
    else a (..., 4) and b (..., 4), broadcast against each other -> (...).

    Raises DataError for a wrong shape, x2 < x1, y2 < y1, NaN, infinity, or coordinates whose area overflows the dtype.
    Tolerance: 8 eps of the dtype, wherever the boxes lie.
    Source: Jaccard 1912; Everingham et al. 2010, section 4.2.
    """
    return _iou(*_paired(a, b, pairwise, "box_iou"))


def generalized_box_iou(a: Tensor, b: Tensor, *, pairwise: bool = True) -> Tensor:
    """GIoU = IoU - (C - union) / C in [-1, 1], C the area of the smallest box around both; shapes, errors of `box_iou`.

    Where C is 0 (both boxes in one line) nothing is subtracted. Tolerance: 16 eps. Source: Rezatofighi et al. 2019, algorithm 1.
    """
    a, b = _paired(a, b, pairwise, "generalized_box_iou")
    inter, union = _overlap(a, b)
    extent = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).unbind(-1)
    around = extent[0] * extent[1]
    return _ratio(inter, union) - _ratio(around - union, around).clamp(min=0)


def distance_box_iou(a: Tensor, b: Tensor, *, pairwise: bool = True) -> Tensor:
    """DIoU = IoU - (distance of the centres / diagonal of the smallest box around both)²; else as `box_iou`.

    Two boxes that are one point have nothing subtracted. Tolerance: 16 eps.
    Source: Zheng et al. 2020, equation 6.
    """
    a, b = _paired(a, b, pairwise, "distance_box_iou")
    return _iou(a, b) - _centre_penalty(a, b)


def complete_box_iou(a: Tensor, b: Tensor, *, pairwise: bool = True) -> Tensor:
    """CIoU = DIoU - α v, v = 4/π² (atan(w_b/h_b) - atan(w_a/h_a))², α = v / (1 - IoU + v); else as `box_iou`.

    α is a constant to the gradient, as the authors have it. Tolerance: 64 eps. Source: Zheng et al. 2020, equations 8 to 11.
    """
    a, b = _paired(a, b, pairwise, "complete_box_iou")
    iou = _iou(a, b)
    v = 4 / math.pi**2 * (_aspect(b) - _aspect(a)) ** 2
    with torch.no_grad():
        alpha = _ratio(v, 1 - iou + v)
    return iou - _centre_penalty(a, b) - alpha * v


def checked_boxes(boxes: Tensor, form: str, where: str) -> Tensor:
    """The boxes in the dtype that they are computed in. Raises DataError with the first box that is wrong."""
    fields = _FIELDS[form]
    width = fields.count(",") + 1
    if not isinstance(boxes, Tensor) or boxes.ndim < 1 or boxes.shape[-1] != width:
        shape = tuple(boxes.shape) if isinstance(boxes, Tensor) else type(boxes).__name__
        raise DataError(
            f"boxes must be a tensor of shape (..., {width}), not {shape}",
            where=where,
            remedy=f"put ({fields}) into the last dimension",
        )
    if boxes.dtype == torch.bool or boxes.is_complex():
        raise DataError(f"boxes cannot be {boxes.dtype}", where=where, remedy="give numbers: float32 or float64")
    if not boxes.is_floating_point():
        boxes = boxes.double()
    elif boxes.dtype in (torch.float16, torch.bfloat16):
        boxes = boxes.float()
    if torch.compiler.is_compiling():
        return boxes
    limit = math.sqrt(torch.finfo(boxes.dtype).max) / 16  # areas and squared distances stay finite
    finite = (boxes.abs() <= limit).all(-1)
    sizes = boxes[..., 2:] - boxes[..., :2] if form == "xyxy" else boxes[..., 2:4]
    fine = finite & (sizes >= 0).all(-1)
    if not fine.all():
        at = tuple((~fine).nonzero()[0].tolist())
        values = boxes[at].tolist()
        if not finite[at]:
            reason = f"is not finite, or beyond {limit:.2g}, where {boxes.dtype} overflows"
            remedy = "find where the NaN or infinity comes from (a diverged model, exp of large logits), or clamp"
        else:
            reason = "has a negative size"
            remedy = f"boxes here are ({fields}); order the corners, clamp the size at 0, or convert_boxes first"
        name = f"box {at[0] if len(at) == 1 else list(at)}" if at else "the box"
        raise DataError(f"{name} {reason}: {values}", where=where, remedy=remedy)
    return boxes


def paired(a: Tensor, b: Tensor, pairwise: bool, form: str, where: str) -> tuple[Tensor, Tensor]:
    """Both, checked, of one dtype, and shaped so that they broadcast: all pairs, or one by one. Raises DataError."""
    a, b = checked_boxes(a, form, f"{where}, a"), checked_boxes(b, form, f"{where}, b")
    if a.dtype != b.dtype:
        a, b = a.double(), b.double()
    if pairwise and min(a.ndim, b.ndim) < 2:
        raise DataError(
            f"pairwise needs (..., N, {a.shape[-1]}) boxes, not {tuple(a.shape)} and {tuple(b.shape)}",
            where=where,
            remedy="add a dimension (boxes[None]), or pairwise=False for one value a pair",
        )
    shapes = tuple(a.shape), tuple(b.shape)
    if pairwise:
        a, b = a[..., :, None, :], b[..., None, :, :]
    try:
        torch.broadcast_shapes(a.shape, b.shape)
    except RuntimeError as error:
        raise DataError(
            f"shapes {shapes[0]} and {shapes[1]} do not fit together",
            where=where,
            remedy="leading dimensions must be equal or 1" if pairwise else "or ask for pairwise=True",
        ) from error
    return a, b


def _paired(a: Tensor, b: Tensor, pairwise: bool, where: str) -> tuple[Tensor, Tensor]:
    return paired(a, b, pairwise, "xyxy", where)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of the intersection and of the union."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    width, height = (high - low).clamp(min=0).unbind(-1)
    inter = width * height
    return inter, _area(a) + _area(b) - inter


def _iou(a: Tensor, b: Tensor) -> Tensor:
    return _ratio(*_overlap(a, b))


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, and 0 with gradient 0 where below is 0."""
    empty = below <= 0
    return torch.where(empty, 0, above / torch.where(empty, 1, below))


def _centre_penalty(a: Tensor, b: Tensor) -> Tensor:
    """Squared distance of the centres over the squared diagonal of the smallest box around both."""
    apart = (((a - b)[..., :2] + (a - b)[..., 2:]) / 2).square().sum(-1)  # differences first: far from 0 they are exact
    extent = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    return _ratio(apart, extent.square().sum(-1))


def _aspect(boxes: Tensor) -> Tensor:
    """atan(w / h) in [0, π/2]; π/4, as a square's, and without gradient, for a point."""
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    point = (width == 0) & (height == 0)
    return torch.atan2(torch.where(point, 1, width), torch.where(point, 1, height))
