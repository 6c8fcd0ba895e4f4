"""Gradient norms, in total and per layer."""

import torch
from attrs import define, field
from torch import Tensor

from fitwatch._options import instance, integer
from fitwatch.callback import Callback
from fitwatch.checkpoint import unwrap
from fitwatch.gradients import parameters
from fitwatch.state import State


@define(eq=False, slots=False)
class GradientNorm(Callback):
    """Logs the 2-norm of the gradients, of the whole step and before clipping.

    Reads the parameters that the optimizer holds. Logs ``train/optim/grad_norm`` and ``train/optim/grad_norm_max``, the
    mean and the maximum over the log window, and ``train/params/grad_norm/<layer>``, the mean over the window per
    module. Norms of float16 and bfloat16 gradients are taken in float32. A parameter without a gradient counts as 0.
    Nothing is read back within the step.

    Args:
        every: Steps between two readings. At 1, the default, no spike escapes ``grad_norm_max``.
        per_layer: Whether to log the norm of each module's own parameters too.
    """

    every: int = field(default=1, kw_only=True, validator=integer(1))
    per_layer: bool = field(default=True, kw_only=True, validator=instance(bool))

    def on_fit_start(self, state: State) -> None:
        """Group the parameters by layer."""
        self._group(state)

    def on_epoch_start(self, state: State) -> None:
        """Group them anew: layers may have been frozen or given to the optimizer in between."""
        self._group(state)

    def _group(self, state: State) -> None:
        # Only what the optimizer moves: nobody clears the gradients of the others.
        moved = {id(p) for p in parameters(state.optimizer) if p.requires_grad}
        named = [(name, p) for name, p in unwrap(state.model).named_parameters() if id(p) in moved]
        self._parameters = [p for _, p in named]
        layers = [name.rpartition(".")[0] or name for name, _ in named]
        unique = list(dict.fromkeys(layers)) if self.per_layer else []
        self._names: tuple[str, ...] = (
            "train/optim/grad_norm",
            "train/optim/grad_norm_max",
            *(f"train/params/grad_norm/{layer}" for layer in unique),
        )
        # member[i, j]: whether parameter i belongs to layer j
        self._member = torch.tensor([[layer == name for name in unique] for layer in layers], device=state.device)
        self._zero = torch.zeros((), device=state.device)

    def on_gradients_ready(self, state: State) -> None:
        """Take the norms; they stay on the device."""
        if self.every > 1 and (state.progress.step + 1) % self.every:
            return
        gradients = [p.grad for p in self._parameters]
        if gradients:
            state.log(self._names, torch.stack(self._norms(gradients)), reduce=self._summary)

    def _norms(self, gradients: list[Tensor | None]) -> list[Tensor]:
        dense = [g for g in gradients if g is not None and not g.is_sparse]
        kinds = {(g.dtype, g.device) for g in dense}
        if len(dense) == len(gradients) and len(kinds) == 1 and dense[0].dtype in (torch.float32, torch.float64):
            return list(torch._foreach_norm(dense))  # noqa: SLF001 - one kernel for all
        norms = []
        for gradient in gradients:
            if gradient is None:
                norms.append(self._zero)
                continue
            values = gradient.coalesce().values() if gradient.is_sparse else gradient
            wide = torch.float64 if values.dtype == torch.float64 else torch.float32
            norms.append(torch.linalg.vector_norm(values, dtype=wide).to(self._zero.device))
        return norms

    def _summary(self, norms: Tensor) -> Tensor:
        """From norms by step and parameter, (steps, parameters), to one number for each name."""
        total = torch.linalg.vector_norm(norms, dim=1)
        parts = [total.mean().reshape(1), total.amax().reshape(1)]
        if self.per_layer:
            member = self._member.to(norms.dtype)
            # Relative to the largest: squares of tiny or huge norms must not leave the range.
            scale = norms.amax(1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)
            parts.append((((norms / scale).square() @ member).sqrt() * scale).mean(0))
        return torch.cat(parts)
