"""Cost matrices, the cost of decisions, and the decisions of least cost.

Costs are marginal: a false negative relative to a true positive, a false positive relative to a true negative. With
several classes, predicting j for class i costs `fn_cost[i] + fp_cost[i, j]`: the miss of i plus the false alarm j.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias, cast

import torch
from attrs import frozen
from torch import Tensor

from fitwatch.helpers.dtypes import wide_float
from fitwatch.losses.errors import check_values
from fitwatch.losses.weighting import listed_counts

Costs: TypeAlias = Tensor | float | Sequence[float] | Sequence[Sequence[float]]


@frozen(init=False, eq=False, repr=False)
class CostMatrix:
    """The cost of every decision: row i is the true class, column j the predicted one.

    Args:
        fn_cost: A number: the cost of a false negative, for two classes with class 1 as the positive one. Or the cost
            of missing each class, shape (C,). Or, alone, the whole matrix, shape (C, C), with a zero diagonal.
        fp_cost: With a number, the cost of a false positive. With costs per class, the additional cost of predicting
            class j (column) for class i (row), shape (C, C), zero diagonal.
        classes: C names, all different. Default: ``"0"``, ``"1"``, ...

    Attributes:
        matrix: Shape (C, C): ``fn_cost[i] + fp_cost[i, j]`` off the diagonal, 0 on it.
        fn_cost: Shape (C,). For a whole matrix, the least cost in each row: the cost of missing the class, whatever
            is predicted. For two numbers, ``[fp, fn]``: missing one of two classes is a false alarm for the other.
        fp_cost: Shape (C, C): the remaining costs.
        classes: The names.

    The costs are float64 if one of them is a float64 tensor, else float32.

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
            (matrix,) = _as_tensors(fn_cost)
            if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
                raise ValueError(
                    "costs alone must be a matrix of shape (C, C) with C >= 2, row true, column predicted; fn_cost "
                    f"needs an fp_cost beside it; got shape {tuple(matrix.shape)}"
                )
            _check_costs(costs=matrix)
            fn = matrix.masked_fill(torch.eye(len(matrix), dtype=torch.bool), torch.inf).amin(1)
            fp = (matrix - fn.unsqueeze(1)).fill_diagonal_(0)
        else:
            fn, fp = _as_tensors(fn_cost, fp_cost)
            numbers = fn.dim() == fp.dim() == 0
            if not numbers and (fn.dim() != 1 or len(fn) < 2 or fp.shape != (len(fn), len(fn))):
                raise ValueError(
                    "costs must be two numbers (binary), or fn_cost of shape (C,) with fp_cost of shape (C, C) for two "
                    f"classes or more; got fn_cost of shape {tuple(fn.shape)} and fp_cost of shape {tuple(fp.shape)}"
                )
            _check_costs(fn_cost=fn, fp_cost=fp)
            if numbers:
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
        """Return the cost of each decision, shape (N,).

        Args:
            decisions: Predicted classes, shape (N,).
            targets: True classes, shape (N,).

        Raises:
            ValueError: The shapes differ, or a class is out of range.
        """
        decisions, targets = _check_classes(decisions, targets, self.num_classes)
        return self.matrix.to(targets.device)[targets, decisions]

    def cheapest_constant(self, counts: Tensor | Sequence[float] | Mapping[int, float]) -> tuple[int, float]:
        """Return the single answer for all examples that costs least, and its mean cost per example.

        Args:
            counts: Number of examples of each class, shape (C,), or the sums of their weights; or a mapping class ->
                count.

        Raises:
            ValueError: Another shape, a negative count, or no example at all.
        """
        numbers = torch.as_tensor(listed_counts(counts)).detach().cpu().double()
        if isinstance(counts, Mapping) and len(numbers) < self.num_classes:
            numbers = torch.nn.functional.pad(numbers, (0, self.num_classes - len(numbers)))
        if numbers.shape != (self.num_classes,) or not bool((numbers >= 0).all()) or not bool(numbers.any()):
            raise ValueError(
                f"counts must have shape ({self.num_classes},), at least 0 and not all 0, got {numbers.tolist()}"
            )
        costs = numbers @ self.matrix.cpu().double() / numbers.sum()
        answer = int(costs.argmin())
        return answer, float(costs[answer])

    def savings(self, decisions: Tensor, targets: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        """Compute the savings relative to the cheapest single answer (Bahnsen et al. 2014).

        Args:
            decisions: Predicted classes, shape (N,).
            targets: True classes, shape (N,).
            sample_weight: Weight of each example, shape (N,).

        Returns:
            1 - cost / cost of `cheapest_constant` on the same targets, 0-dim: 1 without mistakes, 0 if the model is
            no better, negative if it is worse. nan where the constant costs nothing.
        """
        counts = confusion_matrix(decisions, targets, self.num_classes, sample_weight=sample_weight)
        counts = counts.to(wide_float(counts.device))
        matrix = self.matrix.to(counts)
        constant = (counts.sum(1) @ matrix).min()
        return torch.where(constant > 0, 1 - (counts * matrix).sum() / constant, torch.nan)


def as_cost_matrix(costs: CostMatrix | Costs, fp_cost: Costs | None = None) -> CostMatrix:
    """Return a `CostMatrix` unchanged, or make one of its arguments."""
    return costs if isinstance(costs, CostMatrix) and fp_cost is None else CostMatrix(cast(Costs, costs), fp_cost)


def _as_tensors(*costs: Costs) -> list[Tensor]:
    """Copy costs to tensors of one dtype: float64 if one of them is a float64 tensor, else float32."""
    tensors = [torch.as_tensor(cost).detach() for cost in costs]
    dtype = torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32
    return [t.to(dtype, copy=True) for t in tensors]


def _check_costs(**costs: Tensor) -> None:
    for name, cost in costs.items():
        if not bool((cost.isfinite() & (cost >= 0)).all()):
            raise ValueError(f"{name} must be finite and at least 0, got {cost.tolist()}")
        if cost.dim() == 2 and bool(cost.diagonal().any()):
            diagonal = cost.diagonal().tolist()
            raise ValueError(f"{name} must have a zero diagonal (a correct decision costs nothing), got {diagonal}")
    if not any(bool(cost.any()) for cost in costs.values()):
        raise ValueError(f"{' and '.join(costs)} are all 0: nothing would be learned")


def confusion_matrix(
    predicted: Tensor, targets: Tensor, num_classes: int, *, sample_weight: Tensor | None = None
) -> Tensor:
    """Count how often each class was predicted as each class.

    Args:
        predicted: Predicted classes 0..C-1, any shape.
        targets: True classes 0..C-1, the same shape.
        num_classes: C.
        sample_weight: Weight of each example, the same shape.

    Returns:
        Shape (C, C), rows true, columns predicted: int64 counts, or float64 sums of the weights (float32 on MPS).

    Raises:
        ValueError: The shapes differ, or a class is out of range.
    """
    predicted, targets = _check_classes(predicted, targets, num_classes)
    if sample_weight is None:
        return confusion_sums(predicted, targets, num_classes, torch.ones_like(targets))[:-1]
    if sample_weight.numel() != targets.numel():
        raise ValueError(
            f"sample_weight must have one weight for each of the {targets.numel()} examples, got shape "
            f"{tuple(sample_weight.shape)}"
        )
    weights = sample_weight.flatten().to(targets.device, wide_float(targets.device))
    return confusion_sums(predicted, targets, num_classes, weights)[:-1]


def confusion_sums(predicted: Tensor, targets: Tensor, num_classes: int, weights: Tensor) -> Tensor:
    """Sum weights by true and predicted class; does not synchronize with the device.

    Args:
        predicted: Predicted classes 0..C-1, shape (N,), int64.
        targets: True classes, shape (N,), any dtype; values other than 0..C-1 are allowed.
        num_classes: C.
        weights: Weight of each example, shape (N,); 0 for those to ignore.

    Returns:
        Shape (C + 1, C), the dtype of ``weights``. Rows are true classes, columns predicted ones; the last row holds
        the examples whose target is not a class.
    """
    labels = targets.long()
    valid = (labels >= 0) & (labels < num_classes) & (labels == targets)
    cells = torch.where(valid, labels, num_classes) * num_classes + predicted
    # bincount(weights=) is not deterministic on CUDA
    return weights.new_zeros((num_classes + 1) * num_classes).index_add_(0, cells, weights).view(-1, num_classes)


def _check_classes(predicted: Tensor, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return both flat and int64 if all are classes."""
    if predicted.shape != targets.shape:
        raise ValueError(
            f"predicted and targets must have the same shape, got {tuple(predicted.shape)} and {tuple(targets.shape)}"
        )
    flat = []
    for name, given in (("predicted", predicted.flatten()), ("targets", targets.flatten())):
        classes = given.long()
        wrong = (classes < 0) | (classes >= num_classes) | (classes != given)
        check_values(f"{name} must be classes 0..{num_classes - 1}", given, wrong)
        flat.append(classes)
    return flat[0], flat[1]


def decide(outputs: Tensor) -> Tensor:
    """Return the most probable class, shape (N,), from logits (N, C), or from one logit, shape (N,) or (N, 1)."""
    return (outputs.reshape(-1) > 0).long() if _is_one_logit(outputs) else outputs.argmax(1)


def probabilities_of(outputs: Tensor) -> Tensor:
    """Return class probabilities, shape (N, C), from logits (N, C), or from one logit, shape (N,) or (N, 1)."""
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
    *,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Compute the mean cost per example of the model's own decisions (Ho & Wookey 2020, arXiv 2001.00570).

    Args:
        outputs: Logits of shape (N, C): the decision is their arg-max. For two classes also one logit of shape (N,) or
            (N, 1): class 1 if it is greater than 0.
        targets: True classes, shape (N,); for one logit the shape of the logits.
        costs: A `CostMatrix`, or a matrix of shape (C, C), row true, column predicted.
        sample_weight: Weight of each example, shape (N,).

    Returns:
        A 0-dim tensor: the sum over i != j of n_ij (fn_cost[i] + fp_cost[i, j]) / N, for two classes
        (FN fn_cost + FP fp_cost) / N. nan without examples.

    Raises:
        ValueError: The shapes do not fit, or a target is out of range.
    """
    matrix = _as_matrix(costs).to(outputs.device)
    num_classes, one_logit = len(matrix), _is_one_logit(outputs)
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
    each = matrix[true, predicted]
    if sample_weight is None:
        return each.mean()
    weight = sample_weight.reshape(-1).to(each.dtype)
    return (each * weight).sum() / weight.sum()


def cost_optimal_decision(probabilities: Tensor, costs: CostMatrix | Costs) -> Tensor:
    """Return the class of least expected cost, argmin_j sum_k p_k C[k, j] (Elkan 2001, eq. 1).

    Args:
        probabilities: Shape (N, C), rows in [0, 1] with sum 1, as from `logits.softmax(1)`; for two classes also that
            of class 1, shape (N,) or (N, 1). The better calibrated they are, the better the decision.
        costs: A `CostMatrix`, or a finite matrix of shape (C, C), row true, column predicted. Negative costs, in a
            plain matrix, are gains.

    Returns:
        Shape (N,), int64.

    Raises:
        ValueError: The shapes do not fit, a cost is not finite, or the rows are not probabilities (but logits, say).
    """
    matrix = _as_matrix(costs).to(probabilities.device)
    p = probabilities if probabilities.dtype is torch.float64 else probabilities.float()
    if _is_one_logit(p) and len(matrix) == 2:
        p = torch.stack([1 - p.reshape(-1), p.reshape(-1)], 1)
    if p.dim() != 2 or p.shape[1] != len(matrix):
        raise ValueError(
            "probabilities must have shape (N, C) and costs (C, C), got "
            f"{tuple(probabilities.shape)} and {tuple(matrix.shape)}"
        )
    if not bool(matrix.isfinite().all()):
        raise ValueError(f"costs must be finite, got {matrix.tolist()}")
    # 0.02: bfloat16 keeps about three digits
    if not bool(((p >= 0).all(1) & ((p.sum(1) - 1).abs() < 0.02)).all()):
        raise ValueError("probabilities must be at least 0, with rows that sum to 1: apply softmax to logits")
    return (p @ matrix.to(p.dtype)).argmin(1)


def _as_matrix(costs: CostMatrix | Costs) -> Tensor:
    """Return the matrix of a `CostMatrix`, or a plain one, whose values are not checked."""
    matrix = costs.matrix if isinstance(costs, CostMatrix) else _as_tensors(costs)[0]
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"costs must be a CostMatrix or a matrix of shape (C, C), got shape {tuple(matrix.shape)}")
    return matrix
