"""Applies a function to all tensors of a batch, whatever containers hold them."""

import copy
import sys
from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from typing import Any, cast

import attrs
import torch
from torch import Tensor

_LEAVES = (str, bytes, int, float, complex, type(None), type)


def convert(part: Any, on_tensor: Callable[[Tensor], Tensor], on_movable: Callable[[Any], Any] | None) -> Any:
    """Return a batch with ``on_tensor`` applied to its tensors; a container in which nothing changes is returned as is.

    NumPy arrays of numbers become tensors before. Containers are tuples, named tuples, lists, mappings, sets,
    dataclasses, attrs classes, and their subclasses.

    Args:
        part: A batch, or a part of it.
        on_tensor: Applied to each tensor.
        on_movable: Applied to an object that has a method ``to``, instead of looking into it; None: it stays.

    Raises:
        TypeError: A container holds tensors and can't be rebuilt; the message names its type.
    """
    if isinstance(part, Tensor) or is_array(part):
        return on_tensor(part if isinstance(part, Tensor) else from_array(part))
    if isinstance(part, _LEAVES):
        return part
    if callable(getattr(part, "to", None)):
        return part if on_movable is None else on_movable(part)
    held = children(part)
    if held is None:
        held = []
        if on_movable is not None:
            _refuse_hidden(part)
    new = {key: convert(value, on_tensor, on_movable) for key, value in held}
    if all(new[key] is value for key, value in held):
        return part
    try:
        return rebuilt(part, new)
    except Exception as error:
        raise TypeError(
            f"the batch holds tensors in a {_name(part)}, which can't be built from new values ({error}): give the "
            "class a method to(device) that returns a moved copy, or use a tuple, a dict or a dataclass"
        ) from error


def children(part: object) -> list[tuple[Any, Any]] | None:
    """Return the keys, indices or names of what a container holds, with the values; None if it is not a container."""
    if isinstance(part, Mapping):
        return list(part.items())
    if isinstance(part, (Sequence, AbstractSet)) and not isinstance(part, (str, bytes, range, memoryview)):
        return list(enumerate(part))
    if isinstance(part, type):
        return None
    if is_dataclass(part):
        return [(f.name, getattr(part, f.name)) for f in fields(part) if hasattr(part, f.name)]
    if attrs.has(type(part)):
        return [(f.name, getattr(part, f.name)) for f in attrs.fields(cast(Any, type(part))) if hasattr(part, f.name)]
    return None


def tensors(part: object, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in containers, each with its place, such as ``[0]['boxes']``."""
    if isinstance(part, Tensor):
        yield place, part
    elif not isinstance(part, _LEAVES):
        for key, value in children(part) or ():
            yield from tensors(value, f"{place}[{key!r}]")


def is_array(part: object) -> bool:
    """Return whether this is a NumPy array or scalar of numbers; no cost before NumPy is imported."""
    numpy: Any = sys.modules.get("numpy")
    return numpy is not None and isinstance(part, (numpy.ndarray, numpy.generic)) and part.dtype.kind in "biufc"


def holds_arrays(part: object) -> bool:
    """Return whether containers hold a NumPy array of numbers."""
    if isinstance(part, (Tensor, *_LEAVES)):
        return False
    return is_array(part) or any(holds_arrays(value) for _, value in children(part) or ())


def from_array(array: Any) -> Tensor:
    """Convert an array; its memory is shared where torch can write to it."""
    if array.dtype.byteorder in "<>":  # not that of this machine: torch takes no other
        array = array.astype(array.dtype.newbyteorder("="))
    shares = array.ndim and array.flags.writeable and all(step >= 0 for step in array.strides)
    return torch.from_numpy(array) if shares else torch.tensor(array.copy())


def rebuilt(part: Any, new: dict[Any, Any]) -> Any:
    """Return a container like ``part`` with new values, and what else it holds unchanged."""
    if hasattr(part, "_make"):  # a named tuple
        return part._make(new.values())
    if type(part) in (tuple, list, dict):
        return dict(new) if isinstance(part, dict) else type(part)(new.values())
    if isinstance(part, (dict, list, UserDict, UserList, deque)):  # a copy of another might share what it holds
        twin: Any = copy.copy(part)
        for key, value in new.items():
            twin[key] = value
        return twin
    if isinstance(part, (Mapping, Sequence, AbstractSet)):
        rebuild: Callable[[Any], Any] = type(part)
        return rebuild(new if isinstance(part, Mapping) else list(new.values()))
    twin = copy.copy(part)
    for name, value in new.items():
        object.__setattr__(twin, name, value)  # also if the class is frozen
    return twin


def _refuse_hidden(part: object) -> None:
    """Refuse an object of an unknown class whose attributes are tensors, which would stay where they are."""
    slots = [name for kind in type(part).__mro__ for name in getattr(kind, "__slots__", ())]
    for name in [*getattr(part, "__dict__", ()), *slots]:
        if any(True for _ in tensors(getattr(part, name, None))):
            raise TypeError(
                f"the batch holds a tensor in {_name(part)}.{name}, which can't be moved: give the class a method "
                "to(device) that returns a moved copy, or use a tuple, a dict or a dataclass"
            )


def _name(part: object) -> str:
    return type(part).__qualname__
