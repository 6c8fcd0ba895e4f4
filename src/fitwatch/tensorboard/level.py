"""The loss of the best constant prediction, as a line in the chart of the loss."""

_AT = {
    4**k for k in range(16)
}  # evaluations that give a point: TensorBoard scales a chart by its points, so they are few


class Level:
    """The line of the baseline in the chart of the loss, in few points.

    It ends where the validation loss is half of it: beyond, it would only press the curves to the bottom of the chart.
    """

    def __init__(self, first_step: int) -> None:
        self._first_step: int | None = first_step
        self._evaluations = 0
        self._waiting: tuple[int, float] | None = None

    def points(self, step: int, level: float, loss: float) -> list[tuple[int, float]]:
        """What to write after an evaluation."""
        if loss < level / 2:
            return []
        self._evaluations += 1
        if self._evaluations not in _AT:
            self._waiting = step, level
            return []
        start, self._first_step, self._waiting = self._first_step, None, None
        return [(step, level)] if start is None else [(start, level), (step, level)]

    def rest(self) -> list[tuple[int, float]]:
        """Its end."""
        return [] if self._waiting is None else [self._waiting]
