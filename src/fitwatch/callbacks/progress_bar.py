"""A progress bar."""

from typing import Any

from attrs import define
from tqdm.auto import tqdm

from fitwatch.callback import Callback
from fitwatch.data.sharding import split_length
from fitwatch.state import State

_SHOWN = {"train/optim/loss": "loss", "train/loss": "train", "val/loss": "val"}


@define(eq=False, slots=False)
class ProgressBar(Callback):
    """One line on tqdm: the epoch, its steps, and the losses, which change with the log windows only.

    Silent where standard error is no terminal (a log file), except in a notebook.
    """

    main_only = True

    def __attrs_post_init__(self) -> None:
        self._bar: Any = None
        self._values: dict[str, Any] = {}

    def on_epoch_start(self, state: State) -> None:
        """Begin the epoch's bar, in the line of the last."""
        progress = state.progress
        of = f"/{progress.first_epoch + state.plan.epochs}" if state.plan.epochs is not None else ""
        description, total = f"epoch {progress.epoch + 1}{of}", _steps(state)
        if self._bar is None:
            # tqdm's own test for a terminal would silence it in a notebook, whose stream is none.
            quiet = False if any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__) else None
            self._bar = tqdm(desc=description, total=total, unit="step", disable=quiet)
        elif not self._bar.disable:
            self._bar.set_description(description, refresh=False)
            self._bar.reset(total)

    def on_step_end(self, state: State) -> None:  # noqa: ARG002 - the hook's signature
        """Count."""
        self._bar.update()

    def on_log(self, state: State) -> None:
        """Show the newest losses."""
        if self._bar is not None and not self._bar.disable:
            self._values |= {_SHOWN[r.name]: r.value for r in state.records if r.name in _SHOWN}
            self._bar.set_postfix(self._values, refresh=False)

    def on_epoch_end(self, state: State) -> None:  # noqa: ARG002 - the hook's signature
        """Show the epoch as it ended."""
        self._bar.refresh()

    def on_fit_end(self, state: State) -> None:  # noqa: ARG002 - the hook's signature
        """Leave the last bar on the screen."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._values = None, {}


def _steps(state: State) -> int | None:
    """Optimizer steps of the epoch, where the loader knows its length."""
    batches, most = split_length(state.train_loader), None
    if state.plan.max_steps is not None:
        most = state.plan.max_steps - (state.progress.step - state.progress.first_step)
    if batches is None:
        return most
    steps = -(-batches // state.plan.accumulate)
    return steps if most is None else min(steps, most)
