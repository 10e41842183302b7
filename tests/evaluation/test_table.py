"""The table a person reads."""

from __future__ import annotations

from xmcdist.evaluation.table import format_table


def test_columns_line_up() -> None:
    rows = {"linear only": {"P@1": 100.0, "R@10": 3.14159}, "full": {"P@1": 7.0, "PSP@5": 1.0}}
    assert format_table(rows, ("P@1", "PSP@5", "R@10")).splitlines() == [
        "                P@1  PSP@5  R@10",
        "linear only  100.00      -  3.14",
        "full           7.00   1.00     -",
    ]


def test_without_rows_there_is_a_heading() -> None:
    assert format_table({}, ["P@1"]) == "  P@1"
