"""What the decisions on the validation set cost."""

from collections.abc import Callable
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from fitwatch.callback import Callback
from fitwatch.dtypes import wide_float
from fitwatch.losses.costs import CostMatrix, as_cost_matrix, confusion_sums, decide, probabilities_of
from fitwatch.state import State
from fitwatch.tensorboard.confusion import confusion_image


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
            ``cost`` or ``cost_optimal``; at the end of a validation: a target that counts is no class.
    """

    costs: CostMatrix = field(converter=as_cost_matrix)

    def on_fit_start(self, state: State) -> None:
        """Add the two metrics."""
        ignore = getattr(state.loss, "ignore_index", None)
        self._matrix = self.costs.matrix
        self._decisions = {
            "cost": _Decisions(self.costs, ignore, decide),
            "cost_optimal": _Decisions(self.costs, ignore, self._least_cost),
        }
        for name, metric in self._decisions.items():
            state.add_metric(name, metric)

    def on_validation_end(self, state: State) -> None:
        """Draw the confusion matrices of the best evaluation so far."""
        if state.best is not state.metrics or not bool(self._decisions["cost"].counts.any()):  # no target counts
            return
        rows = ["| decision | cost per example | savings |", "|---|---|---|"]
        for name, title in (("cost", "most probable class"), ("cost_optimal", "least expected cost")):
            counts = self._decisions[name].counts
            picture = confusion_image(counts, self.costs.classes, self.costs.matrix, title=title)
            state.log(f"val/decisions/{name}", picture)
            answer, constant = self.costs.cheapest_constant(counts.sum(1))
            cost = state.metrics[f"val/{name}"]
            savings = f"{1 - cost / constant:.1%}" if constant else ""
            rows.append(f"| {title} | {cost:.6g} | {savings} |")
        rows.append(f"| always {self.costs.classes[answer]} | {constant:.6g} | |")
        state.log("val/report/costs", "\n".join(rows))

    def _least_cost(self, outputs: Tensor) -> Tensor:
        probabilities = probabilities_of(outputs)
        self._matrix = self._matrix.to(probabilities)  # copied once
        return (probabilities @ self._matrix).argmin(1)  # `cost_optimal_decision` looks at the values, which waits


class _Decisions:
    """A metric: the cost of one way to decide, from the confusion matrix of the whole set.

    What `update` sees stays on its device, and nothing waits for it; `compute` checks the targets.

    Attributes:
        counts: The confusion matrix, as `compute` has left it: shape (C, C), float64, on the host.
    """

    def __init__(self, costs: CostMatrix, ignore_index: int | None, decide: Callable[[Tensor], Tensor]) -> None:
        self.costs, self.ignore_index, self.decide = costs, ignore_index, decide
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self.counts = torch.zeros(self.costs.matrix.shape, dtype=torch.float64)
        self._sums: Tensor | None = None  # (C + 1, C); the last row has the targets that are no class

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
        targets, decisions = targets.reshape(-1), self.decide(outputs)
        if targets.shape != decisions.shape:
            raise ValueError(f"there are {len(targets)} targets for {len(decisions)} decisions")
        wide = wide_float(outputs.device)
        weight = torch.ones_like(targets, dtype=wide) if sample_weight is None else sample_weight.reshape(-1).to(wide)
        if self.ignore_index is not None:
            weight = torch.where(targets == self.ignore_index, 0, weight)
        sums = confusion_sums(decisions, targets, classes, weight)
        self._sums = sums if self._sums is None else self._sums + sums

    def compute(self) -> Any:
        """The mean cost per example.

        Raises:
            ValueError: A target that counts is no class.
        """
        if self._sums is not None:
            sums = self._sums.cpu().double()
            self.counts = sums[:-1]
            if bool(sums[-1].any()):
                raise ValueError(
                    f"RealWorldCost: the targets of weight {sums[-1].sum():g} of {sums.sum():g} are no class: allowed "
                    f"are 0..{self.costs.num_classes - 1}"
                    + ("" if self.ignore_index is None else f" and {self.ignore_index}")
                )
        return (self.counts * self.costs.matrix).sum() / self.counts.sum()
