"""Noise of a loss curve, and tests for a trend in it."""

import math
from operator import mul
from statistics import median

from attrs import define, field

from fitwatch.rules.stateful import Stateful

MIN_DIFFERENCES = 4  # needed to estimate noise
_MIN_HALF = 3  # points needed in each half of a curve
_SPIKE = 4.0  # standard deviations above both neighbors
_PARABOLA = 16  # losses that a parabola follows well enough
_MOST_CORRELATED = 2.5  # times what second differences show; 1.5 for a lag-one correlation of .5, 2.6 for .8
_MIN_WHITE, _WHITE_BENDS = 8, -2 / 3  # the latter: lag-one correlation of the second differences of white noise
_ROUNDING = 1e-12
_BENDS_ERROR = 1.2  # over the root of the number of losses: about two standard errors of that correlation


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
        last: The last of them.
    """

    count: int = field(default=0, init=False)
    total: float = field(default=0.0, init=False)
    moment: float = field(default=0.0, init=False)
    last: float = field(default=0.0, init=False)

    def add(self, rise: float) -> None:
        """Add the next loss, given as its difference from the reference."""
        self.count += 1
        self.total += rise
        self.moment += self.count * rise
        self.last = rise

    def replace(self, rise: float) -> None:
        """Let ``rise`` take the place of the last one, if there is one."""
        if self.count:
            self.total += rise - self.last
            self.moment += self.count * (rise - self.last)
            self.last = rise

    @property
    def slope(self) -> float:
        """b; 0 for fewer than 3 losses."""
        if self.count < 3:
            return 0.0
        return (self.moment - (self.count + 1) / 2 * self.total) / (self.count * (self.count**2 - 1) / 12)

    @property
    def t_statistic(self) -> float:
        """Slope over its standard error for noise of standard deviation 1: b sqrt(S); 0 for fewer than 3 losses."""
        return self.slope * math.sqrt(self.count * (self.count**2 - 1) / 12)


def noise_level(losses: list[float]) -> float:
    """Estimate the standard deviation of a loss about the trend of its curve; infinite for fewer than 5 losses.

    Second differences cancel the slope: a curve that flattens has steps of every size without any noise.
    """
    bends = _bends(losses)
    if len(bends) < MIN_DIFFERENCES - 1:
        return math.inf
    # 1.4826 turns the MAD of a normal variable into its standard deviation, and a second difference has sqrt(6) times
    # the noise of one loss. From few differences the estimate is often far too small, which causes false alarms: the
    # last factor corrects for that.
    return 1.4826 * median(map(abs, bends)) / math.sqrt(6) * (1 + 2 / (len(bends) + 1)) ** 2


def noise_and_lag(losses: list[float]) -> tuple[float, float]:
    """Return the noise, and the correlation of successive residuals about the parabola through the last 16 losses.

    Second differences miss noise that is correlated between evaluations; the residuals do not. The noise is the larger
    of the two, but at most 2.5 times the former, since a single outlier enlarges the residuals for long.
    """
    quick = noise_level(losses)
    spread, lag = _scatter(_settled(losses))
    return max(quick, min(spread, _MOST_CORRELATED * quick)), lag


def widening(lag: float) -> float:
    """Return by how much a lag-one correlation widens the standard error of a slope: sqrt((1 + r) / (1 - r))."""
    lag = min(max(lag, 0.0), 0.9)
    return math.sqrt((1 + lag) / (1 - lag))


def white_noise(losses: list[float]) -> float:
    """Return the deviation of losses from their parabola, widened by its correlation; infinite if they wander.

    Second differences of white noise have a lag-one correlation of -2/3. It is larger where a curve wanders, as that of
    a small validation set does. Fewer than 8 losses do not tell.
    """
    if len(losses) < _MIN_WHITE:
        return math.inf
    bends = _bends(losses)
    total = sum(map(mul, bends, bends))
    if total <= _ROUNDING**2 * sum(map(mul, losses, losses)):
        return 0.0  # a straight line
    if sum(map(mul, bends, bends[1:])) > (_WHITE_BENDS + _BENDS_ERROR / math.sqrt(len(losses))) * total:
        return math.inf
    spread, lag = _scatter(losses)
    return widening(lag) * spread


def is_spike(before: list[float], loss: float, after: float) -> bool:
    """Return whether a loss is above both its neighbors by more than 4 standard deviations of the losses before it."""
    return min(loss - before[-1], loss - after) > _SPIKE * noise_level([x for x in before if math.isfinite(x)])


def _settled(losses: list[float]) -> list[float]:
    """Return the last 16 losses; of a shorter curve, those after its steep start, which no parabola follows.

    The start ends with the first loss that a later one exceeds.
    """
    if len(losses) > _PARABOLA:
        return losses[-_PARABOLA:]
    start = 0
    while len(losses) - start > MIN_DIFFERENCES + 1 and losses[start] > max(losses[start + 1 :]):
        start += 1
    return losses[start:]


def _scatter(losses: list[float]) -> tuple[float, float]:
    """Return the standard deviation about the least-squares parabola, and the lag-one correlation; 0 if unknown."""
    count = len(losses)
    if count < MIN_DIFFERENCES + 1:
        return 0.0, 0.0
    line = [i - (count - 1) / 2 for i in range(count)]
    bow = [u * u - (count * count - 1) / 12 for u in line]
    rest = losses
    for shape in ([1.0] * count, line, bow):  # orthogonal to each other
        part = sum(map(mul, shape, rest)) / sum(map(mul, shape, shape))
        rest = [loss - part * height for loss, height in zip(rest, shape, strict=True)]
    total = sum(map(mul, rest, rest))
    if not 0 < total < math.inf:
        return 0.0, 0.0
    return math.sqrt(total / (count - 3)), sum(map(mul, rest, rest[1:])) / total


def _bends(losses: list[float]) -> list[float]:
    return [a - 2 * b + c for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)]


def is_falling(losses: list[float], least: float) -> bool:
    """Return whether the newer half is lower than the older by more than 2 standard errors and ``least``.

    The newer half must also fall within itself, by more than 1 standard error and ``least / 4``: a fall long ago does
    not count. Non-finite losses and spikes that are gone are ignored.
    """
    losses = [loss for loss in losses if math.isfinite(loss)]
    half = len(losses) // 2
    if half < _MIN_HALF:
        return False
    noise = noise_level(losses)
    losses = _without_spikes(losses, noise)
    if _fall(losses) <= max(2 * noise * math.sqrt(2 / half), least):
        return False
    newer = losses[-half:]
    return _fall(newer) > max(noise * math.sqrt(2 / (half // 2)), least / 4)


def _without_spikes(losses: list[float], noise: float) -> list[float]:
    inner = zip(losses, losses[1:], losses[2:], strict=False)
    level = [(a + c) / 2 if min(b - a, b - c) > _SPIKE * noise else b for a, b, c in inner]
    return [losses[0], *level, losses[-1]]


def _fall(losses: list[float]) -> float:
    half = len(losses) // 2
    return (sum(losses[:half]) - sum(losses[-half:])) / half
