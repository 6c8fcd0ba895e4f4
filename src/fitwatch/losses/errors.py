"""Clear errors for outputs and targets that a loss cannot take: read only when something has gone wrong."""

from __future__ import annotations

import torch
from torch import Tensor

# Probabilities may be rounded, or smoothed by hand, but not by as much.
_NO_PROBABILITIES = 0.01


def refuse_classes(
    output: Tensor,
    target: Tensor,
    weights: Tensor | None,
    *,
    ignore_index: int | None = None,
    probabilities: bool = True,
    cause: Exception | None = None,
) -> None:
    """Raise the error that says why these are no outputs and targets of C >= 2 classes; return if they are.

    Labels are looked at only after a failure (`cause`) and only on the CPU: elsewhere the look itself would
    wait for the device, or fail after a device-side assertion.
    """
    _refuse_types(output, target, cause)
    if output.dim() == 0:
        raise ValueError(f"outputs must have a class dimension, as in (N, C); {_shapes(output, target)}") from cause
    dimension = 0 if output.dim() == 1 else 1
    num_classes = output.shape[dimension]
    if num_classes < 2:
        raise ValueError(
            f"cross-entropy needs at least two classes in dimension {dimension} of the outputs (with one "
            f"it is always 0); {_shapes(output, target)}. For a single logit use BinaryCrossEntropy"
        ) from cause
    positions = output.shape[:dimension] + output.shape[dimension + 1 :]
    _refuse_targets(output, target, positions, probabilities, cause)
    if target.is_floating_point() and ignore_index is not None and ignore_index >= 0:
        raise ValueError(
            f"ignore_index={ignore_index} has no meaning for targets that are probabilities; {_shapes(output, target)}"
        ) from cause
    if weights is not None:
        if len(weights) != num_classes:
            raise ValueError(
                f"there are {len(weights)} class weights or costs, but the outputs of shape "
                f"{tuple(output.shape)} have {num_classes} classes{_uncounted(len(weights), num_classes)}"
            ) from cause
        _refuse_devices(output, weights, cause)
    if cause is not None and not target.is_floating_point() and target.device.type == "cpu":
        _refuse_labels(target, num_classes, ignore_index, cause)


def _uncounted(counted: int, num_classes: int) -> str:
    """What to do where the weights were counted, which only ``WeightedLoss`` could tell."""
    if counted >= num_classes:
        return ""
    last = num_classes - 1
    lacking = f"class {last}" if counted == last else f"classes {counted} to {last}"
    return (
        f"; if WeightedLoss counted them, {lacking} did not occur in the training data: check the labels and the "
        f"split, or give it num_classes={num_classes} and absent='zero' for weight 0, or counts of all classes"
    )


def refuse_logits(output: Tensor, target: Tensor, pos_weight: Tensor | None = None, *, single: bool = False) -> None:
    """Raise the error that says why these are no outputs and targets of one (`single`) or K binary labels."""
    _refuse_types(output, target)
    if output.shape != target.shape or (single and output.dim() > 1 and output.shape[1] != 1):
        hint = ""
        if output.shape == (*target.shape, 1):
            hint = "; use output.squeeze(-1)"
        elif target.shape == (*output.shape, 1):
            hint = "; use target.squeeze(-1)"
        elif output.dim() == 2 and output.shape[1] > 1:
            hint = "; for one column per class use CrossEntropy, or RealWorldCrossEntropy with costs per class"
        what = "the same shape, (N,) or (N, 1)" if single else "the same shape"
        raise ValueError(f"binary outputs and targets must have {what}: {_shapes(output, target)}{hint}")
    if pos_weight is not None:
        labels = len(pos_weight) if pos_weight.dim() == 1 else None
        if labels is not None and (output.dim() != 2 or output.shape[1] != labels):
            raise ValueError(
                f"pos_weight has {labels} values and needs outputs of shape (N, {labels}); {_shapes(output, target)}"
            )
        _refuse_devices(output, pos_weight)
    if target.device.type == "cpu" and target.numel():
        low, high = target.aminmax()
        if low.item() < 0 or high.item() > 1:  # elsewhere the look would wait for the device
            index = int(((target < 0) | (target > 1)).flatten().nonzero()[0])
            value = target.flatten()[index].item()
            raise ValueError(f"binary targets must be in [0, 1], got {value} at index {index} of the batch")


def refuse_shapes(output: Tensor, target: Tensor) -> None:
    """Raise the error that says why these are no outputs and targets of one shape."""
    _refuse_types(output, target)
    if output.shape != target.shape:
        raise ValueError(f"outputs and targets must have the same shape: {_shapes(output, target)}")


def _refuse_types(output: Tensor, target: Tensor, cause: Exception | None = None) -> None:
    kinds = type(output), type(target)
    if not all(issubclass(kind, Tensor) for kind in kinds):
        names = " and ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"a loss takes a tensor of outputs and a tensor of targets, got {names}") from cause
    if not output.is_floating_point():
        raise ValueError(
            f"outputs must be floating-point logits, got {output.dtype} (and targets of {target.dtype}); "
            "are outputs and targets swapped?"
        ) from cause


def _shapes(output: Tensor, target: Tensor) -> str:
    return f"got outputs of shape {tuple(output.shape)} and targets of shape {tuple(target.shape)}"


def _refuse_targets(
    output: Tensor,
    target: Tensor,
    positions: tuple[int, ...],
    probabilities: bool,
    cause: Exception | None,
) -> None:
    dtypes = f"got targets of {target.dtype} for outputs of {output.dtype}"
    if target.shape == positions:
        if target.dtype not in (torch.int64, torch.uint8):
            raise ValueError(f"class indices must be torch.int64 (target.long()); {dtypes}") from cause
    elif target.shape != output.shape or not probabilities:
        expected = f"class indices of shape {tuple(positions)}"
        if probabilities:
            expected += f" or probabilities of shape {tuple(output.shape)}"
        raise ValueError(f"outputs and targets do not match: {_shapes(output, target)}, expected {expected}") from cause
    elif not target.is_floating_point():
        raise ValueError(
            f"targets of the outputs' shape {tuple(target.shape)} are probabilities and must be "
            f"floating-point; {dtypes}{_single_logits(output)}"
        ) from cause
    elif output.dim() == 1 and abs(_total(target) - 1) > _NO_PROBABILITIES:
        raise ValueError(
            f"the probabilities of one example must sum to 1, got {_total(target):.4g}; "
            f"{_shapes(output, target)}{_single_logits(output)}"
        ) from cause


def _total(target: Tensor) -> float:
    try:
        return float(target.sum())
    except RuntimeError:  # no look at the values is possible, as within torch.func.vmap
        return 1.0


def _single_logits(output: Tensor) -> str:
    """What is likely meant by outputs without a class dimension."""
    if output.dim() != 1:
        return ""
    return (
        f". Cross-entropy takes outputs of shape {tuple(output.shape)} for one example of {len(output)} classes; "
        "for one logit per example use BinaryCrossEntropy"
    )


def _refuse_labels(target: Tensor, num_classes: int, ignore_index: int | None, cause: Exception) -> None:
    wrong = (target < 0) | (target >= num_classes)
    if ignore_index is not None:
        wrong &= target != ignore_index
    if wrong.any():
        position = tuple(wrong.nonzero()[0].tolist())
        index = ", ".join(map(str, position)) or "0"
        also = "" if ignore_index is None else f" and ignore_index={ignore_index}"
        raise IndexError(
            f"label {int(target[position])} at index {index} of the batch is out of range: "
            f"allowed are 0..{num_classes - 1}{also}"
        ) from cause


def _refuse_devices(output: Tensor, weights: Tensor, cause: Exception | None = None) -> None:
    if weights.device != output.device:
        raise ValueError(
            f"the loss is on {weights.device} and the outputs are on {output.device}: move the loss with "
            f".to({str(output.device)!r})"
        ) from cause
