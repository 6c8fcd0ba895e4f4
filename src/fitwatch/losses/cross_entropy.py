"""Counterparts of torch's losses, as weighted sums."""

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fitwatch.losses.base import FAILURES, PRECISE, ClassLoss, Loss, is_readable, may_ignore, precise
from fitwatch.losses.errors import check_classes, check_logits, check_shapes

# One kernel returns both the sum and its weight: the exact fraction for the price of the mean.
_nll_loss = torch.ops.aten.nll_loss_forward.default
_nll_loss2d = torch.ops.aten.nll_loss2d_forward.default
_SUM = 2  # ATen's number for reduction="sum"
_INT64 = torch.int64


class CrossEntropy(ClassLoss):
    """Cross-entropy of softmax outputs, equal to `torch.nn.CrossEntropyLoss` in value and gradient.

    Outputs are logits of shape (N, C), (N, C, d1, ...) or (C,), with C >= 2. Targets are class indices of shape
    (N,), (N, d1, ...) or (), int64; or class probabilities with the shape of the outputs, floating-point.

    For class indices the weight of a position is that of its class, and the loss is divided by the sum of the
    weights; for probabilities it is 1, as in torch. With `label_smoothing` e, the smoothing mass of each class has the
    weight of that class, as in torch (pytorch#104776): an example of class y adds
    (1 - e) w[y] nll[y] + e/C sum of w[c] nll[c] to the total, and w[y] to the weight. An example of a class with
    weight 0 therefore adds to the total but not to the weight, and `per_example` leaves it out.

    Args:
        weight: Class weights, shape (C,), finite, at least 0, not all 0. Kept as a buffer.
        label_smoothing: Probability mass spread evenly over the classes, in [0, 1].
        ignore_index: Class index of positions that do not count.

    Raises:
        ValueError: An option is out of range.
    """

    _takes_probabilities: ClassVar[bool] = True

    def __init__(
        self, weight: Tensor | Sequence[float] | None = None, *, label_smoothing: float = 0.0, ignore_index: int = -100
    ) -> None:
        super().__init__(weight, ignore_index=ignore_index)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")
        self.label_smoothing = label_smoothing
        self._has_ignored = False  # whether an index was ignored so far

    def unreduced(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | float]:
        self._check(output, target)
        if output.dim() == 1:
            output, target = output.unsqueeze(0), target.unsqueeze(0)
        log_p = weighted_log_p = self._log_softmax(self._counted(precise(output), target), 1)
        weight = None if self.weight is None else self.weight.to(log_p.dtype)
        if weight is not None:
            weighted_log_p = log_p * weight.view(-1, *[1] * (log_p.dim() - 2))
        smoothing = self.label_smoothing
        if target.is_floating_point():
            target = target.to(log_p.dtype) * (1 - smoothing) + smoothing / log_p.shape[1]
            return -(weighted_log_p * target).sum(1), 1.0
        target = target.long()
        try:
            losses = F.nll_loss(log_p, target, weight, ignore_index=self.ignore_index, reduction="none")
        except FAILURES:
            self._check(output, target, labels=True)
            raise
        valid = target != self.ignore_index
        weights = self._weights(torch.where(valid, target, 0), valid, log_p.dtype)
        if smoothing:
            uniform = torch.where(valid, -weighted_log_p.mean(1), 0)
            losses = (1 - smoothing) * losses + smoothing * uniform
        return losses, weights

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, label_smoothing={self.label_smoothing}"

    def _fused(self, output: Tensor, target: Tensor, *, mean: bool) -> tuple[Tensor, Tensor | float] | None:
        # For batches of class indices without smoothing. There are few checks, since the kernel has its own, and
        # failures are explained afterwards.
        try:
            shape = output.shape
            if target.dtype is not _INT64 or self.label_smoothing or len(shape) < 2 or shape[1] < 2:
                return None
            if len(shape) > 2 and target.shape != shape[:1] + shape[2:]:
                return None
            weight = self._buffers["weight"]  # faster than self.weight, which goes through nn.Module.__getattr__
            logits = output if output.dtype in PRECISE else precise(output)
            # Without weights the kernel's own count tells afterwards, for less than a look at the targets before.
            kernel_counts = weight is None and not (mean or self._has_ignored) and is_readable(target)
            if not kernel_counts:
                logits = self._counted(logits, target)
            log_p = self._log_softmax(logits, 1)
            if weight is not None and weight.dtype is not log_p.dtype:
                weight = weight.to(log_p.dtype)
            if mean:
                return F.nll_loss(log_p, target, weight, ignore_index=self.ignore_index), 1.0
            kernel, labels = _nll_loss, target
            if len(shape) > 2:
                kernel, log_p, labels = _nll_loss2d, log_p.flatten(2).unsqueeze(2), target.flatten(1).unsqueeze(1)
            fused: tuple[Tensor, Tensor] = kernel(log_p, labels, weight, _SUM, self.ignore_index)
            if kernel_counts and fused[1].item() != target.numel():
                self._has_ignored = True
                return self._fused(output, target, mean=mean)
        except FAILURES:
            self._check(output, target, labels=True)
            raise
        return fused

    def _log_softmax(self, output: Tensor, dim: int) -> Tensor:
        return torch.log_softmax(output, dim)

    def _counted(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the logits, 0 at positions of weight 0, whose nan would reach value or gradient."""
        if target.is_floating_point():
            return logits
        counts = target != self.ignore_index if may_ignore(target, self.ignore_index) else None
        if not self.label_smoothing and self._some_weigh_nothing():  # smoothing adds the loss of other classes
            weight = self._buffers["weight"]
            assert weight is not None
            known = (target >= 0) & (target < len(weight))  # the kernel refuses or ignores the others
            weighed = ~known | (weight != 0)[torch.where(known, target, 0).long()]
            counts = weighed if counts is None else counts & weighed
        return logits if counts is None else torch.where(counts.unsqueeze(1), logits, 0)

    def _check(self, output: Tensor, target: Tensor, *, labels: bool = False) -> None:
        probabilities = self._takes_probabilities
        check_classes(output, target, self._per_class(), self.ignore_index, probabilities=probabilities, labels=labels)


class NegativeLogLikelihood(CrossEntropy):
    """Cross-entropy of outputs that are log-probabilities already, equal to `torch.nn.NLLLoss`."""

    _takes_probabilities = False

    def _log_softmax(self, output: Tensor, _dim: int) -> Tensor:
        return output


class BinaryCrossEntropy(Loss):
    """Cross-entropy of sigmoid outputs, equal to `torch.nn.BCEWithLogitsLoss` in value and gradient.

    Outputs are logits of shape (N,), (N, 1), or (N, K) for K labels that do not exclude each other. Targets have the
    same shape, any dtype, in [0, 1]; the range is checked on the CPU only, since the check synchronizes elsewhere.

    The loss is divided by the number of elements: `pos_weight` changes its scale, as in torch.

    Args:
        pos_weight: Weight of the positives, greater than 0: a number, or shape () or (K,). Kept as a buffer.

    Raises:
        ValueError: The weight is out of range or has more dimensions.
    """

    pos_weight: Tensor | None
    _neg_weight: Tensor | None

    def __init__(self, pos_weight: Tensor | Sequence[float] | float | None = None) -> None:
        super().__init__()
        self.register_buffer("pos_weight", None if pos_weight is None else _as_label_weight(pos_weight))
        self.register_buffer("_neg_weight", None)

    def unreduced(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | float]:
        return self._reduced(output, target, "none"), 1.0

    def weighted(self, weights: Tensor, *, keep_scale: bool = False) -> Self:
        """Return a copy with weights of the two classes.

        Args:
            weights: Shape (2,), or (K, 2) for K labels; greater than 0.
            keep_scale: False: ``pos_weight = weights[1] / weights[0]``, and negatives have weight 1. True: both
                classes have the weights given.
        """
        pairs = torch.as_tensor(weights).detach()
        if pairs.dim() not in (1, 2) or pairs.shape[-1] != 2 or not bool(((pairs > 0) & pairs.isfinite()).all()):
            raise ValueError(
                "binary cross-entropy takes the weights of two classes, shape (2,) or (K, 2) for K labels, all finite "
                f"and greater than 0, got {pairs.tolist()}"
            )
        negative, positive = pairs.unbind(-1)
        loss = self._twin()
        loss.pos_weight = _as_label_weight(positive if keep_scale else positive / negative)
        loss._neg_weight = _as_label_weight(negative) if keep_scale else None  # noqa: SLF001 - of the same class
        return loss

    def unweighted(self) -> Self:
        loss = self._twin()
        loss.pos_weight = loss._neg_weight = None  # noqa: SLF001 - of the same class
        return loss

    @property
    def has_weights(self) -> bool:
        return self._buffers["pos_weight"] is not None

    def extra_repr(self) -> str:
        weights = {"pos_weight": self.pos_weight, "neg_weight": self._neg_weight}
        return ", ".join(f"{name}={w.tolist()}" for name, w in weights.items() if w is not None)

    def _fused(self, output: Tensor, target: Tensor, *, mean: bool) -> tuple[Tensor, Tensor | float] | None:
        return None if mean else (self._reduced(output, target, "sum"), output.numel())

    def _reduced(self, output: Tensor, target: Tensor, reduction: str) -> Tensor:
        pos_weight, neg_weight = self._buffers["pos_weight"], self._buffers["_neg_weight"]
        # torch would broadcast a (K,) pos_weight over any outputs that fit, including a batch of shape (N,)
        check_logits(output, target, pos_weight)
        logits = precise(output)
        if pos_weight is not None:
            pos_weight = pos_weight.to(logits.dtype)
            if neg_weight is not None:  # torch's `weight` multiplies both sides
                neg_weight = neg_weight.to(logits.dtype)
                pos_weight = pos_weight / neg_weight
        return F.binary_cross_entropy_with_logits(
            logits, target.to(logits.dtype), weight=neg_weight, pos_weight=pos_weight, reduction=reduction
        )


class MeanSquaredError(Loss):
    """Squared error, equal to `torch.nn.MSELoss` in value and gradient.

    Outputs and targets have the same shape, (N,) or (N, d1, ...), which is checked because torch would broadcast
    (N, 1) and (N,) to (N, N). Targets are cast to the dtype of the outputs. The loss is divided by the number of
    elements.
    """

    def unreduced(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | float]:
        check_shapes(output, target)
        predicted = precise(output)
        return (predicted - target.to(predicted.dtype)).square(), 1.0


def _as_label_weight(weight: Tensor | Sequence[float] | float) -> Tensor:
    result = torch.as_tensor(weight).detach().clone()
    if result.dtype not in PRECISE:
        result = result.float()
    if result.dim() > 1 or result.numel() == 0:
        raise ValueError(f"pos_weight must be a number or have shape (K,), got shape {tuple(result.shape)}")
    if not bool((result.isfinite() & (result > 0)).all()):
        raise ValueError(f"pos_weight must be finite and greater than 0, got {result.tolist()}")
    return result.reshape(()) if result.numel() == 1 else result
