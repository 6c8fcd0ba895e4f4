"""Verdicts on pairs of logged curves."""

import math
from bisect import bisect_right
from itertools import pairwise
from statistics import median

from attrs import evolve, field, frozen

from fitwatch.logs.curves import Curve, aligned, are_in_order, plain, unused
from fitwatch.logs.pairing import Pair, Series
from fitwatch.rules.overfitting import Verdict, diagnose

_FEW = 3  # evaluations from which on there is something to say
_BELOW, _ABOVE = 0.2, 10.0  # validation over training loss at first, beyond which they are hardly in one unit
_FIRST = 3  # evaluations that tell the units


@frozen(kw_only=True)
class Diagnosis:
    """Verdict on one run.

    Attributes:
        run: Its folder, relative to the folder that was read; ``"."`` for that folder itself.
        part: Which of its losses or validation sets this is, if it has several; else "".
        train: Name of the training loss within the run.
        val: Name of the validation loss within the run.
        axis: What ``steps`` count: ``"step"``, ``"epoch"``, or ``"point"`` if no steps were logged.
        steps: Step of each evaluation, that is, of each point of the validation loss.
        losses: The validation losses. For a score, those of the error that was judged.
        train_losses: For each evaluation, the mean of the training losses since the one before; NaN without any.
        verdict: Result of `fitwatch.diagnose`; its indices count evaluations from 0.
        one_unit: Whether the two losses seem to be in one unit, so that the gap means something.
        notes: What the verdict leaves out, or could not use: a sentence each.
    """

    run: str
    part: str = ""
    train: str
    val: str
    axis: str = "step"
    steps: list[float]
    losses: list[float] = field(repr=False)
    train_losses: list[float] = field(repr=False)
    verdict: Verdict
    one_unit: bool = True
    notes: list[str] = field(factory=list)

    @property
    def wasted(self) -> int | None:
        """Number of evaluations after the best; None if there is no best."""
        return None if self.verdict.best is None else len(self.steps) - 1 - self.verdict.best

    @property
    def wasted_share(self) -> float | None:
        """Share of the training, by steps, that came after the best evaluation; None if there is no best."""
        if self.verdict.best is None:
            return None
        steps = self.steps
        apart = median(b - a for a, b in pairwise(steps)) if len(steps) > 1 else 1.0
        length = steps[-1] - steps[0] + apart  # the first evaluation stands at the end of a stretch of training too
        return (steps[-1] - steps[self.verdict.best]) / length if length > 0 else None

    @property
    def change(self) -> float | None:
        """Last loss over the best one, minus 1; None without a finite last loss, or where the loss has no zero."""
        if self.verdict.best is None or not math.isfinite(self.losses[-1]):
            return None
        best = self.losses[self.verdict.best]
        return self.losses[-1] / best - 1 if best > 0 else None


@frozen(kw_only=True)
class Unusable:
    """A run that can't be judged, and why."""

    run: str
    problem: str
    part: str = ""
    notes: list[str] = field(factory=list)


def judge(pair: Pair, notes: list[str], *, higher_is_better: bool) -> Diagnosis | Unusable:
    """Judge the two curves of a run.

    Args:
        pair: The curves.
        notes: What could not be read of the run.
        higher_is_better: Whether they are scores; they are also if their names say so.
    """
    if pair.train is None or pair.val is None:
        return Unusable(run=pair.run, part=pair.part, problem=pair.problem, notes=notes)
    train, val = pair.train, pair.val
    said = [*notes, *pair.notes]
    if val.error == "elbo" and _rises(train.curve):  # it is logged with either sign
        higher_is_better = True
        said.append(f"{train.name} rises as it is trained: it is taken for a bound, and not for a loss")
    if higher_is_better or val.is_score:
        val = _as_error(val)
        said.append(f"higher is better for {val.name}: judged is {_error_name(pair.val.curve)}")
        if higher_is_better or train.is_score:
            train = _as_error(train) if train.is_score or train.key == val.key else train
    one, other = train.curve.tidy(), val.curve.tidy()
    by_time, problem = _axes(train.name, one, val.name, other)
    count = sum(map(math.isfinite, other.values))
    if problem or (count < _FEW and math.isfinite(other.values[-1])):
        problem = problem or f"{val.name} has {len(other)} point{'s' if len(other) > 1 else ''}: too few"
        return Unusable(
            run=pair.run, part=pair.part, problem=problem, notes=[*said, *_notes(train.name, one, val.name, other)]
        )
    losses, train_losses = list(other.values), aligned(one, other, by_time=by_time)
    verdict = diagnose(train_losses, losses)
    said += _notes(train.name, one, val.name, other, by_time=by_time)
    units = _units(train.name, train_losses, val.name, losses)
    return Diagnosis(
        run=pair.run,
        part=pair.part,
        train=train.name,
        val=val.name,
        axis="epoch" if by_time and one.steps[-1] > other.steps[-1] else other.axis,
        steps=[plain(step) for step in other.steps],
        losses=losses,
        train_losses=train_losses,
        verdict=verdict,
        one_unit=not units,
        notes=said + units,
    )


def _rises(curve: Curve) -> bool:
    known = [value for value in curve.values if math.isfinite(value)]
    return len(known) > 1 and known[-1] > known[0]


def _as_error(series: Series) -> Series:
    """Turn a score into an error: what is missing to 1 or to 100, or its negative."""
    curve = series.curve
    top = _top(curve)
    return evolve(series, curve=evolve(curve, values=type(curve.values)("d", [top - value for value in curve.values])))


def _top(curve: Curve) -> float:
    known = [value for value in curve.values if math.isfinite(value)]
    if not known or min(known) < 0 or max(known) > 100:
        return 0.0
    return 1.0 if max(known) <= 1 else 100.0


def _error_name(curve: Curve) -> str:
    return f"{_top(curve):g} minus its value" if _top(curve) else "its negative"


def _axes(train_name: str, train: Curve, val_name: str, val: Curve) -> tuple[bool, str]:
    """Return whether the curves have to be aligned by time, as one counts steps and the other epochs; or a problem."""
    ends = sorted([train.steps[-1], val.steps[-1]])
    counted_alike = (train.axis == "point") == (val.axis == "point")
    if counted_alike and (ends[1] <= 2 * ends[0] or ends[0] == ends[1] or len(val) < 2):
        return False, ""
    if are_in_order(train.times) and are_in_order(val.times):
        known = sum(map(math.isfinite, aligned(train, val, by_time=True)))
        if 2 * known >= len(val):
            return True, ""
    (near, first), (far, last) = sorted([(train.steps[-1], train_name), (val.steps[-1], val_name)])
    return False, (
        f"{first} ends at step {plain(near)} and {last} at step {plain(far)}: log both against the same step count"
    )


def _notes(train_name: str, train: Curve, val_name: str, val: Curve, *, by_time: bool = False) -> list[str]:
    """Return what a verdict on these curves leaves out."""
    notes = []
    for name, curve in ((train_name, train), (val_name, val)):
        bad = [step for step, value in zip(curve.steps, curve.values, strict=True) if not math.isfinite(value)]
        if bad:
            notes.append(
                f"{len(bad)} of {len(curve)} points of {name} are NaN or infinite, since {curve.axis} {plain(bad[0])}"
            )
        notes.extend(note.replace("{}", name) for note in curve.notes)
    if by_time:
        notes.append(f"{train_name} and {val_name} count differently, and are aligned by the time of writing")
    at, edges = (train.times, val.times) if by_time else (train.steps, val.steps)
    seen = [0, *(bisect_right(at, edge) for edge in edges)]
    silent = sum(now == before for before, now in pairwise(seen))
    if silent:
        notes.append(f"{silent} of {len(val)} evaluations have no training loss since the one before")
    if late := unused(train, val, by_time=by_time):
        notes.append(f"{late} of {len(train)} training points come after the last evaluation and are not used")
    return notes


def _units(train_name: str, train: list[float], val_name: str, val: list[float]) -> list[str]:
    """Return a note if the losses of the first evaluations are far apart, so that they are hardly in one unit."""
    both = [
        (t, v) for t, v in zip(train, val, strict=True) if t > 0 and v > 0 and math.isfinite(t) and math.isfinite(v)
    ]
    if len(both) < _FIRST:
        return []
    ratios = [v / t for t, v in both[:_FIRST]]
    low = median(v / t for t, v in both)
    if max(ratios) < _BELOW and low < _BELOW:
        factor = 1 / median(ratios)
    elif min(ratios) > _ABOVE:  # a model may have learned much before its first evaluation
        factor = median(ratios)
    else:
        return []
    apart = f"they are apart by a factor of {factor:.3g} from the first evaluations on, so their gap means nothing"
    return [f"{train_name} and {val_name} seem to be in different units: {apart}"]
