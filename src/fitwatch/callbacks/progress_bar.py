"""A progress bar."""

from attrs import define
from tqdm.auto import tqdm

from fitwatch.callback import Callback
from fitwatch.loading import length
from fitwatch.state import State


@define(eq=False, slots=False)
class ProgressBar(Callback):
    """A bar over the steps of each epoch, on tqdm; the losses beside it change with the log windows only.

    Silent where standard error is no terminal (a log file), except in a notebook.
    """

    def on_epoch_start(self, state: State) -> None:
        """Begin a bar."""
        batches = length(state.train_loader)
        accumulate = int(state.settings.get("accumulate", 1))
        steps = None if batches is None else -(-batches // accumulate)
        if state.max_steps is not None:
            left = state.max_steps - (state.progress.step - state.progress.first_step)
            steps = left if steps is None else min(steps, left)
        of = f"/{state.progress.first_epoch + state.epochs}" if state.epochs is not None else ""
        # tqdm's own test for a terminal would silence it in a notebook, whose stream is none.
        quiet = False if any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__) else None
        self._bar = tqdm(desc=f"epoch {state.progress.epoch + 1}{of}", total=steps, unit="step", disable=quiet)

    def on_step_end(self, state: State) -> None:  # noqa: ARG002 - the hook's signature
        """Count."""
        self._bar.update()

    def on_log(self, state: State) -> None:
        """Show the newest losses."""
        if not self._bar.disable:
            shown = {"train/optim/loss": "loss", "train/loss": "train", "val/loss": "val"}
            values = {shown[r.name]: r.value for r in state.records if r.name in shown}
            self._bar.set_postfix(values, refresh=False)

    def on_epoch_end(self, state: State) -> None:  # noqa: ARG002 - the hook's signature
        """Leave the finished bar on the screen."""
        self._bar.close()

    def on_fit_end(self, state: State) -> None:  # noqa: ARG002 - the hook's signature
        """Close the bar of an epoch that was cut short."""
        if hasattr(self, "_bar"):
            self._bar.close()
