"""Standard error of the difference between two evaluations on the same validation examples."""

import math
from typing import TYPE_CHECKING, Literal

from attrs import define, field

from fitwatch.rules.stateful import Stateful

if TYPE_CHECKING:  # the command `fitwatch` judges curves and starts without torch
    from torch import Tensor


@define
class PairedRise(Stateful):
    """Standard error of the rise since a reference evaluation, over the same examples at both.

    With a the influence of each example on the mean, w_i (l_i - L) / sum(w), at both evaluations, and d their
    difference::

        se = f(nu) sqrt(sum(d^2) N / (N - 1) + max(d^2))

    The first term is the usual variance of a weighted mean of differences. Losses have long tails: a few examples carry
    most of the variance, and the most extreme ones may be missing from the sample. So the sum counts the most extreme
    example twice, as if one more like it had been missed, and f widens the error to that of Student's t, with the
    degrees of freedom of the variance itself (Satterthwaite 1946): nu = 2 N / (kurtosis - 1).

    If the examples come in a different order at each evaluation, the error is that of two independent samples, which
    is larger: the result is then cautious, not wrong.

    Attributes:
        error: The standard error, in the unit of the loss; NaN if unknown.
    """

    error: float = field(default=math.nan, init=False)
    _last: "Tensor | None" = field(default=None, init=False, repr=False)  # of the previous evaluation
    _reference: "Tensor | None" = field(default=None, init=False, repr=False)

    @property
    def examples(self) -> int:
        """N; 0 before the first evaluation."""
        return 0 if self._last is None else len(self._last)

    def add(self, losses: object, weights: object, *, reference: Literal["last", "this"] | None) -> None:
        """Add an evaluation.

        Args:
            losses: Losses of the examples, shape (N,).
            weights: Their weights, shape (N,), or None for 1 each.
            reference: The evaluation that becomes the reference: the previous one, this one, or None to keep the
                current one.

        Raises:
            ValueError: If shapes don't match, or the number of examples has changed.
        """
        now = influences(losses, weights)
        if self.examples and len(now) != self.examples:
            raise ValueError(f"losses must be those of the same {self.examples} examples as before, got {len(now)}")
        if reference is not None:
            self._reference = now if reference == "this" or self._last is None else self._last
        self._last = now
        self.error = math.nan if self._reference is None else standard_error(now - self._reference)


def influences(losses: object, weights: object) -> "Tensor":
    """Return the influence of each example on the weighted mean, w_i (l_i - L) / sum(w), shape (N,), float64."""
    import torch  # noqa: PLC0415 - see above

    values = torch.as_tensor(losses, dtype=torch.float64)
    scale = torch.ones_like(values) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    if values.dim() != 1 or scale.shape != values.shape or not len(values):
        raise ValueError(
            "losses and weights of the examples must have shape (N,), N at least 1, got "
            f"{tuple(values.shape)} and {tuple(scale.shape)}"
        )
    scale = scale / scale.sum()
    return scale * (values - scale @ values)


def standard_error(difference: "Tensor") -> float:
    """Return the standard error of a mean, given the influences of its examples, shape (N,); NaN if unknown."""
    squares = difference.square()
    count, total = len(squares), float(squares.sum())
    if count < 2 or not math.isfinite(total):
        return math.nan
    if total == 0:
        return 0.0
    kurtosis = count * float(squares @ squares) / total**2
    freedom = max(1.5, 2 * count / max(kurtosis - 1, 1e-9))
    return _widening(freedom) * math.sqrt(total * count / (count - 1) + float(squares.max()))


def _widening(freedom: float) -> float:
    """Return half the quantile of Student's t that is 2 for the normal distribution (Abramowitz & Stegun 26.7.5)."""
    return 1 + (2.5 / freedom + 3.0625 / freedom**2 + 2.859375 / freedom**3) / 2
