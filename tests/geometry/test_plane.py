"""Points and polygons against their oracles, on few of the cases of bench/geometry.py, and by hypothesis."""

from __future__ import annotations

import math
from fractions import Fraction as F
from itertools import pairwise
from typing import Any

import numpy as np
import plane_cases as cases
import plane_exact as exact
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plane_agreement import CHECKS

import dovetail.geometry as geo
from dovetail.errors import DataError

ULP = 2.0**-52
SQUARE = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]], dtype=torch.float64)
FEW = {"area_and_centroid": 300, "simple_intersection": 400, "polygon_intersection": 300, "half_planes": 300}


@pytest.mark.parametrize("name", CHECKS)
def test_agrees_with_its_oracle(name: str) -> None:
    found = CHECKS[name](FEW.get(name, 600), 11)
    assert found.worst <= found.tolerance


# Numbers that meet: small integers, tenths, and neighbours of both.
meeting = st.builds(lambda k, unit, ulps: k * unit + ulps * math.ulp(k * unit), st.integers(-4, 4), st.sampled_from([1.0, 0.1, 1e-30]), st.integers(-1, 1))  # fmt: skip
point = st.tuples(meeting, meeting)
quick = settings(max_examples=60, deadline=None)


def tensor(points: Any) -> torch.Tensor:
    return torch.tensor(points, dtype=torch.float64)


@quick
@given(st.tuples(point, point, point))
def test_orientation_has_the_exact_sign_whatever_the_order(p: Any) -> None:
    sign = exact.sign(exact.turn(*[(F(x), F(y)) for x, y in p]))
    a, b, c = tensor(p)
    assert [int(geo.orientation(*t)) for t in ((a, b, c), (b, c, a), (c, b, a))] == [sign, sign, -sign]


@quick
@given(st.tuples(point, point), st.tuples(point, point))
def test_segments_meet_where_rational_numbers_say(p: Any, q: Any) -> None:
    true = exact.common(*[(F(x), F(y)) for x, y in (*p, *q)])
    assert bool(geo.segments_intersect(tensor(p), tensor(q))) == bool(true)
    found = geo.segment_intersection(tensor(q), tensor(p))
    assert int(found.count) == len(true)
    for (x, y), (u, v) in zip(found.points.tolist(), true):
        assert max(abs(F(x) - u), abs(F(y) - v)) <= 8 * 2.0**-53 * 4.1


@quick
@given(st.lists(point, min_size=1, max_size=9))
def test_a_hull_is_the_exact_one_and_its_own_hull(p: Any) -> None:
    hull = geo.convex_hull(tensor(p)).points
    true = [(F(x), F(y)) for x, y in p]
    want = exact.hull(true) or sorted(set(true))
    assert set(exact.rational(hull.numpy())) == set(want)
    assert torch.equal(geo.convex_hull(hull.flip(0)).points, hull)
    many = geo.convex_hull(tensor([p, p[::-1]] * 40))  # as a batch, in step
    assert torch.equal(many.points, hull.expand(80, -1, -1))


@quick
@given(st.lists(point, min_size=1, max_size=7))
def test_the_smallest_circle_and_rectangle_hold_every_point(p: Any) -> None:
    points = tensor(p)
    circle, rectangle = geo.smallest_circle(points), geo.min_area_rectangle(points)
    assert (torch.hypot(*(points - circle.center).T) <= circle.radius).all()
    width, diameter = float(geo.width(points).width), float(geo.diameter(points).distance)
    slack = 64 * 2.0**-53 * (diameter + float(points.abs().max())) + 1e-300
    assert diameter / 2 - slack <= float(circle.radius) <= diameter / math.sqrt(3) + slack  # Jung 1901
    w, h = rectangle.box[2:4].tolist()
    assert width - slack <= min(w, h) and max(w, h) <= diameter + slack


def test_naive_orientation_is_wrong_where_ours_is_right() -> None:
    """Kettner et al. 2008, figure 2: a patch of points around a line, one unit in the last place apart."""
    steps = torch.arange(64, dtype=torch.float64) * 2.0**-53
    c = torch.stack(torch.meshgrid(0.5 + steps, 0.5 + steps, indexing="ij"), -1)
    a, b = tensor([12.0, 12.0]), tensor([24.0, 24.0])
    ours = geo.orientation(a, b, c)
    naive = (a[0] - c[..., 0]) * (b[1] - c[..., 1]) - (a[1] - c[..., 1]) * (b[0] - c[..., 0])
    assert torch.equal(ours, (c[..., 1] - c[..., 0]).sign().to(torch.int8))
    assert int((naive.sign() != ours).sum()) > 100


def test_a_naive_hull_leaves_points_outside_and_ours_none() -> None:
    """Points of that patch with two far ones on its line: by rounded determinants a chain drops corners."""
    rng = np.random.default_rng(0)
    naive_wrong = 0
    for _ in range(200):
        p = torch.from_numpy(np.concatenate([0.5 + rng.integers(0, 64, (6, 2)) * 2.0**-53, [[12, 12], [24, 24]]]))
        chain: list[Any] = []
        for c in sorted(map(tuple, p.tolist())):
            while len(chain) > 1:
                a, b = chain[-2:]
                if (a[0] - c[0]) * (b[1] - c[1]) - (a[1] - c[1]) * (b[0] - c[0]) > 0:
                    break
                chain.pop()
            chain.append(c)
        naive_wrong += _outside([(F(x), F(y)) for x, y in chain], exact.rational(p))
        ours = exact.rational(geo.convex_hull(p).points)
        assert not _outside([*ours, ours[0]], exact.rational(p))
    assert naive_wrong > 20


def _outside(chain: list[exact.Point], points: list[exact.Point]) -> bool:
    """Whether a point lies to the right of an edge of the chain."""
    return any(exact.turn(a, b, q) < 0 for a, b in pairwise(chain) for q in points)


def test_naive_clipping_of_near_identical_boxes_and_ours() -> None:
    """Boxes that differ by rounding share their area: others report 0.585 to 0.600, 0.333 or -1.2e7 of it."""
    rng = np.random.default_rng(3)
    angle = rng.random(500) * 7
    w, h = np.array([[60.0], [2.5]]) * (1 + rng.random(500))
    corner = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    x, y = corner[:, 0] * w[:, None], corner[:, 1] * h[:, None]
    turned = np.stack([x * np.cos(angle)[:, None] - y * np.sin(angle)[:, None], x * np.sin(angle)[:, None] + y * np.cos(angle)[:, None]], -1)  # fmt: skip
    a = torch.from_numpy(turned + 300)
    for _ in range(5):
        b = torch.from_numpy(cases.jiggled(rng, a.numpy()))
        share = geo.intersection_area(a, b) / torch.from_numpy(w * h)
        assert (share - 1).abs().max() < 1e-12
        assert (geo.polygon_intersection(a.float(), a.float()).count == 4).all()


def test_padding_is_never_looked_at_and_batches_equal_single_rows() -> None:
    rng = np.random.default_rng(5)
    sets, count = cases.point_sets(rng, 90, 6)[::9], cases.counts(rng, 10, 6, 2)
    other = torch.from_numpy(sets[::-1].copy())
    padded = torch.from_numpy(sets).reshape(2, 5, 6, 2).clone()
    number = torch.from_numpy(count).reshape(2, 5)
    padded[torch.arange(6) >= number[..., None]] = torch.nan
    runs: list[Any] = [
        geo.signed_area, geo.polygon_centroid, geo.convex_hull, geo.diameter, geo.width, geo.min_area_rectangle,
        geo.smallest_circle, geo.closest_pair,
        lambda p, n=None: geo.simplify(p, 0.05, n), lambda p, n=None: geo.polygon_location(p, other[0], n),
        lambda p, n=None: geo.intersection_area(p, SQUARE, n), lambda p, n=None: geo.polygon_intersection(p, SQUARE, n),
    ]  # fmt: skip
    for run in runs:
        many = run(padded, number)
        for i in range(2):
            for j in range(5):
                one = run(padded[i, j, : number[i, j]])
                for whole, single in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (many, one))):
                    part = whole[i, j]
                    if part.shape != single.shape:  # padded to the longest row by the first point
                        k = single.shape[0]
                        assert k == 0 or (part[k:] == part[0]).all()
                        part = part[:k]
                    assert torch.equal(part, single)


def test_pairs_of_two_batches_by_broadcasting() -> None:
    a, b = (torch.from_numpy(cases.convex(np.random.default_rng(i), n, 6)) for i, n in ((0, 5), (1, 7)))
    table = geo.intersection_area(a[:, None], b[None])
    assert table.shape == (5, 7)
    theirs = shapely.area(shapely.intersection(shapely.polygons(a.numpy())[:, None], shapely.polygons(b.numpy())))
    np.testing.assert_allclose(table, theirs, rtol=0, atol=1e-14)
    polygons = geo.polygon_intersection(a[:, None], b[None])
    torch.testing.assert_close(geo.polygon_area(*_at_least_one(polygons)), table, rtol=0, atol=1e-14)


def _at_least_one(p: geo.Polygons) -> geo.Polygons:
    return geo.Polygons(p.points, p.count.clamp(min=1))  # an empty row is zeros: of no area


def test_dented_subjects_have_the_right_area_and_dented_clips_are_refused() -> None:
    dented = tensor([[0.0, 0], [4, 0], [4, 3], [2, 1], [0, 3]])
    window = tensor([[-1.0, 2], [5, 2], [5, 4], [-1, 4]])
    assert float(geo.intersection_area(dented, window)) == 1.0
    pieces = geo.simple_intersection(dented, window)
    assert pieces.count.tolist() == [3, 3] and geo.polygon_area(*pieces).tolist() == [0.5, 0.5]
    with pytest.raises(DataError, match="not convex") as error:
        geo.polygon_intersection(window, dented)
    assert "simple_intersection" in str(error.value)
    around = torch.arange(5) * 4 * math.pi / 5
    with pytest.raises(DataError, match="not convex"):
        geo.polygon_intersection(window, torch.stack([around.cos(), around.sin()], -1))
    with pytest.raises(DataError, match="touches or crosses itself"):
        geo.simple_intersection(window, torch.stack([around.cos(), around.sin()], -1))


def test_touching_polygons_share_nothing() -> None:
    for shift in ([1.0, 0], [1, 1], [0, -1], [3, 0]):
        assert int(geo.polygon_intersection(SQUARE, SQUARE + tensor(shift)).count) == 0
        assert not geo.simple_intersection(SQUARE, SQUARE + tensor(shift)).count.numel()
    assert geo.simple_intersection(SQUARE, SQUARE.flip(0)).points.tolist() == [SQUARE.tolist()]


@pytest.mark.parametrize("sort", ["uniform", "circle", "line", "column", "grid"])
def test_many_points(sort: str) -> None:
    """What a few points cannot show: long chains, deep recursion, crowded strips."""
    rng = np.random.default_rng(7)
    n = 3000
    angle = np.arange(n) * (2 * np.pi / n)
    points = {
        "uniform": rng.random((n, 2)),
        "circle": np.stack([np.cos(angle), np.sin(angle)], -1) + 3,
        "line": np.arange(n)[:, None] * np.array([1.0, 3.0]),
        "column": np.stack([np.zeros(n), rng.random(n)], -1),
        "grid": np.stack([np.arange(n) // 60, np.arange(n) % 60], -1) * 0.1,
    }[sort]
    p, theirs = torch.from_numpy(points), shapely.multipoints(points)
    hull = geo.convex_hull(p)
    assert float(geo.polygon_area(*hull)) == pytest.approx(theirs.convex_hull.area, rel=1e-12)
    radius = float(geo.smallest_circle(p).radius)
    assert radius == pytest.approx(shapely.minimum_bounding_radius(theirs), rel=1e-12)
    tree = shapely.STRtree(shapely.points(points))
    _, near = tree.query_nearest(shapely.points(points), exclusive=True, return_distance=True)
    assert float(geo.closest_pair(p).distance) == pytest.approx(near.min(), rel=1e-15)
    corners = hull.points.numpy()
    far = np.hypot(*np.moveaxis(corners[:, None] - corners, -1, 0)).max()
    assert float(geo.diameter(p).distance) == pytest.approx(far, rel=1e-15)
    box = geo.min_area_rectangle(p).box
    assert float(box[2] * box[3]) == pytest.approx(shapely.oriented_envelope(theirs).area, rel=1e-9, abs=1e-9)
    if sort in ("circle", "grid"):  # points equally far by symmetry, of which either may stay
        return
    line = shapely.simplify(shapely.linestrings(points), 0.3, preserve_topology=False)
    assert np.array_equal(geo.simplify(p, 0.3).points.numpy(), shapely.get_coordinates(line))


def test_unbounded_half_planes_end_at_the_window() -> None:
    window = tensor([-5.0, -5, 5, 5])
    right = geo.half_plane_intersection(tensor([[-1.0, 0, 0]]), window)  # x >= 0
    assert float(geo.polygon_area(*right)) == 50
    nothing = geo.half_plane_intersection(tensor([[-1.0, 0, 0], [1, 0, -1]]), window)  # and x <= -1
    assert int(nothing.count) == 0
    assert int(geo.half_plane_intersection(tensor([[0.0, 0, -1]]), window).count) == 0
    with pytest.raises(DataError, match="window is empty"):
        geo.half_plane_intersection(tensor([[1.0, 0, 0]]), -window)


@pytest.mark.parametrize(
    "call",
    [
        lambda: geo.polygon_area(torch.zeros(4, 3)),
        lambda: geo.polygon_area(torch.zeros(4)),
        lambda: geo.polygon_area(torch.full((4, 2), torch.nan)),
        lambda: geo.polygon_area(torch.full((4, 2), 1e300, dtype=torch.float64)),
        lambda: geo.polygon_area(torch.zeros(2, 4, 2), torch.tensor([4])),
        lambda: geo.polygon_area(torch.zeros(2, 4, 2), torch.tensor([4, 5])),
        lambda: geo.polygon_area(torch.zeros(2, 4, 2), torch.tensor([4.0, 4.0])),
        lambda: geo.convex_hull(torch.zeros(2, 4, 2), torch.tensor([4, 0])),
        lambda: geo.closest_pair(torch.zeros(1, 2)),
        lambda: geo.segments_intersect(torch.zeros(3, 2), torch.zeros(3, 2)),
        lambda: geo.half_plane_intersection(torch.zeros(3, 2), torch.zeros(4)),
        lambda: geo.half_plane_intersection(torch.zeros(3, 3), torch.tensor([0.0, 0, 1, 1]), torch.tensor(4)),
        lambda: geo.simplify(torch.zeros(3, 2), -1.0),
        lambda: geo.simplify(torch.zeros(2, 3, 2), torch.zeros(3)),
        lambda: geo.simple_intersection(torch.zeros(2, 3, 2), SQUARE),
        lambda: geo.cross(torch.zeros(3), torch.zeros(2)),
    ],
)
def test_what_is_malformed_is_refused(call: Any) -> None:
    with pytest.raises(DataError):
        call()


def test_areas_pass_gradients() -> None:
    rng = np.random.default_rng(2)
    a, b = (torch.from_numpy(cases.convex(rng, 6, 4)).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(geo.intersection_area, (a, b))
    assert torch.autograd.gradcheck(geo.polygon_area, (a,))
    assert torch.autograd.gradcheck(geo.polygon_centroid, (a,))


def test_angles() -> None:
    east, north, west = tensor([1.0, 0]), tensor([0.0, 2]), tensor([-3.0, -0.0])
    found = [float(geo.angle(*v)) for v in ((east, north), (north, east), (east, west), (west, east), (0 * west, east))]
    assert found == [math.pi / 2, -math.pi / 2, math.pi, math.pi, 0]
