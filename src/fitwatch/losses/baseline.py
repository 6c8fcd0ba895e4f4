"""The baseline of a loss: its value for the best constant prediction."""

import copy
import math

import torch
from attrs import frozen
from torch import Tensor

from fitwatch.losses.base import AnyLoss, ClassLoss, Loss, as_sample_weight, without_masked
from fitwatch.losses.cross_entropy import BinaryCrossEntropy, CrossEntropy, MeanSquaredError, NegativeLogLikelihood
from fitwatch.losses.imbalanced import ExpectedCost
from fitwatch.losses.real_world import RealWorldCrossEntropy

MOST_CLASSES = 300
"""With more classes there is no baseline: the search for the best constant takes C^2 numbers a step."""

_NEGLIGIBLE = 1e-9
"""Losses up to this are 0, apart from finite logits."""


@frozen
class Baseline:
    """The loss of predictions that are the same for every input.

    Attributes:
        constant: Loss of the best constant prediction, the least that a model reaches without using its inputs. For
            cross-entropy it is the entropy of the (weighted) class shares, for the squared error the variance.
        uniform: Loss of equal logits for all classes: ln C for plain cross-entropy. NaN for a regression.
    """

    constant: float
    uniform: float

    def left(self, loss: float) -> float:
        """Return ``loss`` as a share of ``constant``: 1 if nothing is learned, 0 for a perfect model.

        NaN where the constant is 0, for example if all targets are of one class.
        """
        return loss / self.constant if self.constant > _NEGLIGIBLE else math.nan


class TargetSums:
    """Sums over the targets from which the baseline of a loss is computed, gathered over batches, on the host.

    Args:
        loss: Any loss. Functions, the user's own `Loss` classes and more than `MOST_CLASSES` classes have no baseline.

    Attributes:
        known: Whether there may be a baseline.
    """

    def __init__(self, loss: AnyLoss) -> None:
        self.known = isinstance(
            loss, (ClassLoss, BinaryCrossEntropy, RealWorldCrossEntropy, ExpectedCost, MeanSquaredError)
        )
        self._loss = loss
        self._kind = ""
        self._level: Tensor | None = None
        self._sums: Tensor | None = None

    def update(self, output: object, target: object, sample_weight: Tensor | None = None) -> None:
        """Add a batch; only the shape of ``output`` is used."""
        if not (self.known and isinstance(output, Tensor) and isinstance(target, Tensor)):
            return
        one_logit = output.dim() < 2 or output.shape[1] == 1
        squared = isinstance(self._loss, MeanSquaredError)
        exclusive = output.shape != target.shape or (isinstance(self._loss, CrossEntropy) and not one_logit)
        classes = output.shape[0 if output.dim() == 1 else 1] if exclusive and not squared else 0
        if classes > MOST_CLASSES:
            self.known = False
            return
        target = target.detach().cpu()
        weight = None if sample_weight is None else sample_weight.detach().cpu()
        if weight is not None:
            target = without_masked(target, weight)
        if squared:
            y, w = _columns(target, weight)
            if self._level is None:  # the variance as a difference loses its digits if the mean is large
                self._level = torch.where(w > 0, y, 0).sum(0) / (w > 0).sum(0).clamp(min=1)
            y = y - self._level
            self._add("moments", torch.stack([w.sum(0), (w * y).sum(0), (w * y * y).sum(0)]))
        elif output.shape != target.shape:
            self._add("classes", self._count(target, weight, classes))
        elif not exclusive:
            y, w = _columns(target, weight)
            self._add("labels", torch.stack([(w * (1 - y)).sum(0), (w * y).sum(0)]))
        else:
            rows = target.double().movedim(1, -1)
            w = torch.ones(rows.shape[:-1]) if weight is None else as_sample_weight(weight, rows[..., 0])
            self._add("probabilities", (rows * w.unsqueeze(-1)).flatten(0, -2).sum(0))

    def baseline(self) -> Baseline | None:
        """Compute the baseline for the targets seen so far; None if there is none."""
        sums, loss = self._sums, self._loss
        if sums is None or not isinstance(loss, Loss) or not bool(sums.any()):
            return None
        if self._kind == "moments":
            weight, first, second = sums
            return Baseline(constant=float((second - first**2 / weight).sum() / weight.sum()), uniform=math.nan)
        if isinstance(loss, NegativeLogLikelihood):  # takes log-probabilities, but the search is over logits
            loss = CrossEntropy(loss.weight, ignore_index=loss.ignore_index)
        # the copy keeps the user's loss in its dtype, and its learned parameters unchanged
        return _search(copy.deepcopy(loss).cpu().double().requires_grad_(False), self._kind, sums)

    def _add(self, kind: str, sums: Tensor) -> None:
        self._kind, self._sums = kind, sums if self._sums is None else self._sums + sums

    def _count(self, target: Tensor, weight: Tensor | None, classes: int) -> Tensor:
        positions = target.reshape(-1) if target.dim() < 2 else target
        weights = torch.ones(positions.shape, dtype=torch.float64)
        if weight is not None:
            weights = as_sample_weight(weight, weights)
        ignore_index = getattr(self._loss, "ignore_index", None)
        if ignore_index is not None:
            kept = positions != ignore_index
            positions, weights = positions[kept], weights[kept]
        counts = torch.zeros(classes, dtype=torch.float64)
        return counts.index_add_(0, positions.flatten().long(), weights.flatten())


def _columns(target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return targets and weights of all positions, (positions, K), one column per constant to fit."""
    y = target.double()
    w = torch.ones_like(y) if weight is None else as_sample_weight(weight, y)
    if y.dim() < 2:
        return y.reshape(-1, 1), w.reshape(-1, 1)
    return y.movedim(1, -1).flatten(0, -2), w.movedim(1, -1).flatten(0, -2)


def _search(loss: Loss, kind: str, sums: Tensor) -> Baseline:
    """Find the baseline from the loss of one example of each kind of target, weighted by their sums, in float64."""
    if kind == "labels":
        targets = torch.tensor([[0.0], [1.0]], dtype=sums.dtype).expand_as(sums)
        start = (sums[1] / sums[0]).log().nan_to_num(0.0)
    else:
        targets = torch.arange(len(sums)) if kind == "classes" else torch.eye(len(sums), dtype=sums.dtype)
        start = (sums / sums.sum()).log()

    def value(constant: Tensor) -> Tensor:
        losses, weights = loss.unreduced(constant.expand(len(targets), -1), targets)
        weights = torch.as_tensor(weights, dtype=sums.dtype).expand_as(losses)
        # losses of one logit have shape (2,), the sums (2, 1)
        total: Tensor = (losses.reshape(sums.shape) * sums).sum()
        return total / (weights.reshape(sums.shape) * sums).sum()

    uniform = float(value(torch.zeros_like(start)))
    if isinstance(loss, ExpectedCost):  # linear in the probabilities: least at a corner, which finite logits miss
        counts = sums.T.flatten() if kind == "labels" else sums
        return Baseline(constant=float((counts @ loss.costs).min() / counts.sum()), uniform=uniform)
    constant = start.clamp(-30, 30).requires_grad_()  # the optimum of a plain cross-entropy
    optimizer = torch.optim.LBFGS([constant], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss_value = value(constant)
        torch.autograd.backward(loss_value)
        return loss_value

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call] # torch has no types for it
    return Baseline(constant=min(uniform, float(value(constant.detach()))), uniform=uniform)
