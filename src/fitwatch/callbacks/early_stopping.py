"""Stop when a metric no longer improves, and give back the best weights."""

import copy
from typing import Any, Literal

from attrs import define, field
from torch import Tensor

from fitwatch._options import instance, integer, one_of
from fitwatch.callback import Callback
from fitwatch.checkpoint import unwrap
from fitwatch.rules.stopping import Patience
from fitwatch.state import State


@define(eq=False, slots=False)
class EarlyStopping(Callback):
    """Stops training after ``patience`` evaluations without improvement; the model ends with its best weights.

    The best weights are those at the strictly best finite value of ``monitor``, whatever ``min_delta`` is. They are
    restored on any exit: the stop itself, the end of training, Ctrl-C, an exception. The optimizer is left as it is.

    Args:
        monitor: A metric of the fit's history, such as ``"val/loss"``.
        mode: ``"min"`` or ``"max"``: where the metric is best. Default: ``"min"`` where its name has "loss", "cost" or
            "error" in it; else it must be given.
        patience: Evaluations in a row without improvement that end training, 1 or more.
        min_delta: What counts as improvement over the last one that counted, 0 or more, in units of the metric.
        relative: Whether ``min_delta`` is a share of that value's magnitude.
        start_epoch: Before this epoch (from 0) nothing counts against the patience.
        restore_best: Whether to restore the best weights. Keeps one copy of them beside the model, and
            two for a moment while a better one is taken.

    Raises:
        ValueError: An option is out of range; before step 1: ``monitor`` will not exist (lists those that will), or
            its name does not say where it is best and ``mode`` neither.
    """

    monitor: str = field(default="val/loss", validator=instance(str))
    mode: Literal["min", "max"] | None = field(default=None, kw_only=True, validator=one_of("min", "max", None))
    patience: int = field(default=10, kw_only=True)
    min_delta: float = field(default=0.0, kw_only=True)
    relative: bool = field(default=False, kw_only=True)
    start_epoch: int = field(default=0, kw_only=True, validator=integer(0))
    restore_best: bool = field(default=True, kw_only=True, validator=instance(bool))

    def __attrs_post_init__(self) -> None:
        self.rule = Patience(
            mode=self.mode or "min", patience=self.patience, min_delta=self.min_delta, relative=self.relative
        )
        self._best: dict[str, Any] | None = None

    def on_fit_start(self, state: State) -> None:
        """Announce the metric; begin anew, unless training resumes."""
        state.watch(self.monitor, self.mode, by="EarlyStopping")
        if not state.resumed:
            self.rule.reset()
            self._best = None
        elif self.rule.wait >= self.rule.patience:  # it had stopped already
            self._stop(state)

    def on_validation_end(self, state: State) -> None:
        """Decide on a fresh validation."""
        self._decide(state)

    def on_epoch_end(self, state: State) -> None:
        """Decide on the training metrics where there is no validation."""
        if state.val_loader is None:
            self._decide(state)

    def on_fit_end(self, state: State) -> None:
        """Restore the best weights."""
        if self._best is not None:
            unwrap(state.model).load_state_dict(self._best)
            self._best = None  # a fit that fails before it begins must not restore them once more

    def _decide(self, state: State) -> None:
        if self.monitor not in state.metrics:
            names = ", ".join(name for name in state.metrics if name not in ("epoch", "step"))
            raise ValueError(f"EarlyStopping monitors {self.monitor!r}, which was not measured; there are {names}")
        before = self.rule.best
        stop = self.rule.update(state.metrics[self.monitor])
        if state.metrics["epoch"] < self.start_epoch:
            self.rule.wait, self.rule.reason, stop = 0, None, False
        if self.rule.best != before and self.restore_best:
            self._keep(unwrap(state.model).state_dict())
        if stop:
            self._stop(state)
            state.mark("early stop", state.metrics)

    def _stop(self, state: State) -> None:
        state.request_stop(f"early stopping on {self.monitor}: {self.rule.reason}")

    def _keep(self, weights: dict[str, Any]) -> None:
        # A new copy, not one into the old: Ctrl-C half-way must not leave a mixture of two epochs.
        self._best = {
            name: w.detach().clone() if isinstance(w, Tensor) else copy.deepcopy(w) for name, w in weights.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The rule's state and the best weights, which may be older than the checkpoint."""
        return {"rule": self.rule.state_dict(), "best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self.rule.load_state_dict(state_dict["rule"])
        self._best = state_dict["best"]
