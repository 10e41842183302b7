"""GIANT: an encoder fine-tuned to name a node's neighbours, and its embeddings of all nodes.

Source: Chien et al., Node Feature Extraction by Self-Supervised Multi-scale Neighborhood
Prediction, ICLR 2022, arXiv:2111.00064: neighbours are labels, XR-Transformer finds them, and
the encoder's vectors are the input of any graph neural network.

Letters: n nodes, d width of the encoder, N test documents, T the last level that is fine-tuned.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.checkpoint.atomic import no_space_is_clear, read_json, write_json
from xmcdist.checkpoint.checksums import seal_folder
from xmcdist.checkpoint.parts import write_rows
from xmcdist.config.commands import GiantConfig, GraphConfig
from xmcdist.data.graph_prepared import prepare_graph
from xmcdist.data.tokens import TokenShards
from xmcdist.encoders.embed import TokenRows, embed
from xmcdist.encoders.hf import Encoder, encode_fn
from xmcdist.encoders.tokenizer import open_tokenizer
from xmcdist.matchers.head import ShardedHead
from xmcdist.matchers.predict import post_processor_of, predict_level
from xmcdist.observability.environment import versions
from xmcdist.parallel.collectives import gather_objects
from xmcdist.parallel.errors import errors_together
from xmcdist.parallel.launch import World
from xmcdist.pipelines.evaluation import label_frequency, measure
from xmcdist.pipelines.export import link_folder
from xmcdist.pipelines.overlap import last_of_matcher
from xmcdist.pipelines.precision import decide_precision
from xmcdist.pipelines.run import Run
from xmcdist.pipelines.train import train
from xmcdist.sparse.csr import row_ids, row_slice, without
from xmcdist.sparse.store import open_csr
from xmcdist.trees.label_tree import LabelTree

__all__ = ["giant"]

_TEXTS = 4096  # tokenised and embedded at a time
_DOCUMENTS = 8192  # whose neighbours are looked for at a time


def giant(cfg: GiantConfig, world: World) -> dict[str, Any]:
    """Fine-tune on a graph, write ``RUN/embeddings``; collective.

    Returns:
        The results of `train`, and ``graph`` (counts), ``embeddings`` (what ``about.json``
        says) and, with held-out edges, ``neighbours``: how well the matcher alone finds the
        neighbours at these edges, percent.  ``metrics`` are those of the rankers, with
        ``until=null``.

    Raises:
        UserError: as `train`; a fault of the graph's files.
        Preempted: as `train`.
    """
    cfg = replace(cfg, graph=_in_full(cfg.graph), dataset=replace(cfg.dataset, path="???"))
    return train(cfg, world, partial(prepare_graph, cfg.graph, cfg.dataset.name, cfg.seed), _after_matching)


def _in_full(graph: GraphConfig) -> GraphConfig:
    """The same with absolute paths: the run is the same one wherever it is started from."""

    def full(name: Any) -> Any:
        if isinstance(name, list | tuple):
            return [full(x) for x in name]
        return None if name is None else str(Path(str(name)).expanduser().absolute())

    return replace(graph, path=full(graph.path), text=full(graph.text), edges=full(graph.edges))


def _after_matching(run: Run) -> dict[str, Any]:
    """Embed all nodes, look for the held-out neighbours."""
    prefix = f"{last_of_matcher(run.cfg.overlap)[1]}-"
    levels = [name for name in run.stages.prints if name.startswith(prefix)]
    found: dict[str, Any] = {"graph": run.data.graph, "embeddings": _nodes_stage(run, levels[-1])}
    if run.data.has_test:
        found["neighbours"] = _neighbours_stage(run, levels)
    return found


def _nodes_stage(run: Run, last: str) -> dict[str, Any]:
    """Write RUN/embeddings: ``embeddings.npy`` ``[n, d]`` float32, ``ids.npy``, ``encoder/``, ``about.json``."""
    place = Path(run.cfg.run_dir)
    encoder_folder = place / "stages" / "embed" / "encoder"

    def body(folder: Path) -> None:
        E = _own_embeddings(run, encoder_folder, place / "stages" / last)
        with errors_together():
            (folder / "nodes").mkdir(exist_ok=True)
        write_rows(folder / "nodes" / "embeddings.npy", E, run.world)
        if run.world.is_main:
            link_folder(encoder_folder, folder / "nodes" / "encoder")
            _describe(run, folder / "nodes", E.shape[1])
        run.world.barrier()

    stage = run.stages.run("nodes", run.inputs(after=("embed", last)), body)
    out = place / "embeddings"
    with errors_together(), no_space_is_clear(out):
        if run.world.is_main:
            link_folder(stage / "nodes", out)
    about: dict[str, Any] = read_json(stage / "nodes" / "about.json")
    run.log.say(f"embeddings of {about['nodes']} nodes, {about['width']} numbers each, in {out}")
    return about


def _own_embeddings(run: Run, encoder_folder: Path, last: Path) -> NDArray[np.float32]:
    """Raw vectors of this rank's share of the nodes; those of training documents are there already."""
    trust = run.cfg.encoder.trust_remote_code
    start, stop = run.own(run.data.num_labels)
    trained = run.data.nodes("trn")
    first, end = np.searchsorted(trained, [start, stop])
    encoder = Encoder.load(encoder_folder, trust_remote_code=trust).to(run.world.device)
    tokenizer = open_tokenizer(encoder_folder, trust_remote_code=trust)
    encode, pad = encode_fn(tokenizer, encoder.max_length), int(tokenizer.pad_token_id)
    precision = decide_precision(run)
    E = np.empty((stop - start, encoder.dim), np.float32)
    there = np.load(last / "E.npy", mmap_mode="r", allow_pickle=False)
    E[trained[first:end] - start] = there[first:end]
    rest = np.setdiff1d(np.arange(start, stop), trained[first:end])
    texts = run.data.label_texts()
    for low in range(0, len(rest), _TEXTS):
        nodes = rest[low : low + _TEXTS]
        rows = TokenRows(encode([texts[i] for i in nodes.tolist()]), pad)
        E[nodes - start] = embed(encoder, rows, np.arange(len(nodes)), run.world.device, precision=precision)
    return E


def _describe(run: Run, folder: Path, width: int) -> None:
    names = run.data.node_ids()
    np.save(folder / "ids.npy", np.arange(run.data.num_labels) if names is None else np.array(list(names)))
    encoder = run.cfg.encoder
    write_json(
        folder / "about.json",
        {
            "nodes": run.data.num_labels,
            "width": width,
            "rows": "pooled vectors of the fine-tuned encoder, not of unit length",
            "encoder": encoder.name or encoder.preset,
            "pooling": encoder.pooling,
            "max_length": encoder.max_length,
            "graph": run.data.graph,
            "data": run.data.fingerprint,
            "fingerprint": run.stages.prints["nodes"],
            "settings": run.stages.prints["embed"],
            "versions": versions(),
        },
    )
    seal_folder(folder)


def _neighbours_stage(run: Run, levels: list[str]) -> dict[str, Any]:
    """Measure what the matcher's beam finds of the held-out neighbours."""

    def body(folder: Path) -> None:
        found = _measure(run, levels)
        if run.world.is_main:
            write_json(folder / "neighbours.json", found)
        run.world.barrier()

    inputs = run.inputs("matcher", after=(*levels, "tokens"), ks=list(run.cfg.evaluation.ks))
    stage = run.stages.run("neighbours", inputs, body)
    said: dict[str, Any] = read_json(stage / "neighbours.json")
    shown = ", ".join(f"{k} {said['metrics'][k]:.2f}" for k in said["metrics"] if k.startswith(("P@", "R@")))
    run.log.say(f"held-out {said['of']}, by the matcher alone: {shown}")
    return said


def _measure(run: Run, levels: list[str]) -> dict[str, Any]:
    """Measures of the last level's beam: of nodes where that level holds the labels, else of clusters of nodes."""
    cfg, T = run.cfg, len(levels)
    made = Path(cfg.run_dir) / "stages" / last_of_matcher(cfg.overlap)[0]
    tree = LabelTree.load(made / "tree")
    whole = tree.depth == T
    Y, train = run.data.Y("tst"), run.data.Y("trn")
    known = run.data.known("tst") if whole else None
    start, stop = run.own(Y.shape[0])
    if not whole:
        Y, train = tree.lift(Y, T), open_csr(made / f"Y.level-{T}")
    parts = []
    most = max(gather_objects(stop - start))  # searching is collective: all ranks take as many turns
    for low in range(0, most, _DOCUMENTS):
        ids = np.arange(min(start + low, stop), min(start + low + _DOCUMENTS, stop))
        hidden = None if known is None else row_slice(known, ids[0], ids[-1] + 1) if len(ids) else known[:0]
        parts.append(_found(run, levels, tree, ids, hidden))
    mine = sp.csr_matrix(sp.vstack(parts, format="csr"))
    metrics = measure(
        lambda first, last: mine[first - start : last - start],
        Y,
        label_frequency(train),
        train.shape[0],
        cfg.evaluation,
        (cfg.dataset.propensity_a, cfg.dataset.propensity_b),
        run.world,
    )
    return {"of": "neighbours" if whole else f"neighbours' clusters ({tree.level_size(T)})", "metrics": metrics}


def _found(
    run: Run, levels: list[str], tree: LabelTree, ids: NDArray[np.int64], known: sp.csr_matrix | None
) -> sp.csr_matrix:
    """Scores of the nodes (or clusters) that test documents ``ids`` retrieve, known ones left out; collective."""
    cfg, stages = run.cfg, Path(run.cfg.run_dir) / "stages"
    tokens = TokenShards.open(stages / "tokens" / "tokens.tst")
    most_known = max(gather_objects(0 if known is None else int(np.diff(known.indptr).max(initial=0))))
    scores: sp.csr_matrix | None = None
    for t, name in enumerate(levels, start=1):
        encoder = Encoder.load(stages / name / "encoder", trust_remote_code=cfg.encoder.trust_remote_code)
        E = embed(encoder.to(run.world.device), tokens, ids, run.world.device, precision=decide_precision(run))
        shard = run.mesh.label_shard(tree.level_size(t))
        head = ShardedHead(shard, encoder.dim, seed=cfg.seed, level=t)
        rows = (np.load(stages / name / f, mmap_mode="r", allow_pickle=False) for f in ("head.npy", "bias.npy"))
        head.load_rows(*(x[shard.start : shard.stop] for x in rows))
        width = cfg.matcher.beam if t < len(levels) else max(cfg.matcher.beam, *cfg.evaluation.ks) + most_known
        post = post_processor_of(cfg.matcher.loss)
        scores = predict_level(
            E,
            head.to(run.world.device),
            scores,
            tree.child_ptr[t - 1],
            width,
            post,
            run.mesh,
            scoring=cfg.matcher.scoring,
        )
    if scores is None:
        raise AssertionError("there is a level")
    if known is None:
        return scores
    return without(_of_labels(scores, tree), known)


def _of_labels(scores: sp.csr_matrix, tree: LabelTree) -> sp.csr_matrix:
    """Scores of slots as scores of their labels ``[n, L]``; a label in several slots has its best."""
    row, label = row_ids(scores), tree.labels[scores.indices]
    order = np.lexsort((-scores.data, label, row))
    row, label, best = row[order], label[order], scores.data[order]
    first = np.ones(len(row), np.bool_)
    first[1:] = (row[1:] != row[:-1]) | (label[1:] != label[:-1])
    ends = np.searchsorted(row[first], np.arange(scores.shape[0] + 1))
    return sp.csr_matrix((best[first], label[first], ends), shape=(scores.shape[0], tree.num_labels))
