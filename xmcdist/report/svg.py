"""Axes, scales and marks of a plot as inline SVG; colours and fonts are the page's style sheet's.

A plot is drawn at about the size at which it is seen, so its text is as large on a phone as on
a desk.  It holds no ids, so any number of plots fit on a page, and no ``xmlns``, which HTML
does not need.  Coordinates have one decimal: the same numbers give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from xmcdist.report.html import esc, number

__all__ = ["Scale", "coordinate", "linear_ticks", "log_ticks", "mark", "svg", "text", "tick_text"]


def coordinate(value: float) -> str:
    """A coordinate with at most one decimal."""
    said = f"{value:.1f}".removesuffix(".0")
    return "0" if said == "-0" else said


def svg(width: float, height: float, label: str, parts: Sequence[str], cls: str = "") -> str:
    """A plot of ``width`` by ``height`` CSS pixels, which the page may scale.

    Args:
        width: of the drawing.
        height: of the drawing.
        label: what it shows, for those who do not see it.
        parts: its elements.
        cls: class of the element.
    """
    named = f' class="{cls}"' if cls else ""
    return (
        f'<svg{named} viewBox="0 0 {coordinate(width)} {coordinate(height)}" role="img" aria-label="{esc(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def mark(kind: str, cls: str, title: str = "", /, **attributes: float | str) -> str:
    """One element; a title becomes its tooltip.  ``_`` in names of attributes stands for ``-``."""
    said = "".join(
        f' {name.replace("_", "-")}="{value if isinstance(value, str) else coordinate(value)}"'
        for name, value in attributes.items()
    )
    body = f"><title>{esc(title)}</title></{kind}>" if title else "/>"
    return f'<{kind} class="{cls}"{said}{body}'


def text(x: float, y: float, said: str, cls: str = "t", anchor: str = "start") -> str:
    """Text whose base line is at y."""
    where = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{cls}" x="{coordinate(x)}" y="{coordinate(y)}"{where}>{esc(said)}</text>'


@dataclass(frozen=True, slots=True)
class Scale:
    """Values ``low .. high`` onto coordinates ``start .. stop``, evenly or by their logarithm."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self, about: int) -> list[float]:
        """Round values within the scale, about so many."""
        return log_ticks(self.low, self.high, about) if self.log else linear_ticks(self.low, self.high, about)


def linear_ticks(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in ``[low, high]``, at most about + 1 of them."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    for factor in (1, 2, 5, 10):
        if (high - low) / (step * factor) <= about:
            step *= factor
            break
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float, about: int) -> list[float]:
    """Powers of ten in ``[low, high]``, fewer where there are many; 1, 2, 5 where there are few."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    every = max(1, math.ceil((last - first) / about))
    found = [10.0**e for e in range(first, last + 1, every) if low <= 10.0**e * 1.0001 and 10.0**e <= high * 1.0001]
    if len(found) >= 3 or every > 1:
        return found
    fine = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
    return [t for t in fine if low * 0.9999 <= t <= high * 1.0001]


def tick_text(value: float) -> str:
    """A tick in few characters: ``20k``, ``0.05``, ``1e-3``."""
    if 10_000 <= abs(value) < 1e6:
        return f"{value / 1000:g}k"
    if 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return number(value)
