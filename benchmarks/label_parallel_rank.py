"""One rank of a job of label_parallel.py: trains a few steps, writes what it took.

Random documents of 32 tokens, each with five labels and the children of ten clusters of 100 to
compete; MiniLM encodes them.  Every rank makes the same.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

DOCS, BATCH, TOKENS, DIM, PER_CLUSTER = 512, 32, 32, 384, 100


def worker(args: argparse.Namespace) -> None:
    """Train a few steps and write what this rank saw."""
    import torch

    from xmcdist.parallel.launch import setup, shutdown

    torch.set_num_threads(1)
    world = setup(use_gpu=False)
    before = _network(args.interface)
    rows, first_loss = (_sharded if args.kind == "sharded" else _naive)(args, world)
    sent = _network(args.interface) - before
    told = {
        "rank": world.rank,
        "first_loss": first_loss,
        "peak_mb": _peak_mb(),
        "interface_mb": sent / 1e6,
        "steps": rows,
    }
    (Path(args.out) / f"{world.rank}.json").write_text(json.dumps(told))
    shutdown()


def _problem(labels: int) -> tuple[Any, Any, Any]:
    """Random documents, their candidates and the tree's pointers: the same on every rank."""
    import numpy as np
    import scipy.sparse as sp

    from xmcdist.encoders.embed import TokenRows
    from xmcdist.matchers.candidates import CandidateSource

    rng = np.random.default_rng(0)
    tokens = TokenRows([rng.integers(1000, 30000, TOKENS).tolist() for _ in range(DOCS)], pad_id=0)
    clusters = -(-labels // PER_CLUSTER)
    child_ptr = np.minimum(np.arange(clusters + 1, dtype=np.int64) * PER_CLUSTER, labels)
    M = sp.csr_matrix(_ones(rng, clusters, 10))
    Y = sp.csr_matrix(_ones(rng, labels, 5))
    return tokens, CandidateSource(M, Y, child_ptr, max_active=1000, seed=0, level=1), child_ptr


def _ones(rng: Any, columns: int, each: int) -> Any:
    import numpy as np
    import scipy.sparse as sp

    ids = np.concatenate([np.sort(rng.choice(columns, min(each, columns), replace=False)) for _ in range(DOCS)])
    ptr = np.arange(DOCS + 1) * min(each, columns)
    return sp.csr_matrix((np.ones(len(ids), np.float32), ids, ptr), shape=(DOCS, columns))


class _Hooks:
    """Times of the steps, and the bytes that they counted."""

    def __init__(self) -> None:
        from xmcdist.parallel.traffic import TRAFFIC

        self.rows: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.before, self.began = TRAFFIC.copy(), time.perf_counter()

    def log(self, values: dict[str, Any]) -> None:
        from xmcdist.parallel.traffic import TRAFFIC

        sent = TRAFFIC.since(self.before)
        self.losses.append(values["loss"])
        self.rows.append({"seconds": time.perf_counter() - self.began, "bytes": sent.total, "by": dict(sent.sent)})
        self.before, self.began = TRAFFIC.copy(), time.perf_counter()

    def save(self, step: int, state: dict[str, Any]) -> None:
        raise AssertionError("nothing is saved here")

    def evaluate(self, encoder: Any, head: Any) -> None:
        raise AssertionError("nothing is evaluated here")


def _configs() -> tuple[Any, Any]:
    from xmcdist.config.schema import EncoderConfig, OptimizerConfig

    return EncoderConfig(preset="minilm", max_length=TOKENS, dropout=0.0), OptimizerConfig(lr=1e-4)


def _sharded(args: argparse.Namespace, world: Any) -> tuple[list[dict[str, Any]], float]:
    import numpy as np

    from xmcdist.config.schema import EngineConfig, MatcherConfig, ScheduleConfig
    from xmcdist.data.batches import GlobalBatches
    from xmcdist.encoders.hf import load_encoder
    from xmcdist.matchers.head import ShardedHead
    from xmcdist.parallel.mesh import Mesh
    from xmcdist.training.engine import open_engine
    from xmcdist.training.loop import LevelTask, train_level

    mesh = Mesh.build(world)
    encoder_cfg, optimizer = _configs()
    tokens, candidates, _ = _problem(args.labels)
    encoder = load_encoder(encoder_cfg, 0)
    head = ShardedHead(mesh.label_shard(args.labels), encoder.dim, seed=0, level=1)
    task = LevelTask(
        level=1,
        steps=args.steps,
        seed=0,
        tokens=tokens,
        batches=GlobalBatches(tokens.lengths, BATCH, 0),
        document_ids=np.arange(DOCS),
        candidates=candidates,
        matcher=MatcherConfig(),
        optimizer=optimizer,
        schedule=ScheduleConfig(name="constant", warmup=0),
        log_every=1,
    )
    hooks = _Hooks()
    engine = open_engine(EngineConfig(name="cpu", global_batch=BATCH, micro_batch=BATCH), mesh)
    train_level(engine, encoder, head, task, hooks)
    return hooks.rows, hooks.losses[0]


def _naive(args: argparse.Namespace, world: Any) -> tuple[list[dict[str, Any]], float]:
    """All rows on every rank, inside DistributedDataParallel with the encoder."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from xmcdist.data.batches import GlobalBatches, local
    from xmcdist.encoders.hf import load_encoder
    from xmcdist.matchers.head import ShardedHead
    from xmcdist.matchers.losses import ragged_loss
    from xmcdist.parallel.collectives import all_reduce
    from xmcdist.parallel.shards import LabelShard
    from xmcdist.training.optim import encoder_optimizer

    encoder_cfg, optimizer_cfg = _configs()
    tokens, candidates, _ = _problem(args.labels)
    encoder = load_encoder(encoder_cfg, 0)
    head = ShardedHead(LabelShard(0, 1, args.labels), encoder.dim, seed=0, level=1)
    batches = GlobalBatches(tokens.lengths, BATCH, 0)

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = encoder, head

        def forward(self, ids: Any, mask: Any, doc: Any, row: Any) -> Any:
            return self.head(self.encoder(ids, mask).float(), doc, row)

    both: torch.nn.Module = Both()
    if world.world_size > 1:
        both = DistributedDataParallel(both, broadcast_buffers=False, gradient_as_bucket_view=True, init_sync=False)
    optimizers = [
        encoder_optimizer(encoder, optimizer_cfg),
        torch.optim.AdamW(head.parameters(), lr=optimizer_cfg.lr, eps=optimizer_cfg.eps, weight_decay=0, fused=True),
    ]
    rows, first_loss = [], 0.0
    for step in range(args.steps):
        began = time.perf_counter()
        docs = batches.batch(step)
        mine = local(docs, world.rank, world.world_size)
        active = candidates.of(mine, step)
        ids, mask = (torch.from_numpy(a) for a in tokens.batch(mine))
        doc, node, value, counts = (
            torch.from_numpy(a) for a in (active.doc(), active.node, active.value, active.counts)
        )
        loss = ragged_loss("weighted_squared_hinge", both(ids, mask, doc, node), value, doc, counts, len(docs))
        (loss * world.world_size).backward()  # DDP averages
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        total = float(all_reduce(loss.detach()))
        first_loss = total if step == 0 else first_loss
        numbers = sum(p.numel() for p in both.parameters() if p.requires_grad)
        sent = 2 * 4 * numbers * (world.world_size - 1) // world.world_size
        rows.append({"seconds": time.perf_counter() - began, "bytes": sent, "by": {"gradients": sent}})
    return rows, first_loss


def _peak_mb() -> float:
    """Most memory that was resident at one time."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("no VmHWM in /proc/self/status: this benchmark needs Linux")


def _network(interface: str) -> int:
    """Bytes that an interface has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            return int(numbers.split()[8])
    return 0


def encoder_numbers() -> int:
    """Parameters of the encoder that are trained."""
    from xmcdist.encoders.hf import load_encoder

    return sum(p.numel() for p in load_encoder(_configs()[0], 0).parameters() if p.requires_grad)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=["sharded", "naive"], required=True)
    parser.add_argument("--labels", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", required=True, help="folder for <rank>.json")
    parser.add_argument("--interface", default="lo", help="whose sent bytes are read")
    worker(parser.parse_args())
