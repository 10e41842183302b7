"""Statistics of beams against plain loops, bit for bit, on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from tests.helpers.ranks import on_ranks
from tests.negatives.beams import DOCS, NEVER_RETRIEVED, NO_POSITIVE, K, Pairs, beams, counted
from xmcdist.negatives import confusions as confusions_module
from xmcdist.negatives import statistics as statistics_module
from xmcdist.negatives.confusions import Confusions
from xmcdist.negatives.report import ConfusionRow, HardClusterRow, confusion_table, hardest_table, write_tsv
from xmcdist.negatives.statistics import ClusterStatistics, collect_statistics
from xmcdist.parallel.collectives import gather_objects
from xmcdist.parallel.launch import World
from xmcdist.parallel.shards import LabelShard
from xmcdist.sparse.store import StoreError

FIELDS = ("positives", "retrieved", "hits", "false_mass")
DOC_CUTS = {1: [0, DOCS], 2: [0, 60, DOCS], 3: [0, 31, 31, DOCS], 4: [0, 0, 7, 80, DOCS]}
UNEVEN = {1: [0, K], 2: [0, K, K], 3: [0, 0, 5, K], 4: [0, 3, 3, 12, K]}


def _rows(confusions: Confusions) -> Pairs:
    of = zip(confusions.wrong.tolist(), confusions.count.tolist(), confusions.mass.tolist(), strict=True)
    pairs = list(of)
    return [pairs[a:z] for a, z in zip(confusions.ptr[:-1], confusions.ptr[1:], strict=True)]


def test_the_data_have_every_odd_case() -> None:
    P, Y = beams()
    stats, pairs = counted(P, Y, K)
    assert stats["positives"][NO_POSITIVE] == 0 < stats["retrieved"][NO_POSITIVE]
    assert stats["retrieved"][NEVER_RETRIEVED] == 0 < stats["positives"][NEVER_RETRIEVED]
    assert 0 in np.diff(P.indptr)
    assert 0 in np.diff(Y.indptr)
    assert np.any(P.data == 0)
    assert np.any(Y.data == 0)
    triples = [(c, *p) for c in range(K) for p in pairs[c]]
    assert any(m == 0 for _, _, _, m in triples), "a confusion whose scores are all 0"
    tied = {(c, n, m) for c, _, n, m in triples}
    assert len(tied) < len(triples), "confusions that only their ids order"
    by_mass = {(c, m) for c, _, _, m in triples}
    assert len(by_mass) < len(tied), "confusions that their counts order"


@on_ranks(1, 2, 3, 4)
def test_equals_plain_loops(rank: int, world_size: int) -> None:
    for seed in range(2):
        P, Y = beams(seed)
        start, stop = DOC_CUTS[world_size][rank : rank + 2]
        for cuts in (UNEVEN[world_size], LabelShard(0, world_size, K).cuts):
            for per_cluster, room in ((1, 17), (3, 1), (3, 90), (K, 1 << 22)):
                own = P[start:stop], Y[start:stop]
                got, confusions = collect_statistics(*own, cuts, per_cluster=per_cluster, room=room)
                stats, pairs = counted(P, Y, per_cluster)
                for name in FIELDS:
                    assert getattr(got, name).dtype == np.int64
                    assert getattr(got, name).tolist() == stats[name], name
                assert _rows(confusions) == pairs[cuts[rank] : cuts[rank + 1]]
                assert confusions.start == cuts[rank]


@pytest.mark.parametrize("room", [1, 40, 90])
def test_an_owner_never_receives_more_than_it_has_room_for(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    received = []

    def count(parts: list[np.ndarray], group: None) -> list[np.ndarray]:
        received.append(parts[0].size // 3 if parts[0].ndim == 2 else 0)
        return parts

    monkeypatch.setattr(confusions_module, "exchange", count)
    P, Y = beams()
    collect_statistics(P, Y, [0, K], per_cluster=2, room=room)
    of_cluster = [len(row) for row in counted(P, Y, K)[1]]
    assert sum(received) == sum(of_cluster)
    assert max(received) <= max(room, *of_cluster) < sum(of_cluster)


@on_ranks(1, 2, 3)
def test_parts_written_by_all_ranks_read_as_one(tmp_path: Path, rank: int, world_size: int) -> None:
    P, Y = beams()
    start, stop = DOC_CUTS[world_size][rank : rank + 2]
    stats, own = collect_statistics(P[start:stop], Y[start:stop], UNEVEN[world_size], per_cluster=4)
    world = World(rank, world_size, rank, world_size, "cpu")
    own.save(tmp_path / "confusions", world)
    if rank == 0:
        stats.save(tmp_path / "statistics.npy")
    gather_objects(None)
    whole = Confusions.load(tmp_path / "confusions")
    want_stats, want = counted(P, Y, 4)
    assert _rows(whole) == want
    assert whole.true().tolist() == [c for c in range(K) for _ in want[c]]
    again = ClusterStatistics.load(tmp_path / "statistics.npy")
    assert all(getattr(again, name).tolist() == want_stats[name] for name in FIELDS)
    assert len(set(gather_objects(b"".join(getattr(again, name).tobytes() for name in FIELDS)))) == 1


def test_what_follows_from_the_counts() -> None:
    P, Y = beams()
    stats, confusions = collect_statistics(P, Y, [0, K], per_cluster=K)
    true = (Y.toarray() > 0).astype(int)
    found = np.zeros((DOCS, K), int)
    found[np.repeat(np.arange(DOCS), np.diff(P.indptr)), P.indices] = 1
    assert stats.beam_recall == (true * found).sum() / true.sum()
    assert stats.misses.tolist() == (true * (1 - found)).sum(axis=0).tolist()
    assert np.allclose(stats.false_score, (P.toarray() * (1 - true)).sum(axis=0), atol=1e-6)
    for k, (c, w) in enumerate(zip(confusions.true(), confusions.wrong, strict=True)):
        docs = [i for i in range(DOCS) if true[i, c] and found[i, w] and not true[i, w]]
        assert confusions.mean_score()[k] == pytest.approx(np.mean([float(P[i, w]) for i in docs]), abs=1e-9)
    empty = sp.csr_matrix((0, K), dtype=np.float32)
    none, no_pairs = collect_statistics(empty, empty, [0, K], per_cluster=1)
    assert none.beam_recall == 0
    assert len(no_pairs.wrong) == 0
    assert no_pairs.num_clusters == K
    assert hardest_table(none, str, by="misses") == []


def _model_beams(beam: int = 3) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """A small nearest-centroid model over 9 clusters, of which 2 and 6 hold the same kind of documents."""
    rng = np.random.default_rng(0)
    centroids = rng.normal(size=(9, 24))
    centroids[6] = centroids[2] + 0.05 * rng.normal(size=24)
    cluster = np.repeat(np.arange(9), 40)
    documents = centroids[cluster] + 0.6 * rng.normal(size=(360, 24))
    learnt = np.stack([documents[cluster == c].mean(axis=0) for c in range(9)])
    distance = np.linalg.norm(documents[:, None] - learnt[None], axis=2)
    score = np.exp(-distance) / np.exp(-distance).sum(axis=1, keepdims=True)
    P = np.where(score >= np.sort(score, axis=1)[:, [-beam]], score, 0).astype(np.float32)
    return sp.csr_matrix(P), sp.csr_matrix(np.eye(9, dtype=np.float32)[cluster])


def test_a_planted_confusion_comes_first_and_permuted_beams_do_not_show_it() -> None:
    P, Y = _model_beams()

    def table(P: sp.csr_matrix) -> list[ConfusionRow]:
        stats, confusions = collect_statistics(P, Y, [0, 9], per_cluster=8)
        return confusion_table(stats, confusions, lambda c: f"cluster {c}")

    rows = table(P)
    assert {(r.cluster, r.wrong) for r in rows[:2]} == {(2, 6), (6, 2)}
    assert rows[1].mass > 5 * rows[2].mass
    assert rows[0].share > 0.95
    for seed in range(5):
        control = table(P[np.random.default_rng(seed).permutation(360)])
        assert {(r.cluster, r.wrong) for r in control[:2]} != {(2, 6), (6, 2)}
        assert control[0].mass < 2 * control[2].mass, "no pair stands out"
        assert control[0].mass < 0.75 * rows[1].mass


def test_tables_equal_sorting_everything(tmp_path: Path) -> None:
    P, Y = beams()
    stats, confusions = collect_statistics(P, Y, [0, K], per_cluster=4)
    counts, pairs = counted(P, Y, 4)
    names = [f"soap\t{c}\nfish" for c in range(K)]
    everything = [(-m, -n, c, w) for c in range(K) for w, n, m in pairs[c]]
    rows = confusion_table(stats, confusions, names.__getitem__, most=10)
    assert [r.position for r in rows] == list(range(1, 11))
    assert [(r.cluster, r.wrong, r.documents) for r in rows] == [(c, w, -n) for _, n, c, w in sorted(everything)[:10]]
    assert all(r.share == r.documents / counts["positives"][r.cluster] for r in rows)
    assert all((r.text, r.wrong_text) == (names[r.cluster], names[r.wrong]) for r in rows)
    assert rows[0].mass == -sorted(everything)[0][0] / 2**32

    for by in ("misses", "false_mass"):
        amount = [p - h for p, h in zip(counts["positives"], counts["hits"], strict=True)]
        if by == "false_mass":
            amount = counts["false_mass"]
        want = [c for c in sorted(range(K), key=lambda c: (-amount[c], c)) if amount[c]]
        hard = hardest_table(stats, names.__getitem__, by=by, most=K)
        assert [r.cluster for r in hard] == want
        assert all(r.misses == r.positives - r.hits for r in hard)
        assert all(r.recall == counts["hits"][r.cluster] / max(counts["positives"][r.cluster], 1) for r in hard)
    assert hard[-1].false_mass == counts["false_mass"][hard[-1].cluster] / 2**32

    write_tsv(tmp_path / "confusions.tsv", ConfusionRow, rows)
    lines = [line.split("\t") for line in (tmp_path / "confusions.tsv").read_text().splitlines()]
    assert lines[0] == list(ConfusionRow._fields)
    assert lines[1][:3] == ["1", str(rows[0].cluster), f"soap {rows[0].cluster} fish"]
    assert {len(line) for line in lines} == {len(ConfusionRow._fields)}
    write_tsv(tmp_path / "none.tsv", HardClusterRow, [])
    assert (tmp_path / "none.tsv").read_text() == "\t".join(HardClusterRow._fields) + "\n"


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    P, Y = beams()
    for cuts in ([0, K, K], [1, K], [0, K - 1]):
        with pytest.raises(ValueError, match=r"cuts .* do not part 13 clusters over 1 ranks"):
            collect_statistics(P, Y, cuts, per_cluster=1)
    with pytest.raises(ValueError, match="documents x clusters"):
        collect_statistics(P, Y[:-1], [0, K], per_cluster=1)
    with pytest.raises(ValueError, match="per_cluster=0"):
        collect_statistics(P, Y, [0, K], per_cluster=0)
    for bad in (1.5, -0.1, np.nan):
        wrong = P.copy()
        wrong.data[3] = bad
        with pytest.raises(ValueError, match=r"scores must be in \[0, 1\]"):
            collect_statistics(wrong, Y, [0, K], per_cluster=1)
    twice = sp.csr_matrix((np.ones(2, np.float32), [3, 3], [0, 2]), shape=(1, K))
    with pytest.raises(ValueError, match="of the beams must ascend"):
        collect_statistics(twice, Y[:1], [0, K], per_cluster=1)
    monkeypatch.setattr(statistics_module, "_MOST_DOCS", DOCS)
    with pytest.raises(ValueError, match="83 documents"):
        collect_statistics(P, Y, [0, K], per_cluster=1)
    with pytest.raises(ValueError, match="by='recall'"):
        hardest_table(collect_statistics(P[1:], Y[1:], [0, K], per_cluster=1)[0], str, by="recall")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    P, Y = beams()
    stats, confusions = collect_statistics(P, Y, [0, K], per_cluster=2)
    confusions.save(tmp_path, World.single())
    np.save(tmp_path / "mass.npy", confusions.mass[:-1])
    with pytest.raises(StoreError, match=r"mass\.npy is damaged"):
        Confusions.load(tmp_path)
    np.save(tmp_path / "ptr.npy", confusions.ptr[::-1].copy())
    with pytest.raises(StoreError, match=r"ptr\.npy is damaged"):
        Confusions.load(tmp_path)
    np.save(tmp_path / "s.npy", np.stack([stats.hits, stats.misses]))
    with pytest.raises(StoreError, match=r"s\.npy is damaged: 2 rows"):
        ClusterStatistics.load(tmp_path / "s.npy")
