"""What is planned: settings, counts, machine, and what follows from them level by level."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from xmcdist.config.errors import UserError
from xmcdist.config.schema import RunConfig, TreeConfig
from xmcdist.encoders.costs import EncoderCosts
from xmcdist.matchers.head import PAIR_COST
from xmcdist.observability.devices import Device
from xmcdist.planning.counts import DataCounts
from xmcdist.trees.files import read_tree
from xmcdist.trees.levels import binary_depth, cluster_levels

__all__ = ["Job", "Machine", "MatchLevel", "level_sizes"]


@dataclass(frozen=True)
class Machine:
    """What it is to run on.

    Attributes:
        ranks: W, all processes; ``per_node``: of one machine.
        device: kind of GPU, or None: CPU processes.
        flops: FLOP a second of one process at most.
        utilisation: share of that which the encoder's training reaches.
        cores: CPU cores a process.
        link: bytes a second that a rank sends to a rank of its node; ``network``: to another node.
        memory: bytes a node's processes share; 0: unknown.
    """

    ranks: int
    per_node: int
    device: Device | None
    flops: float
    utilisation: float
    cores: float
    link: float
    network: float
    memory: float = 0.0

    @property
    def name(self) -> str:
        """For people."""
        return "CPU process" if self.device is None else self.device.name


@dataclass(frozen=True)
class MatchLevel:
    """One level that the matcher is fine-tuned on.

    Attributes:
        level: t, from 1.
        nodes: K_t.
        rows: of the largest shard of the head.
        steps: optimizer steps.
        candidates: of a document, at most, over all ranks.
        pairs: (document, candidate) pairs that one rank scores in a micro-step, about.
        dense: whether all owned rows are scored rather than pairs.
    """

    level: int
    nodes: int
    rows: int
    steps: int
    candidates: int
    pairs: int
    dense: bool


def level_sizes(labels: int, cfg: TreeConfig) -> list[int]:
    """Nodes of every level of the tree that these settings make, labels last.

    Raises:
        TreeError: settings that do not fit the labels, or a given tree that cannot be read.
    """
    if cfg.path is not None:
        tree = read_tree(cfg.path, labels)
        return [tree.level_size(t) for t in range(1, tree.depth + 1)]
    depth = binary_depth(labels, cfg.max_leaf_size)
    return [*cluster_levels(depth, cfg.nr_splits, cfg.min_codes, flat=cfg.flat), labels]


@dataclass(frozen=True)
class Job:
    """One run, before it is started.

    Raises (from its properties):
        UserError: settings that do not fit each other or the counts.
    """

    cfg: RunConfig
    counts: DataCounts
    machine: Machine
    encoder: EncoderCosts | None  # None: linear only

    @property
    def ranks(self) -> int:
        """W."""
        return self.machine.ranks

    @property
    def on_gpu(self) -> bool:
        """Whether the encoder is trained on a GPU."""
        return self.machine.device is not None

    @property
    def precision(self) -> str:
        """``fp32`` or ``bf16``."""
        wanted = self.cfg.engine.precision
        if wanted != "auto":
            return wanted
        if self.machine.device is not None:
            return "bf16" if self.machine.device.bf16 else "fp32"
        from xmcdist.parallel.launch import has_bf16

        return "bf16" if has_bf16("cpu") else "fp32"

    @property
    def shards(self) -> int:
        """S, ranks that share one copy of the label rows."""
        shards = self.cfg.engine.label_shards or self.ranks
        if self.ranks % shards:
            raise UserError(
                f"engine.label_shards={shards} does not divide the {self.ranks} planned processes: take a divisor"
            )
        return shards

    @property
    def replicas(self) -> int:
        """R."""
        return self.ranks // self.shards

    @cached_property
    def tree(self) -> list[int]:
        """Level sizes of the preliminary tree."""
        return level_sizes(self.counts.labels, self.cfg.tree)

    @property
    def by_matcher(self) -> bool:
        """Whether the matcher's head finds the clusters, and rankers are for the levels below alone."""
        return self.encoder is not None and self.cfg.ranker.clusters_by == "matcher"

    @cached_property
    def ranker_tree(self) -> list[int]:
        """Level sizes of the tree that the rankers learn."""
        if self.encoder is None or self.by_matcher:
            return self.tree
        return level_sizes(self.counts.labels, self.cfg.ranker_tree)

    @property
    def length(self) -> int:
        """Tokens of the longest document of a batch."""
        return self.cfg.encoder.max_length

    @property
    def local_batch(self) -> int:
        """Documents of an optimizer step that the busiest rank encodes."""
        return -(-self.cfg.engine.global_batch // self.ranks)

    @property
    def micro(self) -> int:
        """Documents that a rank encodes at once."""
        return min(self.cfg.engine.micro_batch, self.local_batch)

    @property
    def micro_steps(self) -> list[int]:
        """Documents of all ranks in each micro-step of an optimizer step."""
        most, batch = self.cfg.engine.micro_batch * self.ranks, self.cfg.engine.global_batch
        return [min(most, batch - start) for start in range(0, batch, most)]

    @property
    def gathered(self) -> int:
        """Documents whose embeddings are gathered at once within a replica."""
        return self.micro * self.shards

    @cached_property
    def match_levels(self) -> list[MatchLevel]:
        """The levels that are fine-tuned; none without an encoder.

        Raises:
            UserError: the first level has more nodes than ``matcher.max_clusters``.
        """
        if self.encoder is None:
            return []
        m, found = self.cfg.matcher, []
        for t, nodes in enumerate(self.tree[:-1] if self.by_matcher else self.tree, start=1):
            if nodes > m.max_clusters:
                break
            rows = -(-nodes // self.shards)
            candidates = self._candidates(t, nodes)
            pairs = math.ceil(self.gathered * candidates * rows / nodes)
            cost = PAIR_COST["cuda" if self.on_gpu else "cpu"]
            dense = m.scoring == "dense" or (m.scoring == "auto" and pairs * cost >= self.gathered * rows)
            steps = m.steps[min(t, len(m.steps)) - 1]
            found.append(MatchLevel(t, nodes, rows, steps, candidates, pairs, dense))
        if not found:
            raise UserError(
                f"matcher.max_clusters={m.max_clusters} is below the {self.tree[0]} nodes of the first level, so there "
                "is nothing to fine-tune: raise it, or lower tree.nr_splits"
            )
        return found

    def _candidates(self, t: int, nodes: int) -> int:
        """Most candidates of a document on level t: children of its true and its retrieved parents."""
        n, above = self.cfg.negatives, self.tree[t - 2] if t > 1 else 1
        parents = 0.0
        if "tfn" in n.scheme:
            parents += self.true_nodes(above)
        if "man" in n.scheme:
            parents += self.cfg.matcher.beam
        if "consistent" in n.scheme:
            parents += n.confusions_per_cluster
        parents = min(max(parents, 1.0), above)
        children = parents * nodes / above
        return max(1, min(math.ceil(children), n.max_active))

    def true_nodes(self, nodes: int) -> float:
        """Different nodes of a level of so many that a document's labels lie in, about."""
        labels = self.counts.labels_per_document
        return nodes * (1.0 - (1.0 - 1.0 / nodes) ** labels) if nodes > 1 else 1.0
