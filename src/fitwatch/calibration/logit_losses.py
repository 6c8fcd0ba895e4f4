"""Which losses take logits, and what their class weights add to the logits."""

import torch
from torch import Tensor

from fitwatch.losses import BinaryCrossEntropy, CrossEntropy, Focal, LogitAdjusted


def takes_logits(loss: object) -> bool:
    """Return whether outputs for this loss are logits whose softmax or sigmoid estimates probabilities."""
    return isinstance(loss, (CrossEntropy, BinaryCrossEntropy, Focal))


def prior_shift(loss: object, *, columns: int) -> Tensor | None:
    """Return what the loss adds to the logits: log w for class weights w, since it counts classes as often as that.

    Args:
        loss: The training loss.
        columns: Number of logits of an example.

    Returns:
        Shape (columns,), float64; None without class weights.

    Raises:
        ValueError: A class has weight 0, so nothing is learned about it; or the weights do not fit the outputs.
    """
    if isinstance(loss, BinaryCrossEntropy):
        if loss.pos_weight is None:
            return None
        negative = torch.ones(()) if loss._neg_weight is None else loss._neg_weight  # noqa: SLF001 - of this package
        shift = (loss.pos_weight.double() / negative.double().to(loss.pos_weight.device)).log()
        return shift.detach().cpu().expand(columns).clone()
    weight, adjustment = getattr(loss, "weight", None), getattr(loss, "adjustment", None)
    parts = []
    if isinstance(weight, Tensor):
        if not bool((weight > 0).all()):
            raise ValueError("a class has weight 0, so the outputs say nothing about it")
        parts.append(weight.detach().cpu().double().log())
    if isinstance(loss, LogitAdjusted) and isinstance(adjustment, Tensor):  # added to the logits in training only
        parts.append(-adjustment.detach().cpu().double())
    if not parts:
        return None
    shift = torch.stack(parts).sum(0)
    if columns == 1 and len(shift) == 2:  # one logit is that of class 1, less that of class 0
        shift = (shift[1] - shift[0]).unsqueeze(0)
    if len(shift) != columns:
        raise ValueError(f"the loss has {len(shift)} class weights for outputs of {columns} logits")
    return shift
