"""The figures of the gradients, taken on the device; nothing here makes the host wait for it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from attrs import frozen
from torch import Tensor

SAMPLE = 10_000  # values of a layer's gradient in a histogram, at most


class Place(NamedTuple):
    """Where in the training a reading was taken; epochs and batches count from 0."""

    step: int
    epoch: int
    first_batch: int
    end_batch: int  # one past the last micro-batch of the step; 0 where the loop does not count them


@frozen(kw_only=True)
class Figures:
    """What a log window measured, on the host; one entry for each step, parameter or layer."""

    places: list[Place]  # of the steps read
    norms: list[float]  # total norm of each
    first_bad: list[int]  # of each parameter: the first of these steps with a norm that is not finite, or how many
    mean: list[float]  # of each layer, over the steps
    max: list[float]
    zero_steps: list[float]  # of each layer: steps with a norm of 0
    nonzero: list[float]  # of each layer, at the sampled step: elements of the gradient that are not 0
    weight: list[float]  # 2-norm of the weights before that step
    update: list[float]  # 2-norm of what it added to them
    totals: list[float]  # 2-norm of each step as the clipping measured it; empty without clipping
    silent: set[int]  # parameters that had no gradient in any of the steps


class Reading:
    """Reads a fixed set of parameters that belong to layers.

    Args:
        parameters: P of them, none of them empty.
        layers: The number of the layer of each parameter, or -1 for none.
        norm_type: The p of the norm.
        device: Where the figures are gathered.
        skips: Whether steps with a gradient that is not finite are left out, as a GradScaler does: then the means and
            maxima leave them out too.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        layers: Sequence[int],
        *,
        norm_type: float,
        device: torch.device,
        skips: bool,
    ) -> None:
        self.parameters, self.norm_type, self.device, self.skips = list(parameters), norm_type, device, skips
        self.layers = max(layers, default=-1) + 1
        self._layer_of = list(layers)
        self._layer = torch.tensor([i if i >= 0 else self.layers for i in layers], device=device)
        # float64 on the way from parameters to layers and steps: squares of tiny or huge norms stay in its range
        self._wide = torch.float32 if device.type == "mps" else torch.float64
        kinds = {(p.dtype, p.device) for p in parameters}
        alike = len(kinds) == 1 and parameters[0].device == device
        plain = alike and parameters[0].dtype in (torch.float32, torch.float64)
        self._dtype = parameters[0].dtype if plain else None  # that all share, where one call takes all their norms
        self._zero = torch.zeros((), device=device)
        self._open_window()

    def _open_window(self) -> None:
        self.places: list[Place] = []
        self._seen: set[int] = set()  # parameters that had a gradient
        self._all_seen = False
        self._totals: list[Tensor] = []
        self._before: list[Tensor] = []
        self._nonzero: Tensor | None = None
        self._sample: list[Tensor] = []

    # -- within the step -----------------------------------------------------------------------------------------

    def norms(self, place: Place) -> Tensor:
        """The norm of each parameter's gradient, (P,); 0 where there is none."""
        self.places.append(place)
        gradients = [p.grad for p in self.parameters]
        dense = [g for g in gradients if g is not None and g.dtype is self._dtype and not g.is_sparse]
        if len(dense) == len(gradients):
            self._all_seen = True
            return torch.stack(torch._foreach_norm(dense, self.norm_type))  # noqa: SLF001 - one kernel for all
        values = {i: _values(g) for i, g in enumerate(gradients) if g is not None}
        self._seen.update(values)
        filled = [i for i, v in values.items() if v.numel()]  # a sparse gradient may have no element
        norms = [self._zero] * len(gradients)
        for i, norm in zip(filled, _norms([values[i] for i in filled], self.norm_type), strict=True):
            norms[i] = norm.to(self.device)
        return torch.stack(norms)

    def begin_sample(self) -> None:
        """Before a step: count the zeros of the gradients, and keep the weights until `end_sample`."""
        self._nonzero = self._sum_by_layer(
            [self._zero if p.grad is None else torch.count_nonzero(_values(p.grad)) for p in self.parameters]
        )
        self._before = [p.detach().clone() for p in self.parameters]

    def end_sample(self) -> None:
        """After the step: what it did to the weights."""
        if not self._before:
            return
        before, self._before = self._before, []
        weight = self._sum_by_layer([norm.square() for norm in _norms(before, 2.0, wide=True)])
        torch._foreach_sub_(before, [p.detach() for p in self.parameters])  # in place: no third copy
        update = self._sum_by_layer([norm.square() for norm in _norms(before, 2.0, wide=True)])
        self._sample = [weight.sqrt(), update.sqrt()]

    def add_total(self, total: Tensor) -> None:
        """Keep the 2-norm that the clipping measured at this step."""
        self._totals.append(total)

    def values(self, layer: int) -> Tensor | None:
        """Evenly spaced values of a layer's gradient, about `SAMPLE` at most; None if it has none."""
        gradients = [
            _values(p.grad).detach().reshape(-1)
            for p, i in zip(self.parameters, self._layer_of, strict=True)
            if i == layer and p.grad is not None
        ]
        stride = math.ceil(sum(g.numel() for g in gradients) / SAMPLE)
        return torch.cat([g[::stride].to(self.device, self._wide) for g in gradients]) if gradients else None

    # -- at the end of a log window ------------------------------------------------------------------------------

    def reduce(self, norms: Tensor) -> Tensor:
        """From norms by step and parameter, (S, P), to the flat tensor that `close_window` takes apart."""
        norms = norms.to(self._wide)
        finite = norms.isfinite()
        first_bad = finite.cumprod(0).sum(0)
        total = torch.linalg.vector_norm(norms, self.norm_type, dim=1)
        parts = [total, first_bad]
        if self.layers:
            parts += self._reduce_layers(norms, finite)
        if len(self._totals) == len(norms):
            parts.append(torch.stack([t.to(self.device) for t in self._totals]))
        return torch.cat([part.to(self._wide) for part in parts])

    def _reduce_layers(self, norms: Tensor, finite: Tensor) -> list[Tensor]:
        layers = self._by_layer(norms)
        zero = (layers == 0).sum(0)
        if self.skips:
            made = finite.all(1, keepdim=True)
            layers = torch.where(made, layers, 0)
            largest = torch.where(made.any(), layers.amax(0), math.nan)  # as the mean: of no step at all
            parts = [layers.sum(0) / made.sum(), largest, zero]
        else:
            parts = [layers.mean(0), layers.amax(0), zero]
        if self._nonzero is None or not self._sample:
            return [*parts, torch.full((3 * self.layers,), math.nan, device=self.device)]
        return [*parts, self._nonzero, *self._sample]

    def close_window(self, numbers: list[float]) -> Figures:
        """What `reduce` gave, on the host; and begin anew."""
        sizes = [len(self.places), len(self.parameters), *([self.layers] * 6)]
        parts, start = [], 0
        for size in sizes:
            parts.append(numbers[start : start + size])
            start += size
        norms, first_bad, mean, largest, zero_steps, nonzero, weight, update = parts
        figures = Figures(
            places=self.places,
            norms=norms,
            first_bad=[int(i) for i in first_bad],
            mean=mean,
            max=largest,
            zero_steps=zero_steps,
            nonzero=nonzero,
            weight=weight,
            update=update,
            totals=numbers[start:],
            silent=set(range(len(self.parameters))) - self._seen if not self._all_seen else set(),
        )
        self._open_window()
        return figures

    def _by_layer(self, norms: Tensor) -> Tensor:
        """The norm of each layer, (S, L), from those of its parameters, (S, P)."""
        steps, index = len(norms), self._layer.expand(len(norms), -1)
        # A NaN in one layer must not reach the others, as it would in a product with a matrix of 0 and 1.
        largest = norms.new_zeros(steps, self.layers + 1).scatter_reduce(1, index, norms, "amax")
        if math.isfinite(self.norm_type):
            # relative to the largest of the layer: a power of a small number must not leave the range
            scale = torch.where(largest.isfinite() & (largest > 0), largest, 1)
            powers = (norms / scale.gather(1, index)).pow(self.norm_type)
            sums = torch.zeros_like(largest).index_add(1, self._layer, powers)
            largest = sums.pow(1 / self.norm_type) * scale
        return largest[:, :-1]

    def _sum_by_layer(self, values: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack([v.to(self.device, self._wide) for v in values])
        return stacked.new_zeros(self.layers + 1).index_add(0, self._layer, stacked)[:-1]


def _values(gradient: Tensor | None) -> Tensor:
    """The elements of a gradient that may differ from 0."""
    assert gradient is not None
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _norms(tensors: Sequence[Tensor], p: float, *, wide: bool = False) -> list[Tensor]:
    """The norm of each tensor, in float32 (float64 stays): half precision would overflow and round.

    ``wide``: the norms, not the elements, as float64 where there is one, so that their squares stay in range.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, t in enumerate(tensors):
        groups.setdefault((t.device, t.dtype), []).append(i)
    norms: list[Tensor] = [torch.empty(())] * len(tensors)
    for (device, dtype), members in groups.items():
        half = dtype in (torch.float16, torch.bfloat16)
        same = [tensors[i] for i in members]
        taken = torch._foreach_norm(same, p, dtype=torch.float32 if half else None)  # noqa: SLF001 - as above
        for i, norm in zip(members, taken, strict=True):
            norms[i] = norm.double() if wide and device.type != "mps" else norm
    return norms
