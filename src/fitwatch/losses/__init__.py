"""Losses as weighted sums.

A mean of weighted means is not the weighted mean. So every loss here gives a sum and the weight to divide it by
(`Loss.sums`), which add up over micro-batches, ranks and epochs, whatever the cut. Called as a module, it gives
the mean over the batch, as its torch counterpart does.

Outputs in half precision are computed in float32; float32 and float64 keep their dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fitwatch.losses.base import Loss, LossSum
from fitwatch.losses.baseline import Baseline
from fitwatch.losses.costs import CostMatrix, confusion_matrix, cost_optimal_decision, real_world_cost
from fitwatch.losses.cross_entropy import BinaryCrossEntropy, CrossEntropy, MeanSquaredError, NegativeLogLikelihood
from fitwatch.losses.imbalanced import LDAM, ExpectedCost, Focal, LogitAdjusted
from fitwatch.losses.real_world import RealWorldCrossEntropy

__all__ = [
    "LDAM",
    "Baseline",
    "BinaryCrossEntropy",
    "CostMatrix",
    "CrossEntropy",
    "ExpectedCost",
    "Focal",
    "LogitAdjusted",
    "Loss",
    "LossSum",
    "MeanSquaredError",
    "RealWorldCrossEntropy",
    "apply",
    "as_loss",
    "as_sums",
    "confusion_matrix",
    "cost_optimal_decision",
    "real_world_cost",
]


def as_loss(loss: Any) -> Any:
    """The exact loss for what a user gave as `loss`.

    Args:
        loss: None for `CrossEntropy()`; an instance of `torch.nn.CrossEntropyLoss`, `BCEWithLogitsLoss`, `NLLLoss` or
            `MSELoss` (not of a subclass, which may compute something else), which becomes the loss here that
            equals it; an object with a method `sums`, or any function of (output, target), which stays as it
            is. A function without `sums` counts as the mean over the examples of the batch; so do
            `BCEWithLogitsLoss` with `weight`, and with a `pos_weight` of several dimensions.

    Returns:
        A `Loss`, or the function.

    Raises:
        ValueError: A loss of torch with a reduction to a sum or to nothing.
        TypeError: No function, or the class of a loss instead of an instance.
    """
    if loss is None:
        return CrossEntropy()
    if isinstance(loss, type):
        raise TypeError(f"loss must be an instance, got the class itself: use {loss.__name__}()")
    if callable(getattr(loss, "sums", None)):
        return loss
    if not callable(loss):
        raise TypeError(f"loss must be a function of (output, target), got {loss!r}")
    kind = type(loss)
    if kind.__module__ == nn.CrossEntropyLoss.__module__ and loss.reduction in ("sum", "none"):
        why = "depends on the batch size" if loss.reduction == "sum" else "is no scalar to minimise"
        raise ValueError(
            f"{kind.__name__}(reduction={loss.reduction!r}) cannot be a training loss, since it {why}: use "
            "reduction='mean'"
        )
    return _exact(kind, loss)


def _exact(kind: type, loss: Any) -> Any:
    if kind is nn.CrossEntropyLoss:
        return CrossEntropy(loss.weight, label_smoothing=loss.label_smoothing, ignore_index=loss.ignore_index)
    if kind is nn.NLLLoss:
        return NegativeLogLikelihood(loss.weight, ignore_index=loss.ignore_index)
    if kind is nn.MSELoss:
        return MeanSquaredError()
    if kind is nn.BCEWithLogitsLoss and loss.weight is None:
        pos_weight = loss.pos_weight
        if pos_weight is None or pos_weight.dim() < 2:
            return BinaryCrossEntropy(pos_weight)
    return loss


def as_sums(output: Any, batch_size: Callable[[], int], step: str) -> LossSum:
    """What ``step`` returned, as sums; a scalar is the mean over the batch.

    Raises:
        TypeError: It returned neither.
    """
    if isinstance(output, LossSum):
        return output
    if not isinstance(output, Tensor) or output.numel() != 1:
        given = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"{step} must return a LossSum or a scalar tensor, got {given}")
    size = batch_size()
    return LossSum(output.detach() * size, size)


def apply(loss: Any, output: Any, target: Any, sample_weight: Any = None) -> LossSum | Tensor:
    """The loss of a batch: a `LossSum` where the loss has a method `sums`, else the scalar that it gives.

    Raises:
        TypeError: There are weights of the examples, and the loss is a function that gives a mean.
    """
    sums = getattr(loss, "sums", None)
    if sample_weight is None:
        result: LossSum | Tensor = loss(output, target) if sums is None else sums(output, target)
        return result
    if sums is None:
        raise TypeError(
            f"the batch carries a sample_weight, which {getattr(loss, '__name__', type(loss).__name__)} can't take, "
            "since it gives a mean: use a loss of fitwatch, or derive one from fitwatch.Loss"
        )
    weighted: LossSum = sums(output, target, sample_weight)
    return weighted
