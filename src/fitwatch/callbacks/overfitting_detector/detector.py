"""Since when, and by how much, the model overfits."""

import logging
import math
from typing import Any, Literal

from attrs import asdict, define, evolve, field

from fitwatch.callback import Callback
from fitwatch.callbacks.best_weights import BestWeights
from fitwatch.callbacks.example_losses import ExampleLosses
from fitwatch.callbacks.overfitting_detector.probe import TrainProbe
from fitwatch.callbacks.overfitting_detector.remedies import card
from fitwatch.options import instance, integer, one_of
from fitwatch.rules.overfitting import OverfittingRule, Verdict
from fitwatch.state import State

logger = logging.getLogger("fitwatch")

_CALLS_FOR_A_WORD = ("overfitting", "underfitting", "diverging")


@define(eq=False, slots=False)
class OverfittingDetector(Callback):
    """Holds the validation loss against the training loss after each validation, and says when it turned.

    Like for like: the training loss is that of a *probe*, a fixed part of the training set, measured as the validation
    set is: in eval mode, with the same weights of the model, the same loss and the same class weights. (The running
    ``train/loss`` is measured with dropout on, while the weights move.) The probe is read from the training data set,
    so random augmentation in it stays on. Where the loader can't give single examples, the first batches of the first
    epoch are kept. A hand-written loop has no probe unless it sets `State.measure`.

    The losses of the validation examples are compared pair by pair (see `OverfittingRule`), if the loss is a `Loss`; do
    not shuffle the validation set, or the pairs are lost and the error grows.

    Logs ``val/overfit/gap`` (validation minus training loss), ``val/overfit/train_loss``, ``val/overfit/val_loss``,
    ``val/overfit/rise`` (smoothed validation loss above its minimum), ``val/overfit/threshold`` (what it must exceed),
    and the Trainer's metrics on the probe as ``train/<metric>``. When the verdict turns it warns once, in the log and
    as a text ``val/report/verdict`` with the evidence and what may help, and marks the onset on the loss chart. The
    verdict stands in ``state.verdict`` and in the fit's result; its indices are those of the fit's history.

    Args:
        rule: The decision rule, with its options; a fit that is not resumed makes it forget what it saw. Default:
            ``OverfittingRule()``.
        action: At overfitting, ``"warn"`` only; ``"stop"`` training; or ``"restore"``: stop, and end with the weights
            of the lowest validation loss.
        probe_examples: Size of the probe. Default: as many as the validation set has, 2,000 at most. 0: no probe; the
            gap is then not like for like, and the verdict says so.
        probe_seed: Of the choice of the probe.

    Raises:
        ValueError: An option is out of range; when fitting starts: there is no validation set.
    """

    rule: OverfittingRule = field(factory=OverfittingRule, kw_only=True, validator=instance(OverfittingRule))
    action: Literal["warn", "stop", "restore"] = field(
        default="warn", kw_only=True, validator=one_of("warn", "stop", "restore")
    )
    probe_examples: int | None = field(default=None, kw_only=True, validator=integer(0, or_none=True))
    probe_seed: int = field(default=0, kw_only=True, validator=integer(0))

    def __attrs_post_init__(self) -> None:
        self._status = ""
        self._verdict: Verdict | None = None
        self._best = BestWeights()

    def on_fit_start(self, state: State) -> None:
        """Begin anew, unless training resumes."""
        if state.val_loader is None:
            raise ValueError("OverfittingDetector compares train and validation loss: fit needs a val_loader")
        if not state.resumed:
            self.rule.load_state_dict(evolve(self.rule).state_dict())  # that of a new one with the same options
            self._status, self._verdict = "", None
            self._best.kept = None
        elif self._verdict is None:  # new in this training: evaluations keep the indices of the history
            for _ in state.history:
                self.rule.update(math.nan, math.nan)
        state.verdict = self._verdict
        self._examples = ExampleLosses(state)
        state.observers.append(self._examples)
        self._warned = False
        self._probe = TrainProbe(self.probe_examples, self.probe_seed)
        self._probe.begin(state)
        if self._verdict is not None and self._verdict.overfitting:  # resumed after it had stopped
            self._act(state)

    def on_batch_end(self, state: State) -> None:
        """Keep the first training batches, where the loader can't be asked for some."""
        if self._probe.collects:
            self._probe.collect(state.batch)

    def on_validation_end(self, state: State) -> None:
        """Judge."""
        probe = self._probe.measure(state, self._examples.examples)
        train_loss = state.metrics["train/loss"] if probe is None else probe["loss"]
        for name, value in (probe or {}).items():
            if name not in ("loss", "loss_unweighted"):
                state.log(f"train/{name}", value, reduce="last")
        losses, weights = self._pairs()
        verdict = self.rule.update(train_loss, state.metrics["val/loss"], losses=losses, weights=weights)
        if probe is None:
            verdict = evolve(verdict, evidence=f"{verdict.evidence} {self._caution}")
        was_overfitting = self._verdict is not None and self._verdict.overfitting
        state.verdict = self._verdict = verdict
        measured = {
            "gap": verdict.gap,
            "rise": verdict.smoothed_rise,
            "threshold": verdict.threshold,
            "train_loss": train_loss,
            "val_loss": state.metrics["val/loss"],
        }
        for name, value in measured.items():
            if math.isfinite(value):  # the threshold is infinite while the rule warms up
                state.log(f"val/overfit/{name}", value, reduce="last")
        if self.action == "restore" and verdict.best == len(state.history) - 1:
            self._best.keep(state.model)
        self._tell(state, verdict, new=not was_overfitting)
        if verdict.overfitting and not was_overfitting:
            state.mark("overfitting", state.history[verdict.onset or 0])
            self._act(state)

    def on_fit_end(self, state: State) -> None:
        """Restore the best weights, if they were asked for and training overfits."""
        if self._verdict is not None and self._verdict.overfitting:
            self._best.restore(state.model)
        self._best.kept = None

    @property
    def _caution(self) -> str:
        return f"The gap is not like for like: the training loss is the running one, since {self._probe.reason}."

    def _pairs(self) -> tuple[Any, Any]:
        """Losses and weights of the examples, where they can be compared with those before."""
        known = self._examples.on_host()
        if known is None:
            return None, None
        before = self.rule.examples
        if before not in (0, len(known[0])):
            if not self._warned:
                self._warned = True
                logger.warning(
                    "the validation set has %d examples, and had %d: the overfitting verdict can't pair them",
                    len(known[0]),
                    before,
                )
            return None, None
        return known

    def _tell(self, state: State, verdict: Verdict, *, new: bool) -> None:
        """Say what is new."""
        was, self._status = self._status, verdict.status
        if verdict.status == was:
            return
        if verdict.status in _CALLS_FOR_A_WORD or was in _CALLS_FOR_A_WORD:
            state.log("val/report/verdict", card(verdict, state, _train_examples(state)))
        if verdict.status == "diverging" or (verdict.status == "overfitting" and new):
            logger.warning("%s: %s", verdict.status, verdict.evidence)

    def _act(self, state: State) -> None:
        if self.action != "warn" and self._verdict is not None:
            state.request_stop(f"overfitting since evaluation {self._verdict.onset}")

    def state_dict(self) -> dict[str, Any]:
        """The rule's state, the verdict and the best weights."""
        verdict = None if self._verdict is None else asdict(self._verdict)
        return {"rule": self.rule.state_dict(), "status": self._status, "verdict": verdict, "best": self._best.kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back.

        Raises:
            ValueError: The best weights are to be restored and were not kept.
        """
        seen = state_dict["verdict"]
        if self.action == "restore" and seen is not None and seen["best"] is not None and state_dict["best"] is None:
            raise ValueError(
                'OverfittingDetector can\'t resume with action="restore": the checkpoint was saved with another one, '
                "so it does not have the best weights"
            )
        self.rule.load_state_dict(state_dict["rule"])
        self._status, self._best.kept = state_dict["status"], state_dict["best"]
        self._verdict = None if state_dict["verdict"] is None else Verdict(**state_dict["verdict"])


def _train_examples(state: State) -> int | None:
    try:
        return len(state.train_loader.dataset)  # type: ignore[attr-defined] # where it has one
    except (AttributeError, TypeError):
        return None
