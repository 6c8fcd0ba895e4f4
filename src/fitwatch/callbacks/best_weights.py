"""A copy of the best weights."""

from fitwatch.helpers.aliases import StateDict
from fitwatch.helpers.modules import copied_weights, load_weights, overwrite
from fitwatch.state import State


class BestWeights:
    """A copy of a model's weights, to restore at the end of a fit.

    Attributes:
        kept: The copy, as a state dict, or None.
    """

    def __init__(self) -> None:
        self.kept: StateDict | None = None

    def keep(self, state: State) -> None:
        """Keep the weights that the newest evaluation measured; without a validation set, the current ones."""
        # Not copied into the old one: Ctrl-C halfway must not leave a mixture of two epochs.
        measured = state.validation.weights
        self.kept = copied_weights(state.model) if measured is None else measured

    def restore(self, state: State) -> None:
        """Restore the copy, if there is one; not over the user's weights, if the fit took no step."""
        if self.kept is None or state.progress.step <= state.progress.first_step:
            return
        try:
            load_weights(state.model, self.kept)
        except BaseException:  # Ctrl-C in a hook of the model: it must not be left with weights of two epochs
            overwrite(state.model, self.kept)
            raise
