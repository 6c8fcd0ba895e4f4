"""Costs of decisions by calibrated probabilities, and by a threshold tuned on the same examples, both cross-fitted."""

import torch
from torch import Tensor

from fitwatch.calibration.refined import Refined
from fitwatch.calibration.rows import Rows
from fitwatch.calibration.temperature import FOLDS, folds


def calibrated_costs(refined: Refined, costs: Tensor) -> Tensor:
    """Return the cost of each example, shape (N,), at the class of least expected cost.

    Args:
        refined: An evaluation of exclusive classes, or of one logit.
        costs: The costs, shape (C, C), row true, column predicted, float64.

    Raises:
        ValueError: The outputs have another number of classes.
    """
    a = refined.rows.logits * refined.scales
    p = a.softmax(0) if refined.rows.exclusive else torch.cat([(-a).sigmoid(), a.sigmoid()])
    if len(p) != len(costs) or (not refined.rows.exclusive and len(a) > 1):
        raise ValueError(f"the outputs have {len(p)} classes or labels, the costs {len(costs)} classes")
    return _paid(refined.rows, (costs.T @ p).argmin(0), costs)


def tuned_costs(refined: Refined, costs: Tensor) -> Tensor:
    """Return the cost of each example, shape (N,), by the threshold that costs least on the other folds.

    Args:
        refined: An evaluation of two classes, or of one logit.
        costs: The costs, shape (2, 2), float64.
    """
    z, rows = refined.outputs.logits, refined.rows
    score = z[-1] - z[0] if rows.exclusive else z[0]
    positive = rows.targets.double() if rows.exclusive else rows.targets[0]
    fold = folds(len(rows))
    decided = torch.zeros(len(rows), dtype=torch.int64)
    for k in range(FOLDS):
        others, own = fold != k, fold == k
        if bool(others.any()):
            threshold = _threshold(score[others], positive[others], rows.weights[others], costs)
            decided[own] = (score[own] > threshold).long()
    return _paid(rows, decided, costs)


def _threshold(score: Tensor, positive: Tensor, weights: Tensor, costs: Tensor) -> float:
    """Return the score above which to decide for class 1; halfway between two scores, or infinite."""
    values, order = score.sort()
    y, w = positive[order], weights[order]
    missed = torch.cat([w.new_zeros(1), (w * y).cumsum(0)]) * (costs[1, 0] - costs[1, 1])
    alarms = (w * (1 - y)).sum() - torch.cat([w.new_zeros(1), (w * (1 - y)).cumsum(0)])
    total = missed + alarms * (costs[0, 1] - costs[0, 0])
    total[1:-1][values[1:] == values[:-1]] = torch.inf  # no threshold separates equal scores
    edges = torch.cat([values.new_tensor([-torch.inf]), values, values.new_tensor([torch.inf])])
    best = int(total.argmin())
    low, high = float(edges[best]), float(edges[best + 1])
    return low if best == 0 else high if best == len(values) else (low + high) / 2


def _paid(rows: Rows, decided: Tensor, costs: Tensor) -> Tensor:
    """Return what each example costs; a soft target counts for both classes."""
    if rows.exclusive:
        return costs[rows.targets, decided]
    return (1 - rows.targets[0]) * costs[0, decided] + rows.targets[0] * costs[1, decided]
