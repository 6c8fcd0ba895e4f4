"""The state that hooks receive: progress, measurements, and the requests a callback may make."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from attrs import define, field
from torch import Tensor, nn

from fitwatch import ranks
from fitwatch.calibration.calibrated import Calibration, Fitted
from fitwatch.calibration.logit_losses import takes_logits
from fitwatch.data.batches import class_names
from fitwatch.data.position import Position
from fitwatch.helpers.aliases import Batch, Loader, Scheduler, StateDict
from fitwatch.losses.baseline import Baseline
from fitwatch.measuring.metrics import Metric, RunningLoss
from fitwatch.measuring.validation import CALIBRATION, Validation
from fitwatch.records import Record
from fitwatch.rules.overfitting import Verdict
from fitwatch.state.history import Entry, History
from fitwatch.state.log import Log
from fitwatch.state.progress import Plan, Progress


class Resumable(Protocol):
    """Has a state that a checkpoint keeps."""

    def state_dict(self) -> StateDict:
        """Return the state."""

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore the state."""


@define(kw_only=True, eq=False)
class State:
    """The state of a fit, passed to every hook.

    A callback may call `log`, `log.defer <Log.defer>`, `mark`, `watch`, `add_metric`, `summarize`, `between_steps` and
    `request_stop`, replace ``loss`` and ``eval_loss`` in ``on_fit_start`` and ``on_epoch_start``, and add lines to
    ``settings`` and ``report``. Everything else is read-only.

    Attributes:
        model: The model being trained.
        optimizer: Its optimizer.
        loss: The current training loss.
        eval_loss: The loss that validation measures, if it differs from ``loss``; else None.
        scheduler: The learning-rate scheduler, or None.
        scaler: The GradScaler under fp16, or None.
        train_loader: The loader of training batches.
        val_loader: The loader of validation batches, or None; of several, the first.
        val_loaders: Several validation loaders by name; ``{}`` with one or none.
        device: The device that batches are moved to.
        callbacks: All callbacks as one, whose state a checkpoint keeps.
        guard: What decides whether a step reaches the weights, whose counts a checkpoint keeps.
        plan: Limits and options of this fit: epochs, max_steps, accumulate, clip_norm, log_every.
        progress: Completed epochs, steps and batches.
        history: The evaluations of all fits so far: ``newest``, ``best``, ``is_best``, the monitored metric.
        log: Call it to log a value; ``log.records`` holds the records in ``on_log``.
        train_loss: The training loss since the last evaluation, and the examples seen.
        validation: What validation measures, and results of the newest one: losses of the examples, the baseline.
        position: Where the pass over ``train_loader`` stands, for checkpoints.
        waiting: What `between_steps` was given, until it runs.
        batch: In ``on_batch_end``: the micro-batch, on the device. Its memory may be reused. None if unknown.
        total_norm: The 2-norm of the gradients before the last clipping; None without clipping.
        settings: Options worth a line in a report, name -> value.
        report: Lines for the end report, name -> text, or a function that returns it; an empty text is left out.
        resumed: Whether a checkpoint was loaded.
        resumed_from: Its path, or None.
        verdict: The overfitting verdict, if a detector is attached.
        restored: In ``on_fit_end``, from the last callback to the first: whether the best weights were put back.
        links: Addresses of pages that show the fit, by name.
        test: What the last `Trainer.test` has measured: ``test/loss``, ``test/<metric>``, ...
        fitted: The calibration of the newest evaluation or of the restored weights, if it is measured; else None.
        stop_request: This rank's reason to stop, from `request_stop`, or None.
        stop_reason: Why training stops early, agreed by all ranks; None until then.
        interrupted: The name of the signal that ends the fit, such as ``"SIGTERM"``, or None.
        summarizes: Whether a callback has called `summarize`.
        ended: Whether training has ended: in ``on_fit_end``, and in the ``on_log`` with the summary.
        error: Once training has ended: the exception that ended it, or None.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Any  # a Loss, or any function of (output, target)
    eval_loss: Any = None
    scheduler: Scheduler | None = None
    scaler: torch.amp.GradScaler | None = None
    train_loader: Loader = ()
    val_loader: Loader | None = None
    val_loaders: dict[str, Loader] = field(factory=dict)
    device: torch.device = field(factory=lambda: torch.device("cpu"))
    callbacks: Resumable | None = None
    guard: Resumable | None = None
    plan: Plan = field(factory=Plan)
    progress: Progress = field(factory=Progress)
    history: History = field(factory=History)
    log: Log = field(init=False)
    train_loss: RunningLoss = field(factory=RunningLoss, init=False)
    validation: Validation = field(factory=Validation)
    position: Position = field(factory=Position, init=False)
    waiting: list[Callable[[], object]] = field(factory=list, init=False)
    batch: Batch = None
    total_norm: Tensor | None = None
    settings: dict[str, object] = field(factory=dict)
    report: dict[str, str | Callable[[], str]] = field(factory=dict)
    resumed: bool = False
    resumed_from: Path | None = None
    verdict: Verdict | None = None
    restored: bool = False
    links: dict[str, str] = field(factory=dict)
    test: dict[str, float] = field(factory=dict)
    fitted: Fitted | None = None
    stop_request: str | None = None
    stop_reason: str | None = None
    interrupted: str | None = None
    summarizes: bool = False
    ended: bool = False
    error: BaseException | None = None

    def __attrs_post_init__(self) -> None:
        self.history.start(validates=self.val_loader is not None)
        if self.val_loader is not None:
            measured = ["loss", *self.validation.metrics]
            self.history.names |= {f"{under}/{name}" for under in self.places for name in measured}
            if self.validation.classes is None:
                self.validation.classes = class_names(self.val_loader)
        self.log = Log(self.progress)

    @property
    def places(self) -> list[str]:
        """Where the names of validation metrics begin: ``val``, and ``val/<name>`` for each of several loaders."""
        return ["val", *(f"val/{name}" for name in self.val_loaders)]

    @property
    def metrics(self) -> Entry:
        """The newest evaluation, ``history.newest``; ``{}`` before the first."""
        return self.history.newest

    @property
    def records(self) -> list[Record]:
        """The records for ``on_log`` to write: ``log.records``."""
        return self.log.records

    @property
    def baseline(self) -> Baseline | None:
        """The validation loss of the best constant prediction; None until it is known."""
        return self.validation.baseline

    @property
    def calibration(self) -> Calibration | None:
        """The calibration of the model as it is: of the newest evaluation, or of restored weights.

        None if it is not measured, or steps were trained since.
        """
        if self.fitted is None or self.fitted.step != self.progress.step:
            return None
        return self.fitted.calibration

    def measure_calibration(self) -> bool:
        """Have validation measure the calibration; call it in ``on_fit_start``.

        The evaluations then have ``val/log_loss``, that of the outputs, which for a plain cross-entropy is
        ``val/loss``; ``val/refined_loss``, the log-loss after calibration; ``val/refined_loss_se``, the standard error
        of their difference; ``val/temperature`` and ``val/calibration_error``, the expected calibration error of the
        outputs.

        Returns:
            Whether the loss takes logits; else nothing is measured.
        """
        if self.val_loader is None or not takes_logits(self.loss):
            return False
        self.validation.keep_logits()
        self.history.names |= {f"val/{name}" for name in CALIBRATION}
        return True

    def between_steps(self, function: Callable[[], object]) -> None:
        """Call ``function`` when all that follows the current step is done, before the next batch is read: to save.

        The log window has been closed by then. All ranks must call it in the same step.
        """
        self.waiting.append(function)

    def summarize(self) -> None:
        """Ask, in ``on_fit_start``, for a last ``on_log`` with the summary, see `fitwatch.records.Record`."""
        self.summarizes = True

    def mark(self, name: str, entry: Mapping[str, float], text: str = "") -> None:
        """Draw a vertical bar called ``name`` on the loss chart, at the evaluation ``entry`` of the history.

        Args:
            name: Name of the event.
            entry: The evaluation.
            text: What happened, in a sentence, for trackers that have no bars.

        Raises:
            ValueError: ``name`` can't name a folder: it is empty, "." or "..", or contains a slash.
        """
        self.log.mark(name, entry, text)

    def watch(self, monitor: str, mode: Literal["min", "max"] | None, *, by: str) -> None:
        """Declare, in ``on_fit_start``, that ``by`` depends on a metric. The first declaration defines "best".

        Args:
            monitor: A name in ``history``, such as ``"val/loss"``.
            mode: ``"min"``, ``"max"``, or None: ``"min"`` if the name contains "loss", "cost" or "error".
            by: Who depends on it, for error messages.
        """
        self.history.watch(monitor, mode, by=by)

    def add_metric(self, name: str, metric: Metric) -> None:
        """Have validation measure ``val/<name>``; call it in ``on_fit_start``.

        Args:
            name: Without ``val/``.
            metric: As for `Trainer`.

        Raises:
            ValueError: A metric of this name exists, or there is no validation set.
        """
        if self.val_loader is None:
            raise ValueError(f"val/{name} can't be measured: there is no val_loader")
        self.validation.add_metric(name, metric)
        self.history.names |= {f"{under}/{name}" for under in self.places}

    def request_stop(self, reason: str) -> None:
        """Ask to stop training. All callbacks finish their hook first; the first reason is kept.

        Several ranks agree at the end of the log window: a rank that stopped alone would leave the others waiting.
        """
        self.stop_request = self.stop_request or reason
        if ranks.size() == 1:
            self.stop_reason = self.stop_reason or self.stop_request
