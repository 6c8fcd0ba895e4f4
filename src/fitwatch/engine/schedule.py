"""When a learning-rate scheduler steps, and whether its plan fits the fit."""

import logging
import warnings
from collections.abc import Sequence
from typing import Final

from attrs import evolve, frozen
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fitwatch.helpers.aliases import Scheduler
from fitwatch.state.history import History

logger = logging.getLogger("fitwatch")

_PER_EPOCH = (
    lr_scheduler.StepLR,
    lr_scheduler.MultiStepLR,
    lr_scheduler.ExponentialLR,
    lr_scheduler.CosineAnnealingLR,
    lr_scheduler.CosineAnnealingWarmRestarts,
)
_VANISHED: Final = 1e-8  # share of its start below which a learning rate trains nothing


@frozen
class Schedule:
    """A scheduler, or None, and when it steps.

    Args:
        scheduler: Any torch scheduler. `ReduceLROnPlateau` steps after every evaluation, whatever ``interval`` is.
        interval: ``"step"``, ``"epoch"``, or None for the usual one of its class.
        monitor: The metric passed to `ReduceLROnPlateau`.
    """

    scheduler: Scheduler | None
    interval: str | None
    monitor: str

    def check(self, optimizer: Optimizer) -> None:
        """Check that the scheduler is an instance and belongs to this optimizer.

        Raises:
            TypeError: It is not a scheduler instance.
            ValueError: It belongs to another optimizer.
        """
        if self.scheduler is None:
            return
        if isinstance(self.scheduler, (list, tuple)):
            raise TypeError(
                f"scheduler must be one scheduler, got {len(self.scheduler)}: combine them with "
                "torch.optim.lr_scheduler.SequentialLR (one after another) or ChainedScheduler (all at once)"
            )
        if isinstance(self.scheduler, (type, Optimizer)) or not hasattr(self.scheduler, "step"):
            raise TypeError(f"scheduler must be an instance of a torch scheduler, got {self.scheduler!r}")
        if getattr(self.scheduler, "optimizer", optimizer) is not optimizer:
            raise ValueError("scheduler belongs to another optimizer")

    def decided(self) -> "Schedule":
        """Return this schedule with an interval, and log the one that was chosen."""
        if self.interval is not None or self.scheduler is None or self._waits_for_metric:
            return evolve(self, interval=self.interval or "step")
        interval = usual_interval(self.scheduler)
        other = "step" if interval == "epoch" else "epoch"
        logger.info(
            '%s steps after every %s, as is usual for it; scheduler_interval="%s" changes that',
            type(self.scheduler).__name__,
            interval,
            other,
        )
        return evolve(self, interval=interval)

    def check_plan(self, *, epochs: int | None, steps: int | None, resumed: bool = False) -> None:
        """Compare the scheduler's plan with the rest of the fit, before step 1.

        Args:
            epochs: Epochs to train from now; None if unknown.
            steps: Steps to train from now; None if unknown.
            resumed: Whether the scheduler has the options of a checkpoint.

        Raises:
            ValueError: The scheduler refuses to step as often as this fit needs.
        """
        planned = steps if self.interval == "step" else epochs
        if self.scheduler is None or planned is None or self._waits_for_metric:
            return
        name, done = type(self.scheduler).__name__, int(getattr(self.scheduler, "last_epoch", 0))
        unit = f"{self.interval}s"
        other_unit, other = ("epochs", epochs) if self.interval == "step" else ("steps", steps)
        if isinstance(self.scheduler, lr_scheduler.OneCycleLR) and done + planned > self.scheduler.total_steps:
            before = f" after {done} before" if done else ""
            kept = ' and resume with options_from="script", since those of the checkpoint hold else' if resumed else ""
            raise ValueError(
                f"{name} was created for {self.scheduler.total_steps} steps, and this fit takes {planned} {unit}"
                f"{before}: create it with total_steps={done + planned}{kept}"
            )
        if not planned:
            return
        other = None if other is None else other * (done + planned) // planned  # of all fits with this scheduler
        planned += done
        problem = _misfit(self.scheduler, planned, other)
        if problem:
            changes = f', or scheduler_interval="{other_unit[:-1]}"' if other is not None else ""
            logger.warning(
                "%s steps after every %s, and this fit takes %s %s%s: %s. Give it options in %s%s",
                name,
                self.interval,
                f"{planned:,}",
                unit,
                f" ({other:,} {other_unit})" if other is not None else "",
                problem,
                unit,
                changes,
            )

    def watch(self, history: History) -> None:
        """Declare the metric that a `ReduceLROnPlateau` needs."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            history.watch(self.monitor, "max" if self.scheduler.mode == "max" else "min", by="ReduceLROnPlateau")

    def after(self, interval: str) -> None:
        """Step the scheduler if this is its interval: a ``"step"`` or an ``"epoch"`` has ended."""
        if self.scheduler is None or self.interval != interval or self._waits_for_metric:
            return
        if interval == "step":
            self.scheduler.step()
            return
        with warnings.catch_warnings():
            # After the last step of a resumed epoch: the optimizer has stepped, in the fit before.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()

    def after_evaluation(self, history: History) -> None:
        """Step a `ReduceLROnPlateau` with the newest evaluation, if it has the metric."""
        if isinstance(self.scheduler, ReduceLROnPlateau) and self.monitor in history.newest:
            self.scheduler.step(history.newest[self.monitor])

    @property
    def _waits_for_metric(self) -> bool:
        return isinstance(self.scheduler, ReduceLROnPlateau)


def usual_interval(scheduler: object) -> str:
    """Return ``"epoch"`` for the schedulers whose options are usually given in epochs, else ``"step"``.

    A combination steps after every epoch only if all its parts do.
    """
    parts = getattr(scheduler, "_schedulers", None)
    if isinstance(parts, (list, tuple)) and parts:
        return "epoch" if all(usual_interval(part) == "epoch" for part in parts) else "step"
    return "epoch" if isinstance(scheduler, _PER_EPOCH) else "step"


def _misfit(scheduler: object, planned: int, other: int | None) -> str | None:
    """Return why the options of a scheduler do not fit; None if they may be right.

    Args:
        scheduler: Any scheduler.
        planned: How often it steps in this fit.
        other: How often it would step with the other interval, if known.
    """
    if isinstance(scheduler, lr_scheduler.ChainedScheduler):
        return next((why for part in scheduler._schedulers if (why := _misfit(part, planned, other))), None)  # noqa: SLF001
    return _length_misfit(scheduler, planned, other) or _decay_misfit(scheduler, planned, other)


def _length_misfit(scheduler: object, planned: int, other: int | None) -> str | None:
    """See `_misfit`; schedulers that were created for a number of counts."""
    vanishes = _vanishes_at(scheduler)
    if vanishes is not None and planned > 2 * vanishes:
        return f"the learning rate is 0 from {vanishes:,} on"
    if isinstance(scheduler, lr_scheduler.OneCycleLR) and scheduler.total_steps > 2 * planned:
        return f"it covers {planned / scheduler.total_steps:.2%} of total_steps={scheduler.total_steps}"
    if isinstance(scheduler, lr_scheduler.CosineAnnealingLR):
        if planned > 2 * scheduler.T_max:
            periods = planned / scheduler.T_max / 2
            return f"T_max={scheduler.T_max} makes the learning rate fall and rise {periods:.3g} times"
        covers_little = other is not None and planned < other and scheduler.T_max > 2 * planned
        return f"it covers {planned / scheduler.T_max:.2%} of T_max={scheduler.T_max}" if covers_little else None
    return None


def _decay_misfit(scheduler: object, planned: int, other: int | None) -> str | None:
    """See `_misfit`; schedulers that multiply the learning rate by a factor."""
    if isinstance(scheduler, lr_scheduler.StepLR):
        at = range(scheduler.step_size, planned + 1, scheduler.step_size)
        return _decays_wrongly(
            f"step_size={scheduler.step_size}", scheduler.gamma, at, scheduler.step_size, planned, other
        )
    if isinstance(scheduler, lr_scheduler.MultiStepLR):
        stones = sorted(scheduler.milestones.elements())
        first = stones[0] if stones else 0
        return _decays_wrongly(f"milestones={stones}", scheduler.gamma, stones, first, planned, other)
    if isinstance(scheduler, lr_scheduler.ExponentialLR):
        return _decays_wrongly(f"gamma={scheduler.gamma}", scheduler.gamma, range(1, planned + 1), 1, planned, other)
    return None


def _vanishes_at(scheduler: object) -> int | None:
    """Return the count from which the learning rate is 0; None if it never is, or is unknown."""
    if isinstance(scheduler, lr_scheduler.PolynomialLR):
        return int(scheduler.total_iters)
    if isinstance(scheduler, lr_scheduler.LinearLR) and scheduler.end_factor == 0:
        return int(scheduler.total_iters)
    return None


def _decays_wrongly(
    option: str, gamma: float, at: Sequence[int], first: int, planned: int, other: int | None
) -> str | None:
    """See `_misfit`; the learning rate is multiplied by ``gamma`` after each of the counts ``at``."""
    falls = sum(count <= planned for count in at)
    if 0 < gamma < 1 and gamma**falls < _VANISHED:
        return f"{option} multiplies the learning rate by {gamma**falls:.1g} until the end"
    if other is not None and planned < first <= other:
        return f"with {option} it never changes the learning rate"
    if other is not None and len(at) > 1 and max(at) <= other < planned / 2:
        return f"with {option} its last change comes after {max(at)}"
    return None


def planned_length(
    *, epochs: int | None, max_steps: int | None, steps_per_epoch: int | None, done: int = 0
) -> tuple[int | None, int | None]:
    """Return how many epochs and steps a fit takes at most; None where unknown.

    ``done`` steps of the first epoch were taken before.
    """
    steps = None if epochs is None or steps_per_epoch is None else epochs * steps_per_epoch - done
    steps = max_steps if steps is None else steps if max_steps is None else min(steps, max_steps)
    if steps is not None and steps_per_epoch:
        epochs = -(-steps // steps_per_epoch)
    return epochs, steps
