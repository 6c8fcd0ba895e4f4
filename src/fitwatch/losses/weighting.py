"""Class weights: computed from class counts by `class_weights`, or the user's own, checked by `as_class_weights`."""

from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import TypeAlias

import torch
from torch import Tensor


def _effective_number(counts: Tensor, beta: float) -> Tensor:
    # 1 - beta^n as -expm1(n log beta): the plain form loses every digit if beta is close to 1
    rest = torch.tensor(1 - beta, dtype=counts.dtype)
    return rest / -torch.expm1(counts * torch.log1p(-rest))


_FORMULAS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "balanced": lambda counts, _: counts.sum() / (len(counts) * counts),
    "inverse": lambda counts, _: counts.sum() / counts,
    "sqrt_inverse": lambda counts, _: (counts.sum() / counts).sqrt(),
    # quantile, since torch.median returns the lower of the two middle values
    "median_frequency": lambda counts, _: counts.quantile(0.5) / counts,
    "effective_number": _effective_number,
}

SCHEMES: tuple[str, ...] = tuple(_FORMULAS)
"""The names that `class_weights` accepts."""


Counts: TypeAlias = Tensor | Sequence[float] | Sequence[Sequence[float]] | Mapping[int, float]
"""Counts of classes: a tensor or sequence, or a mapping class -> count, such as a `collections.Counter`."""


def listed_counts(counts: Counts) -> Tensor | Sequence[float] | Sequence[Sequence[float]]:
    """Turn a mapping class -> count into a list with 0 for the classes it lacks, up to the largest; else unchanged.

    Raises:
        ValueError: A key is not a class index.
    """
    if not isinstance(counts, Mapping):
        return counts
    by_index: dict[int, float] = {}
    for label, count in counts.items():
        try:
            by_index[index(label)] = float(count)
        except TypeError:
            raise ValueError(
                f"counts must have class indices 0, 1, ... as keys, got {label!r}: give the counts in the order of the "
                "model's outputs"
            ) from None
    if any(label < 0 for label in by_index):
        raise ValueError(f"counts must have class indices 0, 1, ... as keys, got {min(by_index)}")
    return [by_index.get(label, 0.0) for label in range(max(by_index, default=-1) + 1)]


def _as_tensor(values: Tensor | Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    # torch.tensor instead of as_tensor: it copies, so that a read-only array does not raise a warning
    return values.detach() if isinstance(values, Tensor) else torch.tensor(values)


def class_weights(
    counts: Counts,
    scheme: str = "balanced",
    *,
    beta: float = 0.999,
    absent: str = "error",
    normalize: bool = False,
) -> Tensor:
    """Compute class weights from class counts.

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
        counts: Shape (C,): examples of each class, whole numbers or fractions, at least 0. Or shape (K, 2): negatives
            and positives of K labels that do not exclude each other, each a separate problem of two classes. Or a
            mapping class -> count, where classes up to the largest that are missing have 0.
        scheme: A name from the table.
        beta: For `"effective_number"` only, in [0, 1): 0 weighs all classes equally, values close to 1 approach
            inverse counts.
        absent: Treatment of a class with count 0: `"error"`, or `"zero"` to give it weight 0 and the other classes
            the weights of a problem without it. A label that lacks one of its two classes has nothing to balance:
            with `"zero"` both its weights are 1.
        normalize: Whether to scale the weights to a mean of 1 over the data (for each label), sum n_c w_c = N, so that
            they keep the scale of a loss that does not divide by their sum.

    Returns:
        The shape of `counts`, float32, on their device.

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
    numbers = as_counts(counts)
    present = numbers > 0
    if not bool(present.any()):
        kind = "classes" if numbers.dim() == 1 else "labels"
        raise ValueError(f"all {len(numbers)} {kind} have count 0: there is nothing to weigh")
    if absent == "error" and not bool(present.all()):
        raise ValueError(
            f"{_absent(present)} absent from the training data, so there is no {scheme!r} weight: check the labels "
            f"and the split, or give absent='zero' for weight {0 if present.dim() == 1 else 1}"
        )
    formula = _FORMULAS[scheme]
    if numbers.dim() == 1:
        weights = torch.zeros_like(numbers)
        weights[present] = formula(numbers[present], beta)
    else:
        weights = torch.ones_like(numbers)
        for label in present.all(1).nonzero().flatten().tolist():
            weights[label] = formula(numbers[label], beta)
    return (normalized(weights, numbers) if normalize else weights).float()


def normalized(weights: Tensor, counts: Tensor) -> Tensor:
    """Scale the weights to a mean of 1 over the data.

    Args:
        weights: Shape (C,) or (K, 2).
        counts: Shape (C,), or (K, 2), where each label is scaled separately.

    Returns:
        The broadcast shape of both, the dtype of `weights`.

    Raises:
        ValueError: The numbers of classes differ, or every example has weight 0.
    """
    if weights.shape[-1] != counts.shape[-1]:
        raise ValueError(f"there are {weights.shape[-1]} class weights, and counts of {counts.shape[-1]} classes")
    counts = counts.to(weights.device).double()
    numbers = counts.sum(-1, keepdim=True)
    # a label without examples keeps its weights
    mean = torch.where(numbers > 0, (counts * weights).sum(-1, keepdim=True) / numbers, 1)
    if not bool((mean > 0).all()):
        raise ValueError(
            f"every example has weight 0: the weights are {weights.tolist()}, the counts {counts.tolist()}"
        )
    return (weights / mean).to(weights.dtype)


def as_counts(counts: Counts) -> Tensor:
    """Check counts of classes, shape (C,), or of labels, shape (K, 2), and convert them to a float64 tensor.

    Raises:
        ValueError: Another shape, empty, negative or not finite; or a mapping with other keys than class indices.
    """
    numbers = _as_tensor(listed_counts(counts)).double()
    if numbers.dim() not in (1, 2) or numbers.numel() == 0 or (numbers.dim() == 2 and numbers.shape[1] != 2):
        raise ValueError(
            "counts must have shape (C,) with C >= 1, or (K, 2) for the negatives and positives of K labels, got "
            f"shape {tuple(numbers.shape)}"
        )
    if not bool((numbers.isfinite() & (numbers >= 0)).all()):
        raise ValueError(f"counts must be finite and at least 0, got {numbers.tolist()}")
    return numbers


def as_class_weights(weights: Tensor | Sequence[float] | Mapping[int, float]) -> Tensor:
    """Check class weights and convert them to a new tensor.

    Args:
        weights: One weight per class, finite, at least 0, not all 0: a tensor or sequence of shape (C,), or a
            mapping from each class 0..C-1 to its weight.

    Returns:
        Shape (C,). A float32 or float64 tensor keeps its dtype, everything else becomes float32.

    Raises:
        ValueError: Not one-dimensional, empty, negative, not finite, all 0, or keys that are not 0..C-1.
    """
    if isinstance(weights, Mapping):
        classes = range(len(weights))
        missing = [label for label in classes if label not in weights]
        if missing:
            unexpected = [label for label in weights if label not in classes]
            raise ValueError(
                f"class weights must have the classes 0..{len(weights) - 1} as keys, one for each of the "
                f"{len(weights)} entries: missing {missing}, unexpected {unexpected}"
            )
        weights = [weights[label] for label in classes]
    result = _as_tensor(weights)
    result = result.to(torch.float64 if result.dtype is torch.float64 else torch.float32, copy=True)
    if result.dim() != 1 or len(result) == 0:
        raise ValueError(f"class weights must have shape (C,) with C >= 1, got shape {tuple(result.shape)}")
    if not bool((result.isfinite() & (result >= 0)).all()):
        raise ValueError(f"class weights must be finite and at least 0, got {result.tolist()}")
    if not bool(result.any()):
        raise ValueError(f"class weights must not all be 0, got {result.tolist()}")
    return result


def favours_common(weights: Tensor, counts: Tensor) -> bool:
    """Return whether the rarer class tends to have the smaller weight, by the rank correlation of weights and counts.

    Classes without examples do not matter.

    Args:
        weights: Shape (C,).
        counts: Shape (C,).
    """
    known = counts.cpu() > 0
    ranks = []
    for values in (weights.cpu()[known].double(), counts.cpu()[known].double()):
        difference = values.unsqueeze(0) - values.unsqueeze(1)
        ranks.append(difference.sign().sum(0))  # centred; equal values share a rank
    return bool(ranks[0] @ ranks[1] > 0)


def _absent(present: Tensor) -> str:
    """Name the absent classes, with the verb of the sentence."""
    absent = (~present).nonzero().tolist()
    if present.dim() == 2:
        return ", ".join(f"the {('negatives', 'positives')[side]} of label {label}" for label, side in absent) + " are"
    names = ", ".join(str(label) for (label,) in absent)
    return f"class {names} is" if len(absent) == 1 else f"classes {names} are"
