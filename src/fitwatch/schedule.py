"""When a learning-rate scheduler steps."""

from collections.abc import Mapping
from typing import Any

from attrs import frozen
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fitwatch.state import State


@frozen
class Schedule:
    """A scheduler of torch, or None, and when it steps.

    Args:
        scheduler: Any of torch. `ReduceLROnPlateau` steps after every evaluation, whatever ``interval`` is.
        interval: ``"step"`` or ``"epoch"``.
        monitor: The metric that `ReduceLROnPlateau` gets.
    """

    scheduler: Any
    interval: str
    monitor: str

    def check(self, optimizer: Optimizer) -> None:
        """Refuse what is no scheduler instance, or one of another optimizer."""
        if self.scheduler is None:
            return
        if isinstance(self.scheduler, (type, Optimizer)) or not hasattr(self.scheduler, "step"):
            raise TypeError(f"scheduler must be an instance of a torch scheduler, got {self.scheduler!r}")
        if getattr(self.scheduler, "optimizer", optimizer) is not optimizer:
            raise ValueError("scheduler belongs to another optimizer than the one given")

    def watch(self, state: State) -> None:
        """Announce the metric that it needs."""
        if self._plateau:
            state.watch(self.monitor, self.scheduler.mode, by="ReduceLROnPlateau")

    def after(self, interval: str) -> None:
        """A ``"step"`` or an ``"epoch"`` is over."""
        if self.scheduler is not None and self.interval == interval and not self._plateau:
            self.scheduler.step()

    def after_evaluation(self, metrics: Mapping[str, float]) -> None:
        """There is a new evaluation."""
        if self._plateau:
            self.scheduler.step(metrics[self.monitor])

    @property
    def _plateau(self) -> bool:
        return isinstance(self.scheduler, ReduceLROnPlateau)
