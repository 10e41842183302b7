"""Plots stay within their frames, numbers read well, and curves are what metrics.jsonl says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.report.page_reader import Page
from xmcdist.report.bars import Bar, Sizes, columns, frequency_curve, measure_bars, size_ridges
from xmcdist.report.curves import Boundary, Curve, curves
from xmcdist.report.facts import Facts
from xmcdist.report.html import duration, esc, number, shorten
from xmcdist.report.page import page
from xmcdist.report.steps import StepMetrics, read_steps
from xmcdist.report.svg import linear_ticks, log_ticks


def _inside(plot: str) -> None:
    """All marks and texts lie within the drawing."""
    (box,) = [a["viewbox"] for tag, a in Page(plot).tags if tag == "svg"]
    ends: list[tuple[float, str]] = []
    width, height = (float(v) for v in str(box).split()[2:])
    for tag, a in Page(plot).tags:
        if tag == "path":
            points = re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", str(a["d"]))
            assert points
            assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in points)
        elif tag == "rect":
            x, y, w, h = (float(str(a[k])) for k in ("x", "y", "width", "height"))
            assert min(x, y) >= 0
            assert x + w <= width + 0.2
            assert y + h <= height + 0.2
        elif tag == "text":
            assert 0 <= float(str(a["x"])) <= width
            ends.append((float(str(a["x"])), str(a.get("text-anchor", "start"))))
            assert 0 <= float(str(a["y"])) <= height
    said = [text for names, _, text in Page(plot).texts if names[-1] == "text"]
    for (x, anchor), words in zip(ends, said, strict=True):
        long = 6.3 * len(words)  # of digits and small letters at the size of a plot's text
        left = {"start": x, "middle": x - long / 2, "end": x - long}[anchor]
        assert left > -10  # a box has more padding than that
        assert left + long < width + 10


@pytest.mark.parametrize("points", [1, 2, 30, 5000])
@pytest.mark.parametrize("span", [(0.0, 0.0), (3e-6, 2e-4), (0.01, 40.0), (1e6, 3e9), (-2.0, 5.0)])
def test_curves_stay_in_their_frame_and_light(points: int, span: tuple[float, float]) -> None:
    rng = np.random.default_rng(points)
    x, y = np.arange(1, points + 1) * 20, rng.uniform(*span, points)
    cuts = [Boundary(0, "level 1 · 32 clusters"), Boundary(points * 10, "level 2 · 512 clusters")]
    for width in (360, 740):
        plot = curves("of noise", [Curve("noise", x.tolist(), y.tolist())], cuts, smooth=True, width=width, unit="MB")
        _inside(plot)
        assert len(plot) < 30_000


def test_values_that_are_no_numbers_are_left_out() -> None:
    assert curves("none", [Curve("a", [1.0, 2.0], [float("nan"), float("inf")])]) == ""
    _inside(curves("one", [Curve("a", [1.0, 2.0, 3.0], [float("nan"), 4.0, 5.0])]))


def test_a_curve_begins_anew_at_a_level() -> None:
    line = Curve("a", [10, 20, 30, 40], [4.0, 3.0, 2.0, 1.0])
    drawn = [a for tag, a in Page(curves("l", [line], [Boundary(0, "1"), Boundary(20, "2")])).tags if tag == "path"]
    assert len([a for a in drawn if a["class"] == "line a"]) == 2
    assert len([a for a in drawn if a["class"] == "cut"]) == 1


def test_bars_are_as_long_as_their_values() -> None:
    rows = [("P@1", [Bar("a", "full", 100.0), Bar("b", "linear", 50.0)]), ("P@10", [Bar("a", "full", 0.0)])]
    plot = measure_bars("bars", rows)
    _inside(plot)
    full, linear, none = (float(str(a["width"])) for tag, a in Page(plot).tags if tag == "rect")
    assert full == pytest.approx(2 * linear, abs=0.1)
    assert none == 1
    assert Page(plot).of_class("v") == ["100.0", "0.0"]
    half = next(float(str(a["width"])) for tag, a in Page(measure_bars("b", rows, highest=200)).tags if tag == "rect")
    assert half == pytest.approx(full / 2, abs=0.1)


def test_histograms_and_frequencies_stay_in_their_frame() -> None:
    _inside(size_ridges("t", [Sizes(1, [3, 500, 70_000], [1, 20, 4]), Sizes(2, [0, 1], [5, 900])]))
    assert size_ridges("t", [Sizes(1, [0], [5])]) == ""
    for frequency, labels in (([9, 3, 1], [2, 5, 1000]), ([1], [1]), (list(range(4000, 0, -1)), [7] * 4000)):
        plot = frequency_curve("f", frequency, labels, head=sum(labels) // 5, tail_below=6)
        _inside(plot)
        assert len(plot) < 12_000
    for count in (1, 2, 64):
        _inside(columns("c", [1.5] * count, [("process 1", "")] * count, unit="GiB"))
    assert columns("c", [], [], unit="") == ""


def test_ticks_are_round_and_within() -> None:
    assert linear_ticks(0, 450, 5) == [0, 100, 200, 300, 400]
    assert linear_ticks(-2, 5, 4) == [-2, 0, 2, 4]
    assert log_ticks(0.04, 0.55, 4) == [0.05, 0.1, 0.2, 0.5]
    assert log_ticks(1, 4764, 5) == [1, 10, 100, 1000]
    assert log_ticks(1, 1e9, 5) == [1, 100, 1e4, 1e6, 1e8]


def test_numbers_read_well() -> None:
    said = [number(v) for v in (0, 0.07142, 1.7e-5, 10556, 649516, 3.21e6, 35.0, 123.456, float("nan"), -0.5)]
    assert said == ["0", "0.0714", "1.7e-5", "10,556", "650k", "3.21M", "35", "123", "n/a", "-0.5"]
    spans = [duration(v) for v in (0.04, 9.94, 59.4, 211, 7500, 3 * 86400 + 14400)]
    assert spans == ["0.0 s", "9.9 s", "59 s", "3 min 31 s", "2 h 5 min", "3 d 4 h"]
    assert shorten("one two\n three", 40) == "one two three"
    assert shorten("one two three", 9) == "one two…"
    assert len(shorten("x" * 50, 20)) == 20
    assert esc("<a href='x'>\x07&") == "&lt;a href=&#x27;x&#x27;&gt; &amp;"


def _write(path: Path, rows: list[dict[str, Any] | str]) -> StepMetrics:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return read_steps(path)


def _window(level: int, step: int, loss: float, **more: object) -> dict[str, Any]:
    return {"level": level, "step": step, "total": 30, "loss": loss, "time": 100.0 + step, **more}


def test_steps_taken_twice_count_once_and_levels_follow_each_other(tmp_path: Path) -> None:
    """A level was killed after step 20, went on from a checkpoint at 10; validation ended it at step 20."""
    rows: list[dict[str, Any] | str] = [
        {"stage": "prepare", "seconds": 1.0, "time": 99.0},
        _window(1, 10, 0.9),
        _window(1, 20, 0.8),
        _window(1, 20, 0.7),
        {"level": 1, "validation_beam_recall": 0.5, "time": 130.0},
        {"level": 1, "beam_recall": 0.75},
        "[]",
        '{"level": 1, "loss"',
        _window(2, 10, 0.3, lr=float("nan"), head_lr=0.1),
        {"level": 2, "step": 10, "validation_beam_recall": 0.6, "validation_P@1": 0.4},
        _window(2, 20, 0.2, lr=1e-4),
    ]
    found = _write(tmp_path / "metrics.jsonl", rows)
    assert found.series("loss") == ([10, 20, 30, 40], [0.9, 0.7, 0.3, 0.2])
    assert found.series("lr") == ([40], [1e-4])
    assert found.series("head_lr", 10) == ([30], [1.0])
    assert found.starts == {1: 0, 2: 20}
    assert found.recall == {1: 0.75}
    assert found.validation == {"beam_recall": ([20, 30], [0.5, 0.6]), "P@1": ([30], [0.4])}
    assert found.seconds == {"prepare": 1.0}
    assert found.last_time == 120.0


def test_global_steps_that_are_told_are_believed(tmp_path: Path) -> None:
    rows = [_window(1, 10, 1.0, global_step=10), _window(2, 10, 1.0, global_step=40)]
    found = _write(tmp_path / "metrics.jsonl", list(rows))
    assert found.starts == {1: 0, 2: 30}
    assert found.series("loss")[0] == [10, 40]


def test_a_step_beyond_the_last_one_is_of_an_earlier_attempt(tmp_path: Path) -> None:
    rows = [_window(1, 10, 1.0), _window(1, 20, 1.0), _window(1, 12, 2.0)]
    assert _write(tmp_path / "metrics.jsonl", list(rows)).series("loss") == ([10, 12], [1.0, 2.0])


def test_a_long_run_stays_light(tmp_path: Path) -> None:
    rows = [_window(t, s, 1 / s, lr=0.1, docs_per_s=s, memory_mb=s) for t in range(1, 6) for s in range(1, 1501)]
    found = _write(tmp_path / "metrics.jsonl", list(rows))
    assert len(found.windows) <= 4005
    assert found.starts == {t: 1500 * (t - 1) for t in range(1, 6)}
    whole = page(Facts(run_dir="run", config={"encoder.preset": "hf", "encoder.name": "a/b"}, steps=found))
    assert len(whole) < 250_000


def test_nothing_makes_a_page_too(tmp_path: Path) -> None:
    found = Page(page(Facts(run_dir="run", steps=read_steps(tmp_path / "missing.jsonl"))))
    assert found.headings == []
    assert not found.unclosed
