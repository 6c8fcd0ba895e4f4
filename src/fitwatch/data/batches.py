"""Batches and loaders: taking them apart, moving them, counting them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fitwatch.ranks import local_device


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``: tensors, tuples, lists, mappings, and objects with ``to``."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=device.type == "cuda")  # elsewhere unfinished copies could be read
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(part, device) for part in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(part, device) for part in batch)
    if isinstance(batch, dict):
        return {key: to_device(part, device) for key, part in batch.items()}
    return batch.to(device) if hasattr(batch, "to") else batch


def move(batch: Any, device: torch.device) -> Any:
    """Return the batch on ``device``; on the CPU, where loaders put batches, unchanged."""
    return batch if device.type == "cpu" else to_device(batch, device)


def parts(batch: Any) -> Sequence[Any]:
    """The input, the target and, if the batch carries them, the weights of the examples: two or three parts.

    A batch is a tuple or list ``(input, target)`` or ``(input, target, sample_weight)``, or a mapping with these keys.

    Raises:
        TypeError: The batch is something else; the message says what to override.
    """
    if isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        return batch if len(batch) == 2 or batch[2] is not None else batch[:2]
    if isinstance(batch, Mapping) and "input" in batch and "target" in batch:
        weight = batch.get("sample_weight")
        return (batch["input"], batch["target"]) if weight is None else (batch["input"], batch["target"], weight)
    kind = type(batch).__name__
    given = f"a {kind} of {len(batch)}" if isinstance(batch, (tuple, list)) else f"a {kind}"
    if isinstance(batch, Mapping):
        given += f" with the keys {', '.join(map(repr, batch))}"
    raise TypeError(
        "a batch must be a tuple (input, target) or (input, target, sample_weight), or a dict with these keys, got "
        f"{given}; for other batches override training_step and validation_step"
    )


def batch_size(batch: Any) -> int:
    """Examples in a batch: the first dimension of the last tensor found in it (the target or the weights, by custom).

    Raises:
        TypeError: There is no tensor in the batch.
    """
    # asked for every batch of a training: the usual pair goes without a search
    usual = isinstance(batch, (tuple, list)) and len(batch) > 0 and isinstance(batch[-1], Tensor)
    found = batch[-1] if usual else _last_tensor(batch)
    if found is None:
        raise TypeError(f"can't tell how many examples a {type(batch).__name__} holds; override batch_size(batch)")
    return found.shape[0] if found.ndim else 1


def _last_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    parts: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        parts = batch.values()
    elif isinstance(batch, (tuple, list)):
        parts = batch
    tensors = [t for t in map(_last_tensor, parts) if t is not None]
    return tensors[-1] if tensors else None


def generators_of(*loaders: Any) -> list[torch.Generator]:
    """The generators that loaders and their samplers own, which the global seed does not reach; each once."""
    found: list[torch.Generator] = []
    for loader in loaders:
        batch_sampler = getattr(loader, "batch_sampler", None)
        owners = [loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
        for generator in (getattr(owner, "generator", None) for owner in owners):
            if isinstance(generator, torch.Generator) and not any(generator is f for f in found):
                found.append(generator)
    return found


def check_loader(name: str, loader: Any) -> None:
    """Refuse what can't be iterated, or is known to be empty.

    Raises:
        TypeError: ``loader`` is no iterable.
        ValueError: ``loader`` has a length of 0.
    """
    if not isinstance(loader, Iterable):
        raise TypeError(f"{name} must be an iterable of batches, got {type(loader).__name__}")
    if length(loader) == 0:
        raise ValueError(f"{name} is empty: it has no batch")


def length(loader: Any) -> int | None:
    """The number of batches, or None where the loader does not know it."""
    try:
        return len(loader)  # a DataLoader has __len__, and raises where its data set has none
    except (TypeError, NotImplementedError):
        return None


def as_device(device: str | torch.device) -> torch.device:
    """A torch device; ``"auto"`` is CUDA (under ``torchrun`` the process's own), else MPS, else the CPU."""
    if device != "auto":
        try:
            return torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device must be 'auto' or a torch device, got {device!r}: {error}") from error
    if torch.cuda.is_available():
        return torch.device(local_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
