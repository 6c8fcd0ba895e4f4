"""Thins curves to 1,000 points: TensorBoard's server would sample longer ones at random."""

import math
from collections.abc import Iterator

from attrs import asdict, define

from fitwatch.data.sharding import steps_per_epoch
from fitwatch.helpers.aliases import StateDict
from fitwatch.state import State

LIMIT = 1000
"""Points of a curve, over all fits."""

LEAST = 20
"""Points of a fit that starts when fewer are left."""


@define
class _Curve:
    written: int = 0  # points
    before: int = 0  # points written by earlier fits
    seen: int = 0  # values of this fit, merged or not
    first: int = 0  # step of the first of them
    stride: int = 1  # values per point, for the next point
    count: int = 0  # values waiting for it
    value: float = 0.0  # their sum, their maximum, or the last of them
    step: int = 0  # of the newest value
    how: str = "mean"
    fresh: bool = False  # no point written since the fit started or resumed

    def point(self) -> tuple[int, float]:
        """Merge the waiting values into one point and return its step and value."""
        value = self.value / self.count if self.how == "mean" else self.value
        self.written, self.count, self.value, self.fresh = self.written + 1, 0, 0.0, False
        return self.step, value

    def plan(self, horizon: int) -> int:
        """Return how many values the next point stands for if the fit ends at step ``horizon``."""
        room = max(LEAST, LIMIT - self.before)
        if self.written < self.before + room // 2 or self.seen < 2 or self.step <= self.first:
            return 1
        left = self.before + room * 3 // 4 - self.written
        if left <= 0:  # the fit is longer than expected: double the distance with each point
            return self.seen
        to_come = (horizon - self.step) * (self.seen - 1) / (self.step - self.first)
        return max(1, math.ceil(to_come / left))


class Thinner:
    """Merges consecutive values of long curves, so that a fit writes at most 1,000 points of each.

    A fit has room for the points that earlier fits left of `LIMIT`, but for at least `LEAST`. Values are written
    unmerged until the room is half full, then merged so that the fit ends with three quarters of it filled: 500 and 750
    points in the first fit. If the fit takes longer, each further point stands for as many values as the fit has logged
    so far. Written points never change.

    Maxima are merged by their maximum, other values by their mean or by the last one.
    """

    def __init__(self) -> None:
        self._curves: dict[str, _Curve] = {}

    def start(self, *, resumed: bool) -> None:
        """Start or resume a fit.

        The next value of each curve is written at once, because it removes later points of the curve from a running
        server.
        """
        for curve in self._curves.values():
            curve.fresh = True
            if not resumed:
                curve.before, curve.seen = curve.written, 0

    def add(self, tag: str, step: int, value: float, how: str, horizon: int) -> tuple[int, float] | None:
        """Add the value at ``step``, and return the point to write now; None if the value waits to be merged.

        ``how`` is ``"mean"``, ``"max"`` or ``"last"``, ``horizon`` the step at which the fit is expected to end.
        """
        curve = self._curves.get(tag) or self._curves.setdefault(tag, _Curve())
        if not curve.seen:
            curve.first = step
        if not curve.count:
            curve.stride, curve.how, curve.value = curve.plan(horizon), how, value
        elif curve.how == "mean":
            curve.value += value
        elif curve.how == "last" or not value <= curve.value:  # true for NaN, which replaces a maximum ...
            curve.value = value if curve.how == "last" or not math.isnan(curve.value) else curve.value  # and stays
        curve.count, curve.seen, curve.step = curve.count + 1, curve.seen + 1, step
        return curve.point() if curve.fresh or curve.count >= curve.stride else None

    def rest(self) -> Iterator[tuple[str, tuple[int, float]]]:
        """Merge the waiting values of each curve, and yield tag and point."""
        for tag, curve in self._curves.items():
            if curve.count:
                yield tag, curve.point()

    def state_dict(self) -> dict[str, StateDict]:
        """Return the state of every curve."""
        return {tag: asdict(curve) for tag, curve in self._curves.items()}

    def load_state_dict(self, state_dict: dict[str, StateDict]) -> None:
        """Restore what `state_dict` returned."""
        self._curves = {tag: _Curve(**curve) for tag, curve in state_dict.items()}


def horizon(state: State) -> int:
    """Return the step at which the fit is expected to end; 4 times the current step if unknown."""
    p, ends = state.progress, []
    if state.plan.max_steps is not None:
        ends.append(p.first_step + state.plan.max_steps)
    if state.plan.epochs is not None:
        done, steps = p.epoch - p.first_epoch, steps_per_epoch(state.train_loader, state.plan.accumulate)
        if done:
            steps = (p.step - p.epoch_step - p.first_step) // done
        if steps:
            ends.append(p.first_step + state.plan.epochs * steps)
    return min(ends, default=4 * p.step)
