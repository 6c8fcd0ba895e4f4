"""Keeps steps with non-finite gradients away from the weights."""

import logging
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from fitwatch.state import State

logger = logging.getLogger("fitwatch")

BUDGET: Final = 50
"""Steps in a row that may be left out; after that training can't be working."""

_Flags = dict[torch.device, tuple[Tensor, Tensor]]  # what the kernel takes: a flag that is 0, and a factor of 1
_KERNEL = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


class Guard:
    """Decides before each step whether its gradients may reach the weights.

    Args:
        state: The state of the fit.
        mode: ``"raise"``, ``"skip"`` or ``"ignore"``, see `Watch`.

    Attributes:
        skipped: Steps left out in this fit.
    """

    def __init__(self, state: State, mode: str) -> None:
        if mode not in ("raise", "skip", "ignore"):
            raise ValueError(f"nonfinite must be one of 'raise', 'skip', 'ignore', got {mode!r}")
        scales = state.scaler is not None and state.scaler.is_enabled()
        self._state, self.raises, self._checks = state, mode == "raise", mode != "ignore" and not scales
        self._flags: _Flags = {}
        self.skipped = 0
        self._in_a_row = 0

    def rejects(self) -> bool:
        """Return whether a gradient of the complete step, before clipping, is not finite. Waits for the device.

        Under a GradScaler, which checks and skips by itself, it is False.
        """
        if not self._checks:
            return False
        gradients = [p.grad for group in self._state.optimizer.param_groups for p in group["params"]]
        if all_finite([g for g in gradients if g is not None], self._flags):
            self._in_a_row = 0
            return False
        return True

    def error(self) -> FloatingPointError:
        """Return the error that names the step, the batch, the parameters and the loss."""
        state, progress = self._state, self._state.progress
        bad = [name for name, p in state.model.named_parameters() if p.grad is not None and not all_finite([p.grad])]
        shown = ", ".join(f"`{name}`" for name in bad[:3]) + (", ..." if len(bad) > 3 else "")
        batch = progress.epoch_batch - 1
        return FloatingPointError(
            f"step {progress.step + 1} (epoch {progress.epoch}, batch {batch}, both counted from 0) has non-finite "
            f"gradients in {len(bad)} parameter{'s' * (len(bad) != 1)} ({shown}). The weights are still those of step "
            f'{progress.step}. Look at the batch (state.batch), the learning rate and the loss; nonfinite="skip" '
            "leaves such steps out"
        )

    def leave_out(self) -> None:
        """Count a step that is left out.

        Raises:
            FloatingPointError: `BUDGET` steps in a row were left out.
        """
        self.skipped += 1
        if self.skipped == 1:
            what = str(self.error()).split(". ")[0]
            logger.warning("%s: it is left out, and train/skipped_steps counts such steps", what)
        self._state.log("train/skipped_steps", self.skipped, reduce="last")
        self._count("their gradients were not finite")

    def after_scaler(self, *, stepped: bool) -> None:
        """Count steps that the GradScaler has skipped.

        Raises:
            FloatingPointError: `BUDGET` steps in a row were skipped.
        """
        if stepped or self._state.scaler is None or not self._state.scaler.is_enabled():
            self._in_a_row = 0
        else:
            self._count(f"fp16 overflowed, even at a scale of {self._state.scaler.get_scale():.3g}")

    def _count(self, why: str) -> None:
        self._in_a_row += 1
        if self._in_a_row >= BUDGET:
            raise FloatingPointError(
                f"the last {BUDGET} steps were left out, since {why}: the weights don't change. Check the inputs, the "
                "loss and the learning rate"
            )


def all_finite(gradients: Sequence[Tensor], flags: _Flags | None = None) -> bool:
    """Return whether all values are finite; waits for the device.

    Args:
        gradients: Any shapes, dtypes, devices and layouts; left as they are.
        flags: What the caller keeps for the next call: making them takes as long as the check.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for g in gradients:
        values = g.detach() if g.requires_grad else g
        if values.is_sparse:
            values = values.coalesce().values()
        groups.setdefault((values.device, values.dtype), []).append(values)
    known: _Flags = {} if flags is None else flags
    return all(_finite(device, dtype, same, known) for (device, dtype), same in groups.items())


def _finite(device: torch.device, dtype: torch.dtype, same: list[Tensor], flags: _Flags) -> bool:
    if dtype not in _KERNEL:
        return all(bool(values.isfinite().all()) for values in same)
    if device not in flags:
        flags[device] = torch.zeros((), device=device), torch.ones((), device=device)
    found, one = flags[device]
    # The kernel of GradScaler: with a factor of 1 it changes nothing. One call for all takes a third of their norms.
    torch._amp_foreach_non_finite_check_and_unscale_(same, found, one)
    if found.item() == 0:
        return True
    found.zero_()
    return False
