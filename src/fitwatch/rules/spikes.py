"""Finds steps whose gradient norm is far above those of the steps before."""

from statistics import median
from typing import Final

from attrs import define, field

from fitwatch.helpers.options import integer, number
from fitwatch.rules.stateful import Stateful

_NORMAL: Final = 1.4826  # the median absolute deviation of a normal distribution, times this, is its standard deviation
_LEAST_SPREAD: Final = 0.05  # of the median: norms that hardly vary must not make a spike of the smallest rise


@define
class SpikeRule(Stateful):
    """Compares a norm with the median of the last ones, in robust standard deviations.

    A norm is a spike above median + ``deviations`` x max(1.4826 MAD, 0.05 median) of the last ``window`` norms, spikes
    among them; MAD is their median absolute deviation. Nothing is a spike before half a window is known. OLMo 2
    (arXiv 2501.00656) leaves out steps beyond 6 standard deviations of the last 128; medians keep the spikes
    themselves out of the measure. AdaGC (arXiv 2502.11034) and ZClip (arXiv 2504.02507) scale such gradients down
    instead.

    Args:
        deviations: Robust standard deviations above the median, greater than 0.
        window: Steps, 2 or more.
        longest: After so many spikes in a row the norms have a new level: the old ones are forgotten.
    """

    deviations: float = field(default=6.0, validator=number(above=0))
    window: int = field(default=128, validator=integer(2))
    longest: int = field(default=20, validator=integer(1))
    _norms: list[float] = field(factory=list, init=False)
    _in_a_row: int = field(default=0, init=False)

    def update(self, norm: float) -> bool:
        """Add the norm of a step, finite and at least 0, and return whether it is a spike."""
        spike = len(self._norms) * 2 >= self.window and norm > self.limit
        self._in_a_row = self._in_a_row + 1 if spike else 0
        if self._in_a_row > self.longest:
            self._norms, self._in_a_row, spike = [], 0, False
        self._norms = [*self._norms[1 - self.window :], norm]
        return spike

    @property
    def limit(self) -> float:
        """The largest norm that is not a spike."""
        middle = median(self._norms)
        spread = _NORMAL * median([abs(norm - middle) for norm in self._norms])
        return middle + self.deviations * max(spread, _LEAST_SPREAD * middle)
