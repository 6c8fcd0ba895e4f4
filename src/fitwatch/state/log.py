"""Values to log: kept on their device, and copied to the host together once per log window."""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Literal, cast

import torch
from torch import Tensor

from fitwatch.helpers.options import check_name
from fitwatch.measuring.metrics import to_host
from fitwatch.records import Curve, Histogram, Image, Marker, Record, Value
from fitwatch.state.progress import Progress

Reduction = Literal["mean", "max", "last"] | Callable[[Tensor], Tensor]
Receiver = Callable[[list[float]], Mapping[str, Value]]
_Names = tuple[str, ...]

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda stacked: stacked.mean(0),
    "max": lambda stacked: stacked.amax(0),  # amax propagates NaN
    "last": lambda stacked: stacked[-1],
}
_ON_HOST: dict[str, Callable[[list[float]], float]] = {
    "mean": lambda values: sum(values) / len(values),
    "max": lambda values: math.nan if any(map(math.isnan, values)) else max(values),
    "last": lambda values: values[-1],
}


class Log:
    """Collects the values to log; `State.log` is one. Call it to log a value.

    Args:
        progress: The counters of the fit; each record has their ``step``.

    Attributes:
        records: The records of the newest log window, for ``on_log``.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.records: list[Record] = []
        self._ready: list[Record] = []
        self._waiting: dict[_Names | Receiver, tuple[Reduction, list[float | Tensor]]] = {}

    def __call__(self, names: str | Sequence[str], value: Value | Tensor, *, reduce: Reduction = "mean") -> None:
        """Log a value. A tensor stays on its device until the log window closes.

        Args:
            names: ``train/...`` or ``val/...``, or a sequence of n such names for a tensor of n values.
            value: A number, a 0-dim tensor (n names: a tensor of shape (n,)), a Markdown text, a `Marker`, an `Image`,
                a `Histogram` or a `Curve`.
            reduce: How several values in one log window become one: ``"mean"``, ``"max"``, ``"last"``, or a function
                of the stacked values, shape (values, ...), that returns one number per name.

        Raises:
            ValueError: ``reduce`` is unknown, or differs from earlier values of this log window; the number of values
                is not that of the names; or the name of a `Marker` can't name a folder.
            TypeError: ``value`` can't be logged, or ``names`` are not names.
        """
        if isinstance(value, Marker):
            check_name("the name of a marker", names)
        if not isinstance(names, str) and (
            not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names)
        ):
            raise TypeError(f"log takes a name such as 'train/...', or a list of names, got {names!r}")
        if isinstance(value, (str, Marker, Image, Histogram, Curve)):
            self._ready.append(Record(str(names), self._progress.step, value))
        else:
            self._add((names,) if isinstance(names, str) else tuple(names), value, reduce)

    def defer(self, value: Tensor, receive: Receiver, *, reduce: Reduction = "mean") -> None:
        """Pass a tensor to a function once it is on the host, if the names to log depend on its values.

        Args:
            value: Any shape; several values in one log window are stacked.
            receive: Called with the reduced numbers, a flat list, when the log window closes; returns name -> value.
            reduce: As for `log`; a function may return any shape.

        Raises:
            ValueError: As for `log`.
        """
        self._add(receive, value, reduce)

    def mark(self, name: str, entry: Mapping[str, float], text: str = "") -> None:
        """Draw a vertical bar called ``name`` on the loss chart, at an evaluation of the history.

        Raises:
            ValueError: ``name`` can't name a folder: it is empty, "." or "..", or contains a slash.
        """
        check_name("the name of a marker", name)
        low = entry["train/loss"]
        bar = Marker(low, entry.get("val/loss", low), text, self._progress.step)
        self._ready.append(Record(name, int(entry["step"]), bar))

    def close_window(self, more: Mapping[str, float]) -> None:
        """Fill `records` with everything logged since the last call, and with the values in ``more``.

        Reduces on the device and copies to the host in one transfer.
        """
        self.records = (
            self._ready + self._reduced() + [Record(name, self._progress.step, value) for name, value in more.items()]
        )
        self._ready, self._waiting = [], {}

    def _add(self, key: _Names | Receiver, value: float | Tensor, reduce: Reduction) -> None:
        known = self._waiting.get(key)
        if known is None:
            if not (callable(reduce) or reduce in _REDUCTIONS):
                raise ValueError(
                    f"log({_label(key)}): reduce must be a function or one of {list(_REDUCTIONS)}, got {reduce!r}"
                )
            known = self._waiting[key] = reduce, []
            value = _checked(key, value)
        elif isinstance(reduce, str) and reduce != known[0]:
            raise ValueError(
                f"log({_label(key)}): reduce is {reduce!r} but was {known[0]!r} for earlier values of this log window"
            )
        elif _shape(value) != _shape(known[1][0]):
            value = _checked(key, value)
            if not isinstance(key, tuple):
                raise ValueError(
                    f"log.defer({_label(key)}): shape {tuple(_shape(value))}, but {tuple(_shape(known[1][0]))} for "
                    "earlier values of this log window"
                )
        # Cloned, since the original may change before the log window closes.
        known[1].append(value.detach().clone() if isinstance(value, Tensor) else value)

    def _reduced(self) -> list[Record]:
        reduced = {key: _reduce(reduce, values) for key, (reduce, values) in self._waiting.items()}
        on_device = {key: value for key, value in reduced.items() if isinstance(value, Tensor)}
        on_host = dict(zip(on_device, to_host(list(on_device.values())), strict=True))
        records = []
        for key, (reduce, _) in self._waiting.items():
            number = reduced[key]
            numbers = on_host[key] if isinstance(number, Tensor) else [number]
            kind = reduce if isinstance(reduce, str) else ""
            if isinstance(key, tuple):
                records += [Record(name, self._progress.step, v, kind) for name, v in zip(key, numbers, strict=True)]
            else:
                for name, value in key(numbers).items():
                    if isinstance(value, Marker):
                        check_name("the name of a marker", name)
                    records.append(Record(name, self._progress.step, value))
        return records


def _reduce(reduce: Reduction, values: list[float | Tensor]) -> float | Tensor:
    """Reduce the values of a log window: numbers on the host, tensors on their device."""
    if isinstance(reduce, str) and not any(isinstance(value, Tensor) for value in values):
        return _ON_HOST[reduce](cast(list[float], values))
    if isinstance(reduce, str) and len(values) == 1:
        return values[0]
    stacked = torch.stack([torch.as_tensor(v) for v in values])
    stacked = stacked if stacked.is_floating_point() else stacked.float()
    return (_REDUCTIONS[reduce] if isinstance(reduce, str) else reduce)(stacked)


def _shape(value: object) -> tuple[int, ...]:
    return getattr(value, "shape", ())


def _checked(key: _Names | Receiver, value: object) -> float | Tensor:
    """Return a value that can be logged under ``key``.

    Raises:
        TypeError: It is neither a number nor a tensor.
        ValueError: It does not have one number for each name.
    """
    call = f"log({_label(key)})" if isinstance(key, tuple) else f"log.defer({_label(key)})"
    if hasattr(value, "__array__") and not isinstance(value, (Tensor, Real)):
        value = torch.as_tensor(value)
    if not isinstance(value, (Tensor, Real)) or (isinstance(value, Tensor) and value.is_complex()):
        kind = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{call}: a value must be a number, a real tensor, a text or a record, got {kind}")
    if isinstance(value, Real):
        value = float(value)
    if isinstance(key, tuple):
        shape = _shape(value)
        if math.prod(shape) != len(key):
            what = "a number" if len(key) == 1 else f"a tensor of {len(key)} values, one for each name"
            hint = ": log its mean, or give a list of names" if len(key) == 1 else ""
            raise ValueError(f"{call}: a value must be {what}, got shape {tuple(shape)}{hint}")
        if isinstance(value, Tensor) and value.dim() > 1:
            value = value.reshape(-1)
    return value


def _label(key: _Names | Receiver) -> str:
    if not isinstance(key, tuple):
        return getattr(key, "__name__", type(key).__name__)
    return repr(key[0] if len(key) == 1 else key)
