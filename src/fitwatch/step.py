"""Gradients as sums: divided once, by the weight of everything in the step, on all ranks."""

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor
from torch.optim import Optimizer

from fitwatch import ranks
from fitwatch.dtypes import wide_float
from fitwatch.state import State


class StepGradient:
    """The gradient of one optimizer step, gathered over its micro-batches and all ranks as that of sum(w l) / sum(w).

    Args:
        optimizer: Holds the parameters.
        accumulate: Micro-batches in a step, on each rank. With one in all, the division happens at the start of its
            backward pass; with more, once over the gradients, by the weight of all of them.
        scaler: The GradScaler under float16.
    """

    def __init__(self, optimizer: Optimizer, accumulate: int, scaler: torch.amp.GradScaler | None) -> None:
        self.optimizer, self.accumulate, self.scaler = optimizer, accumulate, scaler
        self.weights: list[Tensor | float] = []  # sum(w) of each micro-batch so far
        self._rates: list[float | Tensor] = []  # of the last step, one for each group of parameters
        self._single = accumulate == 1 and ranks.size() == 1
        self._guess: Tensor | float | None = None  # of the weight of a step, where float16 needs one

    def backward(self, loss: Tensor, weight: Tensor | float, *, is_mean: bool) -> None:
        """Add the gradient of a micro-batch: ``loss`` is its sum(w l), or already its mean over the weight."""
        self.weights.append(weight)
        scale: Tensor | None = None
        if self._single:
            # A mean goes backward as it is: to the bit what a plain loop computes.
            scale = None if is_mean else inverse(weight, loss)
        elif is_mean:
            scale = torch.ones_like(loss) * weight
        if self.scaler is not None:
            scale = torch.ones_like(loss) if scale is None else scale
            if not self._single:  # sums would overflow float16: divide by a guess, which finish mends
                scale = scale * inverse(self._agreed_guess(weight), loss)
            scale = self.scaler.scale(scale)
        torch.autograd.backward(loss, scale)

    def skip(self) -> None:
        """Count a micro-batch that only other ranks have."""
        self.weights.append(0.0)
        if self.scaler is not None:
            self._agreed_guess(0.0)

    def _agreed_guess(self, weight: Tensor | float) -> Tensor | float:
        """The guess; the first one from the first micro-batch of all ranks, which therefore have to ask together."""
        if self._guess is None:
            held = parameters(self.optimizer)
            self._guess = _positive(ranks.total([weight], held[0]) * self.accumulate)
        return self._guess

    def finish(self) -> None:
        """Make the gradients those of the fraction, unscaled."""
        weights, self.weights = self.weights, []
        held = [] if self._single else parameters(self.optimizer)
        ranks.add_gradients(held)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self._single:
            return
        total = ranks.total(weights, held[0])
        gradients = [p.grad for p in held if p.grad is not None]
        if not gradients:
            return
        # a wide dtype, since the first gradient's may be less precise than the others'
        factor = inverse(total, gradients[0].new_empty((), dtype=wide_float(gradients[0].device)))
        if self._guess is not None:
            factor = factor * self._guess
            self._guess = _positive(total)
        for same in _by_device_and_dtype(gradients):
            torch._foreach_mul_(same, factor.to(same[0]))  # one kernel for all, as in torch's own clipping

    def step(self) -> bool:
        """Let the optimizer step, and forget the gradients; False if the scaler left the step out (overflow)."""
        rates, stepped = [group["lr"] for group in self.optimizer.param_groups], True
        self._rates = [rate.detach().clone() if isinstance(rate, Tensor) else rate for rate in rates]
        if self.scaler is not None:
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            stepped = self.scaler.get_scale() >= before
        else:
            self.optimizer.step()
        zero_grad(self.optimizer)
        return stepped

    def log(self, state: State) -> None:
        """Log the learning rate of the last step; with several groups of parameters, that of each."""
        for i, rate in enumerate(self._rates):
            state.log("train/optim/lr" if len(self._rates) == 1 else f"train/optim/lr/{i}", rate, reduce="last")


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """All parameters in its groups, which may change while training goes on."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def inverse(weight: Tensor | float, like: Tensor) -> Tensor:
    """1 / weight as a scalar of like's dtype and device; 0 for weight 0: no weight, no gradient."""
    if isinstance(weight, Tensor):
        if not weight.is_cpu:  # no look at the value: it would wait for the device
            weight = weight.to(like.dtype)
            return torch.where(weight == 0, 0, 1 / weight)
        weight = weight.item()
    return _scalar(1 / weight if weight else 0.0, like.dtype, like.device)


@lru_cache(maxsize=64)
def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Without class weights the batches, and so these scalars, are all alike; making one costs 5 % of a small step.
    return torch.full((), value, dtype=dtype, device=device)


def _positive(weight: Tensor | float) -> Tensor | float:
    return torch.where(weight > 0, weight, 1) if isinstance(weight, Tensor) else weight or 1.0


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
