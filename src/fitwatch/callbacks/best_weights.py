"""A copy of the best weights."""

from fitwatch.calibration.calibrated import Calibration, Fitted
from fitwatch.helpers.aliases import StateDict
from fitwatch.helpers.modules import copied_weights, load_weights, overwrite
from fitwatch.state import State


class BestWeights:
    """A copy of a model's weights, to restore at the end of a fit, with their calibration if it is measured.

    Attributes:
        kept: The copy, as a state dict, or None.
    """

    def __init__(self) -> None:
        self.kept: StateDict | None = None
        self._fitted: Fitted | None = None

    def keep(self, state: State) -> None:
        """Keep the weights that the newest evaluation measured; without a validation set, the current ones."""
        # Not copied into the old one: Ctrl-C halfway must not leave a mixture of two epochs.
        measured = state.validation.weights
        self.kept = copied_weights(state.model) if measured is None else measured
        self._fitted = state.fitted

    def restore(self, state: State) -> None:
        """Restore the copy, if there is one; not over the user's weights, if the fit took no step."""
        if self.kept is None or state.progress.step <= state.progress.first_step:
            return
        try:
            load_weights(state.model, self.kept)
        except BaseException:  # Ctrl-C in a hook of the model: it must not be left with weights of two epochs
            overwrite(state.model, self.kept)
            raise
        state.restored = True
        state.fitted = None if self._fitted is None else self._fitted.moved(state.progress.step)

    def calibration(self) -> StateDict | None:
        """Return the calibration of the copy as plain data, for a checkpoint."""
        return None if self._fitted is None or self.kept is None else self._fitted.calibration.state_dict()

    def load(self, kept: StateDict | None, calibration: StateDict | None) -> None:
        """Restore a copy and its calibration from a checkpoint."""
        self.kept = kept
        self._fitted = None if calibration is None else Fitted.of(Calibration.from_state_dict(calibration), 0)
