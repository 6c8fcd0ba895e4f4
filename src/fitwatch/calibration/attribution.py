"""How much of a rise of the log-loss is confidence, which a temperature undoes, and how much the model itself."""

import math
from typing import Literal

from attrs import frozen
from torch import Tensor

from fitwatch.rules.paired import influences, standard_error

Cause = Literal["model", "confidence", "open"]


@frozen(eq=False)
class Pair:
    """Losses of the same N examples, shape (N,), float32: of the outputs, and cross-fitted after calibration."""

    raw: Tensor
    refined: Tensor


@frozen(kw_only=True)
class Attribution:
    """The rise of the log-loss between two evaluations, and of the log-loss after calibration.

    Attributes:
        rise: Rise of the log-loss, in its unit.
        relative: The same as a share of the log-loss before; NaN if that is 0.
        share: Share of it that calibration undoes: 1 - refined_rise / rise; NaN without a rise.
        share_se: Standard error of ``share``.
        refined_rise: Rise of the log-loss after calibration.
        refined_rise_se: Its standard error.
        refined_before: Log-loss after calibration at the first of the two evaluations.
        examples: N.
    """

    rise: float
    relative: float
    share: float
    share_se: float
    refined_rise: float
    refined_rise_se: float
    refined_before: float
    examples: int

    def cause(self, least: float) -> Cause:
        """Judge the rise by two standard errors.

        Args:
            least: Smallest rise of the refined loss that matters, as a share of it.

        Returns:
            ``"confidence"`` if the refined loss has not risen by as much; ``"model"`` if it has risen; else ``"open"``.
        """
        error = 2 * self.refined_rise_se
        if self.refined_rise + error < least * self.refined_before:
            return "confidence"
        return "model" if self.refined_rise - error > 0 else "open"

    def examples_needed(self, least: float) -> int | None:
        """Return for how many examples `cause` would not be open if the rise stayed as it is; None if unknown."""
        distance = max(self.refined_rise, least * self.refined_before - self.refined_rise)
        needed = self.examples * (2 * self.refined_rise_se / distance) ** 2 if distance > 0 else math.nan
        return math.ceil(needed) if math.isfinite(needed) else None


def attribute(before: Pair, now: Pair, weights: Tensor) -> Attribution:
    """Compare two evaluations, example by example.

    The share is a ratio of two means over the same examples, with the standard error of its linear approximation.

    Args:
        before: The losses at the minimum of the raw loss.
        now: The losses now.
        weights: Weights of the examples, shape (N,).
    """
    w = weights.double() / weights.double().sum()
    raw, refined = (now.raw.double() - before.raw.double()), (now.refined.double() - before.refined.double())
    rise, refined_rise = float(w @ raw), float(w @ refined)
    raw_before = float(w @ before.raw.double())
    pull = influences(refined, weights)
    share = share_se = math.nan
    if rise > 0:
        left = refined_rise / rise
        share, share_se = 1 - left, standard_error((pull - left * influences(raw, weights)) / rise)
    return Attribution(
        rise=rise,
        relative=rise / raw_before if raw_before > 0 else math.nan,
        share=share,
        share_se=share_se,
        refined_rise=refined_rise,
        refined_rise_se=standard_error(pull),
        refined_before=float(w @ before.refined.double()),
        examples=len(w),
    )
