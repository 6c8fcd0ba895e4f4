"""A copy of the best weights."""

import copy
from typing import Any

from torch import Tensor, nn

from fitwatch.saving import unwrap


class BestWeights:
    """One copy of a model's weights, to be put back at the end of a fit.

    Attributes:
        kept: The copy, as a state dict; None while there is none.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Any] | None = None

    def keep(self, model: nn.Module) -> None:
        """Copy the weights as they are now."""
        # A new copy, not one into the old: Ctrl-C half-way must not leave a mixture of two epochs.
        weights = unwrap(model).state_dict()
        self.kept = {
            name: w.detach().clone() if isinstance(w, Tensor) else copy.deepcopy(w) for name, w in weights.items()
        }

    def restore(self, model: nn.Module) -> None:
        """Put them back, if there are any, and forget them: a fit that fails before it begins must not do so again."""
        if self.kept is not None:
            unwrap(model).load_state_dict(self.kept)
        self.kept = None
