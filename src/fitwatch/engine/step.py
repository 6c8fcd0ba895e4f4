"""The gradient of a step: sums over micro-batches and ranks, divided once by the weight of everything in them."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, Final, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fitwatch import ranks
from fitwatch.helpers.dtypes import wide_float

_SKIPPED: Final = 0.0  # the weight of a micro-batch that is left out, known by identity


class StepGradient:
    """Accumulates the gradient of sum(w l) / sum(w) over the micro-batches of a step, and over all ranks.

    Args:
        optimizer: Holds the parameters.
        accumulate: Micro-batches per step and rank. The gradient of a single one is divided at the start of the
            backward pass; otherwise the accumulated gradients are divided once, by the total weight.
        scaler: The GradScaler under fp16.

    Attributes:
        weights: sum(w) of each micro-batch of the current step so far.
        awaits_backward: Whether ``backward()`` has not reached the last `scalar`; watched under accumulation only.
    """

    def __init__(self, optimizer: Optimizer, accumulate: int, scaler: torch.amp.GradScaler | None) -> None:
        self.optimizer, self.accumulate, self.scaler = optimizer, accumulate, scaler
        self.weights: list[Tensor | float] = []
        self._single = accumulate == 1 and ranks.size() == 1
        self._guess: Tensor | float | None = None  # of the weight of a step, where fp16 needs one
        self.awaits_backward = False
        self._scale_checked = False

    def backward(self, loss: Tensor, weight: Tensor | float, *, is_mean: bool) -> None:
        """Add the gradient of a micro-batch: ``loss`` is its sum(w l), or with ``is_mean`` its weighted mean."""
        factor = self._factor(loss, weight, is_mean=is_mean)
        if self.scaler is not None:
            factor = self.scaler.scale(torch.ones_like(loss) if factor is None else factor)
        run_backward(loss, factor)

    def scalar(self, loss: Tensor, weight: Tensor | float, *, is_mean: bool) -> Tensor:
        """Return the scalar whose ``backward()`` adds the gradient of a micro-batch; its value is the mean loss.

        The caller scales it if there is a GradScaler.
        """
        factor = self._factor(loss, weight, is_mean=is_mean)
        if self._single:
            return loss if factor is None else loss * factor
        mean = loss.detach() if is_mean else loss.detach() * inverse(weight, loss)
        self.awaits_backward = True
        scaled: Tensor = _ScaledGradient.apply(loss, mean, factor, self._reached)  # type: ignore[no-untyped-call] # torch's
        return scaled.as_subclass(_StepLoss)

    def _reached(self, gradient: Tensor) -> None:
        """The backward pass has reached a `scalar`, with this gradient."""
        self.awaits_backward = False
        if len(self.weights) > 1 and all(p.grad is None for p in parameters(self.optimizer)):
            raise RuntimeError(
                "the gradients of the micro-batches before this one are gone: call optimizer.zero_grad() only after "
                "optimizer.step(), not before each batch"
            )
        if not self._scale_checked:  # once an epoch: it waits for the device
            self._scale_checked = True
            expected = 1.0 if self.scaler is None else self.scaler.get_scale()
            if gradient.item() != expected:
                raise RuntimeError(
                    f"the loss of watch.loss(...) was multiplied by {gradient.item() / expected:g} before backward(): "
                    "with accumulate above 1 call backward() on it directly, since the gradients are divided once, "
                    "before the step"
                )

    def skip(self) -> None:
        """Count a micro-batch that is left out, or that only other ranks have."""
        self.weights.append(_SKIPPED)
        if self.scaler is not None and not self._single:
            self._agreed_guess(0.0)

    @property
    def summed(self) -> int:
        """Micro-batches of the current step that were not left out."""
        return sum(weight is not _SKIPPED for weight in self.weights)

    def drop_empty(self) -> None:
        """Forget a step all of whose micro-batches were left out; other ranks may have some."""
        if ranks.size() == 1 and all(weight is _SKIPPED for weight in self.weights):
            self.weights, self._guess = [], None

    def _factor(self, loss: Tensor, weight: Tensor | float, *, is_mean: bool) -> Tensor | None:
        """Return the factor for the gradient of ``loss`` in the backward pass; None for 1."""
        self.weights.append(weight)
        factor: Tensor | None = None
        if self._single:
            # A mean stays unchanged: bit-identical to a plain loop.
            return None if is_mean else inverse(weight, loss)
        if is_mean:
            factor = torch.ones_like(loss) * weight
        if self.scaler is not None:  # sums would overflow float16: divide by a guess, which finish() corrects
            factor = (torch.ones_like(loss) if factor is None else factor) * inverse(self._agreed_guess(weight), loss)
        return factor

    def _agreed_guess(self, weight: Tensor | float) -> Tensor | float:
        """Return the guess, made from the first micro-batch of every rank; all ranks call it together."""
        if self._guess is None:
            held = parameters(self.optimizer)
            self._guess = _positive(ranks.total([weight], held[0]) * self.accumulate)
        return self._guess

    def finish(self, *, unscale: bool = True) -> None:
        """Turn the accumulated gradients into the unscaled gradient of the fraction.

        Args:
            unscale: Whether the GradScaler, if there is one, has not unscaled the gradients yet.
        """
        weights, self.weights = self.weights, []
        if self._single:
            if self.scaler is not None and unscale:
                self.scaler.unscale_(self.optimizer)
            return
        held = parameters(self.optimizer)
        ranks.add_gradients(held)
        if self.scaler is not None and unscale:
            self.scaler.unscale_(self.optimizer)
        total = ranks.total(weights, held[0])
        gradients = [p.grad for p in held if p.grad is not None]
        if not gradients:
            return
        # In a wide dtype: that of the first gradient may be less precise than the others'.
        factor = inverse(total, gradients[0].new_empty((), dtype=wide_float(gradients[0].device)))
        if self._guess is not None:
            factor = factor * self._guess
            self._guess = _positive(total)
        for same in by_device_and_dtype(gradients):
            torch._foreach_mul_(same, factor.to(same[0]))  # one kernel for all, as in torch's clipping


class _StepLoss(Tensor):
    """The loss of one of several micro-batches: adding to it would add to a gradient that is not divided yet."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.__name__ in _ADDITIONS:
            raise RuntimeError(
                "with accumulate above 1 nothing can be added to the loss of watch.loss(...): add a penalty, or "
                "another loss of the batch, with watch.backward(watch.sums(...) + penalty)"
            )
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - torch documents no other way
            return func(*args, **(kwargs or {}))


_ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__rsub__", "rsub"})


class _ScaledGradient(torch.autograd.Function):
    """A given value, with the gradient of ``loss`` times ``factor``; the backward pass calls ``reached``."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,  # noqa: ARG004 - its gradient is what this is about
        value: Tensor,
        factor: Tensor | None,
        reached: Callable[[Tensor], None],
    ) -> Tensor:
        ctx.factor, ctx.reached = factor, reached
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        ctx.reached(gradient)
        return (gradient if ctx.factor is None else gradient * ctx.factor), None, None, None


def run_backward(loss: Tensor, factor: Tensor | None) -> None:
    """Run the backward pass of ``loss``, 0-dim, with ``factor`` as its gradient; None for 1.

    `torch.autograd.backward` spends 10 to 20 % of a small step on checks of shapes and subclasses before it calls the
    engine. A plain scalar with a plain factor needs none of them.
    """
    if factor is None and not loss.dim():
        factor = _scalar(1.0, loss.dtype, loss.device)
    if type(loss) is not Tensor or type(factor) is not Tensor or loss.dim():
        torch.autograd.backward(loss, factor)
    else:
        _engine.run_backward((loss,), (factor,), False, False, (), allow_unreachable=True, accumulate_grad=True)


# The call at the end of torch.autograd.backward. torch documents no other way to it.
_engine = torch.autograd.Variable._execution_engine  # noqa: SLF001


def step_optimizer(optimizer: Optimizer, scaler: torch.amp.GradScaler | None) -> bool:
    """Step the optimizer and clear the gradients; return False if the scaler skipped the step (overflow)."""
    stepped = True
    if scaler is not None:
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        stepped = scaler.get_scale() >= before
    else:
        optimizer.step()
    zero_grad(optimizer)
    return stepped


def total_norm(held: list[Tensor]) -> Tensor:
    """Return the 2-norm of all gradients, 0-dim, sparse ones included; rows that occur twice are summed in place."""
    gradients = [p.grad for p in held if p.grad is not None]
    if any(g.is_sparse for g in gradients):  # torch takes no norm of these: take that of their values
        for p in held:
            if p.grad is not None and p.grad.is_sparse:
                p.grad = p.grad.coalesce()
        gradients = [p.grad.values() if p.grad.is_sparse else p.grad for p in held if p.grad is not None]
    return nn.utils.get_total_norm(gradients)


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """Return all parameters in the optimizer's groups, which may change during training."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def check_options(optimizer: Optimizer) -> None:
    """Raise a ValueError if an option of a parameter group is not finite, or a learning rate is negative."""
    for number, group in enumerate(optimizer.param_groups):
        for name, value in group.items():
            if name == "params":
                continue
            for part in value if isinstance(value, (tuple, list)) else [value]:
                single = isinstance(part, float) or (isinstance(part, Tensor) and part.numel() == 1)
                if single and (not math.isfinite(part) or (name == "lr" and part < 0)):
                    raise ValueError(
                        f"the optimizer's {name} must be finite{' and at least 0' if name == 'lr' else ''}, got "
                        f"{value!r} in parameter group {number}"
                    )


def refuse_rate(rate: float, when: str) -> NoReturn:
    """Raise the ValueError for a learning rate that a scheduler, or a callback, has set in training."""
    raise ValueError(
        f"the learning rate is {rate} {when}: it must be finite and at least 0; look at the scheduler and its options"
    )


def refuse_constant(model: nn.Module, hint: str = "") -> NoReturn:
    """Raise the RuntimeError for a loss that no parameter has a part in."""
    if not any(p.requires_grad for p in model.parameters()):
        why = "all parameters of the model are frozen: set requires_grad_(True) for those to train"
    elif not torch.is_grad_enabled():
        why = f"it was computed under torch.no_grad(){hint}"
    else:
        why = f"the outputs were detached (detach(), .data, item(), NumPy) before the loss, or have no parameters{hint}"
    raise RuntimeError(f"the training loss has no gradient: {why}")


def needs_closure(optimizer: Optimizer) -> bool:
    """Return whether ``step`` has a required argument, as that of `LBFGS`."""
    try:
        given = list(inspect.signature(type(optimizer).step).parameters.values())[1:]  # without self
    except (TypeError, ValueError):
        return False
    return any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in given)


def inverse(weight: Tensor | float, like: Tensor) -> Tensor:
    """Return 1 / weight with the dtype and device of ``like``; 0 for weight 0: no weight, no gradient."""
    if isinstance(weight, Tensor):
        if not weight.is_cpu:  # reading the value would wait for the device
            weight = weight.to(like.dtype)
            return torch.where(weight == 0, 0, 1 / weight)
        weight = weight.item()
    return _scalar(1 / weight if weight else 0.0, like.dtype, like.device)


@lru_cache(maxsize=64)
def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Without class weights the batches share these scalars; creating one takes 5 % of a small step.
    return torch.full((), value, dtype=dtype, device=device)


def _positive(weight: Tensor | float) -> Tensor | float:
    """Return the nearest power of two, 1 for 0: dividing by it loses no bit, so any guess gives the same result."""
    if isinstance(weight, Tensor):
        return torch.where(weight > 0, torch.exp2(torch.round(torch.log2(weight.clamp_min(1e-30)))), 1)
    return float(2.0 ** round(math.log2(weight))) if weight else 1.0


def zero_grad(optimizer: Optimizer) -> None:
    """Clear the gradients; torch's own ``zero_grad`` spends 5 % of a small step on a profiler range."""
    if type(optimizer).zero_grad is not Optimizer.zero_grad:
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


def by_device_and_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return the tensors in lists for torch's kernels, which take one device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for t in tensors:
        groups.setdefault((t.device, t.dtype), []).append(t)
    return list(groups.values())
