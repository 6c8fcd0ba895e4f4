"""Reports when overfitting started, and by how much."""

import logging
import math
from collections.abc import Iterator
from typing import Any, Literal

from attrs import asdict, define, evolve, field
from torch import Tensor

from fitwatch.callback import Callback
from fitwatch.callbacks.best_weights import BestWeights
from fitwatch.callbacks.overfitting_detector.causes import Causes
from fitwatch.callbacks.overfitting_detector.headline import headline, place
from fitwatch.callbacks.overfitting_detector.probe import TrainProbe
from fitwatch.callbacks.overfitting_detector.remedies import card
from fitwatch.helpers.aliases import StateDict
from fitwatch.helpers.options import instance, integer, one_of
from fitwatch.rules.overfitting import OverfittingRule, Verdict
from fitwatch.state import State
from fitwatch.state.history import History

logger = logging.getLogger("fitwatch")

_NOTABLE = ("overfitting", "underfitting", "diverging")


@define(eq=False, slots=False)
class OverfittingDetector(Callback):
    """Compares training and validation loss after each validation, and reports when overfitting started.

    The comparison is like for like: the training loss is that of a *probe*, a fixed part of the training set,
    measured like the validation set: in eval mode, with the same model weights, loss and class weights. (The
    running ``train/loss`` is measured with dropout on, while the weights change.) The probe is read from the
    training data set, so random augmentation in it stays on. If the loader can't give single examples, the first
    batches of the first epoch are kept.

    If the loss is a `Loss`, the losses of the validation examples are compared pair by pair (see `OverfittingRule`).
    Don't shuffle the validation set: without pairs the standard error is larger.

    For losses that take logits (cross-entropy, with class weights or without, binary and of several labels), each
    validation also measures how far the outputs are from calibrated: ``val/log_loss``, and ``val/refined_loss`` after a
    temperature, with ``val/refined_loss_se``, ``val/temperature`` and ``val/calibration_error``. So the verdict says
    how much of a rise is confidence, which the temperature undoes, and whether the model itself got worse
    (``verdict.cause``); and the fit's result has a ``calibration``. Of more than 2 million logits a fixed part is used.

    Logs ``val/overfit/gap`` (validation minus training loss), ``val/overfit/train_loss``, ``val/overfit/val_loss``,
    ``val/overfit/rise`` (smoothed validation loss minus its minimum), ``val/overfit/threshold`` (which the rise must
    exceed), and the metrics on the probe as ``train/<metric>``. When the verdict changes, it logs one warning, writes a
    text ``val/overfit/verdict`` with the evidence and possible remedies, and marks the onset on the loss chart. The
    verdict is in ``state.verdict`` and in the fit's result; its indices refer to the history of
    the result. A later fit of the same Trainer goes on with the verdict, and acts on overfitting only if it is new.

    Args:
        rule: The decision rule, with its options. A new history resets it. Default: ``OverfittingRule()``.
        action: Reaction to overfitting: ``"warn"`` only; ``"stop"`` training; or ``"restore"``: stop, and restore the
            weights of the lowest validation loss.
        probe_examples: Size of the probe. Default: that of the validation set, at most 2,000. 0: no probe; the gap is
            then not like for like, which the verdict mentions.
        calibration: Whether to measure the calibration.

    Raises:
        ValueError: An option is out of range; when fitting starts: there is no validation set.
    """

    rule: OverfittingRule = field(factory=OverfittingRule, kw_only=True, validator=instance(OverfittingRule))
    action: Literal["warn", "stop", "restore"] = field(
        default="warn", kw_only=True, validator=one_of("warn", "stop", "restore")
    )
    probe_examples: int | None = field(default=None, kw_only=True, validator=integer(0, or_none=True))
    calibration: bool = field(default=True, kw_only=True, validator=instance(bool))

    def __attrs_post_init__(self) -> None:
        self._status = ""
        self._verdict: Verdict | None = None
        self._best = BestWeights()
        self._probe = TrainProbe(self.probe_examples)
        self._causes = Causes(self.rule.min_rise)
        self._history: History | None = None  # that the verdict is about
        self._warned = False
        self._planned = False

    def on_fit_start(self, state: State) -> None:
        """Start over, unless training resumes or the fit continues an earlier one."""
        if state.val_loader is None:
            raise ValueError("OverfittingDetector compares training and validation loss: it needs a val_loader")
        before, self._history = self._history, state.history
        if not (state.resumed or before is state.history):
            self.rule.load_state_dict(evolve(self.rule).state_dict())  # as a new rule with the same options
            self._status, self._verdict = "", None
            self._causes = Causes(self.rule.min_rise)
            self._best.kept = None
        if self._verdict is None:  # new in this training: evaluations keep the indices of the history
            for _ in state.history:
                self.rule.update(math.nan, math.nan)
        state.verdict = self._verdict
        state.validation.keep_losses()
        if self.calibration:
            state.measure_calibration()
        if self.action == "restore":
            state.validation.keep_weights()
        self._warned = False
        self._probe = TrainProbe(self.probe_examples)
        self._probe.start(state)
        self._planned = False
        if state.resumed and self._verdict is not None and self._verdict.overfitting:  # it had stopped already
            self._act(state)

    def on_epoch_start(self, state: State) -> None:
        """Say once, before the first epoch, if fewer evaluations are planned than a verdict needs."""
        if self._planned or state.plan.evaluations is None:
            return
        self._planned = True
        planned, needed = len(state.history) + state.plan.evaluations, self.rule.warmup + 1
        if planned < needed:
            logger.warning(
                "%d evaluations are planned, but OverfittingDetector needs %d to be sure: "
                "fit(..., validate_every=STEPS) gives more",
                planned,
                needed,
            )

    def on_batch_end(self, state: State) -> None:
        """Keep the first training batches, if the loader can't give examples."""
        if self._probe.collects:
            self._probe.collect(state.batch)

    def on_validation_end(self, state: State) -> None:
        """Update the verdict."""
        val_loss = state.history.newest["val/loss"]
        # Before the first step a stream has not shown the batches yet that the probe consists of.
        unseen = self._probe.collects and state.progress.step == state.progress.first_step
        probe = None if unseen else self._probe.measure(state)
        train_loss = state.history.newest["train/loss"] if probe is None else probe["loss"]
        for name, value in (probe or {}).items():
            if name not in ("loss", "loss_unweighted"):
                state.log(f"train/{name}", value, reduce="last")
        losses, weights = self._pairs(state) or (None, None)
        baseline = None if state.baseline is None else state.baseline.constant
        verdict = self.rule.update(train_loss, val_loss, losses=losses, weights=weights, baseline=baseline)
        verdict = self._causes.add(verdict, len(state.history) - 1, state.validation.refined)
        cautions = self._cautions(state, has_probe=probe is not None or unseen)
        verdict = evolve(verdict, evidence=" ".join([verdict.evidence, *cautions]))
        verdict = evolve(verdict, summary=headline(verdict, state.history))
        was_overfitting = self._verdict is not None and self._verdict.overfitting
        state.verdict = self._verdict = verdict
        measured = {
            "gap": verdict.gap,
            "rise": verdict.smoothed_rise,
            "threshold": verdict.threshold,
            "train_loss": train_loss,
            "val_loss": val_loss,
        }
        for name, value in measured.items():
            if math.isfinite(value):  # the threshold is infinite while the rule warms up
                state.log(f"val/overfit/{name}", value, reduce="last")
        if self.action == "restore" and verdict.best == len(state.history) - 1:
            self._best.keep(state)
        _compare(state, verdict, baseline)
        self._report(state, verdict, new=not was_overfitting)
        if verdict.overfitting and not was_overfitting:
            state.mark("overfitting", state.history[verdict.onset or 0], verdict.evidence)
            self._act(state)

    def on_fit_end(self, state: State) -> None:
        """Restore the best weights, if ``action`` asks for them and the model overfits."""
        if self._verdict is not None and self._verdict.overfitting:
            self._best.restore(state)

    def _pairs(self, state: State) -> tuple[Tensor, Tensor] | None:
        """Return losses and weights of the examples; None if they can't be compared with the earlier ones."""
        known = None if state.validation.losses is None else state.validation.losses.on_host()
        if known is None or self.rule.examples in (0, len(known[0])):
            return known
        if not self._warned:
            self._warned = True
            logger.warning(
                "the validation set has %d examples but had %d before: the overfitting verdict can't pair them",
                len(known[0]),
                self.rule.examples,
            )
        return None

    def _cautions(self, state: State, *, has_probe: bool) -> Iterator[str]:
        """Yield what the verdict could not use, and why."""
        if not has_probe:
            yield f"The gap is not like for like: the training loss is the running one, since {self._probe.reason}."
        losses = state.validation.losses
        if losses is not None and losses.unknown is not None:
            yield f"No pairs of examples were compared, since {losses.unknown}."
        if state.validation.not_refined is not None:
            yield f"The calibration is not measured, since {state.validation.not_refined}."

    def _report(self, state: State, verdict: Verdict, *, new: bool) -> None:
        """Report a change of status."""
        was, self._status = self._status, verdict.status
        if verdict.status == was:
            return
        if verdict.status in _NOTABLE or was in _NOTABLE:
            state.log("val/overfit/verdict", card(verdict, state, _train_examples(state.train_loader)))
        if verdict.status == "diverging" or (verdict.status == "overfitting" and new):
            logger.warning("%s What to do: fitwatch help %s", verdict.summary, verdict.status)

    def _act(self, state: State) -> None:
        if self.action != "warn" and self._verdict is not None:
            state.request_stop(f"overfitting since {place(state.history, self._verdict.onset or 0)}")

    def state_dict(self) -> StateDict:
        """Return the rule's state, the verdict and the best weights."""
        verdict = None if self._verdict is None else asdict(self._verdict)
        return {
            "rule": self.rule.state_dict(),
            "status": self._status,
            "verdict": verdict,
            "best": self._best.kept,
            "calibration": self._best.calibration(),
            "causes": self._causes.state_dict(),
        }

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: ``action`` is ``"restore"`` and the best weights were not kept.
        """
        seen = state_dict["verdict"]
        if self.action == "restore" and seen is not None and seen["best"] is not None and state_dict["best"] is None:
            raise ValueError(
                'OverfittingDetector can\'t resume with action="restore": the checkpoint was saved with another action '
                "and lacks the best weights"
            )
        self.rule.load_state_dict(state_dict["rule"])
        self._status = state_dict["status"]
        self._best.load(state_dict["best"], state_dict.get("calibration"))  # older checkpoints have no calibration
        if "causes" in state_dict:
            self._causes.load_state_dict(state_dict["causes"])
        self._verdict = None if seen is None else Verdict(**seen)


def _compare(state: State, verdict: Verdict, baseline: float | None) -> None:
    """Have the end report say that the best evaluation does not beat the baseline."""
    state.report.pop("baseline", None)
    if baseline is None or verdict.best is None:
        return
    lowest = state.history[verdict.best]["val/loss"]
    if lowest >= baseline:
        state.report["baseline"] = (
            f"not beaten: the lowest val/loss is {lowest:.4g}, that of the best constant prediction {baseline:.4g}"
        )


def _train_examples(loader: Any) -> int | None:
    """Return the size of the training set; None if unknown."""
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return None
