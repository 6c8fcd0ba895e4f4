"""One page in TensorBoard: train and validation in one chart, the best epoch, the bars, the reports."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from attrs import define, field

from fitwatch._options import instance
from fitwatch.callback import Callback
from fitwatch.records import Histogram, Image, Marker
from fitwatch.state import State

_RUNS = ("train", "val", "best", "baseline")  # all other sub-runs are bars on the loss chart

# The Custom Scalars page: category -> title -> kind and tags, which for "lines" are regular
# expressions that are anchored at their start only, and for "margin" are plain: value, lower, upper.
_PAGE: dict[str, dict[str, tuple[str, list[str]]]] = {
    "1 Overfitting": {
        "train and validation loss": ("lines", ["loss$"]),
        "generalisation gap (shaded)": ("margin", ["overfit/val_loss", "overfit/train_loss", "overfit/val_loss"]),
        "rise of the validation loss, and its threshold": ("lines", ["overfit/rise$", "overfit/threshold$"]),
    },
    "2 Gradients": {
        "total norm: mean and max of the window": ("lines", ["optim/grad_norm$", "optim/grad_norm_max$"]),
        "norm per layer": ("lines", ["params/grad_norm/.*$"]),
    },
    "3 Optimiser": {"learning rate": ("lines", ["optim/lr$"])},
}


def _is_name(_: Any, option: Any, value: Any) -> None:
    if not isinstance(value, str) or not value or set(value) & {"/", "\\"}:
        raise ValueError(f"{option.name} must be a string without slashes, got {value!r}")


@define(eq=False, slots=False)
class TensorBoard(Callback):
    """Writes what is logged to ``<dir>/<name>``, as sub-runs that share their tags and so their charts.

    ``train`` and ``val`` hold the curves, ``best`` a dot at the best evaluation and the settings, ``baseline`` the loss
    of the best constant prediction as a dashed line, and each event, such as overfitting, is a vertical bar in a
    sub-run of its own. A name that is in use gets a number: ``run``, ``run-2``, ... A resumed fit goes on in its own
    folder.

    A value logged as ``train/x`` is the tag ``x`` of the sub-run ``train``; ``val/accuracy`` becomes
    ``metrics/accuracy``. One event is written for each window and sub-run. The command to open the page and a link to
    the run are printed when training starts and when it ends.

    Args:
        dir: The folder to open in TensorBoard, holding all runs.
        name: Of the run; no slash in it.
        show_link: Whether to print the command and the link.
    """

    dir: Path = field(default=Path("runs"), converter=Path)
    name: str = field(default="run", kw_only=True, validator=_is_name)
    show_link: bool = field(default=True, kw_only=True, validator=instance(bool))

    def __attrs_post_init__(self) -> None:
        self.run_dir: Path | None = None  # known once fitting has started
        self._files: dict[str, Any] = {}
        self._markers: dict[str, int] = {}  # sub-run of each bar -> its step
        self._metrics: list[str] = []
        self._running = False

    def on_fit_start(self, state: State) -> None:
        """Make the run's folder.

        Raises:
            OSError: The folder can't be made; the message names it.
        """
        self._started, self._pid = time.time(), os.getpid()
        self._first_step = state.progress.step
        if self.run_dir is None or self._first_step == 0:
            self.run_dir, self._markers = _new_folder(self.dir, self.name), {}
        elif state.resumed:  # what lies beyond the point of resumption did not happen
            self._markers = {name: step for name, step in self._markers.items() if step < self._first_step}
            _remove_markers(self.run_dir, keep=self._markers)
        self._running, self._begun, self._has_layout = True, False, False
        self._tags: set[str] = set()
        self._not_finite: set[str] = set()
        self._level_step: int | None = None  # up to where the baseline is drawn
        names = [_run_and_tag(name)[1] for name in sorted(state.names)]
        self._metrics = [tag for tag in names if tag.startswith("metrics/")]
        self._show_link()

    def on_epoch_start(self, state: State) -> None:
        """Write the start report, now that every callback had its say in the settings."""
        if not self._begun:
            self._begun = True
            self._write("train", self._first_step, [_start_report(state)])

    def on_log(self, state: State) -> None:
        """Write the records: one event for each sub-run."""
        from fitwatch.callbacks import _events  # noqa: PLC0415 - a third of a second that only users of this pay

        self.on_epoch_start(state)  # a loop of one's own may have no epochs
        scalars: dict[str, dict[str, float]] = {}
        texts: dict[str, dict[str, str]] = {}
        images: dict[str, list[Any]] = {}
        for record in state.records:
            run, tag = _run_and_tag(record.name)
            if isinstance(record.value, Marker):
                self._mark(record.name, record.step, record.value)
                continue
            scalars.setdefault(run, {})
            if isinstance(record.value, str):
                _append(texts.setdefault(run, {}), tag, record.value)
                continue
            if isinstance(record.value, Image):
                images.setdefault(run, []).append(_events.image(tag, record.value))
                continue
            if isinstance(record.value, Histogram):
                images.setdefault(run, []).append(_events.histogram(tag, record.value))
                continue
            scalars[run][tag] = record.value
            if not math.isfinite(record.value) and record.name not in self._not_finite:
                self._not_finite.add(record.name)  # infinity is a silent gap in a chart
                warning = f"`{tag}` is {record.value} at step {record.step}, for the first time."
                _append(texts.setdefault(run, {}), "report/warnings", warning)
        self._tags.update(tag for numbers in scalars.values() for tag in numbers)
        for run, numbers in scalars.items():
            values = [_events.scalar(tag, value) for tag, value in numbers.items()]
            values += [_events.text(tag, value) for tag, value in texts.get(run, {}).items()]
            values += images.get(run, [])
            if run == "train" and "loss" in numbers and not self._has_layout:  # all charts have begun by now
                self._has_layout = True
                values.append(_events.layout(_page(self._tags)))
            self._write(run, state.progress.step, values)
        if state.baseline is not None and "loss" in scalars.get("val", ()):
            self._level(state.progress.step, state.baseline.constant)

    def on_fit_end(self, state: State) -> None:
        """Write the dot at the best evaluation and the end report, and close the files."""
        if not self._running or self.run_dir is None:
            return
        self._running = False
        if not self._begun and self._first_step == 0:  # refused before the first step: leave no trace
            with suppress(OSError):  # unless someone keeps files there
                self.run_dir.rmdir()
            self.run_dir = None
            return
        shutil.rmtree(self.run_dir / "best", ignore_errors=True)  # of an earlier fit
        best = state.best
        values = self._end_report(state) if best is None else [*_best(best), *self._end_report(state)]
        self._write("best", state.progress.step if best is None else int(best["step"]), values)
        for file in self._files.values():
            file.close()
        self._files = {}
        self._show_link()

    def link(self, port: int = 6006) -> str:
        """The address of this run's page in a TensorBoard server on ``dir``."""
        pins = ["loss", *self._metrics[:1], "overfit/gap", "optim/grad_norm_max"]
        cards = json.dumps([{"plugin": "scalars", "tag": tag} for tag in pins], separators=(",", ":"))
        name = self.run_dir.name if self.run_dir is not None else self.name
        only = "^" + re.sub(r"[.^$*+?{}\[\]|()]", r"\\\g<0>", name) + "/"
        # smoothing=0: the default of 0.6 moves the apparent minimum by epochs
        return f"http://localhost:{port}/?smoothing=0&runFilter={quote(only)}&pinnedCards={quote(cards)}#timeseries"

    def state_dict(self) -> dict[str, Any]:
        """The run's folder and its bars."""
        return {"run_dir": None if self.run_dir is None else str(self.run_dir), "markers": dict(self._markers)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back, if the folder still exists."""
        folder = state_dict["run_dir"]
        self.run_dir = Path(folder) if folder is not None and Path(folder).is_dir() else None
        self._markers = dict(state_dict["markers"])

    # -- parts ---------------------------------------------------------------------------------------------------

    def _write(self, run: str, step: int, values: list[Any]) -> None:
        from fitwatch.callbacks import _events  # noqa: PLC0415 - as above

        if os.getpid() != self._pid or self.run_dir is None:  # a forked worker: the files are its parent's
            return
        if run not in self._files:
            self._files[run] = _events.EventFile(self.run_dir / run, self._first_step)
        self._files[run].add(step, values)
        self._files[run].flush()

    def _mark(self, name: str, step: int, marker: Marker) -> None:
        from fitwatch.callbacks import _events  # noqa: PLC0415 - as above

        assert self.run_dir is not None
        first, number = name, 1
        while (self.run_dir / name).exists():  # two bars in one sub-run would be joined by a line
            number += 1
            name = f"{first} {number}"
        self._markers[name] = step
        # A line needs two points, and of two points at one step the server keeps one.
        self._write(name, step, [_events.scalar("loss", marker.low)])
        self._write(name, step + 1, [_events.scalar("loss", marker.high)])

    def _level(self, step: int, value: float) -> None:
        """Go on with the dashed line of the baseline, in the chart of the loss."""
        from fitwatch.callbacks import _events  # noqa: PLC0415 - as above

        last, self._level_step = self._level_step, step
        if last is not None and step - last >= 4:  # TensorBoard has no dashes, but leaves a gap at infinity
            gap = last + (step - last) * 6 // 10
            self._write("baseline", gap, [_events.scalar("loss", value)])
            self._write("baseline", gap + 1, [_events.scalar("loss", math.inf)])
        self._write("baseline", step, [_events.scalar("loss", value)])

    def _show_link(self) -> None:
        if self.show_link and self.run_dir is not None:
            folder = shlex.quote(str(self.run_dir.parent))
            print(f"TensorBoard: tensorboard --logdir {folder}\n  {self.link()}")  # noqa: T201 - asked for

    def _end_report(self, state: State) -> list[Any]:
        from fitwatch.callbacks import _events  # noqa: PLC0415 - as above

        assert self.run_dir is not None
        settings = {name: value for name, value in state.settings.items() if name != "device"}
        row = _events.hparams(settings, self.run_dir.name, self._started, succeeded=state.error is None)
        seconds = time.time() - self._started
        report = _events.text("report/end", _summary(state, seconds))
        return [_events.scalar("report/seconds", seconds), report, *row]


def _summary(state: State, seconds: float) -> str:
    """The table of the end report."""
    best, rows = state.best, []
    if best is not None:
        rows.append(("best epoch (from 0)", f"{best['epoch']:g}, by {state.monitor}"))
        rows += [(f"{name} at the best epoch", f"{v:.6g}") for name, v in best.items() if name not in ("epoch", "step")]
    rows += _baseline(state)
    rows.append(("epochs, steps", f"{state.progress.epoch}, {state.progress.step}"))
    rows.append(("seconds", f"{seconds:.1f}"))
    rows.append(("ended by", repr(state.error) if state.error else state.stop_reason or "the end of training"))
    rows += state.report.items()
    if state.verdict is not None:
        rows.append(("verdict", f"{state.verdict.status}: {state.verdict.evidence}"))
    return _table("result", rows)


def _baseline(state: State) -> list[tuple[str, str]]:
    """What the validation loss is to be compared with."""
    if state.baseline is None:
        return []
    rows = [("val/loss of the best constant prediction", f"{state.baseline.constant:.6g}")]
    if math.isfinite(state.baseline.uniform):
        rows.append(("val/loss of equal logits", f"{state.baseline.uniform:.6g}"))
    return rows


def _table(title: str, rows: Iterable[tuple[str, Any]]) -> str:
    lines = [f"| {name} | {str(value).replace('|', '&#124;')} |" for name, value in rows]
    return "\n".join([f"| {title} | value |", "|---|---|", *lines])


def _start_report(state: State) -> Any:
    from fitwatch.callbacks import _events  # noqa: PLC0415 - as above

    settings = {**state.settings, **dict(_baseline(state)), "git": _git_revision()}
    return _events.text("report/start", _table("setting", settings.items()))


def _best(best: Mapping[str, float]) -> list[Any]:
    from fitwatch.callbacks import _events  # noqa: PLC0415 - as above

    dots = {name: v for name, v in best.items() if name.startswith("val/") and math.isfinite(v)}
    dots = dots or {"train/loss": best["train/loss"]}
    values = [_events.scalar(_run_and_tag(name)[1], v) for name, v in dots.items()]
    values.append(_events.scalar("report/best_epoch", best["epoch"]))
    if "val/loss" in best:
        values.append(_events.scalar("report/gap_at_best", best["val/loss"] - best["train/loss"]))
    return values


def _page(tags: set[str]) -> dict[str, dict[str, tuple[str, list[str]]]]:
    """The categories and charts that have something to show."""
    page = {
        category: {
            title: (kind, wanted)
            for title, (kind, wanted) in charts.items()
            if any(re.match(pattern, tag) for pattern in wanted for tag in tags)
        }
        for category, charts in _PAGE.items()
    }
    return {category: charts for category, charts in page.items() if charts}


def _append(texts: dict[str, str], tag: str, text: str) -> None:
    """Add a text; of two under one tag at one step the server would keep one."""
    texts[tag] = f"{texts[tag]}\n\n{text}" if tag in texts else text


def _run_and_tag(name: str) -> tuple[str, str]:
    run, _, tag = name.partition("/")
    if run not in ("train", "val"):
        run, tag = "train", name
    if "/" not in tag and not tag.startswith("loss"):
        tag = f"metrics/{tag}"
    return run, tag


def _new_folder(parent: Path, name: str) -> Path:
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError as error:
            if not folder.is_dir():
                raise OSError(f"can't make the run folder {folder}: a file of this name is in the way") from error
            number += 1
        except OSError as error:
            raise OSError(f"can't make the run folder {folder}: {error}") from error
        else:
            return folder


def _remove_markers(run_dir: Path, *, keep: Collection[str]) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader  # noqa: PLC0415 - as above

    for folder in run_dir.iterdir():
        files = list(folder.glob("events.out.tfevents.*"))
        if folder.name in (*_RUNS, *keep) or not files:
            continue
        # A bar holds two points of one tag; what a user keeps beside it is left alone.
        events = [event for file in files for event in EventFileLoader(str(file)).Load()]
        if {value.tag for event in events for value in event.summary.value} == {"loss"}:
            shutil.rmtree(folder)


def _git_revision() -> str:
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "none"
    return run.stdout.strip()
