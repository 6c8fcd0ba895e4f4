"""A temperature together with a bias for each class."""

import math

import torch
from torch import Tensor

from fitwatch.calibration.rows import Rows
from fitwatch.calibration.temperature import PRIOR_SD

MOST_CLASSES = 300
"""With more classes there are no biases: a step of the fit solves a system of C + 1 equations."""


def fit_affine(rows: Rows, *, start: float = 1.0, prior: bool = True) -> tuple[float, Tensor]:
    """Return T and biases b of the lowest log-loss of softmax(z / T + b), or of sigmoid for labels.

    Fisher scoring, with the step halved until the loss falls.

    Args:
        rows: The examples.
        start: A temperature near the solution.
        prior: Whether log T and the biases have normal priors around 0, with standard deviation `PRIOR_SD`. Without
            them, the biases of classes have mean 0, since the loss does not depend on it.

    Returns:
        T, and the biases, shape (C,) or (K,), float64.
    """
    strength = prior / PRIOR_SD**2
    theta = torch.zeros(1 + len(rows.logits), dtype=torch.float64)
    theta[0] = math.log(start)
    value = _objective(rows, theta, strength)
    for _ in range(200):
        slope, curvature = _slope(rows, theta, strength)
        step = -torch.linalg.lstsq(curvature, slope.unsqueeze(1)).solution.squeeze(1)  # singular without the priors
        step *= min(1.0, 2.0 / max(float(step.abs().max()), 1e-300))
        for _ in range(30):
            new = _objective(rows, theta + step, strength)
            if new <= value:
                break
            step = step / 2
        else:
            break
        theta, value = theta + step, new
        if float(step.abs().max()) < 1e-9:
            break
    bias = theta[1:] - theta[1:].mean() if rows.exclusive else theta[1:]
    return math.exp(float(theta[0])), bias


def _objective(rows: Rows, theta: Tensor, strength: float) -> float:
    a = rows.logits * (-theta[0]).exp() + theta[1:, None]
    if rows.exclusive:
        each = _normalized(a)[1] - a.gather(0, rows.targets.unsqueeze(0)).squeeze(0)
    else:
        each = (torch.nn.functional.softplus(a, threshold=40) - rows.targets * a).sum(0)
    return float(each @ rows.weights + strength / 2 * theta.square().sum())


def _normalized(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax and logsumexp over the classes, whose dimension torch's own functions are slow in."""
    top = a.amax(0)
    e = (a - top).exp_()
    total = e.sum(0)
    return e / total, total.log() + top


def _slope(rows: Rows, theta: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Return the gradient, and the Fisher information as the curvature."""
    scale, w = float((-theta[0]).exp()), rows.weights
    z = rows.logits
    a = z * scale + theta[1:, None]
    d = -scale * z  # the derivative of a by log T
    curvature = torch.zeros(len(theta), len(theta), dtype=torch.float64)
    if rows.exclusive:
        p = _normalized(a)[0]
        residual = p.clone()
        residual.scatter_add_(0, rows.targets.unsqueeze(0), -torch.ones_like(w).unsqueeze(0))
        mean = (p * d).sum(0)
        across = p * (d - mean)
        curvature[0, 0] = (across * d).sum(0) @ w
        curvature[1:, 1:] = torch.diag(p @ w) - (p * w) @ p.T
    else:
        p = a.sigmoid()
        residual = p - rows.targets
        spread = p * (1 - p)
        across = spread * d
        curvature[0, 0] = (across * d).sum(0) @ w
        curvature[1:, 1:] = torch.diag(spread @ w)
    curvature[0, 1:] = curvature[1:, 0] = across @ w
    slope = torch.cat([((residual * d).sum(0) @ w).unsqueeze(0), residual @ w])
    return slope + strength * theta, curvature + strength * torch.eye(len(theta), dtype=torch.float64)
