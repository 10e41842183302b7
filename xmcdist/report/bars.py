"""Bars, histograms and the curve of label frequencies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from xmcdist.report.html import number, percent, plural
from xmcdist.report.svg import Scale, coordinate, mark, svg, text, tick_text

__all__ = ["Bar", "Sizes", "columns", "frequency_curve", "measure_bars", "size_ridges"]


@dataclass(frozen=True, slots=True)
class Bar:
    """A percentage: class of its colour, name in its tooltip, value."""

    cls: str
    name: str
    value: float


def measure_bars(
    label: str, rows: Sequence[tuple[str, Sequence[Bar]]], *, highest: float | None = None, width: float = 360
) -> str:
    """Horizontal bars of percentages, one or several to a row, each with its value at its end.

    Args:
        label: for those who do not see it.
        rows: key ``name@k`` and bars of each; ``@k`` stands before the bars.
        highest: percentage of a bar of full length; None: the highest of the rows.
        width: in CSS pixels.
    """
    if not rows:
        return ""
    x = Scale(0, max(highest or max(bar.value for _, bars in rows for bar in bars), 1e-9), 34, width - 42)
    parts, y = [], 2.0
    for name, bars in rows:
        thick = 11.5 if len(bars) > 1 else 15.0
        parts.append(text(27, y + thick * len(bars) / 2 + 3.2, "@" + name.split("@")[1], "t", "end"))
        for i, bar in enumerate(bars):
            top, length = y + i * thick, max(x(bar.value) - x.start, 1)
            title = f"{bar.name}: {name} {percent(bar.value)} %"
            parts.append(
                mark("rect", f"bar {bar.cls}", title, x=x.start, y=top, width=length, height=thick - 1.5, rx=1.5)
            )
            strong = "v" if i == 0 else "t"
            parts.append(text(x.start + length + 5, top + thick / 2 + 3.2, percent(bar.value), strong))
        y += thick * len(bars) + 9
    return svg(width, y - 5, label, parts)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many clusters of a level have how many labels.

    Attributes:
        level: from 1.
        sizes: rising numbers of labels.
        counts: clusters of each.
    """

    level: int
    sizes: Sequence[int]
    counts: Sequence[int]

    @property
    def clusters(self) -> int:
        return sum(self.counts)


def size_ridges(label: str, levels: Sequence[Sizes], *, width: float = 360) -> str:
    """A histogram of cluster sizes a level, one below the other, on one logarithmic axis."""
    levels = [level for level in levels if any(level.sizes)]
    if not levels:
        return ""
    highest = max(max(level.sizes) for level in levels)
    x = Scale(0.8, max(highest * 1.3, 10), 96, width - 8, log=True)
    row, top = 46, 8
    bottom = top + row * len(levels)
    parts = []
    for tick in x.ticks(5):
        parts.append(mark("path", "grid", d=f"M{coordinate(x(tick))} {top}V{bottom}"))
        parts.append(text(x(tick), bottom + 15, tick_text(tick), "t", "middle"))
    for i, level in enumerate(levels):
        base = top + row * (i + 1)
        parts.append(text(0, base - 16, f"level {level.level}", "l"))
        parts.append(text(0, base - 3, plural(level.clusters, "cluster"), "t"))
        parts.append(mark("path", "axis", d=f"M96 {base}H{coordinate(width - 8)}"))
        parts += _ridge(level, x, base, row - 18)
    parts.append(text(width - 8, bottom + 30, "labels in a cluster", "t", "end"))
    return svg(width, bottom + 34, label, parts)


def _ridge(level: Sizes, x: Scale, base: float, high: float) -> list[str]:
    """Bars of one level: of single sizes where these are few, of ranges of a sixteenth of a decade else."""
    bins: dict[int, tuple[int, int, int]] = {}  # by bin: smallest size, largest, clusters
    some = [(s, c) for s, c in zip(level.sizes, level.counts, strict=True) if s > 0]
    for size, count in some:
        where = round(16 * math.log10(size))
        low, up, before = bins.get(where, (size, size, 0))
        bins[where] = (min(low, size), max(up, size), before + count)
    most = max(n for *_, n in bins.values())
    parts = []
    half = max((x(10 ** (1 / 16)) - x(1)) / 2 - 0.7, 1.5)
    for where, (low, up, count) in sorted(bins.items()):
        middle, tall = x(10 ** (where / 16)), max(high * count / most, 1.5)
        labels = f"{low:,}" if low == up else f"{low:,} to {up:,}"
        title = f"level {level.level}: {plural(count, 'cluster')} of {labels} labels"
        left = max(middle - half, x.start)
        parts.append(mark("rect", "bar a", title, x=left, y=base - tall, width=middle + half - left, height=tall))
    low, up = some[0][0], some[-1][0]
    said = f"{low:,}" if low == up else f"{low:,} to {up:,}"
    right = x(10 ** (max(bins) / 16)) + half + 5
    if right + 6.2 * len(said) < x.stop:
        parts.append(text(right, base - 4, said, "t"))
    else:
        parts.append(text(x(10 ** (min(bins) / 16)) - half - 5, base - 4, said, "t", "end"))
    return parts


def frequency_curve(
    label: str,
    frequency: Sequence[int],
    labels: Sequence[int],
    *,
    head: int,
    tail_below: int,
    width: float = 360,
    height: float = 216,
) -> str:
    """Training documents of each label, most frequent first, both axes logarithmic.

    Args:
        label: for those who do not see it.
        frequency: falling, the different numbers of documents above 0.
        labels: how many labels have each.
        head: labels that count as head.
        tail_below: documents, below which others count as tail.
        width: in CSS pixels.
        height: in CSS pixels.
    """
    if not frequency:
        return ""
    last = sum(labels)
    torso_end = max(sum(n for f, n in zip(frequency, labels, strict=True) if f >= tail_below), head)
    x = Scale(1, max(last, 2), 42, width - 10, log=True)
    y = Scale(0.9, max(frequency[0] * 1.3, 2), height - 32, 26, log=True)
    parts = []
    cuts = [1.0, min(max(head, 1), last), min(torso_end, last), last]
    for i, (name, start, stop) in enumerate(zip(("head", "torso", "tail"), cuts[:-1], cuts[1:], strict=True)):
        left, right = x(start), x(stop)
        if right - left < 1:
            continue
        if i % 2 == 0:
            parts.append(mark("rect", "band", x=left, y=26, width=right - left, height=height - 58))
        if right - left > 6 * len(name):
            parts.append(text((left + right) / 2, 20, name, "l", "middle"))
    for tick in y.ticks(4):
        parts.append(mark("path", "grid", d=f"M42 {coordinate(y(tick))}H{coordinate(width - 10)}"))
        parts.append(text(36, y(tick) + 3.8, tick_text(tick), "t", "end"))
    parts += [text(x(tick), height - 17, tick_text(tick), "t", "middle") for tick in x.ticks(5)]
    parts.append(mark("path", "axis", d=f"M42 {height - 32}H{coordinate(width - 10)}"))
    points, before, seen = [], 0, (-9.0, -9.0)
    for f, n in zip(frequency, labels, strict=True):
        for rank in (before + 1, before + n):
            at = (x(rank), y(f))
            if abs(at[0] - seen[0]) + abs(at[1] - seen[1]) > 1.2 or rank == last:
                points.append(f"{coordinate(at[0])} {coordinate(at[1])}")
                seen = at
        before += n
    parts.append(mark("path", "line a", d="M" + "L".join(points)))
    parts.append(text(2, 11, "documents", "t"))
    parts.append(text(width - 10, height - 3, "labels, most frequent first", "t", "end"))
    return svg(width, height, label, parts)


def columns(
    label: str,
    values: Sequence[float],
    names: Sequence[tuple[str, str]],
    *,
    unit: str,
    top: float | None = None,
    width: float = 360,
    height: float = 200,
) -> str:
    """One column a value, from 0, each with its value above and its name below where there is room.

    Args:
        label: for those who do not see it.
        values: their heights.
        names: of each, in two lines; the first alone where many columns leave no more room.
        unit: above the y axis.
        top: of the y axis; None: the highest value.
        width: in CSS pixels.
        height: in CSS pixels.
    """
    if not values:
        return ""
    y = Scale(0, max(*values, 1e-9) * 1.1 if top is None else top, height - 34, 24)
    room = (width - 52) / len(values)
    thick = min(max(room * 0.62, room - 12), 40)
    parts = [text(2, 11, unit, "t")]
    for tick in y.ticks(4):
        parts.append(mark("path", "grid", d=f"M42 {coordinate(y(tick))}H{coordinate(width - 10)}"))
        parts.append(text(36, y(tick) + 3.8, tick_text(tick), "t", "end"))
    every = math.ceil(7 * max(len(first) for first, _ in names) / room)
    for i, (value, (first, second)) in enumerate(zip(values, names, strict=True)):
        middle = 42 + room * (i + 0.5)
        title = f"{first}{', ' + second if second else ''}: {number(value)} {unit}"
        parts.append(
            mark("rect", "bar a", title, x=middle - thick / 2, y=y(value), width=thick, height=y(0) - y(value), rx=1.5)
        )
        if i % every == 0:
            parts.append(text(middle, height - 20, first, "t", "middle"))
        if second and room > 6.4 * len(second):
            parts.append(text(middle, height - 6, second, "t", "middle"))
        if room > 34:
            said = percent(value) if unit == "%" else number(value)
            parts.append(text(middle, y(value) - 4, said, "v", "middle"))
    parts.append(mark("path", "axis", d=f"M42 {height - 34}H{coordinate(width - 10)}"))
    return svg(width, height, label, parts)
