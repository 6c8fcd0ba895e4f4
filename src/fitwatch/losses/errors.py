"""Descriptive errors for outputs and targets that a loss cannot take."""

import torch
from torch import Tensor

_SUM_TOLERANCE = 0.01
"""How far the sum of probabilities may be from 1: they may be rounded, or smoothed by hand."""


def check_classes(
    output: Tensor,
    target: Tensor,
    per_class: Tensor | None,
    ignore_index: int | None,
    *,
    probabilities: bool = False,
    labels: bool = False,
) -> None:
    """Raise a descriptive error unless outputs and targets are valid for C >= 2 classes.

    ``per_class``, shape (C, ...), holds weights, costs or counts of the loss. Targets are class indices or, with
    ``probabilities``, also class probabilities. With ``labels``, the range of the indices is checked, but only on the
    CPU: on other devices the check would synchronize, or fail itself after a device-side assertion.
    """
    check_types(output, target)
    if output.dim() == 0:
        raise ValueError(f"outputs must have a class dimension, as in (N, C); {_given(output, target)}")
    dimension = 0 if output.dim() == 1 else 1
    num_classes = output.shape[dimension]
    if num_classes < 2:
        raise ValueError(
            f"cross-entropy needs at least two classes in dimension {dimension} of the outputs (with one "
            f"it is always 0); {_given(output, target)}. For a single logit use BinaryCrossEntropy"
        )
    _check_targets(output, target, output.shape[:dimension] + output.shape[dimension + 1 :], probabilities)
    if target.is_floating_point() and ignore_index is not None and ignore_index >= 0:
        raise ValueError(
            f"ignore_index={ignore_index} has no meaning for targets that are probabilities; {_given(output, target)}"
        )
    if per_class is not None:
        if len(per_class) != num_classes:
            raise ValueError(
                f"there are {len(per_class)} class weights or costs, but the outputs of shape {tuple(output.shape)} "
                f"have {num_classes} classes{_absent_hint(len(per_class), num_classes)}"
            )
        _check_devices(output, per_class)
    if labels and not target.is_floating_point() and target.device.type == "cpu":
        check_labels(target, num_classes, ignore_index)


def check_logits(output: Tensor, target: Tensor, pos_weight: Tensor | None = None, *, single: bool = False) -> None:
    """Raise a descriptive error unless outputs and targets are valid for one (``single``) or K binary labels."""
    check_types(output, target)
    if output.shape != target.shape or (single and output.dim() > 1 and output.shape[1] != 1):
        hint = _squeeze_hint(output, target)
        if not hint and output.dim() == 2 and output.shape[1] > 1:
            hint = "; for one column per class use CrossEntropy, or RealWorldCrossEntropy with costs per class"
        expected = "the same shape, (N,) or (N, 1)" if single else "the same shape"
        raise ValueError(f"binary outputs and targets must have {expected}: {_given(output, target)}{hint}")
    if pos_weight is not None:
        if pos_weight.dim() == 1 and (output.dim() != 2 or output.shape[1] != len(pos_weight)):
            raise ValueError(
                f"pos_weight has {len(pos_weight)} values and needs outputs of shape (N, {len(pos_weight)}); "
                f"{_given(output, target)}"
            )
        _check_devices(output, pos_weight)
    if target.device.type == "cpu" and target.numel():  # on other devices the check would synchronize
        low, high = target.aminmax()
        if low.item() < 0 or high.item() > 1:
            check_binary("binary targets must be in [0, 1]", target, (target < 0) | (target > 1))


def check_shapes(output: Tensor, target: Tensor) -> None:
    """Raise a descriptive error unless outputs and targets have the same shape."""
    check_types(output, target)
    if output.shape != target.shape:
        raise ValueError(
            f"outputs and targets must have the same shape: {_given(output, target)}{_squeeze_hint(output, target)}"
        )


def check_types(output: object, target: object) -> None:
    """Raise a descriptive error unless both are tensors and the outputs are floating-point."""
    if not (isinstance(output, Tensor) and isinstance(target, Tensor)):
        names = f"{type(output).__name__} and {type(target).__name__}"
        hint = ""
        if not isinstance(output, Tensor):
            hint = "; pass a loss that picks the part of the output, or override training_step and validation_step"
        elif isinstance(target, (list, tuple)) and target and all(isinstance(part, Tensor) for part in target):
            hint = "; make one tensor of the targets with torch.stack"
        raise TypeError(f"a loss takes a tensor of outputs and a tensor of targets, got {names}{hint}")
    if not output.is_floating_point():
        raise ValueError(
            f"outputs must be floating-point logits, {_given(output, target)}; are outputs and targets swapped?"
        )


def check_values(expected: str, values: Tensor, wrong: Tensor, hint: str = "") -> None:
    """Raise a ValueError that shows the first wrong value and its index in the flattened tensor, if there is one."""
    if bool(wrong.any()):
        index = int(wrong.flatten().nonzero()[0])
        raise ValueError(f"{expected}, got {values.flatten()[index].item()} at index {index}{hint}")


def _squeeze_hint(output: Tensor, target: Tensor) -> str:
    if output.shape == (*target.shape, 1):
        return "; use output.squeeze(-1)"
    return "; use target.squeeze(-1)" if target.shape == (*output.shape, 1) else ""


def check_binary(expected: str, target: Tensor, wrong: Tensor) -> None:
    """Raise the error of `check_values`, with a remedy if the labels are -1 and 1."""
    hint = _SIGNS_HINT if bool(wrong.any()) and _are_signs(target) else ""
    check_values(expected, target, wrong, hint)


_SIGNS_HINT = "; labels are 0 and 1: if yours are -1 and 1, write (target > 0).to(target.dtype)"


def _are_signs(target: Tensor) -> bool:
    """Return whether all labels are -1 or 1."""
    return bool(((target == 1) | (target == -1)).all())


def _given(output: Tensor, target: Tensor) -> str:
    (x, x_dtype), (y, y_dtype) = ((tuple(t.shape), t.dtype) for t in (output, target))
    return f"got outputs of shape {x} ({x_dtype}) and targets of shape {y} ({y_dtype})"


def _check_targets(output: Tensor, target: Tensor, positions: tuple[int, ...], probabilities: bool) -> None:
    problem = None
    if target.shape == positions:
        if target.dtype not in (torch.int64, torch.uint8):
            problem = "class indices must be torch.int64 (target.long())"
    elif target.shape != output.shape or not probabilities:
        problem = f"outputs and targets do not match: expected class indices of shape {tuple(positions)}"
        problem += f" or probabilities of shape {tuple(output.shape)}" if probabilities else ""
    elif not target.is_floating_point():
        problem = "targets of the outputs' shape are probabilities and must be floating-point"
    elif output.dim() == 1 and abs(_total(target) - 1) > _SUM_TOLERANCE:
        problem = f"the probabilities of one example must sum to 1, got {_total(target):.4g}"
    elif output.dim() > 1:
        check_probabilities(target)
    if problem:
        hint = ""
        if probabilities and output.dim() == 1 and output.shape == target.shape:
            hint = f". One example of {len(output)} classes has outputs of this shape"
            hint += "; for one logit per example use BinaryCrossEntropy"
        raise ValueError(f"{problem}; {_given(output, target)}{hint}")


def check_probabilities(target: Tensor) -> None:
    """Raise a ValueError unless target probabilities, (N, C, ...), are at least 0 and sum to 1 over the classes.

    Positions that are 0 everywhere do not count. Checked on the CPU only: elsewhere it would synchronize.
    """
    if target.device.type != "cpu" or not target.numel() or torch.compiler.is_compiling():
        return
    try:
        sums = target.sum(1)
        wrong = ((sums - 1).abs() > _SUM_TOLERANCE) & target.ne(0).any(1) | (target < 0).any(1) | sums.isnan()
        if not bool(wrong.any()):
            return
    except RuntimeError:  # values cannot be read within torch.func.vmap
        return
    index = wrong.nonzero()[0].tolist()
    values = target.movedim(1, -1)[tuple(index)].tolist()
    shown = ", ".join(f"{v:.4g}" for v in values[:6]) + (", ..." if len(values) > 6 else "")
    hint = ""
    if bool(((target == 0) | (target == 1)).all()):
        hint = "; for labels that do not exclude each other use BinaryCrossEntropy"
    raise ValueError(
        f"target probabilities must be at least 0 and sum to 1 over the classes, got [{shown}] with the sum "
        f"{sum(values):.4g} at index {', '.join(map(str, index))} of the batch{hint}"
    )


def _total(target: Tensor) -> float:
    try:
        return float(target.sum())
    except RuntimeError:  # values cannot be read within torch.func.vmap
        return 1.0


def _absent_hint(counted: int, num_classes: int) -> str:
    """Return a remedy for the case that ``WeightedLoss`` counted fewer classes than the outputs have."""
    if counted >= num_classes:
        return ""
    last = num_classes - 1
    absent = f"class {last}" if counted == last else f"classes {counted} to {last}"
    return (
        f"; if WeightedLoss counted them, {absent} did not occur in the training data: check the labels and the "
        f"split, or give it num_classes={num_classes} and absent='zero' for weight 0, or counts of all classes"
    )


def check_labels(target: Tensor, num_classes: int, ignore_index: int | None) -> None:
    """Raise an IndexError that names the first class index out of range, if there is one."""
    wrong = (target < 0) | (target >= num_classes)
    if ignore_index is not None:
        wrong &= target != ignore_index
    if wrong.any():
        position = tuple(wrong.nonzero()[0].tolist())
        index = ", ".join(map(str, position)) or "0"
        label = int(target[position])
        ignored = "" if ignore_index is None else f" and ignore_index={ignore_index}"
        hint = f"; if it marks positions that do not count, give the loss ignore_index={label}" if label < 0 else ""
        counted = target if ignore_index is None else target[target != ignore_index]
        if num_classes == 2 and _are_signs(counted):
            hint = _SIGNS_HINT + hint
        elif int(counted.min()) >= 1 and int(counted.max()) == num_classes:
            hint = "; labels start at 0: if yours start at 1, subtract 1"
        raise IndexError(
            f"label {label} at index {index} of the batch is out of range: "
            f"allowed are 0..{num_classes - 1}{ignored}{hint}"
        )


def _check_devices(output: Tensor, weights: Tensor) -> None:
    if weights.device != output.device:
        raise ValueError(
            f"the loss is on {weights.device} and the outputs are on {output.device}: move the loss with "
            f".to({str(output.device)!r})"
        )
