"""A copy of the best weights."""

import copy

from torch import Tensor, nn

from fitwatch.helpers.aliases import StateDict
from fitwatch.helpers.modules import load_weights, weights


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
        self.kept = {
            name: w.detach().clone() if isinstance(w, Tensor) else copy.deepcopy(w)
            for name, w in weights(model).items()
        }

    def restore(self, model: nn.Module) -> None:
        """Restore the copy, if there is one, and drop it: a later fit that fails early must not restore it again."""
        if self.kept is not None:
            load_weights(model, self.kept)
        self.kept = None
