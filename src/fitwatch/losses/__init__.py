"""Losses as weighted sums.

The mean of weighted means is not the weighted mean. Every loss here therefore returns a sum and the weight to divide
it by (`Loss.sums`), which add up over micro-batches, ranks and epochs, however the data is cut. Called as a module, it
returns the mean over the batch, as its torch counterpart does.

Outputs in half precision are computed in float32; float32 and float64 keep their dtype.
"""

from collections.abc import Callable

from torch import Tensor, nn

from fitwatch.losses.base import AnyLoss, Loss, LossFunction, LossSum
from fitwatch.losses.baseline import Baseline
from fitwatch.losses.costs import CostMatrix, confusion_matrix, cost_optimal_decision, real_world_cost
from fitwatch.losses.cross_entropy import BinaryCrossEntropy, CrossEntropy, MeanSquaredError, NegativeLogLikelihood
from fitwatch.losses.imbalanced import LDAM, ExpectedCost, Focal, LogitAdjusted
from fitwatch.losses.real_world import RealWorldCrossEntropy
from fitwatch.losses.weighting import as_class_weights, class_weights

__all__ = [  # noqa: RUF022 - sorted() order, not that of isort
    "AnyLoss",
    "Baseline",
    "BinaryCrossEntropy",
    "CostMatrix",
    "CrossEntropy",
    "ExpectedCost",
    "Focal",
    "LDAM",
    "LogitAdjusted",
    "Loss",
    "LossFunction",
    "LossSum",
    "MeanSquaredError",
    "NegativeLogLikelihood",
    "RealWorldCrossEntropy",
    "apply",
    "as_class_weights",
    "as_loss",
    "as_sums",
    "class_weights",
    "confusion_matrix",
    "cost_optimal_decision",
    "real_world_cost",
]


def as_loss(loss: AnyLoss | None) -> AnyLoss:
    """Convert the user's ``loss`` to one that returns exact sums, where possible.

    Args:
        loss: None for `CrossEntropy()`; an instance of `torch.nn.CrossEntropyLoss`, `BCEWithLogitsLoss`, `NLLLoss` or
            `MSELoss` (not of a subclass, which may compute something else), converted to its exact counterpart here;
            an object with a method ``sums``, or any function of (output, target), returned unchanged. A function
            without ``sums`` counts as the mean over the examples of the batch; so does `BCEWithLogitsLoss` with
            ``weight``, or with a ``pos_weight`` of several dimensions.

    Raises:
        ValueError: A torch loss whose reduction is not the mean.
        TypeError: ``loss`` is not callable, or is a class instead of an instance.
    """
    if loss is None:
        return CrossEntropy()
    if isinstance(loss, type):
        raise TypeError(f"loss must be an instance, got the class itself: use {loss.__name__}()")
    if callable(getattr(loss, "sums", None)):
        return loss
    if not callable(loss):
        raise TypeError(f"loss must be a function of (output, target), got {loss!r}")
    kind, reduction = type(loss), getattr(loss, "reduction", None)
    if kind.__module__ == nn.CrossEntropyLoss.__module__ and reduction in ("sum", "none"):
        why = "depends on the batch size" if reduction == "sum" else "is not a scalar"
        raise ValueError(
            f"{kind.__name__}(reduction={reduction!r}) cannot be a training loss, since it {why}: use reduction='mean'"
        )
    return _exact(loss)


def _exact(loss: AnyLoss) -> AnyLoss:
    kind = type(loss)  # a subclass may compute something else
    if kind is nn.CrossEntropyLoss and isinstance(loss, nn.CrossEntropyLoss):
        return CrossEntropy(loss.weight, label_smoothing=loss.label_smoothing, ignore_index=loss.ignore_index)
    if kind is nn.NLLLoss and isinstance(loss, nn.NLLLoss):
        return NegativeLogLikelihood(loss.weight, ignore_index=loss.ignore_index)
    if kind is nn.MSELoss:
        return MeanSquaredError()
    if kind is nn.BCEWithLogitsLoss and isinstance(loss, nn.BCEWithLogitsLoss) and loss.weight is None:
        pos_weight = loss.pos_weight
        if pos_weight is None or pos_weight.dim() < 2:
            return BinaryCrossEntropy(pos_weight)
    return loss


def as_sums(output: object, batch_size: Callable[[], int], step: str) -> LossSum:
    """Return the output of ``step`` as sums; a scalar is the mean over the batch.

    Raises:
        TypeError: The output is neither a `LossSum` nor a scalar.
    """
    if isinstance(output, LossSum):
        return output
    if not isinstance(output, Tensor) or output.numel() != 1:
        given = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"{step} must return a LossSum or a scalar tensor, got {given}")
    size = batch_size()
    return LossSum(output.detach() * size, size)


def apply(loss: AnyLoss, output: object, target: object, sample_weight: object = None) -> LossSum | Tensor:
    """Compute the loss of a batch: a `LossSum` if the loss has a method ``sums``, else the scalar that it returns.

    Raises:
        TypeError: The batch has weights of the examples, and the loss is a function that returns a mean.
    """
    sums = getattr(loss, "sums", None)
    if sample_weight is None:
        result: LossSum | Tensor = loss(output, target) if sums is None else sums(output, target)
        return result
    if sums is None:
        raise TypeError(
            f"the batch has a sample_weight, which {getattr(loss, '__name__', type(loss).__name__)} cannot take, "
            "since it returns a mean: use a loss of fitwatch, or derive one from fitwatch.losses.Loss"
        )
    weighted: LossSum = sums(output, target, sample_weight)
    return weighted
