"""A norm to clip to that cuts spikes and leaves the rest of a training as it was."""

import statistics
from collections.abc import Iterable
from typing import Any

from attrs import define, field

from fitwatch.rules.quantiles import LogHistogram

_BLOCK = 20  # norms that make a level
_QUANTILE = 0.95


@define
class ClipAdvice:
    """The 0.95 quantile of the norms over their running level, times the largest level.

    A level is the median of 20 norms in a row. The norms of a training that converges fall by orders of magnitude, so a
    quantile of the norms themselves is one of the end, and clipping to it would cut all the steps that do the work.
    """

    _level: float = field(default=0.0, init=False)  # the largest so far
    _relative: LogHistogram = field(factory=LogHistogram, init=False)  # norms over the level of their block
    _block: list[float] = field(factory=list, init=False)

    def add(self, norms: Iterable[float]) -> None:
        """Take in finite norms, in their order."""
        self._block += norms
        while len(self._block) >= _BLOCK:
            block, self._block = self._block[:_BLOCK], self._block[_BLOCK:]
            level = statistics.median(block)
            if level > 0:
                self._level = max(self._level, level)
                self._relative.add(norm / level for norm in block)

    @property
    def value(self) -> float | None:
        """None before 20 norms."""
        relative = self._relative.quantile(_QUANTILE)
        return None if relative is None else relative * self._level

    def state_dict(self) -> dict[str, Any]:
        """Everything seen so far, in plain values."""
        return {"level": self._level, "relative": self._relative.state_dict(), "block": list(self._block)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._level, self._block = state["level"], list(state["block"])
        self._relative.load_state_dict(state["relative"])
