"""Boxes, rotated boxes, masks, polygons and run lengths against their oracles, 10^5 cases each; rotated NMS's speed.

`python bench/boxes.py CHECK ...` runs some of it, and keeps rows of checks that are not named as they stand in the result
file. The cases (ordinary and adversarial) and oracles are those of tests/geometry. Where shapely and 60-digit arithmetic differ, the latter is right.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools
import shapely
import torch
from common import interleaved, main, row, write
from pycocotools import mask as coco

import dovetail.geometry as geo

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "geometry"))

import box_cases  # noqa: E402

BENCHMARK = {
    "threads": 1,
    "packages": {"shapely": "shapely", "pycocotools": "pycocotools", "mpmath": "mpmath"},
    "minutes": 15,
}
CASES, AT_ONCE, SEED = 100_000, 5_000, 6
SHAPELY = f"shapely {shapely.__version__}"
COCO = f"pycocotools {getattr(pycocotools, '__version__', '2.0')}"
THRESHOLDS = (0.0, 0.2931, 0.5177, 0.9013)  # far from every IoU of the cases but 0 and 1


def seeds(cases: int) -> Iterator[int]:
    """A seed for each batch of `AT_ONCE` cases."""
    return iter(range(SEED, SEED + cases // AT_ONCE))


def agreement(
    case: str, worst: float, tolerance: float, oracle: str, cases: int = CASES, metric: str = "worst error", **more: Any
) -> dict[str, Any]:
    """A row. Raises AssertionError where the worst error exceeds the tolerance, or is NaN."""
    assert worst <= tolerance, (case, worst, tolerance)
    return {
        "case": case, "metric": metric, "ours": float(worst), "peer": "tolerance", "theirs": tolerance,
        "ratio": round(tolerance / worst, 3) if worst else None, "cases": cases, "seed": SEED, "oracle": oracle, **more,
    }  # fmt: skip


def measures() -> list[dict[str, Any]]:
    """The four IoUs of axis-aligned boxes in both dtypes."""
    rows = []
    for dtype, units in ((torch.float64, 2.0**-52), (torch.float32, 2.0**-23)):
        worst = dict.fromkeys(("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou"), 0.0)
        for seed in seeds(CASES):
            a, b, _ = box_cases.boxes(AT_ONCE, seed)
            a, b = a.to(dtype), b.to(dtype)
            exact = box_cases.exact_box_measures(a.double(), b.double())
            for name in worst:
                off = np.abs(getattr(geo, name)(a, b, pairwise=False).double().numpy() - exact[name])
                worst[name] = max(worst[name], float(off.max()) / units)
        limits = {"box_iou": 8, "complete_box_iou": 64}
        rows += [
            agreement(f"{name}, {str(dtype)[6:]}", w, limits.get(name, 16), SHAPELY, metric="worst error, eps")
            for name, w in worst.items()
        ]
    return rows


def conversions() -> list[dict[str, Any]]:
    """xywh -> every other format and back, relative to the largest coordinate."""
    worst = 0.0
    for seed in seeds(CASES):
        boxes = geo.convert_boxes(box_cases.boxes(AT_ONCE, seed)[0], "xyxy", "xywh")
        scale = boxes.abs().amax(1, keepdim=True).clamp(min=1e-300)
        for form in ("xyxy", "cxcywh"):
            back = geo.convert_boxes(geo.convert_boxes(boxes, "xywh", form), form, "xywh")
            worst = max(worst, float(((back - boxes).abs() / scale).max()) / 2.0**-52)
    return [agreement("convert_boxes there and back", worst, 4, "itself", metric="worst error, eps")]


def overlap() -> list[dict[str, Any]]:
    """Rotated IoU: shapely on all, 60 digits where the two differ and on the first ones."""
    worst, wrong, theirs = 0.0, 0, 0.0
    for seed in seeds(CASES):
        a, b, _ = box_cases.rotated(AT_ONCE, seed)
        found, exact = geo.rotated_iou(a, b, pairwise=False).numpy(), box_cases.exact_rotated_iou(a, b)
        assert np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1
        for i in np.flatnonzero(np.abs(found - exact) > 1e-12):
            right = box_cases.precise_rotated_iou(a[i].tolist(), b[i].tolist())
            off = abs(exact[i] - right)
            wrong, theirs, exact[i] = wrong + (off > 1e-9), max(theirs, off), right
        worst = max(worst, float(np.abs(found - exact).max()))
    rows = [agreement("rotated_iou", worst, 2e-12, f"{SHAPELY}; 60 digits where it is off by more than 1e-12",
                      **{"its wrong answers": int(wrong), "its worst error": theirs})]  # fmt: skip
    a, b, _ = box_cases.rotated(3000, SEED)
    found = geo.rotated_iou(a, b, pairwise=False).tolist()
    worst = max(abs(box_cases.precise_rotated_iou(*pair) - x) for *pair, x in zip(a.tolist(), b.tolist(), found))
    return [*rows, agreement("rotated_iou, all kinds", worst, 1e-14, "mpmath, 60 digits", cases=3000)]


def suppression() -> list[dict[str, Any]]:
    """Keep sets of nms and rotated_nms in crowds of 200, thresholds in turn, with classes in every other one."""
    rows = []
    for name, form in (("nms", "xyxy"), ("rotated_nms", "rotated")):
        unlike = 0
        for i in range(CASES // 200):
            boxes, scores, classes = box_cases.crowd(200, SEED + i, (40.0, 120.0, 400.0)[i % 3], form)
            kinds = classes if i % 2 else None
            threshold = THRESHOLDS[i // 2 % 4]
            kept = getattr(geo, name)(boxes, scores, threshold, classes=kinds).tolist()
            unlike += kept != box_cases.greedy_loop(box_cases.shapely_overlap(boxes), scores, threshold, kinds)
        rows.append(agreement(f"{name}, keep sets", unlike, 0, f"loop with {SHAPELY}", metric="unlike sets"))
    return rows


def softened() -> list[dict[str, Any]]:
    """soft_nms and matrix_nms in crowds of 50: scores, and the order of what is taken."""
    worst = {"soft_nms": 0.0, "matrix_nms": 0.0}
    for i in range(CASES // 50):
        boxes, scores, classes = box_cases.crowd(50, SEED + i, 60.0, "xyxy")
        kinds = classes if i % 2 else None
        sigma = 0.5 if i // 2 % 2 else None
        loop = box_cases.matrix_loop(geo.box_iou(boxes, boxes), scores, sigma, kinds)
        found = geo.matrix_nms(geo.box_iou(boxes, boxes), scores, sigma=sigma, classes=kinds)
        worst["matrix_nms"] = max(
            worst["matrix_nms"], float((found - torch.tensor(loop, dtype=torch.float64)).abs().max())
        )
        scores = torch.from_numpy(np.random.default_rng(SEED + i).permutation(50) / 50 + 0.01)
        given: dict[str, float] = {"iou_threshold": 0.2931} if sigma is None else {"sigma": sigma}
        decay: Callable[[float], float] = (
            (lambda u: 1 - u if u > 0.2931 else 1.0) if sigma is None else (lambda u: math.exp(-u * u / 0.5))
        )
        index, values = geo.soft_nms(boxes, scores, min_score=0.05, classes=kinds, **given)
        taken = box_cases.soft_loop(boxes, scores, decay, 0.05, kinds)
        assert index.tolist() == [i for i, _ in taken]
        off = (values - torch.tensor([s for _, s in taken], dtype=torch.float64)).abs()
        worst["soft_nms"] = max(worst["soft_nms"], float(off.max()))
    return [
        agreement("soft_nms", worst["soft_nms"], 1e-12, f"loop with {SHAPELY}"),
        agreement("matrix_nms", worst["matrix_nms"], 1e-12, "loop"),
    ]


def encoded(masks: torch.Tensor) -> list[Any]:
    return coco.encode(np.asfortranarray(masks.numpy().astype(np.uint8).transpose(1, 2, 0)))


def run_lengths() -> list[dict[str, Any]]:
    """Bytes, decoding, areas and boxes; IoU of all pairs of 320 masks."""
    unlike = {"rle_encode": 0, "rle_decode": 0, "rle_area, mask_area": 0, "mask_to_box": 0}
    for seed in seeds(CASES):
        height, width = (1, 17) if seed % 4 == 0 else (11, 13) if seed % 2 else (24, 9)
        masks = box_cases.masks(AT_ONCE, height, width, seed)
        ours, theirs = geo.rle_encode(masks), encoded(masks)
        unlike["rle_encode"] += sum(a != b for a, b in zip(ours, theirs))
        unlike["rle_decode"] += int((geo.rle_decode(theirs) != masks).flatten(1).any(1).sum())
        areas = np.concatenate([coco.area(theirs[i : i + 200]) for i in range(0, AT_ONCE, 200)])  # fails beyond 255
        off = (geo.rle_area(theirs).numpy() != areas) | (geo.mask_area(masks).numpy() != areas)
        unlike["rle_area, mask_area"] += int(off.sum())
        boxes = geo.convert_boxes(geo.mask_to_box(masks), "xyxy", "xywh").numpy()
        unlike["mask_to_box"] += int((boxes != coco.toBbox(theirs)).any(1).sum())
    rows = [agreement(name, n, 0, COCO, metric="unlike results") for name, n in unlike.items()]
    masks, crowd = (
        box_cases.masks(320, 24, 20, SEED),
        torch.rand(320, generator=torch.Generator().manual_seed(SEED)) < 0.5,
    )
    theirs = coco.iou(encoded(masks), encoded(masks), crowd.numpy().astype(np.uint8))
    worst = float(np.abs(geo.mask_iou(masks, masks, crowd=crowd).numpy() - theirs).max())
    return [*rows, agreement("mask_iou, crowds among them", worst, 0, COCO, cases=320 * 320)]


def outlines() -> list[dict[str, Any]]:
    """Rings of masks: their areas sum to the pixels, and drawn they are the mask."""
    unlike, apart = 0, 0.0
    for seed in seeds(CASES):
        masks = box_cases.masks(AT_ONCE, 9, 11, seed)
        regions = [geo.mask_to_polygons(mask) for mask in masks]
        unlike += int((geo.polygons_to_masks(regions, 9, 11) != masks).flatten(1).any(1).sum())
        areas = [
            sum(float((p[:, 0] * p[:, 1].roll(-1) - p[:, 0].roll(-1) * p[:, 1]).sum()) / 2 for p in r) for r in regions
        ]
        apart = max(apart, float((torch.tensor(areas) - geo.mask_area(masks)).abs().max()))
    return [
        agreement("mask_to_polygons, drawn again", unlike, 0, "the mask", metric="unlike masks"),
        agreement("mask_to_polygons, area", apart, 0, "pixels set"),
    ]


def polygons() -> list[dict[str, Any]]:
    """Both rules: pycocotools bit for bit; shapely's contains at every pixel centre."""
    unlike = {"coco": 0, "center": 0}
    x, y = (part.ravel() + 0.5 for part in np.meshgrid(range(12), range(12)))
    for seed in seeds(CASES):
        rings = box_cases.wild_rings(AT_ONCE, 20, seed)
        ours = geo.rle_encode(geo.polygons_to_masks([[ring] for ring in rings], 17, 19, rule="coco"))
        theirs = coco.frPyObjects([ring.reshape(-1).tolist() for ring in rings], 17, 19)
        unlike["coco"] += sum(a != b for a, b in zip(ours, theirs))
        rings = box_cases.simple_rings(AT_ONCE, 12, seed)
        shapes = shapely.polygons([shapely.linearrings(ring) for ring in rings])
        shapely.prepare(shapes)
        masks = geo.polygons_to_masks([[ring] for ring in rings], 12, 12).flatten(1).numpy()
        inside = shapely.contains_xy(shapes[:, None], x, y)
        touching = inside.copy()
        doubtful = masks != inside  # may differ on the outline only
        rows, columns = doubtful.nonzero()
        touching[rows, columns] = shapely.intersects_xy(shapes[rows], x[columns], y[columns])
        unlike["center"] += int(((masks < inside) | (masks > touching)).any(1).sum())
    return [
        agreement('polygons_to_masks, rule="coco"', unlike["coco"], 0, COCO, metric="unlike masks"),
        agreement('polygons_to_masks, rule="center"', unlike["center"], 0, SHAPELY, metric="unlike masks"),
    ]


def speed() -> list[dict[str, Any]]:
    """Rotated NMS against the greedy loop over shapely's polygons, which are built before the clock starts."""
    rows = []
    for count, spread, rounds in ((1000, 1000.0, 5), (5000, 2000.0, 3), (10_000, 4000.0, 1)):
        boxes, scores, _ = box_cases.crowd(count, SEED, spread)
        overlaps = box_cases.shapely_overlap(boxes)
        kept: dict[str, list[int]] = {}

        def ours(boxes: torch.Tensor = boxes, scores: torch.Tensor = scores, kept: dict[str, list[int]] = kept) -> None:
            kept["ours"] = geo.rotated_nms(boxes, scores, 0.3173).tolist()

        def loop(scores: torch.Tensor = scores, overlaps: Any = overlaps, kept: dict[str, list[int]] = kept) -> None:
            kept["loop"] = box_cases.greedy_loop(overlaps, scores, 0.3173)

        ours()
        times = interleaved({"ours": ours, "loop": loop}, rounds=rounds, warmup=0)
        assert kept["ours"] == kept["loop"]
        (mine, spread_of), (theirs, _) = times["ours"], times["loop"]
        rows.append(
            row(f"rotated_nms, {count} boxes", "seconds", mine, theirs, f"greedy loop, {SHAPELY}", smaller=True,
                spread=spread_of, cases=rounds, seed=SEED, oracle=f"same {len(kept['ours'])} boxes kept", target_ratio=50)
        )  # fmt: skip
    return rows


CHECKS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "measures": measures, "conversions": conversions, "overlap": overlap, "suppression": suppression,
    "softened": softened, "run_lengths": run_lengths, "outlines": outlines, "polygons": polygons, "speed": speed,
}  # fmt: skip


def check() -> None:
    """What is timed: a crowd of a thousand boxes keeps the same. The other rows are comparisons themselves."""
    boxes, scores, _ = box_cases.crowd(1000, SEED, 1000.0)
    kept = box_cases.greedy_loop(box_cases.shapely_overlap(boxes), scores, 0.3173)
    assert geo.rotated_nms(boxes, scores, 0.3173).tolist() == kept, "rotated_nms and the greedy loop keep others"


def measure() -> Iterator[dict[str, Any]]:
    for name, one in CHECKS.items():
        for entry in one():
            yield entry | {"check": name}


if __name__ == "__main__":
    if not set(sys.argv[1:]) & set(CHECKS):
        main(__file__)
    torch.set_num_threads(1)
    file = ROOT / "docs" / "results" / "boxes.json"
    found = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    for name in sys.argv[1:]:
        start = time.perf_counter()
        made = [entry | {"check": name} for entry in CHECKS[name]()]
        print(f"{name}: {time.perf_counter() - start:.0f} s")
        found = [entry for entry in found if entry["check"] != name] + made
        found.sort(key=lambda entry: list(CHECKS).index(entry["check"]))
        write("boxes", found, "dovetail bench boxes")
