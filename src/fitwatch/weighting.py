"""From class counts to class weights: how much each class should count in a loss.

`count_classes` counts the labels, `class_weights` turns counts into weights, `as_class_weights` checks
weights that you chose yourself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def _balanced(counts: Tensor, _beta: float) -> Tensor:
    return counts.sum() / (len(counts) * counts)


def _inverse(counts: Tensor, _beta: float) -> Tensor:
    return counts.sum() / counts


def _sqrt_inverse(counts: Tensor, _beta: float) -> Tensor:
    return (counts.sum() / counts).sqrt()


def _median_frequency(counts: Tensor, _beta: float) -> Tensor:
    # quantile, since torch.median takes the lower of the two middle values
    return counts.quantile(0.5) / counts


def _effective_number(counts: Tensor, beta: float) -> Tensor:
    # 1 - beta^n as -expm1(n log beta): the plain form loses every digit when beta is close to 1.
    rest = torch.tensor(1 - beta, dtype=counts.dtype)
    return rest / -torch.expm1(counts * torch.log1p(-rest))


_FORMULAS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "balanced": _balanced,
    "inverse": _inverse,
    "sqrt_inverse": _sqrt_inverse,
    "median_frequency": _median_frequency,
    "effective_number": _effective_number,
}

SCHEMES: tuple[str, ...] = tuple(_FORMULAS)
"""The names that `class_weights` knows."""


def _as_tensor(values: Any) -> Tensor:
    # torch.tensor and not as_tensor: it copies, so that a read-only array is taken without a warning
    return values.detach() if isinstance(values, Tensor) else torch.tensor(values)


def class_weights(
    counts: Tensor | Sequence[float],
    scheme: str = "balanced",
    *,
    beta: float = 0.999,
    absent: str = "error",
) -> Tensor:
    """Weights of the classes from their counts.

    With n_c the count of class c, N the sum of the counts and K the number of classes:

    | scheme | weight of class c | from |
    |---|---|---|
    | `"balanced"` | N / (K n_c) | scikit-learn; the weighted count of every class is N / K |
    | `"inverse"` | N / n_c | |
    | `"sqrt_inverse"` | (N / n_c)^0.5 | Mahajan et al. 2018, arXiv 1805.00932 |
    | `"median_frequency"` | median(n) / n_c | Eigen & Fergus 2015, arXiv 1411.4734 |
    | `"effective_number"` | (1 - beta) / (1 - beta^n_c) | Cui et al. 2019, arXiv 1901.05555, eq. 4 |

    The scale of the weights cancels in a cross-entropy that divides by the sum of the weights.

    Args:
        counts: Shape (C,): examples of each class, whole numbers or fractions, at least 0.
        scheme: A name of the table.
        beta: For `"effective_number"` only, in [0, 1): 0 weighs all classes alike, close to 1 is close to
            inverse counts.
        absent: What to do about a class with count 0: `"error"`, or `"zero"` to give it weight 0. The other
            classes then get the weights of a problem without it: N, K and the median are over those present.

    Returns:
        Shape (C,), float32, on the device of `counts`.

    Raises:
        ValueError: The scheme or an option is unknown or out of range, a count is negative or not finite, a
            class is absent.
    """
    if scheme not in _FORMULAS:
        raise ValueError(f"unknown weighting scheme {scheme!r}; allowed are {', '.join(map(repr, SCHEMES))}")
    if absent not in ("error", "zero"):
        raise ValueError(f"absent must be 'error' or 'zero', got {absent!r}")
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta!r}")
    numbers = _as_tensor(counts).double()
    if numbers.dim() != 1 or len(numbers) == 0:
        raise ValueError(f"counts must have shape (C,) with C >= 1, got shape {tuple(numbers.shape)}")
    if not bool((numbers.isfinite() & (numbers >= 0)).all()):
        raise ValueError(f"counts must be finite and at least 0, got {numbers.tolist()}")
    present = numbers > 0
    if not bool(present.any()):
        raise ValueError(f"all {len(numbers)} classes have count 0: there is nothing to weigh")
    if absent == "error" and not bool(present.all()):
        missing = (~present).nonzero().flatten().tolist()
        names = ", ".join(map(str, missing))
        which = f"class {names} is" if len(missing) == 1 else f"classes {names} are"
        raise ValueError(
            f"{which} absent from the training data, so there is no {scheme!r} weight: check the labels and "
            "the split, or give absent='zero' for weight 0"
        )
    weights = torch.zeros_like(numbers)
    weights[present] = _FORMULAS[scheme](numbers[present], beta)
    return weights.float()


def as_class_weights(weights: Tensor | Sequence[float] | Mapping[int, float]) -> Tensor:
    """Check weights that someone chose and give them as a tensor.

    Args:
        weights: One weight per class, finite, at least 0, not all 0: a tensor or sequence of shape (C,), or a
            mapping from each class 0..C-1 to its weight.

    Returns:
        A new tensor of shape (C,). A float32 or float64 tensor keeps its dtype, everything else becomes float32.

    Raises:
        ValueError: Not one-dimensional, empty, negative, not finite, all 0, or keys that are not 0..C-1.
    """
    if isinstance(weights, Mapping):
        classes = range(len(weights))
        missing = [label for label in classes if label not in weights]
        if missing:
            extra = [label for label in weights if label not in classes]
            raise ValueError(
                f"class weights must have the classes 0..{len(weights) - 1} as keys, one for each of the "
                f"{len(weights)} entries: missing {missing}, unexpected {extra}"
            )
        weights = [weights[label] for label in classes]
    result = _as_tensor(weights)
    result = result.to(result.dtype if result.dtype in (torch.float32, torch.float64) else torch.float32, copy=True)
    if result.dim() != 1 or len(result) == 0:
        raise ValueError(f"class weights must have shape (C,) with C >= 1, got shape {tuple(result.shape)}")
    if not bool((result.isfinite() & (result >= 0)).all()):
        raise ValueError(f"class weights must be finite and at least 0, got {result.tolist()}")
    if not bool(result.any()):
        raise ValueError(f"class weights must not all be 0, got {result.tolist()}")
    return result


def count_classes(
    targets: Tensor | Sequence[Any] | Any, *, num_classes: int | None = None, ignore_index: int | None = None
) -> Tensor:
    """How often each class occurs in the targets.

    Args:
        targets: A tensor, an array or a (nested) sequence, read by its dtype:

            - integers of any shape are class indices;
            - bools, and floats of shape (N,) or (N, 1) that are all 0 or 1, are labels of a binary problem;
            - floats of shape (N, C) with C >= 2 are class probabilities, rows in [0, 1] that sum to 1.
        num_classes: C. By default the largest label plus 1 (2 for a binary problem): give it where the last
            class may be absent.
        ignore_index: A label that does not count, for class indices.

    Returns:
        Shape (C,): int64 counts, or float64 sums of the probabilities.

    Raises:
        ValueError: A label is negative or at least `num_classes` (named, with its index in the flattened
            targets), a float is neither a binary label nor a probability, or there are no targets and no
            `num_classes`.
    """
    labels = _as_tensor(targets)
    if labels.is_floating_point():
        if labels.dim() == 2 and labels.shape[1] > 1:
            return _sum_probabilities(labels, num_classes)
        _refuse_unless_binary(labels)
    if num_classes is None and labels.numel() and (labels.is_floating_point() or labels.dtype is torch.bool):
        num_classes = 2
    labels = labels.flatten().long()
    kept = labels if ignore_index is None else labels[labels != ignore_index]
    if len(kept) == 0:
        if num_classes is None:
            raise ValueError("there are no targets to count: give num_classes, or targets with at least one label")
        return torch.zeros(num_classes, dtype=torch.int64, device=kept.device)
    low, high = (int(bound) for bound in kept.aminmax())
    if low < 0 or (num_classes is not None and high >= num_classes):
        _refuse_label(labels, num_classes, ignore_index)
    return torch.bincount(kept, minlength=num_classes or 0)


def _refuse_unless_binary(labels: Tensor) -> None:
    wrong = (labels != 0) & (labels != 1)
    if bool(wrong.any()):
        index = int(wrong.flatten().nonzero()[0])
        raise ValueError(
            "floating-point targets must be binary labels 0 and 1, or probabilities of shape (N, C), and "
            f"class indices must be integers; got {labels.flatten()[index].item()} at index {index} of targets "
            f"of shape {tuple(labels.shape)}"
        )


def _refuse_label(labels: Tensor, num_classes: int | None, ignore_index: int | None) -> None:
    wrong = labels < 0
    if num_classes is not None:
        wrong |= labels >= num_classes
    if ignore_index is not None:
        wrong &= labels != ignore_index
    index = int(wrong.nonzero()[0])
    allowed = "at least 0" if num_classes is None else f"0..{num_classes - 1}"
    also = "" if ignore_index is None else f" and ignore_index={ignore_index}"
    raise ValueError(f"label {int(labels[index])} at index {index} is out of range: allowed are {allowed}{also}")


def _sum_probabilities(rows: Tensor, num_classes: int | None) -> Tensor:
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
    return rows.sum(0)
