"""A copy of the best weights."""

import copy

from torch import Tensor, nn

from fitwatch.helpers.aliases import StateDict
from fitwatch.saving import unwrap


class BestWeights:
    """A copy of a model's weights, to restore at the end of a fit.

    Attributes:
        kept: The copy, as a state dict, or None.
    """

    def __init__(self) -> None:
        self.kept: StateDict | None = None

    def keep(self, model: nn.Module) -> None:
        """Copy the current weights."""
        # Not copied into the old one: Ctrl-C halfway must not leave a mixture of two epochs.
        weights = unwrap(model).state_dict()
        self.kept = {
            name: w.detach().clone() if isinstance(w, Tensor) else copy.deepcopy(w) for name, w in weights.items()
        }

    def restore(self, model: nn.Module) -> None:
        """Restore the copy, if there is one, and drop it: a later fit that fails early must not restore it again."""
        if self.kept is not None:
            unwrap(model).load_state_dict(self.kept)
        self.kept = None
