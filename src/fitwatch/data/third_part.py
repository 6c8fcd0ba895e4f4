"""The third part of a batch: weights of the examples, or an index, group or length that must not be taken for them."""

import logging
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from fitwatch.data.batches import index_error, is_integer, looks_like_index

logger = logging.getLogger("fitwatch")


def third_parts(data: object) -> Iterator[Tensor]:
    """Yield the third parts of all examples, where a data set, or a list of batches, holds them as tensors."""
    if isinstance(data, (DataLoader, Subset)):
        yield from third_parts(data.dataset)
    elif isinstance(data, ConcatDataset):
        for part in data.datasets:
            yield from third_parts(part)
    elif isinstance(data, TensorDataset) and len(data.tensors) == 3:
        yield data.tensors[2]
    elif type(data) in (list, tuple):
        found = [b[2] for b in data if isinstance(b, (list, tuple)) and len(b) == 3]  # type: ignore[attr-defined] # iterable
        if len({(t.shape[1:], t.dtype, t.device) if isinstance(t, Tensor) and t.dim() else None for t in found}) == 1:
            yield from () if not isinstance(found[0], Tensor) or not found[0].dim() else (torch.cat(found),)


def refuse_index(weight: object, loaders: Iterable[object]) -> None:
    """Refuse weights that are the index of the examples in a data set.

    A batch may be too small to tell, so all third parts are judged that the loaders expose.

    Args:
        weight: The weights of a batch.
        loaders: Where the batch may come from.

    Raises:
        ValueError: The weights are integers, and the data set has them as an index.
    """
    for whole in _origins(weight, loaders):
        if looks_like_index(whole):
            raise index_error(whole)


def announce_weights(weight: object, loaders: Iterable[object]) -> None:
    """Say that the examples have weights; a warning if they may have another meaning: integers, and floats that count.

    Args:
        weight: The weights of the first batch that has them.
        loaders: Where the batch may come from.
    """
    if not isinstance(weight, Tensor):
        return  # refused by the loss
    text = "the batches carry a weight for each example (sample_weight, the third part of a batch)"
    for whole in filter(_counts_up, _origins(weight, loaders)):
        logger.warning(
            "%s, and these are the numbers %d to %d, each once: if they are an index, drop it, or override "
            "training_step and validation_step",
            text,
            int(whole.min()),
            int(whole.max()),
        )
        return
    if not is_integer(weight) or (weight.dim() > 1 and bool((weight <= 1).all())):  # a mask of positions
        logger.info("%s: the loss is the weighted mean", text)
        return
    logger.warning(
        "%s, here integers (%s, ...): the loss is the weighted mean. If these are weights, pass them as floats to "
        "silence this; if they are an index, a group or a length, drop them, or override training_step and "
        "validation_step",
        text,
        ", ".join(map(str, weight.flatten()[:4].tolist())),
    )


def _origins(weight: object, loaders: Iterable[object]) -> Iterator[Tensor]:
    """Yield the third parts that hold the weights of a batch, for all examples."""
    if not isinstance(weight, Tensor):
        return
    for whole in (third for loader in loaders for third in third_parts(loader)):
        if whole.dtype is weight.dtype and bool(torch.isin(_wide(weight), _wide(whole)).all()):
            yield whole


def _wide(values: Tensor) -> Tensor:
    """Return values on the CPU in a dtype that `torch.isin` takes."""
    return values.detach().to("cpu", torch.float64 if values.is_floating_point() else torch.int64)


def _counts_up(whole: Tensor) -> bool:
    """Return whether floats, one for each example, are consecutive whole numbers in any order."""
    if not whole.is_floating_point() or whole.numel() != len(whole) or len(whole) < 8:
        return False
    ordered = whole.flatten().double().sort().values
    if not bool(ordered.isfinite().all()):
        return False
    return bool((ordered == ordered[0].floor() + torch.arange(len(ordered), device=ordered.device)).all())
