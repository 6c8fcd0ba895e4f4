"""Batches and loaders: unpacking, moving to a device, sizes, samplers and generators."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from fitwatch.data.containers import children, convert, holds_arrays
from fitwatch.helpers.aliases import Batch, Loader, Loaders
from fitwatch.ranks import local_device


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors of a batch to ``device``, in containers and objects that have ``to``; arrays become tensors.

    Raises:
        TypeError: A container or an object holds tensors and can't be rebuilt; the message names its type.
    """
    waits = device.type != "cuda"  # elsewhere unfinished copies could be read

    def move_one(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=not waits)

    def move_object(part: Any) -> Any:
        moved = part.to(device)
        return part if moved is None else moved  # some move themselves

    return convert(batch, move_one, move_object)


def move(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on ``device``, with arrays as tensors; on the CPU, where loaders put batches, else unchanged."""
    if device.type != "cpu":
        return to_device(batch, device)
    return as_tensors(batch) if holds_arrays(batch) else batch


def as_tensors(batch: Batch) -> Batch:
    """Turn the NumPy arrays of a batch into tensors."""
    return convert(batch, lambda tensor: tensor, None)


def parts(batch: object) -> Sequence[Any]:
    """Unpack a batch for a step, see `unpack`, and refuse what can't be meant as input, target or weights.

    Raises:
        TypeError: As for `unpack`; or input or target is a list of numbers.
        ValueError: The third part of a tuple is an index of the examples.
    """
    unpacked = unpack(batch)
    if type(unpacked[0]) is list or type(unpacked[1]) is list:
        for name, part in zip(("input", "target"), unpacked, strict=False):
            if _is_numbers(part):
                raise TypeError(
                    f"the {name} of the batch is a list of numbers: a batch must hold tensors or NumPy arrays, so "
                    "write torch.tensor(...) where it is made"
                )
    if len(unpacked) == 3 and not isinstance(batch, Mapping) and looks_like_index(unpacked[2]):
        raise index_error(unpacked[2])
    return unpacked


def index_error(index: Tensor) -> ValueError:
    """Return the error of a third part that is an index of the examples."""
    return ValueError(
        "the third part of a batch is the weight of each example, but here it holds integers that look like an "
        f"index of the examples: {index.flatten()[:6].tolist()}. Drop the index from the batch, or override "
        "training_step and validation_step; if these are weights, pass them as floats"
    )


def is_integer(values: Tensor) -> bool:
    """Return whether a tensor holds integers, not bools."""
    return not (values.is_floating_point() or values.is_complex() or values.dtype is torch.bool)


def unpack(batch: object) -> Sequence[Any]:
    """Unpack a batch into input, target and, if it has them, sample weights: two or three parts.

    A batch is a tuple or list ``(input, target)`` or ``(input, target, sample_weight)``, or a mapping with these keys.

    Raises:
        TypeError: The batch has another form; the message names the methods to override.
    """
    if isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        return batch if len(batch) == 2 or batch[2] is not None else batch[:2]
    if isinstance(batch, Mapping) and "input" in batch and "target" in batch:
        weight = batch.get("sample_weight")
        return (batch["input"], batch["target"]) if weight is None else (batch["input"], batch["target"], weight)
    given = f"a {type(batch).__name__}"
    if isinstance(batch, (tuple, list)):
        given += f" of {len(batch)}"
    elif isinstance(batch, Mapping):
        given += f" with the keys {', '.join(map(repr, batch))}"
    raise TypeError(
        "a batch must be a tuple (input, target) or (input, target, sample_weight), or a dict with these keys, got "
        f"{given}; for other batches override training_step and validation_step"
    )


def targets_of(batch: object) -> Sequence[Any]:
    """Return the target of a batch and, if it has them, its sample weights, to count classes.

    Also from a mapping with ``"labels"``, as the collators of transformers make it.
    """
    if isinstance(batch, Mapping) and "labels" in batch and "target" not in batch:
        return [batch["labels"]]
    return unpack(batch)[1:]


def looks_like_index(weight: object) -> bool:
    """Return whether integers, one for each example, tell the examples apart instead of weighing them.

    Weights in integers, such as counts, repeat themselves; an index does not. Fewer than 8 examples may differ by
    chance: then they are an index if one is 100 or more, or if they count up. Waits for a GPU if these are integers.
    """
    if not isinstance(weight, Tensor) or not is_integer(weight) or not weight.dim():
        return False
    values = weight.flatten().tolist()
    if len(values) != len(weight):
        return False  # weights of positions
    if len(set(values)) < len(values) or not values:
        return False
    counts_up = len(values) > 2 and values == list(range(values[0], values[0] + len(values)))
    return len(values) >= 8 or max(values) >= 100 or counts_up


def _is_numbers(part: object) -> bool:
    while type(part) in (list, tuple) and part:
        part = part[0]  # type: ignore[index] # a list or tuple
    return isinstance(part, (int, float))


def input_of(batch: object) -> Any:
    """Return the input of a batch with or without targets, for predictions.

    The first part of a tuple or list, the value of the key ``"input"`` of a mapping, or the batch itself.
    """
    if isinstance(batch, (tuple, list)) and batch:
        return batch[0]
    return batch["input"] if isinstance(batch, Mapping) and "input" in batch else batch


def batch_size(batch: object) -> int:
    """Return the number of examples: the first dimension of the batch's tensors, in which all of them agree.

    A tensor without dimensions does not count, unless it is the last one beside a single other: that is one example.

    Raises:
        TypeError: The batch contains no tensor, or the tensors disagree.
    """
    # Called for every training batch: the usual pair needs no search.
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        first, last = batch
        if isinstance(first, Tensor) and isinstance(last, Tensor):
            one, other = first.shape, last.shape
            if one and other and one[0] == other[0]:
                return one[0]
    found = _sizes(batch)
    if len(set(found.values())) > 1:  # a list of dicts may hold one for each example, as in detection
        by_item = _sizes(batch, items=True)
        found = by_item if len(set(by_item.values())) == 1 else found
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    why = f"can't count the examples in a {type(batch).__name__}"
    if found:
        listed = ", ".join(f"{place or 'the batch'}: {size}" for place, size in list(found.items())[:8])
        why += f", whose tensors disagree in their first dimension ({listed})"
    raise TypeError(f"{why}; override batch_size(batch)")


def rough_size(batch: object) -> int:
    """Return `batch_size`, or if the tensors disagree the first dimension of the last one.

    Raises:
        TypeError: The batch contains no tensor.
    """
    try:
        return batch_size(batch)
    except TypeError:
        if not (found := _sizes(batch)):
            raise
        return list(found.values())[-1]


def _sizes(batch: object, *, items: bool = False) -> dict[str, int]:
    """Return the first dimension of each tensor in the batch, by its place; of a list of dicts the length, if asked."""
    found = dict(_rows(batch, items=items))
    known = {place: size for place, size in found.items() if size is not None}
    last_is_scalar = bool(found) and list(found.values())[-1] is None
    return {"": 1} if last_is_scalar and len(known) < 2 else known


def _rows(batch: object, place: str = "", *, items: bool) -> Iterator[tuple[str, int | None]]:
    """Yield the place of each tensor with its first dimension; None if it has no dimension."""
    if isinstance(batch, PackedSequence):
        yield place, int(batch.batch_sizes[0])
    elif isinstance(batch, Tensor):
        yield place, batch.size(0) if batch.ndim else None
    elif items and place and isinstance(batch, list) and batch and all(isinstance(part, Mapping) for part in batch):
        yield place, len(batch)
    elif not isinstance(batch, str):
        for key, part in children(batch) or ():
            yield from _rows(part, f"{place}[{key!r}]", items=items)


def class_names(loader: object) -> Sequence[str] | None:
    """Return the names in ``classes`` of the data set, as torchvision's have them, also within subsets; else None."""
    data = getattr(loader, "dataset", None)
    while data is not None:
        names = getattr(data, "classes", None)
        if isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(n, str) for n in names):
            return names
        data = getattr(data, "dataset", None)
    return None


def sampler_of(loader: object) -> object:
    """Return the sampler of a `DataLoader`'s examples, even if inside a custom batch sampler; else None."""
    return getattr(getattr(loader, "batch_sampler", None), "sampler", getattr(loader, "sampler", None))


def generators_of(*loaders: object) -> list[torch.Generator]:
    """Return the distinct generators of loaders and their samplers, which the global seed does not reach."""
    owners = [o for loader in loaders for o in (loader, getattr(loader, "batch_sampler", None), sampler_of(loader))]
    found = [getattr(owner, "generator", None) for owner in owners]
    return list(dict.fromkeys(g for g in found if isinstance(g, torch.Generator)))


def named(loaders: Loaders | None, metrics: Iterable[str]) -> dict[str, Loader]:
    """Return several validation loaders by name; ``{}`` for a single one.

    Raises:
        ValueError: There is none in the mapping, or a name can't be part of the name of a metric.
        TypeError: A name is not a string.
    """
    if not isinstance(loaders, Mapping):
        return {}
    if not loaders:
        raise ValueError("val_loader is an empty dict: give a loader, several by name, or None")
    for name in loaders:
        if not isinstance(name, str):
            raise TypeError(f"val_loader is a dict of loaders, whose names must be strings, got {name!r}")
        if not name or "/" in name or name in _TAKEN or name in metrics:
            raise ValueError(
                f"val_loader has a loader named {name!r}: a name must not be empty, contain a slash, be that of a "
                f"metric, or be one of {', '.join(_TAKEN)}"
            )
    return dict(loaders)


_TAKEN = ("loss", "overfit", "report", "decisions")  # parts of other names below val/


def check_loader(name: str, loader: object, *, several: str) -> None:
    """Check that ``loader`` is one loader.

    Args:
        name: Its name, for the error message.
        loader: The loader.
        several: What to write instead of several loaders, for the error message.

    Raises:
        TypeError: It is not iterable, or it is a container of loaders.
        ValueError: Its length is 0.
    """
    if isinstance(loader, Mapping):
        raise TypeError(
            f"{name} must be one loader, got a dict with the keys {', '.join(map(repr, loader))}: {several}"
        )
    if not isinstance(loader, Iterable):
        instead = ": wrap it in DataLoader(..., batch_size=...)" if isinstance(loader, Dataset) else ""
        raise TypeError(f"{name} must be an iterable of batches, got {type(loader).__name__}{instead}")
    if isinstance(loader, (list, tuple)) and any(isinstance(part, DataLoader) for part in loader):
        raise TypeError(f"{name} must be one loader, got a {type(loader).__name__} of {len(loader)} loaders: {several}")
    if length(loader) == 0:
        raise ValueError(f"{name} is empty: it has no batch")


def check_repeats(name: str, loader: object, passes: str) -> None:
    """Refuse an iterator where several passes are due; call it only if they are.

    Only the iterators of Python and of a `DataLoader` are known not to start again; a class may in ``__iter__``.

    Args:
        name: Name of the loader, for the error message.
        loader: The loader.
        passes: What needs the passes, for the error message.

    Raises:
        TypeError: It can be iterated once only.
    """
    plain = type(loader).__module__ in ("builtins", "itertools") and isinstance(loader, Iterator)
    if plain or isinstance(loader, _BaseDataLoaderIter):
        raise TypeError(
            f"{name} is a {type(loader).__name__}, which can be iterated once only, and {passes}: give a DataLoader, a "
            "list, or an object whose __iter__ starts again"
        )


def length(loader: object) -> int | None:
    """Return the number of batches, or None if the loader does not know it."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except (TypeError, NotImplementedError):  # from a DataLoader whose data set has no length
        return None


def is_stream(loader: object) -> bool:
    """Return whether a loader does not know its length, and so may have no end."""
    return length(loader) is None


def _check_device(device: torch.device) -> None:
    """Raise a ValueError if the machine has no such GPU."""
    count = torch.cuda.device_count() if device.type == "cuda" and torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        have = f"has {count} CUDA device{'s' * (count != 1)}" if count else "has no CUDA device that torch can use"
        raise ValueError(f"device is {str(device)!r}, and this machine {have}: use 'auto', or 'cpu'")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device is 'mps', which is not available on this machine: use 'auto', or 'cpu'")


def as_device(device: str | torch.device) -> torch.device:
    """Return a torch device; ``"auto"`` is CUDA (under ``torchrun`` the process's own GPU), else MPS, else the CPU."""
    if device != "auto":
        try:
            found = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device must be 'auto' or a torch device, got {device!r}: {error}") from error
        _check_device(found)
        return found
    if torch.cuda.is_available():
        return torch.device(local_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
