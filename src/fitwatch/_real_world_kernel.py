"""The real-world-weight cross-entropy of softmax outputs, exact to rounding, with its own backward pass.

In each row, let z* be the largest logit and z2 the second largest, E_k = exp(z_k - z2) for all others, E* = 0,
R = sum of E, which is at least 1, and d = log R - (z* - z2), the log-odds against the largest class. Then

    p* = sigmoid(-d),    1 - p* = sigmoid(d) = u,    p_k = E_k u / R.

All p_k but p* are at most 1/2, so log1p(-p_k) is exact, and log(1 - p*) = logsigmoid(d): nothing cancels, and nothing
overflows, however large the logits are. In the plain log(1 - p) the worst mistakes have an infinite loss or no gradient.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 1 << 16
"""Elements of the logits that are worked on at once: few enough for the intermediate results to stay in the cache."""

_LONG_ROW = 100
"""Classes from which the faster of two ways to find the largest logit is the longer way."""

_LOG2_E = math.log2(math.e)


def real_world_losses(logits: Tensor, target: Tensor, fn_cost: Tensor, fp_cost: Tensor) -> Tensor:
    """Losses -fn_cost[y] log p[y] - sum over j != y of fp_cost[y, j] log(1 - p[j]), with p = softmax(logits).

    Gradients go to the logits only. They are computed with the losses, while the rows are in the cache, and kept in
    place of all intermediate results; second derivatives, `torch.func` and `torch.compile` go through the plain
    formula, which gives the same.

    Args:
        logits: Shape (N, C), float32 or float64, C >= 2; -inf for a class that is not the true one gives it p = 0.
        target: Class indices in range, shape (N,), int64.
        fn_cost: Cost of missing each class, shape (C,), of the logits' dtype.
        fp_cost: Cost of calling class i (row) a j (column), shape (C, C), zero diagonal, of the logits' dtype.

    Returns:
        Losses of shape (N,).
    """
    # Function.apply refuses torch.func unless the class gives rules for it. There is no public way to ask; this is how
    # torch itself does.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():  # noqa: SLF001
        return _formula(logits, target, fn_cost, fp_cost).losses
    losses: Tensor = _RealWorldLosses.apply(logits, target, fn_cost, fp_cost)  # type: ignore[no-untyped-call]
    return losses


class _Parts(NamedTuple):
    """The losses, (N,), and what their gradient is made of: names as above, (N, C) or (N, 1)."""

    losses: Tensor
    top: Tensor
    labels: Tensor
    e: Tensor
    r: Tensor
    minus_d: Tensor
    minus_u: Tensor
    minus_p: Tensor
    fn: Tensor
    fp: Tensor
    fp_top: Tensor


def _largest(logits: Tensor) -> Tensor:
    """Index of a largest logit of each row, (N, 1)."""
    if logits.shape[1] < _LONG_ROW:
        return logits.argmax(1, keepdim=True)
    # Three times as fast as argmax, which goes through one element after the other.
    is_largest = logits.clone().eq_(logits.amax(1, keepdim=True))
    return is_largest.mul_(torch.arange(logits.shape[1], device=logits.device)).amax(1, keepdim=True).long()


def _formula(logits: Tensor, target: Tensor, fn_cost: Tensor, fp_cost: Tensor) -> _Parts:
    """The losses, differentiable any number of times."""
    labels = target.unsqueeze(1)
    top = _largest(logits.detach())
    highest = logits.gather(1, top)
    # The most negative number and not -inf, so that all stays finite where all others are -inf; elsewhere E* = 0 too.
    e = logits.scatter(1, top, torch.finfo(logits.dtype).min)
    second = e.detach().amax(1, keepdim=True)
    # exp, in two steps: torch leaves exp to MKL, which takes twice as long
    e = e.sub_(second).mul_(_LOG2_E).exp2_()
    r = e.sum(1, keepdim=True)
    d = r.log() - (highest - second)
    minus_d = -d
    minus_u = -d.sigmoid()
    minus_p = e * (minus_u / r)
    fn, fp = fn_cost.take(labels), fp_cost.index_select(0, target)
    fp_top = fp.gather(1, top)
    log_p = logits.gather(1, labels) - highest + F.logsigmoid(minus_d)
    gained = (fp * torch.log1p(minus_p)).sum(1, keepdim=True)
    gained = torch.addcmul(torch.addcmul(gained, fn, log_p), fp_top, F.logsigmoid(d))
    return _Parts(-gained.squeeze(1), top, labels, e, r, minus_d, minus_u, minus_p, fn, fp, fp_top)


def _row_gradients(parts: _Parts, out: Tensor | None = None) -> Tensor:
    """Gradient of each loss by its own row of logits, (N, C); overwrites the parts.

    With g_j = fp_j p_j / (1 - p_j), the sum S of g over all but the largest class, and g* = fp* p* / u:

        dl/dz_k = fn (p_k - [k = y]) + g_k - p_k (S + g*)    where p_k g* = fp* p* E_k / R,
        dl/dz*  = fn (p* - [* = y]) + fp* p* - p* S          where p* - 1 = -u.
    """
    _, top, labels, e, r, minus_d, minus_u, minus_p, fn, fp, fp_top = parts
    p_top = minus_d.sigmoid()
    fp_top = fp_top * p_top
    g = fp.mul_(minus_p).div_(torch.rsub(minus_p, -1))
    s = g.sum(1, keepdim=True)
    minus_each = torch.addcmul(fp_top, fn - s, minus_u).div_(r)
    grad = torch.addcmul(g, e, minus_each, value=-1, out=out)
    grad.scatter_add_(1, labels, -fn)
    at_top = torch.where(top == labels, minus_u, p_top)
    return grad.scatter_(1, top, fp_top.addcmul_(s, p_top, value=-1).addcmul_(fn, at_top))


class _RealWorldLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, fn_cost: Tensor, fp_cost: Tensor) -> Tensor:
        needs_grad = ctx.needs_input_grad[0]
        rows = max(1, _CHUNK // logits.shape[1])
        if len(target) <= rows:
            parts = _formula(logits, target, fn_cost, fp_cost)
            losses, grad = parts.losses, _row_gradients(parts) if needs_grad else None
        else:
            losses, grad = logits.new_empty(len(target)), torch.empty_like(logits) if needs_grad else None
            for i in range(0, len(target), rows):
                chunk = slice(i, i + rows)
                parts = _formula(logits[chunk], target[chunk], fn_cost, fp_cost)
                losses[chunk] = parts.losses
                if grad is not None:
                    _row_gradients(parts, out=grad[chunk])
        if grad is not None:
            ctx.save_for_backward(grad, logits, target, fn_cost, fp_cost)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        grad, logits, target, fn_cost, fp_cost = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself must be differentiable
            losses = _formula(logits, target, fn_cost, fp_cost).losses
            (twice,) = torch.autograd.grad(losses, logits, grad_output, create_graph=True)
            return twice, None, None, None
        return grad * grad_output.unsqueeze(1), None, None, None
