"""How often predictions come true, by how sure they are."""

import torch
from torch import Tensor

from fitwatch.calibration.rows import Rows

BINS = 15


def reliability(rows: Rows, scale: Tensor | float = 1.0, losses: Tensor | None = None) -> Tensor:
    """Return weight, summed confidence and summed truth in bins of the confidence, shape (3, `BINS`), float64.

    The confidence is the probability of the most probable class, for labels that of each label; its truth is 1 if the
    example is of that class. The bins have equal widths.

    Args:
        rows: The examples.
        scale: Factor on the logits: a number, or of shape (N,).
        losses: ``rows.losses(scale)``, if they are known.
    """
    if rows.exclusive:
        each = rows.losses(scale) if losses is None else losses
        confidence = (-each - scale * rows.linear).exp()  # the largest logit is 0
        truth = (rows.linear == 0) / (rows.logits == 0).sum(0)  # several classes may be equally probable
        weights = rows.weights
    else:
        a = rows.logits * scale
        confidence, truth = a.sigmoid().flatten(), rows.targets.flatten()
        weights = rows.weights.expand_as(a).flatten()
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    parts = (weights, weights * confidence, weights * truth)
    return torch.stack([torch.bincount(bins, part, minlength=BINS) for part in parts])


def calibration_error(table: Tensor) -> float:
    """Return the expected calibration error of a `reliability` table: the mean distance of confidence and truth."""
    weight, confidence, truth = table
    return float((confidence - truth).abs().sum() / weight.sum())
