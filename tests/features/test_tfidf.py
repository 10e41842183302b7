"""TF-IDF against scikit-learn's, over ranks, and on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfTransformer, TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import normalize

from tests.features.corpus import corpus
from tests.helpers.ranks import on_ranks
from xmcdist.config.errors import UserError
from xmcdist.config.schema import FeaturesConfig
from xmcdist.features import analyzers, vocabulary
from xmcdist.features.tfidf import Tfidf
from xmcdist.parallel.launch import World
from xmcdist.parallel.shards import row_range

TRAIN, TEST = corpus(200, 1), [*corpus(40, 2), "", "unknownword", "Ka LO mi"]


def _fit(texts: list[str] = TRAIN, **settings: Any) -> Tfidf:
    return Tfidf.fit(iter(texts), FeaturesConfig(**settings), World.single())


def _same(a: sp.csr_matrix, b: Any) -> None:
    assert a.dtype == np.float32
    assert a.has_canonical_format
    assert a.shape == b.shape
    np.testing.assert_allclose(a.toarray(), b.toarray(), atol=1e-6)
    assert a.nnz == b.nnz


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sublinear": False, "min_df": 1},
        {"lowercase": False, "max_df": 0.1},
        {"word_ngrams": [1, 2], "min_df": 3},
        {"word_ngrams": [2, 3], "min_df": 1, "max_features": None},
        {"word_ngrams": None, "char_ngrams": [3, 3]},
        {"word_ngrams": None, "char_ngrams": [2, 5], "max_df": 0.5, "sublinear": False},
    ],
)
def test_one_block_equals_scikit_learn(settings: dict[str, Any]) -> None:
    cfg = FeaturesConfig(**settings)
    ngrams = cfg.word_ngrams or cfg.char_ngrams or []
    theirs = TfidfVectorizer(
        analyzer="word" if cfg.word_ngrams else "char_wb",
        ngram_range=(ngrams[0], ngrams[1]),
        lowercase=cfg.lowercase,
        sublinear_tf=cfg.sublinear,
        min_df=cfg.min_df,
        max_df=cfg.max_df,
    ).fit(TRAIN)
    ours = _fit(**settings)
    assert ours.terms == [theirs.get_feature_names_out().tolist()]
    np.testing.assert_allclose(ours.idf, theirs.idf_, rtol=1e-14)
    for texts in (TRAIN, TEST):
        _same(ours.transform(texts), theirs.transform(texts))


@pytest.mark.parametrize("limit", [1, 7, 20, 60, 100_000])
def test_max_features_keeps_the_most_frequent_and_then_the_first(limit: int) -> None:
    ours = _fit(max_features=limit, min_df=2)
    counter = CountVectorizer(min_df=2).fit(TRAIN)
    total = dict(zip(counter.get_feature_names_out(), counter.transform(TRAIN).sum(axis=0).A1, strict=True))
    want = sorted(sorted(total, key=lambda term: (-total[term], term))[:limit])
    assert len(set(total.values())) < len(total)  # there are ties
    assert ours.terms == [want]
    _same(ours.transform(TEST), TfidfVectorizer(sublinear_tf=True, vocabulary=want).fit(TRAIN).transform(TEST))


def test_two_blocks_are_concatenated_and_scaled_together() -> None:
    ours = _fit(word_ngrams=[1, 2], char_ngrams=[3, 3], max_features=50)
    words = _fit(word_ngrams=[1, 2], max_features=50)
    characters = _fit(word_ngrams=None, char_ngrams=[3, 3], max_features=50)
    assert ours.terms is not None
    assert words.terms is not None
    assert characters.terms is not None
    assert ours.terms == [*words.terms, *characters.terms]
    assert [len(block) for block in ours.terms] == [50, 50]
    plain = [
        TfidfVectorizer(analyzer=kind, ngram_range=n, sublinear_tf=True, norm=None, vocabulary=block).fit(TRAIN)
        for kind, n, block in [("word", (1, 2), ours.terms[0]), ("char_wb", (3, 3), ours.terms[1])]
    ]
    _same(ours.transform(TEST), normalize(sp.hstack([p.transform(TEST) for p in plain], format="csr")))


@pytest.mark.parametrize("sublinear", [True, False])
def test_hashing_equals_scikit_learn(sublinear: bool) -> None:
    ours = _fit(hashing_bits=5, min_df=1, max_features=None, sublinear=sublinear)
    assert ours.num_features == 32
    assert ours.idf.all()  # every column was seen, so none is empty
    theirs = make_pipeline(
        HashingVectorizer(n_features=32, norm=None, alternate_sign=False), TfidfTransformer(sublinear_tf=sublinear)
    ).fit(TRAIN)
    _same(ours.transform(TEST), theirs.transform(TEST))


def test_hashed_columns_out_of_bounds_are_empty() -> None:
    ours = _fit(hashing_bits=7, char_ngrams=[3, 3], min_df=3, max_df=0.3, max_features=20)
    assert ours.num_features == 256
    for block, (kind, n) in enumerate([("word", (1, 1)), ("char_wb", (3, 3))]):
        X = HashingVectorizer(analyzer=kind, ngram_range=n, n_features=128, norm=None, alternate_sign=False).transform(
            TRAIN
        )
        df, tf = np.diff(X.tocsc().indptr), X.sum(axis=0).A1
        fit = [c for c in range(128) if 3 <= df[c] <= 0.3 * len(TRAIN)]
        want = sorted(fit, key=lambda c: (-tf[c], c))[:20]
        assert set(np.flatnonzero(ours.idf[block * 128 : block * 128 + 128])) == set(want)
    X = ours.transform(TEST)
    assert set(X.indices) <= set(np.flatnonzero(ours.idf))


def test_texts_without_known_words_give_empty_rows() -> None:
    ours = _fit(min_df=1)
    X = ours.transform(["", "nothingofthis", "\n \t"])
    assert X.shape == (3, ours.num_features)
    assert X.nnz == 0
    assert ours.transform([]).shape == (0, ours.num_features)
    assert _fit(hashing_bits=5).transform([]).shape == (0, 32)


def test_batches_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _fit(char_ngrams=[3, 3])
    hashed = _fit(hashing_bits=6)
    monkeypatch.setattr(analyzers, "_BATCH_CHARS", 100)
    for before, now in ((whole, _fit(char_ngrams=[3, 3])), (hashed, _fit(hashing_bits=6))):
        assert now.fingerprint == before.fingerprint
        X = now.transform(iter(TEST))
        monkeypatch.setattr(analyzers, "_BATCH_CHARS", 1 << 20)
        Z = before.transform(TEST)
        monkeypatch.setattr(analyzers, "_BATCH_CHARS", 100)
        assert (X.indptr.tolist(), X.indices.tolist(), X.data.tolist()) == (
            Z.indptr.tolist(),
            Z.indices.tolist(),
            Z.data.tolist(),
        )


def test_no_term_left_names_the_settings() -> None:
    with pytest.raises(UserError, match=r"2 documents with features\.min_df=3"):
        _fit(["one two", "two three"], min_df=3)
    with pytest.raises(UserError, match=r"0 documents"):
        _fit([], min_df=1)
    with pytest.raises(UserError, match="hashed column"):
        _fit(["one two", "two three"], min_df=3, hashing_bits=4)
    with pytest.raises(TypeError, match="single str"):
        _fit().transform("one text")


SETTINGS: list[dict[str, Any]] = [
    {"word_ngrams": [1, 2], "char_ngrams": [2, 3], "max_features": 40, "max_df": 0.4},
    {"min_df": 1, "max_features": None},
    {"hashing_bits": 6, "max_features": 30, "char_ngrams": [3, 3]},
]


@on_ranks(1, 2, 3)
def test_ranks_together_fit_the_same(rank: int, world_size: int) -> None:
    vocabulary._EXCHANGED = 50  # several exchanges
    world = World(rank, world_size, rank, world_size, "cpu")
    for settings in SETTINGS:
        for uneven in (False, True):
            start, stop = row_range(len(TRAIN), rank, world_size)
            if uneven:  # all texts but the first 3 on the last rank
                start, stop = (min(rank, 3), len(TRAIN) if rank == world_size - 1 else min(rank + 1, 3))
            got = Tfidf.fit(TRAIN[start:stop], FeaturesConfig(**settings), world)
            want = _alone(settings)
            assert got.terms == want.terms
            assert got.idf.tobytes() == want.idf.tobytes()
            assert got.fingerprint == want.fingerprint


def test_processes_agree_on_the_owner_of_a_term() -> None:
    # Ranks forked from one server share Python's hash seed, launched ones do not.
    assert [vocabulary._piece(term, 1000) for term in ("word", "two words", "日本", " é")] == [265, 725, 756, 451]


@on_ranks(3)
def test_ranks_without_documents(rank: int, world_size: int) -> None:
    world = World(rank, world_size, rank, world_size, "cpu")
    got = Tfidf.fit(TRAIN if rank == 1 else [], FeaturesConfig(), world)
    assert got.fingerprint == _alone({}).fingerprint
    with pytest.raises(UserError, match="no term is left"):
        Tfidf.fit([], FeaturesConfig(), world)


def _alone(settings: dict[str, Any]) -> Tfidf:
    """Columns and idf of all documents from scikit-learn's counts, for the same settings."""
    cfg = FeaturesConfig(**settings)
    terms, idfs = [], []
    for kind, n in (("word", cfg.word_ngrams), ("char_wb", cfg.char_ngrams)):
        if n is None:
            continue
        rule: dict[str, Any] = {"analyzer": kind, "ngram_range": (n[0], n[1])}
        if cfg.hashing_bits is None:
            counter = CountVectorizer(**rule)
            X = counter.fit_transform(TRAIN)
            names = counter.get_feature_names_out().tolist()
        else:
            rule |= {"n_features": 1 << cfg.hashing_bits, "norm": None, "alternate_sign": False}
            X = HashingVectorizer(**rule).transform(TRAIN)
            names = list(range(X.shape[1]))
        df, tf = np.diff(X.tocsc().indptr).astype(np.int64), X.sum(axis=0).A1
        kept = [i for i in range(X.shape[1]) if cfg.min_df <= df[i] <= cfg.max_df * len(TRAIN)]
        kept = sorted(sorted(kept, key=lambda i: (-tf[i], names[i]))[: cfg.max_features])
        idf = np.log((1 + len(TRAIN)) / (1 + df)) + 1
        terms.append([names[i] for i in kept])
        idfs.append(idf[kept] if cfg.hashing_bits is None else np.where(np.isin(names, kept), idf, 0.0))
    reading = _fit(**{**settings, "min_df": 1, "max_df": 1.0}).reading
    return Tfidf(
        reading,
        sublinear=cfg.sublinear,
        hashing_bits=cfg.hashing_bits,
        terms=terms if cfg.hashing_bits is None else None,
        idf=np.concatenate(idfs),
    )


@pytest.mark.parametrize("settings", SETTINGS)
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, settings: dict[str, Any]) -> None:
    ours = _fit(**settings)
    ours.save(tmp_path / "a" / "tfidf")
    back = Tfidf.load(tmp_path / "a" / "tfidf")
    assert back.fingerprint == ours.fingerprint
    assert back.terms == ours.terms
    assert (back.transform(TEST) != ours.transform(TEST)).nnz == 0


def test_strange_characters_survive_the_disk(tmp_path: Path) -> None:
    texts = ["a\u2028b\x85c\x0bd \ud800e \x1cf", "e\u0301 \U0001f600\u200d\U0001f600 \rg\r\nh"] * 2
    ours = _fit(texts, word_ngrams=[1, 2], char_ngrams=[1, 4], min_df=1)
    ours.save(tmp_path)
    assert Tfidf.load(tmp_path).terms == ours.terms


def test_fingerprint_tells_apart() -> None:
    different = [
        _fit(),
        _fit(TRAIN[:-1]),
        _fit(sublinear=False),
        _fit(lowercase=False),
        _fit(max_features=10),
        _fit(char_ngrams=[3, 3]),
        _fit(hashing_bits=6),
    ]
    assert len({t.fingerprint for t in different}) == len(different)
    assert _fit().fingerprint == _fit().fingerprint


def test_damaged_files_are_named(tmp_path: Path) -> None:
    ours = _fit(char_ngrams=[3, 3])

    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words) as error:
            Tfidf.load(tmp_path)
        assert str(tmp_path) in str(error.value)

    refused("tfidf.json")
    ours.save(tmp_path)
    (tmp_path / "terms.char.txt").unlink()
    refused(r"terms\.char\.txt")
    ours.save(tmp_path)
    whole = (tmp_path / "terms.word.txt").read_bytes()
    (tmp_path / "terms.word.txt").write_bytes(whole[: len(whole) // 2])
    refused("belong together")
    ours.save(tmp_path)
    whole = (tmp_path / "idf.npy").read_bytes()
    (tmp_path / "idf.npy").write_bytes(whole[:-16])
    refused("whole TF-IDF")
    ours.save(tmp_path)
    settings = json.loads((tmp_path / "tfidf.json").read_text())
    (tmp_path / "tfidf.json").write_text(json.dumps({**settings, "sublinear": False}))
    refused("belong together")
    (tmp_path / "tfidf.json").write_text(json.dumps({**settings, "format": 9}))
    refused("format 9")
    (tmp_path / "tfidf.json").write_text("[1, 2")
    refused("whole TF-IDF")
