"""The real-world-weight cross-entropy."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fitwatch._explain import refuse_classes, refuse_logits
from fitwatch._loss import FAILURES, Loss, precise
from fitwatch.decisions import Costs, check_costs


class RealWorldCrossEntropy(Loss):
    """Cross-entropy that charges each mistake what it costs (Ho & Wookey 2020, arXiv 2001.00570).

    With two numbers, outputs are logits z of shape (N,), (N, 1) or (N, 1, d1, ...), targets y in [0, 1] of the
    same shape, and

        l = -fn_cost y log(sigmoid(z)) - fp_cost (1 - y) log(1 - sigmoid(z)).

    With costs per class, outputs are logits of shape (N, C), (N, C, d1, ...) or (C,), targets class indices y of
    shape (N,), (N, d1, ...) or (), and with p = softmax(z)

        l = -fn_cost[y] log p[y] - sum over j != y of fp_cost[y, j] log(1 - p[j]).

    Every position has weight 1: the loss is the mean, not divided by the sum of the costs, nor by the number of
    classes as in the authors' own code. Values and gradients are exact to rounding however wrong and
    confident the logits are.

    Args:
        fn_cost: Cost of a false negative: a number, or the cost of missing each class, shape (C,).
        fp_cost: Cost of a false positive: a number, or the cost of calling class i (row) a j (column), shape
            (C, C), zero diagonal. Tensors are kept as buffers.

    Raises:
        ValueError: Costs that are negative, not finite, all 0, or of shapes that do not fit.
    """

    fn_cost: Tensor | float
    fp_cost: Tensor | float

    def __init__(self, fn_cost: Costs, fp_cost: Costs) -> None:
        super().__init__()
        fn, fp = check_costs(fn_cost, fp_cost)
        self._binary = fn.dim() == 0
        self._has_weights = bool((fn != 1).any()) or not torch.equal(fp, fn if self._binary else 0 * fp)
        if self._binary:
            # the numbers as given: in fn and fp they are rounded to float32
            self.fn_cost, self.fp_cost = float(cast(float, fn_cost)), float(cast(float, fp_cost))
        else:
            self.register_buffer("fn_cost", fn)
            self.register_buffer("fp_cost", fp)

    def unreduced(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | float]:
        return self._positions(output, target), 1.0

    def weighted(self, weights: Tensor) -> Loss:
        """Not possible.

        Raises:
            TypeError: Always: the costs are the weights.
        """
        raise TypeError(
            "RealWorldCrossEntropy takes no class weights: its costs already say how much each class counts "
            f"(got weights of shape {tuple(weights.shape)})"
        )

    def unweighted(self) -> RealWorldCrossEntropy:
        """The loss whose costs are those of plain cross-entropy: 1 for a miss, in binary form 1 and 1."""
        if isinstance(self.fn_cost, Tensor) and isinstance(self.fp_cost, Tensor):
            return RealWorldCrossEntropy(torch.ones_like(self.fn_cost), torch.zeros_like(self.fp_cost))
        return RealWorldCrossEntropy(1.0, 1.0)

    @property
    def has_weights(self) -> bool:
        """Whether the costs are others than those of plain cross-entropy."""
        return self._has_weights

    def extra_repr(self) -> str:
        """The costs, for `repr`."""
        fn, fp = (c.tolist() if isinstance(c, Tensor) else c for c in (self.fn_cost, self.fp_cost))
        return f"fn_cost={fn}, fp_cost={fp}"

    def _positions(self, output: Tensor, target: Tensor) -> Tensor:
        """Losses of all positions, (N, d1, ...)."""
        if isinstance(self.fn_cost, Tensor) and isinstance(self.fp_cost, Tensor):
            return _multiclass(output, target, self.fn_cost, self.fp_cost)
        refuse_logits(output, target, single=True)
        z = precise(output)
        y = target.to(z.dtype)
        # logsigmoid and not softplus, which torch cuts off at 20
        return -self.fn_cost * y * F.logsigmoid(z) - self.fp_cost * (1 - y) * F.logsigmoid(-z)


def _multiclass(output: Tensor, target: Tensor, fn_cost: Tensor, fp_cost: Tensor) -> Tensor:
    refuse_classes(output, target, fn_cost, probabilities=False)
    if output.dim() == 1:
        output, target = output.unsqueeze(0), target.unsqueeze(0)
    z = precise(output).movedim(1, -1)
    log_p = z.log_softmax(-1)
    target = target.long()
    try:
        log_p_true = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    except FAILURES as error:
        refuse_classes(output, target, fn_cost, probabilities=False, cause=error)
        raise
    missed = fn_cost.to(log_p.dtype)[target] * log_p_true
    return -missed - (fp_cost.to(log_p.dtype)[target] * _log_one_minus_p(z, log_p)).sum(-1)


def _log_one_minus_p(z: Tensor, log_p: Tensor) -> Tensor:
    """log(1 - p), to rounding, from logits z and log p = log_softmax(z), over the last dimension.

    log1p(-p) is exact up to p = 1/2. Beyond, 1 - p cancels (at a logit gap of 17 in float32 it is 0, and with it the
    gradient of the worst mistakes), so there it is logsumexp(other z) - logsumexp(all z). Only one p can be above 1/2.
    """
    p = log_p.exp()
    large = p > 0.5
    others_top, others = _logsumexp(z.masked_fill(large, -torch.inf))
    all_top, everything = _logsumexp(z)
    log_others = (others_top - all_top) + (others - everything)
    # masked before log1p: its infinity at p = 1 would turn into nan in the backward pass
    return torch.where(large, log_others, torch.log1p(-p.masked_fill(large, 0)))


def _logsumexp(z: Tensor) -> tuple[Tensor, Tensor]:
    """Logsumexp as a sum of two: the largest z and the rest, so that large logits do not swamp a small difference."""
    top = z.detach().amax(-1, keepdim=True)
    return top, (z - top).logsumexp(-1, keepdim=True)
