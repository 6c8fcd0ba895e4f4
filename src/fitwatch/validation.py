"""One pass over a validation set, of which each rank sees a part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate, default_convert

from fitwatch import ranks
from fitwatch.data import batches
from fitwatch.data.counting import exposed_targets
from fitwatch.data.sharding import split
from fitwatch.losses import BinaryCrossEntropy, LossSum, MeanSquaredError, apply
from fitwatch.losses.base import FAILURES, ClassLoss, Loss
from fitwatch.losses.baseline import Baseline, TargetSums
from fitwatch.metrics import Metrics, WeightedMean, evaluating

NO_BASELINE = Baseline(constant=math.nan, uniform=math.nan)
"""Stands for none, and that there is none to look for."""


class Evaluation:
    """What one pass over a data set measures; the values stay on their device until its end.

    Args:
        loss: The loss that is measured; with class weights, it is measured without them as well.
        metrics: Name -> function or object, as for `Metrics`.
        baseline: That of the loss on this data set, or `NO_BASELINE`; if None, the targets are counted to find it.
        observers: Objects with ``reset`` and ``update``, as metrics have, that see the outputs and report nothing.
    """

    def __init__(
        self,
        loss: Any,
        metrics: Mapping[str, Any],
        baseline: Baseline | None = None,
        observers: Sequence[Any] = (),
    ) -> None:
        self.loss, self.baseline = loss, None if baseline is NO_BASELINE else baseline
        self._mean, self._batches, self._applied = WeightedMean(), 0, False
        self._kept: list[Any] = []  # what update got, where other ranks have to see it too
        self._metrics = Metrics(metrics)
        self._unweighted = (loss.unweighted(), WeightedMean()) if getattr(loss, "has_weights", False) else None
        self._targets = TargetSums(loss) if baseline is None else None
        self._observers = observers
        for observer in observers:
            observer.reset()
        # On some rank: what observes may be on one only.
        self._watched = ranks.size() > 1 and any(ranks.gather(bool(metrics or observers)))
        counted = self._targets is not None and self._targets.known
        self._shared = ranks.size() > 1 and (self._watched or counted)

    def run(self, model: nn.Module, batches: Iterable[Any], step: Callable[[Any], LossSum]) -> dict[str, float]:
        """Evaluate a model: `add` what ``step`` gives for each batch, in eval mode without gradients, then `values`."""
        with evaluating(model), ranks.unsynchronised(model):
            for number, batch in enumerate(split(batches)):
                try:
                    self.add(*step(batch))
                    if not self._applied:  # a loss of the step's own has another baseline, which nobody knows
                        self.baseline = self._targets = None
                except Exception as error:
                    error.add_note(f"in an evaluation (validation, or the probe of the training set), batch {number}")
                    raise
            if ranks.size() > 1:
                self._share(next((p.device for p in model.parameters()), torch.device("cpu")))
        return ranks.from_main(self.values())

    def apply(self, output: Any, target: Any, sample_weight: Any = None) -> LossSum | Tensor:
        """The loss that is measured."""
        self._applied = True
        return apply(self.loss, output, target, sample_weight)

    def add(self, total: Tensor, weight: Tensor | float) -> None:
        """Take in the loss of a batch, as sums."""
        self._mean.add(total, weight)
        self._batches += 1

    def update(self, outputs: Tensor, targets: Tensor, sample_weight: Tensor | None = None) -> None:
        """Take in the outputs and targets of a batch: for the metrics, the baseline and the loss without weights."""
        if self._unweighted is not None:
            loss, mean = self._unweighted
            mean.add(*(loss.sums(outputs, targets, sample_weight)))
        if self._shared:
            # for the baseline the shape of the outputs is enough
            seen = outputs if self._watched else torch.empty(outputs.shape, dtype=outputs.dtype, device="meta")
            self._kept.append((seen, targets, sample_weight))
        else:
            self._see(outputs, targets, sample_weight)

    def _see(self, outputs: Tensor, targets: Tensor, sample_weight: Tensor | None) -> None:
        self._metrics.update(outputs, targets, sample_weight)
        if self._targets is not None:
            self._targets.update(outputs, targets, sample_weight)
        for observer in self._observers:
            observer.update(outputs, targets, sample_weight)

    def _share(self, device: torch.device) -> None:
        """Take in what the other ranks saw, in the order in which a single one would have seen it."""
        means = [self._mean] if self._unweighted is None else [self._mean, self._unweighted[1]]
        for mean in means:
            mean.share()
        self._batches = int(ranks.sums([self._batches])[0])
        if self._shared:
            kept = [tuple(_copied(part) for part in seen) for seen in self._kept]
            for together in zip_longest(*ranks.gather(kept)):
                for seen in together:
                    if seen is not None:
                        self._see(*(part if _is_meta(part) else batches.to_device(part, device) for part in seen))
        self._kept = []

    @property
    def bad_batch(self) -> int | None:
        """Index of the first batch whose loss is not finite; None if there is none or it is not known."""
        return self._mean.bad

    def values(self) -> dict[str, float]:
        """Everything by name: ``val/loss``, ``val/loss_unweighted``, ``val/loss_left``, ``val/<metric>``, ...

        Raises:
            ValueError: No batch was added.
        """
        if not self._batches:
            raise ValueError("the validation loader is empty: it gave no batch (a generator can be iterated once only)")
        self._mean.pull()
        values = {"val/loss": self._mean.value}
        if self._unweighted is not None:
            self._unweighted[1].pull()
            if self._unweighted[1].weight:  # an own validation_step may not feed it
                values["val/loss_unweighted"] = self._unweighted[1].value
        if self._targets is not None:
            self.baseline, self._targets = self._targets.baseline(), None
        if self.baseline is not None:
            values["val/loss_left"] = self.baseline.left(self._mean.value)
        return values | {f"val/{name}": value for name, value in self._metrics.compute().items()}


def _copied(part: Any) -> Any:
    """On the host, and without the rest of what it is a view of, which would travel along."""
    return part.detach().cpu().clone() if isinstance(part, Tensor) and not part.is_meta else part


def _is_meta(part: Any) -> bool:
    return isinstance(part, Tensor) and part.is_meta


def expected_baseline(loss: Any, train_loader: Any, val_loader: Any) -> Baseline | None:
    """The baseline before any validation, where both data sets show their targets; else None.

    The number of classes is that of the loss, else taken from the labels; the first validation, which sees the
    outputs, says it for sure. An own ``collate_fn`` may give other targets than the data set shows.
    """
    loaders = (train_loader, val_loader)
    if not all(isinstance(x, DataLoader) and x.collate_fn in (default_collate, default_convert) for x in loaders):
        return None
    with suppress(*FAILURES):  # it is a line in a report; what is wrong with the data, training explains
        return _expected(loss, train_loader, val_loader)
    return None


def _expected(loss: Any, train_loader: DataLoader[Any], val_loader: DataLoader[Any]) -> Baseline | None:
    train, val = exposed_targets(train_loader), exposed_targets(val_loader)
    if train is None or val is None or not (len(train[0]) and len(val[0])):
        return None
    targets, weight = val
    output = targets
    if not isinstance(loss, (BinaryCrossEntropy, MeanSquaredError)) and not targets.is_floating_point():
        ignore_index = getattr(loss, "ignore_index", None)
        kept = [labels if ignore_index is None else labels[labels != ignore_index] for labels in (train[0], targets)]
        both = torch.cat([labels.flatten() for labels in kept])
        if targets.dtype is torch.bool or not len(both) or int(both.min()) < 0:  # the validation will tell
            return None
        classes, fixed = int(both.max()) + 1, loss.fixed_classes if isinstance(loss, Loss) else None
        if fixed is not None and fixed < classes:
            return None
        classes = fixed or classes
        output = torch.empty((len(targets), classes, *targets.shape[1:]), device="meta")
    elif isinstance(loss, ClassLoss) and targets.dim() != 2:
        return None
    sums = TargetSums(loss)
    sums.update(output, targets, weight)
    return sums.baseline()
