"""What a checkpoint can hold: tensors, and Python's own numbers, strings and containers."""

import copy
import io
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

_CONTAINERS = (dict, OrderedDict, Counter, list, tuple, set, torch.Size)  # exactly these are read again
_NUMBERS = "biufc"  # kinds of NumPy's dtypes


def plain_data(value: Any) -> Any:
    """Return a copy with plain values instead of those of NumPy and of subclasses; what is plain already is not copied.

    Scalars become Python's, arrays of numbers tensors of the same dtype and shape, other arrays lists, and a subclass
    of a container or a number what it derives from. Other objects stay as they are.
    """
    if isinstance(value, Tensor) or value is None or type(value) in (bool, int, float, str, bytes, torch.Size):
        return value
    if isinstance(value, dict):
        return _plain_dict(value)
    if isinstance(value, (list, tuple, set)):
        return _plain_list(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        return _without_numpy(value, numpy)
    for kind in (int, float, str):
        if isinstance(value, kind):
            return _BASE[kind](value)
    return value


_BASE: dict[type, Any] = {int: int.__index__, float: float.__float__, str: str.__str__}  # not what an Enum overrides


def _plain_dict(value: dict[Any, Any]) -> dict[Any, Any]:
    items = [(plain_data(key), plain_data(item)) for key, item in value.items()]
    kind = type(value) if type(value) in _CONTAINERS else dict
    same = all(a is b and x is y for (a, x), (b, y) in zip(items, value.items(), strict=True))
    if same and kind is type(value):
        return value
    return kind(items) if kind is not Counter else Counter(dict(items))


def _plain_list(value: Any) -> Any:
    items = [plain_data(item) for item in value]
    kind = next(k for k in (list, tuple, set) if isinstance(value, k))
    same = all(a is b for a, b in zip(items, value, strict=True))
    return value if same and kind is type(value) else kind(items)


def _without_numpy(value: Any, numpy: Any) -> Any:
    if isinstance(value, numpy.ma.MaskedArray) or value.dtype.kind not in f"{_NUMBERS}SUO":
        return value
    if isinstance(value, numpy.generic):
        found = value.item()
        return float(found) if isinstance(found, numpy.floating) else found  # of an extended precision
    if value.dtype.kind not in _NUMBERS:
        return plain_data(value.tolist())
    if value.dtype.itemsize > 8 and value.dtype.kind == "f":
        value = value.astype(numpy.float64)
    return torch.tensor(value.astype(value.dtype.newbyteorder("=")))


def bytes_of(value: Any) -> int:
    """Return the bytes of the tensors in containers; what several of them share counts once."""
    storages = {}
    for tensor in _tensors(value):
        if tensor.layout is torch.strided:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()  # noqa: SLF001 - its identity
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def copied_to_host(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """Return a copy of tensors and containers that training does not change, in the memory of the host.

    Tensors that share memory do so in the copy. ``memo`` holds the copies by the identity of the memory.
    """
    memo = {} if memo is None else memo
    if isinstance(value, Tensor):
        return _tensor_on_host(value, memo)
    if isinstance(value, dict):
        new = copy.copy(value)  # with the attributes that a state dict of torch has
        for key, item in value.items():
            new[key] = copied_to_host(item, memo)
        return new
    if type(value) in (list, tuple):
        return type(value)(copied_to_host(item, memo) for item in value)
    return value


def _tensor_on_host(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    plain = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_quantized
    if not plain or tensor.is_conj() or tensor.is_neg():
        return copy.deepcopy(tensor.detach(), memo)
    storage: Any = tensor.untyped_storage()
    if storage._cdata not in memo:  # noqa: SLF001 - its identity
        memo[storage._cdata] = storage.clone() if storage.device.type == "cpu" else storage.cpu()  # noqa: SLF001 - as above
    new = torch.empty(0, dtype=tensor.dtype)
    new.set_(memo[storage._cdata], tensor.storage_offset(), tensor.size(), tensor.stride())  # noqa: SLF001 - as above
    return new.requires_grad_(tensor.requires_grad)


def unreadable(value: object, place: str = "") -> tuple[str, object] | None:
    """Return the place and the value of the first part that a checkpoint can't hold, or None."""
    if type(value) in _CONTAINERS:
        for name, part in _parts(value):
            found = unreadable(part, f"{place}.{name}" if place else str(name))
            if found is not None:
                return found
        return None
    return None if type(value) is Tensor or _is_readable(value) else (place, value)


def _parts(value: Any) -> Iterable[tuple[object, object]]:
    if not isinstance(value, dict):
        return enumerate(value)
    return [*((f"key {key!r:.80}", key) for key in value), *value.items()]


def _is_readable(value: object) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # noqa: BLE001 - whatever a user's object raises
        return False
    return True
