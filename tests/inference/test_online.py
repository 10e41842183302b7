"""One document at a time, a few, and a whole block: the same answers, bit for bit."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import scipy.sparse as sp

from tests.inference.test_beam import DOCS, PTR, WIDTH, WORDS, documents, make
from xmcdist.inference import beam as beam_module
from xmcdist.inference.beam import Search, beam_search
from xmcdist.inference.postprocess import NAMES
from xmcdist.rankers.model import LevelWeights, LinearTree
from xmcdist.sparse.features import Features


def repeated(docs: Features, times: int) -> Features:
    """Enough documents that the block's way of looking words up is another one."""
    assert docs.sparse is not None
    assert docs.dense is not None
    X = sp.csr_matrix(sp.vstack([docs.sparse] * times, format="csr"))
    return Features(X, np.concatenate([docs.dense] * times))


def same(got: sp.csr_matrix, want: sp.csr_matrix) -> None:
    assert got.shape == want.shape
    for name in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("beam", "topk"), [(1, 1), (3, 10), (50, 50)])
def test_one_document_is_answered_as_in_a_batch(name: str, beam: int, topk: int) -> None:
    for coarse, labels, parts in ((False, None, 1), (True, None, 3), (True, np.arange(23) % 9, 2)):
        model, _ = make(labels, parts, coarse=coarse)
        docs = documents(coarse=coarse)
        want = beam_search(model, repeated(docs, 5), beam=beam, topk=topk, post_processor=name)[:DOCS]
        for i in range(DOCS):
            same(beam_search(model, docs.rows(i, i + 1), beam=beam, topk=topk, post_processor=name), want[i])
        for size in (2, 15, 16):
            few = beam_search(model, docs.rows(0, size), beam=beam, topk=topk, post_processor=name)
            same(few, want[:size])


def test_either_part_of_the_features_may_be_missing() -> None:
    _, plain = make()
    docs = documents()
    for keep in ("sparse", "dense"):
        levels = [
            LevelWeights.from_rows(
                sp.csr_matrix(W[:, :WORDS]) if keep == "sparse" else None,
                W[:, WORDS:-1] if keep == "dense" else None,
                W[:, -1],
                p,
            )
            for W, p in zip(plain, PTR, strict=True)
        ]
        model = LinearTree(make()[0].tree, levels, WORDS * (keep == "sparse"), WIDTH * (keep == "dense"))
        one = Features(docs.sparse, None) if keep == "sparse" else Features(None, docs.dense)
        want = beam_search(model, one, beam=3, topk=5)
        for i in range(DOCS):
            same(beam_search(model, one.rows(i, i + 1), beam=3, topk=5), want[i])


def test_a_search_is_prepared_once_and_goes_with_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = beam_module.Search.__init__

    def counted(self: Search, *args: object) -> None:
        made.append(args[1:])
        real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(beam_module.Search, "__init__", counted)
    model, _ = make()
    for _ in range(3):
        beam_search(model, documents(), beam=2, topk=3)
        beam_search(model, documents().rows(0, 1), beam=2, topk=3, post_processor="noop")
    assert len(made) == 2
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_rows_are_the_arrays_of_the_answer() -> None:
    model, _ = make()
    search = Search(model, 4, 6)
    for docs in (documents(), documents().rows(7, 8), documents().rows(0, 0)):
        ptr, labels, scores = search.rows(docs)
        same(sp.csr_matrix((scores, labels, ptr), shape=(docs.num_rows, 23)), search(docs))


def test_what_does_not_fit_is_refused_for_one_document_too() -> None:
    model, _ = make()
    with pytest.raises(ValueError, match="were trained on 30 and 3"):
        beam_search(model, Features(documents().sparse, None).rows(0, 1), beam=2, topk=2)
    with pytest.raises(ValueError, match="beam_search_sharded"):
        Search(model.part(0, 2), 2, 2)
