"""Class counts of targets, data sets and loaders."""

import copy
import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)
from tqdm.auto import tqdm

from fitwatch import ranks
from fitwatch.data.batches import generators_of, length, looks_like_index, sampler_of, targets_of
from fitwatch.data.containers import from_array, is_array
from fitwatch.data.sharding import gives_part, split
from fitwatch.data.third_part import third_parts
from fitwatch.helpers.rng import rng_state, set_rng_state
from fitwatch.losses import BinaryCrossEntropy, Loss
from fitwatch.losses.base import as_sample_weight, without_masked
from fitwatch.losses.errors import check_values

logger = logging.getLogger("fitwatch")

_Known = tuple[Tensor, Tensor | None]  # all targets, and the weights of the examples if there are any

_ALLOWED = "classes are counted in targets, in a Dataset, or in a loader of batches (input, target)"


def count_classes(
    data: object, *, num_classes: int | None = None, ignore_index: int | None = None, multi_label: bool = False
) -> Tensor:
    """Count how often each class occurs.

    Targets are interpreted by their dtype:

    - integers of any shape are class indices;
    - bools, and floats that are all 0 or 1 (but not of shape (N, C)), are labels of a binary problem;
    - floats of shape (N, C) with C >= 2 are class probabilities, rows in [0, 1] that sum to 1.

    If the data carries weights of the examples, each example adds its weight instead of 1. Integers that differ for all
    examples are an index and no weights; a warning says so. A data set that exposes its
    targets is counted without reading an example: a `TensorDataset` of ``(x, y)`` or ``(x, y, sample_weight)``, or an
    attribute ``targets`` or ``labels`` of its length (whose examples then have no weights), also through `Subset`,
    `ConcatDataset` and `SubsetRandomSampler`. Any other, and one with a ``target_transform``, takes one pass, which
    restores the state of the random generators.

    Args:
        data: Targets (a tensor, an array or a (nested) sequence); a `Dataset`; or a loader, which is any iterable of
            batches that can be iterated more than once. Examples and batches are ``(input, target)``,
            ``(input, target, sample_weight)``, or mappings with these keys, or with ``labels``.
        num_classes: C. Default: the largest label plus 1 (2 for a binary problem); give it if the last class may be
            absent. With ``multi_label``, K.
        ignore_index: Class index that does not count.
        multi_label: The targets are those of `BinaryCrossEntropy`, all 0 or 1 in any dtype: shape (N, K) for K labels
            that do not exclude each other; any other shape is one label, K = 1. Weights of shape (N, K) mask
            single labels.

    Returns:
        Shape (C,), or (K, 2) with the negatives and positives of each label: int64, or float64 sums of weights or
        probabilities. A pass counts the examples that the loader draws; without a pass, a sampler that draws some
        examples more often than others has no effect.

    Raises:
        ValueError: A label is negative or at least `num_classes` (the message names it and its index in the flattened
            targets), a float is neither a binary label nor a probability, weights do not fit, or there are no targets
            and no `num_classes`.
        TypeError: `data` is none of these, does not return batches, or is an iterator, which counting would exhaust.
    """
    if isinstance(data, Iterator):  # not iter(data): a DataLoader would draw a random number
        raise TypeError(
            "can't count the classes of an iterator, which a pass would exhaust: pass a loader that can be iterated "
            "again (WeightedLoss also takes counts, or the weights themselves)"
        )
    if multi_label and ignore_index is not None:
        raise ValueError(f"multi_label targets have no ignore_index, got {ignore_index}: mask labels by a weight of 0")
    count: Callable[..., Tensor] = partial(_count, num_classes=num_classes, ignore_index=ignore_index)
    if multi_label:
        count = partial(_count_labels, num_labels=num_classes)
    known = exposed_targets(data)
    for third in () if known is None or not isinstance(data, (DataLoader, Dataset)) else third_parts(data):
        if looks_like_index(third):
            _warn_of_index(third)
    counts = _count_by_pass(data, count) if known is None else count(*known)
    if counts is None or not len(counts):
        if num_classes is None:
            raise ValueError("there are no targets to count: give num_classes, or targets with at least one label")
        counts = torch.zeros(num_classes, *[2] * multi_label, dtype=torch.int64)
    return counts


def count_over_ranks(
    loader: Iterable[object],
    *,
    num_classes: int | None = None,
    ignore_index: int | None = None,
    multi_label: bool = False,
) -> Tensor:
    """Return `count_classes` of the training data of all ranks, the same on each rank.

    Exposed targets, and a loader that is the same on all ranks, are complete on every rank.
    """
    count = partial(count_classes, num_classes=num_classes, ignore_index=ignore_index, multi_label=multi_label)
    if not gives_part(loader) or exposed_targets(loader) is not None:
        return count(loader)
    counts, *others = ranks.gather(count(split(loader)))
    for new in others:
        counts = _added(counts, new)
    return counts


def free_counts(
    loader: Iterable[object],
    *,
    num_classes: int | None = None,
    ignore_index: int | None = None,
    multi_label: bool = False,
) -> Tensor | None:
    """Return the class counts if no example has to be read for them; None if one has, or the targets can't be counted.

    They are free where the data set exposes its targets, and in a list of batches. Nothing is logged.
    """
    try:
        known = exposed_targets(loader)
        if known is None and isinstance(loader, (list, tuple)):
            columns = list(zip(*(targets_of(batch) for batch in loader), strict=True))
            targets, *weights = (torch.cat([_as_tensor(part) for part in column]) for column in columns)
            known = targets, _weights([targets, *weights])
        if known is None:
            return None
        if multi_label:
            return _count_labels(*known, num_labels=None)
        return _count(*known, num_classes=num_classes, ignore_index=ignore_index)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None  # the loss refuses them, or they are of another form


def loss_counts(loss: Loss, loader: Iterable[object], num_classes: int) -> Tensor | None:
    """Return `free_counts` as a loss of one label or of exclusive classes reads the targets, shape (C,)."""
    if isinstance(loss, BinaryCrossEntropy):
        counts = free_counts(loader, multi_label=True)
        return counts[0] if counts is not None and len(counts) == 1 else None
    return free_counts(loader, num_classes=num_classes, ignore_index=getattr(loss, "ignore_index", None))


# -- targets -----------------------------------------------------------------------------------------------------------


def _count(
    labels: Tensor, weight: Tensor | None = None, *, num_classes: int | None, ignore_index: int | None
) -> Tensor:
    """Return counts of shape (C,), or (0,) if nothing counts and C is unknown."""
    if labels.is_floating_point():
        if labels.dim() == 2 and labels.shape[1] > 1:
            return _sum_probabilities(labels, weight, num_classes)
        if weight is not None:
            labels = without_masked(labels, weight)
        allowed = "be binary labels 0 and 1, or probabilities of shape (N, C), and class indices must be integers"
        check_values(f"floating-point targets must {allowed}", labels, (labels != 0) & (labels != 1))
    if num_classes is None and labels.numel() and (labels.is_floating_point() or labels.dtype is torch.bool):
        num_classes = 2
    if weight is not None:
        weight = as_sample_weight(weight, labels.double()).flatten()
    labels = labels.flatten().long()
    wrong = labels < 0
    if num_classes is not None:
        wrong |= labels >= num_classes
    kept = labels
    if ignore_index is not None:
        valid = labels != ignore_index
        wrong &= valid
        kept, weight = labels[valid], None if weight is None else weight[valid]
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        allowed = "at least 0" if num_classes is None else f"0..{num_classes - 1}"
        ignored = "" if ignore_index is None else f" and ignore_index={ignore_index}"
        raise ValueError(f"label {int(labels[index])} at index {index} is out of range: allowed are {allowed}{ignored}")
    return torch.bincount(kept, weight, minlength=num_classes or 0)


def _count_labels(targets: Tensor, weight: Tensor | None = None, *, num_labels: int | None) -> Tensor:
    """Return negatives and positives of each label, shape (K, 2)."""
    if weight is not None:
        targets = without_masked(targets, weight)
        weight = as_sample_weight(weight, targets.double())
    if targets.dim() != 2:
        targets, weight = targets.reshape(-1, 1), None if weight is None else weight.reshape(-1, 1)
    if num_labels not in (None, targets.shape[1]):
        raise ValueError(f"targets of shape {tuple(targets.shape)} have {targets.shape[1]} labels, not {num_labels}")
    check_values("multi_label targets must be 0 or 1", targets, (targets != 0) & (targets != 1))
    positive = targets != 0
    if weight is None:
        number = positive.sum(0)
        return torch.stack([len(targets) - number, number], 1)
    return torch.stack([(weight * ~positive).sum(0), (weight * positive).sum(0)], 1)


def _sum_probabilities(rows: Tensor, weight: Tensor | None, num_classes: int | None) -> Tensor:
    if num_classes not in (None, rows.shape[1]):
        raise ValueError(f"targets of shape {tuple(rows.shape)} have {rows.shape[1]} classes, not {num_classes}")
    rows = rows.double()
    # 0.01: bfloat16 keeps about three digits
    wrong = ~((rows >= 0).all(1) & ((rows.sum(1) - 1).abs() < 0.01))
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"floating-point targets of shape {tuple(rows.shape)} must be probabilities, at least 0 with sum "
            f"1 in every row; row {index} is {rows[index].tolist()}"
        )
    if weight is not None:
        rows = rows * as_sample_weight(weight, rows[:, 0]).unsqueeze(1)
    return rows.sum(0)


def _as_tensor(values: object) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach()
    if isinstance(values, (list, tuple, range)) and len(values) and type(values[0]) is int:
        # a tenth of torch.tensor's time; it raises for a list of more than integers, which torch.tensor then takes
        with suppress(TypeError, OverflowError):
            return torch.frombuffer(array("q", values), dtype=torch.int64)
    if hasattr(values, "__array__"):  # a pandas Series would be read element by element
        values = values.__array__()
    if is_array(values):
        return from_array(values)
    # torch.tensor instead of as_tensor: it copies, so that a read-only array does not raise a warning
    return torch.tensor(values)


# -- data sets and loaders -----------------------------------------------------------------------------------------


def exposed_targets(data: object) -> _Known | None:
    """Return all targets, and weights if there are any; None if examples would have to be read for them."""
    if isinstance(data, DataLoader):
        known = _exposed(data.dataset)
        sampler = sampler_of(data)
        return _rows(known, sampler.indices) if isinstance(sampler, SubsetRandomSampler) else known
    if isinstance(data, Dataset):
        return _exposed(data)
    is_array = isinstance(data, Tensor) or hasattr(data, "__array__")
    if is_array or (isinstance(data, Sequence) and not (len(data) and _is_batch(data[0]))):
        try:
            return _as_tensor(data), None
        except (TypeError, ValueError, RuntimeError) as error:
            given = f"a {type(data).__name__} that is not an array: {error}"
            raise TypeError(f"{_ALLOWED} that hold tensors or NumPy arrays, got {given}") from error
    if not isinstance(data, Iterable):
        raise TypeError(f"{_ALLOWED}, got {data!r}")
    return None


def _is_batch(item: object) -> bool:
    """Return whether the first element of a list is a batch rather than a target or a row of targets."""
    if isinstance(item, (tuple, list)):
        return any((isinstance(part, Tensor) or is_array(part)) and part.ndim > 0 for part in item)
    return isinstance(item, Mapping)


def _exposed(dataset: object) -> _Known | None:
    """Return all targets of a data set that exposes them.

    None if they can't be read cheaply, or may differ from the targets of the examples: a length other than the data
    set's, a ``target_transform``, names instead of numbers.
    """
    if getattr(dataset, "target_transform", None) is not None:
        return None
    if isinstance(dataset, Subset):
        return _rows(_exposed(dataset.dataset), dataset.indices)
    if isinstance(dataset, ConcatDataset):
        return _joined([_exposed(part) for part in dataset.datasets])
    if isinstance(dataset, TensorDataset):
        _, *tensors = dataset.tensors
        return (tensors[0], _weights(tensors)) if len(tensors) in (1, 2) else None
    for name in ("targets", "labels"):
        with suppress(AttributeError, TypeError, ValueError, RuntimeError):  # no such attribute, or class names
            targets = _as_tensor(getattr(dataset, name))
            if targets.ndim and isinstance(dataset, Sized) and len(targets) == len(dataset):
                return targets, None
    return None


def _rows(known: _Known | None, indices: object) -> _Known | None:
    if known is None:
        return None
    chosen = _as_tensor(indices).long()
    targets, weight = known
    return targets[chosen], None if weight is None else weight[chosen]


def _joined(found: list[_Known | None]) -> _Known | None:
    """Join the targets of all parts; return None if a part lacks them, or has them in another form."""
    known = [part for part in found if part is not None]
    forms = {(t.shape[1:], t.dtype, None if w is None else w.shape[1:]) for t, w in known}
    if len(known) < len(found) or len(forms) != 1:
        return None
    weights = [w for _, w in known if w is not None]
    return torch.cat([t for t, _ in known]), torch.cat(weights) if weights else None


def _count_by_pass(data: object, count: Callable[..., Tensor]) -> Tensor | None:
    """Count all examples or batches, on the CPU; return None for an empty loader."""
    single, source = isinstance(data, Dataset), data
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        source = (data[i] for i in range(len(cast(Sized, data))))
    elif isinstance(data, DataLoader):
        source = copy.copy(data)  # with persistent_workers, training would continue with the workers of this pass
    generators = [(g, g.get_state()) for g in generators_of(data)]
    before = rng_state()  # drawing batches advances the generators
    weighted, plain, weights = _Sum(), _Sum(), []
    try:
        bar = tqdm(source, desc="counting classes", total=length(data), disable=None, leave=False)
        for number, batch in enumerate(bar):
            tensors = [_as_tensor(part) for part in targets_of(batch)]
            tensors = [t.unsqueeze(0) if single else t for t in tensors]
            try:
                weighted.add(count(*tensors))
                if len(tensors) == 2 and not (tensors[1].is_floating_point() or isinstance(batch, Mapping)):
                    weights.append(tensors[1].cpu())
                    plain.add(count(tensors[0]))
            except ValueError as error:
                error.add_note(f"in {'example' if single else 'batch'} {number} of the pass that counts the classes")
                raise
    finally:
        set_rng_state(before)
        for generator, state in generators:
            generator.set_state(state)
    if weights and looks_like_index(index := torch.cat(weights)):
        _warn_of_index(index)
        return plain.counts
    return weighted.counts


class _Sum:
    """A sum of counts, on the CPU.

    Attributes:
        counts: None before the first.
    """

    def __init__(self) -> None:
        self.counts: Tensor | None = None

    def add(self, new: Tensor) -> None:
        """Add counts, which may have more or fewer classes than those before."""
        self.counts = new.cpu() if self.counts is None else _added(self.counts, new.cpu())


def _weights(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return the weights of targets and weights, if there are any."""
    return tensors[1] if len(tensors) == 2 and not looks_like_index(tensors[1]) else None


def _warn_of_index(index: Tensor) -> None:
    logger.warning(
        "the third part of the examples holds integers that look like an index (%s, ...), so the classes are counted "
        "without it; if these are weights, give them as floats",
        ", ".join(map(str, index[:4].tolist())),
    )


def _added(counts: Tensor, new: Tensor) -> Tensor:
    """Add two counts, of which one may have more classes."""
    if counts.dim() == 2 and counts.shape != new.shape:
        raise ValueError(f"the targets have {len(new)} labels, but earlier ones have {len(counts)}")
    if len(counts) < len(new):
        counts, new = new, counts
    return counts + F.pad(new, (0, 0) if counts.dim() == 2 else (0, len(counts) - len(new)))
