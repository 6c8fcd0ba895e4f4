"""The Watch: everything that a training loop needs except the loop."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import torch
from attrs import evolve
from torch import Tensor, nn

from fitwatch import hosted, ranks, saving
from fitwatch.callback import Callback, Callbacks
from fitwatch.callbacks.checkpoint import Checkpoint
from fitwatch.data import batches
from fitwatch.data.sharding import start_workers
from fitwatch.data.third_part import announce_weights, refuse_index
from fitwatch.engine.checks import Checks
from fitwatch.engine.preflight import Report, TrainingStep, preflight
from fitwatch.engine.recorder import Recorder
from fitwatch.engine.settings import continued, describe, shared_facts, warn_of_another_loss, warn_of_changes
from fitwatch.engine.signals import Interrupts, held_back
from fitwatch.engine.step import check_options, needs_closure, parameters, zero_grad
from fitwatch.engine.training import Training
from fitwatch.engine.undivided import Undivided
from fitwatch.engine.validator import ValidationStep, Validator
from fitwatch.helpers.aliases import Batch, Loader, Loaders, Scheduler, StateDict
from fitwatch.helpers.options import count, local_path, plain
from fitwatch.losses import LossSum, apply, as_loss, as_sums
from fitwatch.measuring.expected_baseline import expected_baseline
from fitwatch.measuring.metrics import Metric, as_metrics
from fitwatch.measuring.per_class import as_class_names, per_class
from fitwatch.measuring.validation import Validation
from fitwatch.result import Result
from fitwatch.state import State
from fitwatch.state.history import History
from fitwatch.state.progress import Plan, Progress
from fitwatch.summary import Summary

logger = logging.getLogger("fitwatch")


class Watch:
    """Provides all of training except the loop: exact weighted losses, hooks, logging, validation and stopping.

    `Trainer.fit` runs on it, and so can a hand-written loop::

        with fw.Watch(model, optimizer, callbacks, train_loader=train, val_loader=val) as watch:
            for epoch in watch.epochs(20):
                for x, y in watch.train():
                    watch.loss(model(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                with watch.validating():
                    for x, y in val:
                        watch.loss(model(x), y)
        print(watch.result)

    Entering it runs ``on_fit_start``, leaving it ``on_fit_end``, also after an exception. After training the model is
    in eval mode, ready for predictions. Hooks that follow a batch or
    a step run at the next call on the watch, after your scheduler and ``zero_grad``.

    The watch detects a step by the optimizer's step hooks. Right before the step, the gradients become those of
    sum(w l) / sum(w) over all its examples, ``on_gradients_ready`` runs, and they are clipped.

    Args:
        model: Any module.
        optimizer: Any torch optimizer over the model's parameters that steps without a closure.
        callbacks: Called in this order.
        loss: As for `Trainer`. Default: `CrossEntropy`.
        train_loader: The training batches. Callbacks read it (class counts, the probe of the overfitting detector), and
            `train` iterates over it.
        val_loader: The validation batches, or None; or several loaders by name. The first one decides: ``val/loss``,
            the baseline and the verdict are about it. All are measured, as ``val/<loader>/loss``,
            ``val/<loader>/<metric>``.
        metrics: As for `Trainer`.
        classes: As for `Trainer`.
        scheduler: A scheduler that your loop steps; its state goes into checkpoints.
        scaler: A GradScaler. Call `before_step` before ``scaler.step(optimizer)``.
        accumulate: Micro-batches per step. The last step of an epoch may have fewer.
        divided: Whether the loop divides the loss by ``accumulate`` (or by the micro-batches of a shorter step) before
            ``backward()``, as ``accelerator.backward`` and other hosts do. The gradient is exact all the same.
        clip_norm: Largest total 2-norm of the gradients; they are scaled down to it. None: no clipping.
        log_every: Steps per log window.
        max_steps: Optimizer steps after which training ends. None: no limit.
        device: The device that the model, the loss and the batches of `train` are moved to. Default: the model's.
        resume: A checkpoint, or ``"auto"`` for the newest one of the attached `Checkpoint` (none: a fresh start).
        options_from: Whose options the optimizer and the scheduler have when training resumes, if they differ: those of
            the ``"checkpoint"``, or of the ``"script"``. A warning names them. With ``"script"`` the scheduler is
            stepped to the point of resumption, so that the learning rate is that of its new options; what a
            `ReduceLROnPlateau` has reduced stays reduced.
        validation_step: Called with a batch on the device; measures it with `loss` or `measured`. Used by `validate`
            and by the probe of the overfitting detector. Default: ``watch.loss(model(input), target)``, for batches
            ``(input, target)``, ``(input, target, sample_weight)`` or mappings with these keys.
        skip_checks: Names of checks not to run before step 1, of ``"untrained_parameters"``, ``"shared_examples"``,
            ``"validation_order"``, ``"last_batch"``, ``"class_weights"``, ``"probabilities"``, ``"labels"`` and
            ``"unreached_parameters"``. Each logs a warning that says what to write.
        nonfinite: What to do with a step whose loss or gradients are not finite: ``"raise"`` a `FloatingPointError`
            before the optimizer steps; ``"skip"`` the step, which changes no weight but counts, up to 50 in a row; or
            ``"ignore"`` it, until the weights are not finite, which ends training. ``"spike"`` is ``"skip"``, and skips
            steps too whose gradient norm is a spike, by `rules.SpikeRule`. The check waits for the device once per
            step, unless it is ``"raise"`` with an optimizer that has ``fused=True`` on a GPU: that leaves the bad step
            and all later ones out on the device, and the error comes when the log window closes. Under a GradScaler,
            which skips such steps itself, only the limit of 50 holds.
        fast_loading: Whether `train`, `validate` and `evaluate` read a plain `DataLoader` by one ``index_select`` per
            tensor. Plain is: the default ``collate_fn``, no workers, over a `TensorDataset` or a `Subset` of one. The
            batches, their order and the random numbers drawn are the same.
        sanity_steps: With a ``validation_step``: batches of ``val_loader`` that are validated before step 1, so that a
            mistake in it shows at once and not after an epoch. Nothing is recorded or changed: random generators,
            buffers and modes are as before, and no hook runs. Left out for loaders that may not give the same batches
            again (streams, iterators, your own samplers), and on several ranks. 0: none.
        settings: More lines for the reports, name -> value.
        progress: Counters of an earlier watch on this model, to continue from.
        history: The evaluations of an earlier watch on this model, to continue: the best one is then that of both, for
            early stopping, checkpoints, the verdict and the result. Pass the same callbacks. Default: none.

    Attributes:
        state: The state passed to hooks.

    Raises:
        ValueError: An option is out of range; on entering: a loader is empty, the optimizer holds no parameter of the
            model, or a checkpoint does not fit.
        TypeError: An option has the wrong type.
    """

    def __init__(  # noqa: PLR0913 - all but three by keyword
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        callbacks: Iterable[Callback] | Callback = (),
        *,
        loss: Any = None,
        train_loader: Loader | None = None,
        val_loader: Loaders | None = None,
        metrics: Mapping[str, Metric] | None = None,
        scheduler: Scheduler | None = None,
        scaler: torch.amp.GradScaler | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        log_every: int = 50,
        max_steps: int | None = None,
        device: str | torch.device | None = None,
        resume: str | Path | None = None,
        options_from: str = "checkpoint",
        validation_step: ValidationStep | None = None,
        skip_checks: Collection[str] = (),
        fast_loading: bool = True,
        nonfinite: str = "raise",
        settings: Mapping[str, object] | None = None,
        progress: Progress | None = None,
        history: History | None = None,
        sanity_steps: int = 2,
        divided: bool = False,
        classes: Sequence[str] | None = None,
    ) -> None:
        loss, names = as_loss(loss), as_class_names(classes)
        metrics = as_metrics(metrics)
        metrics |= per_class(loss, names, metrics)
        several = batches.named(val_loader, metrics)
        _check_parts(model, optimizer, resume)
        _check_loaders(train_loader, val_loader, several)
        if several:
            val_loader = next(iter(several.values()))
        if options_from not in ("checkpoint", "script"):
            raise ValueError(f"options_from must be 'checkpoint' or 'script', got {options_from!r}")
        plan = Plan(
            max_steps=max_steps,
            accumulate=accumulate,
            clip_norm=clip_norm,
            log_every=log_every,
            sanity_steps=sanity_steps,
        )
        place = _device_of(model) if device is None else batches.as_device(device)
        hooks = Callbacks(callbacks)
        self.state = State(
            model=model,
            optimizer=optimizer,
            loss=loss,
            scheduler=scheduler,
            scaler=scaler,
            train_loader=() if train_loader is None else train_loader,
            val_loader=val_loader,
            val_loaders=several,
            device=place,
            callbacks=hooks,
            plan=plan,
            progress=Progress() if progress is None else progress,
            history=continued(history, model, val_loader),
            validation=Validation(metrics, classes=names),
            settings=describe(
                model, optimizer, loss, scheduler, plan=plan, more={"device": str(place), **(settings or {})}
            ),
        )
        self._hooks, self._recorder = hooks, Recorder(self.state, hooks)
        self._checks, self._first_batch = Checks(self.state, skip_checks), True
        self._interrupts = Interrupts()
        self._training = Training(
            self.state,
            hooks,
            self._recorder,
            self._interrupts,
            checks=self._checks,
            fast_loading=fast_loading,
            nonfinite=nonfinite,
        )
        step = self._default_validation_step if validation_step is None else validation_step
        self._validator = Validator(
            self.state, hooks, self._recorder, step=step, metrics=metrics, place=self._place, fast_loading=fast_loading
        )
        self.state.validation.measure = self._validator.measure
        self._moves_model, self._resume = device is not None, resume
        self._keeps_options = options_from == "checkpoint"
        self._before: saving.Before | None = None  # what the checkpoint says
        self._exits: ExitStack | None = None  # while the watch is open
        self._used = self._checked = False
        self._weighted: set[bool] = set()  # whether the weights of examples came in a validation: False, True, or both
        self._evaluations = self._start = 0  # evaluations and steps before this watch
        # A loop that gives no validation step may validate in a way that the default step does not know.
        self._trial_step = validation_step
        self._restored: StateDict | None = None  # what `load_state_dict` was given
        if divided and scaler is not None:
            raise ValueError("divided=True does not go with a scaler: accumulate without the host, or use bfloat16")
        self._undivided = Undivided(accumulate) if divided and accumulate > 1 else None

    def __repr__(self) -> str:
        progress = self.state.progress
        return f"Watch({type(self.state.model).__name__}, {progress.epoch} epochs, {progress.step} steps)"

    def check(self, training_step: TrainingStep | None = None, validation_step: ValidationStep | None = None) -> Report:
        """Look for mistakes without training; call it before entering the watch.

        Looks at the weights, the optimizer's options and parameters, the targets where reading them costs nothing, the
        first batches of both loaders, the gradient that the first batches give (as micro-batches, and as one large
        batch), and whether the callbacks' folders can be written to. Most of it runs in a fit too. Afterwards weights,
        gradients, buffers, modes, random generators and loaders are as before; only the model may have moved to the
        device. No hook runs.

        Args:
            training_step: Returns the loss of a batch and its sums, or None twice. Default: ``watch.sums(model(input),
                target)``, for batches as in ``validation_step`` of `Watch`.
            validation_step: As for `Watch`, for this check only.

        Returns:
            What was seen, and what should be changed; ``print`` it.

        Raises:
            ValueError: A weight or an option is not finite, a label is out of range, a loader is empty, ...
            OSError: A callback can't write to its folder.
        """
        if self._used:
            raise RuntimeError("watch.check() looks at training before it starts: call it before `with watch:`")
        if isinstance(self.state.train_loader, tuple) and not self.state.train_loader:
            raise ValueError("watch.check() needs the train_loader of the Watch, and none was given")
        ranks.start(self.state.device)
        self._place()
        self._recorder.refuse_weights()
        step = self._default_training_step if training_step is None else training_step
        trial = validation_step or self._trial_step or self._default_validation_step
        found = preflight(self.state, self._checks, step, lambda: self._validator.rehearse(trial))
        self._first_batch, self._weighted = True, set()
        return found

    # -- entering and leaving --------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._used:
            raise RuntimeError(
                "a Watch can be entered only once: create another, with progress=watch.state.progress, and "
                "history=watch.state.history, to continue this one"
            )
        self._used = True
        self._prepare()
        state, exits = self.state, ExitStack()
        self._exits = exits
        try:
            exits.enter_context(self._interrupts)
            with ranks.failing_together():
                self._hooks.on_fit_start(state)
            self._recorder.agree()
            self._recorder.summary = Summary(state) if state.summarizes else None
            self._place()  # a callback may have replaced the loss
            exits.enter_context(ranks.unsynchronised(state.model))
            exits.callback(state.optimizer.register_step_pre_hook(self._training.before_optimizer).remove)
            exits.callback(state.optimizer.register_step_post_hook(self._training.after_optimizer).remove)
        except BaseException as error:
            self._leave(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            try:
                if self._training.in_epoch:  # left by `break`
                    self._training.end_epoch(left=True)
                ranks.align([self.state.model], buffers_only=True)
                self._warn_without_validation()
            except BaseException as late:
                self._leave(late)
                raise
        elif isinstance(error, Exception):
            known = isinstance(error, FloatingPointError)  # it names its step
            if (
                self._training.in_epoch
                and not known
                and not any("raised " in note for note in getattr(error, "__notes__", ()))
            ):
                error.add_note(self._training.place)
        self._leave(error)

    def _prepare(self) -> None:
        state, progress, held = self.state, self.state.progress, parameters(self.state.optimizer)
        ranks.start(state.device)
        ranks.refuse_differences(shared_facts(state, self._hooks.callbacks))
        self._place()
        progress.first_epoch, progress.first_step = progress.epoch, progress.step
        if not {id(p) for p in held} & {id(p) for p in state.model.parameters()}:
            raise ValueError("the optimizer holds no parameter of the model: training would change nothing")
        path = self._resume
        if path == "auto":
            with ranks.failing_together():
                found = None if ranks.rank() else _newest(self._hooks)
            path = ranks.from_main(found)
        if path is not None:
            with ranks.failing_together(), held_back():
                self._before = saving.load(local_path(path), state, kept=self._keeps_options)
            loaders = {"train_loader": state.train_loader, "val_loader": state.val_loader, **state.val_loaders}
            live = loaders if state.position.resumed is None else state.position.resumed["live"]
            start_workers({name: loader for name in live if (loader := loaders[name]) is not None})
        if self._restored is not None:
            hosted.load_state_dict(self._restored, state)
        check_options(state.optimizer)
        self._evaluations, self._start = len(state.history), progress.step
        ranks.align([state.model, state.loss], parameters(state.optimizer))
        zero_grad(state.optimizer)

    def _leave(self, error: BaseException | None) -> None:
        assert self._exits is not None
        self._interrupts.shielded = True  # on_fit_end may put weights back
        self._training.in_epoch = False
        self.state.error = error
        try:
            self._training.rest()
            self.state.ended = True
            try:
                self._recorder.summarize()
            finally:
                self._hooks.on_fit_end(self.state)
        except Exception as late:
            if error is None:
                raise
            # It must not hide the error that ended the fit.
            error.add_note(f"then on_fit_end failed: {late!r} {getattr(late, '__notes__', '')}")
        finally:
            self._exits.close()
            self._exits = None
        if self._interrupts.received is not None and not self._interrupts.passed_on:
            if error is None:
                raise self._interrupts.error()
            if isinstance(error, Exception):  # else it has ended the process already
                raise self._interrupts.error() from error

    def state_dict(self) -> StateDict:
        """Return what a host's checkpoint keeps beside model and optimizer: callbacks, counters, history.

        Tensors, numbers, strings, and lists and dicts of them. All ranks call it. A loop that uses `Checkpoint` needs
        neither this nor `load_state_dict`.
        """
        self._training.settle()
        return hosted.state_dict(self.state)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Continue, from the moment the watch is entered, where the fit was that `state_dict` describes.

        The host restores model and optimizer before that.

        Raises:
            RuntimeError: The watch was entered already.
            ValueError: It is not the state of a watch, or another version returned it.
        """
        if self._used:
            raise RuntimeError("watch.load_state_dict() comes before `with watch:`")
        hosted.check(state_dict)
        self._restored = state_dict

    @property
    def result(self) -> Result:
        """The result of the fit: the history, the best evaluation, why it stopped, the verdict, the baseline."""
        return Result.of(self.state)

    @property
    def stops(self) -> bool:
        """Whether training ends after the current step: at ``max_steps``, or because a callback asked for it.

        `epochs` and `train` end by themselves; a loop over the loader itself asks here to end within an epoch. A stop
        requested in ``on_step_end`` shows after `end_step`, which otherwise runs at the next call.
        """
        return self._training.stops

    @property
    def evaluated(self) -> bool:
        """Whether the newest evaluation belongs to the current step."""
        return self._recorder.evaluated

    # -- training --------------------------------------------------------------------------------------------------

    def epochs(self, epochs: int | None = None) -> Iterator[int]:
        """Iterate over the epochs' indices, from 0, until training stops. Each epoch starts in train mode.

        Modules that you have put into eval mode stay in it, such as a frozen part of the model. If the whole model is
        in eval mode, as an evaluation leaves it, all of it trains except for parts that are frozen by now. A model that
        was trained before has the modes of the last training, except for parts that you have set or frozen since.

        Args:
            epochs: How many to train in all, including those before an interruption if training resumes, and those of
                an earlier call. None: until ``max_steps``, or until a callback asks for the end.

        Raises:
            ValueError: ``epochs`` is out of range, a monitored metric will not be measured, or a weight is not finite.
        """
        self._require_open("epochs()")
        self.state.plan = evolve(self.state.plan, epochs=count("epochs", epochs))
        trial, self._trial_step = self._trial_step, None
        if trial is not None and not self._checked:
            self.rehearse(trial)
        self._check()
        return self._epochs()

    def _epochs(self) -> Iterator[int]:
        if self._training.in_epoch:  # an earlier loop was left by `break`
            self._training.end_epoch(left=True)
        while not (self.stops or self.epochs_done(self.state.progress.epoch)):
            self._training.start_epoch()
            yield self.state.progress.epoch
            self._training.end_epoch()

    def epochs_done(self, epoch: int) -> bool:
        """Whether ``epoch`` completed epochs complete this fit."""
        wanted = self.state.plan.epochs
        return wanted is not None and epoch - self.state.progress.first_epoch >= wanted

    def start_epoch(self, epochs: int | None = None, *, epoch: int | None = None) -> None:
        """Start an epoch, for a loop that `epochs` can't run, such as that of another library; `end_epoch` ends it.

        Args:
            epochs: How many will be trained in all, if known; it is only told.
            epoch: Its index, from 0, if the loop counts by itself. Default: the epochs completed so far.

        Raises:
            RuntimeError: The last epoch has not ended.
            ValueError: ``epochs`` or ``epoch`` is out of range.
        """
        self._require_open("start_epoch()")
        if self._training.in_epoch:
            raise RuntimeError("watch.start_epoch() was called within an epoch: call watch.end_epoch() first")
        self.state.plan = evolve(self.state.plan, epochs=count("epochs", epochs))
        number = plain(epoch)
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 0):
            raise ValueError(f"epoch must be an integer of 0 or more, got {epoch!r}")
        self._check()
        if number is not None:
            self.state.progress.epoch = number
        self._training.start_epoch()

    def end_epoch(self) -> None:
        """End the epoch that `start_epoch` has started, after its validation: ``on_epoch_end`` and ``on_log`` run.

        Raises:
            RuntimeError: No epoch is running, or batches wait for a step.
        """
        if not self._training.in_epoch:
            self._refuse("end_epoch()")
        self._training.end_epoch()

    @property
    def epoch_complete(self) -> bool:
        """Whether all batches of the epoch were seen; assumed if the loader has no length."""
        return self._training.complete

    def train(self, *, ragged: bool = False) -> Iterator[Batch]:
        """Iterate over this rank's training batches, on the device, until the epoch or training ends.

        Args:
            ragged: With several ranks, whether to yield `ABSENT` when only other ranks still have a batch; the loop
                then calls `skip`.

        Raises:
            ValueError: A rank lacks a batch that others have, and ``ragged`` is False.
            TypeError: ``train_loader`` is an iterator, such as a generator, and several epochs are to be trained.
        """
        if not self._training.in_epoch:
            self._refuse("train()")
        if self._validator.running is not None:
            raise RuntimeError("watch.train() was called inside `with watch.validating():`")
        if isinstance(self.state.train_loader, tuple) and not self.state.train_loader:
            raise ValueError("watch.train() needs the train_loader of the Watch, and none was given")
        plan, progress = self.state.plan, self.state.progress
        left = 1 if plan.epochs is None or plan.max_steps is not None else plan.epochs + progress.first_epoch
        if left - progress.epoch > 1:
            batches.check_repeats("train_loader", self.state.train_loader, "several epochs are to be trained")
        return self._training.iterate(ragged=ragged)

    def loss(self, output: Any, target: Any, sample_weight: Tensor | None = None) -> Tensor:
        """Return the loss of a batch as a scalar, and record it.

        In training, call ``backward()`` on it, once per micro-batch. With ``accumulate`` above 1 its value is the mean
        over the micro-batch, and its gradient becomes exact right before the step: don't divide it or add to it; a
        penalty goes through `backward`. Inside `validating` the loss, the metrics and the losses of the examples are
        measured.

        Args:
            output: Model output, as the loss expects it.
            target: Target, as the loss expects it.
            sample_weight: Weight of each example, shape (N,), or of each position; see `Loss.sums`.

        Raises:
            RuntimeError: A call is missing; the message names it.
        """
        if self._validator.running is not None:
            loss = self.sums(output, target, sample_weight)
            sums = self.measured(loss, _examples(loss, output, target, "watch.measured"))
            self.update_metrics(output, target, sample_weight)
            return sums.mean
        if not self._training.in_epoch:
            self._refuse("loss()")
        self._training.expect_batch()
        loss = self.sums(output, target, sample_weight)
        scalar = self._training.open_batch(loss, _examples(loss, output, target, "watch.backward"))
        return scalar if self._undivided is None else self._undivided(scalar)

    def sums(self, output: Any, target: Any, sample_weight: Tensor | None = None) -> LossSum | Tensor:
        """Return the current loss without recording it: a `LossSum` if it is exact, else a scalar mean.

        Args:
            output: As for `loss`.
            target: As for `loss`.
            sample_weight: As for `loss`.

        Raises:
            TypeError: ``sample_weight`` is given, and the loss is a function that returns a mean.
            ValueError: ``sample_weight`` is an index of the examples.
        """
        if sample_weight is not None and (self._validator.running is not None) not in self._weighted:
            self._check_weights(sample_weight)
        if self._validator.running is not None:
            return self._validator.running.apply(output, target, sample_weight)
        self._recorder.loss_is_used = True
        loss = apply(self.state.loss, output, target, sample_weight)
        if self._first_batch:
            self._first_batch = False
            self._checks.first_batch(output, target)
        return loss

    def backward(self, loss: LossSum | Tensor, examples: int | None = None, *, source: str = "the loss") -> None:
        """Record the loss of a micro-batch and run its backward pass: for a penalty, or a loss that the model computes.

        Args:
            loss: A `LossSum`, such as ``watch.sums(model(x), y) + penalty``, or a scalar, the mean over the batch.
            examples: Examples in the batch; needed for a scalar.
            source: Where the loss comes from, for the error message.

        Raises:
            TypeError: ``loss`` is neither.
            RuntimeError: A call is missing; the message names it.
        """
        if not self._training.in_epoch:
            self._refuse("backward()")
        self._training.expect_batch()
        sums = loss if isinstance(loss, LossSum) else as_sums(loss, lambda: _known(examples), source)
        self._training.backward(loss, sums, examples or 0)

    def skip(self) -> None:
        """Count a micro-batch that only other ranks have."""
        if not self._training.in_epoch:
            self._refuse("skip()")
        self._training.expect_batch()
        self._training.skip()

    @property
    def step_due(self) -> bool:
        """Whether a step has all its micro-batches: ``accumulate``, or fewer at the end of a loader with a length."""
        return self._training.step_due

    @property
    def step_open(self) -> bool:
        """Whether micro-batches are waiting for a step."""
        return self._training.step_open

    def before_step(self) -> bool:
        """Make the gradients exact and unscaled, run ``on_gradients_ready``, clip, and check that they are finite.

        Runs by itself in ``optimizer.step()``. Call it before ``scaler.step(optimizer)``, or to use the gradients.

        Returns:
            Whether the step may change the weights; False if ``nonfinite="skip"`` has taken its gradients away.

        Raises:
            RuntimeError: A call is missing; the message names it.
            FloatingPointError: A gradient is not finite.
        """
        if not self._training.in_epoch:
            self._refuse("before_step()")
        self._training.complete_gradients(unscale=True)
        return not self._training.left_out

    def end_step(self) -> None:
        """Count the step and run ``on_step_end``, and every ``log_every`` steps ``on_log``.

        Runs by itself at the next call on the watch.

        Raises:
            RuntimeError: A call is missing; the message names it.
        """
        if not self._training.in_epoch:
            self._refuse("end_step()")
        self._training.end_step()

    # -- validation ------------------------------------------------------------------------------------------------

    def validating(self) -> AbstractContextManager[None]:
        """Measure the batches that the body passes to `loss`, in eval mode and without gradients.

        ``on_validation_start`` runs before. After it the evaluation enters the history, and ``on_validation_end`` and
        ``on_log`` run. If the model has non-finite weights, training stops and the evaluation is dropped: then
        `evaluated` is False, and ``state.metrics`` is the evaluation before.

        Raises:
            ValueError: No batch was measured, or the Watch has no ``val_loader``.
        """
        self._start_validation("validating()")
        if self.state.val_loader is None:
            raise ValueError("watch.validating() needs the val_loader of the Watch, and none was given")
        if self.state.val_loaders:
            raise ValueError(
                "watch.validating() measures the batches of one loader, and the Watch has several: call "
                "watch.validate(), which measures all of them"
            )
        return self._validator.validating()

    def validate(self) -> None:
        """Validate on ``val_loader`` with the validation step. Without a ``val_loader`` the training loss is recorded.

        Raises:
            ValueError: The loader yielded no batch.
        """
        self._start_validation("validate()")
        self._validator.validate()

    def rehearse(self, step: ValidationStep) -> None:
        """Validate ``sanity_steps`` batches before step 1, so that what fails in a validation fails at once.

        Runs by itself in `epochs` if the Watch has a ``validation_step``. Nothing is recorded or changed.

        Args:
            step: Called with a batch on the device, as ``validation_step``.
        """
        self._require_open("rehearse()")
        self._trial_step = None
        self._check()  # first, since it costs nothing
        if self.state.plan.sanity_steps:
            self._validator.rehearse(step)
            self.state.history.check()  # the names of vectors are known now

    def measured(
        self, loss: LossSum | Tensor, examples: int | None = None, *, source: str = "the validation loss"
    ) -> LossSum:
        """Record the loss of a validation batch that was computed elsewhere, and return it as sums.

        Args:
            loss: A `LossSum`, or a scalar, the mean over the batch.
            examples: Examples in the batch; needed for a scalar.
            source: Where the loss comes from, for the error message.

        Raises:
            RuntimeError: No validation is running.
        """
        if self._validator.running is None:
            raise RuntimeError("measured() is for validation: call it inside `with watch.validating():`")
        sums = as_sums(loss, lambda: _known(examples), source)
        self._validator.running.add(*sums)
        return sums

    def update_metrics(self, outputs: Any, targets: Any, sample_weight: Tensor | None = None) -> None:
        """Pass a validation batch to the metrics and other observers of outputs; `loss` does this itself.

        Raises:
            RuntimeError: No validation is running.
        """
        if self._validator.running is None:
            raise RuntimeError("update_metrics() is for validation, and no validation is running")
        self._validator.running.update(outputs, targets, sample_weight)

    def evaluate(self, loader: Loader) -> dict[str, float]:
        """Return the loss and the metrics over any loader: ``val/loss``, ``val/<metric>``, ... Nothing is recorded.

        Raises:
            ValueError: The loader yielded no batch.
        """
        if isinstance(loader, Mapping):
            raise TypeError("one loader is measured at a time, got a dict: call it for each of its loaders")
        batches.check_loader("loader", loader, several="call it for each of them")
        ranks.start(self.state.device)
        return self._validator.evaluate(loader)

    def predict(self, loader: Loader, step: Callable[[Batch], Any] | None = None) -> Any:
        """Return the model's outputs for all batches of a loader, joined along the first dimension, on the CPU.

        In eval mode and without gradients; afterwards all modes are as before. Nothing is recorded.

        Args:
            loader: Batches with or without targets: the input is the first part of a tuple or list, the value of
                ``"input"`` in a mapping, or the batch itself. Any number of ranks share them out as in a validation.
            step: Returns the outputs of a batch on the device. Default: those of the model for the input.

        Returns:
            A tensor; or, like the outputs, a tuple, list, dict or dataclass of tensors.

        Raises:
            ValueError: There is no batch, or the outputs can't be joined, for example because their lengths vary.
            TypeError: ``loader`` is not one loader, but a tensor, an array, a data set or a dict.
        """
        if hasattr(loader, "__array__"):
            shape = tuple(getattr(loader, "shape", ()))
            raise TypeError(
                f"predict needs batches, got one {type(loader).__name__} of shape {shape}, each of whose rows would be "
                "taken as a batch: wrap it in a list, predict([x]), or in a DataLoader"
            )
        batches.check_loader("loader", loader, several="call predict for each of them; a single batch goes into a list")
        ranks.start(self.state.device)
        model = self.state.model
        return self._validator.predict(loader, (lambda batch: model(batches.input_of(batch))) if step is None else step)

    def _default_validation_step(self, batch: Batch) -> None:
        input, target, *weight = batches.parts(batch)
        self.loss(self.state.model(input), target, *weight)

    def _default_training_step(self, batch: Batch) -> tuple[LossSum | Tensor, LossSum]:
        input, target, *weight = batches.parts(batch)
        loss = self.sums(self.state.model(input), target, *weight)
        return loss, as_sums(loss, lambda: batches.batch_size(batch), "the loss")

    def _start_validation(self, call: str) -> None:
        self._require_open(call)
        if self._validator.running is not None:
            raise RuntimeError("a validation is running: leave its `with watch.validating():` first")
        self._check()
        self._training.settle_all()
        if self._training.in_epoch and self._training.batches_ended:
            self._training.log_rates()

    # -- checks ----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Before step 1: will everything that is monitored be measured?"""
        if self._checked:
            return
        self._checked = True
        self._recorder.refuse_weights()
        state, loss = self.state, self._validator.loss
        if state.val_loader is not None and getattr(loss, "has_weights", False):
            state.history.names |= {f"{under}/loss_unweighted" for under in state.places}
        state.validation.baseline = expected_baseline(loss, state.train_loader, state.val_loader)
        if state.validation.baseline is not None:
            state.history.names.add("val/loss_vs_baseline")
        state.history.check()
        warn_of_another_loss(state.history, loss)
        if self._before is not None:
            warn_of_changes(state, self._before)
        self._checks.before_training()

    def _check_weights(self, sample_weight: object) -> None:
        """Judge the first weights of examples in training, and in validation."""
        state, validates = self.state, self._validator.running is not None
        loaders = [state.val_loader, *state.val_loaders.values()] if validates else [state.train_loader]
        refuse_index(sample_weight, loaders)
        if not self._weighted:
            announce_weights(sample_weight, loaders)
        self._weighted.add(validates)

    def _warn_without_validation(self) -> None:
        state = self.state
        if (
            state.progress.step > self._start
            and state.val_loader is not None
            and len(state.history) == self._evaluations
            and state.stop_reason is None
        ):
            logger.warning("the watch has a val_loader, but no validation was run: call watch.validate() in each epoch")

    def _place(self) -> None:
        """Move the losses, and the model if a device was given."""
        state = self.state
        if self._moves_model:
            state.model.to(state.device)
        for loss in (state.loss, state.eval_loss):
            if isinstance(loss, nn.Module):
                loss.to(state.device)

    def _require_open(self, call: str) -> None:
        if self._exits is None:
            raise RuntimeError(f"watch.{call} needs an open watch: write `with Watch(...) as watch:` around the loop")

    def _refuse(self, call: str) -> NoReturn:
        """Raise the error of a call outside an epoch."""
        self._require_open(call)
        raise RuntimeError(
            f"watch.{call} needs a running epoch: write `for epoch in watch.epochs(...):` around the batches"
        )


def _newest(hooks: Callbacks) -> Path | None:
    """Return the newest whole checkpoint of the attached `Checkpoint`; None if it has none."""
    for callback in hooks.callbacks:
        if isinstance(callback, Checkpoint):
            return callback.latest()
    raise ValueError('resume="auto" needs a Checkpoint among the callbacks, to know the folder')


def _known(examples: int | None) -> int:
    if examples is None:
        raise TypeError("a scalar loss is the mean over the batch: pass examples=, the number of examples in it")
    return examples


def _examples(loss: LossSum | Tensor, output: object, target: object, instead: str) -> int:
    """Return the number of examples; 0 if unknown, which a `LossSum` does not need."""
    try:
        return batches.batch_size((output, target))
    except TypeError as error:
        if isinstance(loss, LossSum):
            return 0
        why = str(error).partition(";")[0]
        raise TypeError(
            f"a loss that returns a mean needs the number of examples: {why}; call "
            f"{instead}(watch.sums(output, target), examples=...)"
        ) from error


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _check_loaders(train_loader: object, val_loader: object, several: Mapping[str, object]) -> None:
    if train_loader is not None:
        joined = "there is one training loader, for example over a ConcatDataset of the data sets"
        batches.check_loader("train_loader", train_loader, several=joined)
    for name, loader in several.items():
        batches.check_loader(f"val_loader[{name!r}]", loader, several="give each loader another name")
    if val_loader is not None and not several:
        named = 'give several loaders as a dict, val_loader={"first": ..., "second": ...}'
        batches.check_loader("val_loader", val_loader, several=named)


def _check_parts(model: object, optimizer: object, resume: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
    if isinstance(optimizer, (list, tuple)):
        raise TypeError(
            f"optimizer must be one optimizer, got {len(optimizer)}: pass the one whose steps are counted, and step "
            "the others in training_step or in your loop; a callback with state_dict puts them into checkpoints"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}")
    if needs_closure(optimizer):
        raise TypeError(
            f"{type(optimizer).__name__} needs a closure, which evaluates a batch several times within a step, so that "
            "neither the loss nor the gradient of the step is one value: train with it in a plain loop, and measure "
            "with Watch.evaluate or Trainer.validate under another optimizer"
        )
    if not (resume is None or isinstance(resume, (str, Path))):
        raise TypeError(f'resume must be a path or "auto", got {resume!r}')
    if resume is not None:
        local_path(resume)
