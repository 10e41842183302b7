"""Many regularised linear problems at once by truncated Newton, in batched tensor operations.

The problems of one cluster share their documents, so they share the matrix of inner products
``K = X X^T + E E^T + bias^2``.  A node's weights are ``w = X^T beta`` (dense and bias parts
alike), its margins ``z = K beta``, and all is done on beta and z: one iteration costs one
product with K for all nodes of all clusters of a block, whether K is stored or is X times X^T
(`Operator`).

For a node with labels y, costs c and loss l, ``P(w) = 1/2 ||w||^2 + sum_i c_i l(y_i z_i)``:

* the gradient is ``X^T (beta - g)`` with ``g_i = -c_i y_i l'(y_i z_i)``;
* the Hessian is ``I + X^T D X`` with ``D_i = c_i l''(y_i z_i)``, so it takes the vector ``X^T p``
  to ``X^T (p + D K p)``;
* inner products of weights are ``u^T K v``.

The Newton step is found by conjugate gradients on the weights, written in these coordinates; cut
short it is a direction of descent all the same.  The curvature of the regulariser is 1, hence
``||w - w*|| <= ||gradient||``, which tells when a node is solved.

Conjugate gradients on beta itself (the dual) need a start without the documents that have left
the problem, and from there, on package descriptions and titles, took 5 to 10 times the products.

Source: Lin et al., JMLR 2008 (truncated Newton for logistic regression and L2-loss SVM);
Chapelle, Neural Computation 2007 (the problem in the coordinates of the documents).

Shapes: S clusters (slots) of a block, n documents and m nodes of a slot, both padded to the
largest of the block; a document outside of a node's problem, padding included, has cost 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["LOSSES", "Loss", "Operator", "Settings", "Work", "minimise"]

_LOOSE = 0.3  # share of the gradient that conjugate gradients may leave far from the optimum
_STRAGGLERS = 0.03  # share of nodes for which conjugate gradients are not continued
_RISE = 0.1  # a full step may end on a rise of this share of the fall it began with
_SEARCHES = 5  # evaluations of a line search
_SHRINK = 0.75  # share of the nodes, padding included, below which solved ones are taken out of a block
_FELL, _PATIENCE = 0.5, 5.0  # so many Newton steps without the gradient's square falling so far: rounding, no progress
# What conjugate gradients leave of beta where K does not see it makes the gradient's norm doubtful by about this share
# of the residual's; with very large costs it can outgrow all else, and the best beta so far is kept.
_ROUNDING = 3e-10
_FAR, _HARDLY = 1e-4, 0.2  # where that square is above this share of the squared norm, a step counts but so much


class Operator(Protocol):
    """The product with K of every slot."""

    def apply(self, V: Tensor) -> Tensor:
        """``K V``, ``[S, n, m]`` to ``[S, n, m]``, a new tensor."""
        ...

    def keep(self, slots: Tensor) -> bool:
        """Forget all slots but these (ascending ids); False when this operator cannot."""
        ...


@dataclass(frozen=True, slots=True)
class Loss:
    """A smooth loss of the margin.

    Attributes:
        slope: of (signs, costs, margins), all ``[S, n, m]``: g.
        both: the same: g, and the curvature D.
    """

    slope: Callable[[Tensor, Tensor, Tensor], Tensor]
    both: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Settings:
    """When to stop.

    Attributes:
        tolerance: a node is solved when the bound on its error is below this share of its weights' norm.
        newton_steps: most Newton steps.
        cg_steps: most conjugate-gradient steps of one Newton step.
    """

    tolerance: float
    newton_steps: int = 100
    cg_steps: int = 100


@dataclass(slots=True)
class Work:
    """What it took: Newton steps, products with K."""

    newton: int = 0
    products: int = 0
    columns: int = 0  # slots times nodes in these products, padding included

    def add(self, other: Work) -> None:
        self.newton += other.newton
        self.products += other.products
        self.columns += other.columns


def _hinge_gap(sign: Tensor, margin: Tensor) -> Tensor:
    """``max(0, 1 - y z)``."""
    return torch.addcmul(margin.new_ones(()), sign, margin, value=-1).clamp_min_(0)


def _hinge_slope(sign: Tensor, cost: Tensor, margin: Tensor) -> Tensor:
    return _hinge_gap(sign, margin).mul_(sign).mul_(cost).mul_(2)


def _hinge_both(sign: Tensor, cost: Tensor, margin: Tensor) -> tuple[Tensor, Tensor]:
    gap = _hinge_gap(sign, margin)
    curvature = torch.mul(cost, gap > 0).mul_(2)
    return gap.mul_(sign).mul_(cost).mul_(2), curvature


def _logistic_slope(sign: Tensor, cost: Tensor, margin: Tensor) -> Tensor:
    return torch.mul(sign, margin).neg_().sigmoid_().mul_(sign).mul_(cost)


def _logistic_both(sign: Tensor, cost: Tensor, margin: Tensor) -> tuple[Tensor, Tensor]:
    wrong = torch.mul(sign, margin).neg_().sigmoid_()
    curvature = torch.addcmul(wrong, wrong, wrong, value=-1).mul_(cost)
    return wrong.mul_(sign).mul_(cost), curvature


LOSSES = {
    "squared_hinge": Loss(_hinge_slope, _hinge_both),
    "logistic": Loss(_logistic_slope, _logistic_both),
}


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of every node, ``[S, 1, m]``."""
    return (a * b).sum(1, keepdim=True)


class _Nodes:
    """The nodes still being solved: a part of the block's slots, and of each slot's nodes.

    ``wide`` tensors are ``[S', n, m']``, ``thin`` ones ``[S', 1, m']``, one number a node.
    """

    def __init__(self, sign: Tensor, cost: Tensor) -> None:
        S, _, m = cost.shape
        self.slots = torch.arange(S, device=cost.device)  # [S'] ids in the block
        self.places = torch.arange(m, device=cost.device).expand(S, m)  # [S', m'] ids in the slot
        zeros, infinite = torch.zeros_like(cost), torch.full((S, 1, m), torch.inf, device=cost.device)
        self.wide = {"sign": sign, "cost": cost, "beta": zeros, "margin": zeros.clone(), "best": zeros.clone()}
        self.thin = {"first": infinite, "least": infinite.clone(), "since": torch.zeros_like(infinite)}
        self.thin["error"] = infinite.clone()

    def evaluate(self, operator: Operator, loss: Loss, tolerance: float, work: Work) -> Tensor:
        """Gradient and curvature where the nodes stand; gives how many of each slot are not solved, ``[S']``.

        ``X^T residual`` is the gradient turned round, ``image`` is ``K residual``.
        """
        wide, thin = self.wide, self.thin
        residual, wide["curvature"] = loss.both(wide["sign"], wide["cost"], wide["margin"])
        wide["residual"] = residual.sub_(wide["beta"])
        wide["image"] = _product(operator, residual, work)
        gradient = _dot(residual, wide["image"]).clamp_min_(0)
        norm = _dot(wide["beta"], wide["margin"]).clamp_min_(1e-30)
        found = (gradient + _ROUNDING * _dot(residual, residual)) / norm
        wide["best"] = torch.where(found <= thin["error"], wide["beta"], wide["best"])
        thin["error"] = torch.minimum(thin["error"], found)
        thin["gradient"], thin["goal"] = gradient, norm * tolerance**2
        thin["first"] = torch.where(thin["first"].isinf(), gradient, thin["first"])
        counts = torch.where(found > _FAR, _HARDLY, 1.0)
        thin["since"] = torch.where(gradient < _FELL * thin["least"], 0, thin["since"] + counts)
        thin["least"] = torch.minimum(thin["least"], gradient)
        thin["live"] = (found > tolerance**2) & (gradient > 0) & (thin["since"] < _PATIENCE)
        return thin["live"].sum((1, 2))

    def write(self, beta: Tensor, error: Tensor) -> None:
        """Put the best beta so far and its error where they belong in the block's ``[S, n, m]`` and ``[S, 1, m]``."""
        for whole, own in ((beta, self.wide["best"]), (error, self.thin["error"])):
            index = self.places[:, None, :].expand(-1, whole.shape[1], -1)
            if self.slots.numel() == whole.shape[0]:
                whole.scatter_(2, index, own)
            else:
                whole[self.slots] = whole[self.slots].scatter_(2, index, own)

    def narrow(self, slots: Tensor | None, width: int) -> None:
        """Go on with these slots (None: all), and in each with ``width`` nodes that hold all its unsolved ones."""
        order = torch.argsort(self.thin["live"][:, 0].to(torch.int8), dim=1, descending=True, stable=True)[:, :width]
        if slots is not None:
            order, self.slots, self.places = order[slots], self.slots[slots], self.places[slots]
        self.places = self.places.gather(1, order)
        for tensors in (self.wide, self.thin):
            for name, a in tensors.items():  # one after the other: each is freed when its copy is made
                rows = a if slots is None else a[slots]
                tensors[name] = rows.gather(2, order[:, None, :].expand(-1, a.shape[1], -1))

    def direction(self, operator: Operator, settings: Settings, work: Work) -> tuple[Tensor, Tensor, Tensor]:
        """The Newton step by conjugate gradients; uses residual, curvature and image up.

        Returns:
            the step in beta and in margins, ``[S', n, m']``, and the slope of the objective along
            it, ``[S', 1, m']``.
        """
        thin = self.thin
        curvature, residual, image = (self.wide.pop(name) for name in ("curvature", "residual", "image"))
        square = thin["gradient"]
        share = torch.minimum((square / thin["first"]).sqrt_(), square.new_full((), _LOOSE**2))
        goal = torch.maximum(square * share, 0.1 * thin["goal"])
        goal = torch.where(thin["live"], goal, torch.inf)
        enough = _STRAGGLERS * float(thin["live"].sum())
        path, seen = residual.clone(), image
        step, change, slope = torch.zeros_like(residual), torch.zeros_like(residual), torch.zeros_like(square)
        for count in range(settings.cg_steps):
            bent = torch.addcmul(path, curvature, seen)
            along = _dot(seen, bent)
            # The curvature is at least 1, so a rate above 1 is rounding: the node takes no part any more.
            goal = torch.where(along < 0.9 * square, torch.inf, goal)
            rate = torch.where(square > goal, square / along, 0)
            step.addcmul_(rate, path)
            change.addcmul_(rate, seen)
            slope.addcmul_(rate, square, value=-1)
            if count == settings.cg_steps - 1:
                break
            residual.addcmul_(rate, bent, value=-1)
            del bent
            image = _product(operator, residual, work)
            before, square = square, _dot(residual, image).clamp_min_(0)
            if float((square > goal).sum()) <= enough:  # waits for the device
                break
            turn = torch.where(before > 0, square / before, 0)
            path.mul_(turn).add_(residual)
            seen.mul_(turn).add_(image)
        return step, change, slope

    def advance(self, loss: Loss, step: Tensor, change: Tensor, slope: Tensor) -> None:
        """Go along the step, all of it unless the objective rises again on the way: then to its least."""
        wide = self.wide

        def slope_at(t: Tensor) -> Tensor:
            beta, margin = torch.addcmul(wide["beta"], t, step), torch.addcmul(wide["margin"], t, change)
            return _dot(change, beta.sub_(loss.slope(wide["sign"], wide["cost"], margin)))

        one, low = torch.ones_like(slope), torch.zeros_like(slope)
        high, left, right = one, slope, slope_at(one)
        falls = self.thin["live"] & (slope < 0)
        rises = falls & (right > -_RISE * slope)
        t = one
        if bool(rises.any()):  # waits for the device
            for _ in range(_SEARCHES):  # the slope only grows along the step: false position
                middle = low + (high - low) * (left / (left - right)).nan_to_num_(0.5).clamp_(0.05, 0.95)
                found = slope_at(middle)
                below = found <= 0
                left, right = torch.where(below, found, 0.5 * left), torch.where(below, 0.5 * right, found)
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            t = torch.where(rises, torch.where(low > 0, low, 0.1 * high), one)
        t = torch.where(falls, t, 0)
        wide["beta"].addcmul_(t, step)
        wide["margin"].addcmul_(t, change)


def minimise(
    operator: Operator, sign: Tensor, cost: Tensor, loss: Loss, settings: Settings
) -> tuple[Tensor, Tensor, Work]:
    """Solve every node of a block.

    Args:
        operator: the documents; slots that are solved are taken out of it on the way.
        sign: ``[S, n, m]`` float32, +1 for positives, -1 otherwise.
        cost: ``[S, n, m]`` float32, 0 or more; 0 leaves the document out of the node's problem.
        loss: see `LOSSES`.
        settings: when to stop.  A node that rounding keeps from its tolerance is left where it was nearest.

    Returns:
        beta ``[S, n, m]``; the bound that was reached on each node's relative error, ``[S, m]``;
        and what it took.

    Cost: a product with K and about 25 passes over ``[S, n, m]`` for each conjugate-gradient step;
    one wait for the device a step.
    """
    beta, error = torch.zeros_like(cost), torch.zeros_like(cost[:, :1])
    nodes, work = _Nodes(sign, cost), Work()
    for step in range(settings.newton_steps + 1):
        unsolved = nodes.evaluate(operator, loss, settings.tolerance, work).cpu()  # waits for the device
        widest = int(unsolved.max())
        if widest == 0 or step == settings.newton_steps:
            break
        work.newton += 1
        slots = torch.nonzero(unsolved).flatten()
        if slots.numel() * widest <= _SHRINK * nodes.thin["live"].numel():
            nodes.write(beta, error)
            kept = slots.to(cost.device)
            nodes.narrow(kept if slots.numel() < unsolved.numel() and operator.keep(kept) else None, widest)
        nodes.advance(loss, *nodes.direction(operator, settings, work))
    nodes.write(beta, error)
    return beta, error[:, 0].sqrt_(), work


def _product(operator: Operator, V: Tensor, work: Work) -> Tensor:
    work.products += 1
    work.columns += V.shape[0] * V.shape[2]
    return operator.apply(V)
