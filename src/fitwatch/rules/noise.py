"""Noise of a loss curve, and tests for a trend in it."""

import math
from statistics import median

from attrs import define, field

from fitwatch.rules.stateful import Stateful

MIN_DIFFERENCES = 4  # needed to estimate noise
_MIN_HALF = 3  # points needed in each half of a curve


@define
class Trend(Stateful):
    """Least-squares line through the losses after a reference evaluation.

    For losses y_1 to y_k at 1 to k, with noise of standard deviation s, the slope is b = sum((i - (k + 1) / 2) y_i) / S
    with S = k (k^2 - 1) / 12, and its standard error is s / sqrt(S). The reference itself is left out: it was chosen
    because its loss is low, so including it would turn every lucky minimum into a trend.

    Attributes:
        count: k.
        total: Sum of the losses, each minus the loss at the reference.
        moment: Sum of i times the same.
    """

    count: int = field(default=0, init=False)
    total: float = field(default=0.0, init=False)
    moment: float = field(default=0.0, init=False)

    def add(self, rise: float) -> None:
        """Add the next loss, given as its difference from the reference."""
        self.count += 1
        self.total += rise
        self.moment += self.count * rise

    @property
    def t_statistic(self) -> float:
        """Slope over its standard error for noise of standard deviation 1: b sqrt(S); 0 for fewer than 3 losses."""
        if self.count < 3:
            return 0.0
        weight = self.count * (self.count**2 - 1) / 12
        return (self.moment - (self.count + 1) / 2 * self.total) / math.sqrt(weight)


def noise_level(losses: list[float]) -> float:
    """Estimate the standard deviation of a loss about the trend of its curve; infinite for fewer than 5 losses.

    Second differences cancel the slope: a curve that flattens has steps of every size without any noise.
    """
    bends = [a - 2 * b + c for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)]
    if len(bends) < MIN_DIFFERENCES - 1:
        return math.inf
    # 1.4826 turns the MAD of a normal variable into its standard deviation, and a second difference has sqrt(6) times
    # the noise of one loss. From few differences the estimate is often far too small, which causes false alarms: the
    # last factor corrects for that.
    return 1.4826 * median(map(abs, bends)) / math.sqrt(6) * (1 + 2 / (len(bends) + 1)) ** 2


def is_falling(losses: list[float], least: float) -> bool:
    """Return whether the newer half is lower than the older by more than 2 standard errors and ``least``.

    The newer half must also fall within itself, by more than 1 standard error and ``least / 4``: a fall long ago does
    not count. Non-finite losses are ignored.
    """
    losses = [loss for loss in losses if math.isfinite(loss)]
    half = len(losses) // 2
    if half < _MIN_HALF:
        return False
    noise = noise_level(losses)
    if _fall(losses) <= max(2 * noise * math.sqrt(2 / half), least):
        return False
    newer = losses[-half:]
    return _fall(newer) > max(noise * math.sqrt(2 / (half // 2)), least / 4)


def _fall(losses: list[float]) -> float:
    half = len(losses) // 2
    return (sum(losses[:half]) - sum(losses[-half:])) / half
