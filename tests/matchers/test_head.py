"""Head rows, scores, losses and level prediction, on one rank and on several."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from tests.helpers.ranks import on_ranks
from xmcdist.matchers import head as head_module
from xmcdist.matchers.head import ShardedHead, score_pairs
from xmcdist.matchers.losses import LOSSES, ragged_loss
from xmcdist.matchers.predict import POST_PROCESSORS, post_processor_of, predict_level
from xmcdist.parallel.launch import World
from xmcdist.parallel.mesh import Mesh
from xmcdist.parallel.shards import LabelShard

K, D = 11, 6


def _whole(num: int = K, seed: int = 0, level: int = 1) -> ShardedHead:
    return ShardedHead(LabelShard(0, 1, num), D, seed=seed, level=level)


def _pairs(b: int = 5, n: int = K, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    E, W, bias = (torch.randn(s, generator=g, dtype=dtype, requires_grad=True) for s in ((b, D), (n, D), (n,)))
    doc, row = torch.nonzero(torch.rand(b, n, generator=g) < 0.4, as_tuple=True)
    return E, W, bias, doc, row


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_initial_rows_do_not_depend_on_ranks(world: int) -> None:
    num = 700  # blocks of 256 are cut through
    whole = _whole(num)
    parts = [ShardedHead(LabelShard(r, world, num), D, seed=0, level=1) for r in range(world)]
    assert torch.equal(torch.cat([p.weight for p in parts]), whole.weight)
    assert 0.018 < whole.weight.std() < 0.022
    assert torch.equal(whole.bias, torch.zeros(num))
    assert not torch.equal(_whole(num, seed=1).weight, whole.weight)
    assert not torch.equal(_whole(num, level=2).weight, whole.weight)
    assert len(torch.unique(whole.weight)) > 0.99 * whole.weight.numel()


@pytest.mark.parametrize("scoring", ["dense", "pairs", "auto"])
def test_scores_and_gradients_equal_plain_loops(scoring: str) -> None:
    E, W, bias, doc, row = _pairs()
    got = score_pairs(E, W, bias, doc, row, scoring)
    want = torch.stack([(E[i] * W[j]).sum() + bias[j] for i, j in zip(doc.tolist(), row.tolist(), strict=True)])
    assert torch.allclose(got, want, atol=1e-12)
    weight = torch.linspace(-1, 1, len(row), dtype=torch.float64)
    grads = [torch.autograd.grad((s.sin() * weight).sum(), (E, W, bias)) for s in (got, want)]
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*grads, strict=True))
    assert torch.autograd.gradcheck(lambda *x: score_pairs(*x, doc, row, scoring), (E, W, bias))


def test_pairs_without_the_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunked gathers that a GPU takes, here on the meta of the same arithmetic."""
    E, W, bias, doc, row = _pairs()
    want = torch.autograd.grad(score_pairs(E, W, bias, doc, row, "pairs").square().sum(), (E, W, bias))
    monkeypatch.setattr(head_module, "_CHUNK", 2 * D)
    monkeypatch.setattr(head_module, "_compiled", lambda x: False)
    got = torch.autograd.grad(score_pairs(E, W, bias, doc, row, "pairs").square().sum(), (E, W, bias))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, want, strict=True))


def test_no_pairs_still_have_a_gradient() -> None:
    E, W, bias, _, _ = _pairs()
    none = torch.zeros(0, dtype=torch.int64)
    scores = score_pairs(E, W, bias, none, none)
    loss = ragged_loss("bce", scores, none.double(), none, torch.ones(5, dtype=torch.int64), 5)
    assert loss.item() == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(loss, (E, W, bias)))


def test_auto_takes_the_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    real = head_module._PairDots.apply
    monkeypatch.setattr(head_module._PairDots, "apply", lambda *a: taken.append(1) or real(*a))
    E, W, bias, doc, row = _pairs(b=5, n=200)
    score_pairs(E, W, bias, doc, row, "auto")  # 40 % of the pairs: dense
    assert not taken
    score_pairs(E, W, bias, doc[:20], row[:20], "auto")
    assert taken


@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_plain_loops(name: str) -> None:
    rng = np.random.default_rng(0)
    counts = np.array([3, 0, 7, 1])
    doc = np.repeat(np.arange(4), counts)
    scores, values = rng.normal(0, 2, len(doc)), rng.integers(0, 4, len(doc)).astype(float)
    want = 0.0
    for i, s, v in zip(doc, scores, values, strict=True):
        y = 1 if v > 0 else -1
        f = np.log1p(np.exp(-y * s)) if name == "bce" else max(0.0, 1 - y * s) ** 2
        w = v if name == "weighted_squared_hinge" and v > 0 else 1
        want += w * f / counts[i] / 9
    args = [torch.from_numpy(x) for x in (scores, values, doc, counts)]
    assert ragged_loss(name, *args, batch=9).item() == pytest.approx(want, rel=1e-12)
    with pytest.raises(ValueError, match=r"matcher\.loss"):
        ragged_loss("hinge", *args, batch=9)


def test_load_rows() -> None:
    head = _whole()
    W = np.arange(K * D, dtype=np.float64).reshape(K, D)
    W.flags.writeable = False
    head.load_rows(W, np.arange(K))
    assert np.array_equal(head.weight.detach().numpy(), W)
    assert head.bias[3] == 3
    with pytest.raises(ValueError, match=r"nodes 0 to 11"):
        head.load_rows(W[:-1], np.arange(K))


def _level() -> tuple[np.ndarray, np.ndarray, np.ndarray, sp.csr_matrix, np.ndarray]:
    """Small whole numbers: every score is exact, and many are tied."""
    rng = np.random.default_rng(0)
    E = rng.integers(-2, 3, (30, D)).astype(np.float32)
    W, b = rng.integers(-1, 2, (K, D)).astype(np.float32), rng.integers(-2, 3, K).astype(np.float32)
    P = sp.csr_matrix(
        (
            (0.25, 0.5, 1.0) * 20,
            (np.repeat(np.arange(30), 2), rng.permuted(np.tile(np.arange(4), (30, 1)), axis=1)[:, :2].reshape(-1)),
        ),
        shape=(30, 4),
        dtype=np.float32,
    )
    P.sort_indices()
    return E, W, b, P, np.array([0, 2, 5, 5, 11], dtype=np.int64)


def _predict_reference(beam: int, post: str, root: bool) -> list[list[tuple[int, float]]]:
    E, W, b, P, child_ptr = _level()
    rows = []
    for i in range(len(E)):
        parents = [(0, 1.0)] if root else [(p, float(P[i, p])) for p in range(4) if P[i, p]]
        ptr = [0, K] if root else child_ptr
        found = []
        for p, s in parents:
            for c in range(ptr[p], ptr[p + 1]):
                v = float(E[i] @ W[c] + b[c])
                t = np.exp(-(max(0.0, 1 - v) ** 3)) if post == "l3-hinge" else 1 / (1 + np.exp(-v))
                found.append((np.float32(np.float32(t) * np.float32(s)), c))
        best = sorted(found, key=lambda x: (-x[0], x[1]))[:beam]
        rows.append(sorted((c, float(s)) for s, c in best))
    return rows


@on_ranks(1, 2, 3, 4)
@pytest.mark.parametrize("scoring", ["dense", "pairs"])
@pytest.mark.parametrize("post", ["l3-hinge", "sigmoid"])
def test_predict_level_equals_sorting_everything(rank: int, world_size: int, post: str, scoring: str) -> None:
    E, W, b, P, child_ptr = _level()
    # The last rank of several has no document, and takes part all the same.
    cuts = [0, *(np.linspace(0, 30, world_size).astype(int) if world_size > 1 else [30]), 30][: world_size + 1]
    mine = slice(cuts[rank], cuts[rank + 1])
    world = World(rank, world_size, rank, world_size, "cpu")
    for shards in [s for s in (1, 2, 3, 4) if world_size % s == 0]:
        mesh = Mesh.build(world, shards)
        head = ShardedHead(mesh.label_shard(K), D)
        head.load_rows(W[head.start : head.stop], b[head.start : head.stop])
        for beam in (1, 3, 50):
            for root in (False, True):
                parents, ptr = (None, np.array([0, K])) if root else (P[mine], child_ptr)
                got = predict_level(E[mine], head, parents, ptr, beam, post, mesh, block=7, scoring=scoring)
                assert got.has_sorted_indices
                assert got.shape == (cuts[rank + 1] - cuts[rank], K)
                for i, want in enumerate(_predict_reference(beam, post, root)[mine]):
                    a, z = got.indptr[i], got.indptr[i + 1]
                    assert got.indices[a:z].tolist() == [c for c, _ in want], (i, beam, root)
                    assert np.allclose(got.data[a:z], [s for _, s in want], rtol=1e-6)


def test_predict_level_refuses_what_does_not_fit() -> None:
    E, _, _, P, child_ptr = _level()
    with pytest.raises(ValueError, match="do not fit"):
        predict_level(E, _whole(), P[:, :3], child_ptr, 3, "sigmoid", Mesh(World.single()))
    with pytest.raises(ValueError, match="post_processor"):
        predict_level(E, _whole(), P, child_ptr, 3, "noop", Mesh(World.single()))
    assert {post_processor_of(name) for name in LOSSES} == set(POST_PROCESSORS)
