"""The largest rate at which plain gradient descent on the head's rows is stable, from the data.

Letters: N documents looked at, B documents a batch, n rows owned, d width, p pairs, l a row,
e_i the vector of document i with a 1 for the bias behind it.

With the documents' vectors fixed, the loss is a sum over rows, each with its own weights w_l:

    f_l(w) = 1/N sum_i c_il max(0, 1 - y_il w . e_i)^2,   c_il = (weight of the pair) / (candidates of i)

Its Hessian is at most H_l = 1/N sum_i a_il e_i e_i^T with a_il = 2 c_il, and equal to it where no
margin is reached (with log loss a_il = c_il / 4).  Let C_l = lambda_max(H_l), R_l = max_i a_il |e_i|^2.

*All N documents a step.*  A step of rate r multiplies the distance to the minimum by I - r H along
the way, H below H_l: no direction grows as long as r < 2 / C_l, and where H = H_l the top one does beyond.

*B of N, drawn without replacement.*  The batch's curvature G has mean H and, with
q = (N - B) / (B (N - 1)), E[G^2] = (1 - q) H^2 + q/N sum_i (a_il e_i e_i^T)^2 <= ((1 - q) C_l + q R_l) H.
So E|(I - r G) x|^2 = |x|^2 - 2 r x^T H x + r^2 x^T E[G^2] x shrinks for every x with H x != 0 when

    r < 2 / max_l ((1 - q) C_l + q R_l)

which for B = N is the first.  Distances are to a minimum at which the batches' gradients are 0; where
they are not, they add a spread around it that grows with r, but no divergence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmcdist.data.batches import local
from xmcdist.encoders.embed import Tokens, embed
from xmcdist.encoders.hf import Encoder
from xmcdist.matchers.candidates import Candidates, CandidateSource
from xmcdist.matchers.head import ShardedHead, score_pairs
from xmcdist.parallel.collectives import all_gather_ragged, all_reduce
from xmcdist.parallel.launch import World

__all__ = ["Ceiling", "ceiling_of", "head_ceiling", "largest_curvature"]

_DOCUMENTS = 1024  # looked at
_ITERATIONS = (20, 200)  # fewest and most
_TOLERANCE = 1e-5  # of the largest curvature, between two iterations
_CURVATURE = {"weighted_squared_hinge": 2.0, "squared_hinge": 2.0, "bce": 0.25}  # most of f'' of a pair's loss


@dataclass(frozen=True)
class Ceiling:
    """What bounds the head's rate."""

    rate: float  # below it, gradient descent is stable
    curvature: float  # max_l C_l
    documents: int  # N


def head_ceiling(
    encoder: Encoder,
    head: ShardedHead,
    tokens: Tokens,
    ids: NDArray[np.int64],
    source: CandidateSource,
    loss: str,
    batch: int,
    world: World,
    precision: str = "fp32",
) -> Ceiling:
    """Measure it on up to 1,024 documents, evenly spread; collective, the same on every rank.

    Vectors change while the encoder trains, and the ceiling with the square of their length: it
    is that of the moment.

    Args:
        encoder: whole, on the device of the head.
        head: this rank's rows.
        tokens: of all documents.
        ids: documents trained on.
        source: their candidates; those of step 0 are taken.
        loss: of the matcher.
        batch: B.
        world: documents are embedded by all its ranks.

    Raises:
        ValueError: an unknown loss.

    Cost: N documents through the encoder, shared out; their vectors on every rank; per iteration a
        forward and backward pass of the head on them, and one number all-reduced.
    """
    if loss not in _CURVATURE:
        raise ValueError(f"matcher.loss={loss!r} is none of {', '.join(_CURVATURE)}")
    some = ids[np.unique(np.linspace(0, len(ids) - 1, min(_DOCUMENTS, len(ids))).astype(np.int64))]
    own = local(some, world.rank, world.world_size)
    mine = torch.from_numpy(embed(encoder, tokens, own, device=head.weight.device, precision=precision))
    E = torch.cat(all_gather_ragged(mine.to(head.weight.device)))
    candidates = source.of(some, 0).restrict(head.start, head.stop)
    return ceiling_of(E, candidates, len(head.weight), loss, batch, len(ids))


def ceiling_of(E: Tensor, candidates: Candidates, rows: int, loss: str, batch: int, drawn_from: int) -> Ceiling:
    """The ceiling of given vectors ``[N, d]`` and candidates among this rank's rows; collective.

    Args:
        drawn_from: documents that batches are drawn from; more than N where these are a sample.
    """
    E = torch.cat([E, E.new_ones(len(E), 1)], dim=1)
    N = len(E)
    doc, row = (torch.from_numpy(a).to(E.device) for a in (candidates.doc(), candidates.node))
    share = _CURVATURE[loss] / np.maximum(candidates.counts, 1)[candidates.doc()] * candidates.weight
    if loss == "weighted_squared_hinge":
        share = share * np.where(candidates.value > 0, candidates.value, 1.0)
    a = torch.from_numpy(share).to(E)
    C = largest_curvature(E, doc, row, a / N, rows)
    R = E.new_zeros(rows).scatter_reduce(0, row, a * E.square().sum(1)[doc], "amax")
    q = max(drawn_from - batch, 0) / (batch * max(drawn_from - 1, 1))
    own = torch.stack([((1 - q) * C + q * R).amax(), C.amax()]) if rows else E.new_zeros(2)
    bound, curvature = all_reduce(own.double(), "max").tolist()
    return Ceiling(2.0 / bound if bound else math.inf, curvature, N)


def largest_curvature(E: Tensor, doc: Tensor, row: Tensor, a: Tensor, rows: int) -> Tensor:
    """lambda_max of each row's ``sum of a e e^T`` over its pairs, by power iteration; collective.

    All rows go on until the largest of all ranks' stands still, so what a row gets does not
    depend on which rank has it.

    Args:
        E: ``[N, d]``.
        doc: int64 ``[p]``.
        row: int64 ``[p]``, below ``rows``.
        a: ``[p]``, not negative.
        rows: n.

    Returns:
        ``[n]``; 0 of a row without pairs.  Never above the true value, below it by about 1e-5 of
        the largest, more where the two largest of a row are close.
    """
    fewest, most = _ITERATIONS
    start = torch.randn(E.shape[1], generator=torch.Generator().manual_seed(0)).to(E)
    V = (start / start.norm()).repeat(rows, 1)
    found = E.new_zeros(rows)
    none = E.new_zeros(rows)
    before = 0.0
    for i in range(most):
        with torch.enable_grad():
            W = V.detach().requires_grad_()
            scores = score_pairs(E, W, none, doc, row)
            (HV,) = torch.autograd.grad(0.5 * (a * scores.square()).sum(), W)
        found = HV.norm(dim=1)
        V = HV / found.clamp(min=torch.finfo(E.dtype).tiny).unsqueeze(1)
        own = found.amax() if rows else found.sum()
        largest = float(all_reduce(own.double(), "max"))
        if i >= fewest and largest - before <= _TOLERANCE * largest:
            break
        before = largest
    return found
