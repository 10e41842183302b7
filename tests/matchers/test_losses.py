"""Weighted pairs in the loss, against plain loops and over shards."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from xmcdist.matchers.candidates import Candidates, CandidateSource
from xmcdist.matchers.losses import LOSSES, ragged_loss
from xmcdist.negatives.schemes import active_parents

CHILD_PTR = np.array([0, 3, 7, 8, 13], dtype=np.int64)
B, K = 9, 13


def _candidates() -> tuple[Candidates, sp.csr_matrix, sp.csr_matrix, sp.csr_matrix]:
    rng = np.random.default_rng(0)
    Y = sp.csr_matrix((rng.integers(1, 4, (B, K)) * (rng.random((B, K)) < 0.2)).astype(np.float32))
    lift = np.stack([Y.toarray()[:, a:b].sum(axis=1) for a, b in pairwise(CHILD_PTR)], 1)
    tfn = sp.csr_matrix(lift.astype(np.float32))
    man = sp.random(B, 4, density=0.6, random_state=rng, format="csr", dtype=np.float32)
    man.data[::4] = 0.0
    M = active_parents("tfn+man", tfn, man, weight="score")
    source = CandidateSource(M, Y, CHILD_PTR, max_active=1000, seed=0, level=2, weighted=True)
    return source.of(np.arange(B), 0), Y, tfn, man


def _loss(name: str, scores: torch.Tensor, c: Candidates, *, weighted: bool = True) -> torch.Tensor:
    value, weight, counts = (torch.from_numpy(x) for x in (c.value, c.weight, c.counts))
    doc = torch.from_numpy(c.doc())
    picked = scores[doc, torch.from_numpy(c.node)]
    return ragged_loss(name, picked, value, doc, counts, B, weight if weighted else None)


@pytest.mark.parametrize("name", LOSSES)
def test_weighted_losses_and_gradients_equal_plain_loops(name: str) -> None:
    c, Y, tfn, man = _candidates()
    scores = torch.randn(B, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y, true, found = Y.toarray(), tfn.toarray() > 0, man.toarray()
    stored = np.zeros((B, 4), bool)
    stored[np.repeat(np.arange(B), np.diff(man.indptr)), man.indices] = True
    want, slope = 0.0, np.zeros((B, K))
    for i in range(B):
        active = [k for p in range(4) if true[i, p] or stored[i, p] for k in range(CHILD_PTR[p], CHILD_PTR[p + 1])]
        for k in active:  # positives are among them: their parents are true
            p = int(np.searchsorted(CHILD_PTR, k, side="right")) - 1
            sign, s = (1 if y[i, k] else -1), float(scores.detach()[i, k])
            weight = 1.0 if true[i, p] else float(found[i, p])
            if name == "weighted_squared_hinge" and y[i, k]:
                weight *= float(y[i, k])
            if name == "bce":
                term, d = math.log1p(math.exp(-sign * s)), -sign / (1 + math.exp(sign * s))
            else:
                margin = max(0.0, 1 - sign * s)
                term, d = margin**2, -2 * sign * margin
            want += weight * term / len(active) / B
            slope[i, k] += weight * d / len(active) / B
    got = _loss(name, scores, c)
    assert got.item() == pytest.approx(want, rel=1e-12)
    assert np.allclose(torch.autograd.grad(got, scores)[0].numpy(), slope, atol=1e-14)
    assert got.item() < 0.95 * _loss(name, scores, c, weighted=False).item()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_shards_sum_to_the_whole(world: int) -> None:
    c = _candidates()[0]
    scores = torch.randn(B, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parts = []
    for r in range(world):
        start, stop = r * K // world, (r + 1) * K // world
        parts.append(_loss("weighted_squared_hinge", scores[:, start:stop], c.restrict(start, stop)))
    assert sum(parts).item() == pytest.approx(_loss("weighted_squared_hinge", scores, c).item(), rel=1e-12)


def test_weights_of_one_change_nothing_and_of_zero_leave_nothing() -> None:
    c = _candidates()[0]
    scores = torch.randn(B, K, generator=torch.Generator().manual_seed(2), requires_grad=True)
    plain = _loss("bce", scores, c, weighted=False)
    doc, node = torch.from_numpy(c.doc()), torch.from_numpy(c.node)
    rest = torch.from_numpy(c.value), doc, torch.from_numpy(c.counts), B
    assert torch.equal(ragged_loss("bce", scores[doc, node], *rest, torch.ones(len(doc))), plain)
    none = ragged_loss("bce", scores[doc, node], *rest, torch.zeros(len(doc)))
    assert none.item() == 0
    assert not torch.autograd.grad(none, scores)[0].any()
