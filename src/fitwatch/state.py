"""The facts that hooks read: where training stands, what was measured, what is waiting to be logged."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from fitwatch import ranks
from fitwatch.losses.baseline import Baseline
from fitwatch.metrics import WeightedMean
from fitwatch.records import Histogram, Image, Marker, Name, Receiver, Record, Reduction, Window

logger = logging.getLogger("fitwatch")

_ASKED = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128})


@define(kw_only=True)
class Progress:
    """Where training stands: integers only, each counts completed things.

    Attributes:
        epoch: Completed epochs, which is also the index (from 0) of the one that runs.
        step: Optimizer steps, the x-axis of every curve.
        epoch_step: Steps within the current epoch.
        epoch_batch: Micro-batches within the current epoch.
        first_epoch: ``epoch`` when the current ``fit`` began; its ``epochs`` count from here.
        first_step: ``step`` when the current ``fit`` began; its ``max_steps`` count from here.
    """

    epoch: int = 0
    step: int = 0
    epoch_step: int = 0
    epoch_batch: int = 0
    first_epoch: int = 0
    first_step: int = 0


@define(kw_only=True, eq=False)
class State:
    """What every hook gets. Fill it by hand to use callbacks without a Trainer."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Any  # callbacks may replace it in on_fit_start and on_epoch_start
    eval_loss: Any = None  # what validation measures, where that is another loss than training's
    scheduler: Any = None
    scaler: Any = None  # the GradScaler under fp16
    train_loader: Iterable[Any] = ()
    val_loader: Iterable[Any] | None = None
    callbacks: Any = None  # what a checkpoint asks for the state of the callbacks
    device: torch.device = field(factory=lambda: torch.device("cpu"))
    epochs: int | None = None  # what this fit was asked for
    max_steps: int | None = None
    log_every: int = 50
    settings: dict[str, Any] = field(factory=dict)  # options worth a line in a report
    settings_before: dict[str, str] = field(factory=dict)  # those of the checkpoint that training resumes from
    uses_loss: bool = False  # whether a step has asked for the loss in force, see Trainer.compute_loss
    progress: Progress = field(factory=Progress)
    resumed: bool = False  # from a checkpoint
    # One dict per evaluation: epoch, step, train/loss, val/loss, ...; and the newest of them.
    history: list[dict[str, float]] = field(factory=list)
    metrics: dict[str, float] = field(factory=dict)
    names: set[str] = field(factory=set)  # metrics to come; a callback that adds one announces it in on_fit_start
    val_metrics: dict[str, Any] = field(factory=dict)  # what validation measures; see add_metric
    # Objects that see validation: reset() at its start, update(outputs, targets, sample_weight) for each batch.
    observers: list[Any] = field(factory=list)
    examples: int = 0  # of training seen in this fit by all ranks, as far as the batches tell; fresh at on_log
    # Loss and metrics over other batches, as validation measures them: {"loss": ..., ...}. None: nobody can.
    measure: Callable[[Iterable[Any]], dict[str, float]] | None = None
    batch: Any = None  # the micro-batch that on_batch_end follows, on the device; its tensors may be used again
    baseline: Baseline | None = None  # of the validation loss, once it is known
    baseline_measured: bool = False  # by a validation of this fit; before the first one it is only expected
    bad_batch: int | None = None  # of the last validation: index of the first batch whose loss is not finite
    monitor: str = ""  # the metric that says which evaluation is best
    mode: str = "min"
    records: list[Record] = field(factory=list)  # what on_log is to write
    train_loss: WeightedMean = field(factory=WeightedMean)  # since the last evaluation
    stop_reason: str | None = None  # from request_stop
    error: BaseException | None = None  # what ended the fit, if an exception did
    verdict: Any = None  # of the overfitting detector
    clip_norm: float | None = None  # what the gradients are clipped to
    total_norm: Tensor | None = None  # their 2-norm as the last clipping measured it, before it scaled them down
    report: dict[str, str] = field(factory=dict)  # lines for the end report, which callbacks keep up to date
    _request: str | None = field(default=None, init=False)  # this rank's
    _seen: int = field(default=0, init=False)  # examples of this rank that are not yet in `examples`
    _window: Window = field(factory=Window, init=False)
    _window_loss: tuple[float, float] = field(default=(0.0, 0.0), init=False)
    _ready: list[Record] = field(factory=list, init=False)
    _unlogged: bool = field(default=False, init=False)
    _warned: bool = field(default=False, init=False)
    _watched: list[tuple[str, str, str | None]] = field(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        self.names.add("train/loss")
        if self.val_loader is not None:
            self.names |= {"val/loss", *(f"val/{name}" for name in self.val_metrics)}
        self.monitor = self.monitor or ("train/loss" if self.val_loader is None else "val/loss")

    def log(
        self,
        name: Name | Receiver,
        value: float | str | Tensor | Marker | Image | Histogram,
        *,
        reduce: Reduction = "mean",
    ) -> None:
        """Log a value; a tensor stays on its device until the window closes.

        Args:
            name: ``train/...`` or ``val/...``; or a tuple of n such names; or a function that gets the reduced
                numbers on the host, as a flat list, and gives a dict of names and values to log.
            value: A number, a 0-dim tensor (n names: a 1-dim tensor), a Markdown text, a `Marker`, an `Image`, or a
                `Histogram`.
            reduce: What stands for the window: the ``"mean"``, ``"max"`` or ``"last"`` of its values, or a function of
                all of them stacked, shape (values, ...), that gives as many numbers as there are names.

        Raises:
            ValueError: ``reduce`` is unknown.
        """
        if isinstance(value, (str, Marker, Image, Histogram)):
            self._ready.append(Record(str(name), self.progress.step, value))
        else:
            self._window.add(name, value, reduce)

    def mark(self, name: str, entry: Mapping[str, float]) -> None:
        """Draw a bar named ``name`` on the loss chart, at the evaluation ``entry`` of the history."""
        low = entry["train/loss"]
        self._ready.append(Record(name, int(entry["step"]), Marker(low, entry.get("val/loss", low))))

    def add_metric(self, name: str, metric: Any) -> None:
        """Have validation measure ``val/<name>``, from ``on_fit_start`` on.

        Args:
            name: Without ``val/``.
            metric: As in the Trainer's ``metrics``: a function of (outputs, targets), or an object.

        Raises:
            ValueError: There is a metric of this name, or nothing is validated.
        """
        if self.val_loader is None:
            raise ValueError(f"val/{name} can't be measured: fit has no val_loader")
        if name in self.val_metrics:
            raise ValueError(f"there are two metrics named {name!r}")
        self.val_metrics[name] = metric
        self.names.add(f"val/{name}")

    def request_stop(self, reason: str) -> None:
        """Ask for the end of training. All callbacks finish first; the first reason given is kept.

        Several ranks agree when they flush: one that stopped alone would leave the others waiting.
        """
        self._request = self._request or reason
        if ranks.size() == 1:
            self.agree()

    def agree(self) -> None:
        """Stop if any rank has asked for it; all ranks call it."""
        self.stop_reason = self.stop_reason or ranks.agree(self._request)

    def watch(self, monitor: str, mode: str | None, *, by: str) -> None:
        """Say that ``by`` depends on the metric ``monitor``; the first to do so defines what is best.

        Args:
            monitor: A name in ``history``.
            mode: ``"min"``, ``"max"``, or None: ``"min"`` if the name has "loss", "cost" or "error" in it.
            by: Who asks, for the error message.
        """
        if not self._watched:
            self.monitor, self.mode = monitor, mode or "min"
        self._watched.append((by, monitor, mode))

    def check(self) -> None:
        """What can be checked once all callbacks are set up: `check_watched`, and the settings of a resumed fit."""
        if self.baseline is not None:
            self.names.add("val/loss_left")
        self.check_watched()
        now = {name: str(value) for name, value in self.settings.items()}
        changes = [
            f"{name} {now[name]} (was {was}{', and stays so' if name in ('lr', 'weight_decay') else ''})"
            for name, was in self.settings_before.items()
            if name not in ("device", "seed") and now.get(name, was) != was
        ]
        if changes:
            logger.warning(
                "resumed with other settings: %s; the history goes on, and its losses may not compare",
                ", ".join(changes),
            )

    def check_watched(self) -> None:
        """Raise ValueError if a watched metric will not be measured (lists those that will), or has no direction."""
        for by, monitor, mode in self._watched:
            if monitor not in self.names:
                raise ValueError(
                    f"{by} monitors {monitor!r}, which this fit will not measure; "
                    f"it will measure {', '.join(sorted(self.names))}"
                )
            if mode is None and not any(word in monitor for word in ("loss", "cost", "error")):
                raise ValueError(f'{by} needs mode="min" or mode="max" for {monitor!r}, whose name does not tell')

    def evaluated(self, values: Mapping[str, float]) -> None:
        """Open a new entry of ``history`` with ``values`` beside the train loss, over all ranks, since the last one."""
        self.pull_loss()
        self.train_loss.share()
        now = {"epoch": self.progress.epoch, "step": self.progress.step, "train/loss": self.train_loss.value}
        self.metrics = {**now, **values}
        self.history.append(self.metrics)
        self._warn("train/loss", None)
        self._warn("val/loss", self.bad_batch)
        self.train_loss, self._unlogged = WeightedMean(), True

    def _warn(self, name: str, batch: int | None) -> None:
        """Say of the first loss that is no number, and of no other: what follows from it is no news."""
        value = self.metrics.get(name, 0.0)
        if not (self._warned or math.isfinite(value)):
            self._warned = True
            where = "" if batch is None else f": the loss of its batch {batch}, counted from 0, is the first such one"
            logger.warning("%s is %s at step %d%s", name, value, self.progress.step, where)

    @property
    def not_finite(self) -> str | None:
        """Name of the first parameter that learns, or statistic of a normalisation layer, that is NaN or infinite.

        Waits for the device. All ranks call it, and one that has such a value is enough: statistics differ by rank.
        Other buffers and frozen parameters may be infinite on purpose, as masks are.
        """
        named: list[tuple[str, Tensor]] = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        for place, module in self.model.named_modules():
            if isinstance(module, _NormBase):
                named += [(f"{place}.{name}".lstrip("."), b) for name, b in module.named_buffers(recurse=False)]
        return ranks.agree(next((name for name, values in named if _odd(values)), None))

    def gives_up(self) -> bool:
        """Ask for a stop if the weights are no numbers, before they are measured; all ranks call it."""
        name = self.not_finite
        if name is None:
            return False
        if self.stop_reason is None:
            reason = f"at step {self.progress.step} the weights are no numbers any more ({name} is the first)"
            logger.warning("training stops: %s", reason)
            self._request = self._request or reason
            self.agree()
        return True

    @property
    def stops(self) -> bool:
        """Whether this fit is to end after the current step."""
        at_end = self.max_steps is not None and self.progress.step - self.progress.first_step >= self.max_steps
        return at_end or self.stop_reason is not None

    def epochs_done(self, epoch: int) -> bool:
        """Whether ``epoch`` completed epochs are all that this fit was asked for; a resumed one may have done more."""
        return self.epochs is not None and epoch - self.progress.first_epoch >= self.epochs

    @property
    def validated(self) -> bool:
        """Whether the newest entry of ``history`` is of the current step."""
        return bool(self.history) and self.history[-1]["step"] == self.progress.step

    @property
    def best(self) -> dict[str, float] | None:
        """The best finite entry of ``history`` by ``monitor``; the first of equals; None if there is none."""
        known = [entry for entry in self.history if math.isfinite(entry.get(self.monitor, math.nan))]
        choose = min if self.mode == "min" else max
        return choose(known, key=lambda entry: entry[self.monitor]) if known else None

    def flush(self) -> None:
        """Move what was logged since the last flush to the host and into ``records``; all ranks call it."""
        self.pull_loss()
        step = self.progress.step
        total, weight, seen, asked = ranks.sums([*self._window_loss, self._seen, self._request is not None])
        if asked:
            self.agree()
        if not math.isfinite(total):  # on all ranks
            self.gives_up()
        self.examples, self._seen = self.examples + int(seen), 0
        self.records = self._ready + self._window.close(step)
        if weight:
            self.records.append(Record("train/optim/loss", step, total / weight))
        if self._unlogged:
            self.records += [Record(n, step, v) for n, v in self.metrics.items() if n not in ("epoch", "step")]
        self._ready, self._window_loss, self._unlogged = [], (0.0, 0.0), False

    def saw(self, examples: int) -> None:
        """Count examples of training."""
        self._seen += examples

    def pull_loss(self) -> None:
        """Bring the pending part of ``train_loss`` to the host."""
        total, weight = self.train_loss.pull()
        self._window_loss = (self._window_loss[0] + total, self._window_loss[1] + weight)


def _odd(values: Tensor) -> bool:
    """Whether some are NaN or infinite; those that can't be asked, say of 8 bits, are not."""
    can_be_asked = values.dtype in _ASKED and values.layout is torch.strided and not values.is_meta
    return can_be_asked and not is_lazy(values) and not bool(values.detach().isfinite().all())
