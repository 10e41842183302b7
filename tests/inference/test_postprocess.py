"""Post-processors against their formulas, written out one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from xmcdist.inference.postprocess import NAMES, PostProcessor

V = [-30.0, -3.0, -0.5, 0.0, 0.3, 1.0, 4.0, 100.0]


def formula(name: str, v: float, parent: float) -> float:
    """Plain Python."""
    if name == "noop":
        return v
    if name == "sigmoid":
        return parent / (1 + math.exp(-v))
    if name == "log-sigmoid":
        return parent + math.log(1 / (1 + math.exp(-v)))
    exponent = -(max(0.0, 1 - v) ** int(name[-7]))
    return parent + exponent if name.startswith("log-") else parent * math.exp(exponent)


def test_all_names_of_the_table_are_there() -> None:
    assert set(NAMES) == {"noop", "sigmoid", "log-sigmoid"} | {f"{a}l{p}-hinge" for a in ("", "log-") for p in "1234"}


@pytest.mark.parametrize("name", NAMES)
def test_transform_and_combine(name: str) -> None:
    post = PostProcessor.named(name)
    parent = np.array([0.3], np.float32)
    got = post.combine(post.transform(np.array(V, np.float32)), parent)
    np.testing.assert_allclose(got, [formula(name, v, 0.3) for v in V], rtol=1e-5, atol=1e-37)
    assert got.dtype == np.float32
    root = post.combine(post.transform(np.array(V, np.float32)), np.array([post.root_score], np.float32))
    np.testing.assert_array_equal(root, post.transform(np.array(V, np.float32)))


def test_sigmoid_does_not_overflow() -> None:
    with np.errstate(all="raise", under="ignore"):
        assert PostProcessor.named("sigmoid").transform(np.array([-1e4, 1e4], np.float32)).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("name", ["l5-hinge", "log-noop", "", "softmax"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        PostProcessor.named(name)
