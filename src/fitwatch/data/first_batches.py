"""The first batches of a loader, read without a trace: the next pass over it is as if it were the first."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from fitwatch.data.batches import sampler_of
from fitwatch.data.sharding import is_indexed
from fitwatch.helpers.aliases import Loader

_STATELESS = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def first_batches(loader: Loader, count: int) -> Loader | None:
    """Return up to ``count`` batches of a loader, to iterate over once; None if reading them could leave a trace.

    Lists, and a `DataLoader` over an indexed data set with torch's own samplers, are read. A stream, an iterator or a
    sampler of the user may not give the same batches again. The caller keeps the random generators.
    """
    if isinstance(loader, Sequence):
        return loader[:count]
    if not isinstance(loader, DataLoader) or not is_indexed(loader) or type(sampler_of(loader)) not in _STATELESS:
        return None
    if type(loader.batch_sampler) not in (BatchSampler, type(None)):
        return None
    indices = list(islice(loader.sampler if loader.batch_sampler is None else loader.batch_sampler, count))
    chosen: dict[str, Any] = {"batch_sampler": indices}
    if loader.batch_sampler is None:
        chosen = {"batch_size": None, "sampler": indices}
    return DataLoader(  # another one: workers that stay alive would keep the state of this pass
        loader.dataset,
        collate_fn=loader.collate_fn,
        num_workers=min(1, loader.num_workers),
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        pin_memory=loader.pin_memory,
        generator=torch.Generator(),
        **chosen,
    )
