"""Names for types that only the user knows."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

Batch = Any
"""A batch: ``(input, target)``, or whatever the user's steps take."""

Loader = Iterable[Batch]
"""An iterable of batches."""

Loaders = Loader | Mapping[str, Loader]
"""A loader, or several by name."""

StateDict = dict[str, Any]
"""What a checkpoint can keep: tensors, numbers, strings, and lists and dicts of them."""


class Scheduler(Protocol):
    """A learning-rate scheduler, such as those of torch."""

    def step(self, *args: Any, **kwargs: Any) -> object:
        """Set the next learning rate."""

    def state_dict(self) -> StateDict:
        """Return what a checkpoint keeps."""

    def load_state_dict(self, state_dict: StateDict) -> object:
        """Restore what `state_dict` returned."""
