"""Whether what a checkpoint holds is what `saving.save` wrote, and fits a training, before any of it is used."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import NoReturn

from attrs import fields_dict
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Adafactor, Optimizer

from fitwatch import ranks
from fitwatch.callback import Callbacks
from fitwatch.data.position import random_states
from fitwatch.helpers import modules
from fitwatch.helpers.aliases import StateDict
from fitwatch.state import State
from fitwatch.state.progress import Progress

_MOST = 2**53  # of a counter: larger ones are not exact as a float, which a metric of the history is

_KINDS: dict[str, type | tuple[type, ...]] = {
    "model": dict,
    "trained": (dict, NoneType),
    "loss": dict,
    "optimizer": dict,
    "scheduler": (dict, NoneType),
    "scaler": (dict, NoneType),
    "groups": list,
    "frozen": list,
    "generators": list,
    "callbacks": dict,
    "guard": dict,
    "calibration": (dict, NoneType),
    "settings": dict,
    "progress": dict,
    "history": list,
    "train_loss": list,
    "rng": dict,
    "position": (dict, NoneType),
    "other_ranks": list,
}
_ADDED = ("groups", "frozen", "guard", "calibration")  # after the first files of format 2


class _Wrong(Exception):  # noqa: N818 - never leaves this module
    """A key, and what is wrong with its value."""


def check(
    path: Path, content: StateDict, state: State, *, named: Mapping[str, Tensor], loss: Mapping[str, Tensor]
) -> None:
    """Check all that can be checked without using it.

    Args:
        path: The file, for the message.
        content: What it holds.
        state: The state that is to be restored.
        named: The parameters of the model and the loss by name.
        loss: Those of the loss.

    Raises:
        ValueError: A value is not what a save writes, or does not fit; the message names the file and the key.
    """
    try:
        _check_kinds(content)
        _check_progress(content)
        _check_history(content)
        _check_lists(content)
        _check_place(content, state)
    except _Wrong as error:
        raise ValueError(f"{path} is not a valid checkpoint: {error}") from None
    _check_parts(path, content, state)
    try:
        own = modules.weights(state.model)
        for key in ("model", "trained"):
            if content[key] is not None and not _translates(state):
                names = modules.plain_names(modules.unwrap(state.model), content[key])
                _check_weights(key, dict(zip(names, content[key].values(), strict=True)), own, strict=True)
        _check_weights("loss", content["loss"], loss, strict=False)
        if missing := [name for name in loss if name not in content["loss"]]:
            _refuse(f"loss[{missing[0]!r}]", "is missing, and the loss has this parameter")
        _check_optimizer(content, state.optimizer, named)
        if state.scheduler is not None and type(state.scheduler).__module__.startswith("torch."):
            _check_scheduler("scheduler", content["scheduler"], state.scheduler.state_dict())
        if content["scaler"]:
            _check_scaler(content["scaler"])
        _check_guard(content.get("guard") or {}, state)
        if isinstance(state.callbacks, Callbacks):
            _check_callbacks(content["callbacks"], state.callbacks, {} if _translates(state) else own)
    except _Wrong as error:
        raise ValueError(f"{path} does not fit this training: {error}") from None


def _refuse(key: str, what: str) -> NoReturn:
    raise _Wrong(f"{key} {what}")


def _must(key: str, value: object, what: str, *, holds: bool) -> None:
    if not holds:
        _refuse(key, f"must be {what}, got {value!r:.80}")


def _check_kinds(content: StateDict) -> None:
    for key, kind in _KINDS.items():
        if key in _ADDED and key not in content:
            continue
        what = "a list" if kind is list else "a dict" if kind is dict else "a dict or None"
        _must(key, content.get(key), what, holds=key in content and isinstance(content[key], kind))


# -- counters and lists ------------------------------------------------------------------------------------------------


def _check_progress(content: StateDict) -> None:
    progress = content["progress"]
    for name in {**fields_dict(Progress), **progress}:
        _must(f"progress[{name!r}]", progress.get(name), "a known counter", holds=name in fields_dict(Progress))
        _check_counter(f"progress[{name!r}]", progress.get(name))
    for less, more in (("epoch_step", "step"), ("first_step", "step"), ("first_epoch", "epoch")):
        what = f"at most progress[{more!r}], {progress[more]}"
        _must(f"progress[{less!r}]", progress[less], what, holds=progress[less] <= progress[more])


def _check_counter(key: str, value: object) -> None:
    """Counters become names of files and steps of curves."""
    holds = type(value) is int and 0 <= value <= _MOST
    _must(key, value, f"a counter from 0 to {_MOST}", holds=holds)


def _check_history(content: StateDict) -> None:
    for number, entry in enumerate(content["history"]):
        place = f"history[{number}]"
        _must(place, entry, "a dict", holds=isinstance(entry, dict))
        for name in ("epoch", "step"):
            _check_counter(f"{place}[{name!r}]", entry.get(name))
        for name, value in entry.items():
            _must(f"{place}[{name!r}]", value, "a number", holds=isinstance(name, str) and _is_number(value))


def _check_lists(content: StateDict) -> None:
    sums = content["train_loss"]
    _must("train_loss", sums, "two numbers", holds=len(sums) == 2 and all(map(_is_number, sums)))
    _must("frozen", content.get("frozen"), "names", holds=_are(str, content.get("frozen", [])))
    for name, value in content["settings"].items():
        _must(f"settings[{name!r}]", value, "a string", holds=isinstance(name, str) and isinstance(value, str))
    for number, names in enumerate(content.get("groups", [])):
        holds = isinstance(names, list) and _are((str, NoneType), names)
        _must(f"groups[{number}]", names, "a list of names", holds=holds)


def _check_place(content: StateDict, state: State) -> None:
    """Check the random states, and the places in the loaders, of all ranks."""
    for number, other in enumerate(content["other_ranks"], 1):
        key = f"other_ranks[{number - 1}]"
        holds = isinstance(other, dict) and {"rng", "generators", "position"} <= other.keys()
        _must(key, other, "a dict of rng, generators and position", holds=holds)
    known = {"train_loader", "val_loader", *state.val_loaders}
    for key, own in (("", content), *((f"other_ranks[{k}].", o) for k, o in enumerate(content["other_ranks"]))):
        _check_rng(f"{key}rng", own["rng"])
        position = own["position"]
        if position is None:
            continue
        holds = isinstance(position, dict) and {"started", "loader", "live"} <= position.keys()
        _must(f"{key}position", position, "a dict of started, loader and live", holds=holds)
        live = position["live"]
        holds = isinstance(live, list) and all(isinstance(n, str) and n in known for n in live)
        _must(f"{key}position['live']", live, f"names of {', '.join(sorted(known))}", holds=holds)
        started = position["started"]
        if started is not None:
            holds = isinstance(started, dict) and isinstance(started.get("sources"), list)
            _must(f"{key}position['started']", started, "random states", holds=holds)
            live_workers = started.get("live")
            _must(f"{key}position['started']['live']", live_workers, "True or False", holds=type(live_workers) is bool)
            _check_rng(f"{key}position['started']['rng']", started.get("rng"))


def _check_rng(key: str, rng: object) -> None:
    _must(key, rng, "random states of torch and python", holds=isinstance(rng, dict) and {"torch", "python"} <= {*rng})


def _are(kind: type | tuple[type, ...], values: Iterable[object]) -> bool:
    return all(isinstance(value, kind) for value in values)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# -- weights, optimizer, scheduler -------------------------------------------------------------------------------------


def _translates(state: State) -> bool:
    """Return whether a module reads names or shapes other than its own: then only loading shows what fits."""
    return any(
        m._load_state_dict_pre_hooks  # noqa: SLF001 - torch has no other way to ask
        or not type(m)._load_from_state_dict.__module__.startswith("torch.")  # noqa: SLF001 - as above
        for m in state.model.modules()
    )


def _check_weights(key: str, saved: StateDict, own: Mapping[str, object], *, strict: bool) -> None:
    """Check shapes and dtypes; with ``strict`` the names too."""
    if strict:
        if missing := [name for name in own if name not in saved]:
            _refuse(f"{key}[{missing[0]!r}]", "is missing, and the model has it")
        if unknown := [name for name in saved if name not in own]:
            _refuse(f"{key}[{unknown[0]!r}]", "is not in the model")
    for name, value in saved.items():
        here = own.get(name)
        # What a module keeps as its extra state is its own, and a lazy parameter has no shape yet.
        if not isinstance(here, Tensor) or is_lazy(here) or name.endswith("_extra_state"):
            continue
        _must(f"{key}[{name!r}]", value, "a tensor", holds=isinstance(value, Tensor))
        if value.shape != here.shape:
            _refuse(f"{key}[{name!r}]", f"has the shape {tuple(value.shape)}, and here it is {tuple(here.shape)}")
        if value.dtype != here.dtype:
            _refuse(f"{key}[{name!r}]", f"is {value.dtype}, and here it is {here.dtype}")


def _check_optimizer(content: StateDict, optimizer: Optimizer, named: Mapping[str, Tensor]) -> None:
    if type(optimizer).state_dict is not Optimizer.state_dict:
        return  # its content is its own
    saved = content["optimizer"]
    groups, states = saved.get("param_groups"), saved.get("state")
    _must("optimizer['state']", states, "a dict", holds=isinstance(states, dict))
    holds = isinstance(groups, list) and bool(groups) and _are(dict, groups)
    _must("optimizer['param_groups']", groups, "a list of dicts", holds=holds)
    numbers = [number for group in groups for number in _numbers_of(group)]
    holds = len({*numbers}) == len(numbers)
    _must("optimizer['param_groups']", numbers, "of different params", holds=holds)
    names = content.get("groups", [])
    if names:
        sizes, kept = [len(g["params"]) for g in groups], [len(n) for n in names]
        _must("groups", kept, f"as long as those of the optimizer, {sizes}", holds=sizes == kept)
    for number, group in enumerate(groups):
        own = optimizer.param_groups[number] if number < len(optimizer.param_groups) else optimizer.defaults
        _check_options(f"optimizer['param_groups'][{number}]", group, own)
    found = dict(zip(numbers, (named.get(str(n)) for group in names for n in group), strict=False))
    for number, values in states.items():
        key = f"optimizer['state'][{number!r}]"
        if isinstance(number, int):  # else of the optimizer as a whole
            _must(key, number, "that of a parameter", holds=number in {*numbers})
            _must(key, values, "a dict", holds=isinstance(values, dict))
            _check_moments(key, values, found.get(number), optimizer)


def _numbers_of(group: StateDict) -> list[int]:
    numbers = group.get("params")
    holds = isinstance(numbers, list) and all(type(n) is int for n in numbers)
    _must("optimizer['param_groups']['params']", numbers, "a list of numbers", holds=holds)
    return list(group["params"])


def _check_options(place: str, saved: StateDict, own: Mapping[str, object]) -> None:
    """Check that options are of the same kind as here, and that numbers are finite, and no learning rate negative."""
    for name, here in own.items():
        if name == "params" or (name not in saved and name != "lr"):
            continue
        key, value = f"{place}[{name!r}]", saved.get(name)
        if name == "lr":
            holds = math.isfinite(_as_float(value)) and _as_float(value) >= 0
            _must(key, value, "finite, and 0 or more", holds=holds)
        elif isinstance(here, (tuple, list)) and all(map(_is_scalar, here)):
            holds = isinstance(value, (tuple, list)) and len(value) == len(here) and all(map(_is_finite, value))
            _must(key, value, f"{len(here)} finite numbers", holds=holds)
        elif isinstance(here, bool):
            _must(key, value, "True, False or None", holds=isinstance(value, (bool, NoneType)))
        elif _is_scalar(here):
            _must(key, value, "a finite number", holds=_is_finite(value))


def _is_scalar(value: object) -> bool:
    return _is_number(value) or (isinstance(value, Tensor) and value.numel() == 1)


def _is_finite(value: object) -> bool:
    return math.isfinite(_as_float(value)) and not isinstance(value, bool)


def _check_moments(key: str, values: StateDict, parameter: Tensor | None, optimizer: Optimizer) -> None:
    """The state of torch's optimizers has one value, or one for each weight; only Adafactor has others."""
    if not type(optimizer).__module__.startswith("torch.optim"):
        return
    for name, value in values.items():
        if name == "step":
            count = _as_float(value)
            _must(f"{key}['step']", value, "a counter", holds=0 <= count <= _MOST and count == int(count))
        elif value is None and name == "momentum_buffer":  # of SGD, before its first momentum
            continue
        elif not isinstance(value, Tensor):
            _refuse(f"{key}[{name!r}]", f"must be a tensor, got {value!r:.80}")
        elif parameter is None or value.numel() == 1:
            continue
        elif not isinstance(optimizer, Adafactor):
            what = f"of the shape {tuple(parameter.shape)} of its parameter"
            _must(f"{key}[{name!r}]", tuple(value.shape), what, holds=value.shape == parameter.shape)


def _as_float(value: object) -> float:
    """Return a number, or the value of a tensor of one element; else NaN."""
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 and not value.is_complex() else math.nan
    return float(value) if isinstance(value, (int, float)) else math.nan


def _check_scheduler(place: str, saved: StateDict, own: Mapping[str, object]) -> None:
    """Check the state of one of torch's schedulers against that of the one here."""
    for name in ("last_epoch", "_schedulers"):  # what resuming can't do without
        if name in own and name not in saved:
            _refuse(f"{place}[{name!r}]", "is missing")
    for name, value in saved.items():
        key, here = f"{place}[{name!r}]", own.get(name)
        if name in ("last_epoch", "_step_count"):
            _must(key, value, "a counter", holds=type(value) is int and -1 <= value <= _MOST)
        elif name in ("base_lrs", "_last_lr"):
            holds = isinstance(value, list) and all(map(_is_scalar, value))
            _must(key, value, "a list of learning rates", holds=holds)
        elif name == "_schedulers":
            _must(key, value, "a list of dicts", holds=isinstance(value, list) and _are(dict, value))
            inner = here if isinstance(here, list) else []
            for number, part in enumerate(value):
                _check_scheduler(f"{key}[{number}]", part, inner[number] if number < len(inner) else {})
        else:
            _check_kind(key, value, here)


# -- callbacks ---------------------------------------------------------------------------------------------------------


def _check_callbacks(saved: StateDict, callbacks: Callbacks, own: Mapping[str, object]) -> None:
    """Check the states of fitwatch's own callbacks: a wrong one would otherwise show long after the start.

    Args:
        saved: The states by name.
        callbacks: Those of this fit.
        own: The weights of the model by name, which some callbacks keep a copy of.
    """
    for name, callback in callbacks.named():
        if name not in saved or not type(callback).__module__.startswith("fitwatch."):
            continue
        place = f"callbacks[{name!r}]"
        _must(place, saved[name], "a dict", holds=isinstance(saved[name], dict))
        _check_kind(place, saved[name], callback.state_dict())
        for key, value in saved[name].items():
            if not isinstance(value, dict):
                continue
            weights = {str(n).removeprefix("module."): w for n, w in value.items() if n != _COUNT}
            if own and (_COUNT in value or weights.keys() == own.keys()):
                _check_weights(f"{place}[{key!r}]", weights, own, strict=True)
                count = value.get(_COUNT, 0)
                _must(f"{place}[{key!r}][{_COUNT!r}]", count, "a number", holds=_is_scalar(count))


_COUNT = "n_averaged"  # beside the weights in the state of torch's AveragedModel


def _check_kind(key: str, value: object, fresh: object) -> None:
    """Check that a value is of the kind that it has at the start; what is None at the start may be anything."""
    for what, kind in _NAMED_KINDS.items():
        if isinstance(fresh, kind):
            number = isinstance(value, Tensor) and _is_scalar(value) and not isinstance(fresh, (bool, str))
            holds = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            _must(key, value, what, holds=holds or (number and _is_scalar(fresh)))
            break
    if isinstance(value, dict) and isinstance(fresh, dict):
        for name in value.keys() & fresh.keys():
            _check_kind(f"{key}[{name!r}]", value[name], fresh[name])


_NAMED_KINDS: dict[str, type | tuple[type, ...]] = {
    "True or False": bool,  # first, since a bool is an int
    "a number": (int, float),
    "a string": str,
    "a dict": dict,
    "a list": (list, tuple),
}


def _check_guard(saved: StateDict, state: State) -> None:
    for name in ("skipped", "in_a_row") if saved else ():
        _check_counter(f"guard[{name!r}]", saved.get(name))
    fresh = {} if state.guard is None else state.guard.state_dict()
    spikes = saved.get("spikes")
    if spikes is not None and fresh.get("spikes") is not None:
        _check_kind("guard['spikes']", spikes, fresh["spikes"])
        for name, values in spikes.items():
            if isinstance(values, (list, tuple)):
                _must(f"guard['spikes'][{name!r}]", values, "numbers", holds=all(map(_is_scalar, values)))


def _check_scaler(saved: StateDict) -> None:
    for name in ("scale", "growth_factor", "backoff_factor"):
        value = saved.get(name)
        holds = _is_number(value) and 0 < float(saved[name]) < math.inf
        _must(f"scaler[{name!r}]", value, "a finite number above 0", holds=holds)
    for name in ("growth_interval", "_growth_tracker"):
        _check_counter(f"scaler[{name!r}]", saved.get(name))


# -- what this fit must share with the one that saved ------------------------------------------------------------------


def _check_parts(path: Path, content: StateDict, state: State) -> None:
    """Raise ValueError unless this fit has the same parts."""
    epoch, batch = content["progress"]["epoch"], content["progress"]["epoch_batch"]
    if batch and content["position"] is None:
        raise ValueError(
            f"{path} was saved within an epoch (epoch {epoch}, after {batch} batches) by a loop over its own loader, "
            "whose place is unknown: iterate over watch.train(), or use a checkpoint saved between epochs"
        )
    saved_by = 1 + len(content["other_ranks"])
    if saved_by != ranks.size():
        raise ValueError(
            f"{path} was saved by {saved_by} rank{'s' * (saved_by > 1)}, and this fit has {ranks.size()}: the steps "
            "would see different examples"
        )
    for name, part in (("scheduler", state.scheduler), ("scaler", state.scaler)):
        if (part is None) != (content[name] is None):
            raise ValueError(f"{path} was saved {'without' if content[name] is None else 'with'} a {name}")
    for name, part in (("optimizer", state.optimizer), ("scheduler", state.scheduler)):
        before, now = content["settings"].get(name), type(part).__name__
        if part is not None and before not in (None, now):
            raise ValueError(
                f"{path} was saved with the {name} {before}, and this fit has {now}, for which its state means "
                f"nothing: resume with {before}, or start a new fit from the weights alone: "
                "model.load_state_dict(torch.load(path)['model'])"
            )
    _check_generators(path, content, state)


def _check_generators(path: Path, content: StateDict, state: State) -> None:
    """Raise ValueError unless the loaders have as many random generators as before."""
    loaders = (state.train_loader, state.val_loader, *state.val_loaders.values())
    counts = [("the loaders and their samplers (generators)", loaders, content["generators"])]
    started = None if content["position"] is None else content["position"]["started"]
    if started is not None:
        counts.append(
            ("train_loader and its sampler (position['started']['sources'])", loaders[:1], started["sources"])
        )
    for where, held, saved in counts:
        generators = len(random_states(*held))
        if generators != len(saved):
            raise ValueError(
                f"{path} was saved with {len(saved)} random generators in {where}, and here there are {generators}: "
                "the order of the batches could not be resumed"
            )
