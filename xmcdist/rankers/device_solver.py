"""Linear rankers of one tree level on a GPU: the problems of `xmcdist.rankers.solver`, solved block by block.

A block is many clusters of like size, each with all its nodes, or some nodes of one cluster that
is too large.  Its nodes are solved together (`device_newton`); blocks are cut so that each fits
a budget of memory, and so that padding costs little.  What does not fit is solved on the CPU.

The optimum is the CPU solver's.  Arithmetic is float32, never TF32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from xmcdist.rankers.columns import member_columns, positive_columns
from xmcdist.rankers.device_blocks import Block, Level, Solved
from xmcdist.rankers.device_newton import LOSSES, Settings, Work, minimise
from xmcdist.rankers.device_plan import MACHINES, Item, Planned, Sizes, make_plan
from xmcdist.rankers.part import Chunk, WeightPart
from xmcdist.rankers.solver import SolverParams, _node_range, solve_level
from xmcdist.rankers.weights import LevelWeights
from xmcdist.sparse.features import Features

__all__ = ["SolverReport", "ranker_device", "solve_level_on_device"]

I64 = NDArray[np.int64]
Say = Callable[[str], None]

_LOSS_OF = {"l2svc_dual": "squared_hinge", "l2svc_primal": "squared_hinge", "logistic_dual": "logistic"}
_TOLERANCE = 0.3  # times params.eps: the share of a node's weights that its gradient may be
_FINEST = 1e-4  # float32 reaches no smaller share
_SHARE = 0.6  # of the free memory of a GPU
_CPU_BUDGET = 1 << 30


@dataclass
class SolverReport:
    """What a call did, for benchmarks and tests.

    Attributes:
        blocks: solved on the device.
        sliced: slots that are a part of a cluster.
        on_cpu: nodes solved on the CPU.
        resident: whether all features were kept on the device.
        work: steps and products of all blocks.
        seconds: of wall time by stage.
    """

    blocks: int = 0
    sliced: int = 0
    on_cpu: int = 0
    resident: bool = False
    work: Work = field(default_factory=Work)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time inside to a stage's."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def ranker_device(wanted: str, solver: str, local_rank: int, say: Say) -> torch.device | None:
    """Where rankers are solved; None for the CPU solver.

    Args:
        wanted: ``auto``, ``cpu`` or ``cuda``.  ``auto`` takes a GPU when there is one and it has this solver.
        solver: see `SolverParams`.
        local_rank: of this process on its machine; GPUs are dealt out by it.
        say: told why ``cuda`` was not possible.
    """
    if wanted == "cpu":
        return None
    if solver not in _LOSS_OF:
        if wanted == "cuda":
            say(_no_solver(solver))
        return None
    if not torch.cuda.is_available():
        if wanted == "cuda":
            say("ranker.device=cuda: there is no CUDA device here, rankers are solved on the CPU")
        return None
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def solve_level_on_device(
    features: Features,
    Y_t: sp.csr_matrix,
    M: sp.csr_matrix,
    child_ptr: I64,
    params: SolverParams,
    relevance: sp.csr_matrix | NDArray[np.float64] | None = None,
    *,
    nodes: tuple[int, int] | None = None,
    device: torch.device | str,
    budget_bytes: int | None = None,
    sharers: int = 1,
    say: Say | None = None,
    report: SolverReport | None = None,
) -> LevelWeights:
    """Solve the nodes of one level, or a contiguous range, as `solver.solve_level` does.

    A node's gradient ends below ``0.3 * params.eps`` times the norm of its weights, which bounds
    its error by as much; 1e-4 is the least that float32 reaches.  ``params.max_iter`` bounds the
    Newton steps.  Other blocks (another range or budget) round otherwise: weights agree within that.

    Args:
        features: of the N documents.
        Y_t: ``[N, K_t]``; positives are entries above 0.
        M: ``[N, K_{t-1}]``; see `solver.solve_level`.
        child_ptr: ``[K_{t-1}+1]``.
        params: see `SolverParams`; the seed is not used.
        relevance: see `solver.solve_level`.
        nodes: half-open range of nodes, which may cut a cluster; default all.
        device: where; ``cpu`` works as well, and is for tests.
        budget_bytes: memory to use; default 0.6 of a GPU's free memory, 1 GiB elsewhere.
        sharers: processes that use this GPU; the default budget is shared out.
        say: told when something is solved on the CPU instead, and why; default nobody.
        report: filled with what was done.

    Raises:
        ValueError: as `solver.solve_level`.

    Cost: of a block, a product with K (or with X and its transpose) for each conjugate-gradient
    step, about 60 in all, for all nodes at once.  Memory: M's and Y_t's own columns, the
    features where they take at most half of the budget, and blocks in the rest.
    """
    say, report = say or _nobody, report or SolverReport()
    loss = _LOSS_OF.get(params.solver)
    if loss is None:
        say(_no_solver(params.solver))
        return solve_level(features, Y_t, M, child_ptr, params, relevance, nodes=nodes)
    nodes = _node_range(features, Y_t, M, child_ptr, None, nodes)
    device = torch.device(device)
    budget = _budget(device) // sharers if budget_bytes is None else budget_bytes
    run = _Run(features, Y_t, M, child_ptr, params, relevance, nodes, device, budget, say, report)
    with _full_float32(), torch.inference_mode():
        return run.solve(Settings(max(_TOLERANCE * params.eps, _FINEST), params.max_iter), loss)


class _Run:
    """One call of `solve_level_on_device`."""

    def __init__(
        self,
        features: Features,
        Y_t: sp.csr_matrix,
        M: sp.csr_matrix,
        child_ptr: I64,
        params: SolverParams,
        relevance: sp.csr_matrix | NDArray[np.float64] | None,
        nodes: tuple[int, int],
        device: torch.device,
        budget: int,
        say: Say,
        report: SolverReport,
    ) -> None:
        self.on_cpu = partial(solve_level, features, Y_t, M, child_ptr, params, relevance)
        self.params, self.device, self.say, self.report = params, device, say, report
        some = nodes[0] < nodes[1]
        self.first = int(np.searchsorted(child_ptr, nodes[0], side="right")) - 1 if some else 0
        last = int(np.searchsorted(child_ptr, nodes[1], side="left")) if some else 0
        self.bounds = np.clip(child_ptr[self.first : last + 1], *nodes).astype(np.int64)
        self.num_sparse, self.num_dense = features.num_sparse, features.num_dense
        self.chunks: list[list[tuple[int, Chunk]]] = [[] for _ in range(last - self.first)]  # (first child, weights)
        self.dense = np.zeros((nodes[1] - nodes[0], features.num_dense), np.float32)
        self.bias = np.zeros(nodes[1] - nodes[0], np.float32)
        with report.timed("columns"):
            members = member_columns(M, (self.first, last), weighted=params.weighted_negatives)
            positives = positive_columns(Y_t, relevance, nodes)
        stored = 0 if features.sparse is None else 8 * (features.sparse.nnz + features.num_rows)
        stored += 4 * features.num_rows * features.num_dense
        resident = stored <= budget // 2
        self.budget = budget - stored if resident else budget
        report.resident = resident
        with report.timed("upload"):
            self.level = Level(
                features,
                members,
                positives,
                self.bounds - nodes[0],
                Cp=params.Cp,
                Cn=params.Cn,
                bias=params.bias,
                device=device,
                resident=resident,
            )

    def solve(self, settings: Settings, loss: str) -> LevelWeights:
        """All blocks, then what did not fit."""
        level = self.level
        sizes = Sizes(level.documents, level.values, np.diff(self.bounds), self.num_sparse, self.num_dense)
        plan = make_plan(sizes, self.budget, MACHINES.get(self.device.type, MACHINES["cuda"]))
        todo, left = plan.blocks[::-1], [Item(c, 0, int(sizes.nodes[c])) for c in plan.too_large]
        while todo:
            block, short = todo.pop(), False
            try:
                left += self._solve_block(block, settings, loss)
            except torch.OutOfMemoryError:
                short = True
            if short:  # outside of the handler, which keeps what was allocated alive
                torch.cuda.empty_cache()
                halves = _halved(block)
                todo += halves
                left += [] if halves else block.items
        if left:
            self._on_cpu(left)
        with self.report.timed("assemble"):
            chunks = [_joined(pieces) for pieces in self.chunks]
            self.chunks.clear()
            part = WeightPart.from_chunks(chunks, self.bounds, self.dense, self.bias, self.first, self.num_sparse)
            return LevelWeights((part,))

    def _solve_block(self, planned: Planned, settings: Settings, loss: str) -> list[Item]:
        """Solve one block and keep its weights; gives the items whose numbers are beyond float32."""
        items, report = planned.items, self.report
        with report.timed("blocks"):
            block = Block(self.level, items, gram=planned.gram, room=self.budget // 8)
        with report.timed("solve"):
            beta, error, work = minimise(block, block.sign, block.cost, LOSSES[loss], settings)
            del block.sign, block.cost
            fine = (error + beta.sum(1)).isfinite().all(1).cpu()
        with report.timed("weights"):
            solved = block.weights(beta, self.params.threshold, self.params.max_nonzeros_per_label)
        with report.timed("chunks"):
            for s, item in enumerate(items):
                if fine[s]:
                    self._keep(item, solved, s)
        report.blocks += 1
        report.work.add(work)
        widths = np.diff(self.bounds)
        report.sliced += sum(int(widths[i.cluster]) != i.stop - i.start for i in items)
        return [item for s, item in enumerate(items) if not fine[s]]

    def _keep(self, item: Item, solved: Solved, s: int) -> None:
        """Put a slot's weights where its cluster's are collected."""
        a, b = solved.slot_features[s : s + 2]
        i, j = solved.slot_weights[s : s + 2]
        chunk = (solved.feature[a:b], solved.counts[a:b], solved.child[i:j], solved.value[i:j])
        self.chunks[item.cluster].append((item.start, chunk))
        first = int(self.bounds[item.cluster] - self.bounds[0]) + item.start
        width = item.stop - item.start
        self.dense[first : first + width] = solved.dense[s, :width]
        self.bias[first : first + width] = solved.bias[s, :width]

    def _on_cpu(self, items: list[Item]) -> None:
        """Solve what the device could not."""
        count = sum(i.stop - i.start for i in items)
        clusters = len({i.cluster for i in items})
        self.say(
            f"rankers: {count} nodes of {clusters} clusters are solved on the CPU: their documents "
            f"do not fit {self.budget / 2**20:.0f} MiB of {self.device.type} memory, or their values float32"
        )
        self.report.on_cpu += count
        with self.report.timed("cpu"):
            for run in _adjoining(items, self.bounds):
                start = int(self.bounds[run[0].cluster]) + run[0].start
                stop = int(self.bounds[run[-1].cluster]) + run[-1].stop
                found = self.on_cpu(nodes=(start, stop))
                own = slice(start - int(self.bounds[0]), stop - int(self.bounds[0]))
                self.dense[own], self.bias[own] = found.dense_rows()
                rows = found.sparse_rows()
                for item in run:
                    first = int(self.bounds[item.cluster]) + item.start - start
                    part: Any = sp.coo_matrix(rows[first : first + item.stop - item.start])
                    self.chunks[item.cluster].append((item.start, _chunk(part.col, part.row, part.data)))


def _adjoining(items: list[Item], bounds: I64) -> list[list[Item]]:
    """The items in runs without gaps between their nodes: each call of the CPU solver reads all of Y_t and M."""
    runs: list[list[Item]] = []
    end = -1
    for item in sorted(items):
        if int(bounds[item.cluster]) + item.start != end:
            runs.append([])
        runs[-1].append(item)
        end = int(bounds[item.cluster]) + item.stop
    return runs


def _chunk(feature: NDArray[Any], child: NDArray[Any], value: NDArray[np.float32]) -> Chunk:
    """(feature, child, value) in any order as a chunk."""
    order = np.lexsort((child, feature))
    features, counts = np.unique(feature, return_counts=True)
    return features.astype(np.uint32), counts, child[order].astype(np.uint32), value[order]


def _joined(pieces: list[tuple[int, Chunk]]) -> Chunk:
    """One chunk of a cluster whose nodes were solved in slices, or of one without documents."""
    if len(pieces) == 1 and pieces[0][0] == 0:
        return pieces[0][1]
    features = [np.repeat(chunk[0], chunk[1]) for _, chunk in pieces]
    children = [chunk[2] + np.uint32(first) for first, chunk in pieces]
    if not pieces:
        features, children = [np.zeros(0, np.uint32)], [np.zeros(0, np.uint32)]
    values = [chunk[3] for _, chunk in pieces] or [np.zeros(0, np.float32)]
    return _chunk(np.concatenate(features), np.concatenate(children), np.concatenate(values))


def _halved(block: Planned) -> list[Planned]:
    """Two blocks of half the slots, or of half the nodes of the only slot; none when there is one node."""
    items = block.items
    if len(items) > 1:
        return [Planned(items[: len(items) // 2], block.gram), Planned(items[len(items) // 2 :], block.gram)]
    cluster, start, stop = items[0]
    middle = (start + stop) // 2
    if middle == start:
        return []
    return [Planned([Item(cluster, start, middle)], False), Planned([Item(cluster, middle, stop)], False)]


def _budget(device: torch.device) -> int:
    """Bytes that a block may take."""
    if device.type != "cuda":
        return _CPU_BUDGET
    free, _ = torch.cuda.mem_get_info(device)
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(_SHARE * (free + reusable))


@contextmanager
def _full_float32() -> Iterator[None]:
    """Products of float32 in float32, whatever the rest of the program allows."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _no_solver(solver: str) -> str:
    return f"rankers: {solver} has no GPU form, its loss is not smooth; they are solved on the CPU"


def _nobody(text: str) -> None:
    """Tell no one."""
