"""One page in TensorBoard: train and validation in one chart, the best epoch, the bars, the reports."""

import logging
import math
import os
import shlex
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from attrs import asdict, define, field

from fitwatch.callback import Callback
from fitwatch.options import instance
from fitwatch.records import Histogram, Image, Marker, Record
from fitwatch.state import State
from fitwatch.tensorboard import classifier, folders, page, reports, shortening, thinning
from fitwatch.tensorboard.clock import Clock
from fitwatch.tensorboard.confusion import confusion_image
from fitwatch.tensorboard.level import Level

logger = logging.getLogger("fitwatch")

_Numbers = dict[str, dict[str, tuple[float, str]]]  # sub-run -> tag -> value, and what is to stand for several
_Texts = dict[tuple[str, int, str], str]  # sub-run, step, tag -> text
_Others = dict[tuple[str, int], list[Any]]  # sub-run, step -> what to write

_NAMED = 5  # of the curves that are not finite: where one is, most are


def _is_name(_: Any, option: Any, value: Any) -> None:
    if not isinstance(value, str) or not value or set(value) & {"/", "\\"}:
        raise ValueError(f"{option.name} must be a string without slashes, got {value!r}")


@define(eq=False, slots=False)
class TensorBoard(Callback):
    """Writes what is logged to ``<dir>/<name>``, as sub-runs that share their tags and so their charts.

    ``train`` and ``val`` hold the curves, ``best`` a dot at the best evaluation and the settings, ``baseline`` the loss
    of the best constant prediction, as long as the validation loss is more than half of it, and each event, such as
    overfitting, is a vertical bar in a sub-run of its own. A name that is in use gets a number: ``run``, ``run-2``, ...
    A resumed fit goes on in its own folder, from which everything beyond the point of resumption is removed.

    A value logged as ``train/x`` is the tag ``x`` of the sub-run ``train``; ``val/accuracy`` becomes
    ``metrics/accuracy``. One event is written for each window and sub-run; a text or a picture stands at the step at
    which it was logged. A curve has 1,000 points at most: a long one goes on with means of several windows, or with
    maxima where a window has its maximum, and before a later fit the points of the earlier ones are merged likewise.
    With a classifier (known by its loss) the confusion matrix and the precision-recall curves of the best evaluation
    are shown too. The command to open the page and a link to the run are printed when training starts and when it ends.

    If the files can't be written any more, say because the disk is full, an error is logged and nothing more is
    written; the epoch is trained to its end, so that a `Checkpoint` can save it, and then the fit ends with `OSError`.

    Args:
        dir: The folder to open in TensorBoard, holding all runs.
        name: Of the run; no slash in it.
        group: Runs of one group are one row in the HParams table, with the mean of their metrics: for trials that
            repeat the same settings with other seeds. Default: each run has its own row.
        show_link: Whether to print the command and the link.
    """

    main_only = True

    dir: Path = field(default=Path("runs"), converter=Path)
    name: str = field(default="run", kw_only=True, validator=_is_name)
    group: str | None = field(default=None, kw_only=True, validator=instance(str, or_none=True))
    show_link: bool = field(default=True, kw_only=True, validator=instance(bool))

    def __attrs_post_init__(self) -> None:
        self.run_dir: Path | None = None  # known once fitting has started
        self._files: dict[str, Any] = {}
        self._metrics: list[str] = []
        self._curves = thinning.Thinner()
        self._best_counts: classifier.Counts | None = None
        self._running = False

    def on_fit_start(self, state: State) -> None:
        """Make the run's folder.

        Raises:
            OSError: The folder can't be made; the message names it.
        """
        self._started, self._pid = time.time(), os.getpid()
        self._failure: OSError | None = None
        self._first_step = state.progress.step
        if self.run_dir is None or self._first_step == 0:
            self.run_dir = folders.new_folder(self.dir, self.name)
            self._curves = thinning.Thinner()
        elif state.resumed:  # what lies beyond the point of resumption did not happen
            folders.go_back(self.run_dir, self._first_step)
        if not state.resumed:
            self._best_counts = None
        if crowded := self._curves.crowded():
            self._curves.shortened(shortening.shorten(self.run_dir, crowded))
        self._curves.begin()
        self._running, self._begun = True, False
        self._tags: set[str] = set()
        self._charted = 0  # tags known when the charts were last written
        self._told: dict[tuple[str, str], tuple[int, str]] = {}  # sub-run and tag -> the newest text, and its step
        self._not_finite: set[tuple[str, str]] = set()  # sub-run and tag of the curves that had a value that is not
        self._level = Level(self._first_step)
        self._judged: Mapping[str, float] = state.metrics  # the newest evaluation that was seen
        self._counts = classifier.ClassCounts(state)
        state.validation.observers.append(self._counts)
        self._clock = Clock(state.train_loss.examples)
        self._metrics = page.metrics(state)
        self._show_link()

    def on_epoch_start(self, state: State) -> None:
        """Write the start report, now that every callback had its say in the settings.

        Raises:
            OSError: The files can't be written.
        """
        self._begin(state)
        if self._failure is not None:  # a checkpoint of the last epoch has been saved by now
            raise self._failure
        self._clock.begin_epoch()

    def on_validation_start(self, state: State) -> None:
        """Stop the clock."""
        state.train_loss.pull()  # waits for the device
        self._clock.pause()

    def on_log(self, state: State) -> None:
        """Write the records: one event for each sub-run and step."""
        from fitwatch.tensorboard import events  # noqa: PLC0415 - a third of a second that only users of this pay

        self._begin(state)  # a loop of one's own may have no epochs
        now = state.progress.step
        numbers, texts, others = self._sorted(state.records, now)
        for run, tags in numbers.items():
            self._warn(run, now, tags, texts)
        rate = self._clock.rate(state.train_loss.examples)
        if rate is not None:
            numbers.setdefault("train", {})["speed/examples_per_second"] = rate, "mean"
        horizon = thinning.horizon(state)
        for run, tags in numbers.items():
            others.setdefault((run, now), []).extend(self._points(run, now, tags, horizon))
        for (run, step, tag), text in texts.items():
            others.setdefault((run, step), []).append(events.text(tag, text))
        if "loss" in numbers.get("train", ()) and len(self._tags) > self._charted:
            self._charted = len(self._tags)  # once at the first evaluation, and again where a chart is new
            others["train", now].append(events.layout(page.charts(self._tags)))
        for run, step in sorted(others):  # a text or a picture may be older than the window's end
            self._write(run, step, others[run, step])
        self._evaluated(state)
        self._clock.run()

    def on_epoch_end(self, state: State) -> None:
        """Write how long the epoch took."""
        seconds = self._clock.epoch_seconds()
        if state.progress.epoch_batch == 0:  # not cut short
            tags = {"speed/epoch_seconds": (seconds, "mean")}
            step = state.progress.step
            self._write("train", step, self._points("train", step, tags, thinning.horizon(state)))

    def on_fit_end(self, state: State) -> None:
        """Write the dot at the best evaluation and the end report, and close the files.

        Raises:
            OSError: Writing has failed since the last epoch began.
        """
        if not self._running or self.run_dir is None:
            return
        self._running = False
        if not self._begun and self._first_step == 0:  # refused before the first step: leave no trace
            with suppress(OSError):  # unless someone keeps files there
                self.run_dir.rmdir()
            self.run_dir = None
            return
        self._write_rest()
        best = state.history.best
        if self._failure is None and os.getpid() == self._pid:
            shutil.rmtree(self.run_dir / "best", ignore_errors=True)  # of an earlier fit
        values = [] if best is None else [*_best(best), *self._best_outputs(best)]
        step = state.progress.step if best is None else int(best["step"])
        self._write("best", step, [*values, *self._end_report(state)])
        for file in self._files.values():
            with suppress(OSError):  # has been told
                file.close()
        self._files = {}
        self._show_link()
        if self._failure is not None and state.error is not self._failure:
            raise self._failure

    def link(self, port: int = 6006, *, compare: bool = False) -> str:
        """The address of a page in a TensorBoard server on ``dir``.

        Args:
            port: Of the server.
            compare: Whether to show the validation curves and best epochs of all runs, one colour each, in place of
                this run alone.
        """
        name = self.run_dir.name if self.run_dir is not None else self.name
        return page.compare_link(port, self._metrics) if compare else page.link(port, name, self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """The run's folder, where the curves stand, and the counts of the best evaluation."""
        return {
            "run_dir": None if self.run_dir is None else str(self.run_dir),
            "curves": self._curves.state_dict(),
            "best_counts": None if self._best_counts is None else asdict(self._best_counts),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back, if the folder still exists."""
        folder, counts = state_dict["run_dir"], state_dict["best_counts"]
        self.run_dir = Path(folder) if folder is not None and Path(folder).is_dir() else None
        self._curves.load_state_dict(state_dict["curves"])
        self._best_counts = None if counts is None else classifier.Counts(**counts)

    # -- parts ---------------------------------------------------------------------------------------------------

    def _begin(self, state: State) -> None:
        from fitwatch.tensorboard import events  # noqa: PLC0415 - as above

        if not self._begun:
            self._metrics = page.metrics(state)  # those of callbacks later in the list are known too
            self._write("train", self._first_step, [events.text("report/start", reports.start(state))])
            if self._failure is not None:  # nothing is trained yet
                raise self._failure
            self._begun = True

    def _points(self, run: str, step: int, tags: Mapping[str, tuple[float, str]], horizon: int) -> list[Any]:
        """The points to write now; the others wait to be merged."""
        from fitwatch.tensorboard import events  # noqa: PLC0415 - as above

        self._tags.update(tags)
        points = []
        for tag, (value, merge) in tags.items():
            point = self._curves.add(f"{run}/{tag}", step, value, merge, horizon)
            if point is not None:
                points.append(events.scalar(tag, point[1]))
        return points

    def _sorted(self, records: Iterable[Record], now: int) -> tuple[_Numbers, _Texts, _Others]:
        """Draw the bars among the records, and sort the others by their place."""
        from fitwatch.tensorboard import events  # noqa: PLC0415 - as above

        numbers: _Numbers = {}
        texts: _Texts = {}
        others: _Others = {}
        for record in records:
            run, tag = page.run_and_tag(record.name)
            if isinstance(record.value, Marker):
                self._mark(record.name, record.step, record.value, now)
            elif isinstance(record.value, str):
                self._tell(texts, (run, record.step, tag), record.value)
            elif isinstance(record.value, (Image, Histogram)):
                others.setdefault((run, record.step), []).append(events.picture(tag, record.value))
            else:
                numbers.setdefault(run, {})[page.curve(tag)] = record.value, record.merge
        return numbers, texts, others

    def _tell(self, texts: _Texts, place: tuple[str, int, str], text: str) -> None:
        """Add a text. Of several under one tag at one step, also of two `on_log`, the server would keep the last."""
        run, step, tag = place
        before = self._told.get((run, tag), (-1, ""))
        whole = f"{before[1]}\n\n{text}" if before[0] == step else text
        texts[place] = whole
        self._told[run, tag] = step, whole

    def _warn(self, run: str, step: int, tags: Mapping[str, tuple[float, str]], texts: _Texts) -> None:
        """Say in one sentence which curves are not finite for the first time: infinity is a silent gap in a chart."""
        odd = [tag for tag, (value, _) in tags.items() if not math.isfinite(value)]
        new = [tag for tag in odd if (run, tag) not in self._not_finite]
        if new:
            self._not_finite.update((run, tag) for tag in new)
            new.sort(key=lambda tag: tag.startswith("params/"))  # those of layers, which are many, come last
            named = ", ".join(f"`{tag}` ({tags[tag][0]})" for tag in new[:_NAMED])
            more = f", and {len(new) - _NAMED} more" if len(new) > _NAMED else ""
            warning = f"Not finite for the first time in the window that ends at step {step}: {named}{more}."
            self._tell(texts, (run, step, "report/warnings"), warning)

    def _write_rest(self) -> None:
        """Write the points that wait to be merged with more."""
        from fitwatch.tensorboard import events  # noqa: PLC0415 - as above

        waiting: dict[tuple[str, int], list[Any]] = {}
        for curve, (step, value) in self._curves.rest():
            run, _, tag = curve.partition("/")
            waiting.setdefault((run, step), []).append(events.scalar(tag, value))
        for run, step in sorted(waiting):
            self._write(run, step, waiting[run, step])
        for step, value in self._level.rest():
            self._write("baseline", step, [events.scalar("loss", value)])

    def _write(self, run: str, step: int, values: list[Any], *, decided: int | None = None) -> None:
        from fitwatch.tensorboard import events  # noqa: PLC0415 - as above

        if not values or self._failure is not None:
            return
        if os.getpid() != self._pid or self.run_dir is None:  # a forked worker: the files are its parent's
            return
        try:
            if run not in self._files:
                # A bar may be decided long after its place: its points are not to be taken for old ones.
                how = (self._first_step, "") if decided is None else (0, folders.decided(decided))
                self._files[run] = events.EventFile(self.run_dir / run, *how)
            self._files[run].add(step, values)
            self._files[run].flush()
        except OSError as error:
            where = self._files[run].path if run in self._files else self.run_dir / run
            self._failure = OSError(error.errno, f"TensorBoard can't write to {where}: {error.strerror}")
            logger.error("%s; nothing more is written, and the fit ends after this epoch", self._failure)  # noqa: TRY400 - the cause is named

    def _mark(self, name: str, step: int, marker: Marker, now: int) -> None:
        from fitwatch.tensorboard import events  # noqa: PLC0415 - as above

        assert self.run_dir is not None
        first, number = name, 1
        while (self.run_dir / name).exists():  # two bars in one sub-run would be joined by a line
            number += 1
            name = f"{first} {number}"
        # A line needs two points, and of two points at one step the server keeps one.
        self._write(name, step, [events.scalar("loss", marker.low)], decided=now)
        self._write(name, step + 1, [events.scalar("loss", marker.high)], decided=now)

    def _evaluated(self, state: State) -> None:
        """Take note of a new evaluation: how far the baseline reaches, and what the best outputs were."""
        from fitwatch.tensorboard import events  # noqa: PLC0415 - as above

        if state.metrics is self._judged:
            return
        self._judged = state.metrics
        if state.history.is_best:
            self._best_counts = self._counts.counts
        if state.baseline is not None and "val/loss" in state.metrics:
            level, loss = state.baseline.constant, state.metrics["val/loss"]
            for step, value in self._level.points(state.progress.step, level, loss):
                self._write("baseline", step, [events.scalar("loss", value)])

    def _best_outputs(self, best: Mapping[str, float]) -> list[Any]:
        """The confusion matrix and the precision-recall curves of the best evaluation, where they are known."""
        from fitwatch.tensorboard import events  # noqa: PLC0415 - as above

        values, counts = [], self._best_counts
        if counts is not None and counts.matrix is not None:
            names = [str(k) for k in range(len(counts.matrix))]
            picture = confusion_image(counts.matrix, names, title=f"best epoch: {best['epoch']:g}")
            values.append(events.image("report/confusion", picture))
        if counts is not None and counts.scores is not None:
            scores = counts.scores.cpu()
            first = 1 if len(scores) == 1 else 0  # of two classes the curve is that of class 1
            values += [
                events.pr_curve(f"pr_curve/{k}", classifier.curve(scores[k - first]))
                for k in range(first, first + len(scores))
            ]
        return values

    def _show_link(self) -> None:
        if self.show_link and self.run_dir is not None:
            folder = shlex.quote(str(self.run_dir.parent))
            lines = [f"TensorBoard: tensorboard --logdir {folder}", f"  {self.link()}"]
            if folders.others(self.run_dir):
                lines += ["all runs:", f"  {self.link(compare=True)}"]
            print("\n".join(lines))  # noqa: T201 - asked for

    def _end_report(self, state: State) -> list[Any]:
        from fitwatch.tensorboard import events  # noqa: PLC0415 - as above

        assert self.run_dir is not None
        settings = {name: value for name, value in state.settings.items() if name != "device"}
        group = self.run_dir.name if self.group is None else self.group
        if self.group is not None:
            settings["seed"] = "any"  # a row has one value of each setting, and this is what trials differ in
        row = events.hparams(settings, group, self._started, succeeded=state.error is None)
        seconds = time.time() - self._started
        report = events.text("report/end", reports.end(state, self.run_dir.name, seconds))
        return [events.scalar("report/seconds", seconds), report, *row]


def _best(best: Mapping[str, float]) -> list[Any]:
    from fitwatch.tensorboard import events  # noqa: PLC0415 - as above

    dots = {name: v for name, v in best.items() if name.startswith("val/") and math.isfinite(v)}
    dots = dots or {"train/loss": best["train/loss"]}
    values = [events.scalar(page.curve(page.run_and_tag(name)[1]), v) for name, v in dots.items()]
    values.append(events.scalar("report/best_epoch", best["epoch"]))
    if "val/loss" in best:
        values.append(events.scalar("report/gap_at_best", best["val/loss"] - best["train/loss"]))
    return values
