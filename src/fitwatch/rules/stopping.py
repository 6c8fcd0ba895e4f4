"""When to stop: patience over one monitored value, and the three rules of Prechelt."""

import math
import re
from abc import ABC, abstractmethod
from enum import Enum
from statistics import fmean
from typing import Any, Literal

import torch
from attrs import define, field, fields, frozen
from torch import Tensor

from fitwatch.options import instance, integer, number, one_of
from fitwatch.rules.paired import influences, standard_error

_STANDARD_ERRORS = re.compile(r"(\d+\.?\d*|\.\d+)se")


class StopReason(Enum):
    """Why a rule said stop; its ``sentence`` gives the figures."""

    PATIENCE = "patience"  #: no improvement for too long
    THRESHOLD = "threshold"  #: the target was reached
    DIVERGED = "diverged"  #: the value is worse than was allowed
    NOT_FINITE = "not finite"  #: the value is NaN or infinite
    RISEN = "risen"  #: the error has risen above its minimum, by one of Prechelt's rules


@frozen(eq=False)
class _Point:
    """One evaluation, as a rule sees it."""

    value: float
    train_loss: float | None
    standard_error: float | None
    examples: Tensor | None  # their influences on the value, shape (N,)
    warm_up: bool


_Judgement = tuple[StopReason, str] | None


@define(kw_only=True)
class StoppingRule(ABC):
    """What `EarlyStopping` asks after each evaluation: `Patience`, `GL`, `PQ` or `UP`. Pure: no loop, no model.

    Attributes:
        mode: ``"min"`` if lower is better, ``"max"`` if higher is.
        best: Strictly best finite value, which is the one to restore; None before there is one.
        evaluations: Values seen.
        reason: Why it said stop after the last value; None if it did not.
        sentence: The same in words with the figures, without the name of the value; None if it did not.
    """

    mode: Literal["min", "max"] = field(default="min", init=False, repr=False)
    best: float | None = field(default=None, init=False, repr=False)
    evaluations: int = field(default=0, init=False, repr=False)
    reason: StopReason | None = field(default=None, init=False, repr=False)
    sentence: str | None = field(default=None, init=False, repr=False)

    @property
    def needs_standard_error(self) -> bool:
        """Whether `update` must be given a ``standard_error``, or the losses of the examples."""
        return False

    def update(
        self,
        value: float,
        *,
        train_loss: float | None = None,
        standard_error: float | None = None,
        losses: Any = None,
        weights: Any = None,
        warm_up: bool = False,
    ) -> bool:
        """Take one more evaluation.

        Args:
            value: The monitored value, finite or not.
            train_loss: The training loss since the last evaluation, which `PQ` needs.
            standard_error: That of ``value - (what it is compared with)`` if it is known, else that of ``value``, in
                the same unit, for a ``min_delta`` in standard errors. It counts where ``losses`` can't be compared.
            losses: Losses of the examples whose mean ``value`` is, shape (N,), a tensor or what `torch.as_tensor`
                takes: the same examples in the same order at every evaluation. Another N can't be compared.
            weights: Their weights, shape (N,); None for 1 each. ``value`` is sum(w l) / sum(w).
            warm_up: Whether this evaluation can't stop training and does not count against it.

        Returns:
            Whether to stop now. A caller who goes on is told again, as long as the reason holds.

        Raises:
            ValueError: The rule needs what was not given, or can't use a negative value; or shapes that don't fit.
        """
        examples = None if losses is None or not self.needs_standard_error else influences(losses, weights)
        train_loss = None if train_loss is None else float(train_loss)
        point = _Point(float(value), train_loss, standard_error, examples, warm_up)
        self.evaluations += 1
        if math.isfinite(point.value) and (self.best is None or self._gain(point.value, self.best) > 0):
            self.best = point.value
        judgement = self._judge(point)
        self.reason, self.sentence = (None, None) if judgement is None or warm_up else judgement
        return self.reason is not None

    def reset(self) -> None:
        """Forget every value; the options stay."""
        self.load_state_dict(type(self)(**self.options()).state_dict())

    def options(self) -> dict[str, Any]:
        """Name -> value of what the rule was built with."""
        return {a.name: getattr(self, a.name) for a in fields(type(self)) if a.init}

    def state_dict(self) -> dict[str, Any]:
        """Everything seen so far, in plain numbers, strings, lists and tensors; the options are not part of it."""
        state = {name.lstrip("_"): getattr(self, name) for name in self._remembered()}
        state["reason"] = None if self.reason is None else self.reason.value
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict` as if never interrupted, given the same options.

        Raises:
            ValueError: If a key is missing or unknown.
        """
        names = {name.lstrip("_"): name for name in self._remembered()}
        if state.keys() != names.keys():
            wrong = sorted(state.keys() ^ names.keys())
            raise ValueError(f"not a state of {type(self).__name__}: keys missing or unknown: {wrong}")
        for key, value in state.items():
            setattr(self, names[key], value)
        self.reason = None if state["reason"] is None else StopReason(state["reason"])

    @abstractmethod
    def _judge(self, point: _Point) -> _Judgement:
        """Take in the point; why to stop, if so."""

    def _gain(self, value: float, over: float) -> float:
        return over - value if self.mode == "min" else value - over

    def _remembered(self) -> list[str]:
        return [a.name for a in fields(type(self)) if not a.init and a.name != "mode"]


def _check_min_delta(rule: Any, option: Any, value: Any) -> None:
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
    """Stops at the ``patience``-th evaluation in a row without an improvement.

    A value is an improvement if it beats the last improvement by more than ``min_delta``. So small gains add
    up, and the strictly best value, which is the one to restore, is kept beside it. A NaN or infinite value
    is no improvement and never the best, also when it comes first; the first finite value is an improvement.

    Attributes:
        mode: ``"min"`` if lower is better, ``"max"`` if higher is.
        patience: Evaluations without an improvement after which to stop; 1 or more.
        min_delta: What an improvement must exceed, in the unit of the value, 0 or more; or ``"1se"``, ``"2se"``,
            ``"0.5se"``: a number of standard errors, the measure of the one-standard-error rule (Breiman, Friedman,
            Olshen and Stone, "Classification and Regression Trees", 1984): what differs by less can't be told
            apart. Where the losses of the examples are known, it is that of the gain: of a paired difference, since
            two values on the same examples go up and down together. Else it is that of the newest value, which
            mostly asks for more. ``baseline`` is a fixed number, so it has no error of its own.
        relative: Whether ``min_delta`` is a fraction of the absolute value of the last improvement, which is
            right for negative values too. If that is 0, any gain is an improvement.
        cumulative: True: compare with the last improvement, so that small gains add up. False: compare with the
            best value so far, so that only a gain of more than ``min_delta`` at once is an improvement.
        window: Compare the mean of the last ``window`` finite values instead of single ones; 1 or more. At the
            beginning it is the mean of those that there are. ``best`` and the thresholds take each value as it is.
        baseline: The first improvement must beat this value, by more than ``min_delta``.
        stopping_threshold: Stop as soon as a value is as good as this.
        divergence_threshold: Stop as soon as a value is worse than this.
        check_finite: Whether to stop at the first NaN or infinite value; else it is one more evaluation
            without an improvement.
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
    # The influences of the examples on these values, and on the reference; None where they are not known.
    _recent_examples: list[Tensor | None] = field(factory=list, init=False, repr=False)
    _reference_examples: Tensor | None = field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.relative and self.needs_standard_error:
            raise ValueError(f"relative must be False where min_delta is in standard errors, got {self.min_delta!r}")
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

    def _judge(self, point: _Point) -> _Judgement:
        value, finite = point.value, math.isfinite(point.value)
        if finite:
            self._recent = [*self._recent, value][-self.window :]
            self._recent_examples = [*self._recent_examples, point.examples][-self.window :]
        least, whose = self._least(point)
        improved = finite and self._improves(least)
        self.wait = 0 if improved else self.wait + (not point.warm_up)
        if self.check_finite and not finite:
            return StopReason.NOT_FINITE, f"it is {value} at evaluation {self.evaluations}"
        good, bad = self.stopping_threshold, self.divergence_threshold
        if good is not None and finite and self._gain(value, good) >= 0:
            return StopReason.THRESHOLD, f"{value:.4g} has reached the threshold {good:.4g}"
        if bad is not None and self._gain(value, bad) < 0:
            return StopReason.DIVERGED, f"{value:.4g} is worse than the divergence threshold {bad:.4g}"
        return (StopReason.PATIENCE, self._no_improvement(least, whose)) if self.wait >= self.patience else None

    def _improves(self, least: float) -> bool:
        """Whether the newest value, which is finite, is an improvement, which is then the one to beat."""
        level = fmean(self._recent)
        gain = math.inf if self._reference is None else self._gain(level, self._reference)
        improved = self._reference is None or gain > least
        if improved or (gain > 0 and not self.cumulative):
            self._reference, self._reference_examples = level, self._level_examples()
        return improved

    def _least(self, point: _Point) -> tuple[float, str]:
        """What a gain must exceed, and whose standard error it is: for the sentence."""
        if not isinstance(self.min_delta, str):
            return self.min_delta * abs(self._reference or 0.0) if self.relative else self.min_delta, ""
        count = float(self.min_delta.removesuffix("se"))
        now = self._level_examples() if math.isfinite(point.value) else None
        before = self._reference_examples
        if now is not None and before is not None and len(now) == len(before):
            # The influences on a mean of evaluations are the means of the influences, so a window changes nothing.
            return count * standard_error(now - before), " of the difference"
        error = point.standard_error
        if error is None and point.examples is not None:
            error = standard_error(point.examples)
        at_first = self._reference is None and math.isfinite(point.value)  # later it may be missing now and then
        if error is None or (math.isnan(error) and at_first):
            raise ValueError(
                f"min_delta={self.min_delta!r} needs the standard_error of each value, got {error}"
                f"{' (one example has none)' if error is not None else ''}"
            )
        return count * error, ""

    def _level_examples(self) -> Tensor | None:
        """The influences of the examples on the mean of the last values; None where they are not known of all."""
        known = [examples for examples in self._recent_examples if examples is not None]
        if not known or len(known) < len(self._recent) or len({len(examples) for examples in known}) > 1:
            return None
        return known[0] if len(known) == 1 else torch.stack(known).mean(0)

    def _no_improvement(self, least: float, whose: str) -> str:
        times = f"{self.wait} evaluation{'s' if self.wait != 1 else ''}"
        if self._reference is None:
            return f"no finite value in {times}"
        delta = ""
        if isinstance(self.min_delta, str):
            count = self.min_delta.removesuffix("se")
            delta = f" of more than {count} standard error{'s' if count != '1' else ''}{whose} ({least:.4g})"
        elif self.min_delta:
            delta = f" of more than {100 * self.min_delta:.4g} %" if self.relative else f" of more than {least:.4g}"
        at_once = "" if self.cumulative else " at once"
        mean = f" in the mean of {self.window}" if self.window > 1 else ""
        return f"no improvement{delta}{at_once}{mean} over {self._reference:.4g} in {times}"


@define(kw_only=True)
class _Prechelt(StoppingRule):
    """What the three rules share: an error of 0 or more, of which lower is better, and its generalization loss."""

    def _judge(self, point: _Point) -> _Judgement:
        for name, value in (("value", point.value), ("train_loss", point.train_loss)):
            if value is not None and not math.isfinite(value):
                return StopReason.NOT_FINITE, f"the {name} is {value} at evaluation {self.evaluations}"
            if value is not None and value < 0:
                raise ValueError(f"{type(self).__name__} is for errors of 0 or more: the {name} is {value}")
        return self._risen(point)

    @abstractmethod
    def _risen(self, point: _Point) -> _Judgement:
        """The judgement on finite values of 0 or more."""

    def _generalization_loss(self, value: float) -> float:
        """100 (E / min E - 1), in percent; infinite above a minimum of 0."""
        assert self.best is not None  # the value itself is finite
        return 100 * _over(value - self.best, self.best)


@define(kw_only=True)
class GL(_Prechelt):
    """Stops when the error is more than ``alpha`` percent above its minimum.

    GL(t) = 100 (E(t) / min E - 1) > alpha (Prechelt, "Early Stopping - But When?", 1998). The error must be 0 or
    more, such as a loss. A value that is not finite stops at once.

    Attributes:
        alpha: In percent, 0 or more; 1 to 5 in the paper.
    """

    alpha: float = field(kw_only=False, validator=number(least=0))

    def _risen(self, point: _Point) -> _Judgement:
        loss = self._generalization_loss(point.value)
        if loss <= self.alpha:
            return None
        return StopReason.RISEN, f"{loss:.4g} % above the minimum {self.best:.4g}, where {self.alpha:.4g} % is allowed"


@define(kw_only=True)
class PQ(_Prechelt):
    """Stops when the error has risen much, relative to the progress of training: a rise while it is fast may be undone.

    GL(t) / P_k(t) > alpha, asked after every ``k`` evaluations (Prechelt 1998). P_k(t) = 1000 (mean / min - 1) of the
    last k training losses: in permille, how far they are above their minimum on average. Both losses must be 0 or
    more. A value that is not finite stops at once.

    Attributes:
        alpha: 0 or more; .5 to 3 in the paper.
        k: Evaluations in a strip, 1 or more; 5 in the paper.
    """

    alpha: float = field(kw_only=False, validator=number(least=0))
    k: int = field(default=5, validator=integer(1))
    _train: list[float] = field(factory=list, init=False, repr=False)

    def _risen(self, point: _Point) -> _Judgement:
        if point.train_loss is None:
            raise ValueError("PQ needs the train_loss of each evaluation, got None")
        self._train = [*self._train, point.train_loss][-self.k :]
        if self.evaluations % self.k:
            return None
        loss, least = self._generalization_loss(point.value), min(self._train)
        # The mean of equal numbers may be rounded to less than they are.
        progress = 1000 * _over(max(0.0, fmean(self._train) - least), least)
        quotient = _over(loss, progress)
        if quotient <= self.alpha:
            return None
        return StopReason.RISEN, (
            f"{loss:.4g} % above the minimum {self.best:.4g} at a training progress of {progress:.4g} permille: "
            f"their quotient {quotient:.4g} is more than {self.alpha:.4g}"
        )


@define(kw_only=True)
class UP(_Prechelt):
    """Stops when the error has risen over ``s`` strips in a row, however little.

    E(t) > E(t - k), asked after every ``k`` evaluations (Prechelt 1998). The error must be 0 or more. A value that is
    not finite stops at once.

    Attributes:
        s: Strips in a row, 1 or more; 2 to 8 in the paper.
        k: Evaluations in a strip, 1 or more; 5 in the paper.
    """

    s: int = field(kw_only=False, validator=integer(1))
    k: int = field(default=5, validator=integer(1))
    _rises: int = field(default=0, init=False, repr=False)
    _before: float | None = field(default=None, init=False, repr=False)

    def _risen(self, point: _Point) -> _Judgement:
        if self.evaluations % self.k == 0:
            rose = self._before is not None and point.value > self._before
            self._rises, self._before = self._rises + 1 if rose and not point.warm_up else 0, point.value
        if self._rises < self.s:
            return None
        strips = f"{self._rises} strip{'s' if self._rises != 1 else ''} of {self.k} evaluations"
        return StopReason.RISEN, f"risen over {strips} in a row, to {self._before:.4g}"


def _over(a: float, b: float) -> float:
    """The quotient of two numbers of 0 or more, in the limit where b is 0."""
    return a / b if b else (math.inf if a else 0.0)
