"""Losses for rare classes, and for mistakes that differ in cost."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fitwatch.losses.base import ClassLoss, Loss, LossSum, as_classes, as_two_classes
from fitwatch.losses.costs import CostMatrix, as_cost_matrix
from fitwatch.losses.cross_entropy import CrossEntropy
from fitwatch.losses.weighting import listed_counts


class Focal(ClassLoss):
    """Cross-entropy that down-weights well-classified examples (Lin et al. 2017, arXiv 1708.02002, eq. 5).

    With p = softmax(logits), or (1 - sigmoid(z), sigmoid(z)) for one logit z, and y the true class::

        l = -(1 - p[y])^gamma log p[y]

    Outputs are logits of shape (N, C), (N, C, d1, ...) or (C,), targets class indices of shape (N,), (N, d1, ...) or
    (); or one logit, shape (N,) or (N, 1), with targets 0 and 1 of the same shape. As in `CrossEntropy`, the weight of
    a position is that of its class, and the loss is divided by the sum of the weights. The paper's alpha is
    ``weight=[1 - alpha, alpha]``; the paper divides by the number of positives.

    Exact to rounding however confident the logits are, also for gamma < 1.

    Args:
        gamma: Strength of the down-weighting, at least 0; 0 is `CrossEntropy`.
        weight: Class weights, shape (C,). Kept as a buffer.
        ignore_index: Class index of positions that do not count.

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(
        self, gamma: float = 2.0, *, weight: Tensor | Sequence[float] | None = None, ignore_index: int = -100
    ) -> None:
        super().__init__(weight, ignore_index=ignore_index)
        self.gamma = _at_least_0("gamma", gamma)

    def unreduced(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | float]:
        logits, labels, weights = self._as_weighted_classes(output, target, self.weight)
        log_odds = _log_odds(logits, labels)
        # (1 - p)^gamma through its logarithm: where 1 - p rounds to 0, the power has no gradient for gamma < 1
        factor = (self.gamma * F.logsigmoid(-log_odds)).exp()
        return -weights * factor * F.logsigmoid(log_odds), weights

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, {super().extra_repr()}"


class LogitAdjusted(CrossEntropy):
    """Cross-entropy with logits shifted by the log class frequencies (Menon et al. 2021, arXiv 2007.07314, eq. 10).

    ::

        l = CrossEntropy(logits + tau log(counts / sum(counts)))

    At tau = 1 it is the balanced softmax (Ren et al. 2020, arXiv 2007.10740, eq. 4). At inference the logits are used
    unadjusted: their arg-max is the decision for equally frequent classes. In validation the loss stays adjusted, so
    that it is comparable with training.

    Outputs and targets are those of `CrossEntropy`, and also one logit, shape (N,) or (N, 1), with targets 0 and 1.

    Args:
        counts: Number of training examples of each class, shape (C,), all greater than 0, up to a common
            factor; or a mapping class -> count.
        tau: Strength of the adjustment, at least 0; 0 is `CrossEntropy`.
        weight: As for `CrossEntropy`.
        label_smoothing: As for `CrossEntropy`.
        ignore_index: As for `CrossEntropy`.

    Raises:
        ValueError: An option is out of range, or a count is not greater than 0.
    """

    adjustment: Tensor

    def __init__(
        self,
        counts: Tensor | Sequence[float] | Mapping[int, float],
        *,
        tau: float = 1.0,
        weight: Tensor | Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(weight, label_smoothing=label_smoothing, ignore_index=ignore_index)
        self.tau = _at_least_0("tau", tau)
        numbers = _counts(counts)
        self.register_buffer("adjustment", self.tau * (numbers / numbers.sum()).log())

    def sums(self, output: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> LossSum:
        if sample_weight is not None:  # what they mask is replaced first; `unreduced` then turns one logit into two
            return super().sums(output, target, sample_weight)
        return super().sums(*as_two_classes(output, target))

    def unreduced(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | float]:
        return super().unreduced(*as_two_classes(output, target))

    def extra_repr(self) -> str:
        return f"tau={self.tau}, {super().extra_repr()}"

    def _per_class(self) -> Tensor | None:
        return self.adjustment

    def _log_softmax(self, output: Tensor, dim: int) -> Tensor:
        adjustment = self.adjustment.to(output.dtype).view(-1, *[1] * (output.dim() - 2))
        # subtract the largest logit first: large logits would swamp the adjustment
        return torch.log_softmax(output - output.detach().amax(dim, keepdim=True) + adjustment, dim)


class LDAM(ClassLoss):
    """Cross-entropy with a larger margin for rarer classes (Cao et al. 2019, arXiv 1906.07413, eq. 10 to 13).

    With z the logits, y the true class and n the counts::

        l = CrossEntropy(scale (z - margin[y] at y)),    margin[c] = max_margin (min(n) / n[c])^(1/4)

    The paper uses cosines as logits (features and the rows of the last layer normalized to length 1); the defaults of
    ``scale`` and ``max_margin`` suit them. It applies class weights late in training: see `WeightedLoss`'s
    ``start_epoch``. Outputs and targets are those of `Focal`; the loss is divided by the sum of the weights.

    Args:
        counts: Number of training examples of each class, shape (C,), all greater than 0, up to a common
            factor; or a mapping class -> count.
        max_margin: Margin of the rarest class, at least 0, in units of the logits.
        scale: Factor on the logits, greater than 0.
        weight: Class weights, shape (C,). Kept as a buffer.
        ignore_index: Class index of positions that do not count.

    Raises:
        ValueError: An option is out of range, or a count is not greater than 0.
    """

    margin: Tensor

    def __init__(
        self,
        counts: Tensor | Sequence[float] | Mapping[int, float],
        *,
        max_margin: float = 0.5,
        scale: float = 30.0,
        weight: Tensor | Sequence[float] | None = None,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(weight, ignore_index=ignore_index)
        self.max_margin, self.scale = _at_least_0("max_margin", max_margin), _at_least_0("scale", scale)
        if not self.scale:
            raise ValueError("scale must be greater than 0, got 0")
        numbers = _counts(counts)
        self.register_buffer("margin", self.max_margin * (numbers.min() / numbers) ** 0.25)

    def unreduced(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | float]:
        logits, labels, weights = self._as_weighted_classes(output, target, self.margin)
        true = labels.unsqueeze(-1)
        margin = self.margin.to(logits.dtype)[true]
        logits = logits - logits.detach().amax(-1, keepdim=True)  # large logits would swamp the margin
        log_p = (self.scale * logits.scatter_add(-1, true, -margin)).log_softmax(-1)
        return -weights * log_p.gather(-1, true).squeeze(-1), weights

    def extra_repr(self) -> str:
        return f"max_margin={self.max_margin}, scale={self.scale}, {super().extra_repr()}"

    def _per_class(self) -> Tensor | None:
        return self.margin


class ExpectedCost(Loss):
    """Expected cost of a decision drawn from the model's probabilities (Galdran et al. 2020, arXiv 2010.00291).

    With p = softmax(logits), y the true class and C the cost matrix::

        l = sum over j of C[y, j] p[j]

    in units of the costs. Outputs and targets are those of `Focal`; every position has weight 1. The gradient vanishes
    where the model is confident, even if it is wrong: the paper adds the loss to a cross-entropy.

    Args:
        costs: A `CostMatrix`, or a matrix of shape (C, C): row true, column predicted. Kept as a buffer.
        ignore_index: Class index of positions that do not count.

    Raises:
        ValueError: The costs are not valid, see `CostMatrix`.
    """

    costs: Tensor
    _classes_first = True

    def __init__(self, costs: CostMatrix | Tensor | Sequence[Sequence[float]], *, ignore_index: int = -100) -> None:
        super().__init__()
        self.register_buffer("costs", as_cost_matrix(costs).matrix.clone())
        self.ignore_index = ignore_index

    def unreduced(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | float]:
        logits, labels, counts = as_classes(output, target, self.costs, self.ignore_index)
        weights = counts.to(logits.dtype)
        return (self.costs.to(logits.dtype)[labels] * logits.softmax(-1)).sum(-1) * weights, weights

    def extra_repr(self) -> str:
        return f"costs={self.costs.tolist()}, ignore_index={self.ignore_index}"

    def _per_class(self) -> Tensor | None:
        return self.costs


def _log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute log(p / (1 - p)) of the true class, (N, ...), from logits (N, ..., C): z_y - logsumexp of the others."""
    true = labels.unsqueeze(-1)
    # if all others are -inf (masked), logsumexp minus their largest is nan, in its gradient too
    others = logits.clamp(min=torch.finfo(logits.dtype).min).scatter(-1, true, -torch.inf)
    top = others.detach().amax(-1, keepdim=True)  # subtracted first: large logits would swamp the rest
    return (logits.gather(-1, true) - top).squeeze(-1) - (others - top).logsumexp(-1)


def _at_least_0(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of 0 or more, got {value!r}")
    return value


def _counts(counts: Tensor | Sequence[float] | Mapping[int, float]) -> Tensor:
    numbers = torch.as_tensor(listed_counts(counts)).detach()
    numbers = numbers.to(torch.float64 if numbers.dtype is torch.float64 else torch.float32)
    if numbers.dim() != 1 or len(numbers) < 2:
        raise ValueError(f"counts must have shape (C,) with C >= 2, got shape {tuple(numbers.shape)}")
    if not bool((numbers.isfinite() & (numbers > 0)).all()):
        raise ValueError(f"counts must be finite and greater than 0 for every class, got {numbers.tolist()}")
    return numbers
