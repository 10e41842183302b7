"""Metrics as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["format_table"]


def format_table(rows: Mapping[str, Mapping[str, float]], keys: Sequence[str]) -> str:
    """Aligned columns, one row a name; a metric that a row lacks is shown as a dash."""
    names = max([len(name) for name in rows], default=0)
    lines = [" " * names + "".join(f"{key:>9}" for key in keys)]
    for name, metrics in rows.items():
        cells = "".join(f"{metrics[key]:9.2f}" if key in metrics else f"{'-':>9}" for key in keys)
        lines.append(f"{name:<{names}}{cells}")
    return "\n".join(lines)
