"""Text and numbers as HTML: everything that comes from data passes through `esc`."""

from __future__ import annotations

import html
import math

__all__ = ["duration", "esc", "number", "percent", "plural", "shorten"]


def esc(text: object) -> str:
    """Text that is safe inside an element or a quoted attribute; control characters become spaces."""
    plain = "".join(c if c.isprintable() or c == "\n" else " " for c in str(text))
    return html.escape(plain, quote=True)


def shorten(text: str, most: int) -> str:
    """One line of at most ``most`` characters, cut at a word where one ends near; an ellipsis says so."""
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    cut = line[: most - 1]
    space = cut.rfind(" ")
    return cut[: space if space > 0.8 * most else None].rstrip(" ,;:") + "…"


def number(value: float, digits: int = 3) -> str:
    """A number for a person: ``10,556``, ``0.0714``, ``1.7e-5``, ``650k``, ``3.2M``.

    Args:
        value: any finite number; others are written as a dash.
        digits: significant ones, of numbers that are not whole.
    """
    if not math.isfinite(value):
        return "n/a"
    if value == 0:
        return "0"
    size = abs(value)
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= max(unit, 1e5):
            return f"{float(f'{value / unit:.{digits}g}'):g}{name}"
    if size < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{float(f'{value:.{digits}g}'):g}"


def percent(value: float) -> str:
    """A percentage with one decimal, without its sign ``%``."""
    return f"{value:.1f}" if math.isfinite(value) else "n/a"


def duration(seconds: float) -> str:
    """Seconds as ``0.3 s``, ``42 s``, ``3 min 31 s``, ``2 h 5 min`` or ``3 d 4 h``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    for large, small, names in ((60, 1, ("min", "s")), (3600, 60, ("h", "min")), (86400, 3600, ("d", "h"))):
        if whole < large * (60 if large < 3600 else 24) or large == 86400:
            first, rest = divmod(whole, large)
            return f"{first} {names[0]}" + (f" {rest // small} {names[1]}" if rest // small else "")
    raise AssertionError("days are the last unit")


def plural(count: int, one: str, many: str | None = None) -> str:
    """``1 label``, ``4,764 labels``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
