"""Exact ground: points and polygons of the plane, on batched tensors.

One convention for the whole room:

- Points are real tensors whose last dimension is (x, y); y points upwards where "counter-clockwise" is said (with y
  downwards, as in images, it reads "clockwise"). Units are those of the coordinates. Any real dtype may come in; it is
  converted to float64 (exactly, but for integers beyond 2^53) and results are float64.
- A set of points or a polygon is (..., N, 2). Leading dimensions are a batch. Polygons are open: the last vertex is
  joined to the first and does not repeat it. Either orientation is accepted; results are counter-clockwise.
- Where rows differ in size they are padded: `count` (...,) int64 says how many points come first in each row; what
  lies behind is never looked at. Without `count` every row is full. Results are `Polygons(points, count)`, as long as
  the longest row; their padding repeats the row's first point (zero in an empty row), so that a sum over all edges is
  right without a mask.
- Predicates (orientation, contains, intersect) are exact for every float64 input. Measures and constructions state
  their error in units of 2^-53.
- Axis-aligned boxes are the exception in dtype: they keep theirs, as losses are made of them (see `boxes`).
- Axis-aligned boxes are the exception in dtype: they keep theirs, as losses are made of them (see `boxes`).
- Areas, centroids and shared areas of points and polygons pass gradients to the coordinates; hulls, circles, closest
  pairs, calipers and locations are computed without.
- NaN, infinity and coordinates beyond 2^250 are refused with DataError, as is every malformed argument.
"""

from __future__ import annotations

from dovetail.geometry.batch import Pair, Polygons
from dovetail.geometry.boxes import (
    box_area,
    box_iou,
    complete_box_iou,
    convert_boxes,
    distance_box_iou,
    generalized_box_iou,
)
from dovetail.geometry.calipers import Rectangle, Strip, diameter, min_area_rectangle, width
from dovetail.geometry.circle import Circle, smallest_circle
from dovetail.geometry.clipping import intersection_area, polygon_intersection
from dovetail.geometry.closest import closest_pair
from dovetail.geometry.half_planes import half_plane_intersection
from dovetail.geometry.hull import convex_hull
from dovetail.geometry.masks import (
    mask_area,
    mask_iou,
    mask_to_box,
    mask_to_polygons,
    polygons_to_mask,
    polygons_to_masks,
)
from dovetail.geometry.nms import matrix_nms, nms, soft_nms
from dovetail.geometry.overlay import simple_intersection
from dovetail.geometry.polygons import (
    polygon_area,
    polygon_centroid,
    polygon_contains,
    polygon_location,
    signed_area,
)
from dovetail.geometry.predicates import doubled_area, orientation
from dovetail.geometry.rle import rle_area, rle_decode, rle_encode
from dovetail.geometry.rotated import (
    corners_to_rotated,
    rotated_bounds,
    rotated_intersection,
    rotated_iou,
    rotated_nms,
    rotated_to_corners,
)
from dovetail.geometry.segments import segment_intersection, segments_intersect
from dovetail.geometry.shapes import Shape, parse_shapes, read_shapes
from dovetail.geometry.simplify import simplify
from dovetail.geometry.vectors import angle, cross, dot

__all__ = [
    "Circle", "Pair", "Polygons", "Rectangle", "Shape", "Strip", "angle", "box_area", "box_iou", "closest_pair",
    "complete_box_iou", "convert_boxes", "convex_hull", "corners_to_rotated", "cross", "diameter",
    "distance_box_iou", "dot", "doubled_area", "generalized_box_iou", "half_plane_intersection",
    "intersection_area", "mask_area", "mask_iou", "mask_to_box", "mask_to_polygons", "matrix_nms",
    "min_area_rectangle", "nms", "orientation", "parse_shapes", "polygon_area", "polygon_centroid",
    "polygon_contains", "polygon_intersection", "polygon_location", "polygons_to_mask", "polygons_to_masks",
    "read_shapes", "rle_area", "rle_decode", "rle_encode", "rotated_bounds", "rotated_intersection", "rotated_iou",
    "rotated_nms", "rotated_to_corners", "segment_intersection", "segments_intersect", "signed_area",
    "simple_intersection", "simplify", "smallest_circle", "soft_nms", "width",
]  # fmt: skip
