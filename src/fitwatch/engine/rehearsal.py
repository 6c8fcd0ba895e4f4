"""A validation of a few batches before step 1, so that what fails in it fails at once; it changes nothing."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from fitwatch import ranks
from fitwatch.data import batches
from fitwatch.data.first_batches import first_batches
from fitwatch.data.position import random_states, set_random_states
from fitwatch.helpers.aliases import Batch, Loader
from fitwatch.helpers.expanded import compact
from fitwatch.helpers.rng import rng_state, set_rng_state
from fitwatch.measuring.metrics import Metric
from fitwatch.measuring.validation import NO_BASELINE, Pass
from fitwatch.state import State


def rehearse(
    state: State, loader: Loader, loss: Any, step: Callable[[Batch], object], running: Callable[[Pass], Any]
) -> dict[str, float] | None:
    """Validate up to ``plan.sanity_steps`` batches, and return what was measured; None if that could leave a trace.

    Random generators, buffers and modes are as before afterwards, metrics are copies, and no callback runs.

    Args:
        state: The state of the fit.
        loader: A loader of validation batches.
        loss: The loss that validation measures.
        step: Measures a batch on the device.
        running: Enters a pass, in which ``step`` can measure.
    """
    count = state.plan.sanity_steps
    if ranks.size() > 1 or any(is_lazy(p) for p in state.model.parameters()):
        return None
    saved, sources = rng_state(), random_states(loader)
    try:
        chosen = first_batches(loader, count)
        metrics = _copied(state.validation.metrics)
        if chosen is None or metrics is None:
            return None
        with unchanged_buffers(state.model):
            done = Pass(loss, metrics, NO_BASELINE, classes=state.validation.classes)
            with running(done):
                for batch in chosen:
                    step(batches.move(batch, state.device))
            return done.values()
    except Exception as error:
        _explain(error, count)
        raise
    finally:
        set_rng_state(saved)
        set_random_states(sources, loader)


def _copied(metrics: Mapping[str, Metric]) -> Mapping[str, Metric] | None:
    try:
        return copy.deepcopy(dict(metrics))
    except Exception:  # noqa: BLE001 - such as an open file: the rehearsal is left out
        return None


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the buffers at the end, also those that were replaced."""
    known = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]  # noqa: SLF001
    before = [None if buffer is None else compact(buffer).clone() for _, _, buffer in known]
    try:
        yield
    finally:
        for (module, name, buffer), values in zip(known, before, strict=True):
            module._buffers[name] = buffer  # noqa: SLF001 - setattr would refuse what the module itself may do
            if buffer is not None and values is not None:
                compact(buffer).copy_(values)


def _explain(error: Exception, count: int) -> None:
    """Say once that training has not begun: in the message, or in a note if the message can't be changed."""
    when = f"in a trial validation of {count} batch{'es' * (count > 1)} before step 1"
    if type(error) in (ValueError, TypeError, RuntimeError) and len(error.args) == 1:
        error.args = (f"{when}: {error.args[0]}",)
        error.add_note("the trial shows early what would fail after an epoch; sanity_steps=0 leaves it out")
    else:
        error.add_note(f"raised {when}, which shows early what would fail after an epoch; sanity_steps=0 leaves it out")
