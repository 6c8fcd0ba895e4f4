"""Overfitting from two loss curves: validation rises by more than noise explains while training still falls."""

import math
from collections.abc import Iterable
from statistics import median
from typing import Any, Literal, SupportsFloat

from attrs import define, evolve, field

from fitwatch.helpers.options import integer, number
from fitwatch.rules.evidence import Status, Verdict, evidence
from fitwatch.rules.noise import MIN_DIFFERENCES, Trend, is_falling, noise_level
from fitwatch.rules.paired import PairedRise
from fitwatch.rules.stateful import Stateful

__all__ = ["OverfittingRule", "Verdict", "diagnose"]

# Rises below this share of the whole fall are ignored, however large they are relative to a minimum close to 0.
_NEGLIGIBLE = 1e-3
# Points after which the smoothed loss is smooth enough to set the minimum.
_SETTLED = 3
# Weight of a single evaluation at most, however far it is above the threshold: it does not decide alone.
_MAX_WEIGHT = 1.9
# If the standard error of the losses is unknown, this share of the loss stands in for ``errors`` times it; more while
# training is young, since the first minimum is soon replaced by a better one.
_UNKNOWN, _YOUNG = 0.055, 10.0
# Early on, a loss below this share of the smoothed one restarts the smoothing: the large loss before would hide a rise.
_FALLEN = 0.5
# A loss that is still above this share of the first one may be underfitting.
_LITTLE_LEARNED = 0.1


@define(kw_only=True)
class OverfittingRule(Stateful):
    """Fires when the validation loss has risen clearly above its minimum while the training loss kept falling.

    Both curves are smoothed by a bias-corrected exponential mean V, T (Kingma & Ba 2015, section 3); during ``warmup``,
    V restarts at a loss below half of it. With m the minimum of V, and T_m the value of T there, a rise is shown if::

        V - m > threshold   and   T < T_m
        threshold^2 = (min_rise * m)^2 + (errors * e)^2 + (noise * R)^2
        R = 2 s sqrt(2 ln(n / span) / span), or 0 if b > trend * sqrt(2 ln n) standard errors of b

    The three parts are: the smallest rise that matters; the standard error e of the rise, since a validation set is a
    sample; and the range R that V covers in n evaluations through training noise alone, with s the standard deviation
    of one validation loss about its trend (scaled median of the last absolute second differences), and 2 sqrt(2 ln k)
    the range of k independent normal numbers. So the lucky minimum of a long, flat, noisy curve does not turn what
    follows into a rise.

    What follows such a minimum is a higher level, but no slope. So if the losses since the minimum do slope upwards,
    noise does not explain the rise, and R is left out: b is the slope of their least-squares line (see `Trend`), and
    sqrt(2 ln n) is about the largest of n normal numbers. However large the noise, a slope shows in the end. Noise that
    is correlated between evaluations is underestimated by both.

    The rule fires once the weights of such consecutive evaluations add up to ``hold``. The weight of an evaluation is
    its rise over the threshold, at most 1.9, so that a large rise needs less time than a small one. The loss itself
    must also exceed m by the threshold, since V carries an outlier along for some evaluations.

    With the losses of the validation examples, e is that of a paired difference, over the same examples at both
    evaluations (see `PairedRise`). With standard errors only, it is that of two independent sets, which is too large.
    With neither, errors * e is taken as 5.5% of m, and more while training is young.

    If a loss has been negative, and so has no natural zero, the range of the curve replaces m: the fall from the first
    loss to m, or the rise if that is larger.

    Multiplying both curves (and the losses of the examples) by a constant changes no verdict.

    A verdict uses past evaluations only, and memory does not grow with their number: some 40 numbers, and two vectors
    of the number of validation examples. NaN and infinite losses are left out of the statistics.

    The verdict is withdrawn when V is at most half of ``min_rise`` above m, as after a step in the learning rate;
    ``detected`` remains the first firing.

    Attributes:
        min_rise: Smallest rise that matters, as a share of the minimum; above 0.
        errors: Multiple of its standard error that a rise must exceed; 0 or more, 0 to ignore them.
        noise: Multiple of the range explained by training noise that a rise must exceed, unless the losses slope; 0 or
            more, 0 to ignore the noise.
        trend: Multiple of the largest slope explained by noise that a slope must exceed; 0 or more.
        span: Number of evaluations that the smoothing averages over, roughly; 1 or more. 1 does not smooth.
        hold: Consecutive evaluations for which a rise that just exceeds the threshold must last; 1 or more.
        warmup: Evaluations before the first verdict, 4 or more.
        window: Last differences from which the noise is estimated; 5 or more.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If an option is of the wrong type.
    """

    min_rise: float = field(default=0.04, validator=number(above=0))
    errors: float = field(default=0.25, validator=number(least=0))
    noise: float = field(default=2.0, validator=number(least=0))
    trend: float = field(default=1.1, validator=number(least=0))
    span: int = field(default=4, validator=integer(1))
    hold: float = field(default=2.0, validator=number(least=1))
    warmup: int = field(default=8, validator=integer(MIN_DIFFERENCES))
    window: int = field(default=30, validator=integer(MIN_DIFFERENCES + 1))

    _index: int = field(default=-1, init=False)  # of the last evaluation
    _count: int = field(default=0, init=False)  # finite validation losses so far
    # Validation and training losses of the last evaluations with a finite validation loss.
    _recent: list[list[float]] = field(factory=list, init=False)
    _first: float = field(default=0.0, init=False)
    _negative: bool = field(default=False, init=False)
    _best: int | None = field(default=None, init=False)
    _best_value: float = field(default=math.inf, init=False)
    _val: float = field(default=0.0, init=False)
    _val_weight: float = field(default=0.0, init=False)
    _train: float = field(default=0.0, init=False)
    _train_weight: float = field(default=0.0, init=False)
    _minimum: float = field(default=math.inf, init=False)
    _minimum_train: float | None = field(default=None, init=False)
    _reference: int | None = field(default=None, init=False)
    _reference_value: float = field(default=math.nan, init=False)
    _evidence_run: float = field(default=0.0, init=False)
    _diverge_run: int = field(default=0, init=False)
    _overfitting: bool = field(default=False, init=False)
    _onset: int | None = field(default=None, init=False)
    _detected: int | None = field(default=None, init=False)
    _trend: Trend = field(factory=Trend, init=False)  # since the reference
    _paired: PairedRise = field(factory=PairedRise, init=False)
    _last_point: list[float] = field(factory=list, init=False)  # index, loss, standard error of the last finite one
    _reference_error: float = field(default=math.nan, init=False)

    def update(
        self,
        train_loss: float,
        val_loss: float,
        *,
        standard_error: float | None = None,
        losses: object = None,
        weights: object = None,
    ) -> Verdict:
        """Add an evaluation; its losses may be non-finite.

        Args:
            train_loss: Training loss; ideally measured in eval mode with the same weights as the validation loss.
            val_loss: Validation loss, in the same unit.
            standard_error: Standard error of ``val_loss``; not needed with ``losses``.
            losses: Losses of the validation examples, shape (N,), a tensor or anything `torch.as_tensor` accepts: the
                same examples in the same order at every evaluation. None ends the pairing; later losses restart it.
            weights: Their weights, shape (N,); None for 1 each. ``val_loss`` is sum(w l) / sum(w).

        Returns:
            The verdict on all evaluations so far. Costs O(N) with losses of examples.

        Raises:
            TypeError: If a loss is not a number.
            ValueError: If shapes don't match, or the number of examples has changed.
        """
        train_loss, val_loss = float(train_loss), float(val_loss)
        self._index += 1
        alpha = 2 / (self.span + 1)
        if math.isfinite(train_loss):
            self._train_weight += alpha * (1 - self._train_weight)
            self._train += alpha / self._train_weight * (train_loss - self._train)
        finite = math.isfinite(val_loss)
        if finite:
            error = math.nan if standard_error is None else float(standard_error)
            reference = self._add(val_loss, train_loss, error, alpha)
            if losses is None:
                self._paired = PairedRise()  # its error would be out of date
            else:
                self._paired.add(losses, weights, reference=reference)
        sigma = noise_level([loss for loss, _ in self._recent])
        threshold = self._threshold(sigma)
        if finite:
            self._judge(threshold)
        return self._verdict(train_loss, val_loss, sigma, threshold)

    @property
    def examples(self) -> int:
        """Number of validation examples whose losses are paired; 0 if none are."""
        return self._paired.examples

    @property
    def _smoothed_rise(self) -> float:
        return self._val - self._minimum if math.isfinite(self._minimum) else 0.0

    @property
    def _unit(self) -> float:
        """Loss that rises are measured relative to; 0 or more."""
        return self._fall if self._negative else self._minimum

    @property
    def _fall(self) -> float:
        return max(0.0, self._first - self._minimum, self._smoothed_rise)

    def _add(self, loss: float, train_loss: float, error: float, alpha: float) -> Literal["last", "this"] | None:
        """Update the smoothed curve and its minimum; return the new reference at a new minimum."""
        before, self._last_point = self._last_point, [self._index, loss, error]
        self._count += 1
        self._negative = self._negative or loss < 0
        self._recent = [*self._recent[-self.window :], [loss, train_loss]]
        if self._count <= _SETTLED:  # a single one may be huge: untrained weights on unscaled inputs
            self._first = median(value for value, _ in self._recent)
        if loss < self._best_value:
            self._best, self._best_value = self._index, loss
        if self._count <= self.warmup and 0 < loss < _FALLEN * self._val:
            self._val_weight = 0.0
        self._val_weight += alpha * (1 - self._val_weight)
        self._val += alpha / self._val_weight * (loss - self._val)
        if self._count < _SETTLED or self._val >= self._minimum:
            self._trend.add(loss - self._reference_value)
            return None
        self._minimum = self._val
        self._minimum_train = self._train if self._train_weight else None
        # The smoothed curve lags by an evaluation or two, so the previous loss may be the bottom.
        index, self._reference_value, self._reference_error = min(before, self._last_point, key=lambda point: point[1])
        self._reference, self._trend = int(index), Trend()
        if self._reference == self._index:
            return "this"
        self._trend.add(loss - self._reference_value)
        return "last"

    @property
    def _independent_error(self) -> float:
        """Standard error of the rise as if both evaluations had different examples; NaN without standard errors."""
        return math.hypot(self._last_point[2], self._reference_error) if self._last_point else math.nan

    def _threshold(self, sigma: float) -> float:
        if not math.isfinite(self._minimum) or not math.isfinite(sigma):
            return math.inf
        # a / (2 - a) is 1 / span for a = 2 / (span + 1)
        spread = 2 * sigma * math.sqrt(2 * math.log(max(2.0, self._count / self.span)) / self.span)
        if self._trend.t_statistic > self.trend * sigma * math.sqrt(2 * math.log(self._count)):
            spread = 0.0
        error = self.errors * (self._paired.error if math.isfinite(self._paired.error) else self._independent_error)
        if math.isnan(error):
            error = _UNKNOWN * self._unit * (1 + _YOUNG / self._count)
        return max(math.hypot(self.min_rise * self._unit, error, self.noise * spread), _NEGLIGIBLE * self._fall)

    def _judge(self, threshold: float) -> None:
        """Add up the weights of consecutive rises, and decide."""
        rise, before = self._smoothed_rise, self._minimum_train
        risen = rise > threshold
        stands = self._last_point[1] - self._minimum > threshold  # so it is not an old outlier
        counts = risen and stands and before is not None and self._train < before
        weight = rise / threshold if threshold else _MAX_WEIGHT
        self._evidence_run = self._evidence_run + min(weight, _MAX_WEIGHT) if counts else 0.0
        train_risen = before is not None and self._train > before + self.min_rise * abs(before)
        self._diverge_run = self._diverge_run + 1 if risen and train_risen else 0
        if self._overfitting:
            # half, so that the verdict does not flip at the threshold
            if rise <= max(self.min_rise / 2 * self._unit, _NEGLIGIBLE * self._fall):
                self._overfitting, self._onset = False, None
        elif self._evidence_run >= self.hold and self._count > self.warmup:
            self._overfitting, self._onset = True, self._reference
            if self._detected is None:
                self._detected = self._index

    def _verdict(self, train_loss: float, val_loss: float, sigma: float, threshold: float) -> Verdict:
        gap = val_loss - train_loss
        facts = Verdict(
            overfitting=self._overfitting,
            status=self._status(val_loss, gap, threshold),
            onset=self._onset,
            detected=self._detected,
            best=self._best,
            gap=gap,
            rise=val_loss - self._reference_value,
            rise_se=self._rise_se(sigma),
            reference=self._reference,
            smoothed_rise=self._smoothed_rise,
            threshold=threshold,
            examples_needed=self._examples_needed(val_loss - self._reference_value),
            evidence="",
        )
        train = self._minimum_train, self._train
        text = evidence(facts, count=self._count, warmup=self.warmup, minimum=self._minimum, noise=sigma, train=train)
        return evolve(facts, evidence=text)

    def _rise_se(self, sigma: float) -> float:
        if self._paired.examples:
            return self._paired.error
        independent = self._independent_error
        if math.isnan(independent) and math.isfinite(sigma) and self._reference is not None:
            return math.sqrt(2) * sigma
        return independent

    def _examples_needed(self, rise: float) -> int | None:
        """Return for how many examples two standard errors equal the rise; None if there are enough."""
        error, least = self._paired.error, self.min_rise * self._unit
        rise = max(rise, least)
        if self._smoothed_rise <= 0 or not 2 * error > rise > 0:  # False where the error is NaN
            return None
        return math.ceil(self._paired.examples * (2 * error / rise) ** 2)  # the error falls with their square root

    def _status(self, val_loss: float, gap: float, threshold: float) -> Status:
        if self._overfitting and math.isfinite(val_loss):
            return "overfitting"
        if not math.isfinite(val_loss) or (self._diverge_run >= self.hold and self._count > self.warmup):
            return "diverging"
        if self._count <= self.warmup:
            return "warming up"
        fall = 0.1 * self.min_rise * self._unit
        if self._smoothed_rise <= threshold and is_falling([loss for loss, _ in self._recent], fall):
            return "improving"
        much_is_left = self._val > _LITTLE_LEARNED * self._first and not self._negative
        if (
            much_is_left
            and gap <= self.min_rise * self._val
            and not is_falling([loss for _, loss in self._recent], fall)
        ):
            return "underfitting"
        return "plateau"


def diagnose(
    train_losses: Iterable[SupportsFloat],
    val_losses: Iterable[SupportsFloat],
    *,
    example_losses: Iterable[object] | None = None,
    example_weights: object = None,
    **options: Any,
) -> Verdict:
    """Return the verdict of an `OverfittingRule` on whole loss curves, one point per evaluation.

    Args:
        train_losses: Training losses, shape (N,), N at least 1.
        val_losses: Validation losses, shape (N,), in the same unit.
        example_losses: Losses of the validation examples at each evaluation, shape (N, examples), if known.
        example_weights: Their weights, shape (examples,); None for 1 each.
        **options: Options of `OverfittingRule`.

    Raises:
        ValueError: If the curves are empty, differ in length, or contain anything but numbers.
        TypeError: If an option is unknown.
    """
    rule = OverfittingRule(**options)
    train, val = _numbers("train_losses", train_losses), _numbers("val_losses", val_losses)
    if len(train) != len(val):
        raise ValueError(f"train_losses has {len(train)} points but val_losses has {len(val)}")
    if not train:
        raise ValueError("train_losses and val_losses are empty")
    examples = [None] * len(val) if example_losses is None else list(example_losses)
    if len(examples) != len(val):
        raise ValueError(f"example_losses has {len(examples)} rows but val_losses has {len(val)} points")
    for t, v, losses in zip(train, val, examples, strict=True):
        verdict = rule.update(t, v, losses=losses, weights=example_weights)
    return verdict


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
