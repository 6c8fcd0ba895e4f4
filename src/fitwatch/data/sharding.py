"""Distributes batches over ranks: each example goes to exactly one rank."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final
from weakref import WeakKeyDictionary

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler

from fitwatch import ranks
from fitwatch.data.batches import generators_of, length, sampler_of
from fitwatch.data.loading import read
from fitwatch.data.position import skipping
from fitwatch.helpers.aliases import Batch, StateDict
from fitwatch.helpers.rng import rng_state, set_rng_state

logger = logging.getLogger("fitwatch")

ABSENT: Final = object()
"""Stands for a batch on a rank that has none left while others have."""

_known: WeakKeyDictionary[DataLoader[object], DataLoader[object]] = WeakKeyDictionary()  # may hold persistent workers


class Rounds:
    """Iterates over this rank's batches in as many rounds as the rank with the most batches needs.

    Args:
        loader: As for `split`.
        fast: As for `read`.

    Attributes:
        total: Number of rounds; on several ranks None until `agree`, and unless all loaders know their length.
        certain: Whether this rank's loader can't give another number of batches than its length.
    """

    def __init__(self, loader: Iterable[object], *, fast: bool = False) -> None:
        self._batches, self._fast = split(loader), fast
        self.total = length(self._batches)
        self.certain = isinstance(self._batches, Sequence) or is_indexed(self._batches)  # a length may be wrong

    def agree(self, *, together: bool) -> None:
        """Settle the number of rounds; all ranks call it before they iterate.

        Args:
            together: Whether every rank needs a batch in every round.

        Raises:
            ValueError: A rank lacks a batch, or may lack one, although ``together``.
        """
        if ranks.size() > 1:
            lengths = ranks.gather(self.total if self.certain else None)
            if together and (None in lengths or len(set(lengths)) > 1):
                raise ValueError(
                    "SyncBatchNorm waits for all ranks in every batch, so they need the same number of batches, got "
                    f"{lengths}: choose a batch size, or drop_last=True, that makes them equal"
                )
            self.total = None if None in lengths else max(n for n in lengths if n is not None)

    def __iter__(self) -> Iterator[object]:
        return self._in_rounds(read(self._batches, fast=self._fast), 0)

    def after(self, done: int, own: StateDict | None) -> Iterator[object]:
        """Iterate over the rounds after the first ``done``; see `skipping`, for ``own`` too."""
        return self._in_rounds(skipping(self._batches, done, own, fast=self._fast), done)

    def _in_rounds(self, batches: Iterator[object], done: int) -> Iterator[object]:
        return batches if ranks.size() == 1 else self._together(batches, done)

    def _together(self, batches: Iterator[object], done: int) -> Iterator[object]:
        while self.total is None or done < self.total:
            batch = next(batches, ABSENT)
            if self.total is None and not ranks.sums([float(batch is not ABSENT)])[0]:
                return
            yield batch
            done += 1


def split(loader: Iterable[object]) -> Iterable[object]:
    """Return this rank's part of ``loader``.

    A list, or a `DataLoader` over an indexed data set, is dealt out batch by batch, in the order that rank 0 draws; the
    last round may be incomplete. With a `DistributedSampler` each rank takes the part it is given, without the examples
    repeated to make all parts equal; with another sampler that has ``num_replicas``, the part is unchanged. Any other
    iterable, including a loader without a length, must yield each rank's own part.
    """
    if ranks.size() == 1:
        return loader
    if isinstance(loader, Sequence):
        return loader[ranks.rank() :: ranks.size()]
    if not isinstance(loader, DataLoader) or not is_indexed(loader):
        return loader
    if loader not in _known:
        _known[loader] = _rebuilt(loader)
    return _known[loader]


def certain_length(loader: Iterable[object]) -> int | None:
    """Return the number of batches of a loader that can't give another number; else, or on several ranks, None."""
    rounds = Rounds(loader)
    return rounds.total if rounds.certain and ranks.size() == 1 else None


def steps_per_epoch(loader: Iterable[object], accumulate: int) -> int | None:
    """Return how many steps an epoch has on the rank with most batches, without communication; None if unknown."""
    batches = length(loader)
    if batches is not None and not gives_part(loader):
        batches = -(-batches // ranks.size())
    return None if batches is None else -(-batches // accumulate)


def gives_part(loader: object) -> bool:
    """Return whether ``loader`` itself yields only this rank's part."""
    if ranks.size() == 1 or isinstance(loader, Sequence):
        return False
    return not is_indexed(loader) or _deals_out(loader)


def start_workers(loaders: Mapping[str, Iterable[object]]) -> None:
    """Start the persistent workers of loaders when training resumes, and say what can't be resumed in them.

    In the first epoch a `DataLoader` draws a seed for them, and in later ones none. A resumed training that drew it
    again would see another order of the examples, and other dropout, than an uninterrupted one.
    """
    parts = {name: split(loader) for name, loader in loaders.items()}
    found = {name: p for name, p in parts.items() if isinstance(p, DataLoader) and p.persistent_workers}
    if not found:
        return
    logger.warning(
        "persistent_workers=True in %s: the random generators in the workers can't be resumed. If the data set draws "
        "random numbers (augmentation), train with persistent_workers=False from the start to resume to the bit",
        " and ".join(found),
    )
    generators = [(g, g.get_state()) for g in generators_of(*loaders.values(), *found.values())]
    before = rng_state()
    for loader in found.values():
        if is_indexed(loader):  # a stream would lose what is read now
            iter(loader)  # the batches that it fetches are dropped when the epoch starts
    set_rng_state(before)
    for generator, state in generators:
        generator.set_state(state)


def set_epoch(loader: object, epoch: int) -> None:
    """Set the epoch in the samplers of a loader; the order of a `DistributedSampler` depends on it."""
    for sampler in _samplers(loader):
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)


def _samplers(loader: object) -> tuple[object, object]:
    return sampler_of(loader), getattr(loader, "batch_sampler", None)


def _deals_out(loader: object) -> bool:
    """Return whether a sampler knows the ranks, as a `DistributedSampler` does."""
    return any(hasattr(sampler, "num_replicas") for sampler in _samplers(loader))


def is_indexed(loader: object) -> bool:
    """Return whether this is a `DataLoader` whose sampler decides what to read and when to stop."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or length(loader) is None:
        return False
    return type(loader).__iter__ is DataLoader.__iter__


def _rebuilt(loader: DataLoader[object]) -> DataLoader[object]:
    same = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "generator")
    workers = ("multiprocessing_context", "prefetch_factor", "persistent_workers")
    options: dict[str, Any] = {name: getattr(loader, name) for name in (*same, *workers)}
    if _deals_out(loader):
        sampler, batches = _samplers(loader)
        if type(sampler) is DistributedSampler and type(batches) is BatchSampler:
            real = BatchSampler(_WithoutPadding(sampler), batches.batch_size, batches.drop_last)
            return DataLoader(loader.dataset, batch_sampler=real, **options)
        return loader  # a custom one may repeat examples on purpose
    if loader.batch_sampler is None:
        return DataLoader(loader.dataset, batch_size=None, sampler=_EveryNth(loader.sampler), **options)
    return DataLoader(loader.dataset, batch_sampler=_EveryNth(loader.batch_sampler), **options)


class _EveryNth(Sampler[Any]):
    """Yields this rank's part of ``source``, in the order that rank 0 draws."""

    def __init__(self, source: Iterable[object]) -> None:
        self._source = source

    def __iter__(self) -> Iterator[Batch]:
        order = ranks.from_main(None if ranks.rank() else list(self._source))
        assert order is not None
        yield from order[ranks.rank() :: ranks.size()]

    def __len__(self) -> int:
        return len(range(ranks.rank(), len(self._source), ranks.size()))  # type: ignore[arg-type] # see is_indexed


class _WithoutPadding(Sampler[Any]):
    """Cuts off the examples that a `DistributedSampler` repeats at the end."""

    def __init__(self, source: DistributedSampler[object]) -> None:
        self._source = source

    def __iter__(self) -> Iterator[Batch]:
        return islice(iter(self._source), len(self))

    def __len__(self) -> int:
        source = self._source
        real = len(range(source.rank, len(source.dataset), source.num_replicas))  # type: ignore[arg-type] # it has a length
        return min(len(source), real)
