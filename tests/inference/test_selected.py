"""Scores of given labels against following their paths in plain Python, and against a full beam."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from tests.inference.test_beam import DOCS, PTR, documents, make, outputs
from tests.inference.test_postprocess import formula
from xmcdist.inference import selected as selected_module
from xmcdist.inference.beam import beam_search
from xmcdist.inference.selected import score_selected
from xmcdist.rankers.model import LinearTree
from xmcdist.sparse.features import Features


def some_labels(num_labels: int) -> sp.csr_matrix:
    """A few labels of most documents; values, 0 among them, mean nothing."""
    rng = np.random.default_rng(5)
    chosen = rng.random((DOCS, num_labels)) < 0.3
    chosen[3] = False
    chosen[4] = True
    out = sp.csr_matrix(chosen.astype(np.float32))
    out.data = rng.integers(0, 2, out.nnz).astype(np.float32)
    return out


def follow(
    model: LinearTree, plain: list[np.ndarray], docs: Features, name: str, last: str, i: int
) -> dict[int, float]:
    """Every label's score of document i, by walking each path from the root."""
    v, found = [outputs(W, docs, i) for W in plain], {}
    for slot, label in enumerate(model.tree.labels):
        path = [slot]
        for ptr in reversed(PTR[1:]):
            path.insert(0, next(p for p in range(len(ptr) - 1) if ptr[p] <= path[0] < ptr[p + 1]))
        score = 0.0 if name.startswith("log-") else 1.0
        for t, node in enumerate(path):
            score = float(np.float32(formula(last if t == 2 else name, float(np.float32(v[t][node])), score)))
        found[int(label)] = max(found.get(int(label), -np.inf), score)
    return found


@pytest.mark.parametrize(
    ("name", "last"), [("l3-hinge", None), ("noop", None), ("log-sigmoid", None), ("sigmoid", "noop")]
)
@pytest.mark.parametrize("copies", [False, True])
def test_given_labels_are_scored_along_their_paths(name: str, last: str | None, copies: bool) -> None:
    model, plain = make(np.arange(23) % 9 if copies else None, parts=3)
    docs, chosen = documents(), some_labels(model.tree.num_labels)
    got = score_selected(model, docs, chosen, post_processor=name, last_post_processor=last)
    np.testing.assert_array_equal(got.indptr, chosen.indptr)
    np.testing.assert_array_equal(got.indices, chosen.indices)
    for i in range(DOCS):
        want = follow(model, plain, docs, name, last or name, i)
        row = slice(got.indptr[i], got.indptr[i + 1])
        np.testing.assert_allclose(got.data[row], [want[j] for j in got.indices[row]], rtol=2e-4, atol=1e-30)


def test_labels_a_beam_finds_have_the_scores_it_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = make(np.arange(23) % 9)
    full = beam_search(model, documents(), beam=50, topk=9)
    for docs, threads in ((2048, 1), (7, 3), (1, 1)):
        monkeypatch.setattr(selected_module, "_BLOCK_DOCS", docs)
        got = score_selected(model, documents(), full, threads=threads)
        np.testing.assert_array_equal(got.indices, full.indices)
        np.testing.assert_array_equal(got.data, full.data)


def test_labels_may_come_in_any_order_and_twice() -> None:
    model, _ = make()
    given = sp.csr_matrix((np.ones(4, np.float32), [5, 2, 5, 0], [0, 3, 4]), shape=(2, 23))
    plain = sp.csr_matrix((np.ones(3, np.float32), [2, 5, 0], [0, 2, 3]), shape=(2, 23))
    docs = documents().rows(0, 2)
    got = score_selected(model, docs, given)
    assert got.indices.tolist() == [2, 5, 0]
    np.testing.assert_array_equal(got.data, score_selected(model, docs, plain).data)
    assert given.nnz == 4


def test_nothing_selected_and_no_documents_are_answers() -> None:
    model, _ = make()
    none = score_selected(model, documents(), sp.csr_matrix((DOCS, 23), dtype=np.float32))
    assert (none.shape, none.nnz) == ((DOCS, 23), 0)
    assert score_selected(model, documents().rows(0, 0), sp.csr_matrix((0, 23), dtype=np.float32)).shape == (0, 23)


def test_what_does_not_fit_is_refused() -> None:
    model, _ = make()
    with pytest.raises(ValueError, match="selected is"):
        score_selected(model, documents(), sp.csr_matrix((DOCS, 22), dtype=np.float32))
    with pytest.raises(ValueError, match="only a whole model"):
        score_selected(model.part(0, 2), documents(), some_labels(23))
    with pytest.raises(ValueError, match="were trained on 30 and 3"):
        score_selected(model, Features(documents().sparse, None), some_labels(23))
