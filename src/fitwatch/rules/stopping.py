"""When to stop: patience over one monitored value."""

import math
from typing import Any, Literal

from attrs import define, field

from fitwatch._options import instance, integer, number, one_of

_STATE = ("best", "wait", "evaluations", "reason", "reference")


@define(kw_only=True)
class Patience:
    """Stops at the ``patience``-th evaluation in a row without an improvement.

    A value is an improvement if it beats the last improvement by more than ``min_delta``. So small gains add
    up, and the strictly best value, which is the one to restore, is kept beside it. A NaN or infinite value
    is no improvement and never the best, also when it comes first; the first finite value is an improvement.

    Attributes:
        mode: ``"min"`` if lower is better, ``"max"`` if higher is.
        patience: Evaluations without an improvement after which to stop; 1 or more.
        min_delta: What an improvement must exceed, in the unit of the value; 0 or more.
        relative: Whether ``min_delta`` is a fraction of the absolute value of the last improvement, which is
            right for negative values too. If that is 0, any gain is an improvement.
        start: Evaluations at the beginning during which no waiting is counted (warm-up); 0 or more.
            Improvements count from the first evaluation on.
        best: Strictly best finite value; None before there is one.
        wait: Evaluations since the last improvement or the warm-up.
        evaluations: Values seen.
        reason: Why it said stop, without the name of the value; None if it did not.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If an option is of the wrong type.
    """

    mode: Literal["min", "max"] = field(default="min", validator=one_of("min", "max"))
    patience: int = field(validator=integer(1))
    min_delta: float = field(default=0.0, validator=number(least=0))
    relative: bool = field(default=False, validator=instance(bool))
    start: int = field(default=0, validator=integer(0))

    best: float | None = field(default=None, init=False)
    wait: int = field(default=0, init=False)
    evaluations: int = field(default=0, init=False)
    reason: str | None = field(default=None, init=False)
    _reference: float | None = field(default=None, init=False)

    def update(self, value: float) -> bool:
        """Take the value of one more evaluation; True means stop now (and again, until an improvement)."""
        value = float(value)
        self.evaluations += 1
        if math.isfinite(value) and (self.best is None or self._gain(value, self.best) > 0):
            self.best = value
        if self._improves(value):
            self._reference, self.wait, self.reason = value, 0, None
        elif self.evaluations > self.start:
            self.wait += 1
        if self.wait < self.patience:
            return False
        self.reason = self._sentence()
        return True

    def reset(self) -> None:
        """Forget every value; the options stay."""
        self.best, self.wait, self.evaluations, self.reason, self._reference = None, 0, 0, None, None

    def state_dict(self) -> dict[str, Any]:
        """Everything seen so far, in plain numbers; the options are not part of it."""
        return {**{name: getattr(self, name) for name in _STATE[:-1]}, "reference": self._reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict` as if never interrupted, given the same options.

        Raises:
            ValueError: If a key is missing or unknown.
        """
        if state.keys() != set(_STATE):
            wrong = sorted(state.keys() ^ set(_STATE))
            raise ValueError(f"not a state of Patience: keys missing or unknown: {wrong}")
        self.best, self.wait, self.evaluations, self.reason, self._reference = (state[k] for k in _STATE)

    def _gain(self, value: float, over: float) -> float:
        return over - value if self.mode == "min" else value - over

    def _improves(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self._reference is None:
            return True
        least = self.min_delta * abs(self._reference) if self.relative else self.min_delta
        return self._gain(value, self._reference) > least

    def _sentence(self) -> str:
        times = f"{self.wait} evaluation{'s' if self.wait != 1 else ''}"
        if self._reference is None:
            return f"no finite value in {times}"
        unit = f"{100 * self.min_delta:.4g} %" if self.relative else f"{self.min_delta:.4g}"
        delta = f" of more than {unit}" if self.min_delta else ""
        return f"no improvement{delta} over {self._reference:.4g} in {times}"
