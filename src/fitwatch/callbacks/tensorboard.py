"""One page in TensorBoard: train and validation in one chart, the best epoch, the bars, the reports."""

import json
import math
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from attrs import define, field
from attrs.validators import instance_of, matches_re

from fitwatch.callback import Callback
from fitwatch.state import Marker, Record, State

_MARKERS = ("overfitting", "early stop")


@define(eq=False, slots=False)
class TensorBoard(Callback):
    """Writes what is logged to ``<dir>/<name>``, as sub-runs that share their tags and so their charts.

    ``train`` and ``val`` hold the curves, ``best`` a dot at the best evaluation and the settings, and each event, such as
    overfitting, is a vertical bar in a sub-run of its own. A name that is in use gets a number: ``run``, ``run-2``, ...
    A resumed fit goes on in its own folder.

    A value logged as ``train/x`` is the tag ``x`` of the sub-run ``train``; ``val/accuracy`` becomes ``metrics/accuracy``.
    One event is written for each window and sub-run. The command to open the page and a link to the run are printed when
    training starts and when it ends.

    Args:
        dir: The folder to open in TensorBoard, holding all runs.
        name: Of the run; no slash in it.
        show_link: Whether to print the command and the link.
    """

    dir: Path = field(default=Path("runs"), converter=Path)
    name: str = field(default="run", kw_only=True, validator=[instance_of(str), matches_re(r"[^/\\]+")])
    show_link: bool = field(default=True, kw_only=True, validator=instance_of(bool))

    def __attrs_post_init__(self) -> None:
        self.run_dir: Path | None = None  # known once fitting has started
        self._files: dict[str, Any] = {}

    def on_fit_start(self, state: State) -> None:
        """Make the run's folder, and write the start report and the layout of the Custom Scalars page.

        Raises:
            OSError: The folder can't be made; the message names it.
        """
        self._started, self._pid = time.time(), os.getpid()
        self._first_step = state.progress.step
        if self.run_dir is None:
            self.run_dir = _new_folder(self.dir, self.name)
        if self._first_step:  # events that lie beyond the point of resumption did not happen
            _remove_markers(self.run_dir, self._first_step)
        self._write("train", self._first_step, [*self._start_report(state)])
        if self.show_link:
            print(f"TensorBoard: tensorboard --logdir {self.dir}\n  {self.link()}")  # noqa: T201 - asked for

    def on_log(self, state: State) -> None:
        """Write the records: one event for each sub-run."""
        from fitwatch.callbacks import _events  # noqa: PLC0415 - a third of a second that only users of this pay

        groups: dict[str, list[Any]] = {}
        for record in state.records:
            if isinstance(record.value, Marker):
                self._mark(record.name, record.step, record.value)
                continue
            run, tag = _run_and_tag(record)
            make = _events.text if isinstance(record.value, str) else _events.scalar
            groups.setdefault(run, []).append(make(tag, record.value))
        for run, values in groups.items():
            self._write(run, state.progress.step, values)

    def on_fit_end(self, state: State) -> None:
        """Write the dot at the best evaluation and the end report, and close the files."""
        if self.run_dir is None:
            return
        best = state.best
        if best is not None:
            self._write("best", int(best["step"]), self._best(state, best))
        for file in self._files.values():
            file.close()
        self._files = {}
        if self.show_link:
            print(f"TensorBoard: tensorboard --logdir {self.dir}\n  {self.link()}")  # noqa: T201 - asked for

    def link(self, port: int = 6006) -> str:
        """The address of this run's page in a TensorBoard server on ``dir``."""
        pins = ["loss", "overfit/gap", "optim/grad_norm_max", "optim/lr"]
        cards = json.dumps([{"plugin": "scalars", "tag": tag} for tag in pins], separators=(",", ":"))
        name = self.run_dir.name if self.run_dir is not None else self.name
        # smoothing=0: the default of 0.6 moves the apparent minimum by epochs
        query = f"smoothing=0&runFilter={quote(f'^{name}/')}&pinnedCards={quote(cards)}"
        return f"http://localhost:{port}/?{query}#timeseries"

    def state_dict(self) -> dict[str, Any]:
        """The run's folder."""
        return {"run_dir": None if self.run_dir is None else str(self.run_dir)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back, if it still exists."""
        folder = state_dict["run_dir"]
        self.run_dir = Path(folder) if folder is not None and Path(folder).is_dir() else None

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

        # A line needs two points, and of two points at one step the server keeps one.
        self._write(name, step, [_events.scalar("loss", marker.low)])
        self._write(name, step + 1, [_events.scalar("loss", marker.high)])

    def _start_report(self, state: State) -> list[Any]:
        from fitwatch.callbacks import _events  # noqa: PLC0415 - as above

        settings = {**state.settings, "git": _git_revision()}
        rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
        gap = ["overfit/train_loss$", "overfit/val_loss$"]
        page = {
            "1 Overfitting": {
                "train and validation loss": ("lines", ["loss$"]),
                "generalisation gap (shaded)": ("margin", ["overfit/val_loss$", *gap]),
                "rise of the validation loss, and its threshold": (
                    "lines",
                    ["overfit/rise$", "overfit/threshold$"],
                ),
            },
            "2 Gradients": {
                "total norm: mean and max of the window": (
                    "lines",
                    ["optim/grad_norm$", "optim/grad_norm_max$"],
                ),
                "norm per layer": ("lines", ["params/grad_norm/.*$"]),
            },
            "3 Optimiser": {"learning rate": ("lines", ["optim/lr$"])},
        }
        return [_events.text("report/start", f"| setting | value |\n|---|---|\n{rows}"), _events.layout(page)]

    def _best(self, state: State, best: dict[str, float]) -> list[Any]:
        from fitwatch.callbacks import _events  # noqa: PLC0415 - as above

        dots = [Record(n, 0, v) for n, v in best.items() if n.startswith("val/") and math.isfinite(v)]
        dots = dots or [Record("train/loss", 0, best["train/loss"])]
        values = [_events.scalar(_run_and_tag(dot)[1], float(dot.value)) for dot in dots]
        values.append(_events.scalar("report/best_epoch", best["epoch"]))
        if "val/loss" in best:
            values.append(_events.scalar("report/gap_at_best", best["val/loss"] - best["train/loss"]))
        values.append(_events.scalar("report/seconds", time.time() - self._started))
        assert self.run_dir is not None
        settings = {name: value for name, value in state.settings.items() if name != "device"}
        values += _events.hparams(settings, self.run_dir.name, self._started, succeeded=state.error is None)
        return values


def _run_and_tag(record: Record) -> tuple[str, str]:
    run, _, tag = record.name.partition("/")
    if run not in ("train", "val"):
        run, tag = "train", record.name
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


def _remove_markers(run_dir: Path, step: int) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader  # noqa: PLC0415 - as above

    for folder in (run_dir / name for name in _MARKERS):
        files = list(folder.glob("events.out.tfevents.*"))
        if any(
            event.step >= step and event.HasField("summary") for f in files for event in EventFileLoader(str(f)).Load()
        ):
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
