"""When a learning-rate scheduler steps."""

from attrs import frozen
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fitwatch.helpers.aliases import Scheduler
from fitwatch.state.history import History


@frozen
class Schedule:
    """A scheduler, or None, and when it steps.

    Args:
        scheduler: Any torch scheduler. `ReduceLROnPlateau` steps after every evaluation, whatever ``interval`` is.
        interval: ``"step"`` or ``"epoch"``.
        monitor: The metric passed to `ReduceLROnPlateau`.
    """

    scheduler: Scheduler | None
    interval: str
    monitor: str

    def check(self, optimizer: Optimizer) -> None:
        """Check that the scheduler is an instance and belongs to this optimizer.

        Raises:
            TypeError: It is not a scheduler instance.
            ValueError: It belongs to another optimizer.
        """
        if self.scheduler is None:
            return
        if isinstance(self.scheduler, (type, Optimizer)) or not hasattr(self.scheduler, "step"):
            raise TypeError(f"scheduler must be an instance of a torch scheduler, got {self.scheduler!r}")
        if getattr(self.scheduler, "optimizer", optimizer) is not optimizer:
            raise ValueError("scheduler belongs to another optimizer")

    def watch(self, history: History) -> None:
        """Declare the metric that a `ReduceLROnPlateau` needs."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            history.watch(self.monitor, "max" if self.scheduler.mode == "max" else "min", by="ReduceLROnPlateau")

    def after(self, interval: str) -> None:
        """Step the scheduler if this is its interval: a ``"step"`` or an ``"epoch"`` has ended."""
        if self.scheduler is not None and self.interval == interval and not self._waits_for_metric:
            self.scheduler.step()

    def after_evaluation(self, history: History) -> None:
        """Step a `ReduceLROnPlateau` with the newest evaluation, if it has the metric."""
        if isinstance(self.scheduler, ReduceLROnPlateau) and self.monitor in history.newest:
            self.scheduler.step(history.newest[self.monitor])

    @property
    def _waits_for_metric(self) -> bool:
        return isinstance(self.scheduler, ReduceLROnPlateau)
