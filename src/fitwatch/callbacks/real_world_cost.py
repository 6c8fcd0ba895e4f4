"""What the decisions on the validation set cost."""

from collections.abc import Callable
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from fitwatch._confusion_image import confusion_image
from fitwatch.callback import Callback
from fitwatch.decisions import (
    CostMatrix,
    as_cost_matrix,
    confusion_matrix,
    cost_optimal_decision,
    decide,
    probabilities_of,
)
from fitwatch.state import State


@define(eq=False, slots=False)
class RealWorldCost(Callback):
    """Measures the cost of the model's decisions on the validation set, per example and in units of the costs.

    ``val/cost`` is the cost of the most probable class (of one logit: whether it is above 0), ``val/cost_optimal`` that
    of the class with the least expected cost under the model's probabilities (`cost_optimal_decision`). Either can be
    monitored by `EarlyStopping`. At every new best evaluation both confusion matrices are logged, with the cost of
    each cell, and a table with the savings against the best single answer for all examples.

    The second decision takes the probabilities at their word. A loss with class weights or costs moves them already:
    then the first decision is the one that was trained for, and the second counts the costs twice.

    The outputs are logits of shape (N, C), (N, C, d1, ...), or one logit of shape (N,) or (N, 1), the targets class
    indices; ignored ones (the loss's ``ignore_index``) don't count, and weights of the examples do.

    Args:
        costs: A `CostMatrix`, or what it is made from: a matrix of shape (C, C), row true, column predicted.

    Raises:
        ValueError: The costs are not valid; when fitting starts: there is no validation set, or another metric is named
            ``cost`` or ``cost_optimal``.
    """

    costs: CostMatrix = field(converter=as_cost_matrix)

    def on_fit_start(self, state: State) -> None:
        """Add the two metrics."""
        ignore = getattr(state.loss, "ignore_index", None)
        self._decisions = {
            "cost": _Decisions(self.costs, ignore, decide),
            "cost_optimal": _Decisions(self.costs, ignore, self._least_cost),
        }
        for name, metric in self._decisions.items():
            state.add_metric(name, metric)

    def on_validation_end(self, state: State) -> None:
        """Draw the confusion matrices of the best evaluation so far."""
        if state.best is not state.metrics:
            return
        rows = ["| decision | cost per example | savings |", "|---|---|---|"]
        for name, title in (("cost", "most probable class"), ("cost_optimal", "least expected cost")):
            counts = self._decisions[name].counts.cpu()
            picture = confusion_image(counts, self.costs.classes, self.costs.matrix, title=title)
            state.log(f"val/decisions/{name}", picture)
            answer, constant = self.costs.cheapest_constant(counts.sum(1))
            cost = state.metrics[f"val/{name}"]
            savings = f"{1 - cost / constant:.1%}" if constant else ""
            rows.append(f"| {title} | {cost:.6g} | {savings} |")
        rows.append(f"| always {self.costs.classes[answer]} | {constant:.6g} | |")
        state.log("val/report/costs", "\n".join(rows))

    def _least_cost(self, outputs: Tensor) -> Tensor:
        return cost_optimal_decision(probabilities_of(outputs), self.costs)


class _Decisions:
    """A metric: the cost of one way to decide, from the confusion matrix of the whole set."""

    def __init__(self, costs: CostMatrix, ignore_index: int | None, decide: Callable[[Tensor], Tensor]) -> None:
        self.costs, self.ignore_index, self.decide = costs, ignore_index, decide
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self.counts = torch.zeros_like(self.costs.matrix, dtype=torch.float64)

    def update(self, outputs: Tensor, targets: Tensor, sample_weight: Tensor | None = None) -> None:
        """Take in a batch."""
        classes = 2 if outputs.dim() == 1 or outputs.shape[1] == 1 else outputs.shape[1]
        if classes != self.costs.num_classes:
            raise ValueError(
                f"outputs of shape {tuple(outputs.shape)} are of {classes} classes, "
                f"the costs of {self.costs.num_classes}"
            )
        if outputs.dim() > 2:  # every position decides for itself
            if sample_weight is not None and sample_weight.shape != targets.shape:
                sample_weight = sample_weight.reshape(-1, *[1] * (targets.dim() - 1)).expand_as(targets)
            outputs = outputs.movedim(1, -1).flatten(0, -2)
        targets = targets.reshape(-1)
        weight = None if sample_weight is None else sample_weight.reshape(-1)
        if self.ignore_index is not None:
            kept = targets != self.ignore_index
            outputs, targets, weight = outputs[kept], targets[kept], None if weight is None else weight[kept]
        new = confusion_matrix(self.decide(outputs), targets, self.costs.num_classes, sample_weight=weight)
        self.counts = self.counts + new.cpu()

    def compute(self) -> Any:
        """The mean cost per example."""
        return (self.counts * self.costs.matrix).sum() / self.counts.sum()
