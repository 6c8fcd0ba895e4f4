"""An exponential mean whose last loss can be replaced."""

from attrs import define, field

from fitwatch.rules.stateful import Stateful


@define
class Smoothed(Stateful):
    """Bias-corrected exponential mean of a curve (Kingma & Ba 2015, section 3).

    Attributes:
        span: Number of losses that it averages over, roughly; 1 or more.
        value: The mean; 0 before the first loss.
        known: Whether there has been a loss.
    """

    span: int
    value: float = field(default=0.0, init=False)
    _weight: float = field(default=0.0, init=False)
    _before: list[float] = field(factory=lambda: [0.0, 0.0], init=False)  # value and weight without the last loss

    @property
    def known(self) -> bool:
        """Whether there has been a loss."""
        return self._weight > 0

    def add(self, loss: float) -> None:
        """Add the next loss."""
        self._before = [self.value, self._weight]
        alpha = 2 / (self.span + 1)
        self._weight += alpha * (1 - self._weight)
        self.value += alpha / self._weight * (loss - self.value)

    def replace(self, loss: float) -> None:
        """Let ``loss`` take the place of the last one."""
        self.value, self._weight = self._before
        self.add(loss)

    def restart(self) -> None:
        """Forget all losses."""
        self.value, self._weight = 0.0, 0.0
