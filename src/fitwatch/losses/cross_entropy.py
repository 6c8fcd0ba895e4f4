"""The losses that torch has too, as weighted sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fitwatch.losses.base import FAILURES, PRECISE, ClassLoss, Loss, LossSum, precise
from fitwatch.losses.errors import refuse_logits, refuse_shapes

# One kernel that gives both the sum and its weight: the exact fraction for the price of the mean.
_nll_loss = torch.ops.aten.nll_loss_forward.default
_nll_loss2d = torch.ops.aten.nll_loss2d_forward.default
_SUM = 2  # ATen's number for reduction="sum"
_INT64 = torch.int64


class CrossEntropy(ClassLoss):
    """Cross-entropy of softmax outputs, equal to `torch.nn.CrossEntropyLoss` in value and gradient.

    Outputs are logits of shape (N, C), (N, C, d1, ...) or (C,), with C >= 2. Targets are class indices of shape
    (N,), (N, d1, ...) or (), int64; or probabilities of the shape of the outputs, floating-point.

    For class indices the weight of a position is that of its class, so the loss is divided by the sum of the
    weights; for probabilities it is 1, as in torch. With `label_smoothing` e the smoothing mass has the weights of
    the classes that it falls on, as in torch (pytorch#104776): an example of class y adds
    (1 - e) w[y] nll[y] + e/C sum of w[c] nll[c] to the total, and w[y] to the weight. So one of a class with weight 0
    adds to the total but not to the weight, and `per_example` leaves it out.

    Args:
        weight: Weights of the classes, shape (C,), finite, at least 0, not all 0. Kept as a buffer.
        label_smoothing: The mass that is spread evenly over the classes, in [0, 1].
        ignore_index: Class index of positions that do not count.

    Raises:
        ValueError: An option is out of range.
    """

    _takes_probabilities: ClassVar[bool] = True

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | Sequence[float] | None = None,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(weight, ignore_index=ignore_index)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")
        self.label_smoothing = label_smoothing

    def forward(self, output: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The weighted mean over the batch, 0-dim: `sums(output, target, sample_weight).mean`."""
        if sample_weight is None:
            try:
                known = self._log_probabilities(output, target)
                if known is not None:
                    return F.nll_loss(known[0], target, known[1], ignore_index=self.ignore_index)
            except FAILURES as error:
                self._refuse(output, target, error)
                raise
        return super().forward(output, target, sample_weight)

    def sums(self, output: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> LossSum:
        if sample_weight is None:
            try:
                known = self._log_probabilities(output, target)
                if known is not None:
                    log_p, weight = known
                    if log_p.dim() == 2:
                        return LossSum(*_nll_loss(log_p, target, weight, _SUM, self.ignore_index))
                    flat = log_p.flatten(2).unsqueeze(2), target.flatten(1).unsqueeze(1)
                    return LossSum(*_nll_loss2d(*flat, weight, _SUM, self.ignore_index))
            except FAILURES as error:
                self._refuse(output, target, error)
                raise
        return super().sums(output, target, sample_weight)

    def _log_probabilities(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """What the kernels take, and the weights: for a batch of class indices without smoothing; else None."""
        # _buffers, since self.weight would go through nn.Module.__getattr__; few checks, since the kernels have their
        # own, and a failure is explained when it happens.
        shape = output.shape
        if target.dtype is not _INT64 or self.label_smoothing or len(shape) < 2 or shape[1] < 2:
            return None
        if len(shape) > 2 and target.shape != shape[:1] + shape[2:]:
            return None
        weight = self._buffers["weight"]
        logits = output if output.dtype in PRECISE else precise(output)
        if weight is not None and weight.dtype is not logits.dtype:
            weight = weight.to(logits.dtype)
        return self._log_softmax(logits, 1), weight

    def unreduced(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | float]:
        self._refuse(output, target)
        if output.dim() == 1:
            output, target = output.unsqueeze(0), target.unsqueeze(0)
        log_p = self._log_softmax(precise(output), 1)
        weight = None if self.weight is None else self.weight.to(log_p.dtype)
        weighted_log_p = log_p
        if weight is not None:
            weighted_log_p = log_p * weight.view(-1, *[1] * (log_p.dim() - 2))
        smoothing = self.label_smoothing
        if target.is_floating_point():
            target = target.to(log_p.dtype) * (1 - smoothing) + smoothing / log_p.shape[1]
            return -(weighted_log_p * target).sum(1), 1.0
        target = target.long()
        try:
            losses = F.nll_loss(log_p, target, weight, ignore_index=self.ignore_index, reduction="none")
        except FAILURES as error:
            self._refuse(output, target, error)
            raise
        valid = target != self.ignore_index
        weights = valid.to(log_p.dtype)
        if weight is not None:
            weights = weight[torch.where(valid, target, 0)] * weights
        if smoothing:
            uniform = torch.where(valid, -weighted_log_p.mean(1), 0)
            losses = (1 - smoothing) * losses + smoothing * uniform
        return losses, weights

    def _log_softmax(self, output: Tensor, dim: int) -> Tensor:
        return torch.log_softmax(output, dim)

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"{super().extra_repr()}, label_smoothing={self.label_smoothing}"

    def _refuse(
        self, output: Tensor, target: Tensor, cause: Exception | None = None, *, probabilities: bool = True
    ) -> None:
        super()._refuse(output, target, cause, probabilities=probabilities and self._takes_probabilities)


class NegativeLogLikelihood(CrossEntropy):
    """`torch.nn.NLLLoss`: cross-entropy of outputs that are log-probabilities already."""

    _takes_probabilities = False

    def _log_softmax(self, output: Tensor, _dim: int) -> Tensor:
        return output


class BinaryCrossEntropy(Loss):
    """Cross-entropy of sigmoid outputs, equal to `torch.nn.BCEWithLogitsLoss` in value and gradient.

    Outputs are logits of shape (N,), (N, 1), or (N, K) for K labels that do not exclude each other. Targets have
    the same shape, any dtype, in [0, 1]; the range is checked on the CPU only: elsewhere a look waits for the device.

    The loss is divided by the number of elements: `pos_weight` and `neg_weight` change the scale, as in torch.

    Args:
        pos_weight: How much a positive counts, greater than 0: a number, or shape () or (K,). Kept as a buffer.
        neg_weight: How much a negative counts, likewise; 1 by default, as in torch.

    Raises:
        ValueError: A weight is out of range or has more dimensions.
    """

    pos_weight: Tensor | None
    neg_weight: Tensor | None

    def __init__(
        self,
        pos_weight: Tensor | Sequence[float] | float | None = None,
        *,
        neg_weight: Tensor | Sequence[float] | float | None = None,
    ) -> None:
        super().__init__()
        for name, weight in (("pos_weight", pos_weight), ("neg_weight", neg_weight)):
            self.register_buffer(name, None if weight is None else _as_label_weight(name, weight))

    def sums(self, output: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> LossSum:
        if sample_weight is not None:
            return super().sums(output, target, sample_weight)
        return LossSum(self._reduced(output, target, "sum"), output.numel())

    def unreduced(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | float]:
        return self._reduced(output, target, "none"), 1.0

    def weighted(self, weights: Tensor, *, keep_scale: bool = False) -> Self:
        """A copy with weights of the two classes.

        Args:
            weights: Shape (2,), or (K, 2) for K labels; greater than 0.
            keep_scale: By default ``pos_weight = weights[1] / weights[0]``, and negatives count 1. True: both count
                what they are given.
        """
        pairs = torch.as_tensor(weights).detach()
        if pairs.dim() not in (1, 2) or pairs.shape[-1] != 2 or not bool(((pairs > 0) & pairs.isfinite()).all()):
            raise ValueError(
                "binary cross-entropy takes the weights of two classes, shape (2,) or (K, 2) for K labels, all finite "
                f"and greater than 0, got {pairs.tolist()}"
            )
        negative, positive = pairs.unbind(-1)
        loss = self._twin()
        loss.pos_weight = _as_label_weight("pos_weight", positive if keep_scale else positive / negative)
        loss.neg_weight = _as_label_weight("neg_weight", negative) if keep_scale else None
        return loss

    def unweighted(self) -> Self:
        loss = self._twin()
        loss.pos_weight = loss.neg_weight = None
        return loss

    @property
    def has_weights(self) -> bool:
        return self._buffers["pos_weight"] is not None or self._buffers["neg_weight"] is not None

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        weights = {"pos_weight": self.pos_weight, "neg_weight": self.neg_weight}
        return ", ".join(f"{name}={None if w is None else w.tolist()}" for name, w in weights.items())

    def _reduced(self, output: Tensor, target: Tensor, reduction: str) -> Tensor:
        pos_weight, neg_weight = self._buffers["pos_weight"], self._buffers["neg_weight"]
        # Checked first, since torch would broadcast a (K,) pos_weight over whatever fits, a batch of (N,) too.
        for weight in (pos_weight, neg_weight):
            refuse_logits(output, target, weight)
        logits = precise(output)
        if pos_weight is not None:
            pos_weight = pos_weight.to(logits.dtype)
        if neg_weight is not None:  # torch's `weight` multiplies both sides
            neg_weight = neg_weight.to(logits.dtype)
            pos_weight = (1 if pos_weight is None else pos_weight) / neg_weight
        return F.binary_cross_entropy_with_logits(
            logits, target.to(logits.dtype), weight=neg_weight, pos_weight=pos_weight, reduction=reduction
        )


class MeanSquaredError(Loss):
    """The squared error, equal to `torch.nn.MSELoss` in value and gradient.

    Outputs and targets have one shape, (N,) or (N, d1, ...): torch would broadcast (N, 1) and (N,) to (N, N). Targets
    of another dtype are taken in that of the outputs. The loss is divided by the number of elements.
    """

    def unreduced(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | float]:
        refuse_shapes(output, target)
        predicted = precise(output)
        return (predicted - target.to(predicted.dtype)).square(), 1.0


def _as_label_weight(name: str, weight: Tensor | Sequence[float] | float) -> Tensor:
    result = torch.as_tensor(weight).detach().clone()
    if result.dtype not in PRECISE:
        result = result.float()
    if result.dim() > 1 or result.numel() == 0:
        raise ValueError(f"{name} must be a number or have shape (K,), got shape {tuple(result.shape)}")
    if not bool((result.isfinite() & (result > 0)).all()):
        raise ValueError(f"{name} must be finite and greater than 0, got {result.tolist()}")
    return result.reshape(()) if result.numel() == 1 else result
