"""Where a pass over a loader stands: what it needs to go on in another process, to the bit."""

import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from attrs import define
from torch.utils.data import DataLoader, IterableDataset

from fitwatch.data.batches import sampler_of
from fitwatch.data.loading import is_plain, read
from fitwatch.helpers.aliases import StateDict
from fitwatch.helpers.rng import (
    RngState,
    numpy_state,
    python_state,
    rng_state,
    set_numpy_state,
    set_python_state,
    set_rng_state,
)

logger = logging.getLogger("fitwatch")


@runtime_checkable
class Stateful(Protocol):
    """Keeps a state that a checkpoint can hold, as the loader and the samplers of torchdata do."""

    def state_dict(self) -> StateDict:
        """Return the state."""

    def load_state_dict(self, state_dict: StateDict, /) -> object:
        """Restore the state."""


@define
class Position:
    """Where the pass over the training loader stands.

    Attributes:
        started: Random states before the first batch of the running epoch, as for `random_states`; None between epochs,
            and if the loop iterates over the loader itself.
        resumed: What a checkpoint saved within an epoch, until that epoch goes on.
    """

    started: StateDict | None = None
    resumed: StateDict | None = None
    _random: tuple[RngState, list[Any], tuple[object, ...]] | None = None

    def resume(self, position: StateDict | None, rng: RngState, sources: list[Any], *loaders: object) -> None:
        """Restore the random states of a checkpoint, now and once more in `go_on`.

        Args:
            position: What `saved` returned.
            rng: The global random states.
            sources: Those of the loaders, from `random_states`.
            loaders: The training loader, and the others.
        """
        self._random = rng, sources, loaders
        if position is not None and position["started"] is None:  # between epochs
            if isinstance(loaders[0], Stateful):
                loaders[0].load_state_dict(position["loader"])
            position = None
        self.resumed = position
        self._restore()
        if position is not None:
            position["now"] = {"rng": rng, "sources": random_states(loaders[0])}

    def go_on(self) -> None:
        """Restore the random states once more, where the first epoch starts after a checkpoint was read."""
        self._restore()
        self._random = None

    def _restore(self) -> None:
        if self._random is not None:
            rng, sources, loaders = self._random
            set_random_states(sources, *loaders)
            set_rng_state(rng)

    def start(self, loader: Iterable[object]) -> None:
        """Note the random states before the first batch of an epoch."""
        self.started = {"rng": rng_state(), "sources": random_states(loader), "live": _has_live_workers(loader)}

    def saved(self, loader: Iterable[object], others: Mapping[str, object], *, within: bool) -> StateDict | None:
        """Return what a checkpoint needs; None if it is nothing, or if the position is unknown.

        Args:
            loader: The training loader.
            others: Name -> validation loader, or None.
            within: Whether it is saved within an epoch.
        """
        own = loader.state_dict() if isinstance(loader, Stateful) else None
        if not within:
            return None if own is None else {"started": None, "loader": own, "live": []}
        if self.started is None:
            return None
        live = ["train_loader"] if self.started["live"] else []
        live += [name for name, other in others.items() if _has_live_workers(other)]
        return {"started": self.started, "loader": own, "live": live}


def random_states(*loaders: object) -> list[Any]:
    """Return the states of the random generators that belong to loaders, and of parts with a state of their own."""
    return [_state(source) for source in _sources(*loaders)]


def set_random_states(states: list[Any], *loaders: object) -> None:
    """Restore what `random_states` returned."""
    for source, state in zip(_sources(*loaders), states, strict=True):
        _restore(source, state)


def skipping(loader: Iterable[object], batches: int, own: StateDict | None, *, fast: bool) -> Iterator[object]:
    """Iterate over ``loader`` from batch ``batches`` on; random states are those of the start of the epoch.

    Skipped batches are not loaded if a sampler decides what is read; with workers, which draw random numbers of their
    own, and from any other loader they are loaded again.

    Args:
        loader: This rank's batches.
        batches: How many to skip.
        own: The loader's own state, if it has one: it then goes on by itself.
        fast: As for `read`.
    """
    if own is not None and isinstance(loader, Stateful):
        loader.load_state_dict(own)
        return iter(loader)
    if is_plain(loader) and fast:
        return read(loader, fast=True, skip=batches)
    if isinstance(loader, list):
        return islice(loader, batches, None)
    iterator = iter(loader)
    indices = getattr(iterator, "_sampler_iter", None)
    if _reads_itself(loader) and indices is not None:
        for _ in islice(indices, batches):
            pass
        return iterator
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        logger.warning(
            "train_loader (%s) has no state_dict: %d batches are read again and skipped, which is exact only if it "
            "yields the same batches",
            type(loader).__name__,
            batches,
        )
    for _ in islice(iterator, batches):
        pass
    return iterator


def _has_live_workers(loader: object) -> bool:
    return getattr(loader, "_iterator", None) is not None  # of persistent workers only


def _reads_itself(loader: object) -> bool:
    """Return whether this is a `DataLoader` that reads examples in this process, as its sampler draws them."""
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return False
    return loader.num_workers == 0 and not isinstance(loader.dataset, IterableDataset)


def _sources(*loaders: object) -> list[object]:
    """Return random generators of torch, Python and NumPy under any name, and samplers and data sets with a state."""
    found: dict[int, object] = {}
    seen: set[int] = set()
    for loader in loaders:
        inner = (getattr(loader, name, None) for name in ("batch_sampler", "dataset", "collate_fn"))  # or properties
        waiting: list[object] = [loader, sampler_of(loader), *inner]
        for owner in waiting:  # which grows
            if id(owner) in seen or not hasattr(owner, "__dict__") or isinstance(owner, (type, torch.nn.Module)):
                continue
            seen.add(id(owner))
            if owner is not loader and isinstance(owner, Stateful):
                found[id(owner)] = owner
            for name, value in vars(owner).items():
                if isinstance(value, (torch.Generator, random.Random)) or _is_numpy(value):
                    found[id(value)] = value
                elif name in _INNER_LISTS and isinstance(value, (list, tuple)):
                    waiting += value
                elif name in _INNER:
                    waiting.append(value)
    return list(found.values())


_INNER = frozenset({"dataset", "transform", "target_transform", "transforms", "collate_fn", "batch_sampler", "sampler"})
"""Attributes of loaders, data sets, transforms and samplers that hold another one."""
_INNER_LISTS = frozenset({"datasets", "transforms"})
"""Those that hold several. A list under ``dataset`` holds the examples, which may be millions."""


def _is_numpy(value: object) -> bool:
    return type(value).__module__.startswith("numpy.random") and type(value).__name__ in ("Generator", "RandomState")


def _state(source: Any) -> Any:
    if isinstance(source, torch.Generator):
        return source.get_state()
    if isinstance(source, random.Random):
        return python_state(source)
    return numpy_state(source) if _is_numpy(source) else source.state_dict()


def _restore(source: Any, state: Any) -> None:
    if isinstance(source, torch.Generator):
        source.set_state(state)
    elif isinstance(source, random.Random):
        set_python_state(source, state)
    elif _is_numpy(source):
        set_numpy_state(source, state)
    else:
        source.load_state_dict(state)
