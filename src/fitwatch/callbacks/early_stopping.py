"""Stop when a metric no longer improves, and give back the best weights."""

import logging
from typing import Any, Literal

from attrs import define, field, fields

from fitwatch.callback import Callback
from fitwatch.callbacks.best_weights import BestWeights
from fitwatch.callbacks.example_losses import ExampleLosses
from fitwatch.losses import Loss
from fitwatch.options import instance, integer, one_of
from fitwatch.rules.stopping import Patience, StoppingRule, StopReason
from fitwatch.state import State

logger = logging.getLogger("fitwatch")

_OPTIONS = [a.name for a in fields(Patience) if a.init and a.name != "mode"]  # those that make the default rule


@define(eq=False, slots=False)
class EarlyStopping(Callback):
    """Stops training after ``patience`` evaluations without improvement; the model ends with its best weights.

    The best weights are those at the strictly best finite value of ``monitor``, whatever ``min_delta`` is. They are
    restored on any exit: the stop itself, the end of training, another callback's stop, Ctrl-C, an exception. The
    optimizer is left as it is.

    Why it stopped is in ``reason``, a `StopReason`, and as a sentence in the fit's ``stop_reason``.

    Args:
        monitor: A metric of the fit's history, such as ``"val/loss"``.
        mode: ``"min"`` or ``"max"``: where the metric is best. Default: ``"min"`` where its name has "loss", "cost" or
            "error" in it; else it must be given.
        patience: Evaluations in a row without improvement that end training, 1 or more.
        min_delta: What counts as improvement over the last one that counted, 0 or more, in units of the metric; or a
            number of standard errors, such as ``"1se"``. With ``"val/loss"`` and a `Loss` they are those of the gain,
            on the same examples at both evaluations (don't shuffle the validation set, or the pairs are lost and the
            error grows). Else they are read from the metric ``<monitor>_se``. That of ``"val/loss"`` is measured,
            unless a callback before this one has announced its own, which then counts.
        relative: Whether ``min_delta`` is a share of that value's magnitude.
        cumulative: Whether small gains add up. False: each must exceed ``min_delta`` over the best value so far.
        window: Evaluations whose mean must improve, 1 or more; 1: no smoothing. Thresholds and the best weights go
            by single values.
        baseline: What the first improvement must beat.
        stopping_threshold: The target: training ends as soon as the metric is as good as this.
        divergence_threshold: Training ends as soon as the metric is worse than this.
        check_finite: Whether training ends at the first NaN or infinite value; else that is no improvement.
        start_epoch: Before this epoch (from 0) training is not stopped and nothing counts against the patience.
            Improvements and the best weights count from the beginning.
        restore_best: Whether to restore the best weights. Keeps one copy of them beside the model, and
            two for a moment while a better one is taken.
        rule: Decides in place of the options from ``patience`` to ``check_finite``: `GL`, `PQ`, `UP`, or a `Patience`.

    Raises:
        ValueError: An option is out of range, or contradicts another; before step 1: ``monitor`` will not exist (lists
            those that will), or its name does not say where it is best and ``mode`` neither.
        TypeError: An option is of the wrong type.
    """

    monitor: str = field(default="val/loss", validator=instance(str))
    mode: Literal["min", "max"] | None = field(default=None, kw_only=True, validator=one_of("min", "max", None))
    patience: int = field(default=10, kw_only=True)
    min_delta: float | str = field(default=0.0, kw_only=True)
    relative: bool = field(default=False, kw_only=True)
    cumulative: bool = field(default=True, kw_only=True)
    window: int = field(default=1, kw_only=True)
    baseline: float | None = field(default=None, kw_only=True)
    stopping_threshold: float | None = field(default=None, kw_only=True)
    divergence_threshold: float | None = field(default=None, kw_only=True)
    check_finite: bool = field(default=False, kw_only=True)
    start_epoch: int = field(default=0, kw_only=True, validator=integer(0))
    restore_best: bool = field(default=True, kw_only=True, validator=instance(bool))
    rule: StoppingRule = field(default=None, kw_only=True, validator=instance(StoppingRule, or_none=True))

    def __attrs_post_init__(self) -> None:
        given = {name: getattr(self, name) for name in _OPTIONS}
        if self.rule is None:
            self.rule = Patience(mode=self.mode or "min", **given)  # type: ignore[unreachable] # from here on there is one
        elif extra := [a.name for a in fields(EarlyStopping) if a.name in given and given[a.name] != a.default]:
            raise ValueError(f"{', '.join(extra)} can't be given beside {self.rule!r}: a rule has its own options")
        elif self.rule.mode != (self.mode or "min"):
            raise ValueError(f"mode must be that of the rule, {self.rule.mode!r}, got {self.mode!r}")
        self._best = BestWeights()
        self._examples: ExampleLosses | None = None  # where gains are judged example by example

    @property
    def reason(self) -> StopReason | None:
        """Why it asked for the end of training; None if it did not."""
        return self.rule.reason

    def on_fit_start(self, state: State) -> None:
        """Announce the metric; begin anew, unless training resumes."""
        state.watch(self.monitor, self.mode, by="EarlyStopping")
        self._examples = None
        if self.rule.needs_standard_error:
            measurable = self.monitor == "val/loss" and state.val_loader is not None and isinstance(state.loss, Loss)
            if measurable and "val/loss_se" not in state.names:  # another callback may have announced its own
                state.add_metric("loss_se", ExampleLosses(state))
            if isinstance(state.val_metrics.get("loss_se"), ExampleLosses):
                # Not the same one: a metric may have gone on to other data before this callback decides.
                self._examples = ExampleLosses(state)
                state.observers.append(self._examples)
            state.watch(f"{self.monitor}_se", "min", by="EarlyStopping with min_delta in standard errors")
        if not state.resumed:
            self.rule.reset()
            self._best.kept = None
        elif self.rule.reason is not None:  # it had stopped already
            self._stop(state)
        elif not self.rule.evaluations and state.history:
            logger.warning(
                "EarlyStopping is new in this training: it does not know the %d evaluations before, and what it "
                "restores is the best of those to come",
                len(state.history),
            )

    def on_validation_end(self, state: State) -> None:
        """Decide on a fresh validation."""
        self._decide(state)

    def on_epoch_end(self, state: State) -> None:
        """Decide on the training metrics where there is no validation."""
        if state.val_loader is None:
            self._decide(state)

    def on_fit_end(self, state: State) -> None:
        """Restore the best weights."""
        self._best.restore(state.model)

    def _decide(self, state: State) -> None:
        if self.monitor not in state.metrics:
            names = ", ".join(name for name in state.metrics if name not in ("epoch", "step"))
            raise ValueError(f"EarlyStopping monitors {self.monitor!r}, which was not measured; there are {names}")
        before = self.rule.best
        losses, weights = (None if self._examples is None else self._examples.on_host()) or (None, None)
        stop = self.rule.update(
            state.metrics[self.monitor],
            train_loss=state.metrics.get("train/loss"),
            standard_error=state.metrics.get(f"{self.monitor}_se"),
            losses=losses,
            weights=weights,
            warm_up=state.metrics["epoch"] < self.start_epoch,
        )
        if self.rule.best != before and self.restore_best:
            self._best.keep(state.model)
        if stop:
            self._stop(state)
            state.mark("early stop", state.metrics)

    def _stop(self, state: State) -> None:
        state.request_stop(f"early stopping on {self.monitor}: {self.rule.sentence}")

    def state_dict(self) -> dict[str, Any]:
        """The rule's state, the options it had, and the best weights, which may be older than the checkpoint."""
        options = {"options": self._options(), "restore_best": self.restore_best}
        return {"rule": self.rule.state_dict(), "best": self._best.kept, **options}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back.

        With other options the counters go on, a stop that the old ones led to is judged anew at the next evaluation,
        and a warning names the changes.

        Raises:
            ValueError: The best value and the counters are those of another metric, mode or rule; or the best weights
                are to be restored and were not kept.
        """
        was, now = state_dict["options"], self._options()
        for name in ("monitor", "mode", "rule"):
            if was[name] != now[name]:
                raise ValueError(
                    f"EarlyStopping can't resume: its {name} is {now[name]}, and the checkpoint's was {was[name]}, "
                    "whose counters mean something else"
                )
        if self.restore_best and not state_dict["restore_best"]:
            raise ValueError(
                "EarlyStopping can't resume with restore_best=True: the checkpoint was saved with restore_best=False, "
                "so it does not have the best weights"
            )
        self.rule.load_state_dict(state_dict["rule"])
        self._best.kept = state_dict["best"] if self.restore_best else None
        if changes := [f"{name} {now[name]} (was {was[name]})" for name in now if now[name] != was[name]]:
            logger.warning("EarlyStopping resumes with other options: %s", ", ".join(changes))
            self.rule.reason = self.rule.sentence = None

    def _options(self) -> dict[str, str]:
        rule = {name: repr(value) for name, value in self.rule.options().items()}
        own = {"monitor": repr(self.monitor), "mode": repr(self.rule.mode), "start_epoch": repr(self.start_epoch)}
        return rule | own | {"rule": type(self.rule).__name__}
