"""The real-world-weight cross-entropy."""

from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fitwatch.losses.base import FAILURES, PRECISE, Loss, as_classes, precise
from fitwatch.losses.costs import CostMatrix, Costs, as_cost_matrix
from fitwatch.losses.errors import check_logits, check_types
from fitwatch.losses.real_world_kernel import real_world_losses


class RealWorldCrossEntropy(Loss):
    """Cross-entropy that charges each mistake its cost (Ho & Wookey 2020, arXiv 2001.00570).

    With two numbers, outputs are logits z of shape (N,), (N, 1) or (N, 1, d1, ...), targets y in [0, 1] of the
    same shape, and

        l = -fn_cost y log(sigmoid(z)) - fp_cost (1 - y) log(1 - sigmoid(z)).

    With costs per class, outputs are logits of shape (N, C), (N, C, d1, ...) or (C,), targets class indices y of
    shape (N,), (N, d1, ...) or (), and with p = softmax(z)

        l = -fn_cost[y] log p[y] - sum over j != y of fp_cost[y, j] log(1 - p[j]).

    A whole matrix is split into the two as in `CostMatrix`, so that equal costs are plain cross-entropy. For two
    classes, either kind of costs takes either kind of outputs, with class 1 as the positive one.

    Every position has weight 1: the loss is the mean, not divided by the sum of the costs, nor by the number of
    classes as in the authors' code. Values and gradients are exact to rounding however wrong and confident the logits
    are. Unless all costs are equal, the softmax of the model does not estimate the probabilities; decide for its
    arg-max. The loss takes no class weights: the costs already say how much each class counts.

    Args:
        fn_cost: Cost of a false negative: a number, or the cost of missing each class, shape (C,). Alone: a
            `CostMatrix`, or a matrix of shape (C, C), row true, column predicted, zero diagonal.
        fp_cost: Cost of a false positive: a number, or the cost of predicting class j (column) for class i (row),
            shape (C, C), zero diagonal. Tensors are kept as buffers.
        ignore_index: Class index of positions that do not count, for outputs of several classes; none by default.

    Raises:
        ValueError: Costs that are negative, not finite, all 0, or of shapes that do not fit.
    """

    fn_cost: Tensor | float
    fp_cost: Tensor | float
    _classes_first = True

    def __init__(
        self, fn_cost: Costs | CostMatrix, fp_cost: Costs | None = None, *, ignore_index: int | None = None
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        costs = as_cost_matrix(fn_cost, fp_cost)
        self._has_weights = bool((costs.fn_cost != 1).any() or costs.fp_cost.any())
        if fp_cost is not None and torch.as_tensor(fp_cost).dim() == 0:
            # the numbers as given, since a CostMatrix rounds them to float32
            self.fn_cost, self.fp_cost = float(cast(float, fn_cost)), float(cast(float, fp_cost))
        else:
            self.register_buffer("fn_cost", costs.fn_cost.clone())
            self.register_buffer("fp_cost", costs.fp_cost.clone())

    def unreduced(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | float]:
        losses = self._kernel(output, target, None)
        if losses is not None:
            return losses, 1.0
        check_types(output, target)
        fn, fp, one_logit = self.fn_cost, self.fp_cost, output.shape == target.shape
        if not (isinstance(fn, Tensor) and isinstance(fp, Tensor)):
            indices = not target.is_floating_point() and target.shape == output.shape[:1] + output.shape[2:]
            if one_logit or not (indices and output.dim() > 1 and output.shape[1] == 2):
                return _one_logit(output, target, fn, fp), 1.0
            fn, fp = precise(output).new_tensor([fp, fn]), precise(output).new_zeros(2, 2)
        elif one_logit and len(fn) == 2 and output.dim() > 0 and (output.dim() == 1 or output.shape[1] == 1):
            return _one_logit(output, target, fn[1] + fp[1, 0], fn[0] + fp[0, 1]), 1.0
        logits, labels, counts = as_classes(output, target, fn, self.ignore_index)
        flat = real_world_losses(logits.flatten(0, -2), labels.flatten(), fn.to(logits.dtype), fp.to(logits.dtype))
        return torch.where(counts, flat.view_as(labels), 0), counts.to(logits.dtype)

    def unweighted(self) -> Self:
        """Return the loss with the costs of plain cross-entropy: 1 for a miss, in binary form 1 and 1."""
        loss = self._twin()
        if isinstance(self.fn_cost, Tensor) and isinstance(self.fp_cost, Tensor):
            loss.fn_cost, loss.fp_cost = torch.ones_like(self.fn_cost), torch.zeros_like(self.fp_cost)
        else:
            loss.fn_cost = loss.fp_cost = 1.0
        loss._has_weights = False  # noqa: SLF001 - of the same class
        return loss

    @property
    def has_weights(self) -> bool:
        """Whether the costs differ from those of plain cross-entropy."""
        return self._has_weights

    def extra_repr(self) -> str:
        fn, fp = (c.tolist() if isinstance(c, Tensor) else c for c in (self.fn_cost, self.fp_cost))
        return f"fn_cost={fn}, fp_cost={fp}"

    def _per_class(self) -> Tensor | None:
        return self.fn_cost if isinstance(self.fn_cost, Tensor) else None

    def _fused(self, output: Tensor, target: Tensor, *, mean: bool) -> tuple[Tensor, Tensor | float] | None:
        examples = len(target) if isinstance(target, Tensor) and target.dim() else 1
        reduced = self._kernel(output, target, examples if mean else 1)
        return None if reduced is None else (reduced, 1 if mean else examples)

    def _kernel(self, output: Tensor, target: Tensor, divisor: float | None) -> Tensor | None:
        """Call the kernel directly in the common case, outputs (N, C) on the CPU and nothing ignored; else return None.

        The targets are not checked before, since a wrong index raises in the kernel.
        """
        buffers = self._buffers  # faster than self.fn_cost, which goes through nn.Module.__getattr__
        fn, fp = buffers.get("fn_cost"), buffers.get("fp_cost")
        if fn is None or fp is None or not isinstance(output, Tensor) or output.dtype not in PRECISE:
            return None
        shape = output.shape
        if len(shape) != 2 or shape[1] != len(fn) or not (output.is_cpu and fn.is_cpu):
            return None
        if self.ignore_index is not None and 0 <= self.ignore_index < len(fn):  # a class: the kernel would count it
            return None
        try:
            if target.dtype is torch.int64 and target.shape == shape[:1]:
                if fn.dtype is not output.dtype:
                    fn, fp = fn.to(output.dtype), fp.to(output.dtype)
                return real_world_losses(output, target, fn, fp, divisor)
        except FAILURES:
            pass  # an ignored index, or an input for which `as_classes` raises a descriptive error
        return None


def _one_logit(output: Tensor, target: Tensor, fn_cost: Tensor | float, fp_cost: Tensor | float) -> Tensor:
    check_logits(output, target, single=True)
    z = precise(output)
    y = target.to(z.dtype)
    # logsigmoid and not softplus, which torch cuts off at 20
    return -fn_cost * y * F.logsigmoid(z) - fp_cost * (1 - y) * F.logsigmoid(-z)
