"""Closes log windows and evaluations, where the host waits for the device and ranks agree."""

import logging
import math
from collections.abc import Mapping

from fitwatch import ranks
from fitwatch.callback import Callbacks
from fitwatch.engine.guard import BUDGET
from fitwatch.helpers import health
from fitwatch.state import State
from fitwatch.summary import Summary

logger = logging.getLogger("fitwatch")


class Recorder:
    """Keeps the log and the history of a state. All ranks call every method.

    Args:
        state: The state of the fit.
        hooks: Its callbacks.

    Attributes:
        loss_is_used: Whether training has used ``state.loss``.
        summary: The summary that a callback has asked for.
    """

    def __init__(self, state: State, hooks: Callbacks) -> None:
        self._state, self._hooks = state, hooks
        self.loss_is_used = False
        self.summary: Summary | None = None
        self._given_loss = state.loss
        self._unlogged = False  # whether the newest evaluation is still to be logged
        self._warned = self._warned_of_loss = False
        self._weighted_step = state.progress.step  # the last step at which a window with a weight was closed

    @property
    def stops(self) -> bool:
        """Whether training ends after the current step: at ``max_steps``, or on request."""
        plan, progress = self._state.plan, self._state.progress
        at_end = plan.max_steps is not None and progress.step - progress.first_step >= plan.max_steps
        return at_end or self._state.stop_reason is not None

    @property
    def evaluated(self) -> bool:
        """Whether the newest evaluation belongs to the current step."""
        return self._state.history.newest.get("step") == self._state.progress.step

    def agree(self) -> None:
        """Stop if any rank has asked for it."""
        state = self._state
        state.stop_reason = state.stop_reason or ranks.agree(state.stop_request)

    def refuse_weights(self) -> None:
        """Refuse to train from non-finite weights.

        Raises:
            ValueError: A trainable parameter or a running statistic is not finite, on any rank.
        """
        self._weighted_step = self._state.progress.step
        name = ranks.agree(health.not_finite(self._state.model))
        if name is not None:
            raise ValueError(
                f"the model has non-finite weights before step {self._state.progress.step + 1} (`{name}` is the "
                "first): initialize or load them again; freeze what is infinite on purpose, with requires_grad_(False)"
            )

    def give_up(self) -> bool:
        """Return whether the model has non-finite weights; the first time, warn and stop training."""
        state = self._state
        name = ranks.agree(health.not_finite(state.model))
        if name is None:
            return False
        if state.stop_reason is None:
            reason = f"the model has non-finite weights at step {state.progress.step} ({name} is the first)"
            logger.warning("training stops: %s", reason)
            state.stop_request = state.stop_request or reason
            self.agree()
        return True

    def add_evaluation(self, values: Mapping[str, float]) -> None:
        """Add an entry to the history: ``values`` beside the training loss since the last entry."""
        state, progress = self._state, self._state.progress
        trained = progress.step > state.history.newest.get("step", progress.first_step)
        loss = state.train_loss.close_evaluation()
        state.history.entries.append({"epoch": progress.epoch, "step": progress.step, "train/loss": loss, **values})
        self._unlogged, state.history.trained = True, trained
        if self.summary is not None:
            self.summary.after_validation()
        if trained:  # else there is none
            self._warn("train/loss", None)
        self._warn("val/loss", state.validation.bad_batch)

    def close_window(self, *, warns: bool = True, epoch_steps: int | None = None) -> None:
        """Copy logged values to the host, and run ``on_log`` if there are any.

        Args:
            warns: Whether to warn of a non-finite loss; not if an error says it.
            epoch_steps: At the end of an epoch, if none of its steps was left out: their number.

        Raises:
            ValueError: For a whole epoch, or `BUDGET` steps, no example had a weight.
        """
        state = self._state
        own = [*state.train_loss.close_window(), float(state.stop_request is not None)]
        total, weight, examples, asked = ranks.sums(own)
        if asked:
            self.agree()
        if warns and not math.isfinite(total):  # on all ranks
            self._warn_of_batch(total / weight if weight else total)
            self.give_up()
        state.train_loss.examples += int(examples)
        self._refuse_weightless(weight, min(BUDGET, epoch_steps or BUDGET))
        more = {"train/optim/loss": total / weight} if weight else {}
        if self._unlogged:
            left = ("epoch", "step") if state.history.trained else ("epoch", "step", "train/loss")
            more |= {name: v for name, v in state.history.newest.items() if name not in left}
        self._unlogged = False
        state.log.close_window(more)
        if state.log.records:
            self._hooks.on_log(state)

        # Without a weight no batch was trained in this window, so it does not show how the loss is computed.
        if weight and state.loss is not self._given_loss and not (self.loss_is_used or self._warned_of_loss):
            self._warned_of_loss = True
            logger.warning(
                "a callback has replaced the loss (for example with class weights), but the training step does not use "
                "it: compute the loss with self.compute_loss (Trainer) or watch.loss"
            )

    def _refuse_weightless(self, weight: float, most: int) -> None:
        step = self._state.progress.step
        if weight:
            self._weighted_step = step
        elif step - self._weighted_step >= most:
            raise ValueError(
                f"no example of the last {step - self._weighted_step} steps counted, so nothing is learned: all had "
                "weight 0. Check the targets (ignore_index), the sample weights and the class weights"
            )

    def summarize(self) -> None:
        """Pass the summary to ``on_log``, after the last step."""
        if self.summary is not None:
            self._state.log.records = list(self.summary.records())
            self._hooks.on_log(self._state)

    def _warn_of_batch(self, loss: float) -> None:
        """Warn about the first non-finite training loss, while its batch is known."""
        state = self._state
        bad = state.train_loss.since_evaluation.bad
        if bad is None or self._warned:  # another rank's, or one whose place is unknown
            return
        self._warned = True
        start = state.history.newest.get("step", state.progress.first_step)
        step = int(start) + bad // state.plan.accumulate + 1
        logger.warning(
            "the training loss is %s at step %d (batch index %d since the last evaluation) for the first "
            "time: check the inputs and targets of this batch",
            loss,
            step,
            bad,
        )

    def _warn(self, name: str, batch: int | None) -> None:
        """Warn about the first non-finite loss only."""
        value = self._state.history.newest.get(name, 0.0)
        if not (self._warned or math.isfinite(value)):
            self._warned = True
            where = "" if batch is None else f"; that of batch index {batch} is the first with a non-finite loss"
            logger.warning("%s is %s at step %d%s", name, value, self._state.progress.step, where)
