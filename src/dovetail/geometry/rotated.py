"""Rotated boxes: their corners, their exact overlap, and non-maximum suppression by it.

A rotated box is (cx, cy, w, h, angle): a box w wide and h high about its centre, then turned by `angle` in radians from
the x-axis to the y-axis (counter-clockwise with y upwards; clockwise on a screen, where y points down). Everything is
computed and returned in float64: in float32 the overlap of nearly equal boxes is wrong in the first digit, or negative.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dovetail.errors import DataError
from dovetail.geometry.boxes import checked_boxes, paired
from dovetail.geometry.clipping import intersection_area
from dovetail.geometry.masks import spread
from dovetail.geometry.nms import detections, fraction

PAIRS = 2**12  # clipped at once: they stay in a core's cache
BLOCK, SWEPT = 2**12, 2**20  # boxes that are settled together, and pairs that the sweep looks at together: memory
LAZY = 8  # rounds in which only pairs below a kept box are clipped
THINNEST = 2.0**-100  # a side shorter than this, against the extent of both boxes, makes a box empty
SLACK = 1 + 1e-9  # bounds that spare a pair its clipping are widened by more than their rounding
_UNIT = [[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]


def rotated_to_corners(boxes: Tensor) -> Tensor:
    """(..., 5) rotated boxes -> (..., 4, 2) float64 corners, of positive area by the shoelace formula.

    The first corner is (-w/2, -h/2) turned, the second (w/2, -h/2). Differentiable. Raises DataError for a wrong shape,
    a negative size, NaN or infinity. Error below 4 · 2^-53 of the largest coordinate and size.
    """
    boxes = checked_boxes(boxes, "rotated", "rotated_to_corners").double()
    return boxes[..., None, :2] + _turned(_square(boxes) * boxes[..., None, 2:4], boxes[..., None, 4])


def corners_to_rotated(corners: Tensor, *, tolerance: float = 1e-6) -> Tensor:
    """(..., 4, 2) corners of rectangles, in order -> (..., 5) float64: w is the length of the first side, angle its
    direction in (-π, π]; the inverse of rotated_to_corners up to whole turns.

    Of corners against that order (negative area) the second side comes out the same and the box is turned around.
    Raises DataError for a wrong shape, NaN, or corners that miss a rectangle by more than `tolerance` times the longer
    side.
    """
    where = "corners_to_rotated"
    if corners.ndim < 2 or tuple(corners.shape[-2:]) != (4, 2):
        raise DataError(f"corners {tuple(corners.shape)}", where=where, remedy="give (..., 4, 2): four (x, y) in order")
    corners = corners.double()
    centre = corners.mean(-2)
    wide, high = corners[..., 1, :] - corners[..., 0, :], corners[..., 2, :] - corners[..., 1, :]
    size = torch.stack([torch.hypot(*wide.unbind(-1)), torch.hypot(*high.unbind(-1))], -1)
    point, flat = (size == 0).all(-1), size[..., 0] == 0  # the direction comes from a side that has one
    along = torch.where(flat[..., None], torch.stack([high[..., 1], -high[..., 0]], -1), wide)
    angle = torch.where(point, 0, torch.atan2(along[..., 1], torch.where(point, 1, along[..., 0])))
    boxes = torch.cat([centre, size, angle[..., None]], -1)
    made = centre[..., None, :] + _turned(_square(boxes) * size[..., None, :], angle[..., None])
    reverse = made[..., [3, 2, 1, 0], :]  # the same rectangle with its sides taken the other way around
    miss = torch.minimum(_farthest(made, corners), _farthest(reverse, corners))
    fine = miss <= tolerance * size.amax(-1) + 1e-12 * corners.abs().amax((-2, -1))
    if not fine.all():
        at = (~fine).nonzero()[0].tolist()
        raise DataError(
            f"corners {corners[tuple(at)].tolist()} are no rectangle",
            where=f"{where}, item {at}" if at else where,
            remedy="min_area_rectangle gives the smallest one around any points",
        )
    return boxes


def rotated_bounds(boxes: Tensor) -> Tensor:
    """The axis-aligned box around rotated boxes: (..., 5) -> (..., 4) xyxy float64. Raises as rotated_to_corners."""
    return _bounds(checked_boxes(boxes, "rotated", "rotated_bounds").double())


def rotated_intersection(a: Tensor, b: Tensor, *, pairwise: bool = True) -> Tensor:
    """Area that rotated boxes share, in squared units: shapes and errors of `rotated_iou`."""
    a, b = _pairs(a, b, pairwise, "rotated_intersection")
    return _shared(*torch.broadcast_tensors(a, b))


def rotated_iou(a: Tensor, b: Tensor, *, pairwise: bool = True) -> Tensor:
    """Intersection over union of rotated boxes, in [0, 1], float64; 0 where one of them has no area.

    pairwise: a (..., N, 5) and b (..., M, 5) -> (..., N, M), leading dimensions broadcast;
    else a (..., 5) and b (..., 5), broadcast against each other -> (...).

    The longer box becomes the unit square (IoU does not change under affine maps), the other is clipped by it:
    equal boxes give exactly 1, and boxes far from the origin lose nothing. Differentiable almost everywhere.
    Tolerance: 1e-14 for sides up to 1e4 times each other (against 60 digits), beyond that 2^-52 times their ratio.
    Raises DataError for a wrong shape, negative size, NaN, infinity. A box whose sides differ by more than 2^100 is empty.
    Source: Sutherland and Hodgman 1974 for the clipping.
    """
    a, b = _pairs(a, b, pairwise, "rotated_iou")
    return _iou(*torch.broadcast_tensors(a, b))


def rotated_nms(boxes: Tensor, scores: Tensor, iou_threshold: float, *, classes: Tensor | None = None) -> Tensor:
    """Indices of the rotated boxes (N, 5) that greedy suppression keeps, by falling score: `nms` with `rotated_iou`.

    A sweep along x finds the pairs whose surrounding boxes meet; circles around them and areas leave those whose IoU
    can exceed the threshold; of those, pairs below a kept box are clipped. Raises as `nms`. The keep set is that of the
    exact IoUs wherever none lies within 1e-14 of the threshold.
    """
    boxes, scores = detections(boxes, scores, classes, "rotated", "rotated_nms")
    threshold = fraction(iou_threshold, "iou_threshold", "rotated_nms")
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order].double()
    classes = torch.zeros_like(order) if classes is None else classes[order]
    kept = order.new_zeros(0)
    for block in torch.arange(len(order), device=order.device).split(BLOCK):
        ranks = torch.cat([kept, block])
        upper, lower = _able(boxes[ranks], classes[ranks], threshold)
        new = lower >= len(kept)
        kept = ranks[_settled(boxes[ranks], upper[new], lower[new], len(kept), threshold)]
    return order[kept]


def _able(boxes: Tensor, classes: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Pairs i < j of boxes (N, 5) of one class whose IoU may exceed the threshold, by bounds of it: two (P,) int64."""
    bounds = _bounds(boxes * boxes.new_tensor([1, 1, SLACK, SLACK, 1]))
    sweep = bounds[:, 0].argsort()
    boxes, classes = boxes[sweep], classes[sweep]
    x1, y1, x2, y2 = bounds[sweep].T.contiguous()
    area, radius = boxes[:, 2] * boxes[:, 3], SLACK * torch.hypot(boxes[:, 2], boxes[:, 3]) / 2
    index = torch.arange(len(boxes), device=boxes.device)
    meets = (torch.searchsorted(x1, x2) - index - 1).clamp(min=0)  # those that begin before it ends
    pairs = [index.new_zeros(2, 0)]
    for rows in index.split(torch.unique_consecutive(meets.cumsum(0) // SWEPT, return_counts=True)[1].tolist()):
        row, nth = spread(meets[rows])
        one = rows[row]
        two = one + 1 + nth
        near = ((y1[one] < y2[two]) & (y1[two] < y2[one])).nonzero()[:, 0]
        one, two = one[near], two[near]
        dx, dy = boxes[one, 0] - boxes[two, 0], boxes[one, 1] - boxes[two, 1]
        width = torch.minimum(x2[one], x2[two]) - torch.maximum(x1[one], x1[two])
        height = torch.minimum(y2[one], y2[two]) - torch.maximum(y1[one], y1[two])
        most = SLACK * (width * height).minimum(area[one]).minimum(area[two])  # that they can share
        able = (dx * dx + dy * dy < (radius[one] + radius[two]) ** 2) & (classes[one] == classes[two])
        able &= most > threshold * (area[one] + area[two] - most)
        one, two = sweep[one[able]], sweep[two[able]]
        pairs.append(torch.stack([torch.minimum(one, two), torch.maximum(one, two)]))
    upper, lower = torch.cat(pairs, 1)
    return upper, lower


def _settled(boxes: Tensor, upper: Tensor, lower: Tensor, kept: int, threshold: float) -> Tensor:
    """Ranks that stay of boxes (N, 5), the first `kept` of which are certain to; pairs upper < lower may overlap.

    Round by round, whoever has no open pair with one above that is open itself stays, and drops those that it overlaps.
    """
    stays = torch.arange(len(boxes), device=boxes.device) < kept
    leads, open_ = stays, ~stays
    certain = False
    for turn in itertools.count():
        if not certain and (turn == LAZY or len(upper) <= PAIRS):  # all that is left at once: cheap, or too many turns
            hit = _iou(boxes[upper], boxes[lower]) > threshold
            upper, lower, certain = upper[hit], lower[hit], True
        mine = leads[upper].nonzero()[:, 0]
        below = lower[mine]
        open_[below if certain else below[_iou(boxes[upper[mine]], boxes[below]) > threshold]] = False
        if not open_.any():
            break
        left = (open_[upper] & open_[lower]).nonzero()[:, 0]
        upper, lower = upper[left], lower[left]
        leads = open_.clone()
        leads[lower] = False
        stays |= leads
        open_ &= ~leads
    return stays.nonzero()[:, 0]


def _pairs(a: Tensor, b: Tensor, pairwise: bool, where: str) -> tuple[Tensor, Tensor]:
    a, b = paired(a, b, pairwise, "rotated", where)
    return a.double(), b.double()


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Of pairs (..., 5), float64."""
    areas = a[..., 2] * a[..., 3], b[..., 2] * b[..., 3]
    shared = _shared(a, b)
    union = areas[0] + areas[1] - shared
    return torch.where(shared > 0, shared / torch.where(union > 0, union, 1), 0)


def _shared(a: Tensor, b: Tensor) -> Tensor:
    """Area shared by pairs (..., 5) -> (...), `PAIRS` at a time."""
    rows = zip(a.reshape(-1, 5).split(PAIRS), b.reshape(-1, 5).split(PAIRS))
    return torch.cat([_clipped(x, y) for x, y in rows]).view(a.shape[:-1])


def _clipped(a: Tensor, b: Tensor) -> Tensor:
    """Area shared by pairs (P, 5) -> (P,)."""
    longer = (a[:, 2:4].amax(1) >= b[:, 2:4].amax(1))[:, None]
    a, b = torch.where(longer, a, b), torch.where(longer, b, a)
    apart = _turned((b[:, :2] - a[:, :2])[:, None], -a[:, 4:])
    extent = a[:, 2:4].amax(1) + apart.abs().amax((1, 2))
    empty = (torch.minimum(a[:, 2:4].amin(1), b[:, 2:4].amin(1)) <= THINNEST * extent)[:, None]
    # centred on a and along its sides, then scaled so that a is the unit square
    corners = apart + _turned(_square(b) * b[:, None, 2:4], (b - a)[:, 4:])
    corners = torch.where(empty[..., None], 0, corners / torch.where(empty, 1, a[:, 2:4])[:, None])
    share = intersection_area(corners, _square(a))
    area = a[:, 2] * a[:, 3]
    return torch.where(empty[:, 0], 0, (share * area).minimum(area).minimum(b[:, 2] * b[:, 3]))


def _square(like: Tensor) -> Tensor:
    """Corners of the unit square about the origin, (4, 2)."""
    return torch.tensor(_UNIT, dtype=torch.float64, device=like.device)


def _turned(points: Tensor, angle: Tensor) -> Tensor:
    """Points (..., K, 2) turned by angle (..., 1 or K)."""
    cos, sin = angle.cos(), angle.sin()
    x, y = points.unbind(-1)
    return torch.stack([x * cos - y * sin, x * sin + y * cos], -1)


def _bounds(boxes: Tensor) -> Tensor:
    cos, sin = boxes[..., 4].cos().abs(), boxes[..., 4].sin().abs()
    w, h = boxes[..., 2] / 2, boxes[..., 3] / 2
    half = torch.stack([w * cos + h * sin, w * sin + h * cos], -1)
    return torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], -1)


def _farthest(a: Tensor, b: Tensor) -> Tensor:
    """Largest distance of corresponding corners (..., 4, 2) -> (...)."""
    return (a - b).square().sum(-1).amax(-1).sqrt()
