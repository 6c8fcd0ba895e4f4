"""What the overfitting rule says, in figures and in a sentence."""

import math
from typing import Literal

from attrs import frozen

Status = Literal["warming up", "improving", "plateau", "overfitting", "diverging", "underfitting"]


@frozen(kw_only=True)
class Verdict:
    """What two loss curves say, as far as they go; indices count evaluations from 0.

    Attributes:
        overfitting: The verdict.
        status: The first of these that holds. ``"diverging"``: the last validation loss is NaN or infinite.
            ``"overfitting"``: as the verdict. ``"warming up"``: too few points. ``"diverging"``: validation
            has risen, and so has training. ``"improving"``: the newer half of the last ``window``
            validation losses is lower on average than the older half, by more than two standard errors and a
            tenth of ``min_rise``, and still falls within itself, by more than one. ``"underfitting"``: neither loss
            improves, and there is no gap between them although more than a tenth of the first validation loss (the
            median of three) is left. ``"plateau"``: none of these.
        onset: Index of the evaluation after which validation rose, the bottom of the smoothed curve. None without a
            rise that counts.
        detected: Index at which the rule first fired; None if it never did. It is later than the onset, unless that
            rise went away and the onset is of another one.
        best: Index of the lowest finite validation loss; None if there is none.
        gap: Validation minus training loss at the last point, in their unit; NaN or infinite if one of them
            is.
        relative_gap: ``gap`` as a share of the training loss; NaN where that is not positive.
        rise: Validation loss at the last point minus that at ``reference``, in their unit; NaN before there are three.
        rise_se: Standard error of ``rise``, in the same unit: from the losses of the examples at both evaluations if
            the rule gets them (see `OverfittingRule.update`), else from the noise of the curve; NaN while unknown.
        reference: Index of the bottom of the smoothed validation curve so far, from which ``rise`` is measured.
        smoothed_rise: How far the smoothed validation loss stands above its minimum: what is judged; 0 or more.
        threshold: What ``smoothed_rise`` is held against, in the same unit; infinite while warming up.
        examples_needed: How many validation examples it would take to tell ``rise``, or one of ``min_rise`` if that is
            more, from none by two standard errors; None where there are enough, the smoothed curve does not stand above
            its minimum, or the losses of the examples are not known.
        evidence: One sentence with the figures.
    """

    overfitting: bool
    status: Status
    onset: int | None
    detected: int | None
    best: int | None
    gap: float
    relative_gap: float
    rise: float
    rise_se: float
    reference: int | None
    smoothed_rise: float
    threshold: float
    examples_needed: int | None
    evidence: str


@frozen(kw_only=True)
class Curves:
    """What the sentence of a verdict says of the curves besides.

    Attributes:
        count: Finite validation losses so far.
        warmup: How many of them there must be more than.
        minimum: Of the smoothed validation curve.
        noise: Standard deviation of one validation loss about its trend; NaN while unknown.
        train_then: Smoothed training loss at that minimum.
        train_now: The same now.
    """

    count: int
    warmup: int
    minimum: float
    noise: float
    train_then: float | None
    train_now: float


def evidence(v: Verdict, c: Curves) -> str:
    """The sentence of a verdict, which comes without one."""
    if v.status == "diverging" and not math.isfinite(v.rise):
        said = f", after overfitting was noticed at evaluation {v.detected}" if v.overfitting else ""
        return f"The last validation loss is NaN or infinite{said}."
    if v.status == "warming up":
        return f"Too few points: {c.count} finite validation losses, and a verdict needs {c.warmup + 1} or more."
    share = f" ({v.smoothed_rise / c.minimum:.1%})" if c.minimum > 0 else ""
    judged = f"{v.smoothed_rise:.4g}{share} above its minimum {c.minimum:.4g}, where {v.threshold:.3g} counts as a rise"
    if v.status == "overfitting":
        exact = f" ± {v.rise_se:.2g} (standard error)" if math.isfinite(v.rise_se) else ""
        training = (
            ""
            if c.train_then is None
            else f", while the training loss went from {c.train_then:.4g} to {c.train_now:.4g}"
        )
        if v.smoothed_rise <= v.threshold:
            return (
                f"The rise of the validation loss since evaluation {v.onset} has become smaller, but is not gone"
                f"{training}. The smoothed validation loss is {judged}.{_more_examples(v)}"
            )
        return (
            f"Since evaluation {v.onset} the validation loss has risen by {v.rise:.4g}{exact}{training}. "
            f"The smoothed validation loss is {judged}.{_more_examples(v)}"
        )
    said = {
        "improving": "The validation loss still falls.",
        "plateau": "The validation loss neither falls nor rises by an amount that counts.",
        "underfitting": "Neither loss falls any more, and validation is no worse than training: the model has not "
        "learned what the training data has to teach.",
        "diverging": "Both losses have risen: training diverges.",
    }[v.status]
    if v.status != "diverging" and v.smoothed_rise > v.threshold:
        said = f"The validation loss has risen, {_why_not(c)}."
    taken_back = "" if v.detected is None else f" Overfitting was noticed at evaluation {v.detected}, and is gone."
    unrest = f", with a noise of {c.noise:.2g} per evaluation" if math.isfinite(c.noise) else ""
    return f"{said} Smoothed, it is {judged}{unrest}.{taken_back}{_more_examples(v)}"


def _more_examples(v: Verdict) -> str:
    """Whether the validation set is too small, and how large it should be."""
    if v.examples_needed is None:
        return ""
    said = "this rise may be chance"
    if v.status != "overfitting":
        said = f"the rise of {v.rise:.3g} ± {v.rise_se:.2g} since evaluation {v.reference} may be chance, or too low"
    return (
        f" With so few validation examples {said}: to be sure, by two standard errors, it would take about "
        f"{v.examples_needed:,}."
    )


def _why_not(c: Curves) -> str:
    """Why a rise that counts is not overfitting."""
    if c.train_then is None:
        return "and there was no finite training loss to hold it against"
    if c.train_now < c.train_then:
        return "and not yet for long enough"
    return f"but the training loss did not fall ({c.train_then:.4g} then, {c.train_now:.4g} now)"
