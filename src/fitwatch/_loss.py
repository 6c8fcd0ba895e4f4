"""What every loss is: a module that gives weighted sums."""

from __future__ import annotations

import abc
from typing import NamedTuple

import torch
from torch import Tensor, nn

PRECISE = frozenset({torch.float32, torch.float64})
"""The dtypes that losses compute in; outputs in half precision are computed in float32."""

FAILURES = (RuntimeError, ValueError, IndexError, TypeError, AttributeError)
"""What torch (or a target that is no tensor) raises where a clear error can be given instead."""


class LossSum(NamedTuple):
    """A loss as a fraction, not yet divided.

    Attributes:
        total: The sum of w_i l_i, 0-dim, differentiable.
        weight: The sum of w_i, 0-dim or a number.
    """

    total: Tensor
    weight: Tensor | float

    @property
    def mean(self) -> Tensor:
        """Total over weight; nan where the weight is 0."""
        return self.total / self.weight


class Loss(nn.Module, abc.ABC):
    """A loss that knows its weights."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The weighted mean over the batch, 0-dim: `sums(output, target).mean`."""
        return self.sums(output, target).mean

    @abc.abstractmethod
    def sums(self, output: Tensor, target: Tensor) -> LossSum:
        """The weighted sum of the batch and the weight to divide it by.

        Args:
            output: What the model gave, as the class says.
            target: What it should have given, as the class says.

        Returns:
            Sums that may be added up over batches before they are divided, once.

        Raises:
            ValueError: Shapes, dtypes or devices that do not fit, all named.
            IndexError: A class index out of range (on the CPU; other devices assert, as torch does).
            TypeError: Outputs or targets that are no tensors.
        """

    @abc.abstractmethod
    def per_example(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the weight of every example.

        Args:
            output: As for `sums`.
            target: As for `sums`.

        Returns:
            Losses and weights, both of shape (N,), with sum(losses * weights) / sum(weights) the loss of the
            batch. The weight of an example is the sum over its positions (pixels, labels), its loss their
            weighted mean, or 0 where the weight is 0.
        """

    @abc.abstractmethod
    def weighted(self, weights: Tensor) -> Loss:
        """A copy with these weights of the classes, shape (C,), in place of its own."""

    @abc.abstractmethod
    def unweighted(self) -> Loss:
        """The same loss without weights of the classes."""

    @property
    @abc.abstractmethod
    def has_weights(self) -> bool:
        """Whether some classes count more than others."""


def precise(output: Tensor) -> Tensor:
    """The outputs in a dtype that a sum of logarithms can be computed in."""
    if output.dtype in PRECISE:
        return output
    if not output.is_floating_point():
        raise TypeError(f"outputs of {output.dtype}")
    return output.float()


def sum_by_example(positions: Tensor) -> Tensor:
    """Sums over all dimensions but the first, shape (N,)."""
    return positions.reshape(-1) if positions.dim() < 2 else positions.flatten(1).sum(1)


def mean_by_example(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Means over all dimensions but the first, and over how many: both of shape (N,)."""
    losses = sum_by_example(positions)
    count = positions.numel() // len(losses) if len(losses) else 1
    return losses / count, torch.full_like(losses, count)
