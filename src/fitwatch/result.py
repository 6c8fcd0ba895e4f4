"""The result of a fit."""

from attrs import frozen

from fitwatch.calibration.calibrated import Calibration
from fitwatch.losses.baseline import Baseline
from fitwatch.rules.overfitting import Verdict
from fitwatch.state import State


@frozen(kw_only=True)
class Best:
    """The best evaluation of a fit, by the monitored metric; ``metrics`` is its entry of the history."""

    epoch: int
    step: int
    metrics: dict[str, float]


@frozen(kw_only=True)
class Result:
    """The result of a fit.

    Attributes:
        history: One dict per evaluation, of this fit and of those before it that it continues: ``epoch`` (from 0),
            ``step``, ``train/loss``, ``val/loss``, ...
        best: The best evaluation: by the metric that early stopping monitors, else by ``val/loss`` (``train/loss``
            without a validation set); None if no value was finite.
        stop_reason: Why training stopped early; None if it did not.
        verdict: The overfitting verdict, if a detector was attached.
        baseline: The validation loss of predictions that are the same for every input; None if unknown.
        calibration: How to calibrate the model as the fit leaves it: at the restored evaluation, else at the last one.
            None if no callback had it measured (an `OverfittingDetector` does, for losses that take logits), or if
            steps were trained after the last evaluation.
    """

    history: list[dict[str, float]]
    best: Best | None
    stop_reason: str | None
    verdict: Verdict | None
    baseline: Baseline | None = None
    calibration: Calibration | None = None

    @classmethod
    def of(cls, state: State) -> "Result":
        """Return the result of a fit that ended in ``state``."""
        best = state.history.best
        return cls(
            history=list(state.history),
            best=None if best is None else Best(epoch=int(best["epoch"]), step=int(best["step"]), metrics=best),
            stop_reason=state.stop_reason,
            verdict=state.verdict,
            baseline=state.baseline,
            calibration=state.calibration,
        )
