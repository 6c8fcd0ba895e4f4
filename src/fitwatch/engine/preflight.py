"""A check of everything that can be checked without training; nothing is changed by it."""

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.parameter import is_lazy

from fitwatch import ranks
from fitwatch.data import batches
from fitwatch.data.counting import exposed_targets
from fitwatch.data.first_batches import first_batches
from fitwatch.data.joining import join, tensors
from fitwatch.data.position import random_states, set_random_states
from fitwatch.engine.checks import Checks, unreached_parameters
from fitwatch.engine.rehearsal import unchanged_buffers
from fitwatch.engine.step import StepGradient, check_options, parameters, refuse_constant, total_norm
from fitwatch.helpers.aliases import Batch, Loader
from fitwatch.helpers.rng import rng_state, set_rng_state
from fitwatch.losses import LossSum
from fitwatch.measuring.metrics import evaluating
from fitwatch.state import State

TrainingStep = Callable[[Batch], tuple[LossSum | Tensor | None, LossSum | None]]
"""Returns what the training step returned, and the same as sums; None twice to leave the batch out."""

_SAME = 1e-3  # relative difference of gradients that rounding can explain, with float32 and a large sum


@frozen
class Report:
    """What `Trainer.check` has found.

    Attributes:
        facts: What was looked at -> what was seen.
        problems: What should be changed, in sentences; empty if nothing was found.
    """

    facts: dict[str, str]
    problems: list[str]

    def __str__(self) -> str:
        width = max(map(len, self.facts))
        lines = [f"{name:<{width}}  {text}" for name, text in self.facts.items()]
        found = [f"- {problem}" for problem in self.problems] or ["nothing found"]
        return "\n".join([*lines, "problems:", *found])


def preflight(state: State, checks: Checks, step: TrainingStep, rehearse: Callable[[], dict[str, float]]) -> Report:
    """Check a fit that has not started.

    Args:
        state: Its state.
        checks: Looks at the optimizer, the loaders and the first batch.
        step: The training step.
        rehearse: Validates the first batches, and returns what was measured.
    """
    check_options(state.optimizer)
    checks.before_training()
    held = parameters(state.optimizer)
    facts = {
        "parameters": f"{_count(p for p in held if p.requires_grad):,} of "
        f"{_count(state.model.parameters()):,} are trained",
        "training": _described(state.train_loader),
    }
    if state.val_loader is not None:
        facts["validation"] = _described(state.val_loader)
        measured = rehearse()
        shown = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
        facts["trial"] = shown or "not validated: reading batches of this loader could leave a trace"
    facts["gradient"] = _gradients(state, checks, step)
    facts |= _folders(state.callbacks)
    return Report(facts, list(dict.fromkeys(checks.found)))


def _described(loader: Loader | None) -> str:
    """Describe the batches of a loader, and its targets if reading them costs nothing."""
    length = batches.length(loader)
    text = "unknown length" if length is None else f"{length:,} batch{'es' * (length != 1)}"
    known = exposed_targets(loader) if hasattr(loader, "dataset") else None
    if known is None or not known[0].numel():
        return text
    targets = known[0]
    if targets.is_floating_point() or targets.is_complex():
        finite = targets.isfinite()
        low, high = targets[finite].aminmax() if bool(finite.any()) else (torch.nan, torch.nan)
        bad = "" if bool(finite.all()) else f", {int((~finite).sum())} not finite"
        values = f"from {float(low):.4g} to {float(high):.4g}{bad}"
        return f"{text}; targets {tuple(targets.shape)} {targets.dtype}, {values}"
    labels, counts = torch.unique(targets, return_counts=True)
    some = [f"{v}: {n:,}" for v, n in zip(labels[:10].tolist(), counts[:10].tolist(), strict=True)]
    more = ", ..." if len(labels) > 10 else ""
    return f"{text}; targets {tuple(targets.shape)} {targets.dtype}, label: count {{{', '.join(some)}{more}}}"


def _count(held: Iterable[Tensor]) -> int:
    """Return the number of values in parameters, without those that have no shape yet."""
    return sum(p.numel() for p in held if not is_lazy(p))


def _gradients(state: State, checks: Checks, step: TrainingStep) -> str:
    """Compare the gradient of a step in micro-batches with that of one large batch, in eval mode."""
    lazy = any(is_lazy(p) for p in state.model.parameters())
    if lazy or ranks.size() > 1:
        why = "the first batch would give the lazy parameters their shapes" if lazy else "there are several ranks"
        return f"not compared: {why}"
    count = max(2, state.plan.accumulate)
    saved, sources = rng_state(), random_states(state.train_loader)
    try:
        chosen = first_batches(state.train_loader, count)
        if chosen is None:
            return "not compared: reading batches of this loader could leave a trace"
        read = [batches.move(batch, state.device) for batch in chosen]
        with _without_trace(state):
            parts = _step_gradient(state, step, read)
            if (text := _unusable(state, read)) is not None:
                checks.found.append(text)
                return "not compared"
            checks.found += [text] if (text := unreached_parameters(state.model, state.optimizer)) else []
            norm = float(total_norm(parameters(state.optimizer)))
            if len(read) < 2:
                return f"norm {norm:.4g}"
            try:
                joined = join(read, "the batches")
            except ValueError as error:
                return f"norm {norm:.4g}; not compared with one large batch: {error}"
            whole = _step_gradient(state, step, [joined])
    finally:
        set_rng_state(saved)
        set_random_states(sources, state.train_loader)
    gap = float((parts - whole).norm() / whole.norm().clamp_min(1e-30))
    if gap > _SAME:
        checks.found.append(
            f"the gradient of {len(read)} micro-batches differs from that of one large batch by {gap:.2g} of its norm: "
            "the loss of an example depends on the others in its batch, or training_step returns a mean whose weights "
            "differ between batches. Return a LossSum (compute_loss does) for an exact step"
        )
    return f"norm {norm:.4g} in eval mode; {len(read)} micro-batches and one large batch differ by {gap:.1g}"


def _unusable(state: State, read: Sequence[Batch]) -> str | None:
    """Return why no step can be taken with the gradients of these batches; None if one can."""
    held = parameters(state.optimizer)
    if all(p.grad is None for p in held):
        return f"training_step returned None for the first {len(read)} batches: nothing is trained"
    if math.isfinite(float(total_norm(held))):
        return None
    return f"the gradient of the first {len(read)} batches is not finite, where a fit would end: {_advice(read)}"


def _advice(read: Sequence[Batch]) -> str:
    for number, batch in enumerate(read):
        with suppress(TypeError):  # of a container that can't be looked into
            if not all(bool(t.isfinite().all()) for t in tensors(batch) if t.is_floating_point()):
                return f"batch index {number} holds values that are not finite. Look at the data"
    return "look at the weights and the loss"


def _step_gradient(state: State, step: TrainingStep, read: Sequence[Batch]) -> Tensor:
    """Leave the gradient of one step over batches in the parameters, and return it as one float64 vector."""
    for p in parameters(state.optimizer):
        p.grad = None
    gradient = StepGradient(state.optimizer, len(read), None)
    for batch in read:
        state.batch = batch
        loss, sums = step(batch)
        if loss is None or sums is None:
            gradient.skip()
            continue
        total = loss if isinstance(loss, Tensor) else sums.total
        if not total.requires_grad:
            refuse_constant(state.model)
        gradient.backward(total, sums.weight, is_mean=not isinstance(loss, LossSum))
    gradient.finish()
    values = [p.grad for p in parameters(state.optimizer) if p.grad is not None]
    dense = [(g.to_dense() if g.is_sparse else g).detach().double().flatten().cpu() for g in values]
    return torch.cat(dense) if dense else torch.zeros(1, dtype=torch.float64)


@contextmanager
def _without_trace(state: State) -> Iterator[None]:
    """Compute in eval mode with gradients; afterwards gradients, buffers and modes are as before."""
    before, batch = [(p, p.grad) for p in parameters(state.optimizer)], state.batch
    try:
        with unchanged_buffers(state.model), evaluating(state.model), torch.enable_grad():
            yield
    finally:
        state.batch = batch
        for p, gradient in before:
            p.grad = gradient


def _folders(callbacks: object) -> dict[str, str]:
    """Write and remove a file in the folder of each callback that has one, or in the folder above it."""
    facts: dict[str, str] = {}
    for callback in getattr(callbacks, "callbacks", []):
        folder, name = getattr(callback, "dir", None), type(callback).__name__
        if not isinstance(folder, Path):
            continue
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        try:
            descriptor, path = tempfile.mkstemp(dir=existing)
            os.close(descriptor)
            Path(path).unlink()
        except OSError as error:
            raise OSError(f"{name} can't write to {folder}: {error}") from error
        facts[name] = f"can write to {folder}"
    return facts
