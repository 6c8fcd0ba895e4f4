"""Losses of the individual validation examples, and their standard error."""

from collections.abc import Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from fitwatch import ranks
from fitwatch.data.batches import rough_size
from fitwatch.losses import Loss
from fitwatch.rules.paired import influences, standard_error


class ExampleLosses:
    """The loss of each example of one validation, as `Loss.per_example` gives it. They stay on their device.

    They are known only if validation measures this very loss, once for each batch: a step may compute another one.

    Args:
        loss: The loss that validation measures.

    Attributes:
        examples: Number of examples seen, for any loss, counted in the targets.
        unknown: Why the losses are unknown; None if they are known.
    """

    def __init__(self, loss: object) -> None:
        self._loss = loss
        self.examples = 0
        self.unknown = None if isinstance(loss, Loss) else "the loss returns only a mean"
        self._losses: list[Tensor] = []
        self._weights: list[Tensor] = []

    def add(self, asked: Sequence[tuple[Any, Any, Any]]) -> None:
        """Add a batch.

        Args:
            asked: What the step has passed to the loss for it: outputs, targets and weights, for each call.
        """
        if not asked:
            self.unknown = self.unknown or "the validation step computes its loss itself"
        elif len(asked) > 1:
            self.unknown = self.unknown or "the validation step uses the loss several times for a batch"
        if asked:
            with suppress(TypeError):  # targets without tensors
                self.examples += rough_size(asked[0][1])
        if self.unknown is None and isinstance(self._loss, Loss):
            losses, weights = self._loss.per_example(*asked[0])
            self._losses.append(losses)
            self._weights.append(weights)

    def share(self, device: torch.device) -> None:
        """Combine the batches of all ranks, in the order of a single rank; all ranks call it."""
        own = [torch.stack(pair).cpu() for pair in zip(self._losses, self._weights, strict=True)]
        found = ranks.gather((self.examples, self.unknown, own))
        self.examples = sum(examples for examples, _, _ in found)
        self.unknown = next((unknown for _, unknown, _ in found if unknown is not None), None)
        batches = [pair for together in zip_longest(*(kept for _, _, kept in found)) for pair in together]
        moved = [pair.to(device) for pair in batches if pair is not None]
        self._losses, self._weights = [pair[0] for pair in moved], [pair[1] for pair in moved]

    def on_host(self) -> tuple[Tensor, Tensor] | None:
        """Return losses and weights, both of shape (N,), on the CPU; None if they are unknown."""
        if self.unknown is not None or not self._losses:
            return None
        losses, weights = torch.stack([torch.cat(self._losses), torch.cat(self._weights)]).cpu()  # one transfer
        return losses, weights

    def standard_error(self) -> float:
        """Return the standard error of the weighted mean, in units of the loss; NaN if the losses are unknown."""
        known = self.on_host()
        return torch.nan if known is None else standard_error(influences(*known))
