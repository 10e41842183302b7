"""Curves over the optimizer steps of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from xmcdist.report.html import number
from xmcdist.report.svg import Scale, coordinate, mark, svg, text, tick_text

__all__ = ["SMOOTH_FROM", "Boundary", "Curve", "curves"]

_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 10, 26, 32
_POINTS = 300  # of a curve, at most; more are averaged
_HOVER = 48  # places that tell their values under the mouse
SMOOTH_FROM = 16
"""Points from which a noisy curve is drawn pale, with a smooth one above it."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Values over steps; those that are not finite are left out.

    Attributes:
        name: in tooltips.
        x: rising.
        y: as many.
        cls: colour, a class of the style sheet: ``a``, ``b`` or ``c``.
        dots: draw each point by itself, for few.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    cls: str = "a"
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Boundary:
    """Where a level begins, and what is written there."""

    x: float
    name: str


def curves(
    label: str,
    lines: Sequence[Curve],
    boundaries: Sequence[Boundary] = (),
    *,
    unit: str = "",
    x_name: str = "optimizer step",
    smooth: bool = False,
    log: bool | None = None,
    top: float | None = None,
    width: float = 360,
    height: float = 200,
) -> str:
    """Curves that share their axes.

    Args:
        label: for those who do not see it.
        lines: at least one with a finite value, else the answer is empty.
        boundaries: of levels, in order of x.
        unit: of y, above its axis.
        x_name: below the x axis.
        smooth: pale, with its moving mean above it, where there are many points.
        log: of y; None: where the values span more than a factor of twelve.
        top: of the y axis, which else follows the values.
        width: in CSS pixels.
        height: in CSS pixels.
    """
    kept = [_thinned(_finite(line), boundaries) for line in lines]
    kept = [line for line in kept if line.x]
    if not kept:
        return ""
    x, y = _scales(kept, boundaries, log, top, width, height)
    parts = _frame(x, y, unit, x_name, width, height)
    parts += _levels(x, boundaries, height)
    for line in kept:
        parts += _drawn(line, x, y, boundaries, smooth)
    parts += _hover(kept, x, unit, x_name, height)
    return svg(width, height, label, parts)


def _finite(line: Curve) -> Curve:
    some = [(a, b) for a, b in zip(line.x, line.y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    return Curve(line.name, [a for a, _ in some], [b for _, b in some], line.cls, line.dots)


def _thinned(line: Curve, boundaries: Sequence[Boundary]) -> Curve:
    """Means of neighbours within a level, so that a page stays light however long a run was."""
    group = math.ceil(len(line.x) / _POINTS)
    if group <= 1:
        return line
    xs: list[float] = []
    ys: list[float] = []
    for part in _parts(line, boundaries):
        for i in range(0, len(part), group):
            some = part[i : i + group]
            xs.append(some[-1][0])
            ys.append(sum(b for _, b in some) / len(some))
    return Curve(line.name, xs, ys, line.cls, line.dots)


def _parts(line: Curve, boundaries: Sequence[Boundary]) -> list[list[tuple[float, float]]]:
    """A curve's points by level: a level begins anew and is not joined to the one before."""
    found: list[list[tuple[float, float]]] = [[]]
    starts = [b.x for b in boundaries[1:]]
    for point in zip(line.x, line.y, strict=True):
        while starts and point[0] > starts[0]:
            starts.pop(0)
            found.append([])
        found[-1].append(point)
    return [part for part in found if part]


def _scales(
    lines: Sequence[Curve],
    boundaries: Sequence[Boundary],
    log: bool | None,
    top: float | None,
    width: float,
    height: float,
) -> tuple[Scale, Scale]:
    xs = [v for line in lines for v in line.x] + [b.x for b in boundaries]
    ys = [v for line in lines for v in line.y]
    low, high = min(ys), max(ys)
    if log is None:
        log = low > 0 and high / low > 12
    if log and low > 0:
        low, high = low / 1.25, high * 1.25
    else:
        low = min(0.0, low)
        high = max(high * 1.08, low + 1e-9) if top is None else top
        log = False
    first, last = min([0.0, *xs]), max(xs)
    return (
        Scale(first, max(last, first + 1), _LEFT, width - _RIGHT),
        Scale(low, high, height - _BOTTOM, _TOP, log),
    )


def _frame(x: Scale, y: Scale, unit: str, x_name: str, width: float, height: float) -> list[str]:
    parts = []
    for value in y.ticks(4):
        at = y(value)
        parts.append(mark("path", "grid", d=f"M{_LEFT} {coordinate(at)}H{coordinate(width - _RIGHT)}"))
        parts.append(text(_LEFT - 6, at + 3.8, tick_text(value), "t", "end"))
    ticks = x.ticks(5 if width < 500 else 9)
    parts += [text(x(value), height - _BOTTOM + 15, tick_text(value), "t", "middle") for value in ticks]
    parts.append(mark("path", "axis", d=f"M{_LEFT} {height - _BOTTOM}H{coordinate(width - _RIGHT)}"))
    parts.append(text(width - _RIGHT, height - 4, x_name, "t", "end"))
    if unit:
        parts.append(text(2, 11, unit, "t"))
    return parts


def _levels(x: Scale, boundaries: Sequence[Boundary], height: float) -> list[str]:
    """A line where a level begins, its name beside it where there is room."""
    parts = []
    ends = [*(b.x for b in boundaries[1:]), x.high][: len(boundaries)]
    for i, (b, end) in enumerate(zip(boundaries, ends, strict=True)):
        at, room = x(b.x), x(end) - x(b.x)
        if i:
            parts.append(mark("path", "cut", d=f"M{coordinate(at)} 16V{height - _BOTTOM}"))
        names = [b.name, b.name.split(" · ")[0], b.name.split(" · ")[0].removeprefix("level ")]
        name = next((n for n in names if 5.9 * len(n) < room - 4), "")
        if name:
            parts.append(text(at + room / 2, 22, name, "l", "middle"))
    return parts


def _drawn(line: Curve, x: Scale, y: Scale, boundaries: Sequence[Boundary], smooth: bool) -> list[str]:
    parts = []
    noisy = smooth and len(line.x) >= SMOOTH_FROM
    for points in _parts(line, boundaries):
        if len(points) > 1:
            parts.append(mark("path", f"line {line.cls}" + (" pale" if noisy else ""), d=_path(points, x, y)))
            if noisy:
                parts.append(mark("path", f"line {line.cls}", d=_path(_mean(points), x, y)))
        if len(points) == 1 or line.dots:
            parts += [mark("circle", f"dot {line.cls}", cx=x(a), cy=y(b), r=3) for a, b in points]
    return parts


def _path(points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    return "M" + "L".join(f"{coordinate(x(a))} {coordinate(y(b))}" for a, b in points)


def _mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean of each point with its neighbours to both sides, fewer at the ends."""
    reach = max(1, len(points) // 12)
    out = []
    for i, (at, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        some = points[i - near : i + near + 1]
        out.append((at, sum(b for _, b in some) / len(some)))
    return out


def _hover(lines: Sequence[Curve], x: Scale, unit: str, x_name: str, height: float) -> list[str]:
    """Columns that tell the values below the mouse."""
    longest = max(lines, key=lambda line: len(line.x))
    every = math.ceil(len(longest.x) / _HOVER)
    at = list(longest.x[::every])
    edges = [x.start, *((x(a) + x(b)) / 2 for a, b in pairwise(at)), x.stop]
    parts = []
    for i, step in enumerate(at):
        said = []
        for line in lines:
            nearest = min(range(len(line.x)), key=lambda k: abs(line.x[k] - step))
            if abs(line.x[nearest] - step) <= (at[1] - at[0] if len(at) > 1 else 1):
                said.append(f"{line.name} {number(line.y[nearest])}{' ' + unit if unit else ''}")
        title = f"{x_name} {number(step)}: " + ", ".join(said)
        parts.append(
            mark("rect", "hover", title, x=edges[i], y=16, width=edges[i + 1] - edges[i], height=height - 16 - _BOTTOM)
        )
    return parts
