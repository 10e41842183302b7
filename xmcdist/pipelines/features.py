"""Sparse document features: TF-IDF fitted over ranks, or those that came with the data."""

from __future__ import annotations

from pathlib import Path

from xmcdist.checkpoint.parts import write_csr
from xmcdist.config.errors import UserError
from xmcdist.features.tfidf import Tfidf
from xmcdist.pipelines.run import Run
from xmcdist.sparse.csr import unit_rows

__all__ = ["features_stage"]


def features_stage(run: Run) -> Path:
    """Write ``X.trn`` and ``X.tst`` (rows of unit length) and the fitted ``tfidf/``.

    Every rank counts and transforms its own documents; the result does not depend on
    how many there are.
    """
    kind = run.cfg.features.kind
    given = run.data.X("trn") is not None
    if kind == "auto":
        kind = "given" if given else "tfidf"
    if kind == "given" and not given:
        raise UserError("features.kind=given, but the data set has no X.trn.npz; set features.kind=tfidf")
    if kind == "tfidf" and not run.data.has_text:
        raise UserError("features.kind=tfidf needs texts, and this data set has none; set features.kind=given")
    splits = ("trn", "tst") if run.data.has_test else ("trn",)

    def body(folder: Path) -> None:
        vectorizer = None
        if kind == "tfidf":
            texts = run.data.corpus()
            start, stop = run.own(len(texts))
            vectorizer = Tfidf.fit(texts.iterate(start, stop), run.cfg.features, run.world)
            if run.world.is_main:
                vectorizer.save(folder / "tfidf")
            run.log.say(f"features: {vectorizer.num_features} terms")
        for split in splits:
            start, stop = run.own(run.data.num_docs(split))
            if vectorizer is not None:
                part = vectorizer.transform(run.data.texts(split).iterate(start, stop))
            else:
                X = run.data.X(split)
                if X is None:
                    raise UserError(f"the data set has X.trn but no X.{split}: give both or neither")
                part = unit_rows(X[start:stop])
            write_csr(folder / f"X.{split}", part, run.world)

    return run.stages.run("features", run.inputs("features", kind=kind), body)
