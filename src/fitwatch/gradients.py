"""Gradients as sums: divided once, by the weight of everything in the step."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """All parameters in its groups, which may change while training goes on."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def inverse(weight: Tensor | float, like: Tensor) -> Tensor:
    """1 / weight as a scalar of like's dtype and device; finite at weight 0, where the gradient is 0 anyway."""
    if isinstance(weight, Tensor):
        return weight.to(like.dtype).clamp_min(torch.finfo(like.dtype).tiny).reciprocal()
    return torch.full((), 1 / weight if weight else 0.0, dtype=like.dtype, device=like.device)


def divide(optimizer: Optimizer, weights: Sequence[Tensor | float], unit: Tensor | float | None = None) -> None:
    """Turn gradients of sum(w l) over a window into those of sum(w l) / sum(w).

    Args:
        optimizer: Holds the parameters.
        weights: The sum(w) of each micro-batch.
        unit: What each micro-batch was already divided by; None: nothing.
    """
    gradients = [p.grad for p in parameters(optimizer) if p.grad is not None]
    if not gradients:
        return
    factor = inverse(sum(weights), gradients[0])
    if unit is not None:
        factor = factor / inverse(unit, factor)
    for same in _by_device_and_dtype(gradients):
        torch._foreach_mul_(same, factor.to(same[0]))


def zero_grad(optimizer: Optimizer) -> None:
    """Forget the gradients; torch's own ``zero_grad`` spends 5 % of a small step on a profiler range."""
    if type(optimizer).zero_grad is not Optimizer.zero_grad:
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


def _by_device_and_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for t in tensors:
        groups.setdefault((t.device, t.dtype), []).append(t)
    return list(groups.values())
