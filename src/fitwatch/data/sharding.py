"""Which rank gets which batches: each example once, whatever their number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final
from weakref import WeakKeyDictionary

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler

from fitwatch import ranks
from fitwatch.data.batches import length

ABSENT: Final = object()
"""In place of a batch, on a rank that has none where others still have."""

_known: WeakKeyDictionary[DataLoader[Any], DataLoader[Any]] = WeakKeyDictionary()  # workers may persist in them


class Rounds:
    """The batches of this rank, in as many rounds as the rank with most of them needs.

    Args:
        loader: That which `split` takes.
        together: Whether no rank may lack a batch.

    Attributes:
        total: Rounds, where the loaders of all ranks know their length; else None.
        certain: Whether this rank's loader can't give another number of batches than its length.

    Raises:
        ValueError: A rank lacks a batch, or may lack one, and must not.
    """

    def __init__(self, loader: Iterable[Any], *, together: bool = False) -> None:
        self._batches = split(loader)
        self.total = length(self._batches)
        self.certain = isinstance(self._batches, Sequence) or _is_indexed(self._batches)  # a length may be wrong
        if ranks.size() > 1:
            lengths = ranks.gather(self.total if self.certain else None)
            if together and (None in lengths or len(set(lengths)) > 1):
                raise ValueError(
                    "SyncBatchNorm waits for all ranks in every batch, so they need the same number of batches, got "
                    f"{lengths}: choose a batch size, or drop_last=True, that gives them as many"
                )
            self.total = None if None in lengths else max(n for n in lengths if n is not None)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches) if ranks.size() == 1 else self._together()

    def _together(self) -> Iterator[Any]:
        done = 0
        batches = iter(self._batches)
        while self.total is None or done < self.total:
            batch = next(batches, ABSENT)
            if self.total is None and not ranks.sums([float(batch is not ABSENT)])[0]:
                return
            yield batch
            done += 1


def split(loader: Iterable[Any]) -> Iterable[Any]:
    """The part of ``loader`` that is this rank's.

    A `DataLoader` whose data set has indices gives every n-th batch to the same rank, in the order that rank 0 draws.
    So does a list of batches. The last round may be short of some. If its sampler is a `DistributedSampler`, its part
    is taken, without the examples that it repeats to make all parts equal; that of another sampler with
    ``num_replicas`` as it is. Any other iterable, and a loader without a length, is to give each rank its own part.
    """
    if ranks.size() == 1:
        return loader
    if isinstance(loader, Sequence):
        return loader[ranks.rank() :: ranks.size()]
    if not isinstance(loader, DataLoader) or not _is_indexed(loader):
        return loader
    if loader not in _known:
        _known[loader] = _rebuilt(loader)
    return _known[loader]


def split_length(loader: Iterable[Any]) -> int | None:
    """Batches that ``split`` gives a rank at most, without asking the others; None if that is not known."""
    batches = length(loader)
    if batches is None or gives_part(loader):
        return batches
    return -(-batches // ranks.size())


def gives_part(loader: Any) -> bool:
    """Whether ``loader`` gives this rank a part by itself, and would not give the whole."""
    if ranks.size() == 1 or isinstance(loader, Sequence):
        return False
    return not _is_indexed(loader) or _deals_out(loader)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell the samplers of a loader the epoch: a `DistributedSampler` shuffles anew only then."""
    for sampler in (sampler_of(loader), getattr(loader, "batch_sampler", None)):
        tell = getattr(sampler, "set_epoch", None)
        if tell is not None:
            tell(epoch)


def sampler_of(loader: Any) -> Any:
    """The sampler of examples that a `DataLoader` asks, also through a batch sampler that was given; None of others."""
    return getattr(getattr(loader, "batch_sampler", None), "sampler", getattr(loader, "sampler", None))


def _deals_out(loader: Any) -> bool:
    """Whether its sampler knows of ranks, as a `DistributedSampler` does."""
    return any(hasattr(s, "num_replicas") for s in (sampler_of(loader), getattr(loader, "batch_sampler", None)))


def _is_indexed(loader: Any) -> bool:
    """Whether it is a `DataLoader` that a sampler tells what to read, and when to end."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or length(loader) is None:
        return False
    return type(loader).__iter__ is DataLoader.__iter__


def _rebuilt(loader: DataLoader[Any]) -> DataLoader[Any]:
    options: dict[str, Any] = {
        name: getattr(loader, name)
        for name in ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "generator")
    }
    if loader.num_workers:
        for name in ("multiprocessing_context", "prefetch_factor", "persistent_workers"):
            options[name] = getattr(loader, name)
    if _deals_out(loader):
        sampler, batches = sampler_of(loader), loader.batch_sampler
        if type(sampler) is DistributedSampler and type(batches) is BatchSampler:
            real = BatchSampler(_WithoutPadding(sampler), batches.batch_size, batches.drop_last)
            return DataLoader(loader.dataset, batch_sampler=real, **options)
        return loader  # one of the user's own may repeat examples on purpose
    if loader.batch_sampler is None:
        return DataLoader(loader.dataset, batch_size=None, sampler=_EveryNth(loader.sampler), **options)
    return DataLoader(loader.dataset, batch_sampler=_EveryNth(loader.batch_sampler), **options)


class _EveryNth(Sampler[Any]):
    """What of ``source`` is this rank's: all ranks see the order that rank 0 draws, with its random numbers."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __iter__(self) -> Iterator[Any]:
        order = ranks.from_main(None if ranks.rank() else list(self._source))
        assert order is not None
        yield from order[ranks.rank() :: ranks.size()]

    def __len__(self) -> int:
        return len(range(ranks.rank(), len(self._source), ranks.size()))


class _WithoutPadding(Sampler[Any]):
    """A `DistributedSampler` up to where it begins to repeat examples."""

    def __init__(self, source: DistributedSampler[Any]) -> None:
        self._source = source

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._source), len(self))

    def __len__(self) -> int:
        source = self._source
        real = len(range(source.rank, len(source.dataset), source.num_replicas))  # type: ignore[arg-type] # it has a length
        return min(len(source), real)
