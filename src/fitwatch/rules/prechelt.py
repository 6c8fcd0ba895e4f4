"""Prechelt's stopping rules GL, PQ and UP ("Early Stopping - But When?", 1998)."""

import math
from abc import abstractmethod
from statistics import fmean

from attrs import define, field

from fitwatch.helpers.options import integer, number
from fitwatch.rules.stopping_rule import Decision, Evaluation, StoppingRule, StopReason


@define(kw_only=True)
class _Prechelt(StoppingRule):
    """Base of the three rules: they take errors of 0 or more, where lower is better."""

    def _decide(self, point: Evaluation) -> Decision:
        for name, value in (("value", point.value), ("train_loss", point.train_loss)):
            if value is not None and not math.isfinite(value):
                return StopReason.NOT_FINITE, f"the {name} is {value} at evaluation {self.evaluations}"
            if value is not None and value < 0:
                raise ValueError(f"{type(self).__name__} needs errors of 0 or more: the {name} is {value}")
        risen = self._risen(point)
        return None if risen is None else (StopReason.RISEN, risen)

    @abstractmethod
    def _risen(self, point: Evaluation) -> str | None:
        """Return a sentence if the error has risen too far, or None. All values are finite and 0 or more."""

    def _generalization_loss(self, value: float) -> float:
        """Return 100 (E / min E - 1), in percent; infinite above a minimum of 0."""
        assert self.best is not None  # the value itself is finite
        return 100 * _over(value - self.best, self.best)


@define(kw_only=True)
class GL(_Prechelt):
    """Stops when the error is more than ``alpha`` percent above its minimum.

    GL(t) = 100 (E(t) / min E - 1) > alpha. The error must be 0 or more, such as a loss. A non-finite value stops at
    once.

    Attributes:
        alpha: Percentage, 0 or more; 1 to 5 in the paper.
    """

    alpha: float = field(kw_only=False, validator=number(least=0))

    def _risen(self, point: Evaluation) -> str | None:
        loss = self._generalization_loss(point.value)
        if loss <= self.alpha:
            return None
        return f"{loss:.4g}% above the minimum of {self.best:.4g} ({self.alpha:.4g}% allowed)"


@define(kw_only=True)
class PQ(_Prechelt):
    """Stops when the error has risen far relative to the progress of training: fast progress may undo a rise.

    GL(t) / P_k(t) > alpha, checked every ``k`` evaluations. P_k(t) = 1000 (mean / min - 1) over the last k training
    losses: by how much, in per mille, their mean exceeds their minimum. Both losses must be 0 or more. A non-finite
    value stops at once.

    Attributes:
        alpha: 0 or more; 0.5 to 3 in the paper.
        k: Evaluations in a strip, 1 or more; 5 in the paper.
    """

    alpha: float = field(kw_only=False, validator=number(least=0))
    k: int = field(default=5, validator=integer(1))
    _train: list[float] = field(factory=list, init=False, repr=False)

    def _risen(self, point: Evaluation) -> str | None:
        if point.train_loss is None:
            raise ValueError("PQ needs the train_loss of each evaluation, got None")
        self._train = [*self._train, point.train_loss][-self.k :]
        if self.evaluations % self.k:
            return None
        loss, least = self._generalization_loss(point.value), min(self._train)
        # Rounding can put the mean of equal numbers below them.
        progress = 1000 * _over(max(0.0, fmean(self._train) - least), least)
        quotient = _over(loss, progress)
        if quotient <= self.alpha:
            return None
        return (
            f"{loss:.4g}% above the minimum of {self.best:.4g} with a training progress of {progress:.4g} per mille: "
            f"the quotient {quotient:.4g} exceeds {self.alpha:.4g}"
        )


@define(kw_only=True)
class UP(_Prechelt):
    """Stops when the error has risen in ``s`` consecutive strips, by however little.

    E(t) > E(t - k), checked every ``k`` evaluations. The error must be 0 or more. A non-finite value stops at once.

    Attributes:
        s: Consecutive strips, 1 or more; 2 to 8 in the paper.
        k: Evaluations in a strip, 1 or more; 5 in the paper.
    """

    s: int = field(kw_only=False, validator=integer(1))
    k: int = field(default=5, validator=integer(1))
    _rises: int = field(default=0, init=False, repr=False)
    _before: float | None = field(default=None, init=False, repr=False)

    def restart(self) -> None:
        """Start the count of strips over; the best value stays."""
        super().restart()
        self._rises = 0

    def _risen(self, point: Evaluation) -> str | None:
        if self.evaluations % self.k == 0:
            rose = self._before is not None and point.value > self._before
            self._rises, self._before = self._rises + 1 if rose and not point.warm_up else 0, point.value
        if self._rises < self.s:
            return None
        strips = "strip" if self._rises == 1 else "consecutive strips"
        evaluations = "evaluation" if self.k == 1 else "evaluations"
        return f"risen to {self._before:.4g} over {self._rises} {strips} of {self.k} {evaluations}"


def _over(a: float, b: float) -> float:
    """Return a / b for numbers of 0 or more, or its limit if b is 0."""
    return a / b if b else (math.inf if a else 0.0)
