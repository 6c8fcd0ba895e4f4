"""The cost of decisions on the validation set."""

import logging
import math
from collections.abc import Callable

import torch
from attrs import define, field
from torch import Tensor

from fitwatch.calibration.decisions import calibrated_costs, tuned_costs
from fitwatch.calibration.logit_losses import takes_logits
from fitwatch.calibration.refined import Refined
from fitwatch.callback import Callback
from fitwatch.helpers.dtypes import wide_float
from fitwatch.helpers.markdown import table
from fitwatch.helpers.options import instance
from fitwatch.losses.costs import CostMatrix, as_cost_matrix, confusion_sums, decide, probabilities_of
from fitwatch.rules.paired import influences, standard_error
from fitwatch.state import State
from fitwatch.tensorboard.confusion import confusion_image

logger = logging.getLogger("fitwatch")


@define(eq=False, slots=False)
class RealWorldCost(Callback):
    """Measures the mean cost of the model's decisions on the validation set, in units of the costs.

    ``val/cost`` is the cost of predicting the most probable class (for a single logit: whether it is above 0),
    ``val/cost_optimal`` that of predicting the class with the least expected cost under the model's probabilities
    (`cost_optimal_decision`). `EarlyStopping` can monitor either. Each new best evaluation logs both confusion matrices
    with the cost of each cell, and a table of the savings over the best constant decision.

    The second decision relies on the probabilities. A loss with class weights or costs has already shifted them: the
    model was then trained for the first decision, and the second counts the costs twice. With class weights a warning
    says so.

    So for losses that take logits, ``val/cost_calibrated`` is the cost of the second decision by calibrated
    probabilities (see `Calibration`; what class weights add is taken off), each example's by a temperature fitted to
    the others. For two classes, ``val/cost_tuned`` is the cost by a threshold on the output that costs least on the
    other examples, and ``val/cost_tuned_se`` the standard error of its difference from ``val/cost_calibrated``, a
    paired one. Of more than 2 million logits both use a fixed part.

    Outputs are logits of shape (N, C) or (N, C, d1, ...), or a single logit of shape (N,) or (N, 1). Targets are class
    indices; those equal to the loss's ``ignore_index`` are skipped. Sample weights count.

    Args:
        costs: A `CostMatrix`, or a matrix of shape (C, C); rows are true classes, columns predictions.
        calibrated: Whether to measure the costs by calibrated probabilities too.

    Raises:
        ValueError: The costs are invalid; when fitting starts: there is no validation set, or another metric is named
            ``cost`` or ``cost_optimal``; at the end of a validation: a target is not a class index.
    """

    costs: CostMatrix = field(converter=as_cost_matrix)
    calibrated: bool = field(default=True, kw_only=True, validator=instance(bool))

    def on_fit_start(self, state: State) -> None:
        """Add both metrics."""
        ignore = getattr(state.loss, "ignore_index", None)
        self._matrix = self.costs.matrix
        if state.validation.classes is None:
            state.validation.classes = self.costs.classes
        self._decisions = {
            "cost": _Decisions(self.costs, ignore, decide),
            "cost_optimal": _Decisions(self.costs, ignore, self._least_cost),
        }
        for name, metric in self._decisions.items():
            state.add_metric(name, metric)
        self._calibrates = self.calibrated and state.measure_calibration()
        if self._calibrates:
            state.validation.calibrated.append(self._measure_calibrated)
            state.history.names |= {"val/cost_calibrated"}
            if self.costs.num_classes == 2:
                state.history.names |= {"val/cost_tuned", "val/cost_tuned_se"}
        self._warned = False

    def on_validation_end(self, state: State) -> None:
        """After a new best evaluation, log the confusion matrices and the table."""
        self._warn(state)
        if not state.history.is_best or not bool(self._decisions["cost"].counts.any()):  # all targets ignored
            return
        rows = []
        for name, title in (("cost", "most probable class"), ("cost_optimal", "least expected cost")):
            counts = self._decisions[name].counts
            picture = confusion_image(counts, self.costs.classes, self.costs.matrix, title=title)
            state.log(f"val/decisions/{name}", picture)
            answer, constant = self.costs.cheapest_constant(counts.sum(1))
            cost = state.metrics[f"val/{name}"]
            savings = f"{1 - cost / constant:.1%}" if constant else ""
            rows.append([title, f"{cost:.6g}", savings])
        if "val/cost_calibrated" in state.metrics:
            cost = state.metrics["val/cost_calibrated"]
            savings = f"{1 - cost / constant:.1%}" if constant else ""
            rows.append(["least expected cost, calibrated", f"{cost:.6g}", savings])
        if "val/cost_tuned" in state.metrics:
            tuned, error = state.metrics["val/cost_tuned"], state.metrics["val/cost_tuned_se"]
            savings = f"{1 - tuned / constant:.1%}" if constant else ""
            rows.append(
                ["threshold tuned", f"{tuned:.6g} ({tuned - cost:+.2g} ± {error:.2g} from calibrated)", savings]
            )
        rows.append([f"always {self.costs.classes[answer]}", f"{constant:.6g}", ""])
        state.log("val/report/costs", table(("decision", "cost per example", "savings"), rows))

    def _warn(self, state: State) -> None:
        """Warn that class weights and the costs count the prior twice."""
        loss = state.loss
        if self._warned or not (takes_logits(loss) and getattr(loss, "has_weights", False)):
            return
        self._warned = True
        instead = (
            "val/cost_calibrated takes the weights off first, and so does trainer.predict(..., proba=True, "
            "calibrated=True) for cost_optimal_decision"
            if "val/cost_calibrated" in state.metrics
            else "measure with RealWorldCost(costs, calibrated=True), train without class weights"
        )
        logger.warning(
            "the loss has class weights, which have shifted the probabilities: the cost-optimal decision by them "
            "(val/cost_optimal) counts the class frequencies twice: %s; or decide for the most probable class",
            instead,
        )

    def _measure_calibrated(self, refined: Refined | None) -> dict[str, float]:
        binary = self.costs.num_classes == 2
        names = ["cost_calibrated", *(["cost_tuned", "cost_tuned_se"] if binary else [])]
        if refined is None:
            return dict.fromkeys(names, math.nan)
        costs, weights = self.costs.matrix.double().cpu(), refined.rows.weights
        calibrated = calibrated_costs(refined, costs)
        values = [float(calibrated @ weights / weights.sum())]
        if binary:
            tuned = tuned_costs(refined, costs)
            values += [
                float(tuned @ weights / weights.sum()),
                standard_error(influences(tuned - calibrated, weights)),
            ]
        return dict(zip(names, values, strict=True))

    def _least_cost(self, outputs: Tensor) -> Tensor:
        probabilities = probabilities_of(outputs)
        self._matrix = self._matrix.to(probabilities)  # copied once
        return (probabilities @ self._matrix).argmin(1)  # `cost_optimal_decision` would wait for the device


class _Decisions:
    """Metric for the mean cost of a decision rule, from the confusion matrix of the whole set.

    `update` accumulates on the device without waiting for it; `compute` checks the targets.

    Attributes:
        counts: The confusion matrix from the last `compute`: shape (C, C), float64, on the host.
    """

    def __init__(self, costs: CostMatrix, ignore_index: int | None, decide: Callable[[Tensor], Tensor]) -> None:
        self.costs, self.ignore_index, self.decide = costs, ignore_index, decide
        self.reset()

    def reset(self) -> None:
        """Clear the confusion matrix."""
        self.counts = torch.zeros(self.costs.matrix.shape, dtype=torch.float64)
        self._sums: Tensor | None = None  # (C + 1) * C cells; the last row counts invalid targets

    def update(self, outputs: Tensor, targets: Tensor, sample_weight: Tensor | None = None) -> None:
        """Add a batch."""
        classes = 2 if outputs.dim() == 1 or outputs.shape[1] == 1 else outputs.shape[1]
        if classes != self.costs.num_classes:
            raise ValueError(
                f"outputs of shape {tuple(outputs.shape)} have {classes} classes, the costs have "
                f"{self.costs.num_classes}"
            )
        if outputs.dim() > 2:  # one decision per position
            if sample_weight is not None and sample_weight.shape != targets.shape:
                sample_weight = sample_weight.reshape(-1, *[1] * (targets.dim() - 1)).expand_as(targets)
            outputs = outputs.movedim(1, -1).flatten(0, -2)
        targets, decisions = targets.reshape(-1), self.decide(outputs)
        if targets.shape != decisions.shape:
            raise ValueError(f"got {len(targets)} targets for {len(decisions)} decisions")
        wide = wide_float(outputs.device)
        weight = torch.ones_like(targets, dtype=wide) if sample_weight is None else sample_weight.reshape(-1).to(wide)
        if self.ignore_index is not None:
            weight = torch.where(targets == self.ignore_index, 0, weight)
        sums = confusion_sums(decisions, targets, classes, weight)
        self._sums = sums if self._sums is None else self._sums + sums

    def compute(self) -> Tensor:
        """Return the mean cost per example.

        Raises:
            ValueError: A target with weight is not a class index.
        """
        if self._sums is not None:
            sums = self._sums.cpu().double()
            self.counts = sums[:-1]
            if bool(sums[-1].any()):
                raise ValueError(
                    f"RealWorldCost: targets with weight {sums[-1].sum():g} of {sums.sum():g} are not class indices: "
                    f"allowed are 0..{self.costs.num_classes - 1}"
                    + ("" if self.ignore_index is None else f" and {self.ignore_index}")
                )
        return (self.counts * self.costs.matrix).sum() / self.counts.sum()
