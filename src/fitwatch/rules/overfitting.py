"""Overfitting told from two loss curves: validation rises above its own noise while training still falls."""

import math
from collections.abc import Iterable
from itertools import pairwise
from statistics import median
from typing import Any, Literal, SupportsFloat

from attrs import define, field, frozen

from fitwatch._options import integer, number

Status = Literal["warming up", "improving", "plateau", "rising", "overfitting", "diverging"]

# A rise below this share of the whole fall is nothing, however large it is beside a minimum close to 0.
_NEGLIGIBLE = 1e-3
# Fewer differences than this say nothing about noise.
_MIN_DIFFERENCES = 5
_STATE = (
    "index",
    "count",
    "recent",
    "first",
    "negative",
    "best",
    "best_value",
    "val",
    "val_weight",
    "train",
    "train_weight",
    "minimum",
    "minimum_index",
    "minimum_train",
    "overfit_run",
    "diverge_run",
    "overfitting",
    "onset",
    "onset_minimum",
    "detected",
)


@frozen(kw_only=True)
class Verdict:
    """What two loss curves say, as far as they go; indices count evaluations from 0.

    Attributes:
        overfitting: The verdict.
        status: The first of these that holds. ``"diverging"``: the last validation loss is NaN or infinite.
            ``"overfitting"``: as the verdict. ``"warming up"``: too few points. ``"diverging"``: validation
            has risen, and so has training. ``"rising"``: validation is above the threshold, but not yet for
            ``hold`` evaluations, or training did not fall. ``"improving"``: the newer half of the last ``window``
            validation losses is lower on average than the older half, by more than two standard errors and a
            tenth of ``min_rise``. ``"plateau"``: none of these.
        onset: Index at which the rise began: the lowest loss among those that make the smoothed minimum. None
            without a rise that counts.
        detected: Index at which the rule first fired, which is later than the onset; None if it never did.
        best: Index of the lowest finite validation loss; None if there is none.
        gap: Validation minus training loss at the last point, in their unit; NaN or infinite if one of them
            is.
        rise: How far the smoothed validation loss stands above its minimum, in its unit; 0 or more.
        threshold: What ``rise`` is held against, in the same unit; infinite while warming up.
        evidence: One sentence with the figures.
    """

    overfitting: bool
    status: Status
    onset: int | None
    detected: int | None
    best: int | None
    gap: float
    rise: float
    threshold: float
    evidence: str


@define(kw_only=True)
class OverfittingRule:
    """Fires when validation has risen clearly above its minimum while training went on falling.

    Both curves are smoothed by a bias-corrected exponential mean V, T (Kingma & Ba 2015, section 3). With m
    the minimum of V and T_m the value of T there, it fires after ``hold`` evaluations in a row with::

        V - m > max(min_rise * unit, 1e-3 * (first loss - m), noise * R)   and   T < T_m
        R = 2 s sqrt(a / (2 - a)) sqrt(2 ln(n / span)),   a = 2 / (span + 1)

    R is the range that V covers by noise alone in n evaluations: s is the standard deviation of one
    validation loss (scaled median absolute deviation of the last differences, over sqrt(2)), a / (2 - a) the
    part of its variance that the smoothing leaves, and 2 sqrt(2 ln k) the range of k independent normal
    numbers (k large). So the lucky minimum of a long, flat, noisy curve doesn't make a rise of what follows.
    Noise that is correlated from one evaluation to the next is underestimated. The ``unit`` is m, or, for a
    loss that has been negative and so has no natural zero, the fall from the first loss to m. Multiplying
    both curves by a constant changes no verdict.

    A verdict uses the evaluations up to its own only, and memory doesn't grow with their number. A NaN or
    infinite loss is left out of the statistics.

    The verdict is taken back when V falls below the minimum of that rise by more than the threshold, as after a step in
    the learning rate; ``detected`` remains the first firing.

    Attributes:
        min_rise: Least rise, as a fraction of the minimum; above 0.
        noise: Least rise, as a multiple of the range that noise alone explains; 0 or more, 0 to ignore noise.
        span: Evaluations that the smoothing averages over, about; 1 or more. 1 does not smooth.
        hold: Evaluations in a row for which the rise must last; 1 or more.
        window: Last differences from which the noise is estimated; 5 or more.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If an option is of the wrong type.
    """

    min_rise: float = field(default=0.06, validator=number(above=0))
    noise: float = field(default=1.2, validator=number(least=0))
    span: int = field(default=5, validator=integer(1))
    hold: int = field(default=5, validator=integer(1))
    window: int = field(default=30, validator=integer(_MIN_DIFFERENCES))

    _index: int = field(default=-1, init=False)  # of the last evaluation
    _count: int = field(default=0, init=False)  # finite validation losses so far
    _recent: list[list[float]] = field(factory=list, init=False)  # the last finite ones, as [index, loss]
    _first: float = field(default=0.0, init=False)
    _negative: bool = field(default=False, init=False)
    _best: int | None = field(default=None, init=False)
    _best_value: float = field(default=math.inf, init=False)
    _val: float = field(default=0.0, init=False)
    _val_weight: float = field(default=0.0, init=False)
    _train: float = field(default=0.0, init=False)
    _train_weight: float = field(default=0.0, init=False)
    _minimum: float = field(default=math.inf, init=False)
    _minimum_index: int = field(default=0, init=False)
    _minimum_train: float | None = field(default=None, init=False)
    _overfit_run: int = field(default=0, init=False)
    _diverge_run: int = field(default=0, init=False)
    _overfitting: bool = field(default=False, init=False)
    _onset: int | None = field(default=None, init=False)
    _onset_minimum: float = field(default=math.inf, init=False)
    _detected: int | None = field(default=None, init=False)

    def update(self, train_loss: float, val_loss: float) -> Verdict:
        """Take the losses of one more evaluation, finite or not.

        Args:
            train_loss: Training loss; best measured in eval mode with the weights that validation sees.
            val_loss: Validation loss, in the same unit.

        Returns:
            The verdict on all evaluations so far.

        Raises:
            TypeError: If a loss is not a number.
        """
        train_loss, val_loss = float(train_loss), float(val_loss)
        self._index += 1
        alpha = 2 / (self.span + 1)
        if math.isfinite(train_loss):
            self._train_weight += alpha * (1 - self._train_weight)
            self._train += alpha / self._train_weight * (train_loss - self._train)
        if not math.isfinite(val_loss):
            return self._verdict(train_loss, val_loss, self._threshold(self._sigma()))
        self._take(val_loss, alpha)
        threshold = self._threshold(self._sigma())
        self._judge(threshold)
        return self._verdict(train_loss, val_loss, threshold)

    def state_dict(self) -> dict[str, Any]:
        """Everything seen so far, in plain numbers and lists; the options are not part of it."""
        state = {name: getattr(self, f"_{name}") for name in _STATE}
        state["recent"] = [list(point) for point in self._recent]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict` as if never interrupted, given the same options.

        Raises:
            ValueError: If a key is missing or unknown.
        """
        if state.keys() != set(_STATE):
            wrong = sorted(state.keys() ^ set(_STATE))
            raise ValueError(f"not a state of OverfittingRule: keys missing or unknown: {wrong}")
        for name in _STATE:
            setattr(self, f"_{name}", state[name])
        self._recent = [list(point) for point in state["recent"]]

    @property
    def _warmup(self) -> int:
        # The smoothed value of fewer points is too noisy to be the minimum that all later ones are held
        # against.
        return max(self.span, _MIN_DIFFERENCES)

    @property
    def _rise(self) -> float:
        return self._val - self._minimum if self._count > self._warmup else 0.0

    def _take(self, loss: float, alpha: float) -> None:
        """Bring the smoothed curve and its minimum up to date."""
        if not self._count:
            self._first = loss
        self._count += 1
        self._negative = self._negative or loss < 0
        self._recent = [*self._recent[-max(self.window, self._warmup) :], [self._index, loss]]
        if loss < self._best_value:
            self._best, self._best_value = self._index, loss
        self._val_weight += alpha * (1 - self._val_weight)
        self._val += alpha / self._val_weight * (loss - self._val)
        if self._count > self._warmup and self._val < self._minimum:
            self._minimum = self._val
            self._minimum_train = self._train if self._train_weight else None
            # The smoothed curve lags behind: of the points that make its minimum, the lowest is the turn.
            self._minimum_index = int(min(self._recent[-self._warmup - 1 :], key=lambda point: point[1])[0])

    def _sigma(self) -> float:
        """Standard deviation of one validation loss about its trend; infinite if there are too few points."""
        losses = [loss for _, loss in self._recent[-self.window - 1 :]]
        steps = [b - a for a, b in pairwise(losses)]
        if len(steps) < _MIN_DIFFERENCES:
            return math.inf
        middle = median(steps)
        # 1.4826 turns the MAD of a normal variable into its standard deviation, and a difference has sqrt(2)
        # times the noise of one loss. Few differences often give far too small a value, hence the last
        # factor.
        return 1.4826 * median(abs(s - middle) for s in steps) / math.sqrt(2) * (1 + 2 / len(steps))

    def _threshold(self, sigma: float) -> float:
        if self._count <= self._warmup:
            return math.inf
        fall = self._first - self._minimum
        unit = fall if self._negative else self._minimum
        # a / (2 - a) is 1 / span for a = 2 / (span + 1)
        spread = 2 * sigma * math.sqrt(2 * math.log(max(2.0, self._count / self.span)) / self.span)
        return max(self.min_rise * unit, _NEGLIGIBLE * fall, self.noise * spread)

    def _judge(self, threshold: float) -> None:
        """Count for how long there has been a rise, and decide."""
        risen = self._rise > threshold
        before = self._minimum_train
        self._overfit_run = self._overfit_run + 1 if risen and before is not None and self._train < before else 0
        train_risen = before is not None and self._train > before + self.min_rise * abs(before)
        self._diverge_run = self._diverge_run + 1 if risen and train_risen else 0
        if self._overfitting:
            if self._val < self._onset_minimum - threshold:
                self._overfitting, self._onset = False, None
        elif self._overfit_run >= self.hold:
            self._overfitting, self._onset, self._onset_minimum = True, self._minimum_index, self._minimum
            if self._detected is None:
                self._detected = self._index

    def _verdict(self, train_loss: float, val_loss: float, threshold: float) -> Verdict:
        status = self._status(val_loss, threshold)
        return Verdict(
            overfitting=self._overfitting,
            status=status,
            onset=self._onset,
            detected=self._detected,
            best=self._best,
            gap=val_loss - train_loss,
            rise=self._rise,
            threshold=threshold,
            evidence=self._evidence(status, val_loss, threshold),
        )

    def _status(self, val_loss: float, threshold: float) -> Status:
        if not math.isfinite(val_loss):
            return "diverging"
        if self._overfitting:
            return "overfitting"
        if self._count <= self._warmup:
            return "warming up"
        if self._diverge_run >= self.hold:
            return "diverging"
        fall, least = self._recent_fall()
        if self._rise > threshold:
            return "rising"
        return "improving" if fall > least else "plateau"

    def _recent_fall(self) -> tuple[float, float]:
        """Mean of the older half of the window minus that of the newer half, and what it must exceed."""
        losses = [loss for _, loss in self._recent[-self.window :]]
        half = len(losses) // 2
        old, new = sum(losses[:half]) / half, sum(losses[-half:]) / half
        unit = self._first - self._minimum if self._negative else self._minimum
        return old - new, max(2 * self._sigma() * math.sqrt(2 / half), 0.1 * self.min_rise * unit)

    def _evidence(self, status: Status, val_loss: float, threshold: float) -> str:
        if not math.isfinite(val_loss):
            said = f", after overfitting was noticed at evaluation {self._detected}" if self._overfitting else ""
            return f"The validation loss at evaluation {self._index} is {val_loss}{said}."
        if self._count <= self._warmup:
            need = self._warmup + 1
            return f"Too few points: {self._count} finite validation losses, and a verdict needs {need} or more."
        share = f" ({self._rise / self._minimum:.1%})" if self._minimum > 0 and not self._negative else ""
        figures = (
            f"{self._rise:.4g}{share} above its minimum {self._minimum:.4g}, "
            f"against a threshold of {threshold:.4g} and a noise of {self._sigma():.2g} per evaluation"
        )
        risen = self._rise > threshold
        if self._overfitting and not risen:
            return (
                f"Validation rose after evaluation {self._onset}, noticed at evaluation {self._detected}, "
                f"but the smoothed validation loss is now {figures}."
            )
        if not risen:
            fall, least = self._recent_fall()
            return (
                f"No rise that counts: the smoothed validation loss is {figures}; "
                f"of late it fell by {fall:.4g}, where {least:.4g} counts as improving."
            )
        if self._minimum_train is None:
            training = "there was no finite training loss to compare with"
        else:
            word = "fell" if self._train < self._minimum_train else "did not fall"
            training = f"the smoothed training loss {word} ({self._minimum_train:.4g} then, {self._train:.4g} now)"
        if status == "overfitting":
            since = f"Since evaluation {self._onset}"
            return f"{since} the smoothed validation loss has risen to {figures}; {training}."
        run = self._overfit_run
        lasted = f", for {run} of the {self.hold} evaluations in a row that are needed" if 0 < run < self.hold else ""
        return f"The smoothed validation loss is {figures}; {training}{lasted}."


def diagnose(train_losses: Iterable[SupportsFloat], val_losses: Iterable[SupportsFloat], **options: Any) -> Verdict:
    """Judge whole loss curves, one point per evaluation: the last verdict of an `OverfittingRule`.

    Args:
        train_losses: Training losses, shape (N,), N at least 1.
        val_losses: Validation losses, shape (N,), in the same unit.
        **options: Options of `OverfittingRule`.

    Raises:
        ValueError: If the curves are empty, of different lengths, or hold something that is no number.
        TypeError: If an option is unknown.
    """
    rule = OverfittingRule(**options)
    train, val = _numbers("train_losses", train_losses), _numbers("val_losses", val_losses)
    if len(train) != len(val):
        raise ValueError(f"train_losses has {len(train)} points and val_losses {len(val)}: they must be as many")
    if not train:
        raise ValueError("train_losses and val_losses are empty: at least 1 point is needed")
    *_, last = (rule.update(t, v) for t, v in zip(train, val, strict=True))
    return last


def _numbers(name: str, losses: Iterable[SupportsFloat]) -> list[float]:
    try:
        points = list(losses)
    except TypeError:
        raise ValueError(f"{name} must be a sequence of numbers, not {losses!r}") from None
    numbers = []
    for i, point in enumerate(points):
        try:
            if isinstance(point, str | bytes):  # "1.5" is one for float()
                raise TypeError  # noqa: TRY301
            numbers.append(float(point))
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise ValueError(f"{name}[{i}] must be a number, not {point!r}") from None
    return numbers
