"""One level's ranking problems on a device: flat arrays, and blocks of clusters cut out of them.

Letters: N documents, D sparse features, d dense width, C clusters; P (cluster, document)
pairs; S slots of a block (a cluster, or a slice of one's nodes), n documents and m nodes of a
slot, padded to the largest of the block; F (slot, feature) pairs that occur in a block.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmcdist.rankers.columns import Columns
from xmcdist.rankers.device_plan import Item
from xmcdist.sparse.features import Features

__all__ = ["Block", "Level", "Solved"]

I64 = NDArray[np.int64]


class Solved(NamedTuple):
    """The weights of a block's nodes, on the host.

    Attributes:
        slot_features: ``[S+1]`` where each slot's features begin.
        slot_weights: ``[S+1]`` where its weights begin.
        feature: uint32, ascending in a slot.
        counts: weights of each feature.
        child: of each weight, counted from the slot's first node; ascending in a feature.
        value: float32.
        dense: ``[S, m, d]`` float32.
        bias: ``[S, m]`` float32, weight times value of the bias feature.
    """

    slot_features: I64
    slot_weights: I64
    feature: NDArray[np.uint32]
    counts: I64
    child: NDArray[np.uint32]
    value: NDArray[np.float32]
    dense: NDArray[np.float32]
    bias: NDArray[np.float32]


class _Rows:
    """Features of documents by number: held on the device, or brought there when asked for."""

    def __init__(self, features: Features, device: torch.device, *, resident: bool) -> None:
        self.features, self.device, self.resident = features, device, resident
        X = features.sparse
        self.lengths = None if X is None else torch.from_numpy(np.diff(X.indptr).astype(np.int64)).to(device)
        if not resident:
            return
        if X is not None:
            self.starts = torch.from_numpy(X.indptr[:-1].astype(np.int64)).to(device)
            self.indices = torch.from_numpy(np.array(X.indices, np.int32)).to(device)
            self.data = torch.from_numpy(np.array(X.data, np.float32)).to(device)
        if features.dense is not None:
            self.all_dense = torch.from_numpy(np.array(features.dense, np.float32)).to(device)

    def sparse(self, docs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stored values of documents ``[R]``: which of the R, feature, value."""
        assert self.lengths is not None
        assert self.features.sparse is not None
        lengths = self.lengths[docs]
        if self.resident:
            owner, place = ragged(self.starts[docs], lengths)
            return owner, self.indices[place].long(), self.data[place]
        own = self.features.sparse[docs.cpu().numpy()]
        owner = torch.repeat_interleave(torch.arange(docs.numel(), device=self.device), lengths)
        columns = torch.from_numpy(own.indices.astype(np.int64)).to(self.device)
        return owner, columns, torch.from_numpy(own.data.astype(np.float32, copy=False)).to(self.device)

    def dense(self, docs: Tensor) -> Tensor:
        """Dense features of documents ``[R]``, ``[R, d]``."""
        if self.resident:
            return self.all_dense[docs]
        assert self.features.dense is not None
        return torch.from_numpy(np.array(self.features.dense[docs.cpu().numpy()], np.float32)).to(self.device)


class Level:
    """The nodes of a range of clusters and the documents each cluster's nodes train on.

    Args:
        features: of the N documents.
        members: documents of each of the C clusters, with their weights as negatives.
        positives: documents of each node, with their relevance.
        bounds: ``[C+1]`` where each cluster's nodes begin, the first 0.
        Cp: cost of positives.
        Cn: cost of negatives.
        bias: value of the bias feature.
        device: where all is kept.
        resident: keep the features there too, else bring them block by block.
    """

    def __init__(
        self,
        features: Features,
        members: Columns,
        positives: Columns,
        bounds: I64,
        *,
        Cp: float,
        Cn: float,
        bias: float,
        device: torch.device,
        resident: bool,
    ) -> None:
        self.device, self.bounds, self.bias = device, bounds, bias
        self.num_sparse, self.num_dense = features.num_sparse, features.num_dense
        self.rows = _Rows(features, device, resident=resident)
        N, clusters = features.num_rows, bounds.size - 1
        cluster_of_node = np.repeat(np.arange(clusters), np.diff(bounds))
        member_keys = self._keys(np.repeat(np.arange(clusters), np.diff(members.ptr)), members.rows, N)
        positive_keys = self._keys(np.repeat(cluster_of_node, np.diff(positives.ptr)), positives.rows, N)
        keys = torch.unique(torch.cat([member_keys, positive_keys]))  # [P] ascending
        self.docs = keys % N
        self.negative = torch.zeros(keys.numel(), device=device)
        weights = torch.from_numpy(members.values.astype(np.float32)).to(device)
        self.negative[torch.searchsorted(keys, member_keys)] = Cn * weights
        edges = torch.searchsorted(keys, torch.arange(clusters + 1, device=device) * N)
        self.pair_starts = edges
        self.documents: I64 = np.diff(edges.cpu().numpy())  # [C]
        self.positive_pair = torch.searchsorted(keys, positive_keys)
        self.positive_cost = Cp * torch.from_numpy(positives.values.astype(np.float32)).to(device)
        self.positive_ptr = torch.from_numpy(positives.ptr.astype(np.int64)).to(device)
        self.values: I64 = np.zeros(clusters, np.int64)  # [C] stored sparse values
        if self.rows.lengths is not None:
            total = torch.zeros(keys.numel() + 1, dtype=torch.int64, device=device)
            torch.cumsum(self.rows.lengths[self.docs], 0, out=total[1:])
            self.values = np.diff(total[edges].cpu().numpy())

    def _keys(self, cluster: I64, rows: NDArray[np.uint32], N: int) -> Tensor:
        return torch.from_numpy(cluster * N + rows.astype(np.int64)).to(self.device)


class Block:
    """Some items of a level with their documents, ready to be solved.

    Attributes:
        sign: ``[S, n, m]`` float32, +1 for positives, -1 otherwise.
        cost: ``[S, n, m]`` float32, 0 where a document is not in a node's problem.
    """

    def __init__(self, level: Level, items: list[Item], *, gram: bool, room: int) -> None:
        """Cut the block out.

        Args:
            level: of which the items are.
            items: of clusters that have documents.
            gram: keep inner products of documents, else the documents themselves.
            room: bytes for what is needed only while inner products are computed.
        """
        self.level, self.items, self.gram, self.room = level, items, gram, room
        device = level.device
        which = torch.tensor([i.cluster for i in items], device=device)
        self.widths = torch.tensor([i.stop - i.start for i in items], device=device)
        self.S, self.n = len(items), int(level.documents[[i.cluster for i in items]].max())
        self.m = max(i.stop - i.start for i in items)
        starts = level.pair_starts[which]
        slot, pair = ragged(starts, level.pair_starts[which + 1] - starts)
        self.row = slot * self.n + (pair - starts[slot])  # of every pair among the S * n rows
        self.docs = level.docs[pair]
        self._fill_costs(which, slot, pair, starts)
        self.X: Tensor | None = None  # [S n, F]
        self.Xt: Tensor | None = None  # [F, S n]
        if level.num_sparse:
            self._fill_sparse(slot)
        self.E: Tensor | None = None  # [S, n, d]
        if level.num_dense:
            self.E = torch.zeros(self.S * self.n, level.num_dense, device=device)
            self.E[self.row] = level.rows.dense(self.docs)
            self.E = self.E.view(self.S, self.n, -1)
        self.K: Tensor | None = self._inner_products() if gram else None  # [S, n, n]
        if gram:
            self.X = None

    def _fill_costs(self, which: Tensor, slot: Tensor, pair: Tensor, starts: Tensor) -> None:
        level, shape = self.level, (self.S, self.n, self.m)
        self.cost = torch.zeros(shape, device=level.device)
        there = torch.arange(self.m, device=level.device) < self.widths[slot, None]
        self.cost.view(-1, self.m)[self.row] = level.negative[pair, None] * there
        first = torch.tensor([int(level.bounds[i.cluster]) + i.start for i in self.items], device=level.device)
        owner, node = ragged(first, self.widths)
        begin = level.positive_ptr[node]
        of, entry = ragged(begin, level.positive_ptr[node + 1] - begin)
        of_slot = owner[of]
        place = (of_slot * self.n + level.positive_pair[entry] - starts[of_slot]) * self.m + node[of] - first[of_slot]
        self.cost.view(-1)[place] = level.positive_cost[entry]
        self.sign = torch.full(shape, -1.0, device=level.device)
        self.sign.view(-1)[place] = 1.0

    def _fill_sparse(self, slot: Tensor) -> None:
        """X and its transpose, with the features of every slot renumbered."""
        level = self.level
        of, column, value = level.rows.sparse(self.docs)
        row, total = self.row[of], self.S * self.n
        key, order = torch.sort(slot[of] * level.num_sparse + column, stable=True)
        if self.S * level.num_sparse <= key.numel():  # nearly every feature occurs
            self.key = torch.arange(self.S * level.num_sparse, device=level.device)
            local = key
        else:
            self.key, local = torch.unique_consecutive(key, return_inverse=True)
        self.F = self.key.numel()
        renumbered = torch.empty_like(local)
        renumbered[order] = local
        self.X = _csr(row, renumbered, value, (total, self.F))
        self.Xt = _csr(local, row[order], value[order], (self.F, total))

    def _inner_products(self) -> Tensor:
        """K, by columns, so that no more than ``room`` bytes of documents lie there dense."""
        n = self.n
        K = torch.full((self.S, n, n), self.level.bias**2, device=self.level.device)
        if self.E is not None:
            K.baddbmm_(self.E, self.E.transpose(1, 2))
        if self.X is None or self.X.values().numel() == 0:
            return K
        crow, columns, values = self.X.crow_indices().long(), self.X.col_indices().long(), self.X.values()
        row = torch.repeat_interleave(crow[1:] - crow[:-1])
        local = row % n
        step = min(max(self.room // (4 * (self.F + self.S * n)), 1), n)
        for a in range(0, n, step):
            b = min(a + step, n)
            spread = torch.zeros(self.F, b - a, device=K.device)
            if b - a == n:
                spread[columns, local] = values
            else:
                own = torch.nonzero((local >= a) & (local < b)).flatten()
                spread[columns[own], local[own] - a] = values[own]
            K[:, :, a:b] += (self.X @ spread).view(self.S, n, b - a)
        return K

    def apply(self, V: Tensor) -> Tensor:
        """K times ``[S, n, m]``."""
        if self.K is not None:
            return torch.bmm(self.K, V)
        out = (self.level.bias**2 * V.sum(1, keepdim=True)).expand_as(V)
        if self.E is not None:
            out = torch.baddbmm(out, self.E, torch.bmm(self.E.transpose(1, 2), V))
        if self.X is None or self.Xt is None:
            return out.contiguous()
        flat = V.reshape(-1, V.shape[2])
        return (self.X @ (self.Xt @ flat)).view(V.shape).add_(out)

    def keep(self, slots: Tensor) -> bool:
        """Forget the inner products of all slots but these; documents are not cut."""
        if self.K is None:
            return False
        step = max(self.room // max(4 * self.n * self.n, 1), 1)
        for a in range(0, slots.numel(), step):  # ascending, so what is overwritten was read before
            chosen = slots[a : a + step]
            self.K[a : a + chosen.numel()] = self.K[chosen]
        self.K = self.K[: slots.numel()]
        return True

    def weights(self, beta: Tensor, threshold: float, limit: int | None) -> Solved:
        """The weights of beta ``[S, n, m]``, the small sparse ones dropped."""
        self.K = None
        level, S, m = self.level, self.S, self.m
        bias = level.bias**2 * beta.sum(1)
        dense = torch.zeros(S, m, level.num_dense, device=level.device)
        if self.E is not None:
            dense = torch.bmm(beta.transpose(1, 2), self.E)
        slot_features = torch.zeros(S + 1, dtype=torch.int64, device=level.device)
        found = [torch.zeros(0, dtype=torch.int64, device=level.device) for _ in range(3)]
        value = torch.zeros(0, device=level.device)
        if self.Xt is not None and self.Xt.values().numel():
            place, value = self._large(beta.reshape(S * self.n, m), threshold)
            if limit is not None and limit < level.num_sparse:
                node = self.key[place // m] // level.num_sparse * m + place % m
                kept = _largest(node, value, limit)
                place, value = place[kept], value[kept]
            feature, counts = torch.unique_consecutive(place // m, return_counts=True)
            key = self.key[feature]
            torch.cumsum(torch.bincount(key // level.num_sparse, minlength=S), 0, out=slot_features[1:])
            found = [key % level.num_sparse, counts, place % m]
        feature, counts, child = (a.to(torch.int32).cpu().numpy() for a in found)
        begin = slot_features.cpu().numpy()
        return Solved(
            begin,
            np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])[begin],
            feature.view(np.uint32),
            counts.astype(np.int64),
            child.view(np.uint32),
            value.cpu().numpy(),
            dense.cpu().numpy(),
            bias.cpu().numpy(),
        )

    def _large(self, beta: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """Weights of sparse features that are not dropped, feature by feature: (feature * m + node, value)."""
        assert self.Xt is not None
        crow, columns, values = self.Xt.crow_indices(), self.Xt.col_indices(), self.Xt.values()
        step = max(self.room // (40 * self.m), 1)
        places, kept = [], []
        for a in range(0, self.F, step):
            b = min(a + step, self.F)
            if step >= self.F:
                W = self.Xt @ beta
            else:
                i, j = int(crow[a]), int(crow[b])
                W = _as_csr(crow[a : b + 1] - i, columns[i:j], values[i:j], (b - a, beta.shape[0])) @ beta
            flat = W.view(-1)
            own = torch.nonzero((flat.abs() >= threshold) & (flat != 0)).flatten()
            places.append(own + a * self.m)
            kept.append(flat[own])
        return torch.cat(places), torch.cat(kept)


def ragged(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Runs ``starts[r] .. starts[r] + lengths[r]``, one after the other: the run and the number of every member."""
    owner = torch.repeat_interleave(lengths)
    before = torch.cumsum(lengths, 0) - lengths
    return owner, torch.arange(owner.numel(), device=starts.device) + (starts - before)[owner]


def _csr(row: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
    """A CSR matrix from entries in the order of rows."""
    crow = torch.zeros(shape[0] + 1, dtype=torch.int64, device=row.device)
    torch.cumsum(torch.bincount(row, minlength=shape[0]), 0, out=crow[1:])
    return _as_csr(crow, column, value, shape)


def _as_csr(crow: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
    index = torch.int32 if max(*shape, value.numel()) < 2**31 else torch.int64
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(crow.to(index), column.to(index), value, shape, check_invariants=False)


def _largest(node: Tensor, value: Tensor, limit: int) -> Tensor:
    """Numbers of the entries among the ``limit`` largest of their node, ascending; ties to the first."""
    order = torch.argsort(value.abs(), descending=True, stable=True)
    order = order[torch.argsort(node[order], stable=True)]
    sizes = torch.bincount(node)
    rank = torch.arange(node.numel(), device=node.device) - (torch.cumsum(sizes, 0) - sizes)[node[order]]
    return torch.sort(order[rank < limit]).values
