"""Calibration where the true probabilities are known, and where there is nothing to learn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from xmcdist.config.errors import UserError
from xmcdist.inference.calibration import (
    FILE,
    METHODS,
    Calibration,
    expected_calibration_error,
    fit_calibration,
)

N = 20_000


def _known(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, the probability that each is right (overstated by the score), and a draw of it."""
    rng = np.random.default_rng(seed)
    scores = rng.random(N)
    truth = 1 / (1 + np.exp(-(4 * scores - 3)))
    return scores, truth, rng.random(N) < truth


def _slow_error(said: np.ndarray, hits: np.ndarray) -> float:
    total = 0.0
    for b in range(15):
        own = [i for i, p in enumerate(said) if (b / 15 <= p < (b + 1) / 15) or (b == 14 and p == 1)]
        if own:
            total += abs(sum(said[i] for i in own) - sum(bool(hits[i]) for i in own))
    return total / len(said)


@pytest.mark.parametrize("method", METHODS)
def test_known_probabilities_are_found(method: str) -> None:
    scores, _, hits = _known(0)
    fitted = fit_calibration(scores, hits, method)
    fresh, truth, drawn = _known(1)
    before, after = (expected_calibration_error(p, drawn) for p in (fresh, fitted.apply(fresh)))
    assert before > 0.1
    assert after < 0.02
    assert np.abs(fitted.apply(fresh) - truth).mean() < 0.02
    assert np.all(np.diff(fitted.apply(np.linspace(-1, 2, 500))) >= 0)


@pytest.mark.parametrize("method", METHODS)
def test_shuffled_hits_give_the_base_rate(method: str) -> None:
    """The negative control: a score that tells nothing gets one probability."""
    scores, _, hits = _known(0)
    said = fit_calibration(scores, np.random.default_rng(5).permutation(hits), method).apply(scores)
    assert np.abs(said - hits.mean()).mean() < 0.01
    assert np.quantile(said, 0.99) - np.quantile(said, 0.01) < 0.05


def test_isotonic_is_scikit_learns() -> None:
    scores, _, hits = _known(2)
    scores = np.round(scores, 2)  # ties
    want = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores, hits)
    at = np.concatenate([[-5.0, 7.0], np.linspace(0, 1, 333)])
    np.testing.assert_allclose(fit_calibration(scores, hits, "isotonic").apply(at), want.predict(at), atol=1e-12)


def test_platt_minimises_the_smoothed_loss() -> None:
    """No step away from the fitted slope and intercept lowers Platt's loss, written out."""
    rng = np.random.default_rng(3)
    scores, hits = 50 * rng.normal(size=300) - 400, rng.random(300) < 0.1
    high, low = (hits.sum() + 1) / (hits.sum() + 2), 1 / ((~hits).sum() + 2)

    def loss(a: float, b: float) -> float:
        p = [1 / (1 + math.exp(-(a * s + b))) for s in scores]
        t = [high if y else low for y in hits]
        return -sum(u * math.log(q) + (1 - u) * math.log(1 - q) for u, q in zip(t, p, strict=True))

    a, b = fit_calibration(np.where(hits, scores + 30, scores), hits, "platt").x
    scores = np.where(hits, scores + 30, scores)
    assert a > 0
    for step in (1e-3, -1e-3):
        assert loss(a, b) <= loss(a + step * a, b - step * a * scores.mean()) + 1e-6
        assert loss(a, b) <= loss(a, b + step) + 1e-6


def test_a_score_that_misleads_gives_a_constant_not_a_falling_function() -> None:
    scores, _, hits = _known(0)
    said = fit_calibration(-scores, hits, "platt").apply(scores)
    assert np.ptp(said) == 0
    assert said[0] == pytest.approx(hits.mean(), abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("hit", [0, 1])
def test_hits_that_are_all_alike(method: str, hit: int) -> None:
    said = fit_calibration(np.linspace(0, 1, 40), np.full(40, hit), method).apply(np.array([0.0, 0.5, 1.0]))
    assert np.all(np.abs(said - hit) < 0.05)


def test_the_error_is_that_of_its_definition() -> None:
    scores, _, hits = _known(4)
    scores[:3] = [0.0, 1.0, 1.0]
    assert expected_calibration_error(scores[:500], hits[:500]) == pytest.approx(_slow_error(scores[:500], hits[:500]))
    assert expected_calibration_error(np.array([0.75] * 4), np.array([1, 1, 1, 0])) == 0


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_read_again(method: str, tmp_path: Path) -> None:
    assert Calibration.load(tmp_path) is None
    scores, _, hits = _known(0)
    fitted = fit_calibration(scores, hits, method, {"documents": 3})
    fitted.save(tmp_path)
    again = Calibration.load(tmp_path)
    assert again is not None
    np.testing.assert_array_equal(again.apply(scores), fitted.apply(scores))
    assert (again.method, again.about) == (method, {"documents": 3})


@pytest.mark.parametrize(
    "value",
    [
        "{",
        json.dumps({"format": 2, "method": "platt", "x": [1, 2], "y": [], "about": {}}),
        json.dumps({"format": 1, "method": "platt", "x": [1], "y": [], "about": {}}),
        json.dumps({"format": 1, "method": "isotonic", "x": [1, 0], "y": [0, 1], "about": {}}),
        json.dumps({"format": 1, "method": "isotonic", "x": [], "y": [], "about": {}}),
        json.dumps({"format": 1, "method": "spline", "x": [1, 2], "y": [0, 1], "about": {}}),
    ],
)
def test_a_damaged_file_is_named(value: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(value)
    with pytest.raises(UserError, match=r"calibration\.json is damaged"):
        Calibration.load(tmp_path)


def test_pairs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        fit_calibration(np.zeros(0), np.zeros(0), "platt")
    with pytest.raises(ValueError, match="as many of both"):
        fit_calibration(np.zeros(3), np.zeros(2), "platt")
    with pytest.raises(ValueError, match="none of isotonic, platt"):
        fit_calibration(np.zeros(3), np.zeros(3), "temperature")
