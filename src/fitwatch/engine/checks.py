"""Checks of the model, the data and the first batch, for mistakes that would otherwise only spoil the numbers.

Each check warns once, before step 1, and names what to write. None of them raises, since each may be wrong.
"""

import logging
from collections.abc import Collection, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from fitwatch import ranks
from fitwatch.data import batches
from fitwatch.data.counting import exposed_targets
from fitwatch.helpers.aliases import Loader
from fitwatch.helpers.modules import named_parameters
from fitwatch.losses import BinaryCrossEntropy, NegativeLogLikelihood
from fitwatch.losses.base import ClassLoss
from fitwatch.state import State

logger = logging.getLogger("fitwatch")

CHECKS: Final = (
    "untrained_parameters",
    "shared_examples",
    "validation_order",
    "last_batch",
    "probabilities",
    "labels",
)
"""The names that ``skip_checks`` takes."""

_SHUFFLES = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class Checks:
    """Runs the checks that are not skipped.

    Args:
        state: The state of the fit.
        skip: Names of checks not to run.

    Raises:
        ValueError: A name is unknown.
    """

    def __init__(self, state: State, skip: Collection[str]) -> None:
        names = [skip] if isinstance(skip, str) else list(skip)
        for name in names:
            if name not in CHECKS:
                raise ValueError(f"skip_checks takes names among {', '.join(CHECKS)}, got {name!r}")
        self._state, self._skip = state, frozenset(names)

    def before_training(self) -> None:
        """Check the optimizer and the loaders."""
        state = self._state
        self._warn("untrained_parameters", untrained_parameters(state.model, state.optimizer))
        if state.val_loader is not None:
            self._warn("shared_examples", shared_examples(state.train_loader, state.val_loader))
            if state.val_loader is not state.train_loader:
                self._warn("validation_order", validation_order(state.val_loader))
        self._warn("last_batch", last_batch(state.model, state.train_loader))

    def first_batch(self, output: object, target: object) -> None:
        """Check the outputs and targets of the first batch, which the loss has accepted."""
        if not (isinstance(output, Tensor) and isinstance(target, Tensor)):
            return
        loss = self._state.loss
        self._warn("probabilities", probabilities(loss, output.detach()))
        if isinstance(loss, ClassLoss):
            self._warn("labels", labels(output, target, self._state.train_loader))

    def _warn(self, name: str, text: str | None) -> None:
        if text is not None and name not in self._skip and ranks.rank() == 0:
            logger.warning('%s (skip_checks=["%s"] turns this check off)', text, name)


def untrained_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """Look for trainable parameters that the optimizer does not hold."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in named_parameters(model) if p.requires_grad and id(p) not in held]
    if not missing:
        return None
    shown = ", ".join(f"`{name}`" for name in missing[:3]) + (", ..." if len(missing) > 3 else "")
    return (
        f"the optimizer does not hold {len(missing)} trainable parameter{'s' * (len(missing) > 1)} of the model "
        f"({shown}), which will not be trained: create it with model.parameters(), or freeze them with "
        "requires_grad_(False)"
    )


def shared_examples(train_loader: Loader, val_loader: Loader) -> str | None:
    """Look for training examples in the validation set."""
    if train_loader is val_loader:
        found = "train_loader and val_loader are the same object"
    else:
        count, of = _shared(_examples(train_loader), _examples(val_loader))
        if not count:
            return None
        found = f"{'all' if count == of else f'{count:,} of'} {of:,} validation examples are also training examples"
    return f"{found}: the validation loss can't show overfitting. Split the data, for example with random_split"


def validation_order(val_loader: Loader) -> str | None:
    """Check that each validation sees the examples in the same order."""
    sampler = batches.sampler_of(val_loader) if isinstance(val_loader, DataLoader) else None
    shuffles = isinstance(sampler, _SHUFFLES) or (isinstance(sampler, DistributedSampler) and sampler.shuffle)
    if not shuffles:
        return None
    return (
        f"val_loader shuffles ({type(sampler).__name__}): the loss of an example can't be compared between "
        "validations, so the error bars of a rise are far wider. Use shuffle=False"
    )


def last_batch(model: nn.Module, train_loader: Loader) -> str | None:
    """Look for a last training batch of one example, which batch normalization can't use."""
    if _last_size(train_loader) != 1 or not any(isinstance(m, _BatchNorm) for m in model.modules()):
        return None
    return (
        "the last training batch of an epoch has one example, from which BatchNorm can't estimate a variance: use "
        "drop_last=True in the DataLoader"
    )


def probabilities(loss: object, output: Tensor) -> str | None:
    """Check that the outputs are what the loss takes: logits, or log-probabilities."""
    if not output.numel() or not output.is_floating_point():
        return None
    close = 1e-4 if output.dtype in (torch.float32, torch.float64) else 2e-2
    if isinstance(loss, (BinaryCrossEntropy, nn.BCEWithLogitsLoss)):
        if output.numel() >= 16 and bool(((output >= 0) & (output <= 1)).all()) and bool((output > 0).any()):
            return (
                "all outputs of the first batch are in [0, 1]: the loss applies a sigmoid itself, so remove that of "
                "the model"
            )
    elif isinstance(loss, (NegativeLogLikelihood, nn.NLLLoss)):
        if output.dim() > 1 and bool((output.float().logsumexp(1).abs() > 10 * close).any()):
            return (
                "the outputs of the first batch are not log-probabilities, which NLLLoss takes: end the model with "
                "LogSoftmax, or use CrossEntropy on logits"
            )
    elif (
        isinstance(loss, (ClassLoss, nn.CrossEntropyLoss))
        and output.dim() > 1
        and output.shape[1] > 1
        and bool((output >= 0).all())
        and bool(((output.float().sum(1) - 1).abs() < close).all())
    ):
        return (
            "the outputs of the first batch are probabilities (each row sums to 1): the loss applies a softmax itself, "
            "so remove that of the model"
        )
    return None


def labels(output: Tensor, target: Tensor, train_loader: Loader) -> str | None:
    """Look for labels that start at 1: no label is 0, in all targets if they are exposed, or in a large batch."""
    if target.is_floating_point() or output.dim() < 2:
        return None
    known = exposed_targets(train_loader) if isinstance(train_loader, DataLoader) else None
    seen = target if known is None else known[0]
    if known is None and seen.numel() < 20 * output.shape[1]:
        return None
    counted = seen[seen >= 0]
    if seen.is_floating_point() or not counted.numel() or int(counted.min()) != 1:
        return None
    where = "the first batch" if known is None else "the training data"
    return (
        f"no label in {where} is 0, though the model has outputs for the classes 0 to {output.shape[1] - 1}: if the "
        "labels start at 1, subtract 1"
    )


def _last_size(loader: Loader) -> int | None:
    """Return the number of examples in the last batch; None if unknown."""
    if isinstance(loader, DataLoader):
        sampler = loader.batch_sampler
        if type(sampler) is not BatchSampler or sampler.drop_last or sampler.batch_size == 1:
            return None
        drawn = batches.length(sampler.sampler)
        return None if drawn is None else drawn % sampler.batch_size or sampler.batch_size
    if isinstance(loader, Sequence) and len(loader) > 1:
        try:
            return batches.batch_size(loader[-1])
        except (TypeError, ValueError):
            return None
    return None


_Examples = tuple[object, Tensor | None] | None  # the object that holds them, and which of its rows


def _examples(loader: Loader) -> _Examples:
    if isinstance(loader, DataLoader):
        held, rows = loader.dataset, None
        sampler = batches.sampler_of(loader)
        if isinstance(sampler, (SubsetRandomSampler, range, list)):
            rows = torch.as_tensor(list(getattr(sampler, "indices", sampler)))
        elif not isinstance(sampler, (SequentialSampler, RandomSampler, DistributedSampler, type(None))):
            return None  # it may draw any part
        while isinstance(held, Subset):
            inner = torch.as_tensor(list(held.indices))
            rows, held = (inner if rows is None else inner[rows]), held.dataset
        return held, rows
    return None if not isinstance(loader, Sequence) else (loader, None)


def _shared(train: _Examples, val: _Examples) -> tuple[int, int]:
    """Return how many validation examples are training examples, and how many there are."""
    if train is None or val is None:
        return 0, 0
    (held, rows), (val_held, val_rows) = train, val
    if held is val_held:
        of = batches.length(val_held) if val_rows is None else len(val_rows)
        if of is None:
            return 0, 0
        if rows is None or val_rows is None:
            return (of if rows is None else len(set(rows.tolist()))), of
        return int(torch.isin(val_rows, rows).sum()), of
    if rows is None and val_rows is None and isinstance(held, TensorDataset) and isinstance(val_held, TensorDataset):
        return _same_rows(held.tensors[0], val_held.tensors[0]), len(val_held)
    return 0, 0


def _same_rows(train: Tensor, val: Tensor) -> int:
    """Return how many rows of two contiguous tensors lie in the same memory."""
    if not (len(train) and len(val) and train.is_contiguous() and val.is_contiguous() and train.device == val.device):
        return 0
    if train.shape[1:] != val.shape[1:] or train.dtype is not val.dtype:
        return 0
    size = val[0].numel() * val.element_size()
    starts, ends = zip(*((t.data_ptr(), t.data_ptr() + len(t) * size) for t in (train, val)), strict=True)
    return max(0, min(ends) - max(starts)) // size if size else 0
