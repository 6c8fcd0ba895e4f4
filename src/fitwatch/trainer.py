"""The loop."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn

from fitwatch import ranks, rng, saving
from fitwatch.callback import Callback, Callbacks
from fitwatch.data import batches
from fitwatch.data.sharding import ABSENT, Rounds, set_epoch
from fitwatch.losses import LossSum, apply, as_loss, as_sums
from fitwatch.metrics import Metrics
from fitwatch.options import instance, integer, number, one_of
from fitwatch.result import Result
from fitwatch.schedule import Schedule
from fitwatch.settings import check_fit, describe, shared_facts
from fitwatch.state import Progress, State
from fitwatch.step import StepGradient, parameters, zero_grad
from fitwatch.validation import NO_BASELINE, Evaluation, expected_baseline

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@define(eq=False, slots=False)
class Trainer:
    """Trains a model; subclass it and override a step, or attach callbacks.

    The gradient of every step is that of sum(w l) / sum(w) over all examples of the step, however they were cut into
    micro-batches, and the losses reported are the same fraction over the epoch and over the validation set.

    A batch is ``(input, target)`` or ``(input, target, sample_weight)``, or a mapping with these keys.

    Args:
        model: Any module, also one that `torch.compile` returned. Moved to ``device`` when fitting starts.
        optimizer: Any torch optimizer over the model's parameters that steps without a closure.
        loss: A loss of fitwatch, torch's ``CrossEntropyLoss``, ``BCEWithLogitsLoss``, ``NLLLoss`` or ``MSELoss`` (made
            exact), or any module or function (output, target) -> scalar, which counts as a mean over the batch.
            Default: `CrossEntropy`.
        callbacks: Called in this order.
        scheduler: A learning-rate scheduler of torch.
        scheduler_interval: Whether the scheduler steps after every ``"step"`` or ``"epoch"``. `ReduceLROnPlateau`
            steps after every evaluation in either case.
        scheduler_monitor: The metric that `ReduceLROnPlateau` gets.
        accumulate: Micro-batches in a step. The last step of an epoch may have fewer.
        clip_norm: Largest total 2-norm of the gradients; they are scaled down to it. None: no clipping.
        precision: ``"fp32"`` (whatever the parameters have), or autocast to ``"bf16"`` or ``"fp16"``; the latter with
            a GradScaler.
        metrics: Name -> function of (outputs, targets) over the whole validation set, or an object with ``update``,
            ``compute`` and ``reset``. Reported as ``val/<name>``.
        device: ``"auto"`` (CUDA, else MPS, else CPU) or a torch device.
        log_every: Steps in a log window. Values cross to the host once a window.
        seed: Seeds torch, Python and NumPy when the first fit begins, which is too late for the initial weights of
            ``model``. None: leaves them alone.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An option is out of its range.
    """

    model: nn.Module = field(validator=instance(nn.Module))
    optimizer: torch.optim.Optimizer = field(validator=instance(torch.optim.Optimizer))
    loss: Any = field(default=None, converter=as_loss)
    callbacks: Sequence[Callback] | Callback = field(default=(), kw_only=True)
    scheduler: Any = field(default=None, kw_only=True)
    scheduler_interval: str = field(default="step", kw_only=True, validator=one_of("step", "epoch"))
    scheduler_monitor: str = field(default="val/loss", kw_only=True, validator=instance(str))
    accumulate: int = field(default=1, kw_only=True, validator=integer(1))
    clip_norm: float | None = field(default=None, kw_only=True, validator=number(above=0, or_none=True))
    precision: str = field(default="fp32", kw_only=True, validator=one_of(*_AUTOCAST))
    metrics: Mapping[str, Any] | None = field(default=None, kw_only=True, validator=instance(Mapping, or_none=True))
    device: torch.device = field(default="auto", kw_only=True, converter=batches.as_device)  # type: ignore[assignment] # before conversion
    log_every: int = field(default=50, kw_only=True, validator=integer(1))
    seed: int | None = field(default=None, kw_only=True, validator=instance(int, or_none=True))

    def __attrs_post_init__(self) -> None:
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise TypeError("optimizer must step without a closure, which LBFGS can't")
        self._schedule = Schedule(self.scheduler, self.scheduler_interval, self.scheduler_monitor)
        self._schedule.check(self.optimizer)
        self._hooks = Callbacks(self.callbacks)
        Metrics(self.metrics or {})  # refuses a wrong one now
        self._evaluation: Evaluation | None = None  # while one runs
        scaler = torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None
        self.state = self._new_state(progress=Progress(), scaler=scaler)

    # -- to override ---------------------------------------------------------------------------------------------

    def training_step(self, batch: Any) -> LossSum | Tensor:
        """The loss of a batch in train mode, on the device.

        Returns:
            A `LossSum`, or a scalar tensor, which counts as the mean over the batch's examples.
        """
        input, target, *weight = batches.parts(batch)
        return self.compute_loss(self.model(input), target, *weight)

    def validation_step(self, batch: Any) -> LossSum | Tensor:
        """The loss of a batch in eval mode, without gradients.

        An own one hands outputs and targets to `update_metrics`, if there are metrics or class weights.

        Returns:
            As for `training_step`.
        """
        input, target, *weight = batches.parts(batch)
        output = self.model(input)
        loss = self.compute_loss(output, target, *weight)  # first, since its errors are the clearest
        self.update_metrics(output, target, *weight)
        return loss

    def batch_size(self, batch: Any) -> int:
        """Examples in a batch, for scalar losses and for the speed; override it for own batch formats."""
        return batches.batch_size(batch)

    # -- to call -------------------------------------------------------------------------------------------------

    def compute_loss(self, output: Any, target: Any, sample_weight: Any = None) -> LossSum | Tensor:
        """The loss in force, which callbacks may have given weights: a `LossSum` where it is exact, else its scalar.

        Args:
            output: What the loss takes.
            target: Likewise.
            sample_weight: How much each example counts, shape (N,), or each position; see `Loss.sums`.

        Raises:
            TypeError: There are weights, and the loss is a function that gives a mean.
        """
        if self._evaluation is not None:
            return self._evaluation.apply(output, target, sample_weight)
        self.state.uses_loss = True
        return apply(self.state.loss, output, target, sample_weight)

    def update_metrics(self, outputs: Tensor, targets: Tensor, sample_weight: Tensor | None = None) -> None:
        """Take a batch into the metrics, and what else validation measures; for ``validation_step``."""
        if self._evaluation is None:
            raise RuntimeError("update_metrics is for validation_step: no validation is running")
        self._evaluation.update(outputs, targets, sample_weight)

    def fit(
        self,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None = None,
        *,
        epochs: int | None = None,
        max_steps: int | None = None,
        validate_every: int | None = None,
        resume: str | Path | None = None,
    ) -> Result:
        """Train. Called again, it goes on from where it stands, with ``epochs`` or ``max_steps`` more.

        Args:
            train_loader: Any iterable of batches, with or without a length.
            val_loader: Another, for validation.
            epochs: Passes over ``train_loader``.
            max_steps: Optimizer steps; with both given, whichever comes first.
            validate_every: Steps between validations. Default: at the end of each epoch.
            resume: A checkpoint, or ``"auto"`` for the newest one of the attached `Checkpoint` (none: a fresh start).
                ``epochs`` and ``max_steps`` then count from where the interrupted fit began.

        Raises:
            ValueError: An option is out of range, a loader is empty, a monitored metric will not exist, the optimizer
                holds no parameter of the model, or a checkpoint does not fit.
            TypeError: A loader is no iterable, or a step returned no loss.
        """
        options = {"epochs": epochs, "max_steps": max_steps, "validate_every": validate_every, "resume": resume}
        check_fit(train_loader, val_loader, **options)
        ranks.start(self.device)
        self._hooks = Callbacks(self.callbacks)
        ranks.refuse_differences({**options, **shared_facts(self, train_loader, val_loader)})
        state = self.state = self._new_state(
            progress=self.state.progress,
            scaler=self.state.scaler,
            train_loader=train_loader,
            val_loader=val_loader,
            epochs=epochs,
            max_steps=max_steps,
        )
        self._prepare(resume)
        try:
            with ranks.failing_together():
                self._hooks.on_fit_start(state)
            state.agree()
            self._to_device()  # a callback may have put another loss in
            self._check_metrics()
            with ranks.unsynchronised(self.model):
                self._loop(validate_every)
            ranks.align([self.model], buffers_only=True)
        except BaseException as error:
            state.error = error
            try:
                self._hooks.on_fit_end(state)
            except Exception as late:  # noqa: BLE001 - must not hide the error that ended the fit
                error.add_note(f"then on_fit_end failed: {late!r} {getattr(late, '__notes__', '')}")
            raise
        self._hooks.on_fit_end(state)
        return Result.of(state)

    def validate(self, loader: Iterable[Any]) -> dict[str, float]:
        """The exact loss and the metrics over ``loader``, in eval mode: ``val/loss``, ``val/<metric>``, ...

        Where class weights are on, ``val/loss_unweighted`` is the same loss without them.

        Raises:
            ValueError: The loader gives no batch.
        """
        ranks.start(self.device)
        self._to_device()
        state = self.state
        ranks.align([self.model], buffers_only=state.progress.step > 0)  # a fit has aligned the rest
        own = loader is state.val_loader
        known = (state.baseline or NO_BASELINE) if own and state.baseline_measured else None
        evaluation = Evaluation(self._eval_loss, state.val_metrics, known, state.observers if own else ())
        values = self._evaluate(evaluation, loader)
        if own:
            state.baseline, state.baseline_measured, state.bad_batch = evaluation.baseline, True, evaluation.bad_batch
        return values

    # -- the loop ------------------------------------------------------------------------------------------------

    def _loop(self, validate_every: int | None) -> None:
        state, hooks, progress = self.state, self._hooks, self.state.progress
        while not (state.stops or state.epochs_done(progress.epoch)):
            self.model.train()
            progress.epoch_step = progress.epoch_batch = 0
            set_epoch(state.train_loader, progress.epoch)
            hooks.on_epoch_start(state)
            complete = self._epoch(validate_every)
            last = state.stops or state.epochs_done(progress.epoch + complete)
            if state.val_loader is None:
                state.evaluated({})
                self._schedule.after_evaluation(state.metrics)
            elif (last or validate_every is None) and not state.stop_reason and not state.validated:
                self._validate_and_log()
            if complete:
                progress.epoch += 1
                progress.epoch_step = progress.epoch_batch = 0
                self._schedule.after("epoch")
            hooks.on_epoch_end(state)
            self._log()

    def _epoch(self, validate_every: int | None) -> bool:
        """One pass over the training batches; whether it reached the end."""
        state, progress = self.state, self.state.progress
        gradient, complete = StepGradient(self.optimizer, self.accumulate, state.scaler), True
        rounds = Rounds(state.train_loader, together=ranks.in_step(self.model))
        for batch in rounds:
            if batch is ABSENT:
                gradient.skip()
                progress.epoch_batch += 1
            else:
                self._backward(batch, gradient)
            if len(gradient.weights) == self.accumulate:
                self._step(gradient, validate_every)
                if state.stops:
                    # Only a length can tell that this was the last batch: asking for another would draw it.
                    complete = progress.epoch_batch == rounds.total
                    break
        if gradient.weights:
            self._step(gradient, validate_every)
        if not progress.epoch_batch:
            raise ValueError(
                f"train_loader gave no batch in epoch {progress.epoch} (a generator can be iterated once only)"
            )
        if progress.epoch_step % self.log_every and not state.validated:  # an epoch ends the log window
            gradient.log(state)
        return complete

    def _backward(self, batch: Any, gradient: StepGradient) -> None:
        """Forward and backward of one micro-batch, and its hook."""
        batch = self.state.batch = self._move(batch)
        with self._autocast():
            output = self.training_step(batch)
        total, weight = self._sums(output, batch, "training_step")
        self.state.train_loss.add(total, weight)
        with suppress(TypeError):  # a format of one's own: only the examples per second lack it
            self.state.saw(self.batch_size(batch))
        if isinstance(output, LossSum):
            gradient.backward(total, weight, is_mean=False)
        else:
            gradient.backward(output, weight, is_mean=True)
        self.state.progress.epoch_batch += 1
        self._hooks.on_batch_end(self.state)

    def _step(self, gradient: StepGradient, validate_every: int | None) -> None:
        """One optimizer step, with everything that hangs on it."""
        state, progress, hooks = self.state, self.state.progress, self._hooks
        gradient.finish()
        hooks.on_gradients_ready(state)
        if self.clip_norm is not None:
            state.total_norm = nn.utils.clip_grad_norm_(parameters(self.optimizer), self.clip_norm)
        if gradient.step():
            self._schedule.after("step")
        progress.step += 1
        progress.epoch_step += 1
        hooks.on_step_end(state)
        if progress.epoch_step % self.log_every == 0:
            gradient.log(state)
            self._log()
        if validate_every is not None and progress.step % validate_every == 0:
            self._validate_and_log()

    def _validate_and_log(self) -> None:
        state, hooks = self.state, self._hooks
        if not state.gives_up() and state.val_loader is not None:
            hooks.on_validation_start(state)
            state.evaluated(self.validate(state.val_loader))
            hooks.on_validation_end(state)
            self._schedule.after_evaluation(state.metrics)
        self._log()

    def _log(self) -> None:
        self.state.flush()
        if self.state.records:
            self._hooks.on_log(self.state)

    def _evaluate(self, evaluation: Evaluation, loader: Iterable[Any]) -> dict[str, float]:
        self._evaluation = evaluation
        try:
            return evaluation.run(self.model, loader, self._validate_batch)
        finally:
            self._evaluation = None

    def _validate_batch(self, batch: Any) -> LossSum:
        batch = self._move(batch)
        with self._autocast():
            return self._sums(self.validation_step(batch), batch, "validation_step")

    def _measure(self, batches: Iterable[Any]) -> dict[str, float]:
        """See `State.measure`."""
        metrics = copy.deepcopy(dict(self.metrics or {}))  # the originals hold what the validation has just measured
        values = self._evaluate(Evaluation(self._eval_loss, metrics, NO_BASELINE), batches)
        return {name.removeprefix("val/"): value for name, value in values.items()}

    @property
    def _eval_loss(self) -> Any:
        return self.state.loss if self.state.eval_loss is None else self.state.eval_loss

    # -- small parts ---------------------------------------------------------------------------------------------

    def _new_state(self, **given: Any) -> State:
        return State(
            model=self.model,
            optimizer=self.optimizer,
            loss=self.loss,
            scheduler=self.scheduler,
            callbacks=self._hooks,
            device=self.device,
            log_every=self.log_every,
            clip_norm=self.clip_norm,
            settings=describe(self),
            val_metrics=dict(self.metrics or {}),
            measure=self._measure,
            **given,
        )

    def _prepare(self, resume: str | Path | None) -> None:
        state, progress = self.state, self.state.progress
        self._to_device()
        progress.first_epoch, progress.first_step = progress.epoch, progress.step
        if not {id(p) for p in parameters(self.optimizer)} & {id(p) for p in self.model.parameters()}:
            raise ValueError("the optimizer holds no parameter of the model: training would change nothing")
        path = ranks.from_main(saving.find(self._hooks.callbacks)) if resume == "auto" else resume
        if path is not None:
            with ranks.failing_together():
                saving.load(Path(path), state)
        elif self.seed is not None and progress.step == 0:
            rng.seed_all(self.seed + ranks.rank())  # rank 0 alone draws the order of the batches
        ranks.align([self.model, state.loss], parameters(self.optimizer))
        zero_grad(self.optimizer)

    def _check_metrics(self) -> None:
        """Refuse now, not after an epoch, to monitor what will not be measured."""
        state = self.state
        loss = self._eval_loss
        if state.val_loader is not None and getattr(loss, "has_weights", False):
            state.names.add("val/loss_unweighted")
        state.baseline = expected_baseline(loss, state.train_loader, state.val_loader)
        self._schedule.watch(state)
        state.check()

    def _to_device(self) -> None:
        self.model.to(self.device)
        for loss in (self.state.loss, self.state.eval_loss):
            if isinstance(loss, nn.Module):
                loss.to(self.device)

    def _move(self, batch: Any) -> Any:
        return batch if self.device.type == "cpu" else batches.to_device(batch, self.device)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = _AUTOCAST[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _sums(self, output: Any, batch: Any, step: str) -> LossSum:
        return as_sums(output, lambda: self.batch_size(batch), f"{type(self).__name__}.{step}")
