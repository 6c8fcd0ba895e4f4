"""Models and their parts under wrappers of torch: names and weights as if nothing were wrapped."""

import copy
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fitwatch.helpers.expanded import compact


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module that `torch.compile`, `DistributedDataParallel` or `DataParallel` wrapped."""
    while (level := _level(model)) is not None:
        model = getattr(model, level)
    return model


def plain_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return names of parameters, buffers or modules of ``model`` without the levels that wrappers add.

    A part may be wrapped too, and a wrapper wrapped again. An attribute that a user called ``module`` stays.
    """
    added = [
        f"{place}.{level}".lstrip(".")
        for place, module in model.named_modules(remove_duplicate=False)
        if (level := _level(module)) is not None
    ]
    added.sort(key=len, reverse=True)  # the inner ones first, since their places have the names of the outer ones

    def plain(name: str) -> str:
        for place in added:
            if name == place or name.startswith(f"{place}."):
                name = (place.rpartition(".")[0] + name[len(place) :]).lstrip(".")
        return name

    return [plain(name) for name in names] if added else list(names)


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of ``model`` with their plain names."""
    named = list(model.named_parameters())
    return list(zip(plain_names(model, [name for name, _ in named]), [p for _, p in named], strict=True))


def weights(model: nn.Module) -> dict[str, Any]:
    """Return the state dict of ``model`` with plain names, so that it fits the model with and without wrappers."""
    state: dict[str, Any] = unwrap(model).state_dict()
    own = _names(state)
    return _renamed(state, dict(zip(own, plain_names(unwrap(model), own), strict=True)))


def copied_weights(model: nn.Module) -> dict[str, Any]:
    """Return a copy of what `weights` returns."""
    own = weights(model)
    copied = OrderedDict(
        (name, w.detach().clone() if isinstance(w, Tensor) else copy.deepcopy(w)) for name, w in own.items()
    )
    if hasattr(own, "_metadata"):  # the versions of the modules, which loading needs
        copied._metadata = copy.deepcopy(own._metadata)  # type: ignore[attr-defined] # noqa: SLF001 - as torch keeps it
    return copied


def load_weights(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Load a state dict with plain names, or with those of the wrappers.

    Raises:
        RuntimeError: It does not fit the model.
    """
    inner = unwrap(model)
    own = _names(inner.state_dict())
    inner.load_state_dict(_renamed(weights, dict(zip(plain_names(inner, own), own, strict=True))))


def overwrite(model: nn.Module, copied: Mapping[str, Any]) -> None:
    """Copy the tensors of `copied_weights` back by name, without the hooks that `load_weights` runs."""
    own = weights(model)
    for name, value in copied.items():
        if isinstance(value, Tensor):
            compact(own[name]).copy_(compact(value))


def _names(state: Mapping[str, Any]) -> list[str]:
    """Return the names of the values, and of the modules, for which torch keeps a version."""
    return [*state, *getattr(state, "_metadata", {})]


def _renamed(state: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    if all(old == new for old, new in names.items()):
        return state  # type: ignore[return-value] # torch takes any mapping
    renamed = OrderedDict((names.get(name, name), value) for name, value in state.items())
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        renamed._metadata = OrderedDict((names.get(k, k), v) for k, v in versions.items())  # type: ignore[attr-defined]  # noqa: SLF001 - as torch keeps it
    return renamed


def _level(module: nn.Module) -> str | None:
    """Return the name under which a wrapper holds the module that it wraps; None for other modules."""
    if isinstance(module, (DataParallel, DistributedDataParallel)):
        return "module"
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # importing it takes a second
    return "_orig_mod" if compiler is not None and isinstance(module, compiler.OptimizedModule) else None
