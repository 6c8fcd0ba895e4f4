"""The baseline before any validation, from the targets that the data sets show."""

from contextlib import suppress
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate, default_convert

from fitwatch.data.counting import exposed_targets
from fitwatch.losses import BinaryCrossEntropy, Loss, MeanSquaredError
from fitwatch.losses.base import FAILURES, ClassLoss
from fitwatch.losses.baseline import Baseline, TargetSums


def expected_baseline(loss: Any, train_loader: Any, val_loader: Any) -> Baseline | None:
    """The baseline before any validation, where both data sets show their targets; else None.

    The number of classes is that of the loss, else taken from the labels; the first validation, which sees the
    outputs, says it for sure. An own ``collate_fn`` may give other targets than the data set shows.
    """
    loaders = (train_loader, val_loader)
    if not all(isinstance(x, DataLoader) and x.collate_fn in (default_collate, default_convert) for x in loaders):
        return None
    with suppress(*FAILURES):  # it is a line in a report; what is wrong with the data, training explains
        return _expected(loss, train_loader, val_loader)
    return None


def _expected(loss: Any, train_loader: DataLoader[Any], val_loader: DataLoader[Any]) -> Baseline | None:
    train, val = exposed_targets(train_loader), exposed_targets(val_loader)
    if train is None or val is None or not (len(train[0]) and len(val[0])):
        return None
    targets, weight = val
    output = targets
    if not isinstance(loss, (BinaryCrossEntropy, MeanSquaredError)) and not targets.is_floating_point():
        ignore_index = getattr(loss, "ignore_index", None)
        kept = [labels if ignore_index is None else labels[labels != ignore_index] for labels in (train[0], targets)]
        both = torch.cat([labels.flatten() for labels in kept])
        if targets.dtype is torch.bool or not len(both) or int(both.min()) < 0:  # the validation will tell
            return None
        per_class = loss._per_class() if isinstance(loss, Loss) else None  # noqa: SLF001 - no one else's business
        classes = int(both.max()) + 1
        if per_class is not None:
            if len(per_class) < classes:
                return None
            classes = len(per_class)
        output = torch.empty((len(targets), classes, *targets.shape[1:]), device="meta")
    elif isinstance(loss, ClassLoss) and targets.dim() != 2:
        return None
    sums = TargetSums(loss)
    sums.update(output, targets, weight)
    return sums.baseline()
