"""Checkpoints, last and best."""

import logging
from pathlib import Path

from attrs import define, field

from fitwatch import ranks, saving
from fitwatch.callback import Callback
from fitwatch.helpers import health
from fitwatch.helpers.aliases import StateDict
from fitwatch.helpers.options import instance, integer
from fitwatch.state import State

logger = logging.getLogger("fitwatch")


@define(eq=False, slots=False)
class Checkpoint(Callback):
    """Saves the state of training for resuming, and the best model.

    Writes ``epoch-N.pt`` every ``every_epochs`` epochs (N epochs are complete), ``step-N.pt`` every ``every_steps``
    steps, and ``best.pt`` after an evaluation that is the best so far by the monitored metric. Each file holds model,
    optimizer, scheduler, scaler, callbacks, counters, history and random generators. A file appears completely or not
    at all, and older ones are deleted only once the newer one is safe on disk.

    It runs after the other callbacks, wherever it stands in the list, since it saves their state. When training resumes
    from an older file, the newer ones are renamed to ``*.old``.

    Training resumes from ``epoch-N.pt``. A file written mid-epoch has the weights, but resuming from it would not be
    exact, and raises an error.

    ``best.pt`` has the weights that were measured, even if a callback swaps others back before it is written.

    A model with non-finite weights is not saved: the last good file stays. A ``best.pt`` of an earlier run, or from
    after the point of resumption, is renamed to ``best.pt.old``. A second ``fit`` of the same Trainer replaces
    ``best.pt`` only by a better model; with ``reset=True`` it is renamed too.

    Args:
        dir: Folder for the files; created if it does not exist.
        every_epochs: Epochs between two saves; None: no such saves.
        every_steps: Steps between two saves; None: no such saves.
        keep: Number of newest files to keep of each kind.
        best: Whether to keep ``best.pt``.
    """

    dir: Path = field(converter=Path)
    every_epochs: int | None = field(default=1, kw_only=True, validator=integer(1, or_none=True))
    every_steps: int | None = field(default=None, kw_only=True, validator=integer(1, or_none=True))
    keep: int = field(default=1, kw_only=True, validator=integer(1))
    best: bool = field(default=True, kw_only=True, validator=instance(bool))

    runs_last = True

    def __attrs_post_init__(self) -> None:
        self._readable = self._warned = False
        self._best: tuple[str, float] | None = None  # the monitored metric, and its value in best.pt

    def on_fit_start(self, state: State) -> None:
        """Create the folder, so that a path that can't be written to fails before step 1. Only rank 0 has files.

        Raises:
            OSError: The folder can't be created.
            FileExistsError: It holds checkpoints of another run.
        """
        if not len(state.history):
            self._best = None
        if self.best:
            state.validation.keep_weights()
        if ranks.rank():
            return
        if state.progress.step == 0 and (old := [*self._files("epoch"), *self._files("step")]):
            raise FileExistsError(
                f"{self.dir} holds the checkpoint {old[-1].name} of an earlier run: continue it with "
                'resume="auto", or choose another folder'
            )
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"can't create the checkpoint folder {self.dir}: {error}") from error
        for part in self.dir.glob("*.pt.part-*"):  # of a save that was killed
            part.unlink()
        later = [f for f in self._files("epoch") if _count(f) > state.progress.epoch]
        for file in later + [f for f in self._files("step") if _count(f) > state.progress.step]:
            file.replace(file.with_name(f"{file.name}.old"))  # abandoned: "auto" must not find it
        best = self.dir / "best.pt"
        if best.exists() and not (len(state.history) and 0 <= _step_of(best) <= state.progress.step):
            best.replace(best.with_name("best.pt.old"))

    def on_step_end(self, state: State) -> None:
        """Save every ``every_steps`` steps."""
        if self.every_steps is not None and state.progress.step % self.every_steps == 0:
            self._save(state, "step", state.progress.step)

    def on_validation_end(self, state: State) -> None:
        """Save the best model."""
        self._save_best(state)

    def on_epoch_end(self, state: State) -> None:
        """Save every ``every_epochs`` epochs; without a validation set, the best model too."""
        if state.val_loader is None:
            self._save_best(state)
        complete = state.progress.epoch_batch == 0
        if self.every_epochs is not None and complete and state.progress.epoch % self.every_epochs == 0:
            self._save(state, "epoch", state.progress.epoch)

    def latest(self) -> Path | None:
        """Return the newest checkpoint that training can resume from, or None.

        Raises:
            ValueError: No file can be resumed from.
        """
        files = self._files("epoch")
        if not files and (steps := self._files("step")):
            raise ValueError(f"{steps[-1]} was saved before the end of an epoch: no checkpoint can be resumed from")
        return files[-1] if files else None

    def state_dict(self) -> StateDict:
        """Return the monitored metric and its value in ``best.pt``."""
        return {"best": self._best}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore what `state_dict` returned."""
        best = state_dict.get("best")
        self._best = None if best is None else (best[0], best[1])

    def _save_best(self, state: State) -> None:
        history = state.history
        if not self.best or not history.is_best or self._refuses(state):
            return
        value, sign = history.newest[history.monitor], 1 if history.mode == "min" else -1
        known = self._best
        if known is None or known[0] != history.monitor or sign * value < sign * known[1]:
            self._best = history.monitor, value
            saving.save(self.dir / "best.pt", state, weights=state.validation.weights)

    def _save(self, state: State, kind: str, count: int) -> None:
        path = self.dir / f"{kind}-{count}.pt"
        if self._refuses(state):
            return
        saving.save(path, state)
        if ranks.rank():
            return
        if not self._readable:  # fail now, not on resume, if a state_dict holds more than data
            saving.read(path)
            self._readable = True
        for old in self._files(kind)[: -self.keep]:
            old.unlink()

    def _refuses(self, state: State) -> bool:
        """Return whether the model has non-finite weights, on any rank; warn the first time."""
        name = ranks.agree(health.not_finite(state.model))
        if name is not None and not self._warned:
            self._warned = True
            logger.warning("no checkpoint is saved at step %d: %s is not finite", state.progress.step, name)
        return name is not None

    def _files(self, kind: str) -> list[Path]:
        files = [f for f in self.dir.glob(f"{kind}-*.pt") if f.stem.rpartition("-")[2].isdigit()]
        return sorted(files, key=_count)


def _step_of(file: Path) -> int:
    """Return the step at which a checkpoint was saved; -1 if it can't be read."""
    try:
        return int(saving.read(file)["progress"]["step"])
    except ValueError:
        return -1


def _count(file: Path) -> int:
    return int(file.stem.rpartition("-")[2])
