"""Keeps steps with non-finite losses or gradients away from the weights."""

import logging
import math
from collections.abc import Sequence
from typing import Final, TypeGuard

import torch
from torch import Tensor

from fitwatch.data.joining import tensors
from fitwatch.engine.step import by_device_and_dtype
from fitwatch.helpers.aliases import StateDict
from fitwatch.rules.spikes import SpikeRule
from fitwatch.state import State

logger = logging.getLogger("fitwatch")

BUDGET: Final = 50
"""Steps in a row that may be left out; after that training can't be working."""

_Flags = dict[torch.device, tuple[Tensor, Tensor]]  # what the kernel takes: a flag that is 0, and a factor of 1
_LARGEST: Final = 1e300  # a norm beyond all others
_KERNEL = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})

MODES: Final = ("raise", "skip", "spike", "ignore")
"""What ``nonfinite`` takes."""

READ_FREELY = frozenset({"cpu"})
"""Devices where reading a value waits for nothing."""


class Guard:
    """Decides before each step whether its gradients may reach the weights.

    Args:
        state: The state of the fit.
        mode: See `Watch`.

    Attributes:
        raises: Whether a step with non-finite gradients ends the fit.
        skipped: Steps left out in this fit.
    """

    def __init__(self, state: State, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"nonfinite must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
        scales = state.scaler is not None and state.scaler.is_enabled()
        if mode == "spike" and scales:
            raise ValueError('nonfinite="spike" needs the gradients before the GradScaler decides: use bf16 or fp32')
        self._state, self.raises, self._checks = state, mode == "raise", mode != "ignore" and not scales
        self._spikes = SpikeRule() if mode == "spike" else None
        self._flags: _Flags = {}
        self.skipped = self._in_a_row = 0
        self._why = ""  # why the newest step is left out
        self._checked = 0  # the step of the last `check`
        self._good: Tensor | None = None  # on the device: steps before the first bad one, while nothing waits for it

    @property
    def needs_norm(self) -> bool:
        """Whether `rejects` takes the norm of the gradients."""
        return self._spikes is not None

    def rejects(self, norm: Tensor | None, losses: Sequence[Tensor], weights: Sequence[Tensor | float]) -> bool:
        """Return whether the gradients of the complete step, before clipping, must not reach the weights.

        Waits for the device, unless the optimizer leaves the step out there. Under a GradScaler, which checks and
        skips by itself, it is False.

        Args:
            norm: The 2-norm of all gradients, 0-dim, if it is known: a finite one saves the check.
            losses: sum(w l) of each micro-batch, 0-dim. One may be infinite, with finite gradients.
            weights: Its sum(w), each 0-dim or a number.
        """
        if not self._checks:
            return False
        if self._good is not None or self._decides_on_device():
            self._flag_on_device(losses, weights)
            return False
        if self._is_finite(norm, losses, weights):
            spike = self._spikes is not None and norm is not None and self._spikes.update(min(float(norm), _LARGEST))
            self._why = f"the gradient norm {float(norm):.4g} is a spike" if spike and norm is not None else ""
            self._in_a_row = self._in_a_row if spike else 0
            return spike
        self._why = ""
        return True

    def _is_finite(self, norm: Tensor | None, losses: Sequence[Tensor], weights: Sequence[Tensor | float]) -> bool:
        known = norm is not None and math.isfinite(float(norm))
        values = [] if known else self._gradients()
        values += [s for s in (*losses, *weights) if _is_far(s)]  # read together with the gradients
        if not all(_is_far(w) or math.isfinite(w) for w in weights):
            return False
        if not all(_is_far(loss) or math.isfinite(loss) for loss in losses) and self._moves():
            return False
        return all_finite(values, self._flags)

    def _moves(self) -> bool:
        """Return whether any gradient is left: the user may have dropped those of a bad loss."""
        return any(bool((g.coalesce().values() if g.is_sparse else g).any()) for g in self._gradients())

    def error(self, loss: float) -> FloatingPointError:
        """Return the error that names the step, the batch, the parameters and the loss."""
        state, progress = self._state, self._state.progress
        bad = [name for name, p in state.model.named_parameters() if p.grad is not None and not all_finite([p.grad])]
        shown = ", ".join(f"`{name}`" for name in bad[:3]) + (", ..." if len(bad) > 3 else "")
        what = (
            f"non-finite gradients in {len(bad)} parameter{'s' * (len(bad) != 1)} ({shown}); its loss is {loss:.6g}"
            if bad
            else f"finite gradients, and its loss is {loss:.6g}"
            if not math.isfinite(loss)
            else "finite gradients, and the weight of its loss (of a LossSum) is not finite"
        )
        return FloatingPointError(
            f"{self._place} has {what}. The weights are still those of step {progress.step}. {_advice(state.batch)}; "
            'nonfinite="skip" leaves such steps out'
        )

    def check(self) -> None:
        """Raise the error of a step that the optimizer has left out on the device, if there is one. Waits for it.

        Raises:
            FloatingPointError: A gradient since the last check was not finite.
        """
        if self._good is None:
            return
        good = int(self._good)
        found = self._flags[self._good.device][0]
        self._good = torch.zeros_like(self._good)
        if found.item() == 0:
            self._checked = self._state.progress.step
            return
        step = self._checked + good
        raise FloatingPointError(
            f"step {step + 1} had non-finite gradients. It and the steps after it changed nothing: the weights are "
            f"still those of step {step}. The host reads this only when a log window closes, since a fused optimizer "
            "leaves such steps out on the device; without fused=True training stops at the step itself, with its "
            'batch in state.batch; nonfinite="skip" leaves such steps out'
        )

    def close(self) -> None:
        """Take the flag back that the optimizer was given."""
        if self._good is not None:
            self._good = None
            del self._state.optimizer.found_inf  # type: ignore[attr-defined] # set by _flag_on_device

    def leave_out(self, loss: float) -> None:
        """Count a step that is left out.

        Raises:
            FloatingPointError: `BUDGET` steps in a row were left out, since their gradients were not finite.
        """
        self.skipped += 1
        if self.skipped == 1:
            what = f"{self._place}: {self._why}" if self._why else str(self.error(loss)).split(". ")[0]
            logger.warning("%s: it is left out, and train/skipped_steps counts such steps", what)
        self._state.log("train/skipped_steps", self.skipped, reduce="last")
        if not self._why:
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

    def state_dict(self) -> StateDict:
        """Return the counts, and the norms that spikes are compared with."""
        spikes = None if self._spikes is None else self._spikes.state_dict()
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "spikes": spikes}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore what `state_dict` returned."""
        self.skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]
        if self._spikes is not None and state_dict["spikes"] is not None:
            self._spikes.load_state_dict(state_dict["spikes"])

    @property
    def _place(self) -> str:
        progress = self._state.progress
        batch = progress.epoch_batch - 1
        return f"step {progress.step + 1} (epoch {progress.epoch + 1}, batch index {batch})"

    def _gradients(self) -> list[Tensor]:
        gradients = [p.grad for group in self._state.optimizer.param_groups for p in group["params"]]
        return [g for g in gradients if g is not None]

    def _decides_on_device(self) -> bool:
        """Return whether the optimizer can leave a step out on the device, so that the host need not wait for it.

        torch's fused optimizers take the flag of GradScaler. With others it waits once a step, as GradScaler does.
        """
        groups = self._state.optimizer.param_groups
        if not self.raises or not all(group.get("fused") for group in groups):
            return False
        held = {p.device for group in groups for p in group["params"]}
        if len(held) > 1 or held.pop().type in READ_FREELY:
            return False
        return type(self._state.optimizer).__module__.startswith("torch.optim")

    def _flag_on_device(self, losses: Sequence[Tensor], weights: Sequence[Tensor | float]) -> None:
        gradients = [g.detach() for g in self._gradients()]
        if not gradients:
            return
        device = gradients[0].device
        sums = [s.detach() for s in (*losses, *weights) if isinstance(s, Tensor)]
        gradients += [s for s in sums if s.device == device and s.dtype in _KERNEL]
        found, one = _flag(device, self._flags)
        if self._good is None:
            self._good, self._checked = torch.zeros_like(found), self._state.progress.step
            self._state.optimizer.found_inf = found  # type: ignore[attr-defined] # read by torch's fused optimizers
        # The kernel sets the flag and never clears it: after a bad step no later one changes the weights.
        for same in by_device_and_dtype(gradients):
            torch._amp_foreach_non_finite_check_and_unscale_(same, found, one)
        self._good += 1 - found

    def _count(self, why: str) -> None:
        self._in_a_row += 1
        if self._in_a_row >= BUDGET:
            raise FloatingPointError(
                f"the last {BUDGET} steps were left out, since {why}: the weights don't change. Check the inputs, the "
                "loss and the learning rate"
            )


def _advice(batch: object) -> str:
    """Say what to look at, from what the batch of a bad step holds."""
    try:
        held = [t for t in tensors(batch) if t.is_floating_point()]
    except TypeError:  # a container that can't be looked into
        held = []
    for values in held:
        bad = ~values.isfinite()
        if count := int(bad.sum()):
            first = bad.nonzero()[0].tolist()
            return (
                f"{count} of {values.numel()} values in a tensor of shape {tuple(values.shape)} of its last batch "
                f"(state.batch) are not finite, the first at {first}: look at the data"
            )
    where = "the batch (state.batch), " if held else ""
    return f"Look at {where}the learning rate and the loss"


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
    found, one = _flag(device, flags)
    # The kernel of GradScaler: with a factor of 1 it changes nothing. One call for all takes a third of their norms.
    torch._amp_foreach_non_finite_check_and_unscale_(same, found, one)
    if found.item() == 0:
        return True
    found.zero_()
    return False


def _flag(device: torch.device, flags: _Flags) -> tuple[Tensor, Tensor]:
    """Return what the kernel takes on a device, made at the first call."""
    if device not in flags:
        flags[device] = torch.zeros((), device=device), torch.ones((), device=device)
    return flags[device]


def _is_far(value: Tensor | float) -> TypeGuard[Tensor]:
    """Return whether reading a value waits for its device."""
    return isinstance(value, Tensor) and not value.is_cpu
