"""Checkpoints, last and best."""

import logging
import math
import re
import time
from functools import partial
from pathlib import Path

from attrs import define, field

from fitwatch import files, ranks, saving
from fitwatch.background import Background
from fitwatch.callback import Callback
from fitwatch.data.batches import is_stream
from fitwatch.helpers import health
from fitwatch.helpers.aliases import StateDict
from fitwatch.helpers.options import instance, integer, local_path, number
from fitwatch.helpers.primitives import bytes_of, copied_to_host
from fitwatch.locking import FolderLock
from fitwatch.state import State

logger = logging.getLogger("fitwatch")

_STREAM_STEPS = 1000  # between two saves of a stream, if it is not evaluated more often
_LARGE = 1 << 26  # bytes of tensors; what is smaller is written faster than a thread is worth
_NAME = re.compile(r"(epoch|step)-(0|[1-9][0-9]*)\.pt")


@define(eq=False, slots=False)
class Checkpoint(Callback):
    """Saves the state of training for resuming, and the best model.

    Writes ``epoch-N.pt`` every ``every_epochs`` epochs (N epochs are complete), ``step-N.pt`` every ``every_steps``
    steps or ``every_minutes``, and ``best.pt`` after an evaluation that is the best so far by the monitored metric.
    Each file holds model, optimizer, scheduler, scaler, callbacks, counters, history and random generators, and a
    checksum of all that. A file appears completely or not at all, and older ones are deleted only once the newer one is
    safe on disk. No file is deleted that fitwatch did not write.

    ``resume="auto"`` goes on from the newest file that is whole. A damaged one is renamed to ``*.damaged``, and a
    warning says so.

    While a fit runs, ``fit.lock`` in the folder names its host and process: a second fit in the folder is refused. The
    file of a fit that was killed is ignored; if that ran on another host, a new fit waits a minute to be sure.

    It runs after the other callbacks, wherever it stands in the list, since it saves their state. When training resumes
    from an older file, the newer ones are renamed to ``*.old``.

    Training resumes from the newest file of both kinds, to the bit, also within an epoch: the sampler draws the order
    again, and batches already seen are skipped. A loader with ``state_dict`` and ``load_state_dict``, as torchdata's,
    goes on by itself. Any other iterable is read again up to its place, with a warning. ``best.pt`` is for predictions:
    a `ReduceLROnPlateau` has not seen its validation yet. Ctrl-C, SIGTERM and SIGUSR1 end
    training after the current step, with a ``step-N.pt``.

    A training loader without a length may be a stream without an end, which completes no epoch. So there, unless
    ``every_steps`` is given, ``step-N.pt`` is written too: one step after each evaluation, after 1,000 steps without
    one, and when training ends.

    ``best.pt`` has the weights that were measured, even if a callback swaps others back before it is written.

    A model with non-finite weights is not saved: the last good file stays. A ``best.pt`` of an earlier run, or from
    after the point of resumption, is renamed to ``best.pt.old``. A second ``fit`` of the same Trainer replaces
    ``best.pt`` only by a better model; with ``reset=True`` it is renamed too.

    A fit that resumes from a file in another folder is a fork: it starts a new folder, and the old one stays as it is.
    The best evaluation so far counts, so the fork has a ``best.pt`` only once it is better.

    Args:
        dir: Folder for the files; created if it does not exist. ``~`` is the home folder.
        every_epochs: Epochs between two saves; None: no such saves.
        every_steps: Steps between two saves; None: no such saves.
        every_minutes: Minutes after which ``step-N.pt`` is saved if nothing else was; None: no such saves. With several
            ranks the clock is read only where a log window ends.
        keep: Number of newest files to keep of each kind.
        best: Whether to keep ``best.pt``.
        background: Whether to write files of 64 MB and more in a thread, from a copy in the host's memory, while
            training goes on. One is written at a time; an error is raised after the next step. False: training waits.
    """

    dir: Path = field(converter=local_path)
    every_epochs: int | None = field(default=1, kw_only=True, validator=integer(1, or_none=True))
    every_steps: int | None = field(default=None, kw_only=True, validator=integer(1, or_none=True))
    every_minutes: float | None = field(default=None, kw_only=True, validator=number(above=0, or_none=True))
    keep: int = field(default=1, kw_only=True, validator=integer(1))
    best: bool = field(default=True, kw_only=True, validator=instance(bool))
    background: bool = field(default=True, kw_only=True, validator=instance(bool))

    runs_last = True

    def __attrs_post_init__(self) -> None:
        self._warned = False
        self._stream = False  # whether the training loader has no length, and the steps between saves are not given
        self._due, self._saved_step = False, 0  # of step-N.pt for a stream
        self._best: tuple[str, float] | None = None  # the monitored metric, and its value in best.pt
        self._saved_at = 0.0  # when, by a clock that is never set
        self._writing = Background()
        self._lock: FolderLock | None = None  # during a fit

    def on_fit_start(self, state: State) -> None:
        """Create the folder, so that a path that can't be written to fails before step 1. Only rank 0 has files.

        Raises:
            OSError: The folder can't be created or written to.
            FileExistsError: It holds checkpoints of another run.
            RuntimeError: Another fit runs in it.
        """
        if not len(state.history):
            self._best = None
        if self.best:
            state.validation.keep_weights()
        self._stream = self.every_epochs is not None and self.every_steps is None and is_stream(state.train_loader)
        self._due, self._saved_step, self._saved_at = False, state.progress.step, time.monotonic()
        if ranks.rank():
            return
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(self.dir)
            lock.acquire()
            self._lock = lock
        except OSError as error:
            raise OSError(f"can't create or write to the checkpoint folder {self.dir}: {error}") from error
        fork = state.resumed_from is not None and state.resumed_from.parent.resolve() != self.dir.resolve()
        fresh = state.progress.step == 0 or fork
        if fresh and (old := [*self._files("epoch"), *self._files("step")]):
            raise FileExistsError(
                f"{self.dir} holds the checkpoint {old[-1].name} of an earlier run: continue it with "
                'resume="auto", or choose another folder'
            )
        files.remove_parts(self.dir)  # of saves that were killed
        if fork:
            self._warn_of_fork(state)
        later = [f for f in self._files("epoch") if _count(f) > state.progress.epoch]
        for file in later + [f for f in self._files("step") if _count(f) > state.progress.step]:
            file.replace(file.with_name(f"{file.name}.old"))  # abandoned: "auto" must not find it
        self._put_aside(state, fork=fork)
        if self._stream:
            logger.warning(
                "train_loader has no length, so it may be a stream without an end: Checkpoint also saves step-N.pt "
                "after each evaluation, or after %d steps without one (other intervals: every_steps)",
                _STREAM_STEPS,
            )

    def _put_aside(self, state: State, *, fork: bool) -> None:
        """Rename a ``best.pt`` that is not the best of this history."""
        best = self.dir / "best.pt"
        if best.exists() and (fork or not (len(state.history) and 0 <= _step_of(best) <= state.progress.step)):
            best.replace(best.with_name("best.pt.old"))

    def _warn_of_fork(self, state: State) -> None:
        best, name = state.history.best, state.history.monitor
        so_far = "" if best is None else f" than {name} {best[name]:.6g} of step {best['step']:g}, the best so far"
        logger.warning(
            "this fit starts from %s and saves to %s: best.pt is written there once an evaluation is better%s",
            state.resumed_from,
            self.dir,
            so_far,
        )

    def on_step_end(self, state: State) -> None:
        """Save every ``every_steps`` steps, or ``every_minutes``; raise the error of a save in the background."""
        self._writing.check()
        step = state.progress.step
        due = self._stream and (self._due or step - self._saved_step >= _STREAM_STEPS)
        if self.every_minutes is not None and not due:
            due = self._is_late(state, self.every_minutes)
        interrupted = state.interrupted is not None and state.position.started is not None
        if due or interrupted or (self.every_steps is not None and step % self.every_steps == 0):
            self._due, self._saved_step = False, step
            state.between_steps(partial(self._save, state, "step", step))

    def on_validation_end(self, state: State) -> None:
        """Save the best model."""
        self._save_best(state)
        self._due = self._stream

    def on_epoch_end(self, state: State) -> None:
        """Save every ``every_epochs`` epochs; without a validation set, the best model too."""
        if state.val_loader is None:
            self._save_best(state)
        complete = state.progress.epoch_batch == 0
        self._due = False
        interrupted = state.interrupted is not None and state.position.started is not None
        if (self._stream or interrupted) and not complete and state.progress.step > self._saved_step:
            self._saved_step = state.progress.step
            self._save(state, "step", state.progress.step)
        if self.every_epochs is not None and complete and state.progress.epoch % self.every_epochs == 0:
            self._save(state, "epoch", state.progress.epoch)

    def on_fit_end(self, _: State) -> None:
        """Wait for the save that is under way, and release the folder.

        Raises:
            OSError: That save failed.
        """
        try:
            self._writing.wait()
        finally:
            lock, self._lock = self._lock, None
            if lock is not None:
                lock.release()

    def latest(self) -> Path | None:
        """Return the file that training resumes from: the newest one that is whole. None: there is none.

        What is newer and can't be resumed from is renamed, with a warning.

        Raises:
            RuntimeError: Another fit runs in the folder.
        """
        if not (found := [*self._files("epoch"), *self._files("step")]):
            return None
        lock = FolderLock(self.dir)
        lock.acquire()
        try:
            for file in (ordered := sorted(found, key=_age, reverse=True)):
                if (fault := _fault(file)) is None:
                    others = [other.name for other in ordered if other is not file and _age(other)[0] < 0]
                    if others:
                        logger.warning(
                            'resume="auto" leaves out what another version of fitwatch wrote: %s', ", ".join(others)
                        )
                    return file
                new = files.put_aside(file, fault[0])
                logger.warning('resume="auto" skips %s, which is now %s: %s', file, new.name, fault[1])
        finally:
            lock.release()
        logger.warning("no file in %s can be resumed from: training starts from the beginning", self.dir)
        return None

    def state_dict(self) -> StateDict:
        """Return the monitored metric and its value in ``best.pt``."""
        return {"best": self._best}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: It is not a metric and its value.
        """
        best = state_dict.get("best")
        match best:
            case None:
                self._best = None
            case [str(name), int() | float() as value]:
                self._best = name, value
            case _:
                raise ValueError(f"best must be the name of a metric and its value, got {best!r}")

    def _save_best(self, state: State) -> None:
        history = state.history
        if not self.best or not history.is_best or self._refuses(state):
            return
        value, sign = history.newest[history.monitor], 1 if history.mode == "min" else -1
        known = self._best
        if known is None or known[0] != history.monitor or sign * value < sign * known[1]:
            self._best = history.monitor, value
            self._write(state, "best", 0, weights=state.validation.weights)

    def _is_late(self, state: State, minutes: float) -> bool:
        """Return whether the last save is ``minutes`` ago, on all ranks alike."""
        late = time.monotonic() - self._saved_at >= 60 * minutes
        if ranks.size() == 1:
            return late
        return state.progress.step % state.plan.log_every == 0 and ranks.from_main(late)

    def _save(self, state: State, kind: str, count: int) -> None:
        if self._refuses(state):
            return
        self._saved_at = time.monotonic()
        self._write(state, kind, count)
        if state.interrupted and not ranks.rank():
            logger.warning(
                'interrupted by %s: saved %s; run the script again with resume="auto" to go on',
                state.interrupted,
                self.dir / f"{kind}-{count}.pt",
            )

    def _write(self, state: State, kind: str, count: int, *, weights: StateDict | None = None) -> None:
        """Write a file, beside the training if that pays."""
        content = saving.content_of(state, weights=weights)
        if content is None:
            return
        self._writing.wait()  # one at a time, since each takes the memory of a copy
        if self._lock is not None:
            self._lock.check()
        if self.background and state.interrupted is None and bytes_of(content) >= _LARGE:
            self._writing.start(partial(self._write_now, copied_to_host(content), kind, count))
        else:
            self._write_now(content, kind, count)

    def _write_now(self, content: saving.Content, kind: str, count: int) -> None:
        if kind == "best":
            saving.write(self.dir / "best.pt", content)
            return
        saving.write(self.dir / f"{kind}-{count}.pt", content)
        for old in [file for file in self._files(kind) if files.is_own(file)][: -self.keep]:
            old.unlink()

    def _refuses(self, state: State) -> bool:
        """Return whether the model has non-finite weights, on any rank; warn the first time."""
        name = ranks.agree(health.not_finite(state.model))
        if name is not None and not self._warned:
            self._warned = True
            logger.warning("no checkpoint is saved at step %d: %s is not finite", state.progress.step, name)
        return name is not None

    def _files(self, kind: str) -> list[Path]:
        files = [f for f in self.dir.glob(f"{kind}-*.pt") if _NAME.fullmatch(f.name)]
        return sorted(files, key=_count)


def _step_of(file: Path) -> int:
    """Return the step at which a checkpoint was saved; -1 if it can't be read."""
    try:
        return int(saving.read(file, data=False)["progress"]["step"])
    except (KeyError, OSError, TypeError, ValueError):
        return -1


def _age(file: Path) -> tuple[float, bool]:
    """Order files by their step, and at the same one epoch-N.pt, with the validation, after step-N.pt.

    A damaged file counts as the newest, since it may be, and one of another format as the oldest.
    """
    try:
        step: float = int(saving.read(file, data=False)["progress"]["step"])
    except (saving.DamagedError, KeyError, OSError, TypeError):
        step = math.inf
    except ValueError:
        step = -1
    return step, file.name.startswith("epoch")


def _fault(file: Path) -> tuple[str, str] | None:
    """Return the ending that a file gets, and why training can't resume from it; None if it can, as far as it shows."""
    try:
        content = saving.read(file, data=False, verify=True)
        if not content["progress"]["epoch_batch"] or content.get("position") is not None:
            return None
    except (saving.DamagedError, KeyError, OSError, TypeError) as error:
        return "damaged", str(error) if isinstance(error, (ValueError, OSError)) else "it is not a checkpoint"
    except ValueError:  # of another format: what is whole is refused by name, and not given up
        return None
    return "old", "it was saved within an epoch by a loop over its own loader, whose place is unknown"


def _count(file: Path) -> int:
    return int(file.stem.rpartition("-")[2])
