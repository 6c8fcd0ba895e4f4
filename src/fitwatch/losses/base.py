"""What every loss is: a module that gives weighted sums."""

from __future__ import annotations

import abc
import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from fitwatch.losses.errors import refuse_classes
from fitwatch.losses.weighting import as_class_weights

PRECISE = frozenset({torch.float32, torch.float64})
"""The dtypes that losses compute in; outputs in half precision are computed in float32."""

FAILURES = (RuntimeError, ValueError, IndexError, TypeError, AttributeError)
"""What torch (or a target that is no tensor) raises where a clear error can be given instead."""


class LossSum(NamedTuple):
    """A loss as a fraction, not yet divided.

    Attributes:
        total: The sum of w_i l_i, 0-dim, differentiable.
        weight: The sum of w_i, 0-dim or a number.
    """

    total: Tensor
    weight: Tensor | float

    @property
    def mean(self) -> Tensor:
        """Total over weight; nan where the weight is 0."""
        return self.total / self.weight

    # A step adds a penalty or puts a factor before its loss: arithmetic on the mean, not that of tuples.
    def __add__(self, penalty: Any) -> LossSum:
        """The loss with a penalty added to its mean, 0-dim or a number."""
        if isinstance(penalty, tuple):
            raise TypeError("a LossSum can't be added to another, since their weights may differ: add their means")
        return LossSum(self.total + penalty * self.weight, self.weight)

    def __radd__(self, penalty: Tensor | float) -> LossSum:
        return self + penalty

    def __mul__(self, factor: Tensor | float) -> LossSum:  # type: ignore[override] # tuples repeat
        """The loss times a factor, 0-dim or a number."""
        return LossSum(self.total * factor, self.weight)

    def __rmul__(self, factor: Tensor | float) -> LossSum:  # type: ignore[override] # as above
        return self * factor


class Loss(nn.Module, abc.ABC):
    """A loss that knows its weights.

    A loss of your own derives from it and gives `unreduced`; all else follows from that, weights of the examples
    included.
    """

    def forward(self, output: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The weighted mean over the batch, 0-dim: `sums(output, target, sample_weight).mean`."""
        return self.sums(output, target, sample_weight).mean

    @abc.abstractmethod
    def unreduced(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | float]:
        """Weighted losses w_i l_i and weights w_i, before any sum is taken.

        Args:
            output: What the model gave, as the class says.
            target: What it should have given, as the class says.

        Returns:
            Both of shape (N,), or (N, d1, ...) where an example has several positions (pixels, labels); the
            weights may be one number instead, for all positions.

        Raises:
            ValueError: Shapes, dtypes or devices that do not fit, all named.
            IndexError: A class index out of range (on the CPU; other devices assert, as torch does).
            TypeError: Outputs or targets that are no tensors.
        """

    def sums(self, output: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> LossSum:
        """The weighted sum of the batch and the weight to divide it by.

        Args:
            output: As for `unreduced`.
            target: As for `unreduced`.
            sample_weight: How much each example counts, shape (N,), or each position, of the shape of the
                positions; finite, at least 0, any dtype. It multiplies the weights that the loss has itself. An
                example of weight 0 (a mask) adds nothing, whatever its loss, and its target may be nan. The values
                are checked on the CPU only.

        Returns:
            Sums that may be added up over batches before they are divided, once.

        Raises:
            ValueError, IndexError, TypeError: As for `unreduced`, and weights of another shape, or negative.
        """
        losses, weights = self._weighed(output, target, sample_weight)
        if isinstance(weights, Tensor):
            return LossSum(losses.sum(), weights.sum())
        return LossSum(losses.sum(), weights * losses.numel())

    def per_example(self, output: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss and the weight of every example.

        Args:
            output: As for `sums`.
            target: As for `sums`.
            sample_weight: As for `sums`.

        Returns:
            Losses and weights, both of shape (N,), with sum(losses * weights) / sum(weights) the loss of the
            batch. The weight of an example is the sum over its positions (pixels, labels), its loss their
            weighted mean, or 0 where the weight is 0.
        """
        losses, weights = self._weighed(output, target, sample_weight)
        if not isinstance(weights, Tensor):
            weights = torch.full_like(losses, weights)
        losses, weights = sum_by_example(losses), sum_by_example(weights)
        counts = weights != 0
        return torch.where(counts, losses / torch.where(counts, weights, 1), 0), weights

    def weighted(self, weights: Tensor) -> Loss:
        """A copy with these weights of the classes, shape (C,), in place of its own.

        Raises:
            TypeError: The loss takes none.
        """
        raise TypeError(f"{type(self).__name__} takes no class weights (got weights of shape {tuple(weights.shape)})")

    def unweighted(self) -> Loss:
        """The same loss without weights of the classes."""
        return self

    @property
    def has_weights(self) -> bool:
        """Whether some classes count more than others."""
        return False

    def _per_class(self) -> Tensor | None:
        """What there is one of for each class, shape (C, ...), if there is."""
        return None

    def _twin(self) -> Self:
        """A copy for other weights, with what is learned shared: a deep copy's parameters no optimizer would know."""
        twin = copy.copy(self)
        twin._buffers = dict(self._buffers)  # noqa: SLF001 - of the same class
        return twin

    def _weighed(self, output: Tensor, target: Tensor, sample_weight: Tensor | None) -> tuple[Tensor, Tensor | float]:
        if sample_weight is None:
            return self.unreduced(output, target)
        losses, weights = self.unreduced(output, without_masked(target, sample_weight))
        scale = as_sample_weight(sample_weight, losses)
        # a masked loss may be infinite, and 0 times infinity is nan
        return torch.where(scale != 0, losses * scale, 0), weights * scale


class ClassLoss(Loss):
    """A loss of classes that exclude each other, which may have weights.

    Args:
        weight: Weights of the classes, shape (C,), finite, at least 0, not all 0. Kept as a buffer.
        ignore_index: Class index of positions that do not count.
    """

    weight: Tensor | None

    def __init__(self, weight: Tensor | Sequence[float] | None = None, *, ignore_index: int = -100) -> None:
        super().__init__()
        if not isinstance(ignore_index, int):
            raise ValueError(f"ignore_index must be an integer, got {ignore_index!r}")  # noqa: TRY004
        self.register_buffer("weight", None if weight is None else as_class_weights(weight))
        self.ignore_index = ignore_index

    def weighted(self, weights: Tensor) -> Self:
        loss = self._twin()
        loss.weight = as_class_weights(weights)
        return loss

    def unweighted(self) -> Self:
        loss = self._twin()
        loss.weight = None
        return loss

    @property
    def has_weights(self) -> bool:
        return self._buffers["weight"] is not None

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        weight = None if self.weight is None else self.weight.tolist()
        return f"weight={weight}, ignore_index={self.ignore_index}"

    def _per_class(self) -> Tensor | None:
        return self.weight

    def _weights(self, labels: Tensor, counts: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights of positions with these classes, 0 for those that do not count."""
        weights = counts.to(dtype)
        return weights if self.weight is None else weights * self.weight.to(dtype)[labels]

    def _refuse(
        self, output: Tensor, target: Tensor, cause: Exception | None = None, *, probabilities: bool = False
    ) -> None:
        refuse_classes(
            output, target, self._per_class(), ignore_index=self.ignore_index, probabilities=probabilities, cause=cause
        )


def as_classes(
    output: Tensor, target: Tensor, per_class: Tensor | None, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Precise logits (N, ..., C), class indices in range (N, ...), and which of these count (N, ...).

    Takes what `as_two_classes` and `refuse_classes` say; an index that does not count becomes 0.
    """
    output, target = as_two_classes(output, target)
    refuse_classes(output, target, per_class, ignore_index=ignore_index, probabilities=False)
    if output.dim() == 1:
        output, target = output.unsqueeze(0), target.unsqueeze(0)
    logits, labels = precise(output).movedim(1, -1), target.long()
    counts = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    labels = torch.where(counts, labels, 0)
    if labels.is_cpu and labels.numel():
        low, high = labels.aminmax()
        if low.item() < 0 or high.item() >= logits.shape[-1]:
            cause = IndexError("a class index is out of range")
            refuse_classes(output, target, per_class, ignore_index=ignore_index, probabilities=False, cause=cause)
    return logits, labels, counts


def as_two_classes(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """One logit of shape (N,) or (N, 1) as the logits (0, z) of two classes; other outputs as they are.

    The targets then have the shape of the outputs and are 0 or 1, in any dtype (looked at on the CPU only).

    Raises:
        ValueError: A target is neither.
    """
    if not (isinstance(output, Tensor) and isinstance(target, Tensor) and output.shape == target.shape):
        return output, target
    if output.dim() not in (1, 2) or (output.dim() == 2 and output.shape[1] != 1):
        return output, target
    labels = target.reshape(-1)
    if labels.is_cpu:
        wrong = (labels != 0) & (labels != 1)
        if bool(wrong.any()):
            index = int(wrong.nonzero()[0])
            raise ValueError(f"binary targets must be 0 or 1, got {labels[index].item()} at index {index} of the batch")
    z = output.reshape(-1)
    return torch.stack([torch.zeros_like(z), z], 1), labels.long()


def as_sample_weight(sample_weight: Tensor, like: Tensor) -> Tensor:
    """Weights of examples or positions in a shape that multiplies ``like``, the losses of shape (N, d1, ...).

    Raises:
        ValueError: The shape does not fit, or (looked at on the CPU only) a weight is negative or not finite.
    """
    if not isinstance(sample_weight, Tensor):
        raise TypeError(f"sample_weight must be a tensor, got {type(sample_weight).__name__}")
    weight = sample_weight.detach().to(like.dtype)
    if weight.shape != like.shape:
        if weight.shape != like.shape[:1] and weight.shape != (*like.shape[:1], *[1] * (like.dim() - 1)):
            either = f" or {tuple(like.shape)}" if like.dim() > 1 else ""
            raise ValueError(
                f"sample_weight must have shape {tuple(like.shape[:1])}{either}, one weight for each example"
                f"{' or position' if either else ''}, got shape {tuple(sample_weight.shape)}"
            )
        weight = weight.reshape(-1, *[1] * (like.dim() - 1)).expand_as(like)
    if weight.device != like.device:
        raise ValueError(f"sample_weight is on {weight.device} and the outputs are on {like.device}")
    if weight.is_cpu and weight.numel():
        low, high = weight.aminmax()
        if not (low.item() >= 0 and high.item() < torch.inf):  # nan fails both
            index = int((~(weight.isfinite() & (weight >= 0))).flatten().nonzero()[0])
            value = weight.flatten()[index].item()
            raise ValueError(f"sample_weight must be finite and at least 0, got {value} at index {index} of the batch")
    return weight


def without_masked(target: Tensor, sample_weight: Tensor) -> Tensor:
    """Targets with 0 in place of those of weight 0: nan, of what is not known, would come back in the gradient."""
    if not (isinstance(target, Tensor) and isinstance(sample_weight, Tensor) and target.is_floating_point()):
        return target
    if target.device != sample_weight.device or target.shape[: sample_weight.dim()] != sample_weight.shape:
        return target  # for the loss to refuse; or rows of probabilities for each position, which are never nan
    counts = (sample_weight != 0).reshape(*sample_weight.shape, *[1] * (target.dim() - sample_weight.dim()))
    return torch.where(counts, target, 0)


def precise(output: Tensor) -> Tensor:
    """The outputs in a dtype that a sum of logarithms can be computed in."""
    if output.dtype in PRECISE:
        return output
    if not output.is_floating_point():
        raise TypeError(f"outputs of {output.dtype}")
    return output.float()


def sum_by_example(positions: Tensor) -> Tensor:
    """Sums over all dimensions but the first, shape (N,)."""
    return positions.reshape(-1) if positions.dim() < 2 else positions.flatten(1).sum(1)
