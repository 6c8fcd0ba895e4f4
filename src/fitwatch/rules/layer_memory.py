"""What is remembered of a layer from window to window, so that a status is given with patience."""

from typing import Any

from attrs import asdict, define, field

_LONGER = 10


@define
class LayerMemory:
    """How long a layer has looked the way it does, and how long it looked so before without harm."""

    seen: str = ""  # status that the last windows showed
    windows: int = 0  # in a row
    steps: int = 0  # read in them
    heaviest: float = 0.0  # the largest norm of the weights
    _patience: dict[str, int] = field(factory=dict, alias="patience")  # steps, of a status that has come and gone

    def see(self, status: str, steps: int) -> None:
        """Take in a window with so many steps."""
        if status != self.seen:
            self.seen, self.windows, self.steps = status, 0, 0
        self.windows, self.steps = self.windows + 1, self.steps + steps

    def confirms(self, *, windows: int, steps: int) -> bool:
        """Whether the status was seen for that long, or longer where it has come and gone."""
        return self.windows >= windows and self.steps >= max(steps, self._patience.get(self.seen, 0))

    def outlived(self, status: str, steps: int) -> None:
        """A status is over, after so many steps: the next one has to last ten times as long, and longer each time."""
        self._patience[status] = _LONGER * max(steps, self._patience.get(status, 0))

    def at_least(self, status: str, steps: int) -> None:
        """So many steps with a status were harmless, though it was not given."""
        self._patience[status] = max(_LONGER * steps, self._patience.get(status, 0))

    def state_dict(self) -> dict[str, Any]:
        """Everything, in plain values; the arguments that make it anew."""
        return {name.lstrip("_"): value for name, value in asdict(self).items()}
