"""`dovetail algo geometry`: the measures of points, lines and polygons, and a picture of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dovetail.cli.algo import algo
from dovetail.cli.checks import check_out
from dovetail.cli.inspect import Json
from dovetail.cli.machine import to_json
from dovetail.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dovetail.geometry import Shape

console = Console()


@algo.command()
def geometry(
    shapes: Annotated[Path, typer.Argument(help="POLYGON ((0 0, 1 0, 0 1)) a line, GeoJSON, or two numbers a line.")],
    tolerance: Annotated[
        float | None, typer.Option(help="Also simplify lines and polygons to within this distance.")
    ] = None,
    draw: Annotated[Path | None, typer.Option("--draw", help="Write a picture: FILE.svg or FILE.png.")] = None,
    as_json: Json = False,
) -> None:
    """Area, hull, diameter, width, smallest rectangle and circle, closest pair, intersections; a picture of them."""
    from dovetail.geometry import read_shapes

    found = read_shapes(shapes)
    if tolerance is not None and all(shape.kind == "points" for shape in found):
        raise UserError("--tolerance simplifies lines and polygons; here are only points", remedy="leave it out")
    if draw is not None and draw.suffix.lower() not in (".svg", ".png"):
        raise UserError(f"no picture of the kind {draw.suffix!r}", where="--draw", remedy="name it .svg or .png")
    if draw is not None:
        check_out(draw.parent, "--draw")
    measures = [measured(shape, tolerance) for shape in found]
    meets = intersections(found)
    if draw is not None:
        draw.parent.mkdir(parents=True, exist_ok=True)
        drawn(found).savefig(draw, dpi=150)
    if as_json:
        print(to_json({"shapes": measures, "intersections": meets} | ({"picture": str(draw)} if draw else {})))
        return
    for i, measure in enumerate(measures):
        table = Table(box=None, show_header=False, title=f"{i}: {measure.pop('kind')}", title_justify="left")
        for name, value in measure.items():
            table.add_row(name.replace("_", " "), _text(value))
        console.print(table)
    for meet in meets:
        a, b = meet["of"]
        console.print(f"{a} and {b} share {meet['area']:.6g} in {len(meet['pieces'])} piece(s)", highlight=False)
    if draw is not None:
        print(f"picture: {draw}")


def measured(shape: Shape, tolerance: float | None = None) -> dict[str, Any]:
    """Name -> number, or list of numbers, of one shape; lengths in units of its coordinates."""
    from dovetail import geometry as geo

    p = shape.points
    result: dict[str, Any] = {"kind": shape.kind, "points": len(p)}
    if shape.kind == "polygon":
        signed = float(geo.signed_area(p))
        way = "counter-clockwise" if signed > 0 else "clockwise"
        result |= {"area": abs(signed), "direction": way, "centroid": geo.polygon_centroid(p).tolist()}
    if shape.kind == "line":
        result["length"] = float((p[1:] - p[:-1]).norm(dim=-1).sum())
    if tolerance is not None and shape.kind != "points":
        ring = p if shape.kind == "line" else p[[*range(len(p)), 0]]
        line = geo.simplify(ring, tolerance).points
        result["simplified"] = (line if shape.kind == "line" else line[:-1]).tolist()
    hull, across, strip = geo.convex_hull(p), geo.diameter(p), geo.width(p)
    box, circle = geo.min_area_rectangle(p).box, geo.smallest_circle(p)
    result |= {
        "hull": hull.points.tolist(),
        "hull_area": float(geo.polygon_area(*hull)),
        "diameter": float(across.distance),
        "width": float(strip.width),
        "rectangle": dict(zip(("cx", "cy", "w", "h", "angle"), box.tolist(), strict=True)),
        "circle": {"center": circle.center.tolist(), "radius": float(circle.radius)},
    }
    if shape.kind == "points" and len(p) > 1:
        pair = geo.closest_pair(p)
        result["closest_pair"] = {"points": pair.index.tolist(), "distance": float(pair.distance)}
    return result


def intersections(shapes: list[Shape]) -> list[dict[str, Any]]:
    """Of each two polygons with an area in common: which, that area, and the pieces it consists of."""
    from dovetail import geometry as geo

    polygons = [(i, shape.points) for i, shape in enumerate(shapes) if shape.kind == "polygon"]
    found = []
    for k, (i, a) in enumerate(polygons):
        for j, b in polygons[k + 1 :]:
            points, count = geo.simple_intersection(a, b)
            if len(count):
                pieces = [p[:n].tolist() for p, n in zip(points, count.tolist(), strict=True)]
                found.append({"of": [i, j], "area": float(geo.polygon_area(points, count).sum()), "pieces": pieces})
    return found


def drawn(shapes: list[Shape]) -> Figure:
    """The shapes; of point sets and lines the hull; of all but intersecting polygons rectangle, circle, diameter."""
    from matplotlib.figure import Figure

    from dovetail.report.plots import COLOURS

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    meets = intersections(shapes)
    for i, shape in enumerate(shapes):
        colour = COLOURS[i % len(COLOURS)]
        outline(axes, shape, colour)
        if not meets:
            calipers(axes, shape)
    for meet in meets:
        for piece in meet["pieces"]:
            axes.fill(*zip(*piece, strict=True), color=COLOURS[7], alpha=0.6, lw=0)
    axes.set_aspect("equal", "datalim")
    handles, labels = axes.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    if named:
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def outline(axes: Axes, shape: Shape, colour: str) -> None:
    """Points as dots, a line as one, a polygon filled."""
    x, y = shape.points.T.tolist()
    if shape.kind == "polygon":
        axes.fill(x, y, facecolor=colour, alpha=0.25)
        axes.plot([*x, x[0]], [*y, y[0]], color=colour, lw=1)
    else:
        axes.plot(x, y, "o" if shape.kind == "points" else "-", color=colour, ms=3, lw=1)


def calipers(axes: Axes, shape: Shape) -> None:
    """The hull, the diameter, the least rectangle and circle of a shape, and of points the closest pair."""
    from matplotlib.patches import Circle

    from dovetail import geometry as geo
    from dovetail.report.plots import COLOURS

    p = shape.points

    def closed(points: list[list[float]], style: str, colour: str, label: str) -> None:
        axes.plot(*zip(*points, points[0], strict=True), style, color=colour, lw=1, label=label)

    if shape.kind != "polygon":
        closed(geo.convex_hull(p).points.tolist(), "-", COLOURS[7], "convex hull")
    closed(geo.min_area_rectangle(p).corners.tolist(), "--", COLOURS[1], "least rectangle")
    closed(geo.diameter(p).points.tolist(), ":", COLOURS[3], "diameter")
    if shape.kind == "points" and len(p) > 1:
        axes.plot(
            *geo.closest_pair(p).points.T.tolist(), "o-", color=COLOURS[4], ms=5, mfc="none", label="closest pair"
        )
    circle = geo.smallest_circle(p)
    (x, y), radius = circle.center.tolist(), float(circle.radius)
    axes.add_patch(Circle((x, y), radius, fill=False, ec=COLOURS[2], lw=1, label="smallest circle"))
    axes.update_datalim([(x + s * radius, y + s * radius) for s in (-1, 1)])


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(v)}" for name, v in value.items())
    if isinstance(value, list) and len(value) > 6:
        return f"{', '.join(map(_text, value[:5]))}, ... ({len(value)})"
    if isinstance(value, list):
        return (
            f"({', '.join(map(_text, value))})"
            if value and not isinstance(value[0], list)
            else ", ".join(map(_text, value))
        )
    return str(value)
