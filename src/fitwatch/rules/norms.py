"""Running statistics of gradient norms in bounded memory: quantiles, and a norm to clip to."""

import math
import statistics
from collections.abc import Iterable

from attrs import define, field

from fitwatch.rules.stateful import Stateful

_WIDTH = math.log(1.01)  # of a bucket
_ZERO = -(10**6)  # bucket of 0: 1.01 to this power is 0
_BLOCK = 20  # norms per level
_CLIP_QUANTILE = 0.95


@define(slots=False)
class LogHistogram(Stateful):
    """Counts values in buckets 1% wide, so that quantiles are accurate to 0.5%.

    Positive floats fill at most about 140,000 buckets; the norms of a training run fill a few hundred.
    """

    total: int = field(default=0, init=False)
    _counts: dict[int, int] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self._order: list[int] = []  # the buckets in order, unless one was added
        self._ordered = self._counts  # whose buckets these are: a loaded state brings others

    def add(self, values: Iterable[float]) -> None:
        """Count finite values of 0 or more."""
        for value in values:
            bucket = round(math.log(value) / _WIDTH) if value > 0 else _ZERO
            self._counts[bucket] = self._counts.get(bucket, 0) + 1
            self.total += 1

    def quantile(self, share: float) -> float | None:
        """Return the value that ``share`` (0 to 1) of all values do not exceed; None before the first value."""
        left = max(1.0, share * self.total)
        if self._ordered is not self._counts or len(self._order) != len(self._counts):
            self._ordered, self._order = self._counts, sorted(self._counts)
        for bucket in self._order:
            left -= self._counts[bucket]
            if left <= 0:
                return math.exp(bucket * _WIDTH)
        return None

    def share_above(self, value: float) -> float:
        """Return the share of all values above ``value``, which must be positive; NaN before the first value."""
        own = round(math.log(value) / _WIDTH)
        above = sum(count for bucket, count in self._counts.items() if bucket > own)
        return above / self.total if self.total else math.nan


@define
class ClipAdvice(Stateful):
    """Suggests a norm that clips spikes only: the 0.95 quantile of norms over their level, times the largest level.

    A level is the median of 20 consecutive norms. As training converges, norms fall by orders of magnitude, so a
    quantile of the norms themselves would describe the end of training and clip the steps that do most of the work.
    """

    _level: float = field(default=0.0, init=False)  # the largest so far
    _relative: LogHistogram = field(factory=LogHistogram, init=False)  # norms over the level of their block
    _block: list[float] = field(factory=list, init=False)

    def add(self, norms: Iterable[float]) -> None:
        """Add finite norms in order."""
        self._block += norms
        while len(self._block) >= _BLOCK:
            block, self._block = self._block[:_BLOCK], self._block[_BLOCK:]
            level = statistics.median(block)
            if level > 0:
                self._level = max(self._level, level)
                self._relative.add(norm / level for norm in block)

    @property
    def value(self) -> float | None:
        """The suggested norm; None before 20 norms."""
        relative = self._relative.quantile(_CLIP_QUANTILE)
        return None if relative is None else relative * self._level
