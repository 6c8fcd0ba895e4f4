"""Logged curves: what every reader returns, and how their points are put in order."""

import math
from array import array
from collections.abc import Iterable, Mapping
from itertools import groupby, pairwise

from attrs import define, evolve, field

_MOSTLY = 0.5  # share of the steps that have several points, above which these are averaged


class LogError(ValueError):
    """Raised if logs can't be used; the message is a single line."""


class NoLogsError(LogError):
    """Raised if a folder holds nothing that can be judged."""


def _numbers() -> "array[float]":
    return array("d")


@define
class Curve:
    """A logged curve, in the order of writing.

    Attributes:
        steps: Step, or epoch, of each point.
        values: Values.
        times: Seconds since 1970; NaN where unknown.
        notes: What was left out or changed: a sentence each, with ``{}`` for the name of the curve.
        axis: What the steps count: ``"step"`` or ``"epoch"``.
    """

    steps: "array[float]" = field(factory=_numbers)
    values: "array[float]" = field(factory=_numbers)
    times: "array[float]" = field(factory=_numbers)
    notes: list[str] = field(factory=list)
    axis: str = "step"

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: float, value: float, time: float = math.nan) -> None:
        """Add a point."""
        self.steps.append(step)
        self.values.append(value)
        self.times.append(time)

    def drop(self, step: float) -> int:
        """Drop the points from ``step`` on, and return their number."""
        count = len(self)
        while self.steps and self.steps[-1] >= step:
            for column in (self.steps, self.values, self.times):
                column.pop()
        return count - len(self)

    def void(self, step: float) -> None:
        """Drop the points from ``step`` on, which a resumed run has declared void, and note their number."""
        if count := self.drop(step):
            self.notes.append(_replaced(count, f"a resumed run started again at step {plain(step)}"))

    def extend(self, later: "Curve") -> None:
        """Continue with the points of a later file: they replace those from their first step on.

        A single point at the last step does not continue the curve: the best model was evaluated once more at the end.
        """
        if len(later) == 1 and self.steps and later.steps[0] == self.steps[-1]:
            self.notes.append(_again(1))
        else:
            replaced = self.drop(min(later.steps))
            if replaced:
                self.notes.append(_replaced(replaced, "a resumed run wrote these steps again"))
            for column, more in zip(self.columns, later.columns, strict=True):
                column.extend(more)
        self.notes.extend(later.notes)

    @property
    def columns(self) -> tuple["array[float]", ...]:
        """Steps, values and times."""
        return self.steps, self.values, self.times

    def tidy(self) -> "Curve":
        """Return the curve with ascending steps, one point each; its notes say what was left out or averaged."""
        if len(self) > 2 and len(set(self.steps)) == 1:
            return self._without_steps()
        points: list[tuple[float, float, float]] = []
        replaced = 0
        for point in zip(*self.columns, strict=True):
            if points and point[0] < points[-1][0]:
                before = len(points)
                while points and points[-1][0] >= point[0]:
                    points.pop()
                replaced += before - len(points)
            points.append(point)
        notes = [_replaced(replaced, "later ones have the same or smaller steps")] if replaced else []
        groups = [list(group) for _, group in groupby(points, key=lambda point: point[0])]
        several = sum(len(group) > 1 for group in groups)
        tidy = evolve(self, steps=_numbers(), values=_numbers(), times=_numbers(), notes=[*self.notes, *notes])
        if several > _MOSTLY * len(groups):
            for group in groups:
                tidy.add(group[0][0], sum(value for _, value, _ in group) / len(group), group[-1][2])
            tidy.notes.append(f"{several} steps have several points of {{}}, which are averaged")
            return tidy
        for group in groups:
            tidy.add(*group[0])
        if several:
            tidy.notes.append(_again(sum(map(len, groups)) - len(groups)))
        return tidy

    def _without_steps(self) -> "Curve":
        """Return the curve in order of time, with the indices as steps."""
        order = sorted(range(len(self)), key=lambda i: (self.times[i] if math.isfinite(self.times[i]) else 0.0, i))
        tidy = Curve(notes=list(self.notes), axis="point")
        for index, i in enumerate(order):
            tidy.add(index, self.values[i], self.times[i])
        tidy.notes.append(
            f"all {len(self)} points of {{}} stand at step {plain(self.steps[0])}, and are taken in order of time: "
            "was global_step forgotten?"
        )
        return tidy


Logged = Mapping[str, Mapping[str, Curve]]  # folder, "." for the top one -> tag -> curve


def printable(name: object) -> str:
    """Return a name of a file, a run or a curve with what is not printable escaped, on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def plain(step: float) -> float:
    """Return a step as an integer where it is one."""
    return int(step) if math.isfinite(step) and step == int(step) else step


def total(curves: list[Curve]) -> Curve:
    """Return the sum of tidy curves, at the steps that all of them have."""
    parts = [dict(zip(curve.steps, curve.values, strict=True)) for curve in curves]
    first = curves[0]
    summed = Curve(axis=first.axis, notes=[note for curve in curves for note in curve.notes])
    for step, time in zip(first.steps, first.times, strict=True):
        if all(step in part for part in parts):
            summed.add(step, sum(part[step] for part in parts), time)
    return summed


def aligned(train: Curve, val: Curve, *, by_time: bool = False) -> list[float]:
    """Return for each evaluation the mean of the training points since the one before; NaN if there are none.

    Args:
        train: Training curve, tidy.
        val: Validation curve, tidy.
        by_time: Compare the times of the points, and not their steps.
    """
    at, edges = (train.times, val.times) if by_time else (train.steps, val.steps)
    means, start = [], 0
    for edge in edges:
        end = start
        while end < len(train) and at[end] <= edge:
            end += 1
        means.append(sum(train.values[start:end]) / (end - start) if end > start else math.nan)
        start = end
    return means


def unused(train: Curve, val: Curve, *, by_time: bool = False) -> int:
    """Return the number of training points after the last evaluation."""
    at, edges = (train.times, val.times) if by_time else (train.steps, val.steps)
    return sum(one > edges[-1] for one in at) if edges else len(train)


def are_in_order(times: Iterable[float]) -> bool:
    """Whether times are known, and grow."""
    known = list(times)
    return all(map(math.isfinite, known)) and all(a <= b for a, b in pairwise(known)) and known[:1] != known[-1:]


def _again(count: int) -> str:
    which = "a point of {} repeats a step and is" if count == 1 else f"{count} points of {{}} repeat a step and are"
    return f"{which} left out: the first of a step counts"


def _replaced(count: int, why: str) -> str:
    which = "a point of {} is" if count == 1 else f"{count} points of {{}} are"
    return f"{which} left out: {why}"
