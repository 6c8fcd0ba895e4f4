"""What a classifier's validation outputs say: counts for the confusion matrix and for precision-recall curves."""

from typing import Any

import torch
from attrs import define
from torch import Tensor

from fitwatch.losses import BinaryCrossEntropy, ExpectedCost, RealWorldCrossEntropy
from fitwatch.losses.base import ClassLoss
from fitwatch.state import State

STEPS = 128
"""Thresholds are i / 128 for i = 0 ... 128: a power of two, so that a probability falls into its bucket exactly."""

MOST_CURVES = 10
MOST_CLASSES = 100


@define
class Counts:
    """Sums over one pass; each example counts with its weight.

    Attributes:
        matrix: The confusion matrix, row true, column predicted, shape (C, C); None for several labels.
        scores: How often the probability of column k fell into each of the buckets between thresholds, for the examples
            that are k (first) and those that are not, shape (K, 2, STEPS + 1). K is 1 where there are two classes.
            None for more than `MOST_CURVES` classes.
    """

    matrix: Tensor | None
    scores: Tensor | None


class ClassCounts:
    """Watches validation, and counts as long as it sees a classifier; nothing is read back from the device.

    It knows one by its loss, since only that tells what the outputs mean: logits of shape (N, C) with class indices, or
    one logit, or with `BinaryCrossEntropy` several labels, each with a logit.

    Args:
        state: Of the fit, for its loss.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        loss = self._state.loss
        kinds = (ClassLoss, BinaryCrossEntropy, ExpectedCost, RealWorldCrossEntropy)
        self._ignore_index: int | None = getattr(loss, "ignore_index", None)
        self._several = isinstance(loss, BinaryCrossEntropy)
        self._applies = isinstance(loss, kinds)
        self.counts: Counts | None = None

    def update(self, outputs: Any, targets: Any, sample_weight: Tensor | None = None) -> None:
        """Take in a batch, or give up on what is none of a classifier."""
        if not (self._applies and isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
            return
        wide = torch.float32 if outputs.device.type == "mps" else torch.float64
        logits = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))
        weights = torch.ones(len(logits), dtype=wide, device=logits.device)
        if sample_weight is not None:
            if sample_weight.numel() != len(logits):  # one for each position
                self._applies, self.counts = False, None
                return
            weights = weights * sample_weight.detach().reshape(-1)
        columns = 1 if logits.dim() == 1 else logits.shape[1]
        if logits.dim() <= 2 and columns == 1 and targets.numel() == len(logits):
            positive = targets.detach().reshape(-1, 1).to(wide)
            if self._ignore_index is not None:
                weights = weights * (positive[:, 0] != self._ignore_index)
            self._add(logits.reshape(-1, 1), positive, weights)
        elif logits.dim() == 2 and targets.dim() == 1 and not targets.is_floating_point():
            self._add_classes(logits, targets.detach().long(), weights)
        elif self._several and logits.dim() == 2 and targets.shape == logits.shape:
            self._add(logits, targets.detach().to(wide), weights)
        else:  # soft labels, or a class for each position
            self._applies, self.counts = False, None

    def _add(self, logits: Tensor, positive: Tensor, weights: Tensor) -> None:
        """One logit a column, (N, K), and how much each is a positive, (N, K)."""
        shares = torch.stack([1 - positive, positive], 1) * weights[:, None, None]  # (N, 2, K)
        matrix = None
        if logits.shape[1] == 1:
            predicted = (logits[:, 0] > 0).long()
            matrix = shares.new_zeros(2, 2).index_add_(0, predicted, shares[:, :, 0]).T
        self._sum(matrix, _scores(logits.sigmoid(), shares.flip(1)))

    def _add_classes(self, logits: Tensor, targets: Tensor, weights: Tensor) -> None:
        """C logits, (N, C), and class indices, (N,)."""
        classes = logits.shape[1]
        if classes > MOST_CLASSES:
            return
        valid = (targets >= 0) & (targets < classes)  # ignored ones are not; no look at the values: it would wait
        weights, targets = weights * valid, targets.clamp(0, classes - 1)
        cells = targets * classes + logits.argmax(1)
        matrix = weights.new_zeros(classes**2).index_add_(0, cells, weights).reshape(classes, classes)
        scores = None
        if classes <= MOST_CURVES:
            is_k = torch.nn.functional.one_hot(targets, classes).to(weights.dtype)
            columns = slice(1, 2) if classes == 2 else slice(None)  # of two classes one tells all
            shares = torch.stack([is_k, 1 - is_k], 1)[:, :, columns] * weights[:, None, None]
            scores = _scores(logits.softmax(1)[:, columns], shares)
        self._sum(matrix, scores)

    def _sum(self, matrix: Tensor | None, scores: Tensor | None) -> None:
        if self.counts is None:
            self.counts = Counts(matrix, scores)
            return
        if matrix is not None and self.counts.matrix is not None:
            self.counts.matrix = self.counts.matrix + matrix
        if scores is not None and self.counts.scores is not None:
            self.counts.scores = self.counts.scores + scores


def _scores(probabilities: Tensor, shares: Tensor) -> Tensor | None:
    """Sums of ``shares``, (N, 2, K), by column and by bucket of ``probabilities``, (N, K): shape (K, 2, STEPS + 1)."""
    columns = probabilities.shape[1]
    if columns > MOST_CURVES:
        return None
    buckets = (probabilities * STEPS).nan_to_num(0.0).long()
    sums = shares.new_zeros(columns, 2, STEPS + 1)
    for k in range(columns):
        for kind in range(2):
            sums[k, kind].index_add_(0, buckets[:, k], shares[:, kind, k])
    return sums


def curve(scores: Tensor) -> list[list[float]]:
    """A precision-recall curve from one column's sums, (2, STEPS + 1).

    Returns:
        At each threshold i / STEPS, where a probability of that much or more says yes: true positives, false positives,
        true negatives, false negatives, precision and recall; six rows.
    """
    above = scores.double().flip(1).cumsum(1).flip(1)
    (tp, fp), (positives, negatives) = above, above[:, 0]
    tiny = 1e-300  # 0 / 0 is 0
    rows = [tp, fp, negatives - fp, positives - tp, tp / (tp + fp).clamp_min(tiny), tp / positives.clamp_min(tiny)]
    return torch.stack(rows).tolist()
