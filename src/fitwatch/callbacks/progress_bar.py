"""A progress bar."""

from contextlib import ExitStack

from attrs import define
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from fitwatch.callback import Callback
from fitwatch.data.sharding import steps_per_epoch
from fitwatch.state import State

_SHOWN = {"train/optim/loss": "loss", "train/loss": "train", "val/loss": "val"}


@define(eq=False, slots=False)
class ProgressBar(Callback):
    """Shows the epoch, the steps of the whole fit, the time left, and the losses of the latest log window in one line.

    Messages of Python's ``logging`` go above the bar. Silent if standard error is not a terminal, except in a notebook.
    """

    main_only = True

    def __attrs_post_init__(self) -> None:
        self._bar: tqdm | None = None
        self._exits = ExitStack()
        self._values: dict[str, object] = {}

    def on_epoch_start(self, state: State) -> None:
        """Name the epoch; the bar starts with the first."""
        progress = state.progress
        of = f"/{progress.first_epoch + state.plan.epochs}" if state.plan.epochs is not None else ""
        description, total = f"epoch {progress.epoch + 1}{of}", _steps(state)
        if self._bar is None:
            # In a notebook, whose stream is not a terminal, disable=None would silence the bar.
            quiet = False if any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__) else None
            done = progress.step - progress.first_step
            self._bar = tqdm(desc=description, total=total, initial=done, unit="step", disable=quiet)
            if not self._bar.disable:
                self._exits.enter_context(logging_redirect_tqdm())
        elif not self._bar.disable:
            self._bar.set_description(description, refresh=False)
            self._bar.total = total

    def on_step_end(self, state: State) -> None:  # noqa: ARG002 - the hook's signature
        """Advance the bar by one step."""
        if self._bar is not None:
            self._bar.update()

    def on_log(self, state: State) -> None:
        """Show the latest losses."""
        if self._bar is not None and not self._bar.disable:
            self._values |= {_SHOWN[r.name]: r.value for r in state.records if r.name in _SHOWN}
            self._bar.set_postfix(self._values, refresh=False)

    def on_epoch_end(self, state: State) -> None:  # noqa: ARG002 - the hook's signature
        """Show the losses of the epoch."""
        if self._bar is not None:
            self._bar.refresh()

    def on_fit_end(self, state: State) -> None:  # noqa: ARG002 - the hook's signature
        """Close the bar and leave it on the screen."""
        if self._bar is not None:
            self._bar.close()
        self._exits.close()
        self._bar, self._values = None, {}


def _steps(state: State) -> int | None:
    """Return the number of optimizer steps in the fit, or None if unknown."""
    progress, plan = state.progress, state.plan
    per_epoch, done = steps_per_epoch(state.train_loader, plan.accumulate), progress.epoch - progress.first_epoch
    if done:  # what the epochs had so far, if the loader does not tell
        per_epoch = per_epoch or (progress.step - progress.epoch_step - progress.first_step) // done
    by_epochs = None if plan.epochs is None or not per_epoch else plan.epochs * per_epoch
    return min((n for n in (plan.max_steps, by_epochs) if n is not None), default=None)
