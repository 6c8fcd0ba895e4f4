"""Logits and targets in one form for all fits: float64, on the host, with the class weights taken off."""

import math
from typing import Self

import torch
from attrs import evolve, field, frozen
from torch import Tensor

_LOWEST = -1e6
"""Stands in for the -inf of a masked class: infinity times a probability of 0 is nan."""


@frozen(eq=False)
class Rows:
    """The logits and targets of N examples.

    Attributes:
        logits: Shape (C, N): for exclusive classes the largest of each example is 0.
        targets: Class indices, shape (N,), int64; or for K labels targets in [0, 1], shape (K, N).
        weights: Weight of each example, shape (N,), with mean 1.
        linear: The logit of the target; for labels the sum of targets times logits. Shape (N,).
    """

    logits: Tensor
    targets: Tensor
    weights: Tensor
    linear: Tensor = field(init=False)

    def __attrs_post_init__(self) -> None:
        if self.exclusive:
            linear = self.logits.gather(0, self.targets.unsqueeze(0)).squeeze(0)
        else:
            linear = (self.logits * self.targets).sum(0)
        object.__setattr__(self, "linear", linear)

    @classmethod
    def of(cls, outputs: Tensor, targets: Tensor, weights: Tensor | None = None, shift: Tensor | None = None) -> Self:
        """Bring outputs into this form.

        Args:
            outputs: Finite logits (a masked class may be -inf), shape (N, C) with class indices as targets; or with
                targets in [0, 1] of the same shape, (N,), (N, 1) or (N, K).
            targets: Targets.
            weights: Weight of each example, shape (N,).
            shift: What is taken off the logits first, shape (C,) or (K,).
        """
        z = outputs.detach().cpu().double()
        exclusive = targets.shape != outputs.shape
        z = (z if z.dim() == 2 else z.unsqueeze(1)).T
        if shift is not None:
            z = z - shift.detach().cpu().double().reshape(-1, 1)
        if exclusive:
            z = z - z.amax(0)
            y = targets.detach().cpu().long()
        else:
            y = targets.detach().cpu().double().reshape(len(targets), -1).T.contiguous()
        w = torch.ones(z.shape[1], dtype=z.dtype) if weights is None else weights.detach().cpu().double()
        z = z.masked_fill(z == -math.inf, _LOWEST)
        return cls(z.contiguous(), y, w / w.mean())

    @property
    def exclusive(self) -> bool:
        """Whether each example has one class; else each has one or several labels."""
        return self.targets.dim() == 1

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def positions(self) -> int:
        """Number of targets of an example: 1, or the number of labels."""
        return 1 if self.exclusive else len(self.logits)

    def part(self, kept: Tensor) -> Self:
        """Return the examples that ``kept`` selects, a mask or indices; their weights keep their scale."""
        return evolve(self, logits=self.logits[:, kept], targets=self.targets[..., kept], weights=self.weights[kept])

    def losses(self, scale: Tensor | float = 1.0) -> Tensor:
        """Return the log-loss of each example, shape (N,), at logits times ``scale``: a number, or of shape (N,).

        For labels it is the mean over them.
        """
        a = self.logits * scale
        normalizer = a.exp().sum(0).log() if self.exclusive else _softplus(a).sum(0)
        return (normalizer - scale * self.linear) / self.positions

    def moments(self, scale: float) -> tuple[Tensor, Tensor]:
        """Return the first two derivatives of the log-loss of each example by the scale, summed over its labels."""
        z = self.logits
        if not self.exclusive:
            p = (z * scale).sigmoid()
            first = p * z
            return first.sum(0) - self.linear, (first * (1 - p) * z).sum(0)
        e = (z * scale).exp_()
        total = e.sum(0)
        e *= z
        mean = e.sum(0) / total
        return mean - self.linear, (e * z).sum(0) / total - mean.square()


def _softplus(a: Tensor) -> Tensor:
    return a.clamp(min=0) + (-a.abs()).exp().log1p()
