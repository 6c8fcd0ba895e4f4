"""The result of a fit."""

import html

from attrs import field, frozen

from fitwatch.calibration.calibrated import Calibration
from fitwatch.losses.baseline import Baseline
from fitwatch.measuring.validation import CALIBRATION
from fitwatch.rules.overfitting import Verdict
from fitwatch.state import State

_MOST = 6  # metrics in the line of the best epoch
_DETAILS = ("loss_se", "loss_vs_baseline", *CALIBRATION)


@frozen(kw_only=True)
class Best:
    """The best evaluation of a fit, by the monitored metric; ``metrics`` is its entry of the history."""

    epoch: int
    step: int
    metrics: dict[str, float]


@frozen(kw_only=True, repr=False)
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
        restored: Whether the weights of the best evaluation were put back at the end.
        links: Addresses of pages that show the fit, by name.
        test: What `Trainer.test` has measured last, after the fit; {} before.

    ``print`` it for five lines: why training ended, the best epoch, the weights, the verdict, and the pages. There,
    epochs count from 1; the numbers in ``history`` and ``best`` are indices, from 0.
    """

    history: list[dict[str, float]]
    best: Best | None
    stop_reason: str | None
    verdict: Verdict | None
    baseline: Baseline | None = None
    calibration: Calibration | None = None
    restored: bool = False
    links: dict[str, str] = field(factory=dict)
    test: dict[str, float] = field(factory=dict)

    def __repr__(self) -> str:
        best = "" if self.best is None else f", best epoch {self.best.epoch + 1}: {_figures(self.best.metrics)}"
        return f"Result({len(self.history)} evaluation{'s' * (len(self.history) != 1)}{best})"

    def __str__(self) -> str:
        return "\n".join(f"{name + ':':<12} {text}" for name, text in self._rows())

    def _repr_html_(self) -> str:
        cells = "".join(f"<tr><th>{name}</th><td>{_cell(text)}</td></tr>" for name, text in self._rows())
        return f"<table>{cells}</table>"

    def _rows(self) -> list[tuple[str, str]]:
        """Return what a person wants to know at the end, with epochs counted from 1."""
        rows = [("ended", self.stop_reason or "all of the training was done")]
        if self.best is not None:
            rows.append(
                ("best epoch", f"{self.best.epoch + 1}, step {self.best.step:,}: {_figures(self.best.metrics)}")
            )
        kept = "those of the best epoch were restored" if self.restored else "those of the last step"
        rows.append(("weights", kept))
        if self.verdict is not None:
            rows.append(("verdict", self.verdict.summary or self.verdict.evidence))
        if self.test:
            rows.append(("test", _figures(self.test)))
        return rows + list(self.links.items())

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
            restored=state.restored,
            links=dict(state.links),
            test=state.test,  # the same dict: a test comes after the result
        )


def _figures(metrics: dict[str, float]) -> str:
    """Return the losses and metrics of an evaluation, without the details of callbacks."""
    shown = [name for name in metrics if name.startswith(("train/", "val/", "test/")) and name.count("/") == 1]
    shown = [name for name in shown if name.removeprefix("val/").removeprefix("test/") not in _DETAILS]
    return ", ".join(f"{name} {metrics[name]:.4g}" for name in shown[:_MOST])


def _cell(text: str) -> str:
    escaped = html.escape(text)
    return f'<a href="{escaped}">{escaped}</a>' if text.startswith("http") else escaped
