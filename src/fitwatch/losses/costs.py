"""What mistakes cost: cost matrices, the cost of decisions, and the decisions that cost least.

Costs are marginal: a false negative over a true positive, a false positive over a true negative. With several
classes the mistake of calling class i a j costs `fn_cost[i] + fp_cost[i, j]`: the price of missing i, plus
that of the false alarm j.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, cast

import torch
from attrs import frozen
from torch import Tensor

Costs: TypeAlias = Tensor | float | Sequence[float] | Sequence[Sequence[float]]


@frozen(init=False, eq=False, repr=False)
class CostMatrix:
    """What every decision costs: row i is the true class, column j the predicted one.

    Args:
        fn_cost: A number: the cost of a false negative, of two classes with class 1 as the positive one. Or the cost of
            missing each class, shape (C,). Or, alone, the whole matrix, shape (C, C), with a zero diagonal.
        fp_cost: With a number, the cost of a false positive. With costs per class, what calling class i (row) a j
            (column) costs on top, shape (C, C), zero diagonal.
        classes: C names, all different. Default: ``"0"``, ``"1"``, ...

    Attributes:
        matrix: Shape (C, C): ``fn_cost[i] + fp_cost[i, j]`` off the diagonal, 0 on it.
        fn_cost: Shape (C,). Of a whole matrix, the least cost of its row: what missing the class costs, whatever it is
            called. Of two numbers, ``[fp, fn]``: to miss one of two classes is a false alarm for the other.
        fp_cost: Shape (C, C): the rest.
        classes: The names.

    All are float64 if one of the costs is a tensor of it, else float32.

    Raises:
        ValueError: Shapes that do not fit, fewer than two classes, a cost that is negative or not finite, a diagonal
            that is not zero, costs that are all 0, or names that are not C different strings.
    """

    matrix: Tensor
    fn_cost: Tensor
    fp_cost: Tensor
    classes: tuple[str, ...]

    def __init__(self, fn_cost: Costs, fp_cost: Costs | None = None, *, classes: Sequence[str] | None = None) -> None:
        if fp_cost is None:
            matrix = _whole_matrix(fn_cost)
            off = torch.eye(len(matrix), dtype=torch.bool)
            fn = matrix.masked_fill(off, torch.inf).amin(1)
            fp = (matrix - fn.unsqueeze(1)).fill_diagonal_(0)
        else:
            fn, fp = check_costs(fn_cost, fp_cost)
            if fn.dim() == 0:
                fn, fp = torch.stack([fp, fn]), fp.new_zeros(2, 2)
            matrix = (fn.unsqueeze(1) + fp).fill_diagonal_(0)
        names = tuple(map(str, range(len(matrix)))) if classes is None else tuple(classes)
        if isinstance(classes, str) or len({*names}) != len(matrix) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"classes must be {len(matrix)} different names, one for each class, got {classes!r}")
        self.__attrs_init__(matrix, fn, fp, names)

    def __repr__(self) -> str:
        return f"CostMatrix({self.matrix.tolist()}, classes={list(self.classes)})"

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.classes)

    def per_example(self, decisions: Tensor, targets: Tensor) -> Tensor:
        """What each decision costs.

        Args:
            decisions: Predicted classes, shape (N,).
            targets: True classes, shape (N,).

        Returns:
            Costs of shape (N,).

        Raises:
            ValueError: The shapes differ, or a class is out of range.
        """
        decisions, targets = _check_classes(decisions, targets, self.num_classes)
        return self.matrix.to(targets.device)[targets, decisions]

    def cheapest_constant(self, counts: Tensor | Sequence[float]) -> tuple[int, float]:
        """The single answer for all examples that costs least, and its mean cost per example.

        Args:
            counts: How many examples each class has, shape (C,), or the sums of their weights.

        Raises:
            ValueError: Another shape, a negative count, or no example at all.
        """
        numbers = torch.as_tensor(counts).detach().cpu().double()
        if numbers.shape != (self.num_classes,) or not bool((numbers >= 0).all()) or not bool(numbers.any()):
            raise ValueError(
                f"counts must have shape ({self.num_classes},), at least 0 and not all 0, got {numbers.tolist()}"
            )
        costs = numbers @ self.matrix.cpu().double() / numbers.sum()
        answer = int(costs.argmin())
        return answer, float(costs[answer])

    def savings(self, decisions: Tensor, targets: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        """The share saved of what the cheapest single answer costs (Bahnsen et al. 2014).

        Args:
            decisions: Predicted classes, shape (N,).
            targets: True classes, shape (N,).
            sample_weight: How much each example counts, shape (N,).

        Returns:
            1 - cost / cost of `cheapest_constant` on the same targets, 0-dim: 1 without mistakes, 0 where the model is
            no better, negative where it is worse. nan where the constant costs nothing.
        """
        counts = confusion_matrix(decisions, targets, self.num_classes, sample_weight=sample_weight).double()
        matrix = self.matrix.to(counts)
        constant = (counts.sum(1) @ matrix).min()
        return torch.where(constant > 0, 1 - (counts * matrix).sum() / constant, torch.nan)


def as_cost_matrix(costs: CostMatrix | Costs) -> CostMatrix:
    """The costs as a `CostMatrix`: one, or a whole matrix."""
    return costs if isinstance(costs, CostMatrix) else CostMatrix(costs)


def _whole_matrix(costs: Costs) -> Tensor:
    matrix = torch.as_tensor(costs).detach()
    matrix = matrix.to(matrix.dtype if matrix.dtype is torch.float64 else torch.float32, copy=True)
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        raise ValueError(
            "costs alone must be a matrix of shape (C, C) with C >= 2, row true, column predicted; fn_cost takes an "
            f"fp_cost beside it; got shape {tuple(matrix.shape)}"
        )
    if not bool((matrix.isfinite() & (matrix >= 0)).all()):
        raise ValueError(f"costs must be finite and at least 0, got {matrix.tolist()}")
    if bool(matrix.diagonal().any()):
        raise ValueError(
            f"costs must have a zero diagonal (being right costs nothing), got {matrix.diagonal().tolist()}"
        )
    if not bool(matrix.any()):
        raise ValueError("the costs are all 0: nothing would be learned")
    return matrix


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


def confusion_matrix(
    predicted: Tensor, targets: Tensor, num_classes: int, *, sample_weight: Tensor | None = None
) -> Tensor:
    """How often each class was called each class.

    Args:
        predicted: Predicted classes 0..C-1, any shape.
        targets: True classes 0..C-1, the same shape.
        num_classes: C.
        sample_weight: How much each example counts, of the same shape.

    Returns:
        Shape (C, C), rows true, columns predicted: int64 counts, or float64 sums of the weights (float32 on MPS).

    Raises:
        ValueError: The shapes differ, or a class is out of range.
    """
    predicted, targets = _check_classes(predicted, targets, num_classes)
    cells = targets * num_classes + predicted
    if sample_weight is None:
        return torch.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)
    if sample_weight.numel() != cells.numel():
        raise ValueError(
            f"sample_weight must have one weight for each of the {cells.numel()} examples, got shape "
            f"{tuple(sample_weight.shape)}"
        )
    wide = torch.float32 if cells.device.type == "mps" else torch.float64
    sums = torch.zeros(num_classes**2, dtype=wide, device=cells.device)
    # and not bincount(weights=), which is not deterministic on CUDA
    return sums.index_add_(0, cells, sample_weight.flatten().to(wide)).reshape(num_classes, num_classes)


def _check_classes(predicted: Tensor, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Both, flat and int64, on one device."""
    if predicted.shape != targets.shape:
        raise ValueError(
            f"predicted and targets must have the same shape, got {tuple(predicted.shape)} and {tuple(targets.shape)}"
        )
    flat = []
    for name, given in (("predicted", predicted), ("targets", targets)):
        classes = given.flatten().long()
        wrong = (classes < 0) | (classes >= num_classes) | (classes != given.flatten())
        if bool(wrong.any()):
            index = int(wrong.nonzero()[0])
            raise ValueError(
                f"{name} has class {given.flatten()[index].item()} at index {index}: allowed are 0..{num_classes - 1}"
            )
        flat.append(classes)
    return flat[0], flat[1]


def decide(outputs: Tensor) -> Tensor:
    """The most probable class, shape (N,): of logits (N, C), or of one logit, shape (N,) or (N, 1)."""
    return (outputs.reshape(-1) > 0).long() if _is_one_logit(outputs) else outputs.argmax(1)


def probabilities_of(outputs: Tensor) -> Tensor:
    """The probabilities of the classes, shape (N, C): of logits (N, C), or of one logit, shape (N,) or (N, 1)."""
    z = outputs if outputs.dtype is torch.float64 else outputs.float()
    if _is_one_logit(outputs):
        z = z.reshape(-1)
        return torch.stack([(-z).sigmoid(), z.sigmoid()], 1)
    return z.softmax(1)


def _is_one_logit(outputs: Tensor) -> bool:
    return outputs.dim() == 1 or (outputs.dim() == 2 and outputs.shape[1] == 1)


def real_world_cost(
    outputs: Tensor,
    targets: Tensor,
    costs: CostMatrix | Costs,
    fp_cost: Costs | None = None,
    *,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """The mean cost per example of the model's own decisions (Ho & Wookey 2020, arXiv 2001.00570).

    Args:
        outputs: Logits of shape (N, C): the decision is their arg-max. For two classes also one logit of shape (N,) or
            (N, 1): class 1 if it is greater than 0.
        targets: True classes, shape (N,); for one logit of its shape.
        costs: A `CostMatrix`, a matrix of shape (C, C), row true, column predicted; or one for each example, shape
            (N, C, C). With ``fp_cost``, the ``fn_cost`` of a `CostMatrix`.
        fp_cost: That of a `CostMatrix`.
        sample_weight: How much each example counts, shape (N,).

    Returns:
        A 0-dim tensor: the sum over i != j of n_ij (fn_cost[i] + fp_cost[i, j]) / N, for two classes
        (FN fn_cost + FP fp_cost) / N. nan without examples.

    Raises:
        ValueError: The costs are not valid, or do not fit the outputs.
    """
    if fp_cost is not None:
        costs = CostMatrix(cast(Costs, costs), fp_cost)
    matrix = _as_matrix(costs).to(outputs.device)
    num_classes = matrix.shape[-1]
    one_logit = _is_one_logit(outputs)
    if (one_logit and num_classes != 2) or not (one_logit or (outputs.dim() == 2 and outputs.shape[1] == num_classes)):
        also = ", (N,) or (N, 1)" if num_classes == 2 else ""
        raise ValueError(
            f"outputs must have shape (N, {num_classes}){also} to go with the costs, got shape {tuple(outputs.shape)}"
        )
    if targets.shape != (outputs.shape if one_logit else outputs.shape[:1]):
        raise ValueError(
            f"outputs and targets do not match: got shapes {tuple(outputs.shape)} and {tuple(targets.shape)}"
        )
    predicted, true = _check_classes(decide(outputs), targets.reshape(-1), num_classes)
    if matrix.dim() == 3:
        _refuse_other_length(matrix, len(true))
        each = matrix[torch.arange(len(true), device=matrix.device), true, predicted]
    else:
        each = matrix[true, predicted]
    if sample_weight is None:
        return each.mean()
    weight = sample_weight.reshape(-1).to(each.dtype)
    return (each * weight).sum() / weight.sum()


def cost_optimal_decision(probabilities: Tensor, costs: CostMatrix | Costs) -> Tensor:
    """The class whose expected cost is least, argmin_j sum_k p_k C[k, j] (Elkan 2001, eq. 1).

    Args:
        probabilities: Shape (N, C), rows in [0, 1] with sum 1, as from `logits.softmax(1)`; for two classes also that
            of class 1, shape (N,) or (N, 1). The better calibrated they are, the better the decision.
        costs: A `CostMatrix`, a finite matrix of shape (C, C), row true, column predicted, or one for each example,
            shape (N, C, C). Negative costs, in a plain matrix, are gains.

    Returns:
        Shape (N,), int64.

    Raises:
        ValueError: The shapes do not fit, a cost is not finite, or the rows are no probabilities (logits, say).
    """
    matrix = _as_matrix(costs).to(probabilities.device)
    p = probabilities if probabilities.dtype is torch.float64 else probabilities.float()
    if _is_one_logit(p) and matrix.shape[-1] == 2:
        p = torch.stack([1 - p.reshape(-1), p.reshape(-1)], 1)
    if p.dim() != 2 or matrix.dim() not in (2, 3) or matrix.shape[-2:] != (p.shape[1],) * 2:
        raise ValueError(
            "probabilities must have shape (N, C) and costs (C, C), got "
            f"{tuple(probabilities.shape)} and {tuple(matrix.shape)}"
        )
    if not bool(matrix.isfinite().all()):
        raise ValueError(f"costs must be finite, got {matrix.tolist()}")
    # 0.02: bfloat16 keeps about three digits
    if not bool(((p >= 0).all(1) & ((p.sum(1) - 1).abs() < 0.02)).all()):
        raise ValueError("probabilities must be at least 0, with rows that sum to 1: apply softmax to logits")
    if matrix.dim() == 2:
        return (p @ matrix.to(p.dtype)).argmin(1)
    _refuse_other_length(matrix, len(p))
    return torch.einsum("nk,nkj->nj", p, matrix.to(p.dtype)).argmin(1)


def _as_matrix(costs: CostMatrix | Costs) -> Tensor:
    """Costs as a matrix (C, C), or one for each example (N, C, C); only a `CostMatrix` has been checked."""
    matrix = costs.matrix if isinstance(costs, CostMatrix) else torch.as_tensor(cast(Tensor, costs)).detach()
    if matrix.dim() not in (2, 3) or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(
            f"costs must be a CostMatrix, a matrix of shape (C, C), or one for each example, shape (N, C, C), got "
            f"shape {tuple(matrix.shape)}"
        )
    return matrix if matrix.dtype is torch.float64 else matrix.float()


def _refuse_other_length(matrix: Tensor, examples: int) -> None:
    if len(matrix) != examples:
        raise ValueError(f"there are {len(matrix)} cost matrices for {examples} examples")
