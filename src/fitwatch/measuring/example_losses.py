"""Losses of the individual validation examples, and their standard error."""

import torch
from torch import Tensor

from fitwatch.losses import Loss
from fitwatch.rules.paired import influences, standard_error


class ExampleLosses:
    """The loss of each example of one validation, as `Loss.per_example` gives it. They stay on their device.

    Args:
        loss: The loss that validation measures.

    Attributes:
        examples: Number of examples seen, for any loss.
    """

    def __init__(self, loss: object) -> None:
        self._loss = loss
        self.examples = 0
        self._losses: list[Tensor] = []
        self._weights: list[Tensor] = []

    def update(self, outputs: Tensor, targets: Tensor, sample_weight: Tensor | None = None) -> None:
        """Add a batch."""
        self.examples += len(outputs)
        if isinstance(self._loss, Loss):
            losses, weights = self._loss.per_example(outputs, targets, sample_weight)
            self._losses.append(losses)
            self._weights.append(weights)

    def on_host(self) -> tuple[Tensor, Tensor] | None:
        """Return losses and weights, both of shape (N,), on the CPU; None if the loss returns only a mean."""
        if not self._losses:
            return None
        losses, weights = torch.stack([torch.cat(self._losses), torch.cat(self._weights)]).cpu()  # one transfer
        return losses, weights

    def standard_error(self) -> float:
        """Return the standard error of the weighted mean, in units of the loss; NaN if the loss returns only a mean."""
        known = self.on_host()
        return torch.nan if known is None else standard_error(influences(*known))
