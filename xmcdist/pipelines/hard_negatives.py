"""What a level's beams teach the next one, and what a person should know of them."""

from __future__ import annotations

from pathlib import Path

import scipy.sparse as sp

from xmcdist.config.schema import NegativesConfig
from xmcdist.negatives.confusions import Confusions
from xmcdist.negatives.report import ConfusionRow, HardClusterRow, confusion_table, hardest_table, write_tsv
from xmcdist.negatives.schemes import active_parents, consistent_parents
from xmcdist.negatives.statistics import ClusterStatistics, collect_statistics
from xmcdist.parallel.shards import LabelShard
from xmcdist.pipelines.run import Run
from xmcdist.sparse.store import open_csr
from xmcdist.trees.label_tree import LabelTree
from xmcdist.trees.show import cluster_text

__all__ = ["active_of_level", "report_level"]

_TABLE_ROWS = 200
_LOGGED = 20  # hardest clusters that go to the trackers


def active_of_level(cfg: NegativesConfig, true: sp.csr_matrix, above: Path, start: int, stop: int) -> sp.csr_matrix:
    """M: active parents of the documents ``[start, stop)``, values their weights.

    Args:
        true: true clusters of these documents on the level above ``[stop - start, K]``.
        above: the committed stage of the level above.
    """
    found = open_csr(above / "P")[start:stop] if "man" in cfg.scheme else None
    consistent = None
    if "consistent" in cfg.scheme:
        positives = ClusterStatistics.load(above / "statistics.npy").positives
        confusions = Confusions.load(above / "confusions")
        consistent = consistent_parents(true, confusions, positives, cfg.consistent_share)
    return active_parents(cfg.scheme, true, found, consistent, weight=cfg.weight)


def report_level(
    run: Run, folder: Path, tree: LabelTree, t: int, P: sp.csr_matrix, Y: sp.csr_matrix, step: int
) -> None:
    """Count the beams of a finished level over all ranks; write, log and tabulate them; collective.

    ``statistics.npy`` and ``confusions/`` go into the stage folder, for the level below;
    ``confusions/level-<t>.tsv`` and ``hardest-level-<t>.tsv`` into the run folder, for a person.

    Args:
        P: what this rank's documents retrieve ``[n, K_t]``.
        Y: their true nodes ``[n, K_t]``.
        step: ``global_step`` of the level's end.
    """
    world = run.world
    cuts = LabelShard(world.rank, world.world_size, tree.level_size(t)).cuts
    statistics, own = collect_statistics(P, Y, cuts, per_cluster=run.cfg.negatives.confusions_per_cluster)
    own.save(folder / "confusions", world)
    recall, beam = statistics.beam_recall, run.cfg.matcher.beam
    run.log.say(f"match-{t}: its beam of {beam} holds {100 * recall:.1f} % of the true nodes")
    if not world.is_main:
        return
    statistics.save(folder / "statistics.npy")
    texts = run.data.label_texts()

    def text(node: int) -> str:
        return cluster_text(tree, t, node, texts)

    hardest = hardest_table(statistics, text, by="misses", most=_TABLE_ROWS)
    confused = confusion_table(statistics, Confusions.load(folder / "confusions"), text, most=_TABLE_ROWS)
    tables = Path(run.cfg.run_dir) / "confusions"
    tables.mkdir(exist_ok=True)
    write_tsv(tables / f"hardest-level-{t}.tsv", HardClusterRow, hardest)
    write_tsv(tables / f"level-{t}.tsv", ConfusionRow, confused)
    run.log.metrics(
        {
            "global_step": step,
            "level": t,
            "beam_recall": recall,
            "hardest_clusters": [
                {
                    "cluster": r.cluster,
                    "labels": r.text,
                    "documents": r.positives,
                    "misses": r.misses,
                    "recall": round(r.recall, 4),
                }
                for r in hardest[:_LOGGED]
            ],
        }
    )
    if confused:
        worst = confused[0]
        run.log.say(
            f"match-{t}: most confused: [{worst.text}] taken for [{worst.wrong_text}] in {worst.documents} documents "
            f"({100 * worst.share:.0f} % of its own); all in {tables}"
        )
