"""What mistakes cost: the real-world cost of decisions, and the decisions that cost least.

Costs are marginal: a false negative over a true positive, a false positive over a true negative. With several
classes the mistake of calling class i a j costs `fn_cost[i] + fp_cost[i, j]`: the price of missing i, plus
that of the false alarm j.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Costs: TypeAlias = Tensor | float | Sequence[float] | Sequence[Sequence[float]]


def check_costs(fn_cost: Costs, fp_cost: Costs) -> tuple[Tensor, Tensor]:
    """Check a pair of costs and give them as tensors.

    Args:
        fn_cost: A number, or the cost of missing each class, shape (C,) with C >= 2.
        fp_cost: A number, or the cost of calling class i (row) a j (column): shape (C, C), zero diagonal.

    Returns:
        Both costs, of shape () and () or (C,) and (C, C), in one dtype: float64 if either is a tensor of it,
        else float32.

    Raises:
        ValueError: A number with a tensor, shapes that do not fit, a cost that is negative or not finite, a
            diagonal that is not zero, or costs that are all 0.
    """
    fn, fp = torch.as_tensor(fn_cost).detach(), torch.as_tensor(fp_cost).detach()
    dtype = torch.float64 if torch.float64 in (fn.dtype, fp.dtype) else torch.float32
    fn, fp = fn.to(dtype, copy=True), fp.to(dtype, copy=True)
    shapes = f"got fn_cost of shape {tuple(fn.shape)} and fp_cost of shape {tuple(fp.shape)}"
    if (fn.dim(), fp.dim()) not in ((0, 0), (1, 2)):
        raise ValueError(
            f"costs must be two numbers (binary), or fn_cost (C,) with fp_cost (C, C) (C classes); {shapes}"
        )
    if fn.dim() == 1:
        if len(fn) < 2:
            raise ValueError(f"costs per class need two classes or more (for one logit give two numbers); {shapes}")
        if fp.shape != (len(fn), len(fn)):
            raise ValueError(f"fp_cost must have shape {(len(fn), len(fn))} to go with fn_cost; {shapes}")
    for name, cost in (("fn_cost", fn), ("fp_cost", fp)):
        if not bool((cost.isfinite() & (cost >= 0)).all()):
            raise ValueError(f"{name} must be finite and at least 0, got {cost.tolist()}")
    if fp.dim() == 2 and bool(fp.diagonal().any()):
        raise ValueError(f"fp_cost must have a zero diagonal (being right costs nothing), got {fp.diagonal().tolist()}")
    if not (bool(fn.any()) or bool(fp.any())):
        raise ValueError("fn_cost and fp_cost are all 0: nothing would be learned")
    return fn, fp


def cost_matrix(fn_cost: Costs, fp_cost: Costs) -> Tensor:
    """The cost of every decision: row i is the true class, column j the predicted one.

    Args:
        fn_cost: A number, or shape (C,).
        fp_cost: A number, or shape (C, C) with a zero diagonal.

    Returns:
        Shape (C, C): `fn_cost[i] + fp_cost[i, j]` off the diagonal, 0 on it. For two numbers, with class 1 as
        the positive one, `[[0, fp_cost], [fn_cost, 0]]`.

    Raises:
        ValueError: The costs are no valid pair, see `check_costs`.
    """
    fn, fp = check_costs(fn_cost, fp_cost)
    if fn.dim() == 0:
        nothing = torch.zeros_like(fn)
        return torch.stack([nothing, fp, fn, nothing]).reshape(2, 2)
    return (fn.unsqueeze(1) + fp).fill_diagonal_(0)


def confusion_matrix(predicted: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """How often each class was called each class.

    Args:
        predicted: Predicted classes 0..C-1, any shape.
        targets: True classes 0..C-1, the same shape.
        num_classes: C.

    Returns:
        Shape (C, C), int64: rows true, columns predicted.

    Raises:
        ValueError: The shapes differ, or a class is out of range.
    """
    if predicted.shape != targets.shape:
        raise ValueError(
            f"predicted and targets must have the same shape, got {tuple(predicted.shape)} and {tuple(targets.shape)}"
        )
    predicted, targets = predicted.flatten().long(), targets.flatten().long()
    for name, classes in (("predicted", predicted), ("targets", targets)):
        wrong = (classes < 0) | (classes >= num_classes)
        if bool(wrong.any()):
            index = int(wrong.nonzero()[0])
            raise ValueError(
                f"{name} has class {int(classes[index])} at index {index}: allowed are 0..{num_classes - 1}"
            )
    cells = torch.bincount(targets * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def real_world_cost(outputs: Tensor, targets: Tensor, fn_cost: Costs, fp_cost: Costs) -> Tensor:
    """The mean cost per example of the model's own decisions (Ho & Wookey 2020, arXiv 2001.00570).

    Args:
        outputs: Logits or probabilities of shape (N, C), decided by the largest; with two numbers as costs
            either two columns, or binary logits (not probabilities) of shape (N,) or (N, 1), decided at 0.
        targets: True classes 0..C-1, shape (N,); for binary logits the shape of the outputs.
        fn_cost: A number, or shape (C,).
        fp_cost: A number, or shape (C, C) with a zero diagonal.

    Returns:
        A 0-dim tensor: the sum over i != j of n_ij (fn_cost[i] + fp_cost[i, j]) / N, for two numbers
        (FN fn_cost + FP fp_cost) / N. nan without examples.

    Raises:
        ValueError: The costs are not valid, or do not fit the outputs.
    """
    costs = cost_matrix(fn_cost, fp_cost).to(outputs.device)
    binary = torch.as_tensor(fn_cost).dim() == 0 and (outputs.dim() == 1 or outputs.shape[1:] == (1,))
    if not binary and (outputs.dim() != 2 or outputs.shape[1] != len(costs)):
        raise ValueError(
            f"outputs must have shape (N, {len(costs)}) to go with the costs, got shape {tuple(outputs.shape)}"
        )
    predicted = outputs > 0 if binary else outputs.argmax(1)
    counts = confusion_matrix(predicted, targets, len(costs))
    return (counts * costs).sum() / counts.sum()


def cost_optimal_decision(probabilities: Tensor, costs: Tensor | Sequence[Sequence[float]]) -> Tensor:
    """The class whose expected cost is least, argmin_j sum_k p_k C[k, j] (Elkan 2001, eq. 1).

    Args:
        probabilities: Shape (N, C), rows in [0, 1] with sum 1, as from `logits.softmax(1)`. The better
            calibrated they are, the better the decision.
        costs: Shape (C, C), finite: row true, column predicted, as from `cost_matrix`. Negative costs are
            gains.

    Returns:
        Shape (N,), int64.

    Raises:
        ValueError: The shapes do not fit, a cost is not finite, or the rows are no probabilities (logits, say).
    """
    matrix = torch.as_tensor(costs)
    if probabilities.dim() != 2 or matrix.shape != (probabilities.shape[1],) * 2:
        raise ValueError(
            "probabilities must have shape (N, C) and costs (C, C), got "
            f"{tuple(probabilities.shape)} and {tuple(matrix.shape)}"
        )
    if not bool(matrix.isfinite().all()):
        raise ValueError(f"costs must be finite, got {matrix.tolist()}")
    p = probabilities if probabilities.dtype is torch.float64 else probabilities.float()
    # 0.02: bfloat16 keeps about three digits
    if not bool(((p >= 0).all(1) & ((p.sum(1) - 1).abs() < 0.02)).all()):
        raise ValueError("probabilities must be at least 0, with rows that sum to 1: apply softmax to logits")
    return (p @ matrix.to(p)).argmin(1)
