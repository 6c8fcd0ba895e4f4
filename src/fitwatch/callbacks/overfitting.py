"""Since when, and by how much, the model overfits."""

import logging
import math
from typing import Any

from attrs import asdict, define, evolve, field

from fitwatch._options import instance
from fitwatch.callback import Callback
from fitwatch.rules.overfitting import OverfittingRule, Verdict
from fitwatch.state import State

logger = logging.getLogger("fitwatch")


@define(eq=False, slots=False)
class OverfittingDetector(Callback):
    """Holds the validation loss against the training loss after each validation, and says when it turned.

    Logs ``val/overfit/gap`` (validation minus training loss), ``val/overfit/rise`` (smoothed validation loss above its
    minimum) and ``val/overfit/threshold`` (what the rise must exceed). When the verdict turns to overfitting it warns
    once, in the log and in TensorBoard's text, and marks the onset on the loss chart. The verdict stands in
    ``state.verdict`` and in the fit's result; its ``onset`` and ``detected`` are indices into the fit's history.

    The training loss is the running one: measured in train mode while the weights moved.

    Args:
        rule: The decision rule, with its options. Default: ``OverfittingRule()``.
    """

    rule: OverfittingRule = field(factory=OverfittingRule, kw_only=True, validator=instance(OverfittingRule))
    _warned: bool = field(default=False, init=False)
    _verdict: Verdict | None = field(default=None, init=False)

    def on_fit_start(self, state: State) -> None:
        """Begin anew, unless training resumes."""
        if state.val_loader is None:
            raise ValueError("OverfittingDetector compares train and validation loss: fit needs a val_loader")
        if not state.resumed:
            self.rule = evolve(self.rule)  # a new one with the same options
            self._warned, self._verdict = False, None
        state.verdict = self._verdict

    def on_validation_end(self, state: State) -> None:
        """Judge."""
        verdict = state.verdict = self._verdict = self.rule.update(
            state.metrics["train/loss"], state.metrics["val/loss"]
        )
        measured = {
            "gap": verdict.gap,
            "rise": verdict.rise,
            "threshold": verdict.threshold,
            "train_loss": state.metrics["train/loss"],
            "val_loss": state.metrics["val/loss"],
        }
        for name, value in measured.items():
            if math.isfinite(value):  # the threshold is infinite while the rule warms up
                state.log(f"val/overfit/{name}", value, reduce="last")
        if verdict.overfitting and not self._warned:
            logger.warning("overfitting: %s", verdict.evidence)
            state.log("val/report/warnings", f"**Overfitting.** {verdict.evidence}")
            state.mark("overfitting", state.history[verdict.onset or 0])
        self._warned = verdict.overfitting

    def state_dict(self) -> dict[str, Any]:
        """The rule's state."""
        verdict = None if self._verdict is None else asdict(self._verdict)
        return {"rule": self.rule.state_dict(), "warned": self._warned, "verdict": verdict}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self.rule.load_state_dict(state_dict["rule"])
        self._warned = state_dict["warned"]
        self._verdict = None if state_dict["verdict"] is None else Verdict(**state_dict["verdict"])
