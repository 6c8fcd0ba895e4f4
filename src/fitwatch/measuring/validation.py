"""What validation measures, and one pass over a data set, split over the ranks."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fitwatch import ranks
from fitwatch.calibration.refined import Refined
from fitwatch.data.joining import mapped
from fitwatch.helpers.aliases import Loader, StateDict
from fitwatch.losses import LossSum, apply
from fitwatch.losses.base import FAILURES
from fitwatch.losses.baseline import Baseline, TargetSums
from fitwatch.measuring.example_losses import ExampleLosses
from fitwatch.measuring.kept_logits import KeptLogits
from fitwatch.measuring.metrics import Metric, Metrics, WeightedMean, evaluating

Measure = Callable[[Loader], dict[str, float]]
CalibratedMetrics = Callable[[Refined | None], dict[str, float]]
NO_BASELINE = Baseline(constant=math.nan, uniform=math.nan)
"""Marks that there is no baseline, and that none should be computed."""

CALIBRATION = ("log_loss", "refined_loss", "refined_loss_se", "temperature", "calibration_error")
"""What is reported of the calibration, if it is measured."""


class Observer(Protocol):
    """Sees every batch of a validation, and reports nothing."""

    def reset(self) -> object:
        """Forget earlier batches; called before a validation."""

    def update(self, outputs: Any, targets: Any, sample_weight: Tensor | None, /) -> object:
        """Add a batch, on the device."""


class Validation:
    """What the validations of a fit measure, and results of the newest one.

    Args:
        metrics: Name -> function or object, as for `Metrics`.
        measure: Measures other batches as validation does: batches -> ``{"loss": ..., "<metric>": ...}``. None if the
            loop can't.
        classes: The names of the classes, if the user gives them.

    Attributes:
        metrics: The metrics, including those that callbacks added.
        observers: Objects that see each batch; callbacks add theirs.
        classes: Names of the classes, if the user, the data set or a callback gives them; else None.
        named: Whether the user gives them.
        losses: The losses of the examples of the newest validation; None unless `keep_losses` was called.
        baseline: The loss of the best constant prediction; estimated before the first validation.
        bad_batch: Index of the first batch with a non-finite loss, if any.
        keeps_weights: Whether `keep_weights` was called.
        weights: In ``on_validation_end``: a copy of the weights that were measured, as a state dict. None at other
            times, and unless `keep_weights` was called.
        measures_standard_error: Whether ``val/loss_se``, the standard error of ``val/loss``, is measured.
        keeps_logits: Whether `keep_logits` was called.
        calibrated: Functions that measure more of the calibration: it -> values by name, without ``val/``.
        refined: The calibration of the newest validation; None if it is unknown, or was not measured.
        not_refined: Why the calibration is unknown; None if it is known, or was not measured.
    """

    def __init__(
        self,
        metrics: Mapping[str, Metric] | None = None,
        measure: Measure | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.metrics: dict[str, Metric] = dict(metrics or {})
        self.measure = measure
        self.observers: list[Observer] = []
        self.classes, self.named = classes, classes is not None
        self.losses: ExampleLosses | None = None
        self.baseline: Baseline | None = None
        self.bad_batch: int | None = None
        self.measures_standard_error = False
        self.keeps_weights = False
        self.weights: StateDict | None = None
        self.keeps_logits = False
        self.calibrated: list[CalibratedMetrics] = []
        self.refined: Refined | None = None
        self.not_refined: str | None = None
        self._keeps_losses = self._measured = False

    def class_names(self, number: int) -> list[str]:
        """Return the names of ``number`` classes: their indices, unless as many names are known."""
        known = self.classes is not None and len(self.classes) == number
        return list(map(str, self.classes if known and self.classes is not None else range(number)))

    def add_metric(self, name: str, metric: Metric) -> None:
        """See `State.add_metric`."""
        if name in self.metrics:
            raise ValueError(f"there are two metrics named {name!r}")
        self.metrics[name] = metric

    def keep_losses(self) -> None:
        """Keep the losses of the examples in ``losses``, computed once for all callers; call it in ``on_fit_start``."""
        self._keeps_losses = True

    def keep_weights(self) -> None:
        """Keep a copy of the measured weights in ``weights`` for ``on_validation_end``; call it in ``on_fit_start``.

        A callback may have changed the model by then: one that swaps in averaged weights for the validation swaps back.
        """
        self.keeps_weights = True

    def keep_logits(self) -> None:
        """Keep the logits of a validation until its end; see `State.measure_calibration`."""
        self.keeps_logits = True

    def measure_standard_error(self) -> None:
        """Measure ``val/loss_se``; call it in ``on_fit_start``."""
        self._keeps_losses = self.measures_standard_error = True

    def start(self, loss: Any, *, of_fit: bool = True, logits: KeptLogits | None = None) -> "Pass":
        """Start a pass: over the validation set of the fit, or over other batches, whose results are not kept.

        Args:
            loss: The loss that is measured.
            of_fit: Whether it is the validation set of the fit.
            logits: Where its logits are kept, if they are.
        """
        known = (self.baseline or NO_BASELINE) if of_fit and self._measured else None
        new = Pass(
            loss,
            self.metrics,
            known,
            observers=self.observers if of_fit else (),
            keep_losses=self._keeps_losses if of_fit else self.measures_standard_error,
            standard_error=self.measures_standard_error,
            classes=self.classes,
            logits=logits,
        )
        new.calibrated = self.calibrated
        if of_fit:
            self.losses = new.losses
        return new

    def finish(self, done: "Pass") -> None:
        """Keep the results of a completed pass."""
        self.baseline, self.bad_batch, self._measured = done.baseline, done.bad_batch, True
        self.refined = done.refined
        self.not_refined = None if done.logits is None else done.logits.unknown


class Pass:
    """One pass over a data set; values stay on their device until its end.

    Args:
        loss: The loss that is measured. If it has class weights, the loss without them is measured too.
        metrics: Name -> function or object, as for `Metrics`.
        baseline: The baseline of the loss on this data set, or `NO_BASELINE`; None: computed from the targets.
        observers: Objects that see each batch.
        keep_losses: Whether to keep the loss of each example.
        standard_error: Whether to report ``val/loss_se``, which needs ``keep_losses``.
        classes: Names of the classes, for metrics that are vectors.
        logits: Where the logits are kept, to measure the calibration.

    Attributes:
        losses: The losses of the examples, if they are kept.
        calibrated: As for `Validation`.
        refined: The calibration, known at the end.
        baseline: The baseline, known at the end.
    """

    def __init__(
        self,
        loss: Any,
        metrics: Mapping[str, Metric],
        baseline: Baseline | None = None,
        *,
        observers: Iterable[Observer] = (),
        keep_losses: bool = False,
        standard_error: bool = False,
        classes: Sequence[str] | None = None,
        logits: KeptLogits | None = None,
    ) -> None:
        self.logits = logits
        self.calibrated: Sequence[CalibratedMetrics] = ()
        self.refined: Refined | None = None
        self.loss, self.baseline = loss, None if baseline is NO_BASELINE else baseline
        self.losses = ExampleLosses(loss) if keep_losses else None
        self._standard_error = standard_error
        self._mean, self._batches, self._applied = WeightedMean(), 0, False
        self._metrics, self._observers = Metrics(metrics, classes), list(observers)
        self._unweighted = (loss.unweighted(), WeightedMean()) if getattr(loss, "has_weights", False) else None
        self._targets = TargetSums(loss) if baseline is None else None
        self._asked: list[tuple[Any, Any, Any]] = []  # what was passed to the loss since the last batch
        self._anyone_watches = bool(metrics or self._observers)
        self._shares = False  # whether ranks exchange their batches
        self._kept: list[tuple[Any, ...]] = []  # batches to exchange
        for observer in self._observers:
            observer.reset()

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """Run the body in eval mode without gradients, then merge the batches of all ranks; all ranks enter it."""
        # A rank may be the only one with an observer.
        self._anyone_watches = any(ranks.gather(self._anyone_watches))
        counted = self._targets is not None and self._targets.known
        self._shares = ranks.size() > 1 and (self._anyone_watches or counted)
        with evaluating(model), ranks.unsynchronised(model):
            try:
                yield
            except Exception as error:
                error.add_note(f"raised in a validation pass, batch {self._batches}")
                raise
            if ranks.size() > 1:
                self._share(next((p.device for p in model.parameters()), torch.device("cpu")))

    def apply(self, output: Any, target: Any, sample_weight: Any = None) -> LossSum | Tensor:
        """Return the measured loss of a batch."""
        self._applied = True
        if self.losses is not None:
            self._asked.append((output, target, sample_weight))
        return apply(self.loss, output, target, sample_weight)

    def add(self, total: Tensor, weight: Tensor | float) -> None:
        """Add the loss of a batch, as sums."""
        self._mean.add(total, weight)
        self._batches += 1
        if self.losses is not None:
            self.losses.add(self._asked)
            self._asked = []
        if not self._applied:  # a loss computed elsewhere has another baseline, which is unknown
            self.baseline = self._targets = None

    def update(self, outputs: Any, targets: Any, sample_weight: Tensor | None = None) -> None:
        """Pass the outputs and targets of a batch to the metrics and all other measurements."""
        if self._unweighted is not None:
            loss, mean = self._unweighted
            with suppress(*FAILURES):  # outputs of a step that computes another loss
                mean.add(*(loss.sums(outputs, targets, sample_weight)))
        if self.logits is not None:
            self.logits.add(outputs, targets, sample_weight)
        if self._shares:
            # The baseline needs the shape of the outputs only.
            shown = outputs if self._anyone_watches else mapped(_meta, outputs)
            self._kept.append((shown, targets, sample_weight))
        else:
            self._see(outputs, targets, sample_weight)

    def _see(self, outputs: Any, targets: Any, sample_weight: Tensor | None) -> None:
        self._metrics.update(outputs, targets, sample_weight)
        if self._targets is not None:
            try:
                self._targets.update(outputs, targets, sample_weight)
            except FAILURES:  # as above
                self._targets = None
        for observer in self._observers:
            observer.update(outputs, targets, sample_weight)

    def _share(self, device: torch.device) -> None:
        """Process the batches of all ranks, in the order of a single rank."""
        for mean in [self._mean] if self._unweighted is None else [self._mean, self._unweighted[1]]:
            mean.share()
        self._batches = int(ranks.sums([self._batches])[0])
        if self.losses is not None:
            self.losses.share(device)
        if self.logits is not None:
            self.logits.share()
        if self._shares:
            kept = [tuple(mapped(_copied, part) for part in seen) for seen in self._kept]
            for together in zip_longest(*ranks.gather(kept)):
                for seen in together:
                    if seen is not None:
                        self._see(*(mapped(lambda t: t if t.is_meta else t.to(device), part) for part in seen))
        self._kept = []

    @property
    def bad_batch(self) -> int | None:
        """Index of the first batch with a non-finite loss; None if there is none or it is unknown."""
        return self._mean.bad

    def values(self) -> dict[str, float]:
        """Return all values by name: ``val/loss``, ``val/loss_vs_baseline``, ``val/<metric>``, ...

        Raises:
            ValueError: No batch was added.
        """
        if not self._batches:
            raise ValueError(
                "no validation batch was measured: the loader is empty, or an iterator, which can be iterated once only"
            )
        self._mean.pull()
        values = {"val/loss": self._mean.value}
        if self._unweighted is not None:
            self._unweighted[1].pull()
            if self._applied and self._unweighted[1].weight:  # a step may not update it, or compute another loss
                values["val/loss_unweighted"] = self._unweighted[1].value
        if self._targets is not None:
            self.baseline, self._targets = self._targets.baseline(), None
        if self.baseline is not None:
            values["val/loss_vs_baseline"] = self.baseline.left(self._mean.value)
        metrics = {f"val/{name}": value for name, value in self._metrics.compute().items()}
        values |= metrics
        if self._standard_error and self.losses is not None:
            values["val/loss_se"] = self.losses.standard_error()
        if self.logits is not None:
            self.refined = self.logits.refined()
            if self.logits.unknown is None:
                known = dict.fromkeys(CALIBRATION, math.nan) if self.refined is None else self.refined.values()
                for measure in self.calibrated:
                    known |= measure(self.refined)
                # A metric of the user's may have such a name.
                values = {**values, **{f"val/{name}": value for name, value in known.items()}, **metrics}
        return values


def _copied(tensor: Tensor) -> Tensor:
    """Return a copy on the host: sending a view would also send the rest of its storage."""
    return tensor if tensor.is_meta else tensor.detach().cpu().clone()


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
