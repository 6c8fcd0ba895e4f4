"""Base class of the stopping rules."""

import math
from abc import ABC, abstractmethod
from enum import Enum
from typing import TYPE_CHECKING, Literal

from attrs import converters, define, field, fields, frozen

from fitwatch.helpers.aliases import StateDict
from fitwatch.rules.paired import influences
from fitwatch.rules.stateful import Stateful

if TYPE_CHECKING:  # the command `fitwatch` starts without torch
    from torch import Tensor


class StopReason(Enum):
    """Why a rule stopped training; its ``sentence`` gives the figures."""

    PATIENCE = "patience"  #: no improvement for too long
    THRESHOLD = "threshold"  #: the target was reached
    DIVERGED = "diverged"  #: the value is worse than allowed
    NOT_FINITE = "not finite"  #: the value is NaN or infinite
    RISEN = "risen"  #: the error has risen above its minimum, by one of Prechelt's rules


@frozen(eq=False)
class Evaluation:
    """Input of a rule for one evaluation; see `StoppingRule.update`."""

    value: float
    train_loss: float | None
    standard_error: float | None
    influences: "Tensor | None"  # of the examples on the value, shape (N,)
    warm_up: bool


Decision = tuple[StopReason, str] | None  # reason and sentence; None to continue


@define(kw_only=True)
class StoppingRule(Stateful, ABC):
    """Base of the rules that `EarlyStopping` asks after each evaluation: `Patience`, `GL`, `PQ` and `UP`.

    Attributes:
        best: Strictly best finite value, the one to restore; None before the first.
        evaluations: Number of values seen.
        reason: Why training should stop after the last value; None to continue.
        sentence: The reason in words with the figures, without the name of the value; None to continue.
    """

    best: float | None = field(default=None, init=False, repr=False)
    evaluations: int = field(default=0, init=False, repr=False)
    reason: StopReason | None = field(default=None, init=False, repr=False, converter=converters.optional(StopReason))
    sentence: str | None = field(default=None, init=False, repr=False)

    @property
    def mode(self) -> Literal["min", "max"]:
        """``"min"`` if lower is better, ``"max"`` if higher is."""
        return "min"

    @property
    def needs_standard_error(self) -> bool:
        """Whether `update` needs a ``standard_error`` or the losses of the examples."""
        return False

    def update(
        self,
        value: float,
        *,
        train_loss: float | None = None,
        standard_error: float | None = None,
        losses: object = None,
        weights: object = None,
        warm_up: bool = False,
    ) -> bool:
        """Add an evaluation.

        Args:
            value: The monitored value, finite or not.
            train_loss: Training loss since the last evaluation, required by `PQ`.
            standard_error: Standard error of the gain over the value compared with, or else of ``value``, in the same
                unit; for a ``min_delta`` in standard errors. Used only if ``losses`` can't be compared.
            losses: Losses of the examples with mean ``value``, shape (N,), a tensor or anything `torch.as_tensor`
                accepts: the same examples in the same order at every evaluation. A different N can't be compared.
            weights: Their weights, shape (N,); None for 1 each. ``value`` is sum(w l) / sum(w).
            warm_up: Whether this evaluation can't stop training and does not count against the patience.

        Returns:
            Whether to stop now; again after each further evaluation for as long as the reason holds.

        Raises:
            ValueError: If the rule needs an argument that is missing, can't use a negative value, or shapes don't
                match.
        """
        examples = None if losses is None or not self.needs_standard_error else influences(losses, weights)
        train_loss = None if train_loss is None else float(train_loss)
        point = Evaluation(float(value), train_loss, standard_error, examples, warm_up)
        self.evaluations += 1
        if math.isfinite(point.value) and (self.best is None or self._gain(point.value, self.best) > 0):
            self.best = point.value
        decision = self._decide(point)
        self.reason, self.sentence = (None, None) if decision is None or warm_up else decision
        return self.reason is not None

    def restart(self) -> None:
        """Forget the stop and start the counters over, for a second fit; the best value stays."""
        self.reason = self.sentence = None

    def options(self) -> StateDict:
        """Return the options of the rule by name."""
        return {a.name: getattr(self, a.name) for a in fields(type(self)) if a.init}

    @abstractmethod
    def _decide(self, point: Evaluation) -> Decision:
        """Update the state, and return why to stop, or None to continue."""

    def _gain(self, value: float, over: float) -> float:
        """Return by how much a value is better than another; negative if it is worse."""
        return over - value if self.mode == "min" else value - over
