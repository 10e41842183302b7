from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from tests.helpers.ranks import on_ranks
from xmcdist.parallel.launch import World
from xmcdist.sparse.csr import as_csr
from xmcdist.sparse.features import Features
from xmcdist.trees import kmeans
from xmcdist.trees.errors import TreeError
from xmcdist.trees.kmeans import balanced_kmeans


def _unit(A: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(A, axis=1, keepdims=True)
    return A / np.where(norm > 0, norm, 1)


def _clustered(num: int = 203, seed: int = 0, copies: bool = True) -> np.ndarray:
    """Rows around 8 directions of 24 dimensions; some rows zero, some alike."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(8, 24))
    Z = centres[rng.integers(8, size=num)] + 0.7 * rng.normal(size=(num, 24))
    Z *= rng.random((num, 24)) < 0.6
    Z[::17] = 0
    if copies and num > 60:
        Z[5:60:5] = Z[4]
    return _unit(Z).astype(np.float32)


def _as_features(Z: np.ndarray, form: str) -> Features:
    split = {"sparse": 24, "dense": 0, "both": 15}[form]
    sparse = as_csr(sp.csr_matrix(Z[:, :split]), "Z") if split else None
    return Features(sparse, np.ascontiguousarray(Z[:, split:]) if split < 24 else None)


def _mixed(x: int) -> int:
    """Splitmix64's mixing function, by Python's whole numbers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def _pick_two(seed: int, depth: int, node: int, size: int) -> tuple[int, int]:
    step, state = 0x9E3779B97F4A7C15, 0
    for key in (seed, depth, node):
        state = _mixed(((state ^ key) + step) % 2**64)
    right, left = (_mixed((state + i * step) % 2**64) % (size - i + 1) for i in (1, 2))
    return right, left + (left >= right)


def _reference(Z: np.ndarray, depth: int, seed: int, max_iter: int, halves: bool = False) -> np.ndarray:
    """The same algorithm by numpy sorting, recomputing both sums each time; from two members or from halves."""
    Z = Z.astype(np.float64)
    nodes = [np.arange(len(Z))]
    for t in range(depth):
        below = []
        for node, ids in enumerate(nodes):
            right, left = _pick_two(seed, t, node, len(ids))
            c = Z[ids[right]] - Z[ids[left]]
            old = None
            for it in range(max_iter):
                if it:
                    sums = [Z[ids[old]].sum(0), Z[np.setdiff1d(ids, ids[old])].sum(0)]
                    units = [s / np.linalg.norm(s) if np.linalg.norm(s) > 0 else s for s in sums]
                    c = units[1] - units[0]
                # A product over zeros and a sum over stored values may differ in the last bit.
                order = sorted(range(len(ids)), key=lambda i: (round(float(Z[ids[i]] @ c), 12), ids[i]))
                if halves and it == 0:
                    order = list(range(len(ids)))
                new = np.sort(order[: len(ids) // 2])
                if old is not None and np.array_equal(new, old):
                    break
                old = new
            below += [ids[old], np.setdiff1d(ids, ids[old])]
        nodes = below
    codes = np.empty(len(Z), dtype=np.int64)
    for code, ids in enumerate(nodes):
        codes[ids] = code
    return codes


def _objective(Z: np.ndarray, codes: np.ndarray) -> float:
    return sum(float(np.linalg.norm(Z[codes == code].sum(0))) for code in np.unique(codes))


@pytest.mark.parametrize("form", ["sparse", "dense", "both"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_codes_equal_plain_numpy(form: str, seed: int) -> None:
    Z = _clustered(seed=seed)
    want = _reference(Z, depth=4, seed=seed, max_iter=20)
    np.testing.assert_array_equal(balanced_kmeans(_as_features(Z, form), 4, seed=seed), want)


@pytest.mark.parametrize("max_iter", [1, 2, 3])
def test_the_iteration_limit_counts_the_random_start(max_iter: int) -> None:
    Z = _clustered()
    want = _reference(Z, depth=3, seed=5, max_iter=max_iter)
    np.testing.assert_array_equal(balanced_kmeans(_as_features(Z, "both"), 3, seed=5, max_iter=max_iter), want)


def test_clusters_beat_chance_and_shuffled_rows_do_not() -> None:
    """Codes found on shuffled rows say nothing about the real ones: the control."""
    Z = _clustered(copies=False)
    rng = np.random.default_rng(0)
    shuffled = Z[rng.permutation(len(Z))]
    found = _objective(Z, balanced_kmeans(_as_features(Z, "sparse"), 3))
    control = _objective(Z, balanced_kmeans(_as_features(shuffled, "sparse"), 3))
    chance = [_objective(Z, rng.permutation(len(Z)) % 8) for _ in range(20)]
    assert found > 1.5 * max(chance)
    assert control < 1.1 * max(chance)


@pytest.mark.parametrize(("num", "depth"), [(203, 5), (64, 6), (2, 1), (37, 3), (100, 1)])
def test_sizes_differ_by_at_most_one(num: int, depth: int) -> None:
    counts = np.bincount(balanced_kmeans(_as_features(_clustered(num), "both"), depth), minlength=1 << depth)
    assert counts.sum() == num
    assert counts.max() - counts.min() <= 1
    assert counts.min() >= 1


def test_labels_without_documents_are_placed_too() -> None:
    codes = balanced_kmeans(_as_features(np.zeros((11, 24), dtype=np.float32), "sparse"), 3)
    assert sorted(np.bincount(codes, minlength=8)) == [1, 1, 1, 1, 1, 2, 2, 2]
    np.testing.assert_array_equal(codes, np.sort(codes))  # all tie, so label order decides


@pytest.mark.parametrize("limits", [{}, {"_WIDE": 8}, {"_TASK": 200}, {"_PACKED": 0}, {"_WIDE": 8, "_PACKED": 500}])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("ordered", [False, True])
def test_threads_and_limits_change_nothing(
    monkeypatch: pytest.MonkeyPatch, threads: int, limits: dict[str, int], ordered: bool
) -> None:
    Z = _as_features(_clustered(), "both")
    order = np.random.default_rng(1).permutation(Z.num_rows) if ordered else None
    want = balanced_kmeans(Z, 5, threads=1, order=order)
    for name, value in limits.items():
        monkeypatch.setattr(kmeans, name, value)
    np.testing.assert_array_equal(balanced_kmeans(Z, 5, threads=threads, order=order), want)


def test_the_seed_matters() -> None:
    Z = _as_features(_clustered(), "dense")
    assert np.any(balanced_kmeans(Z, 3, seed=0) != balanced_kmeans(Z, 3, seed=1))


@on_ranks(1, 2, 3)
def test_the_number_of_ranks_changes_nothing(rank: int, world_size: int) -> None:
    world = World(rank, world_size, rank, world_size, "cpu")
    Z = _as_features(_clustered(), "both")
    for depth in (1, 2, 5):
        np.testing.assert_array_equal(
            balanced_kmeans(Z, depth, world=world, threads=2), balanced_kmeans(Z, depth, threads=1)
        )


def test_refusals() -> None:
    Z = _as_features(_clustered(15), "dense")
    with pytest.raises(ValueError, match="15 labels cannot be halved 4 times"):
        balanced_kmeans(Z, 4)
    with pytest.raises(ValueError, match="kmeans_max_iter"):
        balanced_kmeans(Z, 2, max_iter=0)


def test_a_start_from_a_tree_hardly_magnifies_differences() -> None:
    """And finds as good a tree as random members do."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(16, 12))
    Z = (centres[rng.integers(0, 16, 2000)] + 0.7 * rng.normal(size=(2000, 12))).astype(np.float32)
    near = (Z * (1 + 1e-3 * rng.uniform(-1, 1, Z.shape))).astype(np.float32)
    one, other = (Features(None, x / np.linalg.norm(x, axis=1, keepdims=True)) for x in (Z, near))
    order = np.argsort(balanced_kmeans(one, 5, seed=9), kind="stable")
    same, objective = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}
    for seed in range(4):
        for start in (None, order):
            a, b = (balanced_kmeans(z, 5, seed=seed, order=start) for z in (one, other))
            same[start is not None] += np.mean(a == b) / 4
            objective[start is not None] += _objective(one.dense, a) / 4
            assert set(np.bincount(a).tolist()) <= {62, 63}
    assert same[True] > 0.97
    assert same[True] >= same[False]
    assert objective[True] > 0.99 * objective[False]


@pytest.mark.parametrize("form", ["sparse", "dense", "both"])
@pytest.mark.parametrize("wide", [False, True])
def test_a_start_from_an_order_equals_the_reference(form: str, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "_WIDE", 1 if wide else 1 << 30)
    Z = _clustered()
    order = np.random.default_rng(3).permutation(len(Z))
    want = np.empty(len(Z), dtype=np.int64)
    want[order] = _reference(Z[order], 4, 0, 20, halves=True)
    np.testing.assert_array_equal(balanced_kmeans(_as_features(Z, form), 4, order=order, threads=2), want)


def test_an_order_that_is_none_is_refused() -> None:
    with pytest.raises(TreeError, match="order does not hold each of the 4 labels once"):
        balanced_kmeans(Features(None, np.eye(4, dtype=np.float32)), 1, order=np.array([0, 1, 1, 3]))


@on_ranks(1, 2, 3)
def test_a_start_from_a_tree_is_the_same_on_any_ranks(rank: int, world_size: int) -> None:
    rng = np.random.default_rng(1)
    Z = rng.normal(size=(101, 5)).astype(np.float32)
    z = Features(None, Z / np.linalg.norm(Z, axis=1, keepdims=True))
    order = rng.permutation(101)
    world = World(rank, world_size, rank, world_size, "cpu")
    np.testing.assert_array_equal(balanced_kmeans(z, 4, order=order, world=world), balanced_kmeans(z, 4, order=order))
