"""How exactly a validation set tells the difference between the losses of two evaluations."""

import math
from typing import Any, Literal

import torch
from attrs import define, field
from torch import Tensor


@define
class PairedRise:
    """The standard error of the rise from a reference evaluation, over the same examples at both.

    With a the influence of each example on the mean, w_i (l_i - L) / sum(w), at both evaluations, and d their
    difference::

        se = f(nu) sqrt(sum(d^2) N / (N - 1) + max(d^2))

    The first term is the usual variance of a weighted mean of differences. Losses have long tails: a few examples carry
    most of it, and the largest may not be in the sample. So the sum counts the most extreme example twice, as if
    one more like it had been missed, and f widens the error to that of Student's t, whose degrees of freedom are those
    of the variance itself (Satterthwaite 1946): nu = 2 N / (kurtosis - 1).

    Examples that come in another order at each evaluation have the error of two independent samples, which is larger:
    the result is then cautious, not wrong.

    Attributes:
        examples: N; 0 before there is one evaluation.
        error: The standard error, in the unit of the loss; NaN where it is not known.
    """

    examples: int = 0
    error: float = math.nan
    _last: Tensor | None = field(default=None, repr=False)  # of the evaluation before: the smoothed curve lags by one
    _reference: Tensor | None = field(default=None, repr=False)

    def take(self, losses: Any, weights: Any, *, reference: Literal["last", "this"] | None) -> None:
        """Take one more evaluation in.

        Args:
            losses: Losses of the examples, shape (N,).
            weights: Their weights, shape (N,), or None for 1 each.
            reference: Whether this evaluation, or the last one, is the reference from here on.

        Raises:
            ValueError: Shapes that don't fit, or not as many examples as before.
        """
        now = influences(losses, weights)
        if self.examples and len(now) != self.examples:
            raise ValueError(f"there were {self.examples} losses of examples before, and now there are {len(now)}")
        self.examples = len(now)
        if reference is not None:
            self._reference = now if reference == "this" or self._last is None else self._last
        self._last = now
        self.error = math.nan if self._reference is None else standard_error(now - self._reference)

    def state_dict(self) -> dict[str, Any]:
        """What it remembers: two tensors or None."""
        return {"last": self._last, "reference": self._reference, "error": self.error}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._last, self._reference, self.error = state["last"], state["reference"], state["error"]
        self.examples = 0 if self._last is None else len(self._last)


def influences(losses: Any, weights: Any) -> Tensor:
    """What each example adds to the deviation of the weighted mean, shape (N,), float64."""
    values = torch.as_tensor(losses, dtype=torch.float64)
    scale = torch.ones_like(values) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    if values.dim() != 1 or scale.shape != values.shape or not len(values):
        raise ValueError(
            "losses and weights of the examples must have shape (N,), N at least 1, got "
            f"{tuple(values.shape)} and {tuple(scale.shape)}"
        )
    scale = scale / scale.sum()
    return scale * (values - scale @ values)


def standard_error(difference: Tensor) -> float:
    """The standard error of a mean from the influences of its examples, shape (N,); NaN where it can't be known."""
    squares = difference.square()
    count, total, fourth, most = (len(squares), *(float(x) for x in (squares.sum(), squares @ squares, squares.max())))
    if count < 2 or not math.isfinite(total):
        return math.nan
    if total == 0:
        return 0.0
    kurtosis = count * fourth / total**2
    freedom = max(1.5, 2 * count / max(kurtosis - 1, 1e-9))
    return _widening(freedom) * math.sqrt(total * count / (count - 1) + most)


def _widening(freedom: float) -> float:
    """Half of the quantile of Student's t that 2 is of the normal distribution (Abramowitz & Stegun 26.7.5)."""
    return 1 + (2.5 / freedom + 3.0625 / freedom**2 + 2.859375 / freedom**3) / 2
