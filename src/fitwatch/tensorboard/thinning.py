"""Long curves in few points: TensorBoard's server shows a thousand of a curve, chosen at random."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import asdict, define

from fitwatch.data.sharding import split_length
from fitwatch.state import State

FULL = 500
"""Points of a curve before any are merged."""

LIMIT = 750
"""Points of a curve when its fit ends, about: where that comes later than foreseen there are a few more."""


@define
class _Curve:
    written: int = 0  # points
    seen: int = 0  # values, merged or not
    first: int = 0  # step of the first value
    stride: int = 1  # values in the next point
    count: int = 0  # values waiting for it
    value: float = 0.0  # of those: their sum, their maximum, or the last
    step: int = 0  # of the last of those
    how: str = "mean"
    fresh: bool = False  # whether the fit that runs has yet to write its first point

    def point(self) -> tuple[int, float]:
        """What stands for the values that wait."""
        value = self.value / self.count if self.how == "mean" else self.value
        self.written, self.count, self.value, self.fresh = self.written + 1, 0, 0.0, False
        return self.step, value

    def plan(self, horizon: int) -> int:
        """How many values the next point is to stand for, if the curve goes on to the step ``horizon``."""
        if self.written < FULL or self.seen < 2 or self.step <= self.first:
            return 1
        if self.written >= LIMIT:  # the horizon was wrong: as many as there were, so that there are few more
            return self.seen
        to_come = (horizon - self.step) * (self.seen - 1) / (self.step - self.first)
        return max(1, math.ceil(to_come / (LIMIT - self.written)))


class Thinner:
    """Merges consecutive values of a curve once it is long, so that it has at most 1,000 points.

    The first `FULL` points are the values as they come. After that a point stands for so many values that the curve
    will have `LIMIT` points when the fit ends. Where it has more than `FULL` of them before another fit (`crowded`),
    the written points are to be merged by `merged`. What has a maximum for a value keeps it. All others are averaged,
    or the last one taken.
    """

    def __init__(self) -> None:
        self._curves: dict[str, _Curve] = {}

    def crowded(self) -> dict[str, tuple[str, float]]:
        """The curves that leave another fit too few points: what stands for several values, and where they begin."""
        found = {tag: curve for tag, curve in self._curves.items() if curve.written > FULL}
        return {tag: (c.how, c.first - (c.step - c.first) / max(1, c.seen - 1)) for tag, c in found.items()}

    def shortened(self, points: Mapping[str, int]) -> None:
        """Take note of how many points are left of some curves."""
        for tag, left in points.items():
            self._curves[tag].written = left

    def begin(self) -> None:
        """Begin a fit. The next value is a point of its curve at once: no server shows older ones beyond it."""
        for curve in self._curves.values():
            curve.fresh = True

    def add(self, tag: str, step: int, value: float, how: str, horizon: int) -> tuple[int, float] | None:
        """Take a value in.

        Args:
            tag: Of the curve, sub-run and all.
            step: Where it was measured.
            value: What was measured.
            how: What stands for several values: ``"mean"``, ``"max"`` or ``"last"``.
            horizon: The step at which the fit is expected to end.

        Returns:
            The point to write now, as step and value; None: later.
        """
        curve = self._curves.get(tag)
        if curve is None:
            curve = self._curves[tag] = _Curve(first=step)
        if not curve.count:
            curve.stride, curve.how, curve.value = curve.plan(horizon), how, value
        elif curve.how == "mean":
            curve.value += value
        elif curve.how == "last" or not value <= curve.value:  # written so that a NaN gets in ...
            curve.value = value if curve.how == "last" or not math.isnan(curve.value) else curve.value  # and stays
        curve.count, curve.seen, curve.step = curve.count + 1, curve.seen + 1, step
        due = curve.fresh or curve.count >= curve.stride
        return curve.point() if due else None

    def rest(self) -> Iterator[tuple[str, tuple[int, float]]]:
        """The points for all values that still wait."""
        for tag, curve in self._curves.items():
            if curve.count:
                yield tag, curve.point()

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Where each curve stands."""
        return {tag: asdict(curve) for tag, curve in self._curves.items()}

    def load_state_dict(self, state_dict: dict[str, dict[str, Any]]) -> None:
        """Take it back."""
        self._curves = {tag: _Curve(**curve) for tag, curve in state_dict.items()}


def merged(points: Sequence[tuple[int, float]], how: str, begin: float) -> list[float | None]:
    """A curve with `FULL` points at most, evenly over its steps: what becomes of each value; None: the point goes.

    The steps are cut into `FULL` equal parts, and the last point of each stands for all in it: for their mean by the
    steps that each stands for, their maximum, or as it is. Halving would do too, but it would halve the oldest fit
    again before each new one, until nothing is left of it.

    Args:
        points: Step and value, the steps rising.
        how: What stands for several values: ``"mean"``, ``"max"`` or ``"last"``.
        begin: Step from which on the first point stands for the curve.
    """
    values: list[float | None] = [value for _, value in points]
    if len(points) <= FULL:
        return values
    first, last, before = points[0][0], points[-1][0], begin
    waiting: list[tuple[float, float]] = []  # of a part: value, and for how many steps it stands
    for i, (step, value) in enumerate(points):
        waiting.append((value, step - before))
        before = step
        part = (step - first) * FULL // (last - first + 1)
        if step != last and (points[i + 1][0] - first) * FULL // (last - first + 1) == part:
            values[i] = None
            continue
        numbers = [number for number, _ in waiting]
        if how == "max":
            values[i] = math.nan if any(map(math.isnan, numbers)) else max(numbers)
        elif how == "mean" and len(waiting) > 1:
            values[i] = sum(number * length for number, length in waiting) / sum(length for _, length in waiting)
        waiting = []
    return values


def horizon(state: State) -> int:
    """The step at which the fit will end, as far as one can tell; else four times as many as were done."""
    p, ends = state.progress, []
    if state.plan.max_steps is not None:
        ends.append(p.first_step + state.plan.max_steps)
    if state.plan.epochs is not None:
        batches, done = split_length(state.train_loader), p.epoch - p.first_epoch
        if done:
            ends.append(p.first_step + state.plan.epochs * (p.step - p.epoch_step - p.first_step) // done)
        elif batches and p.epoch_batch:  # several batches may make a step
            ends.append(p.first_step + state.plan.epochs * batches * p.epoch_step // p.epoch_batch)
    return min(ends, default=4 * p.step)
