"""Boxes, rotated boxes, masks and polygons, ordinary and adversarial, and the oracles that judge them.

Shared by the tests (few cases) and by bench/boxes.py (1e5). Every maker takes a count and a seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import shapely
import torch
from torch import Tensor

BOX_KINDS = ("random", "equal", "nearly equal", "nested", "sharing a side", "sharing a corner", "apart",
             "no width", "a point", "far away", "tiny", "huge", "thin")  # fmt: skip
ROTATED_KINDS = ("random", "equal", "nearly equal", "turned by quarters", "nested", "sharing a side", "crossing",
                 "apart", "no width", "a point", "far away", "tiny", "huge", "thin", "multiples of 45°")  # fmt: skip


def boxes(count: int, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """Pairs of xyxy boxes, float64 (count, 4) each, and the kind of each pair."""
    rng = np.random.default_rng(seed)
    kinds = [BOX_KINDS[i % len(BOX_KINDS)] for i in range(count)]
    kind = np.array(kinds)

    def some() -> np.ndarray:
        low = rng.uniform(-20, 100, (count, 2))
        return np.concatenate([low, low + rng.exponential(20, (count, 2))], 1)

    a, b = some(), some()
    size = a[:, 2:] - a[:, :2]
    share = rng.uniform(0, 1, (count, 4))
    inside = np.concatenate([a[:, :2] + size * share[:, :2] / 2, a[:, 2:] - size * share[:, 2:] / 2], 1)
    noise = a * (1 + rng.normal(size=(count, 4)) * 10.0 ** rng.uniform(-16, -3, (count, 1)))
    noise[:, 2:] = np.maximum(noise[:, 2:], noise[:, :2])
    beside = a + np.stack([size[:, 0], 0 * size[:, 0]] * 2, 1)
    beside[:, 0] = a[:, 2]
    corner = beside.copy()
    corner[:, 1], corner[:, 3] = a[:, 3], a[:, 3] + size[:, 1]
    chosen = {"equal": a, "nearly equal": noise, "nested": inside, "sharing a side": beside, "sharing a corner": corner,
              "apart": a + 1e3}  # fmt: skip
    for name, values in chosen.items():
        b[kind == name] = values[kind == name]
    line, point, thin = kind == "no width", kind == "a point", kind == "thin"
    a[line, 2] = a[line, 0]
    b[line & (share[:, 0] < 0.5)] = a[line & (share[:, 0] < 0.5)]
    a[point, 2:] = a[point, :2]
    b[point & (share[:, 0] < 0.5)] = a[point & (share[:, 0] < 0.5)]
    for one in (a, b):
        one[thin, 3] = one[thin, 1] + (one[thin, 3] - one[thin, 1]) * 1e-6
        one[kind == "far away"] += 1e6
        one[kind == "tiny"] *= 1e-9
        one[kind == "huge"] *= 1e9
    return torch.from_numpy(a), torch.from_numpy(b), kinds


def exact_box_measures(a: Tensor, b: Tensor) -> dict[str, np.ndarray]:
    """IoU, GIoU, DIoU, CIoU of pairs by shapely's areas and the papers' formulas, each pair about a's first corner."""
    a, b = (np.asarray(box - torch.cat([a[:, :2]] * 2, 1)) for box in (a, b))
    one, two = shapely.box(*a.T), shapely.box(*b.T)
    areas = shapely.area(one), shapely.area(two)
    shared = np.where((areas[0] > 0) & (areas[1] > 0), shapely.area(shapely.intersection(one, two)), 0)
    union = areas[0] + areas[1] - shared
    iou = np.divide(shared, union, out=np.zeros_like(union), where=union > 0)
    x1, y1, x2, y2 = shapely.bounds(shapely.union(shapely.envelope(one), shapely.envelope(two))).T
    around = (x2 - x1) * (y2 - y1)
    apart = np.hypot(*((a[:, :2] + a[:, 2:] - b[:, :2] - b[:, 2:]) / 2).T)
    diagonal = np.hypot(x2 - x1, y2 - y1)
    giou = iou - np.divide(around - union, around, out=np.zeros_like(union), where=around > 0)
    diou = iou - np.divide(apart, diagonal, out=np.zeros_like(union), where=diagonal > 0) ** 2
    turn = [np.where((w == 0) & (h == 0), math.pi / 4, np.arctan2(w, h)) for w, h in
            ((c[:, 2] - c[:, 0], c[:, 3] - c[:, 1]) for c in (a, b))]  # fmt: skip
    v = 4 / math.pi**2 * (turn[1] - turn[0]) ** 2
    ciou = diou - v * np.divide(v, 1 - iou + v, out=np.zeros_like(v), where=1 - iou + v > 0)
    return {"box_iou": iou, "generalized_box_iou": giou, "distance_box_iou": diou, "complete_box_iou": ciou}


def rotated(count: int, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """Pairs of rotated boxes, float64 (count, 5) each, and the kind of each pair."""
    rng = np.random.default_rng(seed)
    kinds = [ROTATED_KINDS[i % len(ROTATED_KINDS)] for i in range(count)]
    kind = np.array(kinds)

    def some() -> np.ndarray:
        return np.concatenate([rng.uniform(0, 60, (count, 2)), rng.exponential(20, (count, 2)) + 0.1,
                               rng.uniform(-7, 7, (count, 1))], 1)  # fmt: skip

    a, b = some(), some()
    share = rng.uniform(0, 1, (count, 2))
    direction = np.stack([np.cos(a[:, 4]), np.sin(a[:, 4])], 1)
    noise = a * (1 + rng.normal(size=(count, 5)) * 10.0 ** rng.uniform(-17, -3, (count, 1)))
    quarters = a.copy()
    turns = rng.integers(-4, 5, count)
    quarters[:, 4] += turns * math.pi / 2
    quarters[turns % 2 == 1] = quarters[turns % 2 == 1][:, [0, 1, 3, 2, 4]]
    inside, beside, crossing = a.copy(), a.copy(), a.copy()
    inside[:, 2:4] *= share
    beside[:, :2] += direction * a[:, 2:3]
    crossing[:, 4] += rng.uniform(0, math.pi, count)
    apart = a + np.array([1e3, 1e3, 0, 0, 0])
    chosen = {"equal": a, "nearly equal": noise, "turned by quarters": quarters, "nested": inside,
              "sharing a side": beside, "crossing": crossing, "apart": apart}  # fmt: skip
    for name, values in chosen.items():
        b[kind == name] = values[kind == name]
    line, point, thin = kind == "no width", kind == "a point", kind == "thin"
    a[line, 2] = 0
    b[line & (share[:, 0] < 0.5)] = a[line & (share[:, 0] < 0.5)]
    a[point, 2:4] = 0
    b[thin] = np.where(share[thin, :1] < 0.5, noise[thin], b[thin])
    steps = kind == "multiples of 45°"
    for one in (a, b):
        one[thin, 3] *= 1e-4
        one[steps] = one[steps].round()
        one[steps, 4] = one[steps, 4] * math.pi / 4
        one[kind == "far away", :2] += 1e6
        one[kind == "tiny", :4] *= 1e-9
        one[kind == "huge", :4] *= 1e9
    return torch.from_numpy(a), torch.from_numpy(b), kinds


def corners(boxes: np.ndarray) -> np.ndarray:
    """(N, 5) -> (N, 4, 2), by complex numbers: another way than the library's."""
    half = (boxes[:, 2, None] * np.array([-1, 1, 1, -1]) + 1j * boxes[:, 3, None] * np.array([-1, -1, 1, 1])) / 2
    turned = half * np.exp(1j * boxes[:, 4, None]) + boxes[:, 0, None] + 1j * boxes[:, 1, None]
    return np.stack([turned.real, turned.imag], -1)


def exact_rotated_iou(a: Tensor, b: Tensor) -> np.ndarray:
    """IoU of pairs by shapely, each pair about the centre of a."""
    a, b = a.numpy().copy(), b.numpy().copy()
    b[:, :2] -= a[:, :2]
    a[:, :2] = 0
    areas = a[:, 2] * a[:, 3], b[:, 2] * b[:, 3]
    some = (areas[0] > 0) & (areas[1] > 0)
    shared = np.zeros(len(a))
    shared[some] = shapely.area(
        shapely.intersection(shapely.polygons(corners(a[some])), shapely.polygons(corners(b[some])))
    )
    union = areas[0] + areas[1] - shared
    return np.divide(shared, union, out=np.zeros_like(union), where=shared > 0)


def precise_rotated_iou(a: list[float], b: list[float], digits: int = 60) -> float:
    """IoU of one pair in `digits` decimal digits (mpmath): the exact value for the given float64 numbers."""
    import mpmath

    with mpmath.workdps(digits):

        def polygon(box: list[float]) -> list[tuple[mpmath.mpf, mpmath.mpf]]:
            cx, cy, w, h, angle = map(mpmath.mpf, box)
            cos, sin = mpmath.cos(angle), mpmath.sin(angle)
            around = ((-w, -h), (w, -h), (w, h), (-w, h))
            return [(cx + (x * cos - y * sin) / 2, cy + (x * sin + y * cos) / 2) for x, y in around]

        def area(ring: list) -> mpmath.mpf:
            return sum((p[0] * q[1] - q[0] * p[1] for p, q in zip(ring, ring[1:] + ring[:1])), mpmath.mpf(0)) / 2

        ring, clip = polygon(a), polygon(b)
        areas = area(ring), area(clip)
        for (px, py), (qx, qy) in zip(clip, clip[1:] + clip[:1]):
            sides = [(qx - px) * (y - py) - (qy - py) * (x - px) for x, y in ring]
            made = []
            for (p, s), (q, t) in zip(zip(ring, sides), zip(ring[1:] + ring[:1], sides[1:] + sides[:1])):
                if s >= 0:
                    made.append(p)
                if (s >= 0) != (t >= 0):
                    made.append(tuple(u + (v - u) * s / (s - t) for u, v in zip(p, q)))
            ring = made
        shared = area(ring) if len(ring) > 2 else mpmath.mpf(0)
        return float(shared / (areas[0] + areas[1] - shared)) if shared > 0 else 0.0


def crowd(count: int, seed: int, spread: float = 200.0, form: str = "rotated") -> tuple[Tensor, Tensor, Tensor]:
    """Detections in clusters, with ties in score and exact doubles: boxes (N, 5 or 4), scores (N,), classes (N,)."""
    rng = np.random.default_rng(seed)
    objects = np.concatenate([rng.uniform(0, spread, (max(count // 8, 1), 2)),
                              rng.uniform(5, 40, (max(count // 8, 1), 2)), rng.uniform(0, 6, (max(count // 8, 1), 1))], 1)  # fmt: skip
    found = objects[rng.integers(0, len(objects), count)] + rng.normal(size=(count, 5)) * [3, 3, 2, 2, 0.15]
    found[:, 2:4] = np.abs(found[:, 2:4])
    found[: count // 10] = found[count - count // 10 :]
    scores = rng.uniform(0, 1, count)
    scores[::3] = scores[::3].round(1)
    if form == "xyxy":
        found = np.concatenate([found[:, :2] - found[:, 2:4] / 2, found[:, :2] + found[:, 2:4] / 2], 1)
    return torch.from_numpy(found), torch.from_numpy(scores), torch.from_numpy(rng.integers(0, 3, count))


def greedy_loop(
    overlap: Callable[[int, int], float], scores: Tensor, threshold: float, classes: Tensor | None = None
) -> list[int]:
    """Greedy suppression as it is told, pair by pair."""
    order = sorted(range(len(scores)), key=lambda i: -float(scores[i]))
    kept: list[int] = []
    dropped: set[int] = set()
    for place, i in enumerate(order):
        if i in dropped:
            continue
        kept.append(i)
        for j in order[place + 1 :]:
            if j not in dropped and (classes is None or classes[i] == classes[j]) and overlap(i, j) > threshold:
                dropped.add(j)
    return kept


def shapely_overlap(found: Tensor) -> Callable[[int, int], float]:
    """IoU of two of the rotated boxes (N, 5) or boxes (N, 4), by shapely."""
    values = found.numpy()
    shapes = list(shapely.polygons(corners(values)) if values.shape[1] == 5 else shapely.box(*values.T))
    areas = [shape.area for shape in shapes]

    def overlap(i: int, j: int) -> float:
        shared = shapes[i].intersection(shapes[j]).area
        return shared / (areas[i] + areas[j] - shared) if shared else 0.0

    return overlap


def soft_loop(
    boxes: Tensor, scores: Tensor, decay: Callable[[float], float], min_score: float, classes: Tensor | None
) -> list[tuple[int, float]]:
    """Soft-NMS as figure 2 of Bodla et al. tells it: (index, score) of the boxes taken."""
    overlap = shapely_overlap(boxes)
    left = {i: float(score) for i, score in enumerate(scores)}
    taken: list[tuple[int, float]] = []
    while left:
        best = max(left, key=lambda i: (left[i], -i))
        if left[best] <= min_score:
            break
        taken.append((best, left.pop(best)))
        for i in left:
            if classes is None or classes[i] == classes[best]:
                left[i] *= decay(overlap(best, i))
    return taken


def matrix_loop(iou: Tensor, scores: Tensor, sigma: float | None, classes: Tensor | None) -> list[float]:
    """Matrix NMS as section 3.3 of SOLOv2 tells it, box by box."""

    def f(u: float) -> float:
        return math.exp(-u * u / sigma) if sigma is not None else 1 - u

    order = sorted(range(len(scores)), key=lambda i: -float(scores[i]))
    overlap, kinds = iou.tolist(), [0] * len(scores) if classes is None else classes.tolist()
    found, worst = [0.0] * len(scores), {}
    for place, j in enumerate(order):
        above = [i for i in order[:place] if kinds[i] == kinds[j]]
        worst[j] = f(max((overlap[i][j] for i in above), default=0.0))
        decay = min((f(overlap[i][j]) / worst[i] for i in above if worst[i] > 0), default=1.0)
        found[j] = float(scores[j]) * min(decay, 1.0)
    return found


def masks(count: int, height: int, width: int, seed: int) -> Tensor:
    """Bool (count, height, width): empty, full, stripes, checkerboards, single pixels, frames, noise, blobs."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    made = []
    for i in range(count):
        kind = i % 10
        if kind < 2:
            mask = np.full((height, width), bool(kind))
        elif kind == 2:
            mask = (x if i % 20 < 10 else y) % 2 == i // 20 % 2
        elif kind == 3:
            mask = (x + y) % 2 == i // 10 % 2
        elif kind == 4:
            mask = (x == rng.integers(max(width, 1))) & (y == rng.integers(max(height, 1)))
        elif kind == 5:
            mask = np.minimum(np.minimum(x, width - 1 - x), np.minimum(y, height - 1 - y)) % 2 == 0
        elif kind < 8:
            mask = rng.random((height, width)) < rng.random()
        else:
            waves = sum(np.sin(x * rng.normal() / 3 + y * rng.normal() / 3 + rng.uniform(0, 6)) for _ in range(3))
            mask = waves > rng.normal()
        made.append(mask)
    return torch.from_numpy(np.stack(made))


def wild_rings(count: int, size: int, seed: int) -> list[np.ndarray]:
    """Rings of 3 to 9 points: self-crossing, doubled points, outside the image, on pixel corners and centres."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        ring = rng.uniform(-0.4, 1.4, (rng.integers(3, 10), 2)) * size * (1, 0.2, 5)[i % 3 if i % 5 == 0 else 0]
        if i % 4 == 1:
            ring = ring.round()
        elif i % 4 == 2:
            ring = (2 * ring).round() / 2
        if i % 7 == 0:
            ring[1] = ring[0]
        made.append(ring)
    return made


def simple_rings(count: int, size: int, seed: int) -> list[np.ndarray]:
    """Rings that shapely calls valid: star-shaped, half of them with corners on multiples of 1/2."""
    rng = np.random.default_rng(seed)
    made: list[np.ndarray] = []
    while len(made) < count:
        points = rng.integers(3, 10, 1)[0]
        angle = np.sort(rng.uniform(0, 2 * math.pi, (256, points)), 1)
        radius = rng.uniform(0.05, 0.6, (256, points)) * size
        rings = (
            np.stack([np.cos(angle), np.sin(angle)], -1) * radius[..., None] + rng.uniform(0.2, 0.8, (256, 1, 2)) * size
        )
        rings[::2] = (2 * rings[::2]).round() / 2
        made += list(rings[shapely.is_valid(shapely.polygons(rings))])
    return made[:count]
