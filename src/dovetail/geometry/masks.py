"""Masks (H, W) of pixels: from polygons and back, their area, overlap and box.

Coordinates are (x, y) in pixels, y downwards: the pixel in row r and column c covers [c, c + 1] x [r, r + 1], its
centre is (c + 1/2, r + 1/2). The run-length form of masks is in `rle`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dovetail.errors import DataError, UserError, did_you_mean
from dovetail.geometry.predicates import orientation

Rule = Literal["center", "coco"]
FARTHEST = 2**20  # pixels from the origin: so far float64 places a crossing to 1e-8 pixels
MOST = 2**31  # pixels of a mask that is made from a description: those may come from strangers
FINE = 5  # COCO draws outlines on a grid five times as fine


def polygons_to_mask(polygons: Sequence[Any], height: int, width: int, *, rule: Rule = "center") -> Tensor:
    """The bool mask (height, width) of one region given by its rings: outlines, holes, parts.

    A ring is a tensor or array (K, 2) of (x, y), K >= 3, or COCO's flat list [x1, y1, x2, y2, ...]; it closes itself.

    rule="center": a pixel is set where its centre lies inside by the even-odd rule; of centres on the outline those at
    its left and upper side count, so that regions that share an edge neither overlap nor leave a gap. Exact for every
    float64 coordinate.
    rule="coco": bit for bit what pycocotools draws (frPyObjects, then merge): outlines walked on a grid five times as
    fine, rings united, so that holes cannot be said.

    Raises DataError for rings of another shape, NaN, or coordinates beyond 2^20; UserError for another rule.
    """
    return polygons_to_masks([polygons], height, width, rule=rule)[0]


def polygons_to_masks(regions: Sequence[Sequence[Any]], height: int, width: int, *, rule: Rule = "center") -> Tensor:
    """`polygons_to_mask` for many regions at once: a list of lists of rings -> bool (N, height, width)."""
    where = "polygons_to_mask"
    if rule not in get_args(Rule):
        raise UserError(f"unknown rule {rule!r}", where=where, remedy=did_you_mean(str(rule), get_args(Rule)))
    check_size(height, width, where)
    rings = [_ring(ring, where, i, j) for i, region in enumerate(regions) for j, ring in enumerate(region)]
    if not rings:
        return torch.zeros(len(regions), height, width, dtype=torch.bool)
    device = rings[0].device
    owner = torch.tensor([i for i, region in enumerate(regions) for _ in region], device=device)
    lengths = torch.tensor([len(ring) for ring in rings], device=device)
    start = torch.cat([ring.to(device) for ring in rings])
    if rule == "coco":
        pixels = _coco(start, lengths, height, width)
        united = torch.zeros(len(regions), height, width, dtype=torch.int16, device=device)
        return united.index_add_(0, owner, pixels.short()) > 0
    return _centers(start, _following(start, lengths), owner.repeat_interleave(lengths), len(regions), height, width)


def mask_to_polygons(mask: Tensor, *, min_area: float = 0.0) -> list[Tensor]:
    """The rings around a mask (H, W), along pixel edges: a list of (K, 2) float64 (x, y), corners only.

    An outline has positive area by the shoelace formula (x to the right, y downwards: clockwise on the screen), a hole
    negative, so that the areas sum to the pixels set, exactly; polygons_to_mask gives the mask back. Pixels that meet
    at a corner only are apart. Rings whose area is below `min_area` (squared pixels, without sign) are left out.
    In order of their first pixel, row by row. Raises DataError for another shape, or a pixel neither 0 nor 1.

    All rings are followed at once: each border edge knows the next one, and pointer doubling (Wyllie 1979) numbers the
    edges of each cycle in log2 of its length rounds.
    """
    stack, single = mask_stack(mask, "mask_to_polygons")
    if not single:
        raise DataError(
            f"one mask (H, W) at a time, not {tuple(mask.shape)}", where="mask_to_polygons", remedy="go over the masks"
        )
    begin, way, following = _borders(stack[0])
    if not len(begin):
        return []
    first, rank = _cycles(following)
    turning = torch.empty_like(way, dtype=torch.bool)
    turning[following] = way[following] != way  # an edge that goes on straight begins at no corner
    keep = turning.nonzero()[:, 0]
    keep = keep[torch.argsort(rank[keep], stable=True)]
    keep = keep[torch.argsort(first[keep], stable=True)]
    _, lengths = first[keep].unique_consecutive(return_counts=True)
    rings = begin[keep].double().split(lengths.tolist())
    return [ring for ring in rings if min_area <= 0 or abs(_shoelace(ring)) >= min_area]


def mask_area(masks: Tensor) -> Tensor:
    """Pixels set in masks (..., H, W) -> int64 (...). Raises DataError for a pixel that is neither 0 nor 1."""
    if masks.ndim < 2:
        raise DataError(f"masks {tuple(masks.shape)}", where="mask_area", remedy="give (..., H, W)")
    return _binary(masks, "mask_area").sum((-2, -1))


def mask_iou(a: Tensor, b: Tensor, *, crowd: Tensor | None = None) -> Tensor:
    """IoU of every mask of a (N, H, W) with every one of b (M, H, W) -> (N, M) float64; 0 where both are empty.

    crowd (M,) bool marks masks of b that stand for a whole crowd: with those it is intersection over the area of a, as
    COCO's evaluation has it. Intersections are one matrix product. Raises DataError for shapes that do not fit.
    Exact counts, one rounding in the quotient. Source: Lin et al. 2014; pycocotools.mask.iou.
    """
    (first, _), (second, _) = mask_stack(a, "mask_iou, a"), mask_stack(b, "mask_iou, b")
    if first.shape[1:] != second.shape[1:] or a.ndim != 3 or b.ndim != 3:
        raise DataError(
            f"masks {tuple(a.shape)} and {tuple(b.shape)} do not fit",
            where="mask_iou",
            remedy="give (N, H, W) and (M, H, W) of one image size",
        )
    if crowd is not None and (crowd.dtype != torch.bool or tuple(crowd.shape) != (len(b),)):
        raise DataError(
            f"crowd {crowd.dtype} {tuple(crowd.shape)}",
            where="mask_iou",
            remedy=f"give bool ({len(b)},), one a mask of b",
        )
    left, right = first.flatten(1), second.flatten(1)
    counting = torch.float32 if left.shape[1] < 2**24 else torch.float64  # float32 counts exactly up to 2^24
    inter = (left.to(counting) @ right.to(counting).T).double()
    area_a, area_b = left.sum(1).double()[:, None], right.sum(1).double()[None]
    union = area_a + area_b - inter
    if crowd is not None:
        union = torch.where(crowd, area_a.expand_as(union), union)
    return inter / torch.where(union == 0, 1, union)


def mask_to_box(masks: Tensor) -> Tensor:
    """The smallest box around masks (..., H, W) -> (..., 4) xyxy float64 along pixel edges; zeros where none is set.

    convert_boxes(..., "xyxy", "xywh") equals pycocotools.mask.toBbox. Raises DataError as mask_area does. Exact.
    """
    if masks.ndim < 2:
        raise DataError(f"masks {tuple(masks.shape)}", where="mask_to_box", remedy="give (..., H, W)")
    pixels = _binary(masks, "mask_to_box")
    (left, right), (top, bottom) = _span(pixels.any(-2)), _span(pixels.any(-1))
    return torch.stack([left, top, right, bottom], -1).double()


def mask_stack(masks: Tensor, where: str) -> tuple[Tensor, bool]:
    """Bool masks (N, H, W), and whether a single one (H, W) was given. Raises DataError."""
    if not isinstance(masks, Tensor) or masks.ndim not in (2, 3):
        shape = tuple(masks.shape) if isinstance(masks, Tensor) else type(masks).__name__
        raise DataError(f"masks must be a tensor (H, W) or (N, H, W), not {shape}", where=where, remedy="reshape them")
    single = masks.ndim == 2
    return _binary(masks[None] if single else masks, where), single


def check_size(height: Any, width: Any, where: str) -> None:
    """Raises DataError unless both are whole, not negative, and a mask of them is below 2^31 pixels."""
    if not all(isinstance(n, int) and n >= 0 for n in (height, width)) or height * width > MOST:
        raise DataError(
            f"a mask of {height} x {width}",
            where=where,
            remedy=f"size is [height, width], two whole numbers, at most {MOST:,} pixels",
        )


def _binary(masks: Tensor, where: str) -> Tensor:
    masks = masks.detach()
    if masks.dtype == torch.bool:
        return masks
    if not ((masks == 0) | (masks == 1)).all():
        raise DataError(
            "a pixel is neither 0 nor 1",
            where=where,
            remedy="compare first: logits > 0, probabilities > 0.5, labels == k",
        )
    return masks != 0


def _ring(ring: Any, where: str, region: int, number: int) -> Tensor:
    """One ring as (K, 2) float64. Raises DataError."""
    place = f"{where}, region {region}, ring {number}"
    try:
        points = torch.as_tensor(ring).detach().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"a ring that is no tensor: {error}", where=place, remedy="give (K, 2) numbers") from error
    if points.ndim == 1 and len(points) % 2 == 0:
        points = points.reshape(-1, 2)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 3:
        raise DataError(
            f"a ring of shape {tuple(points.shape)}",
            where=place,
            remedy="give (K, 2) or a flat list [x1, y1, ...] of at least 3 points; rings of one region stand in a list",
        )
    if not (points.abs() <= FARTHEST).all():
        raise DataError(
            f"a ring with NaN, infinity or a coordinate beyond {FARTHEST}",
            where=place,
            remedy="clip the polygon to the image first",
        )
    return points


def _following(start: Tensor, lengths: Tensor) -> Tensor:
    """The point after each one along its ring."""
    last = lengths.cumsum(0)
    index = torch.arange(1, len(start) + 1, device=start.device)
    index[last - 1] = last - lengths
    return start[index]


def spread(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For items with `counts` members each: the item of every member, and the member's number in it."""
    item = torch.repeat_interleave(counts)
    first = counts.cumsum(0).sub_(counts).index_select(0, item)
    return item, torch.arange(len(item), device=counts.device).sub_(first)


def _centers(start: Tensor, end: Tensor, owner: Tensor, count: int, height: int, width: int) -> Tensor:
    """Even-odd parity of the crossings left of (or at) every centre: marked at the first such column, then summed."""
    swap = (start[:, 1] > end[:, 1])[:, None]  # one direction for both neighbours of a shared edge: the same result
    low, high = torch.where(swap, end, start), torch.where(swap, start, end)
    first = (low[:, 1] - 0.5).ceil().clamp(0, height)  # rows whose centre y has low <= y < high
    stop = (high[:, 1] - 0.5).ceil().clamp(0, height)
    edge, nth = spread((stop - first).long())
    row = first.long()[edge] + nth
    low, high = low[edge], high[edge]
    size = high - low
    x = low[:, 0] + (row + 0.5 - low[:, 1]) * size[:, 0] / size[:, 1] - 0.5
    near = x.round()
    column = x.ceil()
    close = ((x - near).abs() < 1e-6).nonzero()[:, 0]  # rounding could decide: the exact predicate does
    centre = torch.stack([near[close], row[close].double()], 1) + 0.5
    column[close] = near[close] + (orientation(low[close], high[close], centre) > 0)
    place = (owner[edge] * height + row) * (width + 1) + column.clamp(0, width).long()
    turns = _odd(place, count * height * (width + 1)).view(count, height, width + 1)
    return turns[..., :width].cumsum(-1, dtype=torch.uint8) % 2 == 1


def _coco(start: Tensor, lengths: Tensor, height: int, width: int) -> Tensor:
    """Each ring as pycocotools draws it: (number of rings, height, width) bool.

    Vertices go to a grid five times as fine; every edge is walked a fine step along its longer side at a time. Where
    the walk leaves the middle of a pixel column, it turns over all pixels below, and all columns after.
    """
    fine = (FINE * start + 0.5).trunc()
    end = _following(fine, lengths)
    delta = (end - fine).abs().long()
    steep = delta[:, 0] < delta[:, 1]
    longer = delta.amax(1)
    flip = torch.where(steep, fine[:, 1] > end[:, 1], fine[:, 0] > end[:, 0])[:, None]
    low, high = torch.where(flip, end, fine), torch.where(flip, fine, end)
    low, high = (torch.where(steep[:, None], point.flip(1), point) for point in (low, high))  # the longer side first
    rise = (high[:, 1] - low[:, 1]) / longer.clamp(min=1)
    edge, nth = spread(longer + 1)
    step = torch.where(flip[edge, 0], longer[edge] - nth, nth)
    straight, slanted = low[edge, 0] + step, (low[edge, 1] + rise[edge] * step + 0.5).trunc()
    u, v = torch.where(steep[edge], slanted, straight), torch.where(steep[edge], straight, slanted)

    ring = torch.repeat_interleave(lengths)[edge]
    moved = ((u[1:] != u[:-1]) & (ring[1:] == ring[:-1])).nonzero()[:, 0]
    before, after = u[moved], u[moved + 1]
    x = (torch.where(after < before, after, after - 1) + 0.5) / FINE - 0.5
    y = (torch.minimum(v[moved], v[moved + 1]) + 0.5) / FINE - 0.5
    inside = ((x.floor() == x) & (x >= 0) & (x <= width - 1)).nonzero()[:, 0]
    pixels = height * width + 1
    place = ring[moved] * pixels + (x * height + y.clamp(0, height).ceil()).long()
    turns = _odd(place[inside], len(lengths) * pixels).view(len(lengths), pixels)
    filled = turns[:, :-1].cumsum(1, dtype=torch.uint8) % 2 == 1
    return filled.view(-1, width, height).transpose(1, 2)


def _odd(place: Tensor, size: int) -> Tensor:
    """uint8 (size,): how often each place occurs; what wraps at 256 is even, as only the parity is wanted."""
    return torch.zeros(size, dtype=torch.uint8, device=place.device).index_add_(
        0, place, torch.ones_like(place, dtype=torch.uint8)
    )


def _borders(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Border edges of a mask, the set pixel on the right hand (y down): where they begin (E, 2) as (x, y), their way
    (0 to 3: right, down, left, up), and the edge that follows each. Sorted by where they begin, row by row."""
    height, width = mask.shape
    padded = torch.zeros(height + 2, width + 2, dtype=torch.bool, device=mask.device)
    padded[1:-1, 1:-1] = mask
    inner, outer = padded[1:, 1:], padded[:-1, :-1]  # of the corner (r, c): the pixels right below and left above
    above, before = padded[:-1, 1:], padded[1:, :-1]  # right above, left below
    leaving = torch.stack([inner & ~above, before & ~inner, outer & ~before, above & ~outer], -1)
    edges = leaving.view(-1, 4).nonzero()
    begin = torch.stack([edges[:, 0] % (width + 1), edges[:, 0] // (width + 1)], 1)
    way = edges[:, 1]
    step = torch.tensor([1, width + 1, -1, -width - 1], device=mask.device)
    arrive = edges[:, 0] + step[way]
    number = torch.full((leaving.numel(),), -1, device=mask.device)
    number[edges[:, 0] * 4 + way] = torch.arange(len(edges), device=mask.device)
    # to the right first: it stays with the same pixel, which keeps pixels that meet at a corner apart
    choices = torch.stack([number[arrive * 4 + (way + turn) % 4] for turn in (1, 0, 3)])
    following = torch.where(choices[0] >= 0, choices[0], torch.where(choices[1] >= 0, choices[1], choices[2]))
    return begin, way, following


def _cycles(following: Tensor) -> tuple[Tensor, Tensor]:
    """Of every member of a permutation: the least member of its cycle, and a number that rises along it from there."""
    index = torch.arange(len(following), device=following.device)
    rounds = max(len(following) - 1, 1).bit_length()
    first, jump = index, following
    for _ in range(rounds):
        first = torch.minimum(first, first[jump])
        jump = jump[jump]
    last = first == following  # cut here, each cycle is a line: how far is its end?
    jump, distance = torch.where(last, index, following), (~last).long()
    for _ in range(rounds):
        distance = distance + distance[jump]
        jump = jump[jump]
    return first, -distance


def _span(line: Tensor) -> tuple[Tensor, Tensor]:
    """First True of the last dimension and one past the last; zeros where there is none."""
    size = line.shape[-1]
    if not size:
        return line.new_zeros(line.shape[:-1], dtype=torch.long), line.new_zeros(line.shape[:-1], dtype=torch.long)
    index = torch.arange(size, device=line.device)
    some = line.any(-1)
    low = torch.where(line, index, size).amin(-1)
    return torch.where(some, low, 0), torch.where(line, index + 1, 0).amax(-1)


def _shoelace(ring: Tensor) -> float:
    x, y = ring.unbind(1)
    return float((x * y.roll(-1) - x.roll(-1) * y).sum() / 2)
