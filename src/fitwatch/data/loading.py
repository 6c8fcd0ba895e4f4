"""Reads the batches of a plain `DataLoader` by one `index_select` per tensor, instead of example by example."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate


def read(loader: Iterable[object], *, fast: bool = True, skip: int = 0) -> Iterator[object]:
    """Iterate over the batches of ``loader``; with ``fast``, those of a plain one without reading single examples.

    ``skip`` batches of a plain loader are drawn by its sampler and left out.

    Plain is a torch `DataLoader` with the default ``collate_fn`` and without workers over a `TensorDataset`, or a
    `Subset` of one, but not of a subclass. The batches are equal to the loader's to the bit, in the order of its own
    sampler, and take the same random numbers.
    """
    tensors, rows = _plain(loader) if fast else (None, None)
    if tensors is None or not isinstance(loader, DataLoader) or loader.batch_sampler is None:
        return iter(loader)
    indices = iter(loader.batch_sampler)
    # What the loader's own iterator draws for its workers, even without any.
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
    for _ in islice(indices, skip):
        pass
    return map(partial(_rows, loader.dataset, tensors, rows, loader.pin_memory), indices)


def is_plain(loader: object) -> bool:
    """Return whether `read` reads this loader fast."""
    return _plain(loader)[0] is not None


def _plain(loader: object) -> tuple[list[Tensor] | None, Tensor | None]:
    """Return the tensors to select from, None if the loader is not plain, and which rows a subset takes."""
    if type(loader) is not DataLoader or loader.num_workers or loader.collate_fn is not default_collate:
        return None, None
    if loader.batch_sampler is None or (loader.pin_memory and not torch.cuda.is_available()):
        return None, None
    held, rows = loader.dataset, None
    while type(held) is Subset:
        try:
            indices = torch.as_tensor(held.indices)
        except (TypeError, ValueError, RuntimeError):
            return None, None
        if indices.dtype is not torch.int64 or indices.dim() != 1 or (len(indices) and int(indices.min()) < 0):
            return None, None
        rows, held = (indices if rows is None else indices[rows]), held.dataset
    if type(held) is not TensorDataset or not all(_is_plain(t) for t in held.tensors):
        return None, None
    return list(held.tensors), rows


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.is_cpu and tensor.layout is torch.strided and tensor.is_contiguous()


def _rows(
    dataset: Dataset[Any], tensors: Sequence[Tensor], rows: Tensor | None, pin: bool, indices: Sequence[int]
) -> object:
    try:
        index = torch.tensor(indices)
        if index.dim() != 1:
            raise TypeError  # noqa: TRY301 - what follows lets the data set refuse it
        index = index if rows is None else rows[index]
        batch = [t.index_select(0, index) for t in tensors]
    except (IndexError, RuntimeError, TypeError, ValueError):  # negative or odd indices: as the loader reads them
        batch = default_collate([dataset[i] for i in indices])
    return [t.pin_memory() for t in batch] if pin else batch
