"""What must hold of settings, alone and together; every fault is told, not just the first."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from xmcdist.config.commands import GiantConfig
from xmcdist.config.schedule_checks import SCHEDULE_AT_LEAST, SCHEDULE_CHOICES, schedule_faults
from xmcdist.config.schema import RunConfig
from xmcdist.config.tree_checks import tree_faults

__all__ = ["ENSEMBLES", "POST_PROCESSORS", "UNTIL", "check_giant", "check_run"]

POST_PROCESSORS = (
    "noop",
    "sigmoid",
    "log-sigmoid",
    *(f"{log}l{p}-hinge" for log in ("", "log-") for p in (1, 2, 3, 4)),
)

UNTIL = ("prepare", "tree", "linear", "match", "rank")
ENSEMBLES = ("average", "rank", "sigmoid", "softmax", "round_robin")
TRACKERS = ("wandb", "tensorboard", "trackio")
_SCHEMES = ("tfn", "man", "tfn+man")
_MATCHER_SCHEMES = (*_SCHEMES, "consistent", "tfn+man+consistent")
_CHOICES: dict[str, Sequence[str]] = {
    "ensemble": ENSEMBLES,
    "checkpoint.verify": ("sizes", "full", "off"),
    "dataset.format": ("auto", "text", "xc", "jsonl", "csv", "parquet"),
    "features.kind": ("auto", "tfidf", "given"),
    "encoder.preset": ("none", "minilm", "tiny", "hf"),
    "encoder.pooling": ("cls", "mean", "pooler"),
    "negatives.scheme": _MATCHER_SCHEMES,
    "negatives.weight": ("none", "score"),
    "matcher.loss": ("weighted_squared_hinge", "squared_hinge", "bce"),
    "matcher.bootstrap": ("linear", "weighted-linear", "inherit", "none"),
    "matcher.scoring": ("auto", "dense", "pairs"),
    "optimizer.head": ("adamw", "sparse_adam", "sgd"),
    **{f"{tree}.label_embedding": ("pifa", "text", "concat", "convex") for tree in ("tree", "ranker_tree")},
    **{f"{tree}.label_text": ("encoder", "tfidf") for tree in ("tree", "ranker_tree")},
    **SCHEDULE_CHOICES,
    "ranker.solver": ("l2svc_dual", "l1svc_dual", "logistic_dual", "l2svc_primal"),
    "ranker.post_processor": POST_PROCESSORS,
    "ranker.features": ("both", "sparse", "dense"),
    "ranker.tree_start": ("tree", "random"),
    "ranker.clusters_by": ("rankers", "matcher"),
    "ranker.negative_weight": ("none", "score"),
    "ranker.weights_dtype": ("float32", "mixed", "float16"),
    "ranker.device": ("auto", "cpu", "cuda"),
    "overlap.merge": ("max", "mean"),
    "engine.name": ("cpu", "ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload"),
    "engine.precision": ("fp32", "bf16", "auto"),
    "tracker.mode": ("offline", "online"),
}
_AT_LEAST: dict[str, float] = {
    "tree.nr_splits": 2,
    "tree.max_leaf_size": 1,
    "tree.kmeans_max_iter": 1,
    "ranker_tree.nr_splits": 2,
    "ranker_tree.max_leaf_size": 1,
    "ranker_tree.kmeans_max_iter": 1,
    "encoder.max_length": 2,
    "matcher.max_clusters": 1,
    "matcher.beam": 1,
    "matcher.eval_every": 1,
    "matcher.patience": 1,
    "negatives.max_active": 1,
    "negatives.confusions_per_cluster": 1,
    "optimizer.lr": 0,
    "optimizer.weight_decay": 0,
    "optimizer.clip": 0,
    "optimizer.max_skipped_steps": 0,
    **SCHEDULE_AT_LEAST,
    "ranker.max_iter": 1,
    "ranker.beam": 1,
    "ranker.topk": 1,
    "ranker.threshold": 0,
    "ranker.bias": 0,
    "overlap.copies": 1,
    "overlap.rounds": 1,
    "engine.global_batch": 1,
    "engine.micro_batch": 1,
    "engine.timeout_s": 1,
    "engine.data_timeout_s": 1,
    "checkpoint.every_steps": 0,
    "checkpoint.keep": 1,
    "tracker.log_every": 1,
    "features.min_df": 1,
    "evaluation.tail_below": 0,
}


def check_run(cfg: RunConfig, world_size: int) -> list[str]:
    """Every fault of a training configuration, as sentences; empty when it is sound."""
    faults = [
        f"{field}={_get(cfg, field)} is none of {', '.join(options)}{_near(_get(cfg, field), options)}"
        for field, options in _CHOICES.items()
        if _get(cfg, field) not in options
    ]
    faults += [
        f"{field}={_get(cfg, field)} must be at least {low:g}"
        for field, low in _AT_LEAST.items()
        if _get(cfg, field) < low
    ]
    faults += [text for bad, text in _together(cfg, world_size) if bad]
    return faults + tree_faults(cfg)


def check_giant(cfg: GiantConfig) -> list[str]:
    """Every fault of the settings that giant has beside those of train, as sentences."""
    g = cfg.graph
    found = [
        (cfg.encoder.preset == "none", "giant needs an encoder, whose embeddings it is for: leave encoder=none away"),
        (
            cfg.dataset.path != "none",
            f"dataset.path={cfg.dataset.path} has no effect on giant: give graph.path, or graph.text and graph.edges",
        ),
        (bool(cfg.members), "members have no effect on giant, which has one encoder: leave them out"),
        (g.max_degree < 2, f"graph.max_degree={g.max_degree} must be at least 2"),
        (not 0 <= g.holdout < 1, f"graph.holdout={g.holdout} is a share of the edges, in [0, 1)"),
        (not g.text_columns, "graph.text_columns is empty: name the column of the texts"),
        (
            g.edge_columns is not None and len(g.edge_columns) != 2,
            f"graph.edge_columns={g.edge_columns} must be [source, target]",
        ),
    ]
    return [text for bad, text in found if bad]


def _together(cfg: RunConfig, world_size: int) -> list[tuple[bool, str]]:
    f, e, m, n, r = cfg.features, cfg.encoder, cfg.matcher, cfg.negatives, cfg.ranker
    last = r.last_post_processor
    ngrams = [(n, g) for n, g in (("word", f.word_ngrams), ("char", f.char_ngrams)) if g is not None]
    return [
        (
            cfg.until is not None and cfg.until not in UNTIL,
            f"until={cfg.until} is none of {', '.join(UNTIL)}{_near(cfg.until, UNTIL)}",
        ),
        (
            cfg.until in ("match", "rank") and e.preset == "none",
            f"until={cfg.until} has no stage to end after with encoder=none: use until=linear",
        ),
        *_members(cfg),
        (e.preset == "hf" and not e.name, "encoder=hf needs encoder.name, a model id or a folder"),
        (e.layers is not None and e.layers < 1, f"encoder.layers={e.layers} must be at least 1, or null for all"),
        (e.dropout is not None and not 0 <= e.dropout < 1, f"encoder.dropout={e.dropout} must be in [0, 1)"),
        (e.preset == "none" and r.features == "dense", "ranker.features=dense needs an encoder; encoder=none has none"),
        *((r.clusters_by == "matcher" and bad, text) for bad, text in _found_by_matcher(cfg)),
        (not ngrams, "features.word_ngrams and features.char_ngrams are both null: set one"),
        *(
            (len(g) != 2 or not 1 <= g[0] <= g[1], f"features.{n}_ngrams={g} must be [shortest, longest]")
            for n, g in ngrams
        ),
        (not 0 < f.max_df <= 1, f"features.max_df={f.max_df} is a share of the documents, in (0, 1]"),
        (
            f.max_features is not None and f.max_features < 1,
            f"features.max_features={f.max_features} must be at least 1, or null for all",
        ),
        (
            f.hashing_bits is not None and not 1 <= f.hashing_bits <= 30,
            f"features.hashing_bits={f.hashing_bits} must be in 1..30",
        ),
        (not m.steps or min(m.steps) < 1, f"matcher.steps={m.steps} needs at least one positive number of steps"),
        (
            not 0 <= m.validation_fraction < 1,
            f"matcher.validation_fraction={m.validation_fraction} must be in [0, 1)",
        ),
        (
            cfg.optimizer.head != "adamw" and cfg.optimizer.weight_decay > 0,
            f"optimizer.weight_decay={cfg.optimizer.weight_decay} has no effect on optimizer.head="
            f"{cfg.optimizer.head}: use 0",
        ),
        (
            n.weight == "score" and n.scheme == "tfn",
            "negatives.weight=score has no effect on negatives.scheme=tfn, which takes true clusters only: use none",
        ),
        (
            not 0 < n.consistent_share <= 1,
            f"negatives.consistent_share={n.consistent_share} is a share of a cluster's documents, in (0, 1]",
        ),
        *schedule_faults(cfg),
        (m.bootstrap_c <= 0, f"matcher.bootstrap_c={m.bootstrap_c} must be positive"),
        (
            not r.Cp or not r.Cn or min(r.Cp + r.Cn) <= 0,
            f"ranker.Cp={r.Cp} and ranker.Cn={r.Cn} need positive costs",
        ),
        (r.eps <= 0, f"ranker.eps={r.eps} must be positive"),
        (
            not r.negatives or any(n not in _SCHEMES for n in r.negatives),
            f"ranker.negatives={r.negatives} must list {', '.join(_SCHEMES)}",
        ),
        (
            r.negative_weight == "score" and not any("man" in n for n in r.negatives),
            f"ranker.negative_weight=score has no effect on ranker.negatives={r.negatives}: add man",
        ),
        (
            r.negative_weight == "score" and (r.post_processor.startswith("log-") or r.post_processor == "noop"),
            f"ranker.negative_weight=score needs scores from 0 to 1, and ranker.post_processor={r.post_processor} "
            "gives others: use sigmoid or l3-hinge",
        ),
        *_overlap(cfg),
        (
            last is not None and last not in POST_PROCESSORS,
            f"ranker.last_post_processor={last} is none of {', '.join(POST_PROCESSORS)}{_near(last, POST_PROCESSORS)}",
        ),
        (
            not 0 < cfg.dataset.test_fraction < 1,
            f"dataset.test_fraction={cfg.dataset.test_fraction} must be in (0, 1)",
        ),
        *(
            (
                name not in TRACKERS,
                f"tracker.use={cfg.tracker.use}: {name} is none of {', '.join(TRACKERS)}{_near(name, TRACKERS)}",
            )
            for name in cfg.tracker.use
        ),
        (
            len(set(cfg.tracker.use)) < len(cfg.tracker.use),
            f"tracker.use={cfg.tracker.use} names a tracker twice",
        ),
        (
            not re.fullmatch(r"[\w.-]+", cfg.tracker.project),
            f"tracker.project={cfg.tracker.project!r} must be made of letters, digits, and . _ -",
        ),
        (
            not cfg.evaluation.ks or min(cfg.evaluation.ks) < 1,
            f"evaluation.ks={cfg.evaluation.ks} needs positive cut-offs",
        ),
        (
            not 0 < cfg.evaluation.head_share < 1,
            f"evaluation.head_share={cfg.evaluation.head_share} must be in (0, 1)",
        ),
        (
            e.preset != "none" and cfg.engine.global_batch < world_size,
            f"engine.global_batch={cfg.engine.global_batch} is smaller than the {world_size} processes",
        ),
        (
            cfg.engine.deepspeed_config is not None and not cfg.engine.name.startswith("zero"),
            f"engine.deepspeed_config has no effect on engine={cfg.engine.name}: use engine=zero1, zero2, zero3 or "
            "zero3_offload",
        ),
    ]


def _members(cfg: RunConfig) -> list[tuple[bool, str]]:
    """Faults of an ensemble's members; what each is made of is checked where it is composed."""
    only = cfg.only_members or []
    return [
        *(
            (not re.fullmatch(r"\w[\w.-]*", name), f"members: {name!r} must be made of letters, digits, and . _ -")
            for name in cfg.members
        ),
        (
            cfg.only_members is not None and not cfg.members,
            f"only_members={cfg.only_members} needs members: this run has none",
        ),
        *(
            (
                bool(cfg.members) and name not in cfg.members,
                f"only_members={only}: {name} is none of {', '.join(cfg.members)}{_near(name, list(cfg.members))}",
            )
            for name in only
        ),
    ]


def _found_by_matcher(cfg: RunConfig) -> list[tuple[bool, str]]:
    """What `ranker.clusters_by=matcher` cannot be together with."""
    tree, own = cfg.tree, cfg.ranker_tree
    reason = "with ranker.clusters_by=matcher, where the rankers follow `tree`, whose clusters the matcher learnt"
    return [
        (
            cfg.encoder.preset == "none",
            "ranker.clusters_by=matcher needs an encoder, whose head finds the clusters; encoder=none has none",
        ),
        (
            cfg.ranker.tree_start != "tree",
            f"ranker.tree_start={cfg.ranker.tree_start} has no effect {reason}: leave it out",
        ),
        *(
            (
                getattr(own, name) is not None,
                f"ranker_tree.{name}={getattr(own, name)} has no effect {reason}: set tree.{name} instead",
            )
            for name in ("path", "label_features")
        ),
        *(
            (
                getattr(own, name) != getattr(tree, name),
                f"ranker_tree.{name}={getattr(own, name)} has no effect {reason}: leave it as "
                f"tree.{name}={getattr(tree, name)}",
            )
            for name in ("nr_splits", "max_leaf_size")
        ),
    ]


def _overlap(cfg: RunConfig) -> list[tuple[bool, str]]:
    """What must hold of labels in several clusters."""
    o = cfg.overlap
    useless = {
        f"overlap.rounds={o.rounds}": o.rounds > 1,
        f"overlap.max_cluster_size={o.max_cluster_size}": o.max_cluster_size is not None,
        f"overlap.balance={o.balance}": o.balance is not None,
        "overlap.fine_tune=true": o.fine_tune,
    }
    return [
        (o.copies > 6, f"overlap.copies={o.copies} must be at most 6"),
        *(
            (bad and o.copies == 1, f"{name} has no effect with overlap.copies=1, which leaves the tree as it is")
            for name, bad in useless.items()
        ),
        (
            o.max_cluster_size is not None and o.max_cluster_size < 1,
            f"overlap.max_cluster_size={o.max_cluster_size} must be at least 1, or null for any number",
        ),
        (
            o.max_cluster_size is not None and o.balance is not None,
            f"overlap.max_cluster_size={o.max_cluster_size} and overlap.balance={o.balance} are two limits: "
            "set one of them to null",
        ),
        (
            o.balance is not None and o.copies > 1 and o.balance * o.copies < 1,
            f"overlap.balance={o.balance} leaves less than a place a label in clusters that hold {o.copies} copies: "
            f"set it to at least {1 / max(o.copies, 1):.2g}, or null for any number",
        ),
        (
            o.fine_tune and cfg.encoder.preset == "none",
            "overlap.fine_tune=true needs an encoder to train on; encoder=none has none",
        ),
    ]


def _get(cfg: RunConfig, field: str) -> Any:
    value: Any = cfg
    for name in field.split("."):
        value = getattr(value, name)
    return value


def _near(value: object, options: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(value), options, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
