"""Plots in their boxes, placed so that rows are full on a desk and each is legible on a phone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xmcdist.report.html import esc

__all__ = ["PHONE", "Box", "grid", "two_widths"]

PHONE = 360.0
"""Width at which a plot is drawn for a phone, or a third of a desk."""

_WIDTHS = {2: PHONE, 3: 548.0, 4: 736.0, 6: 1110.0}  # by sixths of a row


@dataclass(frozen=True, slots=True)
class Box:
    """A plot under its title.

    Attributes:
        title: what it shows.
        note: how to read it (HTML).
        draw: the plot at some width; empty where there is nothing to show.
        sixths: of a row that it takes; 2 may become 3 where a row would not be full.
    """

    title: str
    note: str
    draw: Callable[[float], str]
    sixths: int = 2


def grid(boxes: Sequence[Box], lead: str = "") -> str:
    """The boxes that have something to show, below a sentence (HTML); empty without any."""
    some = [box for box in boxes if box.draw(PHONE)]
    if not some:
        return ""
    cells = "".join(_cell(box, sixths) for box, sixths in zip(some, _shares(some), strict=True))
    return (f'<p class="lead">{lead}</p>' if lead else "") + f'<div class="grid">{cells}</div>\n'


def _shares(boxes: Sequence[Box]) -> list[int]:
    """Sixths of each box: the last rows of thirds become halves where a third would stay empty."""
    shares = [box.sixths for box in boxes]
    left = sum(shares) % 6
    widen = {4: 2, 2: 4}.get(left, 0)  # so many of the last thirds
    if widen and len(shares) >= widen and all(share == 2 for share in shares[-widen:]):
        shares[-widen:] = [3] * widen
    return shares


def _cell(box: Box, sixths: int) -> str:
    cls = {2: "", 3: ' class="half"', 4: ' class="wide"', 6: ' class="full"'}[sixths]
    note = f"<p>{box.note}</p>" if box.note else ""
    plot = two_widths(box.draw, _WIDTHS[sixths])
    return f"<figure{cls}><figcaption><h3>{esc(box.title)}</h3>{note}</figcaption>{plot}</figure>"


def two_widths(draw: Callable[[float], str], width: float) -> str:
    """A plot for its place on a desk and, where that is wider, one for a phone; the style sheet shows one of them."""
    narrow, broad = draw(PHONE), draw(width)
    if width == PHONE or narrow == broad:
        return broad
    broad = broad.replace("<svg", '<svg class="broad"', 1)
    return broad + narrow.replace("<svg", '<svg class="narrow"', 1)
