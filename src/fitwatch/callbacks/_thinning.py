"""Long curves in few points: TensorBoard's server shows a thousand of a curve, chosen at random."""

import math
from collections.abc import Iterator
from typing import Any

from attrs import asdict, define

from fitwatch import loading
from fitwatch.state import State

FULL = 500
"""Points of a curve before any are merged."""

MOST = 1000
"""Points of a curve, however long it gets."""


@define
class _Curve:
    written: int = 0  # points
    limit: int = 0  # of points, for the fit that runs
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
        if self.written >= self.limit:  # the horizon was wrong: as many as there were, so that there are few more
            return self.seen
        to_come = (horizon - self.step) * (self.seen - 1) / (self.step - self.first)
        return max(1, math.ceil(to_come / (self.limit - self.written)))


class Thinner:
    """Merges consecutive values of a curve once it is long, so that it never has more than `MOST` points.

    The first `FULL` points are the values as they come. After that a point stands for so many values that the curve
    will have spent half of the points that were left when the fit ends; the other half is for later fits. What has a
    maximum for a value keeps it. All others are averaged, or the last one taken.
    """

    def __init__(self) -> None:
        self._curves: dict[str, _Curve] = {}

    def begin(self) -> None:
        """Begin a fit. The next value is a point of its curve at once: no server shows older ones beyond it."""
        for curve in self._curves.values():
            curve.limit, curve.fresh = _limit(curve.written), True

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
            curve = self._curves[tag] = _Curve(limit=_limit(0), first=step)
        if not curve.count:
            curve.stride, curve.how, curve.value = curve.plan(horizon), how, value
        elif curve.how == "mean":
            curve.value += value
        elif curve.how == "last" or not value <= curve.value:  # written so that a NaN gets in ...
            curve.value = value if curve.how == "last" or not math.isnan(curve.value) else curve.value  # and stays
        curve.count, curve.seen, curve.step = curve.count + 1, curve.seen + 1, step
        due = curve.fresh or curve.count >= curve.stride
        return curve.point() if due and curve.written < MOST else None

    def rest(self) -> Iterator[tuple[str, tuple[int, float]]]:
        """The points for all values that still wait."""
        for tag, curve in self._curves.items():
            if curve.count and curve.written < MOST:
                yield tag, curve.point()

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Where each curve stands."""
        return {tag: asdict(curve) for tag, curve in self._curves.items()}

    def load_state_dict(self, state_dict: dict[str, dict[str, Any]]) -> None:
        """Take it back."""
        self._curves = {tag: _Curve(**curve) for tag, curve in state_dict.items()}


def _limit(written: int) -> int:
    return MOST - (MOST - max(written, FULL)) // 2


def horizon(state: State) -> int:
    """The step at which the fit will end, as far as one can tell; else four times as many as were done."""
    p, ends = state.progress, []
    if state.max_steps is not None:
        ends.append(p.first_step + state.max_steps)
    if state.epochs is not None:
        batches, done = loading.length(state.train_loader), p.epoch - p.first_epoch
        if done:
            ends.append(p.first_step + state.epochs * (p.step - p.epoch_step - p.first_step) // done)
        elif batches and p.epoch_batch:  # several batches may make a step
            ends.append(p.first_step + state.epochs * batches * p.epoch_step // p.epoch_batch)
    return min(ends, default=4 * p.step)
