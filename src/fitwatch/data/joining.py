"""Joins the outputs of many batches: tensors, and containers of them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fitwatch.data import containers


class NotJoinableError(ValueError):
    """Parts of several batches that make no whole; the message says why."""


def mapped(function: Callable[[Tensor], Tensor], part: Any) -> Any:
    """Apply ``function`` to each tensor in containers, however nested, and keep the rest."""
    return containers.convert(part, function, None)


def tensors(part: Any) -> list[Tensor]:
    """Return the tensors in containers, however nested, in order."""
    return [tensor for _, tensor in containers.tensors(part)]


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
    inner = [None if isinstance(part, Tensor) else containers.children(part) for part in parts]
    held = [dict(values) for values in inner if values is not None]
    if len(held) < len(parts) or any(values.keys() != held[0].keys() for values in held):
        raise NotJoinableError(f"{name} are of type {type(first).__name__}, of which there is no whole over batches")
    joined = {key: join([values[key] for values in held], f"{name}[{key!r}]") for key in held[0]}
    return containers.rebuilt(first, joined)
