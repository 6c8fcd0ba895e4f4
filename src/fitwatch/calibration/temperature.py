"""The temperature that calibrates logits, and cross-fitted losses at it."""

import math

import torch
from torch import Tensor

from fitwatch.calibration.rows import Rows

PRIOR_SD = 0.5
"""Standard deviation of the prior: log T is normal around 0. A free T on 60 examples may cost more than it brings."""

FOLDS = 5

_WIDEST = 7.0  # |log T| at most: without the prior, examples without a mistake ask for T = 0
_SEED = 0
_SMALL = 50_000  # logits up to which the temperatures of the folds are found by more than one step


def fit_temperature(rows: Rows, *, start: float = 1.0, prior: bool = True) -> float:
    """Return the temperature T of the lowest log-loss of softmax(z / T), or sigmoid(z / T).

    Newton's method in log T, kept within a bracket: the loss is convex in 1 / T, so it has one minimum.

    Args:
        rows: The examples.
        start: A temperature near the solution.
        prior: Whether log T has a normal prior around 0, with standard deviation `PRIOR_SD`.
    """
    log_t = min(max(math.log(start), -_WIDEST), _WIDEST)
    low, high = -_WIDEST, _WIDEST
    for _ in range(100):
        slope, curvature = _derivatives(_sums(rows, log_t), log_t, prior=prior)
        if slope > 0:
            high = log_t
        else:
            low = log_t
        step = -slope / curvature if curvature > 0 else math.copysign(1.0, -slope)
        new = log_t + step
        if not low < new < high:
            new = (low + high) / 2 if slope else log_t
        done, log_t = abs(new - log_t) < 1e-5, new  # the error is of the order of the square of the step
        if done:
            break
    return math.exp(log_t)


def cross_fitted(rows: Rows, temperature: float) -> Tensor:
    """Return the scale 1 / T for each example, shape (N,), from a T fitted to the other folds.

    So the losses at these scales are not optimistic. The folds are fixed. Each T is found by Newton steps from the
    common one: by one where there are many examples, since its error falls with their square.

    Args:
        rows: The examples.
        temperature: T fitted to all of them, with the prior.
    """
    log_t, count = math.log(temperature), len(rows)
    fold = folds(count)
    scales = torch.empty(FOLDS, dtype=torch.float64)
    sums = torch.zeros(2, FOLDS, dtype=torch.float64)
    sums.index_add_(1, fold, torch.stack(rows.moments(math.exp(-log_t))) * rows.weights)
    others = (sums.sum(1, keepdim=True) - sums).T.tolist()
    small = rows.logits.numel() <= _SMALL
    for k in range(FOLDS):
        own = _newton(*_derivatives(others[k], log_t, prior=True), log_t)
        if small and count > 1:
            rest = rows.part(fold != k)
            for _ in range(2):
                own = _newton(*_derivatives(_sums(rest, own), own, prior=True), own)
        scales[k] = math.exp(-own)
    return scales[fold]


def folds(count: int) -> Tensor:
    """Return the fold of each of ``count`` examples, shape (N,): always the same."""
    fold = torch.empty(count, dtype=torch.int64)
    fold[torch.randperm(count, generator=torch.Generator().manual_seed(_SEED))] = torch.arange(count) % FOLDS
    return fold


def _sums(rows: Rows, log_t: float) -> list[float]:
    return [float(part @ rows.weights) for part in rows.moments(math.exp(-log_t))]


def _derivatives(sums: list[float], log_t: float, *, prior: bool) -> tuple[float, float]:
    """Return the first two derivatives of the total loss by log T, given those by the scale 1 / T."""
    first, second = sums
    scale, strength = math.exp(-log_t), prior / PRIOR_SD**2
    return strength * log_t - scale * first, strength + scale * first + scale**2 * second


def _newton(slope: float, curvature: float, log_t: float) -> float:
    """Return log T after a step of at most 1."""
    step = -slope / curvature if curvature > 0 else -math.copysign(1.0, slope)
    return log_t + min(max(step, -1.0), 1.0)
