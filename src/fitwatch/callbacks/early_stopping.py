"""Stop when a metric no longer improves, and restore the best weights."""

import logging
from typing import Literal

from attrs import define, field

from fitwatch.callback import Callback
from fitwatch.callbacks.best_weights import BestWeights
from fitwatch.helpers.aliases import StateDict
from fitwatch.helpers.options import instance, integer, one_of
from fitwatch.losses import Loss
from fitwatch.measuring.validation import CALIBRATION
from fitwatch.rules.stopping import PQ, Patience, StoppingRule, StopReason
from fitwatch.state import State
from fitwatch.state.history import History, renamed

logger = logging.getLogger("fitwatch")

_PATIENCE = 10
_REFINED = "val/refined_loss"
_CALIBRATION = {f"val/{name}" for name in CALIBRATION}


@define(eq=False, slots=False)
class EarlyStopping(Callback):
    """Stops training after ``patience`` evaluations without improvement; the model ends with its best weights.

    The best weights are those at the strictly best finite value of ``monitor``, whatever ``min_delta`` is. They are
    restored on any exit: the stop itself, the end of training, another callback's stop, Ctrl-C, an exception. The
    optimizer is left unchanged.

    A second fit of a Trainer starts the patience over and keeps the best: the model ends with the best weights of both,
    unless ``fit(..., reset=True)``.

    ``reason`` is the `StopReason`; the fit's ``stop_reason`` is a sentence.

    Args:
        monitor: A metric of the fit's history, such as ``"val/loss"``. With ``"val/refined_loss"``, the log-loss after
            calibration, which is then measured, calibrate the model that you get: see `Calibrated`.
        mode: ``"min"`` or ``"max"``: whether lower or higher is better. Default: the mode of ``rule`` if one is given,
            else ``"min"`` if the name contains "loss", "cost" or "error"; required for any other metric.
        patience: Consecutive evaluations without improvement after which training ends, 1 or more. Default: 10.
        min_delta: Gain that an improvement must exceed, 0 or more, in units of the metric; or a number of standard
            errors, such as ``"1se"``. For ``"val/loss"`` and a `Loss`, and for ``"val/refined_loss"``, this is the
            standard error of the gain, from the same examples at both evaluations (don't shuffle the validation set:
            without pairs the error is larger). For other metrics it is read from the metric ``<monitor>_se``.
        start_epoch: Before this epoch (index from 0) training is not stopped and nothing counts against the patience.
            Improvements and the best weights count from the start.
        restore_best: Whether to restore the best weights. Takes memory for one copy of the weights, also
            between fits, and during ``on_validation_end`` for two.
        rule: Another decision rule: `Patience` with more options (relative or non-cumulative gains, smoothing, a value
            to beat, thresholds, non-finite values), or Prechelt's `GL`, `PQ`, `UP`; all in `fitwatch.rules`. Not
            together with ``patience`` and ``min_delta``, which are options of the rule.

    Raises:
        ValueError: An option is out of range, or contradicts another; before step 1: ``monitor`` will not be measured
            (the message lists what will be), or ``mode`` is neither given nor implied by its name; at the first
            validation: ``min_delta`` is in standard errors, and the step computes ``val/loss`` itself.
        TypeError: An option is of the wrong type.
    """

    monitor: str = field(default="val/loss", validator=instance(str))
    mode: Literal["min", "max"] | None = field(default=None, kw_only=True, validator=one_of("min", "max", None))
    patience: int = field(default=_PATIENCE, kw_only=True)
    min_delta: float | str = field(default=0.0, kw_only=True)
    start_epoch: int = field(default=0, kw_only=True, validator=integer(0))
    restore_best: bool = field(default=True, kw_only=True, validator=instance(bool))
    rule: StoppingRule = field(default=None, kw_only=True, validator=instance(StoppingRule, or_none=True))

    def __attrs_post_init__(self) -> None:
        if self.rule is None:
            self.rule = Patience(mode=self.mode or "min", patience=self.patience, min_delta=self.min_delta)  # type: ignore[unreachable] # None only until here
        elif self.patience != _PATIENCE or self.min_delta != 0.0:
            raise ValueError(f"patience and min_delta are options of the rule: set them there, got rule={self.rule!r}")
        elif self.mode not in (None, self.rule.mode):
            raise ValueError(f"mode must be the rule's, {self.rule.mode!r}, got {self.mode!r}")
        elif self.rule.mode == "max":
            self.mode = "max"
        self._best = BestWeights()
        self._history: History | None = None  # that this rule has seen
        self._pairs = False  # whether gains are judged example by example

    @property
    def reason(self) -> StopReason | None:
        """Why it requested the stop; None if it did not."""
        return self.rule.reason

    def on_fit_start(self, state: State) -> None:
        """Declare the metric; start over, unless training resumes or the fit continues an earlier one."""
        state.watch(self.monitor, self.mode, by="EarlyStopping")
        self._pairs = False
        if self.restore_best:
            state.validation.keep_weights()
        if self.monitor in _CALIBRATION:
            state.measure_calibration()
        if self.rule.needs_standard_error:
            name, names = f"{self.monitor}_se", state.history.names
            measurable = self.monitor == "val/loss" and state.val_loader is not None and isinstance(state.loss, Loss)
            if measurable and name not in names:  # unless another callback measures it
                state.validation.measure_standard_error()
                names.add(name)
            self._pairs = state.validation.measures_standard_error or self.monitor == _REFINED
            state.watch(name, "min", by="EarlyStopping with min_delta in standard errors")
        before, self._history = self._history, state.history
        if state.resumed:
            if self.rule.reason is not None:  # it had stopped already
                self._stop(state)
        elif before is state.history:
            self.rule.restart()
        else:
            self.rule.reset()
            self._best.kept = None
        if not self.rule.evaluations and len(state.history):
            where = "in the checkpoint" if state.resumed else "attached before"
            logger.warning(
                "EarlyStopping was not %s: it ignores the %d evaluations so far, and will restore the best of the "
                "later ones",
                where,
                len(state.history),
            )

    def on_validation_end(self, state: State) -> None:
        """Decide on a fresh validation."""
        self._decide(state)

    def on_epoch_end(self, state: State) -> None:
        """Decide on the training loss if there is no validation set."""
        if state.val_loader is None:
            self._decide(state)

    def on_fit_end(self, state: State) -> None:
        """Restore the best weights."""
        self._best.restore(state)

    def _decide(self, state: State) -> None:
        metrics = state.history.newest
        if self.monitor not in metrics:
            names = ", ".join(name for name in metrics if name not in ("epoch", "step"))
            unknown = state.validation.not_refined if self.monitor in _CALIBRATION else None
            why = "" if unknown is None else f" ({unknown})"
            raise ValueError(
                f"EarlyStopping monitors {self.monitor!r}, which was not measured{why}; available are {names}"
            )
        trained = state.history.trained  # else this is an evaluation before the first step, without a training loss
        if not trained and (self.monitor == "train/loss" or isinstance(self.rule, PQ)):
            return
        before, examples = self.rule.best, state.validation.losses
        if self._pairs and self.monitor == _REFINED:
            refined = state.validation.refined
            losses, weights = (None, None) if refined is None else (refined.pair.refined, refined.rows.weights)
        elif self._pairs and examples is not None and examples.unknown is not None:
            raise ValueError(
                "EarlyStopping with min_delta in standard errors needs the loss of each validation example, but "
                f"{examples.unknown}: compute it once with self.compute_loss (Trainer) or watch.loss, give min_delta "
                f"as a number, or add a metric {self.monitor.removeprefix('val/')}_se"
            )
        else:
            losses, weights = (examples.on_host() if self._pairs and examples is not None else None) or (None, None)
        stop = self.rule.update(
            metrics[self.monitor],
            train_loss=metrics.get("train/loss") if trained else None,
            standard_error=None if self.monitor == _REFINED else metrics.get(f"{self.monitor}_se"),
            losses=losses,
            weights=weights,
            warm_up=metrics["epoch"] < self.start_epoch,
        )
        if self.rule.best != before and self.restore_best:
            self._best.keep(state)
        if stop:
            self._stop(state)
            state.mark("early stop", metrics, self.rule.sentence or "")

    def _stop(self, state: State) -> None:
        state.request_stop(f"early stopping on {self.monitor}: {self.rule.sentence}")

    def state_dict(self) -> StateDict:
        """Return the rule's state, the options, and the best weights, which may be older than the checkpoint."""
        options = {
            "options": self._options(),
            "restore_best": self.restore_best,
            "calibration": self._best.calibration(),
        }
        return {"rule": self.rule.state_dict(), "best": self._best.kept, **options}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore what `state_dict` returned.

        With different options the counters continue, a stop is decided again at the next evaluation, and a warning
        names the changes.

        Raises:
            ValueError: The best value and the counters belong to another metric, mode or rule; or ``restore_best`` is
                True and the best weights were not kept.
        """
        was, now = state_dict["options"], self._options()
        was = was | {"monitor": repr(renamed(was["monitor"][1:-1]))}
        for name in ("monitor", "mode", "rule"):
            if was[name] != now[name]:
                raise ValueError(
                    f"EarlyStopping can't resume: its {name} is {now[name]} but was {was[name]} in the checkpoint, so "
                    "the counters do not apply"
                )
        if self.restore_best and not state_dict["restore_best"]:
            raise ValueError(
                "EarlyStopping can't resume with restore_best=True: the checkpoint was saved with restore_best=False "
                "and lacks the best weights"
            )
        self.rule.load_state_dict(state_dict["rule"])
        if self.restore_best:
            self._best.load(state_dict["best"], state_dict.get("calibration"))
        else:
            self._best.kept = None
        if changes := [f"{name} {now[name]} (was {was[name]})" for name in now if now[name] != was[name]]:
            logger.warning("EarlyStopping resumes with different options: %s", ", ".join(changes))
            self.rule.reason = self.rule.sentence = None

    def _options(self) -> dict[str, str]:
        rule = {name: repr(value) for name, value in self.rule.options().items()}
        own = {"monitor": repr(self.monitor), "mode": repr(self.rule.mode), "start_epoch": repr(self.start_epoch)}
        return rule | own | {"rule": type(self.rule).__name__}
