"""The logits of a validation, or a fixed part of them, from which its calibration is measured."""

import math
from itertools import zip_longest

import torch
from torch import Tensor

from fitwatch import ranks
from fitwatch.calibration.logit_losses import prior_shift, takes_logits
from fitwatch.calibration.refined import Refined
from fitwatch.calibration.rows import Rows
from fitwatch.losses import BinaryCrossEntropy

MOST = 2_000_000
"""Logits that are kept at most, N times C: of larger validation sets a fixed part."""

_Batch = tuple[Tensor, Tensor, Tensor | None]  # logits, targets, weights


class KeptLogits:
    """Keeps logits, targets and weights of the examples on their device.

    Of more than `MOST` logits a random part stays. Each example draws a number in [0, 1), by the place of its batch;
    those below a bound stay, and the bound is halved as often as needed. So the part is the same in every validation,
    and for any number of ranks.

    Args:
        loss: The loss that validation measures.
        trained: The training loss, whose class weights have shifted the logits.
        start: A temperature near the solution.

    Attributes:
        unknown: Why nothing can be measured; None if it can.
    """

    def __init__(self, loss: object, trained: object, *, start: float = 1.0) -> None:
        self._loss, self._trained, self._start = loss, trained, start
        self.unknown: str | None = None
        if not takes_logits(loss):
            self.unknown = f"{type(loss).__name__} does not say that the outputs are logits of classes or labels"
        self._kept: list[tuple[_Batch, Tensor | None]] = []  # with what its examples drew, if that was needed
        self._numbers: list[int] = []  # of the batches, counted over all ranks
        self._seen, self._logits, self._bound = 0, 0, 1.0

    def add(self, outputs: object, targets: object, sample_weight: Tensor | None) -> None:
        """Add a batch; does not wait for the device."""
        number, self._seen = self._seen * ranks.size() + ranks.rank(), self._seen + 1
        if self.unknown is not None:
            return
        batch = self._as_batch(outputs, targets, sample_weight)
        if batch is None:
            self._kept, self._numbers, self._logits = [], [], 0
            return
        self._kept.append((batch, None))
        self._numbers.append(number)
        self._logits += batch[0].numel()
        if self._bound < 1:
            self._thin(len(self._kept) - 1)
        while self._logits > MOST:
            self._halve()

    def share(self) -> None:
        """Combine the parts of all ranks, in the order of a single rank; all ranks call it."""
        found = ranks.gather((self.unknown, self._bound))
        self.unknown = next((unknown for unknown, _ in found if unknown is not None), None)
        if self.unknown is not None:
            self._kept, self._numbers = [], []
            return
        bound = min(bound for _, bound in found)
        while self._bound > bound:
            self._halve()
        while sum(ranks.gather(self._logits)) > MOST:
            self._halve()
        own = [(z.cpu(), y.cpu(), None if w is None else w.cpu()) for (z, y, w), _ in self._kept]
        together = [batch for row in zip_longest(*ranks.gather(own)) for batch in row if batch is not None]
        self._kept = [(batch, None) for batch in together]

    def refined(self) -> Refined | None:
        """Measure the calibration; None if it is unknown, or the outputs are not finite."""
        if self.unknown is not None or not self._kept:
            self.unknown = self.unknown or "the validation step does not pass its outputs to update_metrics"
            return None
        batches = [batch for batch, _ in self._kept]
        z, y = torch.cat([z for z, _, _ in batches]).cpu(), torch.cat([y for _, y, _ in batches]).cpu()
        w = torch.cat([torch.ones(len(z)) if w is None else w.cpu() for z, _, w in batches])
        counts = w > 0
        ignored = getattr(self._loss, "ignore_index", None)
        if ignored is not None:
            counts &= y.reshape(len(y), -1)[:, 0] != ignored
        if not bool(counts.all()):
            z, y, w = z[counts], y[counts], w[counts]
        if not len(z) or not math.isfinite(z.amax()):  # a masked class may be -inf
            return None
        try:
            shift = prior_shift(self._trained, columns=z.shape[1] if z.dim() > 1 else 1)
        except ValueError as error:
            self.unknown = str(error)
            return None
        outputs = Rows.of(z, y, w)
        return Refined.of(outputs, outputs if shift is None else Rows.of(z, y, w, shift), shift, start=self._start)

    def _as_batch(self, outputs: object, targets: object, sample_weight: Tensor | None) -> _Batch | None:
        """Return copies of a batch in one form; None, and `unknown` is set, if it can't be used."""
        if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor) and outputs.is_floating_point()):
            self.unknown = "outputs or targets are not one tensor"
            return None
        one = outputs.dim() == 1 or (outputs.dim() == 2 and outputs.shape[1] == 1)
        labels = outputs.shape == targets.shape and (one or isinstance(self._loss, BinaryCrossEntropy))
        if outputs.dim() not in (1, 2) or not (
            labels or (targets.shape == outputs.shape[:1] and not targets.is_floating_point() and not one)
        ):
            self.unknown = (
                f"outputs of shape {tuple(outputs.shape)} with targets of shape {tuple(targets.shape)} are not one "
                "class index, or labels, for each example"
            )
            return None
        weight = None
        if sample_weight is not None:
            if sample_weight.numel() != len(outputs):
                self.unknown = "the weights are those of positions, not of examples"
                return None
            weight = sample_weight.detach().reshape(-1).to(torch.float32, copy=True)
        return outputs.detach().clone(), targets.detach().clone(), weight

    def _halve(self) -> None:
        self._bound /= 2
        for i in range(len(self._kept)):
            self._thin(i)

    def _thin(self, i: int) -> None:
        """Drop the examples of a batch that drew a number above the bound."""
        (z, y, w), drawn = self._kept[i]
        if drawn is None:
            generator = torch.Generator().manual_seed(self._numbers[i])
            drawn = torch.rand(len(z), generator=generator)
        stays = (drawn < self._bound).nonzero().squeeze(1)
        index = stays.to(z.device)
        self._logits -= z.numel()
        z, y, w = z[index], y[index], None if w is None else w[index]
        self._logits += z.numel()
        self._kept[i] = (z, y, w), drawn[stays]
