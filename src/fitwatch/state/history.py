"""The evaluations of a fit, and which of them is the best."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, overload

Entry = dict[str, float]
"""One evaluation: ``epoch``, ``step``, ``train/loss``, ``val/loss``, ``val/<metric>``, ..."""

_LOWER_IS_BETTER = ("loss", "cost", "error")


def renamed(name: str) -> str:
    """Return today's name of a metric that a checkpoint may have under an earlier one."""
    return f"{name.removesuffix('loss_left')}loss_vs_baseline" if name.endswith("/loss_left") else name


class History(Sequence[Entry]):
    """The evaluations of a fit, and of the fits before it that it continues, oldest first.

    Attributes:
        entries: One dict per evaluation.
        facts: What the fits must share for their evaluations to compare.
        names: The metrics that this fit will measure, known before step 1.
        monitor: The metric that decides which evaluation is best.
        mode: ``"min"`` if a lower ``monitor`` is better, ``"max"`` if a higher one is.
        trained: Whether steps were trained between the last two evaluations (before the first: since the fit began).
            If not, ``train/loss`` of the newest is NaN by design.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.facts: dict[str, object] = {}
        self.start(validates=False)

    def start(self, *, validates: bool) -> None:
        """Start a fit, which continues the history: only what callbacks declared is forgotten."""
        self.names: set[str] = {"train/loss", "val/loss"} if validates else {"train/loss"}
        self.monitor = "val/loss" if validates else "train/loss"
        self.mode: Literal["min", "max"] = "min"
        self.trained = True
        self._watched: list[tuple[str, str, str | None]] = []

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> list[Entry]: ...
    def __getitem__(self, index: int | slice) -> Entry | list[Entry]:
        return self.entries[index]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    @property
    def newest(self) -> Entry:
        """The last evaluation; ``{}`` before the first."""
        return self.entries[-1] if self.entries else {}

    @property
    def best(self) -> Entry | None:
        """The evaluation with the best finite ``monitor``, the first on ties; None if there is none."""
        known = [entry for entry in self.entries if math.isfinite(entry.get(self.monitor, math.nan))]
        choose = min if self.mode == "min" else max
        return choose(known, key=lambda entry: entry[self.monitor]) if known else None

    @property
    def is_best(self) -> bool:
        """Whether the newest evaluation is the best one."""
        return bool(self.entries) and self.best is self.entries[-1]

    def watch(self, monitor: str, mode: Literal["min", "max"] | None, *, by: str) -> None:
        """See `State.watch`."""
        if not self._watched:
            self.monitor, self.mode = monitor, mode or "min"
        self._watched.append((by, monitor, mode))

    def check(self) -> None:
        """Check every watched metric before step 1.

        Raises:
            ValueError: A watched metric will not be measured (the message lists those that will), or no mode was given
                and the name does not imply one.
        """
        for by, monitor, mode in self._watched:
            parent = monitor.rpartition("/")[0]
            # A metric may be a vector or a dict; which names it has, the first validation shows.
            if monitor not in self.names and (parent not in self.names or parent in ("val/loss", "train/loss")):
                raise ValueError(
                    f"{by} monitors {monitor!r}, which this fit will not measure; "
                    f"it will measure {', '.join(sorted(self.names))}"
                )
            if mode is None and not any(word in monitor for word in _LOWER_IS_BETTER):
                raise ValueError(f'{by} monitors {monitor!r}: pass mode="min" or mode="max", the name implies neither')
