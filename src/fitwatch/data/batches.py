"""Batches and loaders: unpacking, moving to a device, sizes, samplers and generators."""

from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from fitwatch.helpers.aliases import Batch
from fitwatch.ranks import local_device


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors of a batch to ``device``, in tuples, lists, dicts, and objects that have ``to``."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=device.type == "cuda")  # elsewhere unfinished copies could be read
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(part, device) for part in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(part, device) for part in batch)
    if isinstance(batch, dict):
        return {key: to_device(part, device) for key, part in batch.items()}
    return batch.to(device) if hasattr(batch, "to") else batch


def move(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on ``device``; on the CPU, where loaders put batches, unchanged."""
    return batch if device.type == "cpu" else to_device(batch, device)


def parts(batch: object) -> Sequence[Any]:
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


def batch_size(batch: object) -> int:
    """Return the number of examples: the first dimension of the batch's last tensor, usually targets or weights.

    Raises:
        TypeError: The batch contains no tensor.
    """
    # Called for every training batch: the usual pair needs no search.
    usual = isinstance(batch, (tuple, list)) and len(batch) > 0 and isinstance(batch[-1], Tensor)
    found = batch[-1] if usual else _last_tensor(batch)  # type: ignore[index] # a tuple or list
    if found is None:
        raise TypeError(f"can't count the examples in a {type(batch).__name__}; override batch_size(batch)")
    return found.shape[0] if found.ndim else 1


def _last_tensor(batch: object) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    tensors = map(_last_tensor, batch[::-1] if isinstance(batch, (tuple, list)) else ())
    return next((t for t in tensors if t is not None), None)


def sampler_of(loader: object) -> object:
    """Return the sampler of a `DataLoader`'s examples, even if inside a custom batch sampler; else None."""
    return getattr(getattr(loader, "batch_sampler", None), "sampler", getattr(loader, "sampler", None))


def generators_of(*loaders: object) -> list[torch.Generator]:
    """Return the distinct generators of loaders and their samplers, which the global seed does not reach."""
    owners = [o for loader in loaders for o in (loader, getattr(loader, "batch_sampler", None), sampler_of(loader))]
    found = [getattr(owner, "generator", None) for owner in owners]
    return list(dict.fromkeys(g for g in found if isinstance(g, torch.Generator)))


def check_loader(name: str, loader: object) -> None:
    """Raise TypeError if ``loader`` is not iterable, or ValueError if its length is 0."""
    if not isinstance(loader, Iterable):
        raise TypeError(f"{name} must be an iterable of batches, got {type(loader).__name__}")
    if length(loader) == 0:
        raise ValueError(f"{name} is empty: it has no batch")


def length(loader: object) -> int | None:
    """Return the number of batches, or None if the loader does not know it."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except (TypeError, NotImplementedError):  # from a DataLoader whose data set has no length
        return None


def is_stream(loader: object) -> bool:
    """Return whether a loader does not know its length, and so may have no end."""
    return length(loader) is None


def as_device(device: str | torch.device) -> torch.device:
    """Return a torch device; ``"auto"`` is CUDA (under ``torchrun`` the process's own GPU), else MPS, else the CPU."""
    if device != "auto":
        try:
            return torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device must be 'auto' or a torch device, got {device!r}: {error}") from error
    if torch.cuda.is_available():
        return torch.device(local_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
