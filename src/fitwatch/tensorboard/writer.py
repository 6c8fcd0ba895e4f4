"""Writes one fit to its run folder."""

import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from tensorboard.compat.proto.summary_pb2 import Summary

from fitwatch.helpers.markdown import table
from fitwatch.measuring.per_class import KINDS
from fitwatch.records import Curve, Histogram, Image, Marker, Record
from fitwatch.state import State
from fitwatch.tensorboard import events, folders, page, reports
from fitwatch.tensorboard.classifier import CalibrationCounts, Counts, curve, curve_names
from fitwatch.tensorboard.confusion import confusion_image
from fitwatch.tensorboard.diagram import reliability_image
from fitwatch.tensorboard.thinning import Thinner

logger = logging.getLogger("fitwatch")

_Points = dict[str, tuple[float, str]]  # tag -> value, and how values are merged
_Texts = dict[tuple[str, int, str], str]  # sub-run, step, tag -> text
_Counts = tuple[Counts | None, CalibrationCounts | None]  # of the best evaluation
_Values = defaultdict[tuple[str, int], list[Summary.Value]]  # sub-run, step -> values of one event

_MOST_COLUMNS = 3  # classes with columns of their own in the HParams table
_NAMED = 5  # curves in a warning: usually most are non-finite if one is


class RunWriter:
    """Writes the events of one fit, from its start to `finish`.

    After a failed write the error is logged and kept in `failure`, and nothing more is written. A forked child writes
    nothing: the files belong to its parent.

    Args:
        run_dir: Folder of the run.
        first_step: Steps completed before this fit.
        curves: Thins the curves; may have seen earlier fits.
    """

    def __init__(self, run_dir: Path, first_step: int, curves: Thinner) -> None:
        self.run_dir = run_dir
        self.first_step = first_step
        self._started = time.time()
        self.failure: OSError | None = None
        self._pid = os.getpid()
        self._files: dict[str, events.EventFile] = {}  # by sub-run
        self._curves = curves
        self._evaluations = 0  # covered by the line of the baseline
        self._baseline_end: tuple[int, float] | None = None  # its newest point, unless written
        self._tags: set[str] = set()
        self._charted = 0  # number of tags when the layout was last written
        self._texts: dict[tuple[str, str], tuple[int, str]] = {}  # sub-run and tag -> step and newest text
        self._not_finite: set[tuple[str, str]] = set()  # sub-run and tag of the curves in earlier warnings

    @property
    def empty(self) -> bool:
        """Whether nothing has been written yet."""
        return not self._files

    def log(self, records: Iterable[Record], step: int, horizon: int) -> None:
        """Write records, as one event for each sub-run and step.

        Numbers become points at ``step``; texts, pictures and bars keep their own step. ``horizon`` is the step at
        which the fit is expected to end.
        """
        self._check_files()
        numbers: defaultdict[str, _Points] = defaultdict(dict)
        texts: _Texts = {}
        values: _Values = defaultdict(list)
        for record in records:
            run, tag = page.run_and_tag(record.name)
            if isinstance(record.value, Marker):
                decided = record.value.decided
                self._draw_bar(record.name, record.step, record.value, step if decided is None else decided)
            elif isinstance(record.value, str):
                self._add_text(texts, run, record.step, tag, record.value)
            elif isinstance(record.value, (Image, Histogram)):
                values[run, record.step].append(events.picture(tag, record.value))
            elif isinstance(record.value, Curve):
                drawn = record.value
                text = table((drawn.x_name, drawn.y_name), zip(drawn.x, drawn.y, strict=True))
                self._add_text(texts, run, record.step, tag, text)
            else:
                numbers[run][page.curve(tag)] = record.value, record.merge
        for run, points in numbers.items():
            self._warn(texts, run, step, points)
            values[run, step] += self._thinned(run, step, points, horizon)
        for (run, at, tag), text in texts.items():
            values[run, at].append(events.text(tag, text))
        if "loss" in numbers["train"] and len(self._tags) > self._charted:
            self._charted = len(self._tags)  # at the first evaluation, and at later ones with new curves
            values["train", step].append(events.layout(page.charts(self._tags)))
        self._write_all(values)

    def baseline(self, step: int, baseline: float, loss: float) -> None:
        """Continue the line of the baseline after an evaluation with validation loss ``loss``.

        It has points at evaluations 1, 4, 16, ... and ends where the loss falls below half of the baseline: TensorBoard
        scales a chart to its points, and many points far above the curves would compress them.
        """
        if loss < baseline / 2:
            return
        self._evaluations += 1
        if self._evaluations == 1:
            self._write("baseline", self.first_step, [events.scalar("loss", baseline)])
        self._baseline_end = step, baseline
        if self._evaluations in {4**k for k in range(16)}:
            self._end_baseline()

    def finish(self, state: State, counts: _Counts, group: str | None, columns: Mapping[str, object]) -> float:
        """Write the waiting points and the sub-run ``best``, with ``counts`` of its outputs, and close the files.

        ``columns`` are more columns of the HParams table.

        Returns:
            The seconds that the fit took.
        """
        self._check_files()
        waiting: _Values = defaultdict(list)
        for name, (at, value) in self._curves.rest():
            run, _, tag = name.partition("/")
            waiting[run, at].append(events.scalar(tag, value))
        self._write_all(waiting)
        self._end_baseline()
        if self._writes:
            with suppress(OSError):
                folders.remove(self.run_dir / "best")  # of an earlier fit
        settings = {name: value for name, value in state.settings.items() if name != "device"}
        settings |= columns
        if group is not None:
            settings["seed"] = "any"  # a row has one value per setting, but the trials differ in their seed
        names_of, title = state.validation.class_names, reports.best_title(state.history)
        best, name, seconds = state.history.best, self.run_dir.name, time.time() - self._started
        values = (
            []
            if best is None
            else [
                *_best_values(best, state.validation.classes if state.validation.named else None),
                *_best_outputs(title, counts[0], names_of),
                *_best_calibration(title, counts[1], names_of),
            ]
        )
        values.append(events.scalar("report/seconds", seconds))
        values.append(events.text("report/end", reports.end(state, name, seconds)))
        row = name if group is None else group
        values += events.hparams(settings, row, self._started, succeeded=state.error is None)
        self._write("best", state.progress.step if best is None else int(best["step"]), values)
        for file in self._files.values():
            with suppress(OSError):  # reported when writing failed
                file.close()
        return seconds

    @property
    def _writes(self) -> bool:
        return self.failure is None and os.getpid() == self._pid

    def _write(self, run: str, step: int, values: list[Summary.Value], *, drawn: int | None = None) -> None:
        """Write one event; ``drawn`` is the current step if it belongs to a bar."""
        if not values or not self._writes:
            return
        path = self.run_dir / run
        try:
            if run not in self._files:
                # A bar may be drawn long after its position, so a server must not drop its points as old ones.
                options = (self.first_step, "") if drawn is None else (0, f".decided-{drawn}")
                self._files[run] = events.EventFile(path, *options)
            path = self._files[run].path
            self._files[run].add(step, values)
        except OSError as error:
            self._fail(path, error)

    def _check_files(self) -> None:
        """Notice that the files were removed: what is written to them then goes nowhere, without an error."""
        if not self._writes:
            return
        for file in self._files.values():
            try:
                file.path.stat()
            except OSError as error:
                self._fail(file.path, error)
                return

    def _fail(self, path: Path, error: OSError) -> None:
        gone = " (it was removed or renamed)" if isinstance(error, FileNotFoundError) else ""
        self.failure = OSError(error.errno, f"TensorBoard can't write to {path}: {error.strerror}{gone}")
        logger.error("%s; nothing more is written, and the fit ends after this epoch", self.failure)

    def _write_all(self, values: _Values) -> None:
        for run, step in sorted(values):
            self._write(run, step, values[run, step])

    def _end_baseline(self) -> None:
        if self._baseline_end is not None:
            step, value = self._baseline_end
            self._write("baseline", step, [events.scalar("loss", value)])
            self._baseline_end = None

    def _draw_bar(self, name: str, step: int, marker: Marker, now: int) -> None:
        # Two bars in one sub-run would be joined by a line.
        names = (name if number == 1 else f"{name} {number}" for number in count(1))
        run = next(free for free in names if free not in folders.RUNS and not (self.run_dir / free).exists())
        # A line needs two points, and the server keeps only one point per step.
        self._write(run, step, [events.scalar("loss", marker.low)], drawn=now)
        self._write(run, step + 1, [events.scalar("loss", marker.high)], drawn=now)

    def _add_text(self, texts: _Texts, run: str, step: int, tag: str, text: str) -> None:
        """Add a text, joined to earlier ones with the same tag and step: the server keeps only the last of them."""
        before = self._texts.get((run, tag), (-1, ""))
        whole = f"{before[1]}\n\n{text}" if before[0] == step else text
        texts[run, step, tag] = whole
        self._texts[run, tag] = step, whole

    def _warn(self, texts: _Texts, run: str, step: int, points: _Points) -> None:
        """Add one sentence that names the curves with their first non-finite value: a chart shows only a gap."""
        odd = [tag for tag, (value, _) in points.items() if not math.isfinite(value)]
        new = [tag for tag in odd if (run, tag) not in self._not_finite]
        if new:
            self._not_finite.update((run, tag) for tag in new)
            new.sort(key=lambda tag: tag.startswith("params/"))  # the many curves of layers come last
            named = ", ".join(f"`{tag}` ({points[tag][0]})" for tag in new[:_NAMED])
            more = f", and {len(new) - _NAMED} more" if len(new) > _NAMED else ""
            warning = f"First non-finite values, in the log window that ends at step {step}: {named}{more}."
            self._add_text(texts, run, step, "report/warnings", warning)

    def _thinned(self, run: str, step: int, points: _Points, horizon: int) -> list[Summary.Value]:
        """Return the points to write now; the others wait to be merged."""
        self._tags.update(points)
        merged = {tag: self._curves.add(f"{run}/{tag}", step, *point, horizon) for tag, point in points.items()}
        return [events.scalar(tag, point[1]) for tag, point in merged.items() if point is not None]


def write_test(run_dir: Path, state: State, seconds: float) -> None:
    """Write what was measured on a test set to the run of a fit that took ``seconds``.

    Raises:
        OSError: The run's folder is missing, or can't be written.
    """
    run_dir.stat()  # a new folder would not be the run
    best = state.history.best
    step = int(best["step"]) if state.restored and best is not None else state.progress.step
    file = events.EventFile(run_dir / "best", 0)
    try:
        values = [events.scalar(name, value) for name, value in state.test.items()]
        file.add(step, [*values, events.text("report/end", reports.end(state, run_dir.name, seconds))])
    finally:
        file.close()


def _best_values(best: Mapping[str, float], classes: Sequence[str] | None) -> list[Summary.Value]:
    """Return the dots at the best evaluation, and its numbers for the HParams table.

    The figures of each class are columns there, which are left out if they are many: they are in the end report.
    """
    dots = {name: v for name, v in best.items() if name.startswith("val/") and math.isfinite(v)}
    if classes is not None and len(classes) > _MOST_COLUMNS:
        apart = {f"val/{kind}/{one}" for kind in KINDS for one in classes}
        dots = {name: v for name, v in dots.items() if name not in apart}
    dots = dots or {"train/loss": best["train/loss"]}
    values = [events.scalar(page.curve(page.run_and_tag(name)[1]), v) for name, v in dots.items()]
    values.append(events.scalar("report/best_epoch", best["epoch"]))
    if "val/loss" in best:
        values.append(events.scalar("report/gap_at_best", best["val/loss"] - best["train/loss"]))
    return values


def _best_calibration(
    title: str, counts: CalibrationCounts | None, names_of: Callable[[int], list[str]]
) -> list[Summary.Value]:
    """Return the reliability diagram of the best evaluation, and its calibrated decisions if they are others."""
    if counts is None:
        return []
    values = [events.picture("report/reliability", reliability_image(counts.tables, title=title))]
    if counts.matrix is not None:
        names = names_of(len(counts.matrix))
        image = confusion_image(counts.matrix, names, title=f"{title}, calibrated: class weights taken off")
        values.append(events.picture("report/confusion_calibrated", image))
    return values


def _best_outputs(title: str, counts: Counts | None, names_of: Callable[[int], list[str]]) -> list[Summary.Value]:
    """Return the confusion matrix and the precision-recall curves of the best evaluation, if they were counted."""
    values = []
    if counts is not None and counts.matrix is not None:
        names = names_of(len(counts.matrix))
        image = confusion_image(counts.matrix, names, title=title)
        values.append(events.picture("report/confusion", image))
    if counts is not None and counts.scores is not None:
        for name, scores in zip(curve_names(counts.scores, names_of), counts.scores.cpu(), strict=True):
            values.append(events.pr_curve(f"pr_curve/{name}", curve(scores)))
    return values
