"""Masks, polygons and run lengths against pycocotools and shapely; what goes around comes back."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import box_cases
import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco
from torch import Tensor

import dovetail.geometry as geo
from dovetail.errors import DataError, UserError

SIZES = [(1, 1), (1, 9), (8, 1), (6, 7), (33, 40), (0, 3), (3, 0)]
COCO128 = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco128"


def encoded(masks: Tensor) -> list:
    return coco.encode(np.asfortranarray(masks.numpy().astype(np.uint8).transpose(1, 2, 0)))


def shoelace(ring: Tensor) -> float:
    x, y = ring.unbind(1)
    return float((x * y.roll(-1) - x.roll(-1) * y).sum() / 2)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_run_lengths_are_bytes_of_pycocotools(height: int, width: int) -> None:
    masks = box_cases.masks(120, height, width, seed=1)
    ours, theirs = geo.rle_encode(masks), encoded(masks)
    assert ours == theirs
    assert geo.rle_encode(masks[3]) == theirs[3]
    listed = geo.rle_encode(masks, compressed=False)
    assert isinstance(listed, list)
    assert coco.frPyObjects(listed, height, width) == theirs
    text = [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in theirs]
    for form in (theirs, listed, text):
        assert torch.equal(geo.rle_decode(form), masks)
        assert geo.rle_area(form).tolist() == coco.area(theirs).tolist() == geo.mask_area(masks).tolist()
    assert torch.equal(geo.rle_decode(theirs[3]), masks[3]) and geo.rle_area(theirs[3]) == masks[3].sum()
    assert geo.rle_encode(masks[:0]) == []


def test_long_runs() -> None:
    """Runs of more than 2^20 pixels need five groups, and differences are negative."""
    masks = torch.zeros(2, 2**11, 2**11, dtype=torch.bool)
    masks[0, 7:], masks[1, :, 3] = True, True
    masks[1, 5, 2**10] = True
    assert geo.rle_encode(masks) == encoded(masks)
    assert torch.equal(geo.rle_decode(encoded(masks)), masks)


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(lambda size: arrays(np.bool_, size)))
def test_mask_to_anything_and_back(pixels: np.ndarray) -> None:
    mask = torch.from_numpy(pixels.copy())
    height, width = mask.shape
    assert geo.rle_encode(mask) == encoded(mask[None])[0]
    rings = geo.mask_to_polygons(mask)
    assert sum(shoelace(ring) for ring in rings) == float(mask.sum())
    assert torch.equal(geo.polygons_to_mask(rings, height, width), mask)
    box = geo.convert_boxes(geo.mask_to_box(mask), "xyxy", "xywh")
    assert box.tolist() == coco.toBbox(encoded(mask[None]))[0].tolist()


def test_rings_are_outlines_and_holes() -> None:
    """Against shapely's union of the pixels: the same region, outlines one way, holes the other, corners only."""
    for mask in box_cases.masks(60, 9, 11, seed=2):
        rings = geo.mask_to_polygons(mask)
        rows, columns = mask.nonzero().T.numpy()
        union = shapely.union_all(shapely.box(columns, rows, columns + 1, rows + 1))
        whole = [shapely.Polygon(ring) for ring in rings]
        outlines = [polygon for polygon, ring in zip(whole, rings) if shoelace(ring) > 0]
        assert sum(polygon.area for polygon in outlines) >= union.area
        assert sum(shapely.length(polygon) for polygon in whole) == shapely.length(union)
        for ring in rings:
            step = ring.roll(-1, 0) - ring
            assert ((step != 0).sum(1) == 1).all()  # along the axes
            assert ((step != 0) != (step.roll(-1, 0) != 0)).all()  # and turning at every corner
            assert ring.dtype == torch.float64
        kept = geo.mask_to_polygons(mask, min_area=2)
        assert len(kept) == sum(abs(shoelace(ring)) >= 2 for ring in rings)
    frame = torch.ones(5, 5, dtype=torch.bool)
    frame[2, 2] = False
    assert [shoelace(ring) for ring in geo.mask_to_polygons(frame)] == [25.0, -1.0]
    corners = torch.eye(3, dtype=torch.bool)
    assert [shoelace(ring) for ring in geo.mask_to_polygons(corners)] == [1.0, 1.0, 1.0]
    assert geo.mask_to_polygons(torch.zeros(4, 4)) == []


def test_coco_rule_is_pycocotools() -> None:
    height, width = 29, 37
    rings = box_cases.wild_rings(900, 35, seed=3)
    regions = [rings[i : i + 1 + i % 3] for i in range(0, 900, 3)]
    ours = geo.polygons_to_masks(regions, height, width, rule="coco")
    for region, mask in zip(regions, ours):
        flat = [ring.reshape(-1).tolist() for ring in region]
        theirs = coco.merge(coco.frPyObjects(flat, height, width))
        assert geo.rle_encode(mask) == theirs
    assert torch.equal(
        geo.polygons_to_mask([r.reshape(-1).tolist() for r in regions[1]], height, width, rule="coco"), ours[1]
    )


def exact_centers(rings: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Even-odd in rational numbers; of centres on the outline, those at its left and upper side."""
    inside = np.zeros((height, width), dtype=bool)
    for ring in rings:
        points = [(Fraction(float(x)), Fraction(float(y))) for x, y in ring]
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1]):
            if y0 > y1:
                x0, y0, x1, y1 = x1, y1, x0, y0
            for r in range(height):
                y = r + Fraction(1, 2)
                if y0 <= y < y1:
                    x = x0 + (y - y0) * (x1 - x0) / (y1 - y0)
                    inside[r] ^= [c + Fraction(1, 2) >= x for c in range(width)]
    return inside


def test_center_rule_is_exact() -> None:
    rings = box_cases.wild_rings(120, 12, seed=4)
    regions = [rings[i : i + 2] for i in range(0, 120, 2)]
    ours = geo.polygons_to_masks(regions, 11, 13)
    for region, mask in zip(regions, ours.numpy()):
        assert np.array_equal(mask, exact_centers(region, 11, 13))


def test_center_rule_against_shapely() -> None:
    rings = box_cases.simple_rings(400, 16, seed=5)
    polygons = shapely.polygons([shapely.linearrings(ring) for ring in rings])
    x, y = (part.ravel() + 0.5 for part in np.meshgrid(range(16), range(16)))
    ours = geo.polygons_to_masks([[ring] for ring in rings], 16, 16).numpy().reshape(400, -1)
    for mask, polygon in zip(ours, polygons):
        inside, touching = shapely.contains_xy(polygon, x, y), shapely.intersects_xy(polygon, x, y)
        assert (inside <= mask).all() and (mask <= touching).all()


def test_neighbours_neither_overlap_nor_leave_a_gap() -> None:
    rng = np.random.default_rng(6)
    for points in (rng.uniform(0, 20, (40, 2)), rng.integers(0, 41, (40, 2)) / 2):
        frame = np.array([[-1, -1], [-1, 21], [21, 21], [21, -1]])
        triangles = shapely.delaunay_triangles(shapely.multipoints(np.concatenate([points, frame])))
        regions = [[np.array(part.exterior.coords)[:-1]] for part in triangles.geoms]
        assert (geo.polygons_to_masks(regions, 20, 20).sum(0) == 1).all()


def test_overlap_and_boxes_are_pycocotools() -> None:
    masks = box_cases.masks(60, 14, 11, seed=7)
    a, b = masks[:25], masks[20:]
    crowd = torch.rand(len(b)) < 0.5
    theirs = coco.iou(encoded(a), encoded(b), crowd.numpy().astype(np.uint8))
    assert np.array_equal(geo.mask_iou(a, b, crowd=crowd).numpy(), theirs)
    assert geo.mask_iou(a.float(), b.int()).tolist() == geo.mask_iou(a, b).tolist()
    boxes = geo.convert_boxes(geo.mask_to_box(masks), "xyxy", "xywh")
    assert np.array_equal(boxes.numpy(), coco.toBbox(encoded(masks)))
    assert geo.mask_to_box(torch.zeros(2, 0, 5)).tolist() == [[0.0] * 4] * 2


BAD = torch.full((3, 4), 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: geo.rle_encode(BAD), "neither 0 nor 1"),
        (lambda: geo.rle_encode(BAD * torch.nan), "neither 0 nor 1"),
        (lambda: geo.rle_encode(torch.zeros(4)), r"\(H, W\) or \(N, H, W\)"),
        (lambda: geo.mask_area(BAD), "neither 0 nor 1"),
        (lambda: geo.mask_iou(torch.zeros(1, 2, 2), torch.zeros(1, 2, 3)), "do not fit"),
        (lambda: geo.mask_to_polygons(torch.zeros(2, 3, 4)), "one mask"),
        (lambda: geo.rle_decode([]), "no run lengths"),
        (lambda: geo.rle_decode({"size": [2, 2]}), "keys size and counts"),
        (lambda: geo.rle_decode({"size": [2, 2], "counts": [3]}), "runs of 3 pixels"),
        (lambda: geo.rle_decode({"size": [2, 2], "counts": [6, -2]}), "some negative"),
        (lambda: geo.rle_decode({"size": [2, 2], "counts": b"4~"}), "no complete COCO code"),
        (lambda: geo.rle_decode({"size": [2, 2], "counts": "P"}), "no complete COCO code"),
        (lambda: geo.rle_decode({"size": [2, 2], "counts": b""}), "no complete COCO code"),
        (lambda: geo.rle_decode({"size": [2, 2], "counts": b"oooooooo0"}), r"2\^32"),
        (lambda: geo.rle_decode({"size": [2], "counts": [4]}), r"\[height, width\]"),
        (lambda: geo.rle_decode([{"size": [2, 2], "counts": [4]}, {"size": [4, 1], "counts": [4]}]), "unlike sizes"),
        (lambda: geo.polygons_to_mask([torch.zeros(2, 2)], 3, 3), r"ring of shape \(2, 2\)"),
        (lambda: geo.polygons_to_mask([[1.0, 2, 3]], 3, 3), "ring of shape"),
        (lambda: geo.polygons_to_mask([torch.full((3, 2), torch.nan)], 3, 3), "NaN"),
        (lambda: geo.polygons_to_mask([torch.full((3, 2), 1e9)], 3, 3), "beyond"),
        (lambda: geo.polygons_to_mask([["a", "b"]], 3, 3), "no tensor"),
        (lambda: geo.polygons_to_mask([torch.zeros(3, 2)], -1, 3), "mask of -1 x 3"),
        (lambda: geo.polygons_to_mask([torch.zeros(3, 2)], 2**20, 2**20), "mask of 1048576 x 1048576"),
        (lambda: geo.rle_decode({"size": [2**20, 2**20], "counts": [2**40]}), "mask of 1048576 x 1048576"),
    ],
)
def test_what_is_refused(call: object, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        call()  # pyright: ignore[reportCallIssue]
    assert error.value.remedy


def test_unknown_rule() -> None:
    with pytest.raises(UserError, match="unknown rule 'centre'"):
        geo.polygons_to_mask([], 3, 3, rule="centre")  # pyright: ignore[reportArgumentType]


@pytest.mark.skipif(not (COCO128 / "images").is_dir(), reason="no ../shared/data/coco128")
def test_real_outlines_and_segments() -> None:
    """COCO's own polygons (as shares of the image) and panoptic segments: masks, run lengths, rings and boxes."""
    annotations = json.loads((COCO128 / "panoptic_segmentation/annotations/panoptic_val2017.json").read_text())
    sizes = {Path(image["file_name"]).stem: (image["height"], image["width"]) for image in annotations["images"]}
    seen = 0
    for file in sorted((COCO128 / "instance_segmentation/labels").rglob("*.txt"))[:10]:
        height, width = sizes[file.stem]
        rows = [list(map(float, line.split()[1:])) for line in file.read_text().splitlines()]
        regions = [[np.array(row).reshape(-1, 2) * (width, height)] for row in rows if len(row) >= 6]
        theirs = coco.frPyObjects([region[0].reshape(-1).tolist() for region in regions], height, width)
        masks = geo.polygons_to_masks(regions, height, width, rule="coco")
        assert geo.rle_encode(masks) == theirs
        assert torch.equal(geo.rle_decode(theirs), masks)
        centers = geo.polygons_to_masks(regions, height, width)
        assert geo.mask_iou(masks, centers).diagonal()[geo.mask_area(masks) > 500].min() > 0.9
        boxes = geo.convert_boxes(geo.mask_to_box(masks), "xyxy", "xywh")
        assert np.array_equal(boxes.numpy(), coco.toBbox(theirs))
        for mask in masks[:4]:
            assert torch.equal(geo.polygons_to_mask(geo.mask_to_polygons(mask), height, width), mask)
        seen += len(regions)
    assert seen > 20
