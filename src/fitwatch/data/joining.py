"""Joins the outputs of many batches: tensors, and tuples, lists, dicts and dataclasses of them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class NotJoinableError(ValueError):
    """Parts of several batches that make no whole; the message says why."""


def mapped(function: Callable[[Tensor], Tensor], part: Any) -> Any:
    """Apply ``function`` to each tensor in a tuple, list, dict or dataclass, however nested, and keep the rest."""
    if isinstance(part, Tensor):
        return function(part)
    inner = _inside(part)
    return part if inner is None else _like(part, {key: mapped(function, value) for key, value in inner.items()})


def tensors(part: Any) -> list[Tensor]:
    """Return the tensors in a tuple, list, dict or dataclass, however nested, in order."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(keep, part)
    return found


def join(parts: Sequence[Any], name: str = "the outputs") -> Any:
    """Join the same kind of value from every batch, tensors along their first dimension.

    Raises:
        NotJoinableError: Tensors differ in another dimension or have none, or a value is something else.
    """
    first = parts[0]
    if all(isinstance(part, Tensor) for part in parts):
        if any(part.dim() == 0 for part in parts):
            raise NotJoinableError(f"{name} are 0-dim tensors, one for a batch and not one for an example")
        if len({part.shape[1:] for part in parts}) > 1:
            shapes = list(dict.fromkeys(str(tuple(part.shape)) for part in parts))
            raise NotJoinableError(f"{name} of the batches have different shapes: {', '.join(shapes[:3])}")
        return torch.cat(list(parts))
    if all(part is None for part in parts):
        return None
    inner = [_inside(part) for part in parts]
    if inner[0] is None or any(i is None or i.keys() != inner[0].keys() for i in inner):
        raise NotJoinableError(f"{name} are of type {type(first).__name__}, of which there is no whole over batches")
    joined = {key: join([i[key] for i in inner if i is not None], f"{name}[{key!r}]") for key in inner[0]}
    return _like(first, joined)


def _inside(part: object) -> dict[Any, Any] | None:
    """Return the values in a container by key, index or name of the field; None if it is none."""
    if isinstance(part, Mapping):
        return dict(part)
    if isinstance(part, (tuple, list)):
        return dict(enumerate(part))
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    return None


def _like(part: Any, values: dict[Any, Any]) -> Any:
    """Return a container of the kind of ``part`` with other values."""
    if isinstance(part, Mapping):
        kind: Callable[..., Any] = type(part)
        if hasattr(part, "__dataclass_fields__"):  # such as the outputs of transformers
            return kind(**values)
        try:
            return kind(values)
        except TypeError:  # such as a defaultdict
            return values
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*values.values())
    if isinstance(part, (tuple, list)):
        return type(part)(values.values())
    given = {f.name: values[f.name] for f in dataclasses.fields(part) if f.init}
    new = dataclasses.replace(part, **given)
    for f in dataclasses.fields(part):
        if not f.init:
            object.__setattr__(new, f.name, values[f.name])
    return new
