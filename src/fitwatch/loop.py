"""The loop of `Trainer.fit`, in the order documented in `Callback`.

Comments name the hooks that run inside each call on the watch. A custom loop makes the same calls.
"""

import logging
from collections.abc import Callable

from attrs import evolve
from torch import Tensor

from fitwatch.data.batches import check_repeats
from fitwatch.data.sharding import ABSENT, steps_per_epoch
from fitwatch.engine.checks import validation_loaders
from fitwatch.engine.schedule import Schedule, planned_length
from fitwatch.engine.step import step_optimizer
from fitwatch.helpers.aliases import Batch
from fitwatch.losses import LossSum
from fitwatch.watch import Watch

logger = logging.getLogger("fitwatch")

_MOST_SKIPPED = 1000  # batches left out before step 1: a loader without an end must not be read for ever

TrainingStep = Callable[[Batch], tuple[LossSum | Tensor | None, int | None]]


class Loop:
    """Trains on a watch.

    Args:
        watch: The watch of this fit, not yet entered.
        training_step: Maps a batch to its loss in train mode, or None to leave the batch out, and its number of
            examples, or None if unknown.
        schedule: When the learning-rate scheduler steps.
        validate_every: Steps between validations; None: at the end of each epoch.
        trial_step: Validates a batch before step 1, to see whether validation works.
    """

    def __init__(
        self,
        watch: Watch,
        training_step: TrainingStep,
        schedule: Schedule,
        validate_every: int | None,
        trial_step: Callable[[Batch], object],
    ) -> None:
        self._watch, self._training_step, self._schedule = watch, training_step, schedule
        self._skipped = 0  # batches that the training step left out
        self._stepped = False  # whether the optimizer has stepped: until then no schedule starts
        self._validate_every, self._trial_step = validate_every, trial_step

    def run(self, epochs: int | None, *, validates_first: bool = False) -> None:
        """Train for ``epochs`` epochs, or until the watch stops."""
        watch = self._watch
        with watch:  # on_fit_start
            self._schedule.watch(watch.state.history)
            validates_first = validates_first and not (watch.state.resumed or watch.evaluated)
            self._check_plan(epochs, validates_first=validates_first)
            self._stepped = watch.state.progress.step > 0
            watch.rehearse(self._trial_step)
            if validates_first:
                watch.validate()  # on_validation_start, on_validation_end, on_log
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
                    self._end_epoch()
                # on_epoch_end, on_log
        # on_fit_end

    def _backward(self, batch: Batch) -> None:
        try:
            loss, examples = self._training_step(batch)
            if loss is None:
                self._skip()
            else:
                self._watch.backward(loss, examples)  # on_batch_end
        except Exception as error:
            if "Expected more than 1 value per channel" in str(error):
                error.add_note("BatchNorm can't use a batch of one example: use drop_last=True in the DataLoader")
            raise

    def _end_epoch(self) -> None:
        self._refuse_without_steps()
        if self._stepped:
            self._schedule.after("epoch")

    def _skip(self) -> None:
        if not self._skipped:
            logger.warning(
                "training_step returned None: the batch is left out; train/skipped_batches counts such batches"
            )
        self._skipped += 1
        self._watch.skip()
        self._watch.state.log("train/skipped_batches", self._skipped, reduce="last")
        if self._skipped >= _MOST_SKIPPED:
            self._refuse_without_steps()

    def _refuse_without_steps(self) -> None:
        progress = self._watch.state.progress
        if self._skipped and progress.step == progress.first_step and not self._watch.step_open:
            raise TypeError(
                f"training_step returned None for all {self._skipped} batches so far: it must return the loss, a "
                "LossSum or a scalar tensor"
            )

    def _check_plan(self, epochs: int | None, *, validates_first: bool) -> None:
        """Check that the schedule fits the plan, and that loaders can be iterated as often as planned."""
        state = self._watch.state
        plan, progress = state.plan, state.progress
        per_epoch = steps_per_epoch(state.train_loader, plan.accumulate)
        left = None if epochs is None else max(0, epochs - (progress.epoch - progress.first_epoch))
        steps_left = None if plan.max_steps is None else max(0, plan.max_steps - (progress.step - progress.first_step))
        within = progress.epoch_step if state.position.resumed is not None else 0
        planned = planned_length(epochs=left, max_steps=steps_left, steps_per_epoch=per_epoch, done=within)
        self._schedule.check_plan(epochs=planned[0], steps=planned[1], resumed=state.resumed)
        evaluations = planned[0]
        if self._validate_every is not None:
            evaluations = None if planned[1] is None else planned[1] // self._validate_every
        state.plan = evolve(plan, evaluations=None if evaluations is None else max(0, evaluations))
        # Only what is sure to be iterated again is refused: a stream may last for all steps.
        if plan.max_steps is None and (left or 1) > 1:
            check_repeats("train_loader", state.train_loader, f"{left} epochs are to be trained")
        most = 1 if per_epoch is None and plan.max_steps is not None else planned[0] or 1
        if validates_first or (most > 1 if self._validate_every is None else (planned[1] or 0) > self._validate_every):
            for name, loader in validation_loaders(state).items():
                check_repeats(name, loader, "several validations are to be run")

    def _step(self) -> None:
        watch, state = self._watch, self._watch.state
        takes = watch.before_step()  # on_gradients_ready, clipping
        if step_optimizer(state.optimizer, state.scaler) and takes:
            self._stepped = True
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
