"""Names for types that only the user knows."""

from collections.abc import Iterable
from typing import Any

Batch = Any
"""A batch: ``(input, target)``, or whatever the user's steps take."""

Loader = Iterable[Batch]
"""An iterable of batches."""

StateDict = dict[str, Any]
"""What a checkpoint can keep: tensors, numbers, strings, and lists and dicts of them."""
