"""What the unrest of training does to a curve by itself: how noisy it is, and what looks like a trend."""

import math
from statistics import median

from attrs import define

# Fewer differences than this say nothing about noise.
MIN_DIFFERENCES = 4
# The newer and the older half of a curve need as many points each.
_MIN_HALF = 3


@define
class Trend:
    """The least-squares line through the losses since the reference, whose own loss is left out.

    Of losses y_1 to y_k, at 1 to k, with noise of standard deviation s, the slope is b = sum((i - (k + 1) / 2) y_i) / S
    with S = k (k^2 - 1) / 12, and its standard error s / sqrt(S). The reference was chosen because it is low. Counted
    in, it would make a trend of every lucky minimum; without it, what follows such a minimum has none.

    Attributes:
        count: k.
        total: Sum of the losses, each minus that of the reference.
        moment: Sum of i times that.
    """

    count: int = 0
    total: float = 0.0
    moment: float = 0.0

    def take(self, rise: float) -> None:
        """Take one more loss in, minus that of the reference."""
        self.count += 1
        self.total += rise
        self.moment += self.count * rise

    @property
    def strength(self) -> float:
        """The slope in standard errors, if the noise were 1: b sqrt(S); 0 before there are three losses."""
        if self.count < 3:
            return 0.0
        weight = self.count * (self.count**2 - 1) / 12
        return (self.moment - (self.count + 1) / 2 * self.total) / math.sqrt(weight)


def unrest(losses: list[float]) -> float:
    """Standard deviation of one loss of a curve about its trend; infinite if there are too few points.

    From second differences: a curve that flattens has steps of every size, which are no noise.
    """
    bends = [a - 2 * b + c for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)]
    if len(bends) < MIN_DIFFERENCES - 1:
        return math.inf
    # 1.4826 turns the MAD of a normal variable into its standard deviation, and a second difference has sqrt(6) times
    # the noise of one loss. Few of them often give far too small a value, which makes false alarms: hence the last
    # factor.
    return 1.4826 * median(map(abs, bends)) / math.sqrt(6) * (1 + 2 / (len(bends) + 1)) ** 2


def falls(losses: list[float], least: float) -> bool:
    """Whether the newer half is lower than the older, by more than two standard errors and ``least``, and still falls.

    Within itself it must fall by more than one standard error of its own, or a fall of long ago would count.
    """
    losses = [loss for loss in losses if math.isfinite(loss)]
    half = len(losses) // 2
    if half < _MIN_HALF:
        return False
    noise = unrest(losses)
    if _fall(losses) <= max(2 * noise * math.sqrt(2 / half), least):
        return False
    newer = losses[-half:]
    return _fall(newer) > max(noise * math.sqrt(2 / (half // 2)), least / 4)


def _fall(losses: list[float]) -> float:
    half = len(losses) // 2
    return (sum(losses[:half]) - sum(losses[-half:])) / half
