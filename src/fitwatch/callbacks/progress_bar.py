"""A progress bar."""

from attrs import define
from tqdm.auto import tqdm

from fitwatch.callback import Callback
from fitwatch.data.sharding import steps_per_epoch
from fitwatch.state import State

_SHOWN = {"train/optim/loss": "loss", "train/loss": "train", "val/loss": "val"}


@define(eq=False, slots=False)
class ProgressBar(Callback):
    """Shows the epoch, its steps, and the losses of the latest log window in one tqdm line.

    Silent if standard error is not a terminal, except in a notebook.
    """

    main_only = True

    def __attrs_post_init__(self) -> None:
        self._bar: tqdm | None = None
        self._values: dict[str, object] = {}

    def on_epoch_start(self, state: State) -> None:
        """Start the bar of the epoch, on the same line as the last."""
        progress = state.progress
        of = f"/{progress.first_epoch + state.plan.epochs}" if state.plan.epochs is not None else ""
        description, total = f"epoch {progress.epoch + 1}{of}", _steps(state)
        if self._bar is None:
            # In a notebook, whose stream is not a terminal, disable=None would silence the bar.
            quiet = False if any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__) else None
            self._bar = tqdm(desc=description, total=total, unit="step", disable=quiet)
        elif not self._bar.disable:
            self._bar.set_description(description, refresh=False)
            self._bar.reset(total)
        self._bar.update(progress.epoch_step)  # if training resumes within the epoch

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
        """Show the final state of the epoch."""
        if self._bar is not None:
            self._bar.refresh()

    def on_fit_end(self, state: State) -> None:  # noqa: ARG002 - the hook's signature
        """Close the bar and leave it on the screen."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._values = None, {}


def _steps(state: State) -> int | None:
    """Return the number of optimizer steps in the epoch, or None if unknown."""
    progress, most = state.progress, state.plan.max_steps
    left = None if most is None else most - (progress.step - progress.first_step)
    known = [n for n in (left, steps_per_epoch(state.train_loader, state.plan.accumulate)) if n is not None]
    return min(known, default=None)
