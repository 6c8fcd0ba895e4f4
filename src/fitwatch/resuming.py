"""Resuming the optimizer and the scheduler: whose options hold, and parameter groups that were added in training."""

import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fitwatch.helpers.aliases import StateDict
from fitwatch.helpers.modules import named_parameters

logger = logging.getLogger("fitwatch")

Names = list[list[str | None]]
_Group = Mapping[str, Any]

# Of torch's schedulers: what changes in training, or follows from the learning rates of the optimizer.
_COUNTERS = {
    *("last_epoch", "_step_count", "_is_initial", "_get_lr_called_within_step", "_last_lr", "base_lrs"),
    *("T_cur", "T_i", "best", "mode_worse", "num_bad_epochs", "cooldown_counter"),
}
_OF_SCHEDULERS = {"lr", "initial_lr"}  # keys of a parameter group; also these, if a scheduler cycles the momentum:
_CYCLED = {"momentum", "betas"}


# -- parameter groups --------------------------------------------------------------------------------------------------


def group_names(optimizer: Optimizer, named: Mapping[str, Tensor]) -> Names:
    """Return the names of the parameters in each group; None for one without a name."""
    names = {id(p): name for name, p in named.items()}
    return [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]


def restore_groups(optimizer: Optimizer, saved: Names, content: StateDict, named: Mapping[str, Tensor]) -> None:
    """Give the optimizer the parameters it had, by name: groups may have been added or extended in training.

    Args:
        optimizer: Its groups may hold fewer parameters than those saved, but no others.
        saved: The names in each group, from `group_names`.
        content: The state of the optimizer.
        named: The parameters of the model and the loss.

    Raises:
        ValueError: The groups can't be matched.
    """
    now = group_names(optimizer, named)
    if any(name is None for names in (*saved, *now) for name in names):
        return  # by position, as torch does
    if len(now) > len(saved):
        raise ValueError(f"the optimizer had {len(saved)} parameter groups, and this one has {len(now)}. {_WAY_OUT}")
    for number, (own, names) in enumerate(zip(now, saved, strict=False)):
        if foreign := [name for name in own if name not in names]:
            raise ValueError(
                f"group {number} of the optimizer did not hold {foreign[0]!r}, but {_listed(names)}. {_WAY_OUT}"
            )
    for number, names in enumerate(saved):
        if unknown := [name for name in names if name not in named]:
            raise ValueError(f"group {number} of the optimizer held {unknown[0]!r}, which is not in the model")
        parameters = [named[str(name)] for name in names]
        if number < len(now):
            optimizer.param_groups[number]["params"] = parameters
            continue
        options = {key: value for key, value in content["param_groups"][number].items() if key != "params"}
        given = options.pop("param_names", None)
        optimizer.add_param_group(
            {"params": parameters if given is None else list(zip(given, parameters, strict=True)), **options}
        )


_WAY_OUT = (
    "Create the optimizer with the groups that it started with, in the same order: those added in training are restored"
)


def restore_trainable(model: nn.Module, frozen: Sequence[str]) -> None:
    """Set ``requires_grad`` as it was, since a callback may have changed it; warn of what differs from the script."""
    for trainable in (True, False):
        other = [(n, p) for n, p in named_parameters(model) if (n not in frozen) is trainable is not p.requires_grad]
        for _, p in other:
            p.requires_grad_(trainable)
        if other:
            more = f" and {len(other) - 1} more parameters" if len(other) > 1 else ""
            now = "trainable" if trainable else "frozen"
            logger.warning("resumed with %s%s %s, as in the checkpoint", other[0][0], more, now)


def _listed(names: Sequence[str | None]) -> str:
    return ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# -- options -----------------------------------------------------------------------------------------------------------


def options(groups: Sequence[_Group]) -> list[dict[str, Any]]:
    """Return the options of parameter groups."""
    return [{key: value for key, value in group.items() if key not in ("params", "param_names")} for group in groups]


def optimizer_changes(
    saved: Sequence[_Group], now: Sequence[_Group], *, lr_moved: bool
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the options that differ: name, new and old value.

    The learning rate and the weight decay of group 0 are settings, which are compared elsewhere.

    Args:
        saved: Options of the groups in the checkpoint.
        now: Those of the script.
        lr_moved: Whether a scheduler, or the loop, has changed the learning rate since the start.
    """
    for number, (old, new) in enumerate(zip(saved, now, strict=False)):
        skipped = set(_OF_SCHEDULERS) if lr_moved or not number else {"initial_lr"}
        skipped |= _CYCLED if {"max_momentum", "base_momentum"} & old.keys() else set()
        skipped |= {"weight_decay"} if not number else set()
        if number and lr_moved and "initial_lr" in old and "initial_lr" in new:
            skipped -= {"initial_lr"}
        place = f"optimizer group {number} " if number else "optimizer "
        for key in old:
            if key in new and key not in skipped and not _same(old[key], new[key]):
                yield place + key, new[key], old[key]


def scheduler_changes(scheduler: object, saved: StateDict, now: StateDict) -> Iterator[tuple[str, Any, Any]]:
    """Yield the options that differ: name, new and old value.

    Raises:
        ValueError: A scheduler made of several had others.
    """
    of_torch = type(scheduler).__module__.startswith("torch.")
    named = set(inspect.signature(type(scheduler)).parameters) - {"last_epoch"}
    for key in saved:
        if key not in now or key == "_schedulers":
            continue
        is_option = key not in _COUNTERS if of_torch else key.lstrip("_") in named
        if is_option and not _same(saved[key], now[key]):
            yield f"scheduler {key.lstrip('_')}", now[key], saved[key]
    inner = getattr(scheduler, "_schedulers", [])
    states = saved.get("_schedulers", []), now.get("_schedulers", [])
    if [set(state) for state in states[0]] != [set(state) for state in states[1]]:
        raise ValueError("the schedulers within the scheduler were others: create the same ones, in the same order")
    for part, old, new in zip(inner, *states, strict=True):
        yield from scheduler_changes(part, old, new)


def worded(changes: Iterator[tuple[str, Any, Any]], *, kept: bool) -> list[str]:
    """Describe changes for a warning; ``kept`` says whether the old values hold."""
    return [f"{name} {_shown(new)} (was {_shown(old)}{', which is kept' * kept})" for name, new, old in changes]


def replay(scheduler: Any, saved: StateDict) -> None:
    """Step a fresh scheduler as often as the saved one, so that its own options give the learning rate.

    Raises:
        ValueError: It can't be stepped to there.
    """
    steps, done = _steps(saved), _steps(scheduler.state_dict())
    if steps is None or done is None or done > steps:
        raise ValueError('options_from="script" needs a fresh scheduler of torch, which can be stepped to this point')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimizer has not stepped yet
        for _ in range(steps - done):
            scheduler.step()


def with_own_options(scheduler: ReduceLROnPlateau, saved: StateDict) -> StateDict:
    """Return the saved counters with the scheduler's own options: it can't be replayed without its metric."""
    own = {key: value for key, value in scheduler.state_dict().items() if key not in _COUNTERS}
    return {**saved, **own, "mode_worse": scheduler.mode_worse}


def _steps(state: StateDict) -> int | None:
    if "last_epoch" in state:
        return int(state["last_epoch"])
    inner = state.get("_schedulers")
    return _steps(inner[0]) if inner else None


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _shown(value: Any) -> str:
    if isinstance(value, Counter):  # the milestones of a MultiStepLR
        value = list(value.elements())
    return f"{value.item() if isinstance(value, Tensor) and value.numel() == 1 else value!s:.80}"
