"""What is logged: values wait on their device, and cross to the host together."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from attrs import field, frozen
from torch import Tensor

from fitwatch.metrics import to_host

Name = str | tuple[str, ...]
# Gets the reduced numbers on the host, and gives name -> value: where what is logged depends on what was measured.
Receiver = Callable[[list[float]], Mapping[str, Any]]
Reduction = Literal["mean", "max", "last"] | Callable[[Tensor], Tensor]
_REDUCTIONS: dict[Any, Callable[[Tensor], Tensor]] = {
    "mean": lambda stacked: stacked.mean(0),
    "max": lambda stacked: stacked.amax(0),  # amax keeps a NaN: it must not hide behind a larger number
    "last": lambda stacked: stacked[-1],
}


@frozen
class Marker:
    """A vertical bar on the loss chart, from ``low`` to ``high`` (both in units of the loss)."""

    low: float
    high: float


@frozen
class Image:
    """A picture: the bytes of a PNG file, and its size in pixels."""

    png: bytes = field(repr=False)
    width: int
    height: int


@frozen
class Histogram:
    """How values are spread: one count for each bucket.

    Attributes:
        edges: The limits of the buckets, rising, one more than there are buckets.
        counts: How many values lie in each bucket.
        sum: Of the values.
        sum_squares: Of the values.
    """

    edges: tuple[float, ...] = field(repr=False)
    counts: tuple[int, ...] = field(repr=False)
    sum: float
    sum_squares: float


@frozen
class Record:
    """One logged value, on the host.

    Attributes:
        name: ``train/...`` or ``val/...``; for a `Marker`, the name of the event.
        step: Optimizer steps completed when it was measured.
        value: A number, a Markdown text, a `Marker`, an `Image`, or a `Histogram`.
        reduce: What stands for the window: ``"mean"``, ``"max"`` or ``"last"``; empty where a function did it.
    """

    name: str
    step: int
    value: float | str | Marker | Image | Histogram
    reduce: str = ""

    @property
    def merge(self) -> str:
        """What is to stand for several windows, as in ``reduce``; where that is empty, the name tells."""
        return self.reduce or ("max" if "_max/" in f"{self.name}/" else "mean")


class Window:
    """The values logged since the window opened."""

    def __init__(self) -> None:
        self._values: dict[Name | Receiver, tuple[Reduction, list[Any]]] = {}

    def add(self, name: Name | Receiver, value: float | Tensor, reduce: Reduction) -> None:
        """Take a value in; costs no synchronisation."""
        how, values = self._values.get(name, (reduce, None))
        if values is None:
            if not (callable(reduce) or reduce in _REDUCTIONS):
                raise ValueError(f"log({name!r}): reduce must be a function or in {list(_REDUCTIONS)}, got {reduce!r}")
            values = []
            self._values[name] = reduce, values
        elif isinstance(reduce, str) and reduce != how:
            raise ValueError(f"log({name!r}): reduce was {how!r} for earlier values of this window, now {reduce!r}")
        # a copy: what it was taken from may change before the window closes
        values.append(value.detach().clone() if isinstance(value, Tensor) else value)

    def close(self, step: int) -> list[Record]:
        """Reduce everything on its device, move it to the host in one transfer, and open a new window."""
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
