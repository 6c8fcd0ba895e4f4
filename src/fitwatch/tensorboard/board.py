"""The callback `TensorBoard`."""

import logging
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import Attribute, asdict, define, evolve, field

from fitwatch.callback import Callback
from fitwatch.helpers.aliases import StateDict
from fitwatch.helpers.options import check_name, instance, local_path, plain
from fitwatch.helpers.terminal import with_links
from fitwatch.locking import FolderLock
from fitwatch.records import Record
from fitwatch.state import State
from fitwatch.tensorboard import page, reports
from fitwatch.tensorboard.classifier import CalibrationCounts, ClassCounts, Counts
from fitwatch.tensorboard.clock import Clock
from fitwatch.tensorboard.thinning import Thinner, horizon

if TYPE_CHECKING:  # importing tensorboard takes a third of a second
    from fitwatch.tensorboard.writer import RunWriter

logger = logging.getLogger("fitwatch")

_RATES = ("train/optim/lr", "train/optim/lr/0")

_MOST_NAMED = 20
"""Runs that a link names; with more it would be too long."""

_started: dict[Path, list[str]] = {}
"""The runs of this process, by folder: what a comparison is about, whatever else the folder holds."""


def _is_name(_: object, option: "Attribute[Any]", value: object) -> None:
    check_name(option.name, value)


def _columns(given: object) -> dict[str, object]:
    """Return the user's columns of the HParams table, as plain values."""
    if not isinstance(given, Mapping):
        raise TypeError(f"hparams must be a dict name -> value, got {given!r}")
    values = {name: "none" if value is None else plain(value) for name, value in given.items()}
    for name, value in values.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"hparams has the name {name!r}: the names of columns must be non-empty strings")
        if not isinstance(value, (bool, int, float, str)):
            raise TypeError(
                f"hparams[{name!r}] must be a number, a string, a bool or None, got {value!r}: write str(...), or a "
                "column for each part"
            )
    return values


@define(eq=False, slots=False)
class TensorBoard(Callback):
    """Writes everything that is logged to ``<dir>/<name>``, as sub-runs that share tags and therefore charts.

    ``train`` and ``val`` hold the curves, ``best`` a dot at the best evaluation and the settings, and ``baseline`` the
    loss of the best constant prediction while the validation loss is at least half of it. Each event, such as
    overfitting, is a vertical bar in its own sub-run. A name in use gets a number: ``run``, ``run-2``, ...

    A resumed fit continues in its folder, after everything beyond the point of resumption was removed. It finds the
    folder by ``dir`` and ``name``, as the script gives them. If these lead to no run of the checkpoint, the fit is a
    new run, which starts at the point of resumption, and the earlier run stays as it is: so one can go back to an old
    epoch, try other settings under another ``name``, and compare both. Only event files that fitwatch wrote are ever
    deleted.

    A value logged as ``train/x`` has the tag ``x`` in the sub-run ``train``; ``val/accuracy`` becomes
    ``metrics/accuracy``. Each log window is one event per sub-run; texts and pictures appear at the step at which they
    were logged. A fit writes at most 1,000 points of a curve: once a curve is long, a point stands for several log
    windows, by their mean or their maximum. Later fits in the same folder share the remaining points, but write at
    least 15.

    For a classifier (recognized by its loss) the page also shows the confusion matrix and the precision-recall curves
    of the best evaluation; with a `RealWorldCost`, its matrix with the costs is the only one. If the calibration is
    measured, as with an `OverfittingDetector`, the loss chart has ``refined_loss`` where it differs from the loss by
    two standard errors, and the best evaluation has a reliability diagram before and after calibration and, with class
    weights, the confusion matrix without them. The command that opens the page and a link to the run are printed when
    training starts; the link is in the result, too.

    If a file can't be written, for example because the disk is full, or if the run's folder was removed or renamed, an
    error is logged and nothing more is written.
    The epoch is completed, so that a `Checkpoint` can save it; then the fit ends with `OSError`.

    Args:
        dir: Folder of all runs, to be opened in TensorBoard. ``~`` is the home folder.
        name: Name of the run; no slashes, and not "." or "..".
        group: Runs of the same group share one row in the HParams table, with the mean of their metrics. Use it for
            trials that differ only in their seed. Default: one row per run.
        hparams: Columns of your own in the HParams table, name -> number, string, bool or None. The settings of the fit
            are there anyway; a name of theirs is refused when fitting starts.
        show_link: Whether to print the command and the link.
    """

    main_only = True

    dir: Path = field(default=Path("runs"), converter=local_path)
    name: str = field(default="run", kw_only=True, validator=_is_name)
    group: str | None = field(default=None, kw_only=True, validator=instance(str, or_none=True))
    hparams: Mapping[str, object] = field(factory=dict, kw_only=True, converter=_columns)
    show_link: bool = field(default=True, kw_only=True, validator=instance(bool))

    def __attrs_post_init__(self) -> None:
        self.run_dir: Path | None = None  # set when fitting starts
        self._new = False  # whether this fit created it
        self._origin: StateDict | None = None  # the run of the checkpoint that training resumes from
        self._writer: RunWriter | None = None  # during a fit
        self._lock: FolderLock | None = None  # as above
        self._curves = Thinner()
        self._metrics: list[str] = []  # tags to pin
        self._clock = Clock()
        self._epoch_start = 0.0  # its seconds when the epoch started
        self._logged = (0, 0.0)  # examples and seconds at the last log
        self._counts: ClassCounts | None = None  # observes validation
        self._best_counts: Counts | None = None
        self._best_calibration: CalibrationCounts | None = None
        self._costs_drawn = False  # the matrix of these decisions is on the page, with their costs
        self._evaluation: Mapping[str, float] = {}  # the newest one seen
        self._seconds = 0.0  # of the last fit
        self._peak = 0.0  # highest learning rate of the fit

    def on_fit_start(self, state: State) -> None:
        """Create the run's folder, or restore that of a resumed run.

        Raises:
            OSError: The folder can't be created or written; the message names it.
            RuntimeError: Another fit writes to it.
        """
        from fitwatch.tensorboard import folders, writer  # noqa: PLC0415 - imports tensorboard

        if taken := sorted(self.hparams.keys() & {*state.settings, "peak_lr"}):
            raise ValueError(f"hparams has a column {taken[0]!r}, which is a setting of the fit: give it another name")
        first_step = state.progress.step
        self._peak = _peak_lr(state)
        if state.resumed:
            self.run_dir = self._resumed_folder()
        self._new = self.run_dir is None or first_step == 0
        if self.run_dir is None or self._new:
            self.run_dir, self._curves = folders.new_folder(self.dir, self.name), Thinner()
            self._costs_drawn = False
        self._lock_folder(self.run_dir)
        together = _started.setdefault(self.dir.resolve(), [])
        together += [self.run_dir.name] * (self.run_dir.name not in together)
        if state.resumed and not self._new:
            folders.rewind(self.run_dir, first_step)
        if state.resumed and self._new and self._origin is not None:
            logger.warning(
                "TensorBoard: %s is a new run, from step %d on; the run %r of the checkpoint stays as it is, since "
                "dir and name do not lead to it",
                self.run_dir,
                first_step,
                self._origin["folder"],
            )
        if not len(state.history):
            self._best_counts = self._best_calibration = None
        self._curves.start(resumed=state.resumed)
        self._writer = writer.RunWriter(self.run_dir, first_step, self._curves)
        self._clock, self._logged = Clock(), (state.train_loss.examples, 0.0)
        self._counts = ClassCounts(state)
        state.validation.observers.append(self._counts)
        self._evaluation = state.metrics
        self._metrics = page.metrics(state)
        self._print_link()
        if self.show_link:
            state.links["TensorBoard"] = self.link()

    def on_epoch_start(self, state: State) -> None:
        """Write the start report: by now all callbacks have added their settings.

        Raises:
            OSError: The files can't be written.
        """
        writer = self._ready_writer(state)
        if writer.failure is not None:  # a checkpoint of the previous epoch exists by now
            raise writer.failure
        self._epoch_start = self._clock.pause()
        self._clock.run()

    def on_validation_start(self, state: State) -> None:
        """Pause the clock."""
        state.train_loss.pull()  # waits for the device
        self._clock.pause()

    def on_log(self, state: State) -> None:
        """Write the records."""
        if state.ended:  # it draws its own summary
            return
        writer, step = self._ready_writer(state), state.progress.step
        examples, seconds = self._logged
        self._logged = state.train_loss.examples, self._clock.pause()
        new, passed = self._logged[0] - examples, self._logged[1] - seconds
        speed = [Record("train/speed/examples_per_second", step, new / passed, "mean")] if new and passed else []
        records = [*state.records, *speed]
        if state.metrics is not self._evaluation and not page.shows_refined(state.metrics):  # two curves of one value
            records = [record for record in records if record.name != "val/refined_loss"]
        writer.log(records, step, horizon(state))
        rates = [float(r.value) for r in records if r.name in _RATES and isinstance(r.value, float)]
        self._peak = max([self._peak, *rates])
        self._costs_drawn |= any(record.name == "val/decisions/cost" for record in records)
        if state.metrics is not self._evaluation:
            self._evaluation = state.metrics
            if state.history.is_best and self._counts is not None:
                self._best_counts = self._counts.counts
                self._best_calibration = CalibrationCounts.of(state.validation.refined)
            if state.baseline is not None and "val/loss" in state.metrics:
                writer.baseline(step, state.baseline.constant, state.metrics["val/loss"])
        self._clock.run()

    def on_epoch_end(self, state: State) -> None:
        """Write the seconds of the epoch, unless it was cut short."""
        seconds, step = self._clock.pause() - self._epoch_start, state.progress.step
        if state.progress.epoch_batch == 0:
            record = Record("train/speed/epoch_seconds", step, seconds, "mean")
            self._ready_writer(state).log([record], step, horizon(state))

    def on_fit_end(self, state: State) -> None:
        """Write the dot at the best evaluation and the end report, and close the files.

        Raises:
            OSError: Writing has failed since the last epoch started.
        """
        writer, self._writer = self._writer, None
        if self._lock is not None:
            self._lock.release()
        self._lock = None
        if writer is None or self.run_dir is None:
            return
        if writer.empty and self._new:  # the fit failed before its first step
            _started[self.dir.resolve()].remove(self.run_dir.name)
            with suppress(OSError):  # not empty: the user keeps files there
                self.run_dir.rmdir()
            self.run_dir = None
            return
        counts = self._best_counts
        if counts is not None and self._costs_drawn:
            counts = evolve(counts, matrix=None)
        columns = {"peak_lr": self._peak, **self.hparams}
        self._seconds = writer.finish(state, (counts, self._best_calibration), self.group, columns)
        if writer.failure is not None and state.error is not writer.failure:
            raise writer.failure

    def write_test(self, state: State) -> None:
        """Write ``state.test`` to the run of the last fit, as dots ``test/...`` and in the end report.

        `Trainer.test` calls it. A file that can't be written is an error in the log, so that the values are not lost.
        """
        from fitwatch.tensorboard import writer  # noqa: PLC0415 - as above

        if self.run_dir is None:
            return
        try:
            writer.write_test(self.run_dir, state, self._seconds)
        except OSError as error:
            logger.error("TensorBoard can't write the test to %s: %s", self.run_dir, error.strerror)  # noqa: TRY400

    def link(self, port: int = 6006, *, compare: bool = False) -> str:
        """Return the address of a page in a TensorBoard server that was started on ``dir``.

        Args:
            port: Port of the server.
            compare: Whether to show the validation curves and best epochs of several runs, one color per run, instead
                of this run alone: of all that this process has started in ``dir``, if they are 2 to 20, else of all in
                it.
        """
        name = self.run_dir.name if self.run_dir is not None else self.name
        together = _started.get(self.dir.resolve(), [])
        several = together if name in together and 2 <= len(together) <= _MOST_NAMED else []
        return page.link(port, several if compare else [name], self._metrics)

    def state_dict(self) -> StateDict:
        """Return which run this is, the state of its curves, and the counts of the best evaluation."""
        from fitwatch.tensorboard import folders  # noqa: PLC0415 - imports tensorboard

        origin = None if self.run_dir is None else folders.origin(self.run_dir, self.name)
        return {
            "run": None if origin is None else asdict(origin),
            "curves": self._curves.state_dict(),
            "costs_drawn": self._costs_drawn,
            "best_counts": None if self._best_counts is None else asdict(self._best_counts),
            "best_calibration": None if self._best_calibration is None else asdict(self._best_calibration),
        }

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: A name in it leads out of the run's folder.
        """
        origin, counts = state_dict.get("run"), state_dict["best_counts"]
        if origin is not None:
            for key in ("name", "folder", "file"):
                check_name(f"run.{key}", origin.get(key) if isinstance(origin, dict) else origin)
        for curve in state_dict["curves"]:
            if curve.partition("/")[0] not in ("train", "val"):
                raise ValueError(f"curves must belong to train or val, got {curve!r}")
        self._origin = origin
        self._costs_drawn = bool(state_dict.get("costs_drawn"))  # older checkpoints have none
        self._curves.load_state_dict(state_dict["curves"])
        self._best_counts = None if counts is None else Counts(**counts)
        calibration = state_dict.get("best_calibration")  # older checkpoints have none
        self._best_calibration = None if calibration is None else CalibrationCounts(**calibration)

    def _resumed_folder(self) -> Path | None:
        """Return the folder of the checkpoint's run; None if ``dir`` and ``name`` lead elsewhere."""
        from fitwatch.tensorboard import folders  # noqa: PLC0415 - as above

        if self._origin is None:
            return None
        names = (self._origin[key] for key in ("name", "folder", "file"))
        return folders.find(self.dir, self.name, folders.Origin(*names))

    def _lock_folder(self, run_dir: Path) -> None:
        lock = FolderLock(run_dir)
        try:
            lock.acquire()
        except OSError as error:
            raise OSError(error.errno, f"TensorBoard can't write to {run_dir}: {error.strerror}") from error
        self._lock = lock

    def _ready_writer(self, state: State) -> "RunWriter":
        """Return the writer; write the start report first if it is missing."""
        writer = self._writer
        assert writer is not None, "on_fit_start comes first"
        if writer.empty:
            self._metrics = page.metrics(state)  # callbacks later in the list have added theirs
            if self.show_link:
                state.links["TensorBoard"] = self.link()
            step = writer.first_step
            writer.log([Record("train/report/start", step, reports.start(state))], step, horizon(state))
            if writer.failure is not None:  # before the first step
                raise writer.failure
        return writer

    def _print_link(self) -> None:
        if self.show_link and self.run_dir is not None:
            parent = self.run_dir.parent
            lines = [f"TensorBoard: tensorboard --logdir {shlex.quote(str(parent))}", f"  {self.link()}"]
            if any(folder != self.run_dir and any(folder.glob("*/events.*")) for folder in parent.iterdir()):
                several = len(_started[self.dir.resolve()]) > 1
                lines += ["the runs of this process:" if several else "all runs:", f"  {self.link(compare=True)}"]
            print(with_links("\n".join(lines), sys.stdout))  # noqa: T201 - requested by show_link


def _peak_lr(state: State) -> float:
    """Return the highest learning rate that is known before training: one cycle starts far below its maximum."""
    group = state.optimizer.param_groups[0]
    known = [group[name] for name in ("lr", "initial_lr", "max_lr") if name in group]
    return max(float(rate) for rate in known)
