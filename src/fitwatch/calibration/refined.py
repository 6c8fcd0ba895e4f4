"""The figures of one evaluation: the temperature, the log-loss after calibration, and what is left to calibrate."""

import torch
from attrs import frozen
from torch import Tensor

from fitwatch.calibration.affine import MOST_CLASSES, fit_affine
from fitwatch.calibration.attribution import Pair
from fitwatch.calibration.calibrated import Calibration
from fitwatch.calibration.reliability import calibration_error, reliability
from fitwatch.calibration.rows import Rows
from fitwatch.calibration.temperature import cross_fitted, fit_temperature
from fitwatch.rules.paired import influences, standard_error

_MOST_DECISIONS = 100  # classes: with more, the confusion matrices would be large


@frozen(eq=False)
class Refined:
    """One evaluation, as it is and after calibration.

    Attributes:
        outputs: The examples with the model's own logits.
        rows: The same with what class weights have added taken off: ``outputs`` itself without class weights.
        shift: That, shape (C,); None without class weights.
        temperature: Fitted to all examples.
        scales: 1 / T for each example, cross-fitted, shape (N,).
        pair: The log-losses of the examples, without and with the temperature; both without what class weights added.
        losses: The log-losses of the examples by the model's own outputs, shape (N,).
        log_loss: Their mean.
        refined_loss: Mean log-loss after calibration, cross-fitted.
        refined_loss_se: Standard error of the difference of the two, a paired one.
    """

    outputs: Rows
    rows: Rows
    shift: Tensor | None
    temperature: float
    scales: Tensor
    pair: Pair
    losses: Tensor
    log_loss: float
    refined_loss: float
    refined_loss_se: float

    @classmethod
    def of(cls, outputs: Rows, rows: Rows, shift: Tensor | None, *, start: float) -> "Refined":
        """Measure one evaluation; ``start`` is a temperature near the solution."""
        temperature = fit_temperature(rows, start=start)
        scales = cross_fitted(rows, temperature)
        raw, refined = rows.losses(), rows.losses(scales)
        own = raw if outputs is rows else outputs.losses()
        return cls(
            outputs,
            rows,
            shift,
            temperature,
            scales,
            Pair(raw.float(), refined.float()),
            own,
            float(own @ rows.weights / len(rows)),
            float(refined @ rows.weights / len(rows)),
            standard_error(influences(refined - own, rows.weights)),
        )

    def tables(self) -> Tensor:
        """Return the `reliability` of the outputs, and after calibration, cross-fitted; shape (2, 3, bins)."""
        return torch.stack([reliability(self.outputs, 1.0, self.losses), reliability(self.rows, self.scales)])

    def values(self) -> dict[str, float]:
        """Return what a validation reports, by name without ``val/``."""
        return {
            "log_loss": self.log_loss,
            "refined_loss": self.refined_loss,
            "refined_loss_se": self.refined_loss_se,
            "temperature": self.temperature,
            "calibration_error": calibration_error(reliability(self.outputs, 1.0, self.losses)),
        }

    def calibration(self) -> Calibration:
        """Fit the biases too, and return what turns the outputs of the model into calibrated ones."""
        columns = len(self.rows.logits)
        biased, biases = self.temperature, None
        if columns <= MOST_CLASSES:
            biased, biases = fit_affine(self.rows, start=self.temperature)
        return Calibration(
            temperature=self.temperature,
            shift=torch.zeros(columns) if self.shift is None else self.shift,
            biased_temperature=biased,
            biases=biases,
            exclusive=self.rows.exclusive,
            examples=len(self.rows),
            log_loss=self.log_loss,
            calibrated_log_loss=self.refined_loss,
            calibrated_log_loss_se=self.refined_loss_se,
            decisions=self.decisions(biased, biases),
        )

    def decisions(self, biased: float = 1.0, biases: Tensor | None = None) -> dict[str, Tensor]:
        """Return the confusion matrices of `Calibration`; ``"biased"`` needs the biases and their temperature."""
        columns = len(self.rows.logits)
        if columns > _MOST_DECISIONS or (columns > 1 and not self.rows.exclusive):
            return {}
        logits = {"outputs": self.outputs.logits, "calibrated": self.rows.logits}
        if biases is not None:
            logits["biased"] = self.rows.logits / biased + biases[:, None]
        number = max(columns, 2)
        found = {}
        for name, z in logits.items():
            decided = z.argmax(0) if columns > 1 else (z[0] > 0).long()
            truth = self.rows.targets if columns > 1 else self.rows.targets[0]
            matrix = torch.zeros(number * number, dtype=torch.float64)
            if columns > 1:
                matrix.index_add_(0, truth * number + decided, self.rows.weights)
            else:  # a soft target counts for both
                matrix.index_add_(0, decided, self.rows.weights * (1 - truth))
                matrix.index_add_(0, number + decided, self.rows.weights * truth)
            found[name] = matrix.view(number, number)
        return found
