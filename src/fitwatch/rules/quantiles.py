"""Quantiles of any number of positive values, in bounded memory."""

import math
from collections.abc import Iterable
from typing import Any

_WIDTH = math.log(1.01)
_ZERO = -(10**6)  # the bucket of 0: 1.01 to this power is 0


class LogHistogram:
    """Counts values in buckets that are 1 % wide, so that a quantile is right within 0.5 %.

    Every value counts, in whatever order; positive floats fill at most some 140,000 buckets, and those of a training a
    few hundred.
    """

    def __init__(self) -> None:
        self.total = 0
        self._counts: dict[int, int] = {}

    def add(self, values: Iterable[float]) -> None:
        """Count values that are finite and not negative."""
        for value in values:
            bucket = round(math.log(value) / _WIDTH) if value > 0 else _ZERO
            self._counts[bucket] = self._counts.get(bucket, 0) + 1
            self.total += 1

    def quantile(self, share: float) -> float | None:
        """The value that ``share`` (0 to 1) of all values do not exceed; None if there is none yet."""
        left = max(1.0, share * self.total)
        for bucket in sorted(self._counts):
            left -= self._counts[bucket]
            if left <= 0:
                return math.exp(bucket * _WIDTH)
        return None

    def share_above(self, value: float) -> float:
        """The share of all values that exceed ``value``, which is above 0; NaN if there is none yet."""
        own = round(math.log(value) / _WIDTH)
        above = sum(count for bucket, count in self._counts.items() if bucket > own)
        return above / self.total if self.total else math.nan

    def state_dict(self) -> dict[str, Any]:
        """The buckets in use and their counts."""
        return {"buckets": list(self._counts), "counts": list(self._counts.values())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._counts = dict(zip(state["buckets"], state["counts"], strict=True))
        self.total = sum(state["counts"])
