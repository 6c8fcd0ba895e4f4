"""Overfitting from two loss curves: validation rises by more than noise explains while training still falls."""

import math
from collections.abc import Iterable
from statistics import median
from typing import Any, Literal, SupportsFloat

from attrs import define, evolve, field

from fitwatch.helpers.options import integer, number
from fitwatch.rules.evidence import Figures, Status, Verdict, evidence
from fitwatch.rules.noise import (
    MIN_DIFFERENCES,
    Trend,
    is_falling,
    is_spike,
    noise_and_lag,
    noise_level,
    white_noise,
    widening,
)
from fitwatch.rules.paired import PairedRise
from fitwatch.rules.smoothing import Smoothed
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
# Where the standard error of the losses is unknown, a rise is clear if it exceeds these multiples of the noise since
# the minimum and of that around it, and the slope this multiple of the largest one explained by noise.
_CLEAR_RISE, _CLEAR_LUCK, _CLEAR_SLOPE = 6.0, 3.0, 1.5
# Of a clear rise this share of the smallest that matters is enough: it is known to a few percent.
_ENOUGH = 0.95
# Before the warm-up ends: a rise of this multiple of its paired standard error, and of this share, is enough.
_CERTAIN, _LARGE = 4.0, 0.1
# If a loss has no natural zero, the noise alone tells a rise from chance, so it counts for more.
_WITHOUT_ZERO = 1.5
# Both losses above this multiple of the best constant prediction, or above all that was learned: training diverged.
# Or this multiple of the best evaluation: training that diverges at once leaves no smoothed minimum to compare with.
_DIVERGED, _FAR = 2.0, 10.0


@define(kw_only=True)
class OverfittingRule(Stateful):
    """Fires when the validation loss has risen clearly above its minimum while the training loss kept falling.

    Both curves are smoothed by a bias-corrected exponential mean V, T (Kingma & Ba 2015, section 3); during ``warmup``,
    V restarts at a loss below half of it. With m the minimum of V, and T_m the value of T there, a rise is shown if::

        V - m > threshold   and   T < T_m
        threshold^2 = (min_rise * m)^2 + (errors * e)^2 + (noise * R)^2
        R = (s + s_m) sqrt(2 ln(n / span) / span), or 0 if b > trend * sqrt(2 ln n) standard errors of b

    The three parts are: the smallest rise that matters; the standard error e of the rise, since a validation set is a
    sample; and the range R that V covers in n evaluations through training noise alone, half of it the luck of the
    minimum, half that of the last losses. sqrt(2 ln k) is about the largest of k normal numbers. s is the standard
    deviation of one validation loss about its trend now: the larger of the scaled median of the last absolute second
    differences and the deviation from the parabola through the last 16 losses. s_m is that around the minimum, if it
    was larger: noise calms as the learning rate falls, and a minimum that was luck remains one.

    What follows such a minimum is a higher level, but no slope. So if the losses since the minimum do slope upwards,
    noise does not explain the rise, and R is left out: b is the slope of their least-squares line (see `Trend`), with
    a standard error widened by the correlation r of successive residuals, sqrt((1 + r) / (1 - r)). However large the
    noise, a slope shows in the end.

    A spike that is gone is left out of V and T: a loss above both its neighbors by more than 4 standard deviations of
    the noise is replaced by their mean as soon as the second one is known.

    The rule fires once the weights of such consecutive evaluations add up to ``hold``. The weight of an evaluation is
    its rise over the threshold, at most 1.9, so that a large rise needs less time than a small one. The loss itself
    must also exceed m by the threshold, since V carries an outlier along for some evaluations.

    With the losses of the validation examples, e is that of a paired difference, over the same examples at both
    evaluations (see `PairedRise`). With standard errors only, it is that of two independent sets, which is too large.
    With neither, errors * e is taken as 5.5% of m, and more while training is young. That is left out where the curve
    is clear: with s' the deviation from the parabola through the last 30 losses since the minimum, widened as above, b
    is 1.5 times what s' explains, V + l has risen by 6 s' and 3 s_m, and successive second differences are those of
    white noise. Here l = (span - 1) / 2 b, by which V lags behind the line. Then 0.95 min_rise * m - l replaces the
    threshold. A validation set that is too small makes a curve wander; this one does not.

    With the losses of the examples, the rule may fire before ``warmup`` ends, from the third evaluation on: if the loss
    has risen twice in succession since its minimum, by 10% and by 4 standard errors in all, while training fell.

    If a loss has been negative, and so has no natural zero, the range of the curve replaces m: the fall from the first
    loss to m, or the rise if that is larger.

    Multiplying both curves (and the losses of the examples) by a constant changes no verdict.

    A verdict uses past evaluations only, and memory does not grow with their number: some 100 numbers, and two vectors
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
        warmup: Evaluations before the first verdict from the curves, 4 or more.
        window: Last differences from which the noise is estimated; 5 or more.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If an option is of the wrong type.
    """

    min_rise: float = field(default=0.04, validator=number(above=0))
    errors: float = field(default=0.25, validator=number(least=0))
    noise: float = field(default=1.2, validator=number(least=0))
    trend: float = field(default=0.9, validator=number(least=0))
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
    _best_train: float = field(default=math.nan, init=False)  # at the best validation loss
    _val: Smoothed = field(init=False)
    _train: Smoothed = field(init=False)
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
    _reference_noise: float = field(default=0.0, init=False)
    _noise: float = field(default=math.inf, init=False)
    _clear: bool = field(default=False, init=False)
    _lag: float = field(default=0.0, init=False)

    def __attrs_post_init__(self) -> None:
        self._val, self._train = Smoothed(self.span), Smoothed(self.span)

    def update(
        self,
        train_loss: float,
        val_loss: float,
        *,
        standard_error: float | None = None,
        losses: object = None,
        weights: object = None,
        baseline: float | None = None,
    ) -> Verdict:
        """Add an evaluation; its losses may be non-finite.

        Args:
            train_loss: Training loss; ideally measured in eval mode with the same weights as the validation loss.
            val_loss: Validation loss, in the same unit.
            standard_error: Standard error of ``val_loss``; not needed with ``losses``.
            losses: Losses of the validation examples, shape (N,), a tensor or anything `torch.as_tensor` accepts: the
                same examples in the same order at every evaluation. None ends the pairing; later losses restart it.
            weights: Their weights, shape (N,); None for 1 each. ``val_loss`` is sum(w l) / sum(w).
            baseline: Validation loss of the best constant prediction, if known: only a model that does not beat it is
                called underfitting, and one far above it diverging.

        Returns:
            The verdict on all evaluations so far. Costs O(N) with losses of examples.

        Raises:
            TypeError: If a loss is not a number.
            ValueError: If shapes don't match, or the number of examples has changed.
        """
        train_loss, val_loss = float(train_loss), float(val_loss)
        self._index += 1
        finite = math.isfinite(val_loss)
        if finite:
            self._mend(val_loss, train_loss)
        if math.isfinite(train_loss):
            self._train.add(train_loss)
        if finite:
            error = math.nan if standard_error is None else float(standard_error)
            reference = self._add(val_loss, train_loss, error)
            if losses is None:
                self._paired = PairedRise()  # its error would be out of date
            else:
                self._paired.add(losses, weights, reference=reference)
        self._measure_noise()
        threshold = self._threshold()
        if finite:
            self._judge(threshold)
        return self._verdict(train_loss, val_loss, threshold, math.inf if baseline is None else float(baseline))

    @property
    def examples(self) -> int:
        """Number of validation examples whose losses are paired; 0 if none are."""
        return self._paired.examples

    @property
    def _smoothed_rise(self) -> float:
        return self._val.value - self._minimum if math.isfinite(self._minimum) else 0.0

    @property
    def _unit(self) -> float:
        """Loss that rises are measured relative to; 0 or more."""
        return self._fall if self._negative else self._minimum

    @property
    def _fall(self) -> float:
        return max(0.0, self._first - self._minimum, self._smoothed_rise)

    def _mend(self, loss: float, train_loss: float) -> None:
        """Take a spike that is gone out of the smoothed curves: a loss far above the one before and the one after."""
        if len(self._recent) < 2 or self._last_point[0] != self._index - 1:
            return
        losses, others = self._column(0), self._column(1)
        if is_spike(losses[:-1], losses[-1], loss):
            instead = (losses[-2] + loss) / 2
            self._val.replace(instead)
            self._trend.replace(instead - self._reference_value)
        if is_spike(others[:-1], others[-1], train_loss):
            self._train.replace((others[-2] + train_loss) / 2)

    def _column(self, which: int) -> list[float]:
        return [point[which] for point in self._recent]

    def _measure_noise(self) -> None:
        """Measure the noise now, and keep that around the reference, as long as the window reaches back to it."""
        losses = self._column(0)
        self._noise, self._lag = noise_and_lag(losses)
        if self._trend.count <= self.window // 2:
            around = noise_level(losses[-(self._trend.count + self.window // 2 + 1) :])
            self._reference_noise = around if math.isfinite(around) else 0.0

    def _add(self, loss: float, train_loss: float, error: float) -> Literal["last", "this"] | None:
        """Update the smoothed curve and its minimum; return the new reference at a new minimum."""
        before, self._last_point = self._last_point, [self._index, loss, error]
        self._count += 1
        self._negative = self._negative or loss < 0
        self._recent = [*self._recent[-self.window :], [loss, train_loss]]
        if self._count <= _SETTLED:  # a single one may be huge: untrained weights on unscaled inputs
            self._first = median(value for value, _ in self._recent)
        if loss < self._best_value:
            self._best, self._best_value, self._best_train = self._index, loss, train_loss
        if self._count <= self.warmup and 0 < loss < _FALLEN * self._val.value:
            self._val.restart()
        self._val.add(loss)
        if self._count < _SETTLED or self._val.value >= self._minimum:
            self._trend.add(loss - self._reference_value)
            return None
        self._minimum = self._val.value
        self._minimum_train = self._train.value if self._train.known else None
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

    def _threshold(self) -> float:
        now, self._clear = self._noise, False
        if not math.isfinite(self._minimum) or not math.isfinite(now):
            return math.inf
        strict = _WITHOUT_ZERO if self._negative else 1.0
        largest = strict * max(now, self._reference_noise)
        # a / (2 - a) is 1 / span for a = 2 / (span + 1)
        spread = (strict * now + largest) * math.sqrt(2 * math.log(max(2.0, self._count / self.span)) / self.span)
        by_chance = widening(self._lag) * largest * math.sqrt(2 * math.log(self._count))
        error = self.errors * (self._paired.error if math.isfinite(self._paired.error) else self._independent_error)
        least = self.min_rise * self._unit
        self._clear = self._is_clear(strict)
        if math.isnan(error) and self._clear:
            error, least = 0.0, max(_ENOUGH * least - self._lagging, least / 2)
        elif math.isnan(error):
            error = _UNKNOWN * self._unit * (1 + _YOUNG / self._count)
        if self._trend.t_statistic <= self.trend * by_chance:
            error = math.hypot(error, self.noise * spread)
        return max(math.hypot(least, error), _NEGLIGIBLE * self._fall)

    @property
    def _lagging(self) -> float:
        """By how much the smoothed loss lags behind the line through the losses since the minimum."""
        return (self.span - 1) / 2 * self._trend.slope

    def _is_clear(self, strict: float) -> bool:
        """Return whether the losses since the minimum, judged by themselves, rise far beyond their noise."""
        noise = strict * white_noise(self._column(0)[-min(self.window + 1, self._trend.count) :])
        rise = self._smoothed_rise + self._lagging
        steep = self._trend.t_statistic > _CLEAR_SLOPE * noise * math.sqrt(2 * math.log(self._count))
        return steep and rise > max(_CLEAR_RISE * noise, _CLEAR_LUCK * strict * self._reference_noise)

    def _judge(self, threshold: float) -> None:
        """Add up the weights of consecutive rises, and decide."""
        rise, before = self._smoothed_rise, self._minimum_train
        risen = rise > threshold
        stands = self._last_point[1] - self._minimum > threshold  # so it is not an old outlier
        counts = risen and stands and before is not None and self._train.value < before
        weight = rise / threshold if threshold else _MAX_WEIGHT
        self._evidence_run = self._evidence_run + min(weight, _MAX_WEIGHT) if counts else 0.0
        higher = math.inf if before is None else before + self.min_rise * abs(before)
        train_risen = self._train.value > higher and not self._recent[-1][1] <= higher
        self._diverge_run = self._diverge_run + 1 if risen and stands and train_risen else 0
        if self._overfitting:
            # half, so that the verdict does not flip at the threshold
            if rise <= max(self.min_rise / 2 * self._unit, _NEGLIGIBLE * self._fall):
                self._overfitting, self._onset = False, None
        elif (self._evidence_run >= self.hold and self._count > self.warmup) or self._is_certain():
            self._overfitting, self._onset = True, self._reference
            if self._detected is None:
                self._detected = self._index

    def _is_certain(self) -> bool:
        """Return whether the examples show, before the warm-up ends, a large rise beyond chance.

        The losses of few evaluations do not tell their noise, but those of the examples tell the error of the rise.
        """
        rise, error = self._last_point[1] - self._reference_value, self._paired.error
        if self._count > self.warmup or self._trend.count < 2 or not rise > _CERTAIN * error:
            return False
        now, before = self._recent[-1], self._recent[-1 - self._trend.count]
        higher = now[0] > self._recent[-2][0] > self._reference_value
        return rise > _LARGE * self._unit and higher and now[1] < before[1]

    def _verdict(self, train_loss: float, val_loss: float, threshold: float, baseline: float) -> Verdict:
        gap = val_loss - train_loss
        facts = Verdict(
            overfitting=self._overfitting,
            status=self._status(val_loss, gap, threshold, baseline),
            onset=self._onset,
            detected=self._detected,
            best=self._best,
            gap=gap,
            rise=val_loss - self._reference_value,
            rise_se=self._rise_se(self._noise),
            reference=self._reference,
            smoothed_rise=self._smoothed_rise,
            threshold=threshold,
            examples_needed=self._examples_needed(val_loss - self._reference_value),
            evidence="",
        )
        return evolve(facts, evidence=evidence(facts, self._figures(gap, baseline)))

    def _figures(self, gap: float, baseline: float) -> Figures:
        return Figures(
            count=self._count,
            warmup=self.warmup,
            last=self._last_point[1] if self._last_point else math.nan,
            best=self._best_value,
            minimum=self._minimum,
            noise=self._noise,
            train_then=self._minimum_train,
            train_now=self._train.value,
            least=self.min_rise * self._unit if self._clear else None,
            stuck=self._is_stuck(gap),
            baseline=baseline,
        )

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

    def _status(self, val_loss: float, gap: float, threshold: float, baseline: float) -> Status:
        if self._overfitting and math.isfinite(val_loss):
            return "overfitting"
        warm = self._count > self.warmup
        if not math.isfinite(val_loss) or (warm and (self._diverge_run >= self.hold or self._has_diverged(baseline))):
            return "diverging"
        if not warm:
            return "warming up"
        if self._smoothed_rise <= threshold and is_falling(self._column(0), self._least_fall):
            return "improving"
        beaten = self._val.value < (1 - self.min_rise) * baseline
        return "underfitting" if self._is_stuck(gap) and not beaten else "plateau"

    def _is_stuck(self, gap: float) -> bool:
        """Return whether training does not fall and has no gap to validation: if that does not fall, nothing does."""
        return gap <= self.min_rise * self._val.value and not is_falling(self._column(1), self._least_fall)

    @property
    def _least_fall(self) -> float:
        return 0.1 * self.min_rise * self._unit

    def _has_diverged(self, baseline: float) -> bool:
        """Return whether both losses stand where nothing is left of what was learned, however noisy they are there."""
        if self._negative:
            return False
        (val, train), before = self._recent[-1], self._minimum_train
        val, train = min(val, self._val.value), min(train, self._train.value)
        if min(val, train) > _DIVERGED * baseline or (
            val > _FAR * self._best_value and train > _FAR * self._best_train
        ):
            return True
        lost = val > max(self._first, _DIVERGED * self._minimum)
        return lost and before is not None and train > _DIVERGED * before


def diagnose(
    train_losses: Iterable[SupportsFloat],
    val_losses: Iterable[SupportsFloat],
    *,
    example_losses: Iterable[object] | None = None,
    example_weights: object = None,
    baseline: float | None = None,
    **options: Any,
) -> Verdict:
    """Return the verdict of an `OverfittingRule` on whole loss curves, one point per evaluation.

    Args:
        train_losses: Training losses, shape (N,), N at least 1.
        val_losses: Validation losses, shape (N,), in the same unit.
        example_losses: Losses of the validation examples at each evaluation, shape (N, examples), if known.
        example_weights: Their weights, shape (examples,); None for 1 each.
        baseline: Validation loss of the best constant prediction, if known; see `OverfittingRule.update`.
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
        verdict = rule.update(t, v, losses=losses, weights=example_weights, baseline=baseline)
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
