"""Counts of a classifier's validation outputs, for its confusion matrix and precision-recall curves."""

from collections.abc import Callable
from typing import Self

import torch
from attrs import define
from torch import Tensor

from fitwatch.calibration.refined import Refined
from fitwatch.helpers.dtypes import wide_float
from fitwatch.losses import BinaryCrossEntropy, ExpectedCost, RealWorldCrossEntropy
from fitwatch.losses.base import ClassLoss
from fitwatch.losses.costs import confusion_sums
from fitwatch.state import State

STEPS = 128
"""Thresholds are i / 128 for i = 0 ... 128: a power of two, so that each is exact in binary."""

MOST_CURVES = 10
MOST_CLASSES = 100


@define
class Counts:
    """Sums of example weights over one pass.

    Attributes:
        matrix: Confusion matrix, row true, column predicted, shape (C, C); None for multi-label outputs.
        scores: Histogram of the probability of column k between the thresholds, for examples of class k (first) and
            for the others, shape (K, 2, STEPS + 1). K is C, but 1 for two classes. None if K is above `MOST_CURVES`.
    """

    matrix: Tensor | None
    scores: Tensor | None


@define
class CalibrationCounts:
    """What the best evaluation shows of its calibration.

    Attributes:
        tables: `reliability` of the outputs, and after calibration, shape (2, 3, bins).
        matrix: Confusion matrix of the calibrated decisions, shape (C, C); None if they are those of the outputs.
    """

    tables: Tensor
    matrix: Tensor | None

    @classmethod
    def of(cls, refined: Refined | None) -> Self | None:
        """Return that of an evaluation; None if it was not measured."""
        if refined is None:
            return None
        return cls(refined.tables(), None if refined.shift is None else refined.decisions().get("calibrated"))


class ClassCounts:
    """Observer of validation that counts the outputs of a classifier, without waiting for the device.

    The loss determines what the outputs are: logits of shape (N, C) with class indices, one logit, or, with
    `BinaryCrossEntropy`, one logit for each of several labels. `counts` is None for all other outputs.

    Args:
        state: State of the fit, read for its loss.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self.reset()

    def reset(self) -> None:
        """Start a new pass."""
        self._loss: object = self._state.loss
        self._applies = isinstance(self._loss, (ClassLoss, BinaryCrossEntropy, ExpectedCost, RealWorldCrossEntropy))
        self.counts: Counts | None = None

    def update(self, outputs: object, targets: object, sample_weight: Tensor | None = None) -> None:
        """Count a batch; stop counting if its outputs are not supported."""
        if not (self._applies and isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
            return
        batch = self._count(outputs.detach(), targets.detach(), sample_weight)
        if batch is None:
            self._applies, self.counts = False, None
        elif self.counts is None:
            self.counts = batch
        else:
            self.counts.matrix = _sum(self.counts.matrix, batch.matrix)
            self.counts.scores = _sum(self.counts.scores, batch.scores)

    def _count(self, outputs: Tensor, targets: Tensor, sample_weight: Tensor | None) -> Counts | None:
        wide = wide_float(outputs.device)
        logits = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        weights = torch.ones(len(logits), dtype=wide, device=logits.device)
        if sample_weight is not None:
            if sample_weight.numel() != len(logits):  # a weight per position
                return None
            weights = weights * sample_weight.detach().reshape(-1)
        columns = 1 if logits.dim() == 1 else logits.shape[1]
        if logits.dim() <= 2 and columns == 1 and targets.numel() == len(logits):
            logits, positive = logits.reshape(-1, 1), targets.reshape(-1, 1).to(wide)
            ignore_index = getattr(self._loss, "ignore_index", None)
            if ignore_index is not None:
                weights = weights * (positive[:, 0] != ignore_index)
            matrix = _matrix((logits[:, 0] > 0).long(), torch.cat([1 - positive, positive], 1), weights)
            return Counts(matrix, _scores(logits.sigmoid(), positive, weights))
        if logits.dim() == 2 and targets.dim() == 1 and not targets.is_floating_point() and columns <= MOST_CLASSES:
            targets = targets.long()
            weights = weights * ((targets >= 0) & (targets < columns))  # ignored targets are out of range
            is_k = torch.nn.functional.one_hot(targets.clamp(0, columns - 1), columns).to(wide)
            matrix = confusion_sums(logits.argmax(1), targets, columns, weights)[:-1]
            shown = slice(1, 2) if columns == 2 else slice(None)  # the curve of class 0 would be redundant
            return Counts(matrix, _scores(logits.softmax(1)[:, shown], is_k[:, shown], weights))
        if isinstance(self._loss, BinaryCrossEntropy) and logits.dim() == 2 and targets.shape == logits.shape:
            return Counts(None, _scores(logits.sigmoid(), targets.to(wide), weights))
        return None  # soft labels, or a class per position


def _matrix(predicted: Tensor, is_class: Tensor, weights: Tensor) -> Tensor:
    """Return the confusion matrix, (C, C), from predictions (N,), one-hot targets (N, C) and weights (N,)."""
    classes = is_class.shape[1]
    return weights.new_zeros(classes, classes).index_add_(0, predicted, is_class * weights[:, None]).T


def _scores(probabilities: Tensor, positive: Tensor, weights: Tensor) -> Tensor | None:
    """Return `Counts.scores` from probabilities and targets in [0, 1], both (N, K), and weights (N,)."""
    columns = probabilities.shape[1]
    if columns > MOST_CURVES:
        return None
    rows = torch.arange(2 * columns, device=weights.device).reshape(columns, 2)
    cells = rows * (STEPS + 1) + (probabilities * STEPS).nan_to_num(0.0).long()[:, :, None]  # (N, K, 2)
    shares = torch.stack([positive, 1 - positive], 2) * weights[:, None, None]
    sums = weights.new_zeros(2 * columns * (STEPS + 1)).index_add_(0, cells.reshape(-1), shares.reshape(-1))
    return sums.reshape(columns, 2, STEPS + 1)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a + b


def curve_names(scores: Tensor, names_of: Callable[[int], list[str]]) -> list[str]:
    """Return the names of the curves in `Counts.scores`: the only one of two classes is that of class 1."""
    return names_of(2)[1:] if len(scores) == 1 else names_of(len(scores))


def curve(scores: Tensor) -> list[list[float]]:
    """Return a precision-recall curve.

    Args:
        scores: `Counts.scores` of one column, shape (2, STEPS + 1).

    Returns:
        Six rows with a value per threshold i / STEPS, where probabilities of at least the threshold are positive: true
        positives, false positives, true negatives, false negatives, precision and recall.
    """
    above = scores.double().flip(1).cumsum(1).flip(1)
    (tp, fp), (positives, negatives) = above, above[:, 0]
    tiny = 1e-300  # 0 / 0 is 0
    rows = [tp, fp, negatives - fp, positives - tp, tp / (tp + fp).clamp_min(tiny), tp / positives.clamp_min(tiny)]
    return torch.stack(rows).tolist()
