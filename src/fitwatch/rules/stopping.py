"""Patience: stop after a number of evaluations without improvement."""

import math
import re
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from attrs import define, field

from fitwatch.helpers.options import Option, instance, integer, number, one_of
from fitwatch.rules.paired import standard_error
from fitwatch.rules.prechelt import GL, PQ, UP
from fitwatch.rules.stopping_rule import Decision, Evaluation, StoppingRule, StopReason

if TYPE_CHECKING:  # the command `fitwatch` starts without torch
    from torch import Tensor

__all__ = ["GL", "PQ", "UP", "Patience", "StopReason", "StoppingRule"]

_STANDARD_ERRORS = re.compile(r"(\d+\.?\d*|\.\d+)se")


def _check_min_delta(rule: object, option: Option, value: object) -> None:
    if not isinstance(value, str):
        return number(least=0)(rule, option, value)
    match = _STANDARD_ERRORS.fullmatch(value)
    if match is None or float(match[1]) == 0:
        raise ValueError(
            f'min_delta must be a number of 0 or more, or a number of standard errors like "1se", got {value!r}'
        )
    return None


@define(kw_only=True)
class Patience(StoppingRule):
    """Stops at the ``patience``-th consecutive evaluation without an improvement.

    A value is an improvement if it beats the last improvement by more than ``min_delta``, so small gains add up. The
    strictly best value, the one to restore, is tracked separately. A NaN or infinite value is never an improvement and
    never the best, even if it comes first; the first finite value is an improvement.

    Attributes:
        mode: ``"min"`` if lower is better, ``"max"`` if higher is.
        patience: Evaluations without an improvement before stopping; 1 or more.
        min_delta: Gain that an improvement must exceed, in the unit of the value, 0 or more; or ``"1se"``, ``"2se"``,
            ``"0.5se"``: a number of standard errors, as in the one-standard-error rule (Breiman, Friedman, Olshen and
            Stone, "Classification and Regression Trees", 1984), since smaller differences can't be told apart. If the
            losses of the examples are known, it is the standard error of the gain, a paired difference: two values on
            the same examples rise and fall together. Otherwise it is that of the newest value, which usually demands
            more. ``baseline`` is a fixed number without an error.
        relative: Whether ``min_delta`` is a fraction of the absolute value of the last improvement, which also works
            for negative values. If that value is 0, any gain is an improvement.
        cumulative: True: compare with the last improvement, so that small gains add up. False: compare with the
            best value so far, so that only a single gain of more than ``min_delta`` is an improvement.
        window: Compare the mean of the last ``window`` finite values, or of all while there are fewer; 1 or more.
            ``best`` and the thresholds use single values.
        baseline: Value that the first improvement must beat, by more than ``min_delta``.
        stopping_threshold: Stop as soon as a value is at least this good.
        divergence_threshold: Stop as soon as a value is worse than this.
        check_finite: Whether to stop at the first NaN or infinite value; otherwise it counts as an evaluation without
            an improvement.
        wait: Evaluations since the last improvement or the warm-up.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If an option is of the wrong type.
    """

    mode: Literal["min", "max"] = field(default="min", validator=one_of("min", "max"))
    patience: int = field(validator=integer(1))
    min_delta: float | str = field(default=0.0, validator=_check_min_delta)
    relative: bool = field(default=False, validator=instance(bool))
    cumulative: bool = field(default=True, validator=instance(bool))
    window: int = field(default=1, validator=integer(1))
    baseline: float | None = field(default=None, validator=number(or_none=True))
    stopping_threshold: float | None = field(default=None, validator=number(or_none=True))
    divergence_threshold: float | None = field(default=None, validator=number(or_none=True))
    check_finite: bool = field(default=False, validator=instance(bool))

    wait: int = field(default=0, init=False, repr=False)
    _reference: float | None = field(default=None, init=False, repr=False)
    _recent: list[float] = field(factory=list, init=False, repr=False)
    # Influences of the examples on these values, and on the reference; None if unknown.
    _recent_examples: list["Tensor | None"] = field(factory=list, init=False, repr=False)
    _reference_examples: "Tensor | None" = field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.relative and self.needs_standard_error:
            raise ValueError(f"relative must be False if min_delta is in standard errors, got {self.min_delta!r}")
        good, bad = self.stopping_threshold, self.divergence_threshold
        if good is not None and bad is not None and self._gain(good, bad) <= 0:
            raise ValueError(
                f"stopping_threshold must be better than divergence_threshold in mode {self.mode!r}, "
                f"got {good} and {bad}"
            )
        self._reference = self.baseline

    @property
    def needs_standard_error(self) -> bool:
        """Whether ``min_delta`` is in standard errors."""
        return isinstance(self.min_delta, str)

    def restart(self) -> None:
        """Start the patience over, and the window; the best value and the one to improve on stay."""
        super().restart()
        self.wait, self._recent, self._recent_examples = 0, [], []

    def _decide(self, point: Evaluation) -> Decision:
        value, finite = point.value, math.isfinite(point.value)
        if finite:
            self._recent = [*self._recent, value][-self.window :]
            self._recent_examples = [*self._recent_examples, point.influences][-self.window :]
        least, paired = self._least(point)
        improved = finite and self._improves(least)
        self.wait = 0 if improved else self.wait + (not point.warm_up)
        if self.check_finite and not finite:
            return StopReason.NOT_FINITE, f"the value is {value} at evaluation {self.evaluations}"
        good, bad = self.stopping_threshold, self.divergence_threshold
        if good is not None and finite and self._gain(value, good) >= 0:
            return StopReason.THRESHOLD, f"{value:.4g} has reached the threshold of {good:.4g}"
        if bad is not None and self._gain(value, bad) < 0:
            return StopReason.DIVERGED, f"{value:.4g} is worse than the divergence threshold of {bad:.4g}"
        return (StopReason.PATIENCE, self._no_improvement(least, paired=paired)) if self.wait >= self.patience else None

    def _improves(self, least: float) -> bool:
        """Return whether the newest value, which is finite, is an improvement, and update the reference."""
        level = fmean(self._recent)
        gain = math.inf if self._reference is None else self._gain(level, self._reference)
        improved = self._reference is None or gain > least
        if improved or (gain > 0 and not self.cumulative):
            self._reference, self._reference_examples = level, self._mean_influences()
        return improved

    def _least(self, point: Evaluation) -> tuple[float, bool]:
        """Return the gain that an improvement must exceed, and whether it is from a paired difference."""
        if not isinstance(self.min_delta, str):
            return self.min_delta * abs(self._reference or 0.0) if self.relative else self.min_delta, False
        count = float(self.min_delta.removesuffix("se"))
        now = self._mean_influences() if math.isfinite(point.value) else None
        before = self._reference_examples
        if now is not None and before is not None and len(now) == len(before):
            # The influences on a mean of evaluations are the means of the influences, so this holds for any window.
            return count * standard_error(now - before), True
        error = point.standard_error
        if error is None and point.influences is not None:
            error = standard_error(point.influences)
        first = self._reference is None and math.isfinite(point.value)  # a later one may be missing now and then
        if error is None or (math.isnan(error) and first):
            raise ValueError(
                f"min_delta={self.min_delta!r} needs the standard_error of each value, got {error}"
                f"{' (undefined for a single example)' if error is not None else ''}"
            )
        return count * error, False

    def _mean_influences(self) -> "Tensor | None":
        """Return the influences of the examples on the mean of the last values; None unless known for all."""
        known = [examples for examples in self._recent_examples if examples is not None]
        if not known or len(known) < len(self._recent) or len({len(examples) for examples in known}) > 1:
            return None
        import torch  # noqa: PLC0415 - see above

        return known[0] if len(known) == 1 else torch.stack(known).mean(0)

    def _no_improvement(self, least: float, *, paired: bool) -> str:
        times = f"{self.wait} evaluation{'s' if self.wait != 1 else ''}"
        if self._reference is None:
            return f"no finite value in {times}"
        single = "" if self.cumulative else "single "
        mean = f" (mean of {self.window})" if self.window > 1 else ""
        delta = ""
        if isinstance(self.min_delta, str):
            count = self.min_delta.removesuffix("se")
            errors = f"{count} standard error{'s' if count != '1' else ''}{' of the difference' if paired else ''}"
            delta = f" by more than {least:.4g} ({errors})"
        elif self.min_delta:
            delta = f" by more than {100 * self.min_delta:.4g}%" if self.relative else f" by more than {least:.4g}"
        return f"no {single}improvement over {self._reference:.4g}{mean}{delta} in {times}"
