"""The loop of `Trainer.fit`, in the order documented in `Callback`.

Comments name the hooks that run inside each call on the watch. A custom loop makes the same calls.
"""

from collections.abc import Callable

from torch import Tensor

from fitwatch.data.sharding import ABSENT
from fitwatch.engine.schedule import Schedule
from fitwatch.engine.step import step_optimizer
from fitwatch.helpers.aliases import Batch
from fitwatch.losses import LossSum
from fitwatch.watch import Watch

TrainingStep = Callable[[Batch], tuple[LossSum | Tensor, int | None]]


class Loop:
    """Trains on a watch.

    Args:
        watch: The watch of this fit, not yet entered.
        training_step: Maps a batch to its loss in train mode and its number of examples, or None if unknown.
        schedule: When the learning-rate scheduler steps.
        validate_every: Steps between validations; None: at the end of each epoch.
    """

    def __init__(
        self, watch: Watch, training_step: TrainingStep, schedule: Schedule, validate_every: int | None
    ) -> None:
        self._watch, self._training_step, self._schedule = watch, training_step, schedule
        self._validate_every = validate_every

    def run(self, epochs: int | None) -> None:
        """Train for ``epochs`` epochs, or until the watch stops."""
        watch = self._watch
        with watch:  # on_fit_start
            self._schedule.watch(watch.state.history)
            for _ in watch.epochs(epochs):  # on_epoch_start
                for batch in watch.train(ragged=True):
                    if batch is ABSENT:  # other ranks still have one
                        watch.skip()
                    else:
                        self._backward(batch)  # on_batch_end
                    if watch.step_due:
                        self._step()
                if watch.step_open:  # fewer batches than a step takes, from a loader without a length
                    self._step()
                if self._epoch_validates():
                    self._validate()
                if watch.epoch_complete:
                    self._schedule.after("epoch")
                # on_epoch_end, on_log
        # on_fit_end

    def _backward(self, batch: Batch) -> None:
        loss, examples = self._training_step(batch)
        self._watch.backward(loss, examples)  # on_batch_end

    def _step(self) -> None:
        watch, state = self._watch, self._watch.state
        watch.before_step()  # on_gradients_ready, clipping
        if step_optimizer(state.optimizer, state.scaler):
            self._schedule.after("step")
        watch.end_step()  # on_step_end, on_log
        if self._validate_every is not None and state.progress.step % self._validate_every == 0:
            self._validate()

    def _validate(self) -> None:
        self._watch.validate()  # on_validation_start, on_validation_end, on_log
        self._schedule.after_evaluation(self._watch.state.history)

    def _epoch_validates(self) -> bool:
        """Whether to validate at the end of the epoch: not if this step was validated, or a callback asked to stop."""
        watch, state = self._watch, self._watch.state
        if not state.progress.epoch_batch:  # an empty loader, which the end of the epoch refuses
            return False
        if state.val_loader is None:  # the training loss alone is recorded, after each epoch
            return True
        if state.stop_reason is not None or watch.evaluated:
            return False
        last = watch.stops or watch.epochs_done(state.progress.epoch + watch.epoch_complete)
        return last or self._validate_every is None
