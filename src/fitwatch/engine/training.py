"""The batches and steps of a watch: runs the hooks that are due and detects missing calls."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from torch import Tensor, nn

from fitwatch import ranks
from fitwatch.callback import Callbacks
from fitwatch.data import batches
from fitwatch.data.containers import holds_arrays
from fitwatch.data.position import set_random_states
from fitwatch.data.sharding import ABSENT, Rounds, certain_length, set_epoch
from fitwatch.engine.checks import Checks
from fitwatch.engine.guard import Guard
from fitwatch.engine.modes import Modes
from fitwatch.engine.recorder import Recorder
from fitwatch.engine.signals import Interrupts
from fitwatch.engine.step import StepGradient, parameters, refuse_constant, refuse_rate, total_norm
from fitwatch.helpers.aliases import Batch
from fitwatch.helpers.rng import set_rng_state
from fitwatch.losses import LossSum, as_sums
from fitwatch.state import State

logger = logging.getLogger("fitwatch")

_END: Final = object()
_CLOSURE: Final = (
    "optimizer.step(closure) evaluates a batch again within the step, which a watch can't follow: call "
    "optimizer.step() without a closure, or with one that runs the last batch of the step, once"
)


class Training:
    """Follows a training loop through its epochs, batches and steps.

    Only the next call shows that a batch or a step has ended; `settle` then runs its hooks.

    Args:
        state: The state of the fit.
        hooks: Its callbacks.
        recorder: Closes its log windows.
        interrupts: Notes signals.
        fast_loading: Whether `iterate` reads plain loaders as `data.loading.read` does.
        checks: Looks at the gradients of the first step.
        nonfinite: What happens to a step with non-finite gradients, see `Watch`.

    Attributes:
        in_epoch: Whether an epoch is running.
        left_out: Whether the current step changes nothing, since its gradients are not finite.
        trains: Whether an epoch was started.
    """

    def __init__(
        self,
        state: State,
        hooks: Callbacks,
        recorder: Recorder,
        interrupts: Interrupts,
        *,
        checks: Checks,
        fast_loading: bool,
        nonfinite: str,
    ) -> None:
        self._checks = checks
        self._interrupts = interrupts
        self._state, self._hooks, self._recorder, self._fast_loading = state, hooks, recorder, fast_loading
        self._gradient = StepGradient(state.optimizer, state.plan.accumulate, state.scaler)
        self._guard = state.guard = Guard(state, nonfinite)
        self._rates: list[float | Tensor] = []  # learning rate of each parameter group at the last step
        self._rates_due = False  # whether they are still to be logged
        self._skipped = 0  # steps that the guard had left out when the epoch started
        self._modes = Modes(state.model)
        self.in_epoch = self.trains = self.left_out = False
        self._iterates = False  # whether the loop takes its batches from `iterate`
        self._complete: bool | None = None  # whether `iterate` has reached the end of the epoch
        self._length: int | None = None  # batches in the epoch, if certain
        self._batch_open = False  # a loss was returned, and its batch has not ended
        self._ready = False  # the gradients of the step are complete
        self._stepped = False  # and the optimizer has stepped
        self._stale: list[tuple[Tensor, int]] = []  # gradients of the first step, and their versions

    # -- epochs ----------------------------------------------------------------------------------------------------

    @property
    def place(self) -> str:
        """Where training is, for the note of an error."""
        progress = self._state.progress
        batch = f", batch index {progress.epoch_batch}" if self._complete is None else ""
        return f"raised in training: epoch {progress.epoch + 1}{batch}, after {progress.step} steps"

    def start_epoch(self) -> None:
        """Start an epoch in train mode, except for modules that the user has put into eval mode."""
        state, progress = self._state, self._state.progress
        self._modes.train()
        self.trains = True
        if state.position.resumed is None:
            progress.epoch_step = progress.epoch_batch = 0
        state.position.go_on()  # callbacks may have drawn random numbers since the checkpoint was read
        set_epoch(state.train_loader, progress.epoch)
        # A new one: the ranks are known by now, and the last step of an epoch may have been short.
        self._gradient = StepGradient(state.optimizer, state.plan.accumulate, state.scaler)
        self.in_epoch, self._iterates, self._complete = True, False, None
        self._skipped = self._guard.skipped
        self._length = certain_length(state.train_loader)
        self._hooks.on_epoch_start(state)
        self._modes.check()

    def rest(self) -> None:
        """Leave the model in eval mode, if it was trained."""
        self._guard.close()
        if self.trains:
            self._modes.rest()

    def end_epoch(self, *, left: bool = False) -> None:
        """End the epoch; it counts if all its batches were seen.

        Args:
            left: Whether the loop was left by ``break``.
        """
        self.settle_all()
        state, progress = self._state, self._state.progress
        if state.waiting:
            self._run_waiting()
        if self._gradient.weights and not left:
            raise RuntimeError(
                f"the epoch ended with {len(self._gradient.weights)} batches without a step: call optimizer.step() "
                "after the last batch too, if watch.step_due, or after the loop if watch.step_open"
            )
        stopped = left or self._recorder.stops
        if not progress.epoch_batch and not stopped:
            raise ValueError(
                f"train_loader yielded no batch in epoch {progress.epoch + 1} (a generator can be iterated only once)"
            )
        self.in_epoch = False
        self.log_rates()
        if state.val_loader is None and not self._recorder.evaluated:
            self._recorder.add_evaluation({})
        steps = progress.epoch_step if self._guard.skipped == self._skipped else None
        if self.complete or not stopped:  # a loop that goes on to the next epoch has seen what it wanted of this one
            progress.epoch += 1
            progress.epoch_step = progress.epoch_batch = 0
            state.position.started = None
        self._hooks.on_epoch_end(state)
        self._recorder.close_window(epoch_steps=steps)

    @property
    def complete(self) -> bool:
        """Whether all batches of the epoch were seen; assumed if the loader has no length."""
        if self._iterates:
            return bool(self._complete)
        length = batches.length(self._state.train_loader)
        return not length or self._state.progress.epoch_batch >= length

    @property
    def batches_ended(self) -> bool:
        """Whether the last batch of the epoch has ended, or training stops."""
        return self._complete is not None if self._iterates else self.complete

    def iterate(self, *, ragged: bool) -> Iterator[Batch]:
        """See `Watch.train`."""
        state, progress = self._state, self._state.progress
        rounds = Rounds(state.train_loader, fast=self._fast_loading)
        rounds.agree(together=ranks.in_step(state.model))
        self._iterates, self._length = True, rounds.total if rounds.certain else None
        batches_left = self._resumed(rounds) if state.position.resumed is not None else self._started(rounds)
        stays: bool | None = None if state.device.type == "cpu" else False  # whether batches can stay as they are
        while True:
            try:
                batch = next(batches_left, _END)
            except Exception as error:
                # A signal to the process group has ended the workers of the loader.
                if self._interrupts.received is None or self._gradient.weights:
                    raise
                logger.warning("after %s train_loader raised %r", self._interrupts.received, error)
                self._interrupt()
                self._complete = False
                return
            if batch is _END:
                break
            if batch is ABSENT and not ragged:
                raise ValueError(
                    "this rank ran out of batches before others: give all ranks the same number of batches, for "
                    "example with drop_last=True"
                )
            if stays is None and batch is not ABSENT:
                stays = not holds_arrays(batch)  # the first batch stands for all
            state.batch = batch if stays or batch is ABSENT else batches.move(batch, state.device)
            yield state.batch
            if self._ready or self._batch_open:
                self.settle()
            if state.waiting and not self._gradient.weights:
                self._run_waiting()
            if self._recorder.stops and not self._gradient.weights:
                # Only the length shows whether this was the last batch: testing for another would draw it.
                # After a signal the validation of this epoch is still to come, in the fit that goes on.
                self._complete = progress.epoch_batch == rounds.total and state.interrupted is None
                return
        self._complete = True

    def _started(self, rounds: Rounds) -> Iterator[object]:
        self._state.position.start(self._state.train_loader)
        return iter(rounds)

    def _resumed(self, rounds: Rounds) -> Iterator[object]:
        """Go on within the epoch that a checkpoint was saved in."""
        state, position = self._state, self._state.position
        assert position.resumed is not None
        saved, position.resumed = position.resumed, None
        position.started = saved["started"]
        now = saved["now"]
        set_rng_state(position.started["rng"])  # the order of the batches is drawn again
        set_random_states(position.started["sources"], state.train_loader)
        left = rounds.after(state.progress.epoch_batch, saved["loader"])
        set_rng_state(now["rng"])
        set_random_states(now["sources"], state.train_loader)
        return left

    def _run_waiting(self) -> None:
        """Run what callbacks asked for between two steps."""
        self._close_window()
        waiting, self._state.waiting = self._state.waiting, []
        for function in waiting:
            function()

    # -- batches ---------------------------------------------------------------------------------------------------

    def open_batch(self, loss: LossSum | Tensor, examples: int) -> Tensor:
        """Record the loss of a batch, and return the scalar that the loop calls ``backward()`` on."""
        progress = self._state.progress
        total, weight = as_sums(loss, lambda: examples, "the loss")
        is_mean = not isinstance(loss, LossSum)
        scalar = self._gradient.scalar(loss if isinstance(loss, Tensor) else total, weight, is_mean=is_mean)
        if not scalar.requires_grad:
            refuse_constant(self._state.model, "; validation batches belong inside `with watch.validating():`")
        if progress.step == progress.first_step + 1 and len(self._gradient.weights) == 1:
            scalar.register_hook(self._check_cleared)  # type: ignore[no-untyped-call] # untyped in torch
        self._state.train_loss.add(total, weight, examples)
        self._batch_open = True
        return scalar

    def backward(self, loss: LossSum | Tensor, sums: LossSum, examples: int) -> None:
        """Record the loss of a batch, run its backward pass, and end it."""
        total = loss if isinstance(loss, Tensor) else sums.total
        if not total.requires_grad:
            refuse_constant(self._state.model)
        self._state.train_loss.add(sums.total, sums.weight, examples)
        is_mean = not isinstance(loss, LossSum)
        self._gradient.backward(total, sums.weight, is_mean=is_mean)
        self._end_batch()

    def skip(self) -> None:
        """Count a batch that is left out, or that only other ranks have."""
        self._gradient.skip()
        self._state.progress.epoch_batch += 1
        if self.step_due:
            self._gradient.drop_empty()

    @property
    def stops(self) -> bool:
        """Whether training ends after the current step, which may not be counted yet."""
        plan, progress = self._state.plan, self._state.progress
        steps = progress.step + (self._ready and self._stepped) - progress.first_step
        return self._recorder.stops or (plan.max_steps is not None and steps >= plan.max_steps)

    def expect_batch(self) -> None:
        """Check that a batch may come now."""
        if self._state.position.resumed is not None:
            raise RuntimeError(
                "training resumes within an epoch, from a place in train_loader: iterate over watch.train()"
            )
        if self._iterates and self._complete is not None:
            raise RuntimeError(
                "watch.train() has ended for this epoch: validation batches belong inside `with watch.validating():`"
            )
        if self._ready or self._batch_open:
            self.settle()
        waiting, wanted = len(self._gradient.weights), self._state.plan.accumulate
        if waiting >= wanted:
            scaled = self._state.scaler is not None
            missing = "watch.before_step() or scaler.step(optimizer)" if scaled else "optimizer.step()"
            raise RuntimeError(
                f"{missing} was not called after {waiting} batch{'es' * (waiting > 1)}: a step takes "
                f"accumulate={wanted}, an option of the Watch. For two losses of one batch call "
                "watch.backward(watch.sums(...) + other_loss)"
            )

    def _end_batch(self) -> None:
        if self._batch_open and self._gradient.awaits_backward:
            raise RuntimeError(
                "call backward() on what watch.loss(...) returned before the next batch or the step; for two losses of "
                "one batch call watch.backward(watch.sums(...) + other_loss)"
            )
        self._batch_open = False
        self._state.progress.epoch_batch += 1
        self._hooks.on_batch_end(self._state)

    def _check_cleared(self, gradient: Tensor) -> None:  # noqa: ARG002 - the signature of a tensor hook
        """At the second step: the gradients of the first, if nobody cleared them, would be added to."""
        held = {id(p.grad) for p in parameters(self._state.optimizer)}
        stale, self._stale = self._stale, []
        if any(id(g) in held and g._version == version and bool(g.any()) for g, version in stale):  # noqa: SLF001
            raise RuntimeError(
                "the gradients of the last step were not cleared: call optimizer.zero_grad() after optimizer.step()"
            )

    # -- steps -----------------------------------------------------------------------------------------------------

    @property
    def step_open(self) -> bool:
        """Whether batches are waiting for a step."""
        return bool(self._gradient.weights)

    @property
    def step_due(self) -> bool:
        """See `Watch.step_due`."""
        waiting = len(self._gradient.weights)
        is_last = self._state.progress.epoch_batch + self._batch_open == self._length
        return waiting > 0 and (waiting == self._state.plan.accumulate or is_last)

    def complete_gradients(self, *, unscale: bool) -> None:
        """Finish the gradients of the step, run ``on_gradients_ready``, and clip."""
        if self._ready:
            return
        state = self._state
        if not self._gradient.weights:
            raise RuntimeError("a step without a loss: call watch.loss(output, target) for each batch before it")
        if self._batch_open:
            if all(p.grad is None for p in parameters(state.optimizer)):
                raise RuntimeError(
                    "a step without gradients: call backward() on what watch.loss(...) returned, and "
                    "optimizer.zero_grad() only after optimizer.step()"
                )
            self._end_batch()
        summed = self._gradient.summed
        self._gradient.finish(unscale=unscale)
        if state.progress.step == state.progress.first_step:
            self._checks.first_gradients()
        self._hooks.on_gradients_ready(state)
        limit = state.plan.clip_norm
        measures = limit is not None or self._guard.needs_norm
        norm = total_norm(held := parameters(state.optimizer)) if measures else None
        # Those of other ranks may be finite: all ranks must decide alike, so there the gradients alone count.
        losses, weights = state.train_loss.recent(summed) if ranks.size() == 1 else ([], [])
        self.left_out = self._guard.rejects(norm, losses, weights)
        if self.left_out:
            self._leave_out(summed)
        elif limit is not None and norm is not None:
            nn.utils.clip_grads_with_norm_(held, limit, norm)
            state.total_norm = norm
        rates = [group["lr"] for group in state.optimizer.param_groups]
        self._rates = [rate.detach().clone() if isinstance(rate, Tensor) else rate for rate in rates]
        for rate in rates:
            if not isinstance(rate, Tensor) and not 0 <= rate < math.inf:
                refuse_rate(rate, f"at step {state.progress.step + 1}, so this step is not taken")
        self._ready = True

    def _leave_out(self, batches: int) -> None:
        """Raise for a step with non-finite gradients; or take the gradients away, so that the step changes nothing."""
        loss = self._state.train_loss.newest(batches)
        if self._guard.raises:
            error = self._guard.error(loss)
            self._recorder.close_window(warns=False)  # what was measured of this step says more
            raise error
        self._guard.leave_out(loss)
        self._state.train_loss.drop(batches)
        for p in parameters(self._state.optimizer):
            p.grad = None

    def end_step(self) -> None:
        """Count the step and run its hooks."""
        state, progress = self._state, self._state.progress
        if not self._ready:
            raise RuntimeError("no step to end: call optimizer.step() first")
        if not self._stepped and state.scaler is None:
            raise RuntimeError("optimizer.step() was not called after watch.before_step()")
        if state.scaler is not None:
            self._guard.after_scaler(stepped=self._stepped)
        self._ready = self._stepped = False
        progress.step += 1
        progress.epoch_step += 1
        self._rates_due = True
        if self._interrupts.received is not None and state.interrupted is None:
            self._interrupt()
        self._hooks.on_step_end(state)
        if progress.epoch_step % state.plan.log_every == 0:
            self._close_window()
        if state.waiting and (not self._iterates or self._complete is not None):
            self._run_waiting()

    def _close_window(self) -> None:
        self._guard.check()
        self.log_rates()
        self._recorder.close_window()

    def _interrupt(self) -> None:
        """End training after this step, or with several ranks at the end of the log window, when all agree."""
        state = self._state
        state.interrupted = self._interrupts.received
        state.request_stop(f"interrupted by {state.interrupted}")
        if ranks.size() == 1:
            self._recorder.agree()

    def settle_all(self) -> None:
        """Run what is due before a validation or the end of an epoch.

        Raises:
            FloatingPointError: A step had non-finite gradients, which the host has not read yet.
        """
        self.settle()
        self._guard.check()

    def settle(self) -> None:
        """Run the hooks of a batch or step that has ended since the last call."""
        if self._ready:
            self.end_step()
        elif self._batch_open:
            self._end_batch()

    def log_rates(self) -> None:
        """Log the learning rate of the last step, at the end of a log window."""
        if self._rates_due and not self._recorder.evaluated:
            for i, rate in enumerate(self._rates):
                name = "train/optim/lr" if len(self._rates) == 1 else f"train/optim/lr/{i}"
                self._state.log(name, rate, reduce="last")
        self._rates_due = False

    def before_optimizer(
        self, optimizer: object, args: Sequence[object], options: Mapping[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        """Hook of the optimizer, before its step."""
        given = [value for value in (*args[1:], *options.values()) if value is not None]
        if given:
            if len(given) > 1 or not callable(given[0]):
                raise RuntimeError(_CLOSURE)
            if self._stepped:
                self.settle()
            return (optimizer, self._closing(given[0])), {}
        if self._stepped:
            raise RuntimeError("optimizer.step() was called twice: call watch.loss(output, target) before each step")
        if not self.in_epoch or self._ready:
            return None
        if self._state.scaler is not None:
            raise RuntimeError(
                "call watch.before_step() before scaler.step(optimizer): otherwise a step that the scaler skips goes "
                "unnoticed"
            )
        self.complete_gradients(unscale=False)
        return None

    def _closing(self, closure: Callable[[], object]) -> Callable[[], object]:
        """Return the closure of a step that runs its last batch, or calls `Watch.before_step`; hosts step with one."""

        def run() -> object:
            if self._ready:
                raise RuntimeError(_CLOSURE)
            again = len(self._gradient.weights) >= self._state.plan.accumulate
            loss = closure()
            if self.in_epoch and not self._ready:
                if again:
                    raise RuntimeError(_CLOSURE)
                self.complete_gradients(unscale=False)
            return loss

        return run

    def after_optimizer(self, *_: object) -> None:
        """Hook of the optimizer, after its step."""
        self._stepped, progress = self._ready, self._state.progress
        if self._ready and progress.step == progress.first_step:
            gradients = [p.grad for p in parameters(self._state.optimizer) if p.grad is not None]
            self._stale = [(g, g._version) for g in gradients if not g.is_sparse]  # noqa: SLF001 - tells in-place changes
