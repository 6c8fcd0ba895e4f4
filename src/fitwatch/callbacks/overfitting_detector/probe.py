"""A fixed part of the training set, measured like the validation set."""

import copy
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from fitwatch import ranks
from fitwatch.data import batches
from fitwatch.helpers.aliases import Batch, Loader
from fitwatch.helpers.rng import rng_state, set_rng_state
from fitwatch.state import State

MOST = 2000
"""Enough examples: more would only cost time."""

_SEED = 0


class TrainProbe:
    """A fixed, seeded part of the training examples.

    - `DataLoader` over an indexed data set: a sample of all examples that its sampler may draw. They are read again
      each time, like validation examples.
    - List of batches: whole batches.
    - Any other loader: the first batches of the first epoch (after a resume, of the first one that runs), copied and
      kept on the device.

    Args:
        examples: Their number; None: the size of the validation set, at most `MOST`.

    Attributes:
        examples: Number of examples measured, once known.
        reason: Why nothing can be measured; None if it can.
        collects: Whether to pass training batches to `collect`.
    """

    def __init__(self, examples: int | None) -> None:
        self.wanted, self.examples = examples, 0
        self.reason: str | None = None
        self.collects = False
        self._batches: Loader | None = None
        self._first: list[Batch] = []
        self._collected = 0

    def start(self, state: State) -> None:
        """Decide whether to read examples from the loader, or to collect its first batches."""
        if self.wanted == 0:
            self.reason = "probe_examples is 0"
        elif state.validation.measure is None:
            self.reason = "this loop can't measure other batches"
        loader = state.train_loader
        indexed = _is_indexed(loader) or isinstance(loader, Sequence)
        self.collects = self.reason is None and not indexed

    def collect(self, batch: Batch) -> None:
        """Keep a copy of a training batch, until there are enough."""
        if batch is None:
            self.collects, self.reason = False, "the loop does not take its batches from watch.train()"
            return
        try:
            size = batches.rough_size(batch)
        except TypeError as error:
            self.collects, self.reason = False, str(error)
            return
        if not self._first or self._collected + size <= (MOST if self.wanted is None else self.wanted):
            self._first.append(copy.deepcopy(batch))
            self._collected += size
        else:
            self.collects = False

    def measure(self, state: State) -> dict[str, float] | None:
        """Return the loss and the metrics of the probe, by name without a prefix; None if there is no probe."""
        self.collects = False
        if self._batches is None:
            seen = 0 if state.validation.losses is None else state.validation.losses.examples
            # The probe must not cost more than the validation; a custom validation_step may hide its examples.
            most = seen or _size(state.val_loader) or MOST
            wanted = min(most, MOST) if self.wanted is None else self.wanted
            try:
                if self.reason is None:
                    self._batches = self._choose(state, wanted)
            except TypeError as error:
                self.reason = str(error)
            self.reason = ranks.agree(self.reason)  # all ranks measure, or none
        if self.reason is not None or state.validation.measure is None:
            return None
        probe = self._batches or []
        saved = rng_state()  # augmentation draws random numbers, which must not affect training
        try:
            return state.validation.measure(
                iter(probe) if self._first else probe
            )  # an iterator is not split over ranks
        finally:
            set_rng_state(saved)

    def _choose(self, state: State, wanted: int) -> Loader:
        loader, generator = state.train_loader, torch.Generator().manual_seed(_SEED)
        if _is_indexed(loader):
            indices = _indices(loader)
            chosen = indices[torch.randperm(len(indices), generator=generator)[:wanted]].sort().values.tolist()
            self.examples = len(chosen)
            size = _batch_size(state.val_loader) or _batch_size(loader) or 256
            return DataLoader(
                Subset(loader.dataset, chosen),
                size,
                collate_fn=loader.collate_fn,
                num_workers=loader.num_workers,
                worker_init_fn=loader.worker_init_fn,
                persistent_workers=loader.num_workers > 0,
                pin_memory=loader.pin_memory,
                generator=generator,  # an iterator draws a seed for its workers
            )
        if isinstance(loader, Sequence):
            candidates = [
                batches.as_tensors(loader[i]) for i in torch.randperm(len(loader), generator=generator).tolist()
            ]
        else:  # each rank has its own
            candidates, wanted = self._first, max(1, wanted // ranks.size())
        kept: list[Batch] = []
        for batch in candidates:
            size = batches.rough_size(batch)
            if kept and self.examples + size > wanted:
                break
            kept.append(batch)
            self.examples += size
        if not any(ranks.gather(bool(kept))):
            raise TypeError("no training batch was seen before the first validation")
        return kept


def _size(loader: Any) -> int:
    """Return the size of a loader's data set; 0 if unknown."""
    return len(loader.dataset) if _is_indexed(loader) else 0  # type: ignore[arg-type] # as in _indices


def _batch_size(loader: Any) -> int | None:
    """Return the size of a loader's batches; if it was made with a batch sampler, only that may know it."""
    size: int | None = getattr(loader, "batch_size", None)
    return getattr(getattr(loader, "batch_sampler", None), "batch_size", None) if size is None else size


def _is_indexed(loader: Any) -> TypeGuard[DataLoader[Any]]:
    """Return whether single examples can be read from the loader's data set."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    return loader.batch_sampler is not None and hasattr(loader.dataset, "__len__")


def _indices(loader: DataLoader[Any]) -> Tensor:
    """Return the indices that the loader may draw: those of a `SubsetRandomSampler`, else all."""
    part = getattr(batches.sampler_of(loader), "indices", None)
    if part is not None:
        return torch.as_tensor(part)
    return torch.arange(len(loader.dataset))  # type: ignore[arg-type] # it has a length: see _is_indexed
