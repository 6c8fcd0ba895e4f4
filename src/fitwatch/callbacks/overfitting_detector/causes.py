"""Which part of a rise of the validation loss is confidence, and which the model itself."""

import math
from typing import Any

from attrs import evolve, frozen
from torch import Tensor

from fitwatch.calibration.attribution import Attribution, Pair, attribute
from fitwatch.calibration.refined import Refined
from fitwatch.helpers.aliases import StateDict
from fitwatch.rules.overfitting import Verdict


@frozen(eq=False)
class _Point:
    """The losses of one evaluation."""

    index: int
    raw: Tensor
    refined: Tensor
    weights: Tensor


class Causes:
    """Compares each evaluation with that at the verdict's reference, and completes the verdict.

    Args:
        least: Smallest rise that matters, as a share of the loss.
    """

    def __init__(self, least: float) -> None:
        self._least = least
        self._last: _Point | None = None
        self._reference: _Point | None = None

    def add(self, verdict: Verdict, index: int, refined: Refined | None) -> Verdict:
        """Add an evaluation, and return the verdict with its cause.

        Args:
            verdict: The verdict on all evaluations so far.
            index: That of this evaluation.
            refined: Its calibration; None if unknown.
        """
        if refined is None:
            return verdict
        now = _Point(index, refined.pair.raw, refined.pair.refined, refined.rows.weights.float())
        known = (now, self._last, self._reference)
        self._reference = next((p for p in known if p is not None and p.index == verdict.reference), None)
        self._last, before = now, self._reference
        if before is None or before is now or len(before.raw) != len(now.raw):
            return verdict
        found = attribute(Pair(before.raw, before.refined), Pair(now.raw, now.refined), now.weights)
        verdict = evolve(
            verdict,
            calibration_share=_known(found.share),
            calibration_share_se=_known(found.share_se),
            refined_rise=_known(found.refined_rise),
            refined_rise_se=_known(found.refined_rise_se),
        )
        told = math.isfinite(found.refined_rise_se) and found.refined_before > 0  # no error from a single example
        if not (verdict.overfitting and told):
            return verdict
        cause = found.cause(self._least)
        needed = found.examples_needed(self._least) if cause == "open" else None
        text = _sentences(found, cause, needed, refined)
        return evolve(verdict, cause=cause, evidence=f"{verdict.evidence} {text}")

    def state_dict(self) -> StateDict:
        """Return the losses that are kept."""
        points = {"last": self._last, "reference": self._reference}
        return {name: None if p is None else [p.index, p.raw, p.refined, p.weights] for name, p in points.items()}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore what `state_dict` returned."""

        def point(saved: Any) -> _Point | None:
            return None if saved is None else _Point(*saved)

        self._last, self._reference = point(state_dict["last"]), point(state_dict["reference"])


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _sentences(found: Attribution, cause: str, needed: int | None, refined: Refined) -> str:
    """Say how much of the rise a temperature undoes, and what is left."""
    apart = "" if refined.shift is None else " (class weights taken off)"
    if math.isfinite(found.share) and math.isfinite(found.relative):
        first = (
            f"Log-loss {found.relative:+.0%}{apart}; rescaling the outputs (temperature {refined.temperature:.2g}) "
            f"undoes {found.share:.0%} ± {2 * found.share_se:.0%} of it."
        )
    else:
        first = f"The log-loss of the outputs has not risen{apart}."
    level = f"{found.refined_rise / found.refined_before:+.1%} ± {2 * found.refined_rise_se / found.refined_before:.1%}"
    endings = {
        "model": "worse",
        "confidence": "no worse by an amount that matters: it is overconfident only",
        "open": "which leaves open whether it is worse",
    }
    more = f"; about {needed:,} validation examples would tell" if needed is not None else ""
    return f"{first} The model itself: {level} (two standard errors), {endings[cause]}{more}."
