"""Overfitting verdicts on logged runs: reads TensorBoard event files of any writer, and judges each run."""

import math
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from attrs import field, frozen

from fitwatch.helpers.options import local_path
from fitwatch.logs.curves import LogError, Logged, Pair, Points, Series, find, guess, listed
from fitwatch.rules.overfitting import Verdict, diagnose


@frozen(kw_only=True)
class Diagnosis:
    """Verdict on one run.

    Attributes:
        run: Its folder, relative to the folder that was read; ``"."`` for that folder itself.
        train: Name of the training loss within the run.
        val: Name of the validation loss within the run.
        steps: Step of each evaluation, that is, of each point of the validation loss.
        losses: The validation losses.
        verdict: Result of `fitwatch.diagnose`; its indices count evaluations from 0.
        notes: What the verdict leaves out, or could not use: a sentence each.
    """

    run: str
    train: str
    val: str
    steps: list[int]
    losses: list[float]
    verdict: Verdict
    notes: list[str] = field(factory=list)

    @property
    def wasted(self) -> int | None:
        """Number of evaluations after the best; None if there is no best."""
        return None if self.verdict.best is None else len(self.steps) - 1 - self.verdict.best


@frozen(kw_only=True)
class Unusable:
    """A run that can't be judged, and why."""

    run: str
    problem: str


def diagnose_logs(
    folder: str | os.PathLike[str],
    *,
    run: str | None = None,
    train_tag: str | None = None,
    val_tag: str | None = None,
) -> list[Diagnosis | Unusable]:
    """Judge each run below a folder, by `fitwatch.diagnose`.

    Args:
        folder: Folder with event files, possibly in subfolders.
        run: Judge only this run.
        train_tag: Name of the training loss: a tag, or a sub-run and a tag, as in ``train/loss``. Default: guessed.
        val_tag: Name of the validation loss, in the same form. Give both names or neither.

    Raises:
        LogError: If the folder, event files, run or tags do not exist.
    """
    if (train_tag is None) != (val_tag is None):
        raise LogError("--train-tag and --val-tag belong together: give both or neither")
    logged = read(folder)
    pairs = guess(logged) if train_tag is None or val_tag is None else find(logged, train_tag, val_tag)
    names = {pair.run for pair in pairs}
    # Sub-runs for markers and the like, without a pair of losses, are not separate runs.
    shown = [pair for pair in pairs if not (pair.problem and _is_below(pair.run, names))]
    if run is None:
        return [_judge(pair) for pair in shown]
    if run not in names:
        raise LogError(f"there is no run {run!r} in {folder}; there are {listed(pair.run for pair in shown)}")
    return [_judge(pair) for pair in pairs if pair.run == run]


def read(folder: str | os.PathLike[str]) -> Logged:
    """Read all scalar series below a folder.

    If a step was written again, as after a restart, the later points replace all older ones from that step on, as in
    TensorBoard.

    Raises:
        LogError: If it is not a folder, or has no event files or no scalars.
    """
    try:
        top = local_path(folder)
    except ValueError as error:
        raise LogError(str(error)) from error
    if not top.is_dir():
        raise LogError(f"{top} is a file, not a folder" if top.exists() else f"there is no folder {top}")
    logged, found = {}, 0
    for place, files in _event_files(top):
        found += len(files)
        if series := _scalars(files):
            logged[place.relative_to(top).as_posix()] = series
    if not logged:
        what = f"{found} event files without scalars" if found else "no event files (*tfevents*)"
        raise LogError(f"{top} and its subfolders contain {what}")
    return logged


def _event_files(top: Path) -> Iterable[tuple[Path, list[Path]]]:
    """Yield each folder with event files, and its files in the order of writing, which is that of their names."""
    seen = set()
    for place, folders, names in os.walk(top, followlinks=True):  # TensorBoard follows links to runs
        real = os.path.realpath(place)
        if real in seen:  # a circular link
            folders.clear()
            continue
        seen.add(real)
        files = sorted(name for name in names if "tfevents" in name and not name.endswith(".profile-empty"))
        if files:
            yield Path(place), [file for name in files if (file := Path(place, name)).is_file()]  # skips dangling links


def _scalars(files: Iterable[Path]) -> dict[str, Points]:
    from tensorboard.backend.event_processing.event_file_loader import (  # noqa: PLC0415 - slow, and rarely needed
        LegacyEventFileLoader,
    )
    from tensorboard.compat.proto.event_pb2 import SessionLog  # noqa: PLC0415 - as above

    series: dict[str, Points] = {}
    plugins: dict[str, str] = {}  # only the first value of a tag names its plugin
    ends: dict[str, list[float]] = {}  # tag -> time of the last point in each file
    together: Counter[str] = Counter()
    for file in files:
        new: set[str] = set()
        for event in LegacyEventFileLoader(str(file)).Load():
            if event.session_log.status == SessionLog.START:
                for points in series.values():
                    _drop(points, event.step)
            for value in event.summary.value:
                plugins.setdefault(value.tag, value.metadata.plugin_data.plugin_name)
                number = _number(value, plugins[value.tag])
                if number is not None:
                    points = series.setdefault(value.tag, Points())
                    _drop(points, event.step)
                    points.append((event.step, number))
                    times = ends.setdefault(value.tag, [])
                    if value.tag not in new:
                        together[value.tag] += any(end > event.wall_time for end in times)
                        new.add(value.tag)
                        times.append(event.wall_time)
                    times[-1] = max(times[-1], event.wall_time)
    for tag, others in together.items():
        series[tag].writers = others + 1 if others else 0
    return {tag: points for tag, points in series.items() if points}


def _drop(points: Points, step: int) -> None:
    """Drop the points from ``step`` on."""
    while points and points[-1][0] >= step:
        points.pop()
        points.replaced += 1


def _number(value: Any, plugin: str) -> float | None:  # Any: tensorboard has no types
    """Return the value of a scalar, stored in a field (torch) or a tensor (TensorFlow 2); None for other data."""
    from tensorboard.util.tensor_util import make_ndarray  # noqa: PLC0415 - as above

    if value.HasField("simple_value"):
        return float(value.simple_value)
    if plugin == "scalars" and value.HasField("tensor"):
        array = make_ndarray(value.tensor)
        return float(array.item()) if array.size == 1 else None
    return None


def _is_below(run: str, others: Iterable[str]) -> bool:
    return any(run != other and (other == "." or run.startswith(f"{other}/")) for other in others)


def _judge(pair: Pair) -> Diagnosis | Unusable:
    if pair.train is None or pair.val is None:
        return Unusable(run=pair.run, problem=pair.problem)
    train, val = pair.train, pair.val
    losses = [loss for _, loss in val.points]
    verdict, notes = diagnose(_aligned(train.points, val.points), losses), _notes(train, val)
    if verdict.status == "warming up":
        return Unusable(run=pair.run, problem="; ".join([f"{val.name}: {verdict.evidence.removesuffix('.')}", *notes]))
    if problem := _two_axes(train, val):
        return Unusable(run=pair.run, problem=problem)
    steps = [step for step, _ in val.points]
    return Diagnosis(
        run=pair.run, train=train.name, val=val.name, steps=steps, losses=losses, verdict=verdict, notes=notes
    )


def _notes(train: Series, val: Series) -> list[str]:
    """Return what a verdict on these curves leaves out."""
    notes = []
    for one in (train, val):
        points = one.points
        bad = [step for step, value in points if not math.isfinite(value)]
        if bad:
            notes.append(f"{len(bad)} of {len(points)} points of {one.name} are NaN or infinite, since step {bad[0]}")
        if points.replaced:
            why = "a restart, or a forgotten global_step"
            if points.writers:
                why = f"{points.writers} event files were written at the same time: several processes in one folder?"
            notes.append(
                f"{points.replaced} points of {one.name} are left out, since later ones have the same or smaller steps "
                f"({why})"
            )
    steps = [step for step, _ in train.points]
    seen = [0, *(bisect_right(steps, step) for step, _ in val.points)]
    silent = sum(now == before for before, now in pairwise(seen))
    if silent:
        notes.append(f"{silent} of {len(val.points)} evaluations have no training loss since the one before")
    if late := len(steps) - seen[-1]:
        notes.append(f"{late} of {len(steps)} training points come after the last evaluation and are not used")
    return notes


def _aligned(train: Points, val: Points) -> list[float]:
    """Return for each evaluation the mean of the training points since the one before; NaN if there are none."""
    means, start = [], 0
    for step, _ in val:
        end = start
        while end < len(train) and train[end][0] <= step:
            end += 1
        new = [loss for _, loss in train[start:end]]
        means.append(sum(new) / len(new) if new else math.nan)
        start = end
    return means


def _two_axes(train: Series, val: Series) -> str:
    """Return an error if one series counts epochs and the other steps, so that their ends are far apart; else ""."""
    first, last = sorted([train, val], key=lambda one: one.points[-1][0])
    near, far = first.points[-1][0], last.points[-1][0]
    if far <= 2 * near:
        return ""
    return f"{first.name} ends at step {near} and {last.name} at step {far}: log both against the same step count"
