"""Logged values: they wait on their device and are copied to the host together."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from attrs import field, frozen
from torch import Tensor

from fitwatch.metrics import to_host

Name = str | tuple[str, ...]
# Maps the reduced numbers, on the host, to the values to log by name.
Receiver = Callable[[list[float]], Mapping[str, Any]]
Reduction = Literal["mean", "max", "last"] | Callable[[Tensor], Tensor]
_REDUCTIONS: dict[Any, Callable[[Tensor], Tensor]] = {
    "mean": lambda stacked: stacked.mean(0),
    "max": lambda stacked: stacked.amax(0),  # amax keeps a NaN, which must not be hidden by a larger number
    "last": lambda stacked: stacked[-1],
}


@frozen
class Marker:
    """An event on the loss chart, drawn as a vertical bar. The name of its `Record` is the name of the event.

    Attributes:
        low: Lower end of the bar, in units of the loss.
        high: Upper end of the bar, in units of the loss.
    """

    low: float
    high: float


@frozen
class Image:
    """A picture.

    Attributes:
        png: The content of a PNG file.
        width: Width in pixels.
        height: Height in pixels.
    """

    png: bytes = field(repr=False)
    width: int
    height: int


@frozen
class Histogram:
    """A distribution of values as a histogram with n buckets.

    Attributes:
        edges: The n + 1 bucket edges, in ascending order.
        counts: Number of values in each of the n buckets.
        sum: Sum of all values.
        sum_squares: Sum of the squares of all values.
    """

    edges: tuple[float, ...] = field(repr=False)
    counts: tuple[int, ...] = field(repr=False)
    sum: float
    sum_squares: float


@frozen
class Record:
    """One logged value, on the host.

    A callback that writes to a tracker (set ``main_only``, so that only rank 0 writes) needs four hooks:

    - ``on_fit_start``: open the tracker. ``state.settings`` holds the Trainer's settings; callbacks may add to it in
      ``on_fit_start``, so it is complete at the first ``on_epoch_start``. If ``state.resumed``, everything logged
      beyond ``state.progress.step`` is void.
    - ``on_log``: write ``state.records``, which holds everything logged since the last ``on_log``, each value once.
      Numbers have the current step. Texts, images, histograms and markers have the step at which they were logged, and
      a name may occur several times. A number may be NaN or infinite. A marker may have a step long before the current
      one. ``on_log`` may be called twice at one step, after a log window and after a validation.
    - After a validation ``state.best`` is the best evaluation so far, or None; it is ``state.metrics`` if the newest
      evaluation is the best.
    - ``on_fit_end``: close the tracker. ``state.error`` is the exception that ended the fit, or None; otherwise
      ``state.stop_reason`` says why the fit was stopped, or is None if it ran to its end.

    Attributes:
        name: ``train/...`` or ``val/...``; for a `Marker`, the name of the event.
        step: Optimizer steps completed when the value was logged.
        value: A number, a Markdown text, a `Marker`, an `Image`, or a `Histogram`.
        reduce: How the values of the log window were reduced to this number: ``"mean"``, ``"max"`` or ``"last"``;
            empty for a custom function, and for values that are not numbers.
    """

    name: str
    step: int
    value: float | str | Marker | Image | Histogram
    reduce: str = ""

    @property
    def merge(self) -> str:
        """How to merge the numbers of several log windows: ``reduce``, or if that is empty, by the name."""
        return self.reduce or ("max" if "_max/" in f"{self.name}/" else "mean")


class Window:
    """The values of the current log window."""

    def __init__(self) -> None:
        self._values: dict[Name | Receiver, tuple[Reduction, list[Any]]] = {}

    def add(self, name: Name | Receiver, value: float | Tensor, reduce: Reduction) -> None:
        """Add a value, without waiting for the device."""
        how, values = self._values.get(name, (reduce, None))
        if values is None:
            if not (callable(reduce) or reduce in _REDUCTIONS):
                raise ValueError(f"log({name!r}): reduce must be a function or in {list(_REDUCTIONS)}, got {reduce!r}")
            values = []
            self._values[name] = reduce, values
        elif isinstance(reduce, str) and reduce != how:
            raise ValueError(f"log({name!r}): reduce was {how!r} for earlier values of this window, now {reduce!r}")
        # a copy: the original may change before the window closes
        values.append(value.detach().clone() if isinstance(value, Tensor) else value)

    def close(self, step: int) -> list[Record]:
        """Reduce all values on their device, copy them to the host in one transfer, and start a new window."""
        reduced, kinds = [], []
        for reduce, values in self._values.values():
            stacked = torch.stack([torch.as_tensor(v) for v in values])
            stacked = stacked if stacked.is_floating_point() else stacked.float()
            kinds.append("" if callable(reduce) else reduce)
            reduced.append(reduce(stacked) if callable(reduce) else _REDUCTIONS[reduce](stacked))
        records = []
        for name, kind, numbers in zip(self._values, kinds, to_host(reduced), strict=True):
            if callable(name):
                records += [Record(n, step, v) for n, v in name(numbers).items()]
                continue
            names = (name,) if isinstance(name, str) else name
            records += [Record(n, step, v, kind) for n, v in zip(names, numbers, strict=True)]
        self._values = {}
        return records
