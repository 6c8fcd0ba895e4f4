"""The baseline before any validation, from targets that the data sets expose."""

from contextlib import suppress
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate, default_convert

from fitwatch.data.counting import exposed_targets
from fitwatch.losses import BinaryCrossEntropy, Loss, MeanSquaredError
from fitwatch.losses.base import FAILURES, ClassLoss
from fitwatch.losses.baseline import Baseline, TargetSums


def expected_baseline(loss: Any, train_loader: Any, val_loader: Any) -> Baseline | None:
    """Return the baseline before any validation, if both data sets expose their targets; else None.

    The number of classes is fixed by the loss or taken from the labels; the first validation, which sees the outputs,
    confirms it. With a custom ``collate_fn``, which may change the targets, there is no baseline.
    """
    loaders = (train_loader, val_loader)
    if not all(isinstance(x, DataLoader) and x.collate_fn in (default_collate, default_convert) for x in loaders):
        return None
    with suppress(*FAILURES):  # only a line in a report: training reports invalid data
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
        if targets.dtype is torch.bool or not len(both) or int(both.min()) < 0:  # invalid: left to validation
            return None
        classes, fixed = int(both.max()) + 1, loss.fixed_classes if isinstance(loss, Loss) else None
        if fixed is not None and fixed < classes:
            return None
        classes = fixed or classes
        output = torch.empty((len(targets), classes, *targets.shape[1:]), device="meta")
    elif isinstance(loss, ClassLoss) and targets.dim() != 2:
        return None
    sums = TargetSums(loss)
    sums.update(output, targets, weight)
    return sums.baseline()
