"""The matcher, coarse to fine: each level starts from the one above and is a stage of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.checkpoint.parts import write_csr, write_rows
from xmcdist.checkpoint.train_state import StateStore, load_state
from xmcdist.config.errors import UserError
from xmcdist.config.schema import RunConfig
from xmcdist.data.batches import GlobalBatches
from xmcdist.data.tokens import TokenShards, write_tokens
from xmcdist.encoders.embed import embed
from xmcdist.encoders.hf import Encoder, encode_fn, encoder_fingerprint, load_encoder, load_tokenizer
from xmcdist.encoders.tokenizer import open_tokenizer
from xmcdist.inference.cluster_matcher import ClusterMatcher
from xmcdist.matchers.candidates import CandidateSource
from xmcdist.matchers.head import ShardedHead
from xmcdist.matchers.predict import post_processor_of, predict_level
from xmcdist.parallel.collectives import broadcast_object
from xmcdist.parallel.visible import seen_by_all
from xmcdist.pipelines.hard_negatives import active_of_level, report_level
from xmcdist.pipelines.interruptible import tell_nonfinite
from xmcdist.pipelines.level_log import LevelLog, beam_metrics, steps_before
from xmcdist.pipelines.levels import matched_levels, per_level, root_rows
from xmcdist.pipelines.overlap import overlap_tree_stage
from xmcdist.pipelines.precision import decide_precision
from xmcdist.pipelines.run import Run
from xmcdist.rankers.solver import SolverParams, solve_level
from xmcdist.sparse.csr import row_slice
from xmcdist.sparse.features import Features, unit_vectors
from xmcdist.sparse.store import open_csr
from xmcdist.training.engine import Engine, open_engine
from xmcdist.training.loop import LevelTask, train_level
from xmcdist.training.nonfinite import NonFinite
from xmcdist.training.preemption import Preempted
from xmcdist.trees.label_tree import LabelTree

__all__ = ["match_stages"]

# A start for fine-tuning need not be optimal.  A fixed number of passes is cheap, and rounding
# does not decide when a node stops, which would be a difference of a tenth in its weights.
_BOOTSTRAP_PASSES = 20
_NEVER_STOP = 1e-12


def match_stages(run: Run, tree_folder: Path) -> Path:
    """Tokens, then every level up to ``matcher.max_clusters`` nodes, then all embeddings.

    Returns:
        The committed ``embed`` stage: ``E.trn.npy`` and ``E.tst.npy`` (unit rows ``[N, d]``
        float32) and ``encoder/``.  Where the matcher finds the clusters at prediction, also
        its head as `ClusterMatcher` reads it (``matcher/``), and the test embeddings that it
        takes, which are not of unit length (``raw.tst.npy``).
    """
    tree = LabelTree.load(tree_folder / "tree")
    last = matched_levels(run.cfg, tree)
    leaf = tree.depth - 1
    if run.cfg.overlap.fine_tune and last < leaf:
        raise UserError(
            f"overlap.fine_tune=true goes by the leaf clusters that the matcher finds, and its last level is {last}: "
            f"set matcher.max_clusters to at least the {tree.level_size(leaf)} clusters of level {leaf}"
        )
    tokens = _tokens_stage(run)

    @functools.cache
    def engine() -> Engine:  # not on the CPU node that has only later stages to do
        return open_engine(replace(run.cfg.engine, precision=decide_precision(run)), run.mesh)

    def train(pass_: _Pass) -> Path:
        above: Path | None = None
        for t in range(1, last + 1):
            above = _Level(run, engine, tree, pass_, tokens, t, above, last).stage()
        if above is None:
            raise AssertionError("there is a level")
        return above

    trained = train(_Pass("match", tree_folder))
    for number in range(1, run.cfg.overlap.rounds + 1 if run.cfg.overlap.fine_tune else 1):
        before, name = trained.name, f"match_overlap{number}"
        found = functools.partial(_leaf_clusters, run, trained.with_name(f"{before.rsplit('-', 1)[0]}-{leaf}"))
        tree_folder = overlap_tree_stage(run, f"{name}_tree", tree_folder, (tree_folder.name, before), found)
        tree = LabelTree.load(tree_folder / "tree")
        trained = train(_Pass(name, tree_folder, begin=trained, steps=number * steps_before(run, last + 1)))
    return _embed_stage(run, engine, tokens, trained, last, tree)


def _leaf_clusters(run: Run, stage: Path) -> sp.csr_matrix:
    """What the matcher retrieves for this rank's training documents ``[n, K]``."""
    return row_slice(open_csr(stage / "P"), *run.own(run.data.num_docs("trn")))


def _tokens_stage(run: Run) -> Path:
    cfg = run.cfg.encoder
    made_of = {"tokenizer": encoder_fingerprint(cfg), "max_length": cfg.max_length}

    def body(folder: Path) -> None:
        if run.world.is_main:
            load_tokenizer(cfg, run.data.texts("trn").iterate()).save_pretrained(folder / "tokenizer")
        seen_by_all(folder, run.world)
        tokenizer = _open_tokenizer(run, folder)
        encode = encode_fn(tokenizer, cfg.max_length)
        pad = int(tokenizer.pad_token_id)
        for split in ("trn", "tst") if run.data.has_test else ("trn",):
            texts, name = run.data.texts(split), f"tokens.{split}"
            mark = f"{run.data.fingerprint}-{made_of}"
            write_tokens(folder / name, texts, encode, pad_id=pad, fingerprint=mark, world=run.world)

    return run.stages.run("tokens", run.inputs(made_of=made_of), body)


@dataclass(frozen=True)
class _Pass:
    """Fine-tuning from the first level to the last; a further one begins where the one before ended."""

    name: str  # of its stages, before the level
    tree_folder: Path
    begin: Path | None = None  # the last stage of the pass before
    steps: int = 0  # optimizer steps that passes before may have taken


@dataclass
class _Level:
    """One level's stage; also what the training loop reports to."""

    run: Run
    engine: Callable[[], Engine]
    tree: LabelTree
    pass_: _Pass
    tokens_folder: Path
    t: int
    above: Path | None  # the stage of the level before
    levels: int  # that are fine-tuned

    def stage(self) -> Path:
        run, name, begin = self.run, self.pass_.name, self.pass_.begin
        before = f"{name}-{self.t - 1}" if self.t > 1 else "tokens" if begin is None else begin.name
        inputs = run.inputs(
            "encoder",
            "matcher",
            "negatives",
            "optimizer",
            "schedule",
            "engine",
            "seed",
            after=(self.pass_.tree_folder.name, before),
        )
        return run.stages.run(f"{name}-{self.t}", inputs | {"level": self.t}, self.body)

    @property
    def start(self) -> Path | None:
        """The stage whose encoder this level begins with; None: the pretrained one."""
        return self.above or self.pass_.begin

    def body(self, folder: Path) -> None:
        run, cfg, t = self.run, self.run.cfg, self.t
        self.folder, self.child_ptr = folder, self.tree.child_ptr[t - 1]
        self.tokens = TokenShards.open(self.tokens_folder / "tokens.trn")
        self.Y = open_csr(self.pass_.tree_folder / f"Y.level-{t}")
        M = self._matching()
        encoder = load_encoder(cfg.encoder, cfg.seed) if self.start is None else _open_encoder(run, self.start)
        encoder = _restore_switches(encoder, run)
        self.shard = run.mesh.label_shard(self.tree.level_size(t))
        head = ShardedHead(self.shard, encoder.dim, seed=cfg.seed, level=t)
        keep, asynchronous = cfg.checkpoint.keep, cfg.checkpoint.asynchronous
        self.store = StateStore(folder / "checkpoints", run.mesh, keep=keep, asynchronous=asynchronous, say=run.log.say)
        saved = self.store.latest()
        if saved is None and self.start is not None:
            self._bootstrap(head, M)
        train_ids, self.validation_ids = self._split()
        steps = per_level(cfg.matcher.steps, t)
        negatives = int(np.diff(M.indptr).mean() * np.diff(self.child_ptr).mean())
        run.log.say(
            f"---- level {t} of {self.levels}: {self.tree.level_size(t)} nodes, about {negatives} candidates a "
            f"document, {steps} steps of {cfg.engine.global_batch} documents ----"
        )
        resume = None
        if saved is not None:
            names = encoder.state_dict().keys()
            like = {name: x for name, x in self.engine().template(encoder).items() if name in names}
            resume = load_state(saved, run.mesh, encoder_like=like, num_rows=self.shard.num_labels)
            run.log.say(f"{self.pass_.name}-{t}: going on at step {resume['step']}")
        task = LevelTask(
            level=t,
            steps=steps,
            seed=cfg.seed,
            tokens=self.tokens,
            batches=GlobalBatches(self.tokens.lengths[train_ids], cfg.engine.global_batch, cfg.seed + t),
            document_ids=train_ids,
            candidates=CandidateSource(
                M,
                self.Y,
                self.child_ptr,
                max_active=cfg.negatives.max_active,
                seed=cfg.seed,
                level=t,
                weighted=cfg.negatives.weight != "none",
            ),
            matcher=cfg.matcher,
            optimizer=cfg.optimizer,
            schedule=cfg.schedule,
            log_every=cfg.tracker.log_every,
            save_every=cfg.checkpoint.every_steps,
            folder=folder,
        )
        done = 0 if resume is None else int(resume["step"])
        self.told = LevelLog(run, self.engine(), t, encoder, decide_precision(run), done)
        self.told.before += self.pass_.steps
        self.left_out_steps = int(resume["extra"].get("skipped", 0)) if resume is not None else 0
        try:
            with run.log.progress(f"level {t}", steps) as self.tick:
                result = train_level(self.engine(), encoder, head, task, self, resume)
        except Preempted:
            self.store.finish()  # in its place before anyone leaves
            raise
        if result.stopped_early:
            run.log.say(f"{self.pass_.name}-{t}: validation stopped it after {result.steps} of {steps} steps")
        self.store.finish()
        self._finish(result.encoder, head)

    def _matching(self) -> sp.csr_matrix:
        """M [N, K_{t-1}], worked out by row ranges, memory-mapped."""
        run, t = self.run, self.t
        start, stop = run.own(run.data.num_docs("trn"))
        part = root_rows(stop - start)
        if self.above is not None:
            true = open_csr(self.pass_.tree_folder / f"Y.level-{t - 1}")[start:stop]
            part = active_of_level(run.cfg.negatives, true, self.above, start, stop)
        write_csr(self.folder / "M", part, run.world)
        return open_csr(self.folder / "M")

    def _bootstrap(self, head: ShardedHead, M: sp.csr_matrix) -> None:
        """Start this level's rows from the level above: its embeddings, or its rows.

        The first level of a further pass starts from the embeddings that the pass before ended
        with, or from its rows of that level, whose nodes are the same.
        """
        cfg, above = self.run.cfg.matcher, self.start
        if above is None or cfg.bootstrap == "none":
            return
        nodes = (self.shard.start, self.shard.stop)
        if cfg.bootstrap == "inherit":
            parents = self.tree.parents(self.t)[nodes[0] : nodes[1]]
            if self.above is None:
                parents, above = np.arange(*nodes), above.with_name(f"{above.name.rsplit('-', 1)[0]}-{self.t}")
            rows = np.load(above / "head.npy", mmap_mode="r", allow_pickle=False)
            bias = np.load(above / "bias.npy", mmap_mode="r", allow_pickle=False)
            head.load_rows(np.asarray(rows[parents]), np.asarray(bias[parents]))
            return
        features = Features(sparse=None, dense=np.load(above / "E.npy", mmap_mode="r", allow_pickle=False))
        c = cfg.bootstrap_c
        params = SolverParams(
            Cp=c,
            Cn=c,
            threshold=0.0,
            seed=self.run.cfg.seed,
            max_iter=_BOOTSTRAP_PASSES,
            eps=_NEVER_STOP,
            precision="float32",
        )
        relevance = self.Y if cfg.bootstrap == "weighted-linear" else None
        weights = solve_level(features, self.Y, M, self.child_ptr, params, relevance, nodes=nodes)
        head.load_rows(*weights.dense_rows())

    def _split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Documents trained on and documents that say when to stop; the same split on every level."""
        n, share = self.tokens.num_docs, self.run.cfg.matcher.validation_fraction
        order = np.random.default_rng((self.run.cfg.seed, 7)).permutation(n)
        held = min(max(int(n * share), 1), n - 1) if share else 0
        return np.sort(order[held:]), np.sort(order[:held])

    def _finish(self, encoder: Encoder, head: ShardedHead) -> None:
        """Write encoder, head, embeddings of all training documents, and what the level retrieves."""
        run = self.run
        if run.world.is_main:
            encoder.save(self.folder / "encoder", _open_tokenizer(run, self.tokens_folder))
        rows = slice(None) if run.mesh.replica == 0 else slice(0)  # one copy of them
        write_rows(self.folder / "head.npy", head.weight.detach()[rows].float().cpu().numpy(), run.world)
        write_rows(self.folder / "bias.npy", head.bias.detach()[rows].float().cpu().numpy(), run.world)
        own = np.arange(*run.own(self.tokens.num_docs))
        E = _embed(run, encoder, self.tokens, own)
        write_rows(self.folder / "E.npy", E, run.world)
        P = self._beam(E, head, own)
        report_level(
            run, self.folder, self.tree, self.t, P, self.Y[own], self.pass_.steps + steps_before(run, self.t + 1)
        )
        write_csr(self.folder / "P", P, run.world)

    def _beam(self, E: NDArray[np.float32], head: ShardedHead, ids: NDArray[np.int64]) -> sp.csr_matrix:
        """What this rank's documents ``ids`` with vectors E retrieve; collective."""
        parents = None if self.above is None else open_csr(self.above / "P")[ids]
        cfg = self.run.cfg.matcher
        post = post_processor_of(cfg.loss)
        return predict_level(E, head, parents, self.child_ptr, cfg.beam, post, self.run.mesh, scoring=cfg.scoring)

    # what the loop calls

    def log(self, values: dict[str, Any]) -> None:
        self.tick(values["step"])
        self.told.window(values)

    def save(self, step: int, state: dict[str, Any]) -> None:
        self.store.save(step=step, num_rows=self.shard.num_labels, **state)

    def left_out(self, found: NonFinite, last: bool) -> str | None:
        self.left_out_steps += 1
        return broadcast_object(tell_nonfinite(self.run, found, self.left_out_steps, last))

    def evaluate(self, encoder: Encoder, head: ShardedHead) -> float:
        """Beam recall of this level on the held-out documents; P@k of its nodes is told beside it."""
        mine = self.validation_ids[slice(*self.run.own(len(self.validation_ids)))]
        E = _embed(self.run, encoder, self.tokens, mine)
        found = beam_metrics(self._beam(E, head, mine), self.Y[mine], self.run.cfg.matcher.beam)
        self.told.validation(found)
        return found["beam_recall"]


def _embed_stage(
    run: Run, engine: Callable[[], Engine], tokens_folder: Path, last: Path, level: int, tree: LabelTree
) -> Path:
    """Unit embeddings of all documents by the finished encoder; see `match_stages`."""
    by_matcher = run.cfg.ranker.clusters_by == "matcher"
    post_processor = _score_for_rankers(run.cfg, is_above_labels=level + 1 == tree.depth)

    def body(folder: Path) -> None:
        encoder = _open_encoder(run, last).to(engine().device)
        for split in ("trn", "tst") if run.data.has_test else ("trn",):
            tokens = TokenShards.open(tokens_folder / f"tokens.{split}")
            start, stop = run.own(tokens.num_docs)
            if split == "trn":
                part = np.load(last / "E.npy", mmap_mode="r", allow_pickle=False)[start:stop]
            else:
                part = _embed(run, encoder, tokens, np.arange(start, stop))
                if by_matcher:
                    write_rows(folder / "raw.tst.npy", part, run.world)
            write_rows(folder / f"E.{split}.npy", unit_vectors(part), run.world)
        if run.world.is_main:
            encoder.save(folder / "encoder", _open_tokenizer(run, tokens_folder))
            if by_matcher:
                stages = [last.with_name(f"{last.name.rsplit('-', 1)[0]}-{t}") for t in range(1, level + 1)]
                rows = [_head_rows(stage) for stage in stages]
                ClusterMatcher.from_rows(tree, rows, post_processor).save(folder / "matcher")

    made_for = {"matcher": post_processor} if by_matcher else {}
    return run.stages.run("embed", run.inputs(after=("tokens", last.name), **made_for), body)


def _score_for_rankers(cfg: RunConfig, is_above_labels: bool) -> str:
    """The head's post-processor: that of training, as a logarithm where the rankers below add theirs to it."""
    below = (cfg.ranker.last_post_processor if is_above_labels else None) or cfg.ranker.post_processor
    own = post_processor_of(cfg.matcher.loss)
    return f"log-{own}" if below.startswith("log-") else own


def _head_rows(stage: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights ``[K, d]`` and bias terms ``[K]`` of a finished level, memory-mapped."""
    W, b = (np.load(stage / name, mmap_mode="r", allow_pickle=False) for name in ("head.npy", "bias.npy"))
    return W, b


def _embed(run: Run, encoder: Encoder, tokens: TokenShards, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    return embed(encoder, tokens, ids, device=run.world.device, precision=decide_precision(run))


def _open_encoder(run: Run, stage: Path) -> Encoder:
    return Encoder.load(stage / "encoder", trust_remote_code=run.cfg.encoder.trust_remote_code)


def _open_tokenizer(run: Run, tokens_stage: Path) -> Any:
    return open_tokenizer(tokens_stage / "tokenizer", trust_remote_code=run.cfg.encoder.trust_remote_code)


def _restore_switches(encoder: Encoder, run: Run) -> Encoder:
    """Gradient checkpointing is no part of a saved model: switch it on again."""
    if run.cfg.encoder.gradient_checkpointing:
        encoder.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return encoder
