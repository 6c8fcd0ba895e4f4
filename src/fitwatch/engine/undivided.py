"""Undoes what a host does to the loss of a micro-batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Undivided:
    """Gives a loss a gradient of 1 where the host divides it by the micro-batches of a step.

    Hosts divide each micro-batch alike, which is exact only if all of them have the same weight and the last step of
    an epoch is no shorter. The watch divides once, by the weight of the whole step.

    Args:
        accumulate: Micro-batches of a step.
    """

    def __init__(self, accumulate: int) -> None:
        self._accumulate = accumulate
        self._checked = False  # reading the gradient waits for the device: the first one stands for all

    def __call__(self, loss: Tensor) -> Tensor:
        """Return the same value."""
        same: Tensor = _Same.apply(loss, self._check)  # type: ignore[no-untyped-call] # torch's
        return same.as_subclass(type(loss))

    def _check(self, gradient: Tensor) -> None:
        if self._checked:
            return
        self._checked = True
        given = gradient.item()
        divisor = 1 / given if given else 0.0
        if not (1 <= round(divisor) <= self._accumulate and abs(divisor - round(divisor)) < 1e-3):
            raise RuntimeError(
                f"the loss of watch.loss(...) was multiplied by {given:g} before backward(), and with divided=True "
                f"1/{self._accumulate} is expected, for the micro-batches of a step: scale the loss itself (a function "
                "of output and target that you pass as loss=)"
            )


class _Same(torch.autograd.Function):
    """The loss itself; its gradient is 1, whatever comes."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, check: Callable[[Tensor], None]) -> Tensor:
        ctx.check = check
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.check(gradients[0])
        return torch.ones_like(gradients[0]), None
