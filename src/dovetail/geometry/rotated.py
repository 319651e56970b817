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
from dovetail.geometry.masks import spread
from dovetail.geometry.nms import detections, fraction

PAIRS = 2**12  # computed at once: they stay in a core's cache
BLOCK, SWEPT = 2**12, 2**20  # boxes that are settled together, and pairs that the sweep looks at together: memory
LAZY = 8  # rounds in which only pairs below a kept box are computed
THINNEST = 2.0**-100  # a side shorter than this, against the extent of both boxes, makes a box empty
NOTHING = 2.0**-500  # a length of which the square's inverse is finite; what is shorter adds no area
FLAT = 2.0**-48  # boxes that overlap by less than this, against the narrower one in that direction, touch
SLACK = 1 + 1e-9  # bounds that spare a pair its computation are widened by more than their rounding
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

    The longer box becomes the unit square (IoU does not change under affine maps); how much of the other is inside is a
    sum over its edges, -Σ ∫ clamp(y) dx with x clamped to the square's: no polygon is built. Equal boxes give exactly 1,
    and boxes far from the origin lose nothing. Differentiable almost everywhere.
    Tolerance: 1e-14 for sides up to 1e4 times each other (against 60 digits), beyond that 2^-52 times their ratio.
    Raises DataError for a wrong shape, negative size, NaN, infinity. A box whose sides differ by more than 2^100 is empty.
    Source: Green's theorem for the area.
    """
    a, b = _pairs(a, b, pairwise, "rotated_iou")
    return _iou(*torch.broadcast_tensors(a, b))


def rotated_nms(boxes: Tensor, scores: Tensor, iou_threshold: float, *, classes: Tensor | None = None) -> Tensor:
    """Indices of the rotated boxes (N, 5) that greedy suppression keeps, by falling score: `nms` with `rotated_iou`.

    A sweep along x finds the pairs whose surrounding boxes meet; what those share and the areas leave the pairs whose
    IoU can exceed the threshold; of those, pairs below a kept box are computed. Raises as `nms`. The keep set is that of the
    exact IoUs wherever none lies within 1e-14 of the threshold.
    """
    boxes, scores = detections(boxes, scores, classes, "rotated", "rotated_nms")
    threshold = fraction(iou_threshold, "iou_threshold", "rotated_nms")
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order].double()
    classes = None if classes is None else classes[order]
    kept = order.new_zeros(0)
    for block in torch.arange(len(order), device=order.device).split(BLOCK):
        ranks = torch.cat([kept, block])
        upper, lower = _able(boxes[ranks], None if classes is None else classes[ranks], threshold)
        if len(kept):  # what was kept before is settled
            new = lower >= len(kept)
            upper, lower = upper[new], lower[new]
        kept = ranks[_settled(boxes[ranks], upper, lower, len(kept), threshold)]
    return order[kept]


def _able(boxes: Tensor, classes: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
    """Pairs i < j of boxes (N, 5) of one class whose IoU may exceed the threshold, by bounds of it: two (P,) int64."""
    bounds = _bounds(boxes * boxes.new_tensor([1, 1, SLACK, SLACK, 1]))
    sweep = bounds[:, 0].argsort()
    table = torch.cat([bounds, boxes[:, 2:3] * boxes[:, 3:4]], 1).index_select(0, sweep)
    x1, y1, x2, y2, _ = table.T.contiguous()
    index = torch.arange(len(boxes), device=boxes.device)
    meets = (torch.searchsorted(x1, x2) - index - 1).clamp(min=0)  # those that begin before it ends
    pairs = [index.new_zeros(2, 0)]
    for rows in index.split(torch.unique_consecutive(meets.cumsum(0) // SWEPT, return_counts=True)[1].tolist()):
        row, nth = spread(meets[rows])
        one = row + rows[0]
        two = nth.add_(one).add_(1)
        near = y1.index_select(0, one) < y2.index_select(0, two)
        near = (near & (y1.index_select(0, two) < y2.index_select(0, one))).nonzero()[:, 0]
        one, two = one.index_select(0, near), two.index_select(0, near)
        a, b = (table.index_select(0, i).T.contiguous() for i in (one, two))
        width, height = torch.minimum(a[2:4], b[2:4]) - torch.maximum(a[:2], b[:2])
        most = SLACK * (width * height).minimum(a[4]).minimum(b[4])  # that they can share
        able = (most > threshold * (a[4] + b[4] - most)).nonzero()[:, 0]
        one, two = (sweep.index_select(0, i.index_select(0, able)) for i in (one, two))
        if classes is not None:
            same = classes[one] == classes[two]
            one, two = one[same], two[same]
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
        if turn or not kept:
            leads = open_.index_fill(0, lower, False)
            stays |= leads
            open_ &= ~leads
        if not certain and (turn == LAZY or len(upper) <= PAIRS // 4):  # all that is left: few, or too many turns
            hit = _over(boxes, upper, lower, threshold)
            upper, lower, certain = upper.index_select(0, hit), lower.index_select(0, hit), True
        mine = leads.index_select(0, upper).nonzero()[:, 0]
        if len(mine):
            above, below = upper.index_select(0, mine), lower.index_select(0, mine)
            below = below if certain else below.index_select(0, _over(boxes, above, below, threshold))
            open_.index_fill_(0, below, False)
        if not open_.any():
            break
        left = (open_.index_select(0, upper) & open_.index_select(0, lower)).nonzero()[:, 0]
        upper, lower = upper.index_select(0, left), lower.index_select(0, left)
    return stays.nonzero()[:, 0]


def _over(boxes: Tensor, one: Tensor, two: Tensor, threshold: float) -> Tensor:
    """Which of the pairs of boxes (N, 5) overlap by more than the threshold: places in one and two (P,)."""
    return (_iou(boxes.index_select(0, one), boxes.index_select(0, two)) > threshold).nonzero()[:, 0]


def _pairs(a: Tensor, b: Tensor, pairwise: bool, where: str) -> tuple[Tensor, Tensor]:
    a, b = paired(a, b, pairwise, "rotated", where)
    return a.double(), b.double()


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Of pairs (..., 5), float64."""
    shared = _shared(a, b)
    union = a[..., 2] * a[..., 3] + b[..., 2] * b[..., 3] - shared
    return shared / union.masked_fill(union <= 0, 1)


def _shared(a: Tensor, b: Tensor) -> Tensor:
    """Area shared by pairs (..., 5) -> (...), `PAIRS` at a time."""
    rows = zip(a.reshape(-1, 5).split(PAIRS), b.reshape(-1, 5).split(PAIRS))
    return torch.cat([_common(x, y) for x, y in rows]).view(a.shape[:-1])


def _common(a: Tensor, b: Tensor) -> Tensor:
    """Area shared by pairs (P, 5) -> (P,)."""
    a, b = a.T.contiguous(), b.T.contiguous()  # a row for each of centre, size and angle
    longer = a[2:4].amax(0) >= b[2:4].amax(0)
    a, b = torch.where(longer, a, b), torch.where(longer, b, a)
    away = _turn(b[:2] - a[:2], a[4].cos(), -a[4].sin())  # of the centres, along a's sides
    turn = (b[4] - a[4]).cos(), (b[4] - a[4]).sin()
    thinnest = torch.minimum(a[2:4], b[2:4]).amin(0)
    meet = (thinnest > THINNEST * (a[2:4].amax(0) + away.abs().amax(0))) & _meet(a[2:4], b[2:4], away, *turn)
    rows = meet.nonzero()[:, 0]
    some = torch.cat([a[2:4], b[2:4], away, torch.stack(turn)]).index_select(1, rows)
    a, b, away, turn = some.split(2)
    # along a's sides, then scaled so that a is the unit square
    x, y = (_turn(_square(some).T[..., None] * b[:, None], *turn) / a[:, None]).unbind(0)
    share = _in_square(x, y, away / a)
    area = a[0] * a[1]
    shared = (share * area).minimum(area).minimum(b[0] * b[1]).clamp(min=0)
    return torch.zeros_like(meet, dtype=torch.float64).index_copy(0, rows, shared)


def _meet(a: Tensor, b: Tensor, away: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Whether pairs share more than a line along the directions of all their sides (P,).

    a, b: sizes (2, P). away: from centre to centre along a's sides (2, P). cos, sin: of b's angle against a's (P,).
    """
    sides, others = torch.stack([a, b]), torch.stack([b, a])
    apart = torch.stack([away, _turn(away, cos, -sin)]).abs()
    reach = others * cos.abs() + others.flip(1) * sin.abs()
    least = torch.minimum(sides, reach)
    return (((sides + reach) / 2 - apart).minimum(least) > FLAT * least).flatten(0, 1).all(0)


def _in_square(x: Tensor, y: Tensor, centre: Tensor) -> Tensor:
    """Area (P,) of convex quadrilaterals inside the square [-1/2, 1/2]²: corners x, y (4, P) about centres (2, P).

    That area is the sum over edges of ∫ clamp(y) dx, x clamped too: nothing is decided that rounding could decide
    otherwise next time, and the sum is as continuous as the area. Measured from the point of the square that is nearest
    to the centre, so that a small quadrilateral costs no digits.
    """
    origin = centre.clamp(-0.5, 0.5)
    x, y = x + (centre - origin)[0], y + (centre - origin)[1]
    (left, low), (right, high) = -0.5 - origin, 0.5 - origin
    to_x, to_y = x.roll(-1, 0), y.roll(-1, 0)
    dx, dy = to_x - x, to_y - y
    begin = torch.minimum(torch.maximum(x, left), right)
    end = begin.roll(-1, 0)
    run = dx.masked_fill(dx.abs() < NOTHING, 1)
    first = y + ((begin - x) / run).clamp(0, 1) * dy  # where the edge enters the strip of x, and where it leaves it
    last = to_y - ((to_x - end) / run).clamp(0, 1) * dy
    rise = last - first
    rise = rise.masked_fill(rise.abs() < NOTHING, 1)
    # How far along the edge it meets the lower and the upper side: before the first of them it is clamped to where it
    # begins, behind the second to where it ends, and between them it is its own mean.
    share = (((low - first) / rise).clamp(0, 1) + ((high - first) / rise).clamp(0, 1)) / 2
    first, last = (torch.minimum(torch.maximum(v, low), high) for v in (first, last))
    return ((begin - end) * (last + (first - last) * share)).sum(0)


def _square(like: Tensor) -> Tensor:
    """Corners of the unit square about the origin, (4, 2)."""
    return torch.tensor(_UNIT, dtype=torch.float64, device=like.device)


def _turned(points: Tensor, angle: Tensor) -> Tensor:
    """Points (..., K, 2) turned by angle (..., 1 or K)."""
    return _turn(points.movedim(-1, 0), angle.cos(), angle.sin()).movedim(0, -1)


def _turn(points: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Points (2, ...) turned by the angles of cos and sin (...)."""
    x, y = points
    return torch.stack([x * cos - y * sin, x * sin + y * cos])


def _bounds(boxes: Tensor) -> Tensor:
    cos, sin = boxes[..., 4].cos().abs(), boxes[..., 4].sin().abs()
    w, h = boxes[..., 2] / 2, boxes[..., 3] / 2
    half = torch.stack([w * cos + h * sin, w * sin + h * cos], -1)
    return torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], -1)


def _farthest(a: Tensor, b: Tensor) -> Tensor:
    """Largest distance of corresponding corners (..., 4, 2) -> (...)."""
    return (a - b).square().sum(-1).amax(-1).sqrt()
