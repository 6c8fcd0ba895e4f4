"""Exact weighted means and metrics over a whole data set, without waiting for the device."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn

from fitwatch import ranks
from fitwatch.data.joining import NotJoinableError, join, mapped, tensors
from fitwatch.helpers.dtypes import wide_float


@runtime_checkable
class MetricObject(Protocol):
    """A metric updated batch by batch, such as those of torchmetrics."""

    def reset(self) -> object:
        """Forget everything seen."""

    def update(self, outputs: Any, targets: Any, /) -> object:
        """Add a batch; a third parameter named ``sample_weight`` receives the weights of the examples."""

    def compute(self) -> Any:
        """Return the value, as for a `MetricFunction`."""


MetricFunction = Callable[..., Any]
"""A function of (outputs, targets), and of ``sample_weight`` if it has such a parameter, over the whole data set.

It returns a number, a vector with a number for each class, or a dict of these.
"""

Metric = MetricFunction | MetricObject


def to_host(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Copy tensors to the host in one transfer, with one synchronization, as flat lists of floats."""
    if not tensors:
        return []
    device = next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)
    flat = [t.detach().reshape(-1) for t in tensors]
    if len({(t.device, t.dtype) for t in flat}) > 1 or not flat[0].is_floating_point():
        flat = [t.to(device, wide_float(device)) for t in flat]
    numbers = (torch.cat(flat) if len(flat) > 1 else flat[0]).tolist()
    parts, start = [], 0
    for t in tensors:
        parts.append(numbers[start : start + t.numel()])
        start += t.numel()
    return parts


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode without gradients; afterwards restore the mode of every module."""
    modes = [(module, module.training) for module in model.modules()]  # the user may have frozen some layers
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(modes[0][1])
        for module, training in modes:
            module.training = training


class WeightedMean:
    """sum(w l) / sum(w) over any number of batches; values stay on their device until `pull`.

    Attributes:
        bad: Index of the first pulled batch with a non-finite total; None if there is none, or if it is unknown
            because 1,024 batches or more were summed before the pull.
    """

    def __init__(self) -> None:
        self.total, self.weight = 0.0, 0.0
        self.bad: int | None = None
        self._batches, self._folded = 0, False
        self._totals: list[Tensor] = []
        self._weights: list[Tensor | float] = []

    def add(self, total: Tensor, weight: Tensor | float) -> None:
        """Add one batch: ``total`` = sum(w l), 0-dim, ``weight`` = sum(w). Costs no synchronization."""
        self._batches += 1
        self._totals.append(total.detach())
        self._weights.append(weight)
        if len(self._totals) >= 1024:  # a fit that never logs must not keep a tensor for every step
            self._fold()

    def recent(self, batches: int) -> tuple[list[Tensor], list[Tensor | float]]:
        """Return the totals and the weights of the last batches, unless they have been pulled or summed: then none."""
        if not 0 < batches <= len(self._totals) - self._folded:
            return [], []
        return self._totals[-batches:], self._weights[-batches:]

    def newest(self, batches: int) -> float:
        """Return the mean over the last batches, as `recent` has them; NaN for none."""
        totals, weights = self.recent(batches)
        weight = sum(map(float, weights))
        return sum(map(float, totals)) / weight if weight else math.nan

    def drop(self, batches: int) -> None:
        """Take back the last batches, unless they have been pulled or summed."""
        if 0 < batches <= len(self._totals) - self._folded:
            del self._totals[-batches:], self._weights[-batches:]
            self._batches -= batches

    def pull(self) -> tuple[float, float]:
        """Copy pending values to the host; return their (total, weight)."""
        if not self._totals:
            return 0.0, 0.0
        weights = [w for w in self._weights if isinstance(w, Tensor)]
        new = to_host([torch.stack(values) for values in (self._totals, weights) if values])
        total = ranks.exact_sum(new[0])
        weight = ranks.exact_sum([w for w in self._weights if not isinstance(w, Tensor)])
        weight += ranks.exact_sum(new[1]) if weights else 0.0
        if self.bad is None and not math.isfinite(total):
            at = next((i for i, value in enumerate(new[0]) if not math.isfinite(value)), 0)
            if at or not self._folded:
                self.bad = self._batches - len(self._totals) + at
        self._totals, self._weights, self._folded = [], [], False
        self.total, self.weight = self.total + total, self.weight + weight
        return total, weight

    def share(self) -> None:
        """Sum over all ranks, so that `value` is their common mean."""
        self.pull()
        self.total, self.weight = ranks.sums([self.total, self.weight])
        if not math.isfinite(self.total):
            found = enumerate(ranks.gather(self.bad))
            self.bad = min((i * ranks.size() + rank for rank, i in found if i is not None), default=None)

    def _fold(self) -> None:
        device = self._totals[0].device
        wide = wide_float(device)
        self._totals, self._folded = [torch.stack([t.to(wide) for t in self._totals]).sum()], True
        self._weights = [torch.stack([torch.as_tensor(w, dtype=wide, device=device) for w in self._weights]).sum()]

    @property
    def value(self) -> float:
        """The mean of the pulled batches; NaN if the weights sum to 0."""
        return self.total / self.weight if self.weight else math.nan


class RunningLoss:
    """The training loss since the last evaluation and since the last log window.

    Attributes:
        since_evaluation: Sum and weight since the last evaluation.
        examples: Training examples seen in this fit by all ranks, if batch sizes are known; fresh in ``on_log``.
    """

    def __init__(self) -> None:
        self.since_evaluation = WeightedMean()
        self.examples = 0
        self._window = (0.0, 0.0)
        self._new_examples = 0

    def add(self, total: Tensor, weight: Tensor | float, examples: int = 0) -> None:
        """Add one batch: ``total`` = sum(w l), 0-dim, and ``weight`` = sum(w). Costs no synchronization."""
        self.since_evaluation.add(total, weight)
        self._new_examples += examples

    def recent(self, batches: int) -> tuple[list[Tensor], list[Tensor | float]]:
        """Return the totals and the weights of the last batches, which were not pulled yet."""
        return self.since_evaluation.recent(batches)

    def newest(self, batches: int) -> float:
        """Return the mean over the last batches, which were not pulled yet; waits for the device."""
        return self.since_evaluation.newest(batches)

    def drop(self, batches: int) -> None:
        """Take back the last batches, whose step was left out."""
        self.since_evaluation.drop(batches)

    def pull(self) -> None:
        """Copy pending values to the host; waits for the device."""
        total, weight = self.since_evaluation.pull()
        self._window = (self._window[0] + total, self._window[1] + weight)

    def close_window(self) -> list[float]:
        """Return total, weight and examples of this rank's log window, and start the next one."""
        self.pull()
        closed = [*self._window, float(self._new_examples)]
        self._window, self._new_examples = (0.0, 0.0), 0
        return closed

    def close_evaluation(self) -> float:
        """Return the mean over all ranks since the last evaluation, and reset it; all ranks call it."""
        self.pull()
        self.since_evaluation.share()
        value = self.since_evaluation.value
        self.since_evaluation = WeightedMean()
        return value


def as_metrics(metrics: Mapping[str, Metric] | None) -> dict[str, Metric]:
    """Return metrics by name.

    Raises:
        TypeError: They are not a dict, or one of them is not a metric.
        ValueError: A name is taken.
    """
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(
            "metrics must be a dict name -> function (outputs, targets) or object with update, compute and reset, got "
            f"{type(metrics).__name__}"
        )
    Metrics(found := dict(metrics or {}))  # checks them
    return found


class Metrics:
    """Computes metrics over a whole data set in one pass.

    A function receives all outputs and targets at once, so its value does not depend on the batches, even if it is not
    a mean (recall, F1, AUC). An object with ``update``, ``compute`` and ``reset`` (as in torchmetrics) is updated batch
    by batch; prefer it if the outputs of the whole set are too large to keep, or can't be joined. A function, or an
    ``update``, with a parameter ``sample_weight`` also receives the weights of the examples.

    Outputs and targets may be tensors, or tuples, lists, dicts or dataclasses of tensors.

    Args:
        metrics: Name -> function of (outputs, targets), or such an object. Its value is a number, a vector with a
            number for each class, which becomes ``name/0``, ``name/1``, ..., or a dict, which becomes ``name/<key>``.
        classes: Names of the classes, for vectors of that length instead of the indices.
    """

    def __init__(self, metrics: Mapping[str, Metric], classes: Sequence[str] | None = None) -> None:
        self._classes = classes
        self._functions: dict[str, MetricFunction] = {}
        self._objects: dict[str, MetricObject] = {}
        for name, metric in metrics.items():
            if name in ("loss", "loss_unweighted", "loss_vs_baseline"):
                raise ValueError(f"metrics can't be named {name!r}: val/{name} is taken by the validation loss")
            if isinstance(metric, type):
                raise TypeError(
                    f"metrics[{name!r}] is the class {metric.__name__}: use an instance, {metric.__name__}(...)"
                )
            if _is_object(metric):
                self._objects[name] = metric
                if ranks.size() > 1:
                    _show_all(metric)
            elif callable(metric):
                self._functions[name] = metric
            else:
                raise TypeError(
                    f"metrics[{name!r}] must be a function (outputs, targets) -> number or an object with "
                    f"update, compute and reset, got {type(metric).__name__}"
                )
        updates = {name: metric.update for name, metric in self._objects.items()}
        calls: dict[str, Callable[..., object]] = {**self._functions, **updates}
        self._weighted = {name for name, call in calls.items() if _takes_weights(call)}
        self._outputs: list[Any] = []
        self._targets: list[Any] = []
        self._weights: list[Tensor] = []
        self._batches = 0
        for metric in self._objects.values():
            metric.reset()

    def update(self, outputs: Any, targets: Any, sample_weight: Tensor | None = None) -> None:
        """Add a batch: all three with the examples along their first dimension."""
        if not (self._functions or self._objects):
            return
        self._batches += 1
        outputs = mapped(Tensor.detach, outputs)
        found = tensors(outputs)
        if self._weighted and sample_weight is None:
            like = (found or tensors(targets))[0]
            sample_weight = torch.ones(len(like), device=like.device)
        if self._functions:
            self._outputs.append(outputs)
            self._targets.append(mapped(Tensor.detach, targets))
            if self._weighted and sample_weight is not None:
                self._weights.append(sample_weight.detach())
        for name, metric in self._objects.items():
            if isinstance(metric, nn.Module) and found:  # torchmetrics do not follow the outputs' device
                metric.to(found[0].device)
            weights = {"sample_weight": sample_weight} if name in self._weighted else {}
            try:
                metric.update(outputs, targets, **weights)
            except Exception as error:
                error.add_note(f"raised by the metric {name!r}")
                raise

    def compute(self) -> dict[str, float]:
        """Return all values by name.

        Raises:
            RuntimeError: No batch was seen: a custom ``validation_step`` did not call ``update_metrics``.
            ValueError: There is a function, and the outputs or targets of the batches can't be joined; or two values
                have one name.
            TypeError: A value is not a number, a vector, or a dict of these.
        """
        names = [*self._functions, *self._objects]
        if not names:
            return {}
        if not self._batches:
            raise RuntimeError(
                f"the metrics {names} saw no batch: call self.update_metrics(outputs, targets) in validation_step"
            )
        whole = self._joined() if self._functions else ()
        weights = {"sample_weight": torch.cat(self._weights)} if self._weights else {}
        values: dict[str, float] = {}
        for name in names:
            try:
                if name in self._objects:
                    value = self._objects[name].compute()
                else:
                    value = self._functions[name](*whole, **(weights if name in self._weighted else {}))
            except Exception as error:
                error.add_note(f"raised by the metric {name!r}")
                raise
            new = _numbers(name, value, self._classes)
            if taken := sorted(values.keys() & new.keys()):
                raise ValueError(
                    f"the metric {name!r} has a value named {taken[0]!r}, and so has another metric: rename one of them"
                )
            values |= new
        return values

    def _joined(self) -> tuple[Any, Any]:
        """Return the outputs and the targets of the whole data set."""
        try:
            return join(self._outputs), join(self._targets, "the targets")
        except NotJoinableError as error:
            named = ", ".join(map(repr, self._functions))
            raise ValueError(
                f"the metric {named} is a function of all outputs and targets at once, which can't be joined: {error}. "
                "Write it as an object with reset(), update(outputs, targets) and compute(), which gets one batch at a "
                "time"
            ) from error


def _numbers(name: str, value: Any, classes: Sequence[str] | None) -> dict[str, float]:
    """Return the value of a metric as numbers by name."""
    if isinstance(value, Mapping):
        parts = {str(key): part for key, part in value.items()}
        if len(parts) < len(value):
            raise ValueError(f"the metric {name!r} has two keys of one name, among {', '.join(map(repr, value))}")
    else:
        number = _number(value)
        if number is not None:
            return {name: number}
        parts = _vector(value, classes)
    if not parts:
        given = f"shape {tuple(value.shape)}" if hasattr(value, "shape") else repr(value)
        raise TypeError(
            f"the metric {name!r} must be a number, a vector with a number for each class, or a dict of these, got "
            f"{given}"
        )
    found: dict[str, float] = {}
    for key, part in parts.items():
        new = _numbers(f"{name}/{key}", part, classes)
        if taken := sorted(found.keys() & new.keys()):
            raise ValueError(f"the metric {name!r} has two values named {taken[0]!r}: rename one of their keys")
        found |= new
    return found


def _number(value: Any) -> float | None:
    """Return a number, bool, or tensor or array of one element as a float; None for anything else."""
    if isinstance(value, Tensor):
        value = value.detach().item() if value.numel() == 1 else None
    elif hasattr(value, "ndim") and hasattr(value, "item"):  # of NumPy
        value = value.item() if value.size == 1 else None
    if value is None or isinstance(value, str):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _vector(value: Any, classes: Sequence[str] | None) -> dict[str, Any]:
    """Return the elements of a vector by class name, if known, or index; empty if it is none."""
    if isinstance(value, Tensor):
        value = value.detach().tolist() if value.dim() == 1 else ()
    elif getattr(value, "ndim", 0) == 1:  # an array of NumPy
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return {}
    keys = classes if classes is not None and len(classes) == len(value) else range(len(value))
    return dict(zip(map(str, keys), value, strict=True))


def _is_object(metric: Metric) -> TypeGuard[MetricObject]:
    return all(hasattr(metric, method) for method in ("update", "compute", "reset"))


def _show_all(metric: MetricObject) -> None:
    """Stop a torchmetrics metric, and any inside it, from summing over ranks: every rank sees the whole data set."""
    for part in metric.modules() if isinstance(metric, nn.Module) else ():
        for one in (part, getattr(part, "metric_a", None), getattr(part, "metric_b", None)):
            if one is not None and hasattr(one, "distributed_available_fn"):
                one.distributed_available_fn = _never


def _never() -> bool:
    return False


def _takes_weights(function: Callable[..., object]) -> bool:
    try:
        return "sample_weight" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a built-in has no signature
        return False
