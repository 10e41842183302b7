"""Metrics as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["format_table"]


def format_table(rows: Mapping[str, Mapping[str, float]], keys: Sequence[str]) -> str:
    """An aligned plain-text table, one line a model, two decimals, ``-`` where there is no value.

    Args:
        rows: metrics by model name, in the order shown.
        keys: the columns, such as ``"P@1"``.

    Returns:
        Lines joined by newlines, without one at the end.
    """
    lines = [["", *keys]]
    lines += [[name, *(f"{m[key]:.2f}" if key in m else "-" for key in keys)] for name, m in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keys) + 1)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    )
