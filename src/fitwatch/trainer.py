"""The Trainer: options, and steps that a subclass may override."""

import copy
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, Self

import torch
from attrs import define, field, fields
from torch import Tensor, nn
from tqdm.auto import tqdm

from fitwatch import ranks
from fitwatch.calibration.calibrated import required
from fitwatch.callback import Callback, Callbacks
from fitwatch.data import batches
from fitwatch.engine.guard import MODES
from fitwatch.engine.preflight import Report
from fitwatch.engine.schedule import Schedule
from fitwatch.helpers import rng
from fitwatch.helpers.aliases import Batch, Loader, Loaders
from fitwatch.helpers.options import count, instance, integer, number, one_of
from fitwatch.helpers.terminal import with_links
from fitwatch.loop import Loop
from fitwatch.losses import LossSum, as_loss, as_sums
from fitwatch.measuring.predictions import as_probabilities
from fitwatch.result import Result
from fitwatch.tensorboard.board import TensorBoard
from fitwatch.watch import Watch

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@define(eq=False, slots=False, repr=False)
class Trainer:
    """Trains a model; subclass it and override a step, or attach callbacks.

    Each step uses the exact gradient of sum(w l) / sum(w) over all its examples, however they are split into
    micro-batches. Reported losses are the same fraction over the epoch or the validation set.

    A batch is ``(input, target)`` or ``(input, target, sample_weight)``, or a mapping with these keys.

    Args:
        model: Any module, compiled or not. Moved to ``device`` when fitting starts.
        optimizer: Any torch optimizer over the model's parameters that steps without a closure.
        loss: A loss of fitwatch, torch's ``CrossEntropyLoss``, ``BCEWithLogitsLoss``, ``NLLLoss`` or ``MSELoss`` (made
            exact), or any module or function (output, target) -> scalar, taken as the mean over the batch.
            Default: `CrossEntropy`.
        callbacks: Called in this order.
        scheduler: A torch learning-rate scheduler.
        scheduler_interval: Whether the scheduler steps after every ``"step"`` or ``"epoch"``. Default: ``"epoch"`` for
            `StepLR`, `MultiStepLR`, `ExponentialLR` and the cosine schedulers, whose options are usually given in
            epochs; ``"step"`` for all others. `ReduceLROnPlateau` steps after every evaluation in either case.
        scheduler_monitor: The metric passed to `ReduceLROnPlateau`.
        accumulate: Micro-batches per step. The last step of an epoch may have fewer.
        clip_norm: Largest total 2-norm of the gradients; they are scaled down to it. None: no clipping.
        precision: ``"fp32"`` (no autocast), or autocast to ``"bf16"`` or ``"fp16"``; the latter with a GradScaler.
        metrics: Name -> function of (outputs, targets) over the whole validation set, or an object with ``update``,
            ``compute`` and ``reset``. Reported as ``val/<name>``; a vector with a number for each class as
            ``val/<name>/<class>`` (``classes``, else the names in ``dataset.classes``, or the indices), a dict as
            ``val/<name>/<key>``.
        classes: Names of the classes, or of the labels of `BinaryCrossEntropy`, in the order of their indices. They
            appear in tables, pictures and the names of metrics; and for a loss of fitwatch that takes logits, each
            validation measures ``val/recall/<class>``, ``val/precision/<class>`` and
            ``val/average_precision/<class>``, unless ``metrics`` has one of that name.
        device: ``"auto"`` (CUDA, else MPS, else CPU) or a torch device.
        log_every: Steps per log window. Values are copied to the host once per log window.
        skip_checks: As for `Watch`.
        nonfinite: As for `Watch`: ``"raise"``, ``"skip"``, ``"spike"`` or ``"ignore"``.
        fast_loading: As for `Watch`.
        sanity_steps: Batches of ``val_loader`` that are validated before step 1, so that a mistake in metrics or in
            `validation_step` shows at once; see `Watch`. It sees a copy of the attributes that a subclass adds, but
            what a step or a metric changes elsewhere is changed by the trial too. 0: none.
        seed: Seed for torch, Python and NumPy, from 0 to 2**32 - 1, set when the first fit starts: too late for the
            initial weights of ``model``. None: no seeding.
        quiet: Whether `fit` ends without the lines of the result on standard error.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An option is out of its range.
    """

    model: nn.Module = field(validator=instance(nn.Module))
    optimizer: torch.optim.Optimizer = field(validator=instance(torch.optim.Optimizer))
    loss: Any = field(default=None, converter=as_loss)
    callbacks: Sequence[Callback] | Callback = field(default=(), kw_only=True)
    scheduler: Any = field(default=None, kw_only=True)
    scheduler_interval: str | None = field(default=None, kw_only=True, validator=one_of(None, "step", "epoch"))
    scheduler_monitor: str = field(default="val/loss", kw_only=True, validator=instance(str))
    accumulate: int = field(default=1, kw_only=True, validator=integer(1))
    clip_norm: float | None = field(default=None, kw_only=True, validator=number(above=0, or_none=True))
    precision: str = field(default="fp32", kw_only=True, validator=one_of(*_AUTOCAST))
    metrics: Mapping[str, Any] | None = field(default=None, kw_only=True)
    classes: Sequence[str] | None = field(default=None, kw_only=True)
    device: torch.device = field(default="auto", kw_only=True, converter=batches.as_device)  # type: ignore[assignment] # before conversion
    log_every: int = field(default=50, kw_only=True, validator=integer(1))
    skip_checks: Collection[str] = field(default=(), kw_only=True)
    nonfinite: str = field(default="raise", kw_only=True, validator=one_of(*MODES))
    fast_loading: bool = field(default=True, kw_only=True, validator=instance(bool))
    sanity_steps: int = field(default=2, kw_only=True, validator=integer(0))
    seed: int | None = field(default=None, kw_only=True, validator=integer(0, 2**32 - 1, or_none=True))
    quiet: bool = field(default=False, kw_only=True, validator=instance(bool))

    def __attrs_post_init__(self) -> None:
        schedule = Schedule(self.scheduler, self.scheduler_interval, self.scheduler_monitor)
        schedule.check(self.optimizer)
        self._schedule = schedule.decided()
        self._scaler = torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None
        self._watch = self._new_watch()
        self.state = self._watch.state

    def __repr__(self) -> str:
        parts, done = f"{type(self.model).__name__}, {type(self.optimizer).__name__}", self.state.progress
        return f"{type(self).__name__}({parts}, {done.epoch} epochs, {done.step} steps)"

    # -- to override ---------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch) -> LossSum | Tensor | None:
        """Return the loss of a batch; the model is in train mode, the batch on the device.

        Returns:
            A `LossSum`; a scalar tensor, taken as the mean over the batch; or None to leave the batch out, which is
            counted.
        """
        input, target, *weight = batches.parts(batch)
        return self.compute_loss(self.model(input), target, *weight)

    def validation_step(self, batch: Batch) -> LossSum | Tensor:
        """Return the loss of a batch, in eval mode and without gradients.

        An override passes outputs and targets to `update_metrics` if there are metrics or class weights.

        Returns:
            As for `training_step`.
        """
        input, target, *weight = batches.parts(batch)
        output = self.model(input)
        loss = self.compute_loss(output, target, *weight)  # first, since its errors are the clearest
        self.update_metrics(output, target, *weight)
        return loss

    def prediction_step(self, batch: Batch) -> Any:
        """Return the outputs for a batch with or without targets, for `predict`; override it for other formats.

        The input is the first part of a tuple or list, the value of ``"input"`` in a mapping, or the batch itself.
        """
        return self.model(batches.input_of(batch))

    def batch_size(self, batch: Batch) -> int:
        """Return the number of examples, for scalar losses and the speed; override it for custom batch formats.

        Raises:
            TypeError: The first dimensions of the batch's tensors differ, or it has none.
        """
        return batches.batch_size(batch)

    # -- to call -------------------------------------------------------------------------------------------------

    def compute_loss(self, output: Any, target: Any, sample_weight: Any = None) -> LossSum | Tensor:
        """Return the current loss, which callbacks may have weighted: a `LossSum` if it is exact, else a scalar mean.

        Args:
            output: Model output, as the loss expects it.
            target: Target, as the loss expects it.
            sample_weight: Weight of each example, shape (N,), or of each position; see `Loss.sums`.

        Raises:
            TypeError: ``sample_weight`` is given, and the loss is a function that returns a mean.
        """
        return self._watch.sums(output, target, sample_weight)

    def update_metrics(self, outputs: Any, targets: Any, sample_weight: Tensor | None = None) -> None:
        """Pass a validation batch to the metrics and other observers of outputs; for ``validation_step``."""
        self._watch.update_metrics(outputs, targets, sample_weight)

    def fit(  # noqa: PLR0913 - all but two by keyword
        self,
        train_loader: Loader,
        val_loader: Loaders | None = None,
        *,
        epochs: int | None = None,
        max_steps: int | None = None,
        validate_every: int | None = None,
        resume: str | Path | None = None,
        options_from: str = "checkpoint",
        reset: bool = False,
        validate_first: bool = False,
    ) -> Result:
        """Train; called again, continue for ``epochs`` or ``max_steps`` more. The model ends in eval mode.

        The best evaluation is that of all fits of this Trainer, for the result, for the weights that early stopping
        restores, for ``best.pt`` and for the verdict; only the patience starts over. ``reset`` starts a new best.

        Modules that you have put into eval mode stay in it while the others train; see `Watch.epochs`.

        Args:
            train_loader: Any iterable of batches, with or without a length.
            val_loader: The same for validation. None: no validation. Several by name, as a dict: all are measured, and
                the first one decides; see `Watch`.
            epochs: Passes over ``train_loader``.
            max_steps: Optimizer steps; with both given, whichever comes first.
            validate_every: Steps between validations. Default: at the end of each epoch.
            resume: A checkpoint, or ``"auto"`` for the newest one of the attached `Checkpoint` (none: a fresh start).
                ``epochs`` and ``max_steps`` then count from where the interrupted fit began.
            options_from: Whose options the optimizer and the scheduler have when training resumes, if they differ:
                ``"checkpoint"`` or ``"script"``; see `Watch`.
            reset: Whether to forget the evaluations of earlier fits, and what was the best of them. Use it if they
                don't compare with those of this fit: another validation set or loss. Counters and weights stay.
            validate_first: Whether to validate before the first step too, unless training resumes or an earlier fit
                has ended with an evaluation. This evaluation has no ``train/loss`` (NaN).

        Raises:
            ValueError: An option is out of range, a loader is empty, a monitored metric will not exist, the optimizer
                holds no parameter of the model, or a checkpoint does not fit.
            TypeError: A loader is not iterable, or is an iterator for more than one pass; or a step returned no loss.
        """
        if epochs is None and max_steps is None:
            raise ValueError("fit needs epochs= or max_steps=")
        if reset and resume is not None:
            raise ValueError("reset=True forgets earlier evaluations, and resume continues them: give one of the two")
        epochs, max_steps = count("epochs", epochs), count("max_steps", max_steps)
        validate_every = count("validate_every", validate_every)
        if validate_every is not None and val_loader is None:
            raise ValueError("validate_every needs a val_loader")
        if validate_first and val_loader is None:
            raise ValueError("validate_first needs a val_loader")
        watch = self._watch = self._new_watch(
            train_loader=train_loader,
            val_loader=val_loader,
            max_steps=max_steps,
            resume=resume,
            options_from=options_from,
            history=None if reset else self._watch.state.history,
        )
        self.state = watch.state
        ranks.start(self.device)
        ranks.refuse_differences({"epochs": epochs, "validate_every": validate_every, "resume": resume})
        if self.seed is not None and self.state.progress.step == 0:
            rng.seed_all(self.seed + ranks.rank())  # rank 0 alone draws the order of the batches
        Loop(watch, self._train_batch, self._schedule, validate_every, self._trial_step()).run(
            epochs, validates_first=validate_first
        )
        result = watch.result
        if not self.quiet and ranks.rank() == 0:
            tqdm.write(with_links(str(result), sys.stderr), file=sys.stderr)
        return result

    def check(self, train_loader: Loader, val_loader: Loaders | None = None) -> Report:
        """Look for mistakes without training: ``print(trainer.check(train, val))``.

        It looks at the weights, the optimizer, the targets where reading them costs nothing, the first batches of both
        loaders with all metrics, the gradient of a step (as micro-batches, and as one large batch), and the folders of
        the callbacks. `fit` itself finds most of this before or in its first step. Nothing is changed, except that the
        model moves to ``device``; no hook runs, so class weights that a callback sets are not in the loss yet.

        Raises:
            ValueError: A weight or an option is not finite, a label is out of range, a loader is empty, ...
            OSError: A callback can't write to its folder.
        """
        watch = self._new_watch(train_loader=train_loader, val_loader=val_loader)
        twin = self._twin()
        twin._watch, twin.state = watch, watch.state  # noqa: SLF001 - of the same class
        return watch.check(twin._checked_batch, twin._validate_batch)  # noqa: SLF001

    def validate(self, loader: Loader) -> dict[str, float]:
        """Return the exact loss and the metrics over ``loader``, in eval mode: ``val/loss``, ``val/<metric>``, ...

        With class weights, ``val/loss_unweighted`` is the loss without them.

        Raises:
            ValueError: The loader yields no batch.
        """
        return self._watch.evaluate(loader)

    def test(self, loader: Loader) -> dict[str, float]:
        """Return the same measurements as `validate`, named for a test set: ``test/loss``, ``test/<metric>``, ...

        After a fit they are also in its result, ``result.test``, and an attached `TensorBoard` writes them to the run,
        as dots and in the end report.

        Raises:
            ValueError: The loader yields no batch.
        """
        values = {f"test/{name.removeprefix('val/')}": value for name, value in self.validate(loader).items()}
        self.state.test.clear()
        self.state.test.update(values)
        for callback in Callbacks(self.callbacks).callbacks:
            if isinstance(callback, TensorBoard) and ranks.rank() == 0:
                callback.write_test(self.state)
        return values

    def predict(self, loader: Loader, *, proba: bool = False, calibrated: bool = False) -> Any:
        """Return the model's outputs for all batches of a loader, joined along the first dimension, on the CPU.

        In eval mode and without gradients; afterwards all modes are as before. The order is that of the loader.

        Args:
            loader: Batches with or without targets; see `prediction_step`.
            proba: Whether to return probabilities instead of outputs: softmax over the classes for a loss of classes
                (for one logit the probability of class 1), sigmoid for `BinaryCrossEntropy`.
            calibrated: Whether to calibrate the outputs first, by that of the last fit: ``result.calibration``.

        Returns:
            A tensor; or, like the outputs, a tuple, list, dict or dataclass of tensors.

        Raises:
            ValueError: There is no batch; the outputs can't be joined, for example because their lengths vary; with
                ``proba`` the loss does not say what the outputs are; or with ``calibrated`` the last fit has no
                calibration.
            TypeError: ``proba`` or ``calibrated`` is True and the outputs are not a single tensor.
        """
        convert = as_probabilities(self.loss) if proba else None
        if calibrated:
            known = required(self.state.calibration, self.state.validation.not_refined)
            convert = known.probabilities if proba else known.logits
        outputs = self._watch.predict(loader, self._predict_batch)
        if convert is None:
            return outputs
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"{'calibrated' if calibrated else 'proba'}=True needs outputs that are one tensor, got "
                f"{type(outputs).__name__}: return the logits alone from prediction_step"
            )
        return convert(outputs)

    # -- what the loop calls -------------------------------------------------------------------------------------

    def _train_batch(self, batch: Batch) -> tuple[LossSum | Tensor | None, int | None]:
        """Return the loss of a batch, None to leave it out, and its number of examples, if known."""
        if self.precision == "fp32":
            loss = self.training_step(batch)
        else:
            with self._autocast():
                loss = self.training_step(batch)
        if loss is None:
            return None, None
        if not isinstance(loss, LossSum):
            return loss, int(self._sums(loss, batch, "training_step").weight)
        try:
            return loss, self.batch_size(batch)
        except TypeError:  # custom batch format: only the examples per second are lost
            return loss, None

    def _validate_batch(self, batch: Batch) -> None:
        with self._autocast():
            self._watch.measured(self._sums(self.validation_step(batch), batch, "validation_step"))

    def _predict_batch(self, batch: Batch) -> Any:
        with self._autocast():
            return self.prediction_step(batch)

    def _checked_batch(self, batch: Batch) -> tuple[LossSum | Tensor | None, LossSum | None]:
        with self._autocast():
            loss = self.training_step(batch)
        return loss, None if loss is None else self._sums(loss, batch, "training_step")

    def _trial_step(self) -> Callable[[Batch], None]:
        return self._twin()._validate_batch  # noqa: SLF001 - of the same class

    def _twin(self) -> Self:
        """Return a copy for trials: attributes that a subclass adds must not change."""
        twin = copy.copy(self)
        own = {a.name for a in fields(Trainer)} | {"_schedule", "_scaler", "_watch", "state"}
        for name, value in vars(self).items():
            if name not in own:
                with suppress(Exception):  # a generator or a file can't be copied
                    setattr(twin, name, copy.deepcopy(value, {id(self): twin, id(self.model): self.model}))
        return twin

    def _new_watch(self, **fit: Any) -> Watch:
        return Watch(
            self.model,
            self.optimizer,
            self.callbacks,
            loss=self.loss,
            metrics=self.metrics,
            classes=self.classes,
            scheduler=self.scheduler,
            scaler=self._scaler,
            accumulate=self.accumulate,
            clip_norm=self.clip_norm,
            log_every=self.log_every,
            sanity_steps=self.sanity_steps,
            device=self.device,
            validation_step=self._validate_batch,
            skip_checks=self.skip_checks,
            nonfinite=self.nonfinite,
            fast_loading=self.fast_loading,
            settings={"precision": self.precision, "seed": self.seed},
            progress=self._watch.state.progress if fit else None,
            **fit,
        )

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = _AUTOCAST[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _sums(self, loss: Any, batch: Batch, step: str) -> LossSum:
        return as_sums(loss, lambda: self.batch_size(batch), f"{type(self).__name__}.{step}")
