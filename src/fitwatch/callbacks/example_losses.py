"""The losses of the validation examples, one by one."""

from typing import Any

import torch
from torch import Tensor

from fitwatch.losses import Loss
from fitwatch.rules.paired import influences, standard_error
from fitwatch.state import State


class ExampleLosses:
    """Keeps the loss of each example of a validation, as `Loss.per_example` gives it.

    It is a metric (``compute`` gives the standard error of the validation loss) and an observer (`State.observers`).
    The losses stay on their device until `on_host`.

    Attributes:
        examples: How many examples there were, whatever the loss is.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self.reset()

    def reset(self) -> None:
        """A validation begins."""
        self.examples = 0
        self._losses: list[Tensor] = []
        self._weights: list[Tensor] = []

    def update(self, outputs: Tensor, targets: Tensor, sample_weight: Tensor | None = None) -> None:
        """Take a batch in."""
        state = self._state
        loss = state.loss if state.eval_loss is None else state.eval_loss
        self.examples += len(outputs)
        if isinstance(loss, Loss):
            losses, weights = loss.per_example(outputs, targets, sample_weight)
            self._losses.append(losses)
            self._weights.append(weights)

    def on_host(self) -> tuple[Tensor, Tensor] | None:
        """Losses and weights, both of shape (N,), on the CPU; None where the loss gives a mean only."""
        if not self._losses:
            return None
        losses, weights = torch.stack([torch.cat(self._losses), torch.cat(self._weights)]).cpu()  # one transfer
        return losses, weights

    def compute(self) -> Any:
        """The standard error of the weighted mean, in the unit of the loss; NaN where the loss gives a mean only."""
        known = self.on_host()
        return torch.nan if known is None else standard_error(influences(*known))
