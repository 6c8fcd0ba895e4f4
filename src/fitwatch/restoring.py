"""Restoring all of a training, or nothing of it."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from attrs import asdict
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fitwatch import ranks
from fitwatch.callback import Callbacks
from fitwatch.data.position import Stateful, random_states, set_random_states
from fitwatch.helpers.aliases import StateDict
from fitwatch.helpers.expanded import compact
from fitwatch.helpers.rng import rng_state, set_rng_state
from fitwatch.state import State
from fitwatch.state.history import renamed

_Undo = Callable[[], object]


@contextmanager
def undone_on_failure(state: State, *loaders: object) -> Iterator[None]:
    """Put everything back as it was if the body fails, also by Ctrl-C: no mixture of two trainings is left.

    Args:
        state: The state that the body restores.
        loaders: The training loader, and the others.
    """
    undo = list(_undoing(state, loaders))
    try:
        yield
    except BaseException:
        for back in undo:
            with suppress(Exception):  # of a part of the user's; the others still go back
                back()
        raise


def restore_counters(content: StateDict, state: State) -> None:
    """Restore ``progress``, ``history`` and ``train_loss`` (the sums of all ranks since the last evaluation)."""
    for name, value in content["progress"].items():
        setattr(state.progress, name, value)
    state.history.entries = [{renamed(name): value for name, value in entry.items()} for entry in content["history"]]
    if ranks.rank() == 0:
        since = state.train_loss.since_evaluation
        since.total, since.weight = content["train_loss"]


def _undoing(state: State, loaders: tuple[object, ...]) -> Iterator[_Undo]:
    """Yield functions that put the parts back, the random states last."""
    for module in (state.model, state.loss):
        if isinstance(module, nn.Module):
            yield from _of_module(module)
    yield _of_optimizer(state.optimizer)
    for part in (state.scheduler, state.scaler, state.guard, *(own for own in loaders if isinstance(own, Stateful))):
        if part is not None:
            yield partial(part.load_state_dict, copy.deepcopy(part.state_dict()))
    yield from _of_callbacks(state.callbacks)
    since, progress = state.train_loss.since_evaluation, state.progress
    yield partial(_set, since, {"total": since.total, "weight": since.weight})
    yield partial(_set, progress, asdict(progress))
    yield partial(_set, state, {"fitted": state.fitted})
    yield partial(_set, state.history, {"entries": state.history.entries})
    yield partial(_set, state.position, {"resumed": state.position.resumed, "_random": None})
    yield partial(set_random_states, random_states(*loaders), *loaders)
    yield partial(set_rng_state, rng_state())


def _of_module(module: nn.Module) -> Iterator[_Undo]:
    tensors = [t for t in (*module.parameters(), *module.buffers()) if not is_lazy(t)]
    yield partial(_copy_back, [(compact(t), compact(t).clone()) for t in tensors])
    for part in module.modules():
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            yield partial(part.set_extra_state, copy.deepcopy(part.get_extra_state()))
    for parameter in module.parameters():
        yield partial(parameter.requires_grad_, parameter.requires_grad)


def _copy_back(before: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, value in before:
        tensor.copy_(value)


def _of_optimizer(optimizer: torch.optim.Optimizer) -> _Undo:
    """Torch replaces the state of an optimizer, and changes nothing in it."""
    groups, state = optimizer.param_groups, optimizer.state
    known = [(group, dict(group)) for group in groups]

    def back() -> None:
        for group, content in known:
            group.clear()
            group.update(content)
        groups[:] = [group for group, _ in known]
        optimizer.param_groups, optimizer.state = groups, state

    return back


def _of_callbacks(callbacks: object) -> Iterator[_Undo]:
    """A callback has its state back, and its attributes, which may hold more than the state."""
    for callback in callbacks.callbacks if isinstance(callbacks, Callbacks) else ():
        attributes = dict(vars(callback))
        with suppress(Exception):  # of a callback whose state exists only within a fit
            yield partial(callback.load_state_dict, copy.deepcopy(callback.state_dict()))
        yield partial(_set, callback, attributes)


def _set(target: object, values: dict[str, Any]) -> None:
    for name, value in values.items():
        object.__setattr__(target, name, value)
