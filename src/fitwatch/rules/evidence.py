"""The verdict of the overfitting rule, and the sentence that explains it."""

import math
from statistics import NormalDist
from typing import Literal

from attrs import frozen

Status = Literal["warming up", "improving", "plateau", "overfitting", "diverging", "underfitting"]


@frozen(kw_only=True)
class Verdict:
    """What two loss curves show so far; indices count evaluations from 0.

    Attributes:
        overfitting: Whether the model overfits.
        status: The first of these that holds. ``"diverging"``: the last validation loss is NaN or infinite.
            ``"overfitting"``: as above. ``"warming up"``: too few points to be sure; the evidence says what they show.
            ``"diverging"``: both the validation and the training loss have risen, or are more than twice the baseline.
            ``"improving"``: the newer half of the last ``window`` validation losses is lower on average than the older
            half, by more than two standard errors and a tenth of ``min_rise``, and still falls within itself, by more
            than one standard error. ``"underfitting"``: neither loss improves, there is no gap between them, and the
            validation loss does not beat the baseline by ``min_rise``; never if the baseline is unknown.
            ``"plateau"``: none of these.
        onset: Index of the evaluation after which validation rose, the bottom of the smoothed curve. None without a
            rise that counts.
        detected: Index at which the rule first fired; None if it never did. Later than the onset, unless that rise
            went away and the onset belongs to another one.
        best: Index of the lowest finite validation loss; None if there is none.
        gap: Validation minus training loss at the last point, in their unit; NaN or infinite if one of them is.
        rise: Validation loss at the last point minus that at ``reference``, in their unit; NaN before three losses.
        rise_se: Standard error of ``rise``, in the same unit: from the losses of the examples at both evaluations if
            the rule gets them (see `OverfittingRule.update`), otherwise from the noise of the curve; NaN if unknown.
        reference: Index of the bottom of the smoothed validation curve so far, from which ``rise`` is measured.
        smoothed_rise: Smoothed validation loss minus its minimum, 0 or more: the quantity that is tested.
        threshold: Value that ``smoothed_rise`` must exceed, in the same unit; infinite while warming up.
        examples_needed: Validation examples needed to tell ``rise``, or one of ``min_rise`` if that is larger, from
            zero by two standard errors; None if there are enough, the smoothed curve is at its minimum, or the losses
            of the examples are unknown.
        evidence: One to three sentences with the figures.
        calibration_share: Share of the rise of the log-loss since ``reference`` that a temperature undoes; None if it
            is not measured (see `OverfittingDetector`) or the log-loss has not risen.
        calibration_share_se: Its standard error.
        refined_rise: Rise of the log-loss after calibration since ``reference``: what the model itself got worse by, in
            nats; None if it is not measured.
        refined_rise_se: Its standard error, a paired one.
        cause: Of overfitting, by two standard errors: ``"model"``: the model itself got worse. ``"confidence"``: it is
            overconfident only, and no worse by ``min_rise``. ``"open"``: too few examples to tell. None if it is not
            overfitting, or not measured.
        summary: The verdict in one line, with epochs counted from 1; empty outside a fit.
    """

    overfitting: bool
    status: Status
    onset: int | None
    detected: int | None
    best: int | None
    gap: float
    rise: float
    rise_se: float
    reference: int | None
    smoothed_rise: float
    threshold: float
    examples_needed: int | None
    evidence: str
    calibration_share: float | None = None
    calibration_share_se: float | None = None
    refined_rise: float | None = None
    refined_rise_se: float | None = None
    cause: Literal["model", "confidence", "open"] | None = None
    summary: str = ""

    @property
    def confidence(self) -> float | None:
        """How sure the rise is, 0 to 1: the normal probability that it is not chance, from ``rise`` and ``rise_se``."""
        if not (math.isfinite(self.rise) and self.rise_se > 0):
            return None
        return NormalDist().cdf(self.rise / self.rise_se)


@frozen(kw_only=True)
class Figures:
    """What the evidence is written from, beside the verdict.

    Attributes:
        count: Finite validation losses so far.
        warmup: Number that they must exceed.
        last: The last validation loss.
        best: The lowest one.
        minimum: Minimum of the smoothed validation loss.
        noise: Standard deviation of one validation loss about its trend; NaN or infinite if unknown.
        train_then: Smoothed training loss at that minimum; None if unknown.
        train_now: Smoothed training loss now.
        least: Smallest rise that matters if the curve rises clearly, by however little; else None.
        stuck: Whether training does not fall and has no gap to validation.
        baseline: Validation loss of the best constant prediction; infinite if unknown.
    """

    count: int
    warmup: int
    last: float
    best: float
    minimum: float
    noise: float
    train_then: float | None
    train_now: float
    least: float | None
    stuck: bool
    baseline: float


def evidence(v: Verdict, of: Figures) -> str:
    """Write the evidence for a verdict, whose own is still empty."""
    if v.status == "diverging" and not math.isfinite(v.gap):
        before = f"; overfitting was detected at evaluation {v.detected}" if v.overfitting else ""
        return f"The last validation loss is NaN or infinite{before}."
    if v.status == "warming up":
        needed = f"{of.count} finite validation losses; a verdict needs at least {of.warmup + 1}"
        return f"Too few points to be sure: {needed}.{_so_far(v, of)}"
    share = f" ({_share(v.smoothed_rise / of.minimum)})" if of.minimum > 0 else ""
    threshold = f"; the threshold is {v.threshold:.3g}" if math.isfinite(v.threshold) else ""
    level = f"is {v.smoothed_rise:.4g}{share} above its minimum of {of.minimum:.4g}{threshold}"
    if v.status == "overfitting":
        return f"{_rise(v, of)}. The smoothed validation loss {level}.{_more_examples(v)}"
    noisy = f" and the noise per evaluation {of.noise:.2g}" if math.isfinite(of.noise) else ""
    gone = "" if v.detected is None else f" Overfitting was detected at evaluation {v.detected} but has disappeared."
    return f"{_other(v, of)}. The smoothed validation loss {level}{noisy}.{gone}{_more_examples(v)}"


def _share(share: float) -> str:
    """Write an increase as a percentage, and from 1,000% as a factor: ``"29.2%"``, ``"54-fold"``."""
    return f"{share:.1%}" if share < 10 else f"{_times(1 + share)}-fold"


def _times(factor: float) -> str:
    return f"{factor:,.0f}" if 10 <= factor < 1e6 else f"{factor:.2g}"


def _so_far(v: Verdict, of: Figures) -> str:
    """Say what the first evaluations show, from the third on."""
    if of.count < 3 or v.best is None:
        return ""
    if of.last == of.best:
        return f" The last validation loss is the lowest so far, {of.best:.4g}."
    risen = (of.last - of.best) / of.best if of.best > 0 else math.nan
    change = f"has risen by {risen:.1%}" if risen < 10 else f"is {_times(1 + risen)} times that"
    if math.isnan(risen):
        change = f"has risen by {of.last - of.best:.4g}"
    said = f" So far evaluation {v.best} is the best, with {of.best:.4g}; since then the validation loss {change}"
    if of.train_then is None:
        return f"{said}."
    return f"{said}, and the training loss {'has fallen' if of.train_now < of.train_then else 'has not fallen'}."


def _rise(v: Verdict, of: Figures) -> str:
    """Describe the rise of an overfitting model."""
    then, now = of.train_then, of.train_now
    training = "" if then is None else f", while the training loss went from {then:.4g} to {now:.4g}"
    if v.smoothed_rise <= v.threshold < math.inf:
        return f"The rise in validation loss since evaluation {v.onset} has shrunk but not disappeared{training}"
    error = f" ± {v.rise_se:.2g} (standard error)" if math.isfinite(v.rise_se) else ""
    return f"Since evaluation {v.onset}, the validation loss has risen by {v.rise:.4g}{error}{training}"


def _other(v: Verdict, of: Figures) -> str:
    """Describe curves that show no overfitting."""
    then, now = of.train_then, of.train_now
    if v.status != "diverging" and v.smoothed_rise > v.threshold:
        if then is None:
            return "The validation loss has risen, but there is no finite training loss to compare it with"
        if now < then:
            return "The validation loss has risen, but not for long enough yet"
        return f"The validation loss has risen, but the training loss has not fallen ({then:.4g} then, {now:.4g} now)"
    if v.status == "plateau" and of.least is not None and of.minimum > 0:
        risen, counts = v.smoothed_rise / of.minimum, 100 * of.least / of.minimum
        return (
            f"The validation loss has been rising since evaluation {v.reference}, by {risen:.1%}, which is less than "
            f"the {counts:.3g}% that count"
        )
    if v.status == "diverging" and (then is None or now <= then):
        return (
            f"Training has diverged: the validation loss is {_times(of.last / of.baseline)} times that of the best "
            f"constant prediction, {of.baseline:.4g}"
        )
    return {
        "improving": "The validation loss is still falling",
        "plateau": "Neither loss is falling and there is no gap between them: nothing more is learned"
        if of.stuck
        else "The validation loss is neither falling nor rising significantly",
        "underfitting": "Neither loss is falling, there is no gap between them, and the validation loss does not beat "
        f"that of the best constant prediction, {of.baseline:.4g}: the model underfits the training data",
        "diverging": "Both losses have risen: training is diverging",
    }[v.status]


def _more_examples(v: Verdict) -> str:
    """Say how large the validation set should be, if it is too small."""
    if v.examples_needed is None:
        return ""
    rise = "this rise may be chance"
    if v.status != "overfitting":
        rise = f"the rise of {v.rise:.3g} ± {v.rise_se:.2g} since evaluation {v.reference} may be chance, or too low"
    return (
        f" With so few validation examples, {rise}: about {v.examples_needed:,} are needed to be sure "
        "(two standard errors)."
    )
