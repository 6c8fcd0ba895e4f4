"""Measures gradients on the device, without making the host wait for it."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from attrs import frozen
from torch import Tensor

from fitwatch.callbacks.gradient_norm.layers import NO_GRAD, Layers
from fitwatch.helpers.dtypes import wide_float
from fitwatch.records import Value
from fitwatch.rules.gradients import LayerGradient

SAMPLE = 10_000  # most gradient values of a layer in a histogram


class Place(NamedTuple):
    """The step at which gradients were read; epochs and batches count from 0."""

    step: int
    epoch: int
    first_batch: int
    end_batch: int  # one past the step's last micro-batch; 0 if the loop does not count them


@frozen(kw_only=True)
class Figures:
    """The measurements of one log window of S steps, on the host."""

    places: list[Place]
    norms: list[float]  # total norm of each step
    totals: list[float]  # total norm of each step as measured by the clipping; empty without clipping
    first_bad: list[int]  # for each parameter, the first step with a non-finite norm, or S
    parameters: list[str]
    layers: dict[str, LayerGradient]
    samples: dict[str, Tensor]  # gradient values of some layers at the first step
    skips: bool  # whether steps with a non-finite gradient are skipped


class Reading:
    """Measures the gradients of a fixed set of parameters in each log window.

    Args:
        layers: The parameters, at least one, and their layers.
        write: Returns the values to log for a log window, by name.
        skips: Whether steps with a non-finite gradient are skipped, as by a GradScaler. Means and maxima then exclude
            them.
    """

    def __init__(self, layers: Layers, write: Callable[[Figures], Mapping[str, Value]], *, skips: bool) -> None:
        self.layers, self._parameters, self._write, self._skips = layers, layers.parameters, write, skips
        first = self._parameters[0]
        self._device = first.device
        self._index = torch.tensor(layers.index, device=self._device)
        # Squares of tiny or huge norms stay in the range of float64.
        self._wide = wide_float(self._device)
        alike = all(p.dtype is first.dtype and p.device == first.device for p in self._parameters)
        # The dtype of all parameters if a single call can measure them, else None.
        self._dtype = first.dtype if alike and first.dtype in (torch.float32, torch.float64) else None
        self._zero = torch.zeros((), device=self._device)
        self._open_window()

    def _open_window(self) -> None:
        self.places: list[Place] = []
        self._totals: list[Tensor] = []
        self._silent = set(range(len(self._parameters)))  # no gradient so far
        # At the first step of the log window:
        self._rates: list[float | Tensor] = []  # learning rate of each layer
        self._before: list[Tensor] = []  # weights, until the end of the step
        self._sample: list[Tensor] = []  # of each parameter: non-zero elements, norm of the weights, norm of the update
        self._values: dict[str, Tensor] = {}

    # -- within a step -------------------------------------------------------------------------------------------

    def norms(self, place: Place) -> Tensor:
        """Return the norm of each parameter's gradient, shape (P,); 0 without a gradient."""
        self.places.append(place)
        gradients = [p.grad for p in self._parameters]
        dense = [g for g in gradients if g is not None and g.dtype is self._dtype and not g.is_sparse]
        if len(dense) == len(gradients):
            self._silent = set()
            return torch.stack(torch._foreach_norm(dense))  # noqa: SLF001 - one kernel for all
        values = {i: _values(g) for i, g in enumerate(gradients) if g is not None}
        self._silent -= values.keys()
        filled = [i for i, v in values.items() if v.numel()]  # a sparse gradient may have no elements
        norms = [self._zero] * len(gradients)
        for i, norm in zip(filled, _norms([values[i] for i in filled]), strict=True):
            norms[i] = norm.to(self._device)
        return torch.stack(norms)

    def begin_sample(self, histograms: Collection[str]) -> None:
        """Sample the step about to be taken: copy the weights, count zeros, keep the values of some layers."""
        rates = [group["lr"] for group in self.layers.groups]  # tensors may change in place
        self._rates = [rate.detach().clone() if isinstance(rate, Tensor) else rate for rate in rates]
        nonzero = [self._zero if p.grad is None else torch.count_nonzero(_values(p.grad)) for p in self._parameters]
        self._sample = [self._stack(nonzero)]
        self._before = [p.detach().clone() for p in self._parameters]
        for layer, members in zip(self.layers.names, self.layers.members, strict=True):
            gradients = [g for i in members if (g := self._parameters[i].grad) is not None]
            if layer in histograms and gradients:
                self._values[layer] = self._spread([_values(g).detach().reshape(-1) for g in gradients])

    def end_step(self, total: Tensor | None) -> None:
        """Keep ``total``, the norm that the clipping measured, and measure the update of a sampled step."""
        if total is not None and len(self._totals) < len(self.places):
            self._totals.append(total)
        if self._before:
            before, self._before = self._before, []
            weights = _norms(before)
            torch._foreach_sub_(before, [p.detach() for p in self._parameters])  # in place: no third copy
            self._sample += [self._stack(weights), self._stack(_norms(before))]

    def _stack(self, values: Sequence[Tensor]) -> Tensor:
        if self._dtype is not None and len({v.dtype for v in values}) == 1:
            return torch.stack(list(values))
        return torch.stack([v.to(self._device, self._wide) for v in values])

    def _by_layer(self, values: Tensor) -> Tensor:
        """Sum values of parameters, shape (..., P), over each layer, shape (..., L)."""
        shape = *values.shape[:-1], len(self.layers.names) + 1
        return values.new_zeros(shape).index_add(-1, self._index, values)[..., :-1]

    def _spread(self, gradients: list[Tensor]) -> Tensor:
        """Return about `SAMPLE` evenly spaced values at most."""
        stride = math.ceil(sum(g.numel() for g in gradients) / SAMPLE)
        return torch.cat([g[::stride].to(self._device, self._wide) for g in gradients])

    # -- at the end of a log window ------------------------------------------------------------------------------

    def reduce(self, norms: Tensor) -> Tensor:
        """Reduce norms by step and parameter, shape (S, P), to the flat tensor that `receive` unpacks.

        There is nothing to reduce in one step: its layers are summed on the host, which takes fewer small kernels.
        """
        norms = norms.to(self._wide)
        if len(norms) == 1:
            sample = self._sample if len(self._sample) == 3 else []
            return torch.cat([part.reshape(-1).to(self._wide) for part in (norms, *sample, *self._totals[:1])])
        finite = norms.isfinite()
        parts = [torch.linalg.vector_norm(norms, dim=1), finite.cumprod(0).sum(0)]
        if self.layers.names:
            parts += self._reduce_layers(self._layer_norms(norms), finite.all(1, keepdim=True))
        if len(self._totals) == len(norms):
            parts.append(self._stack(self._totals))
        return torch.cat([part.to(self._wide) for part in parts])

    def _reduce_layers(self, norms: Tensor, finite: Tensor) -> list[Tensor]:
        zero = (norms == 0).sum(0)
        if self._skips:
            norms = torch.where(finite, norms, 0)
            largest = torch.where(finite.any(), norms.amax(0), math.nan)  # like the mean, if every step was skipped
            parts = [norms.sum(0) / finite.sum(), largest, zero]
        else:
            parts = [norms.mean(0), norms.amax(0), zero]
        unknown = torch.full((3 * len(self.layers.names),), math.nan, device=self._device)
        if len(self._sample) < 3:
            return [*parts, unknown]
        nonzero, *norms_of_weights = (values.to(self._wide) for values in self._sample)
        return [*parts, self._by_layer(nonzero), *(self._by_layer(n.square()).sqrt() for n in norms_of_weights)]

    def _layer_norms(self, norms: Tensor) -> Tensor:
        """Return the norm of each layer, shape (S, L), from those of its parameters, shape (S, P)."""
        index = self._index.expand(len(norms), -1)
        # Relative to the layer's largest, so that squares stay in range. A product with a 0-1 matrix would spread a NaN
        # to all layers.
        largest = norms.new_zeros(len(norms), len(self.layers.names) + 1).scatter_reduce(1, index, norms, "amax")
        scale = torch.where(largest.isfinite() & (largest > 0), largest, 1)
        return self._by_layer((norms / scale.gather(1, index)).square()).sqrt() * scale[:, :-1]

    def receive(self, numbers: list[float]) -> Mapping[str, Value]:
        """Unpack the result of `reduce`, now on the host, start a new log window, and return the values to log."""
        rest = iter(self._reduced(numbers) if len(self.places) == 1 else numbers)
        sizes = [len(self.places), len(self._parameters), *[len(self.layers.names)] * 6]
        norms, first_bad, *by_layer = [list(islice(rest, size)) for size in sizes]
        figures = Figures(
            places=self.places,
            norms=norms,
            totals=list(rest),
            first_bad=[int(step) for step in first_bad],
            parameters=self.layers.parameter_names,
            layers=self._layer_gradients(by_layer, sampled=math.isfinite(norms[0])),
            samples=self._values,
            skips=self._skips,
        )
        self._open_window()
        return self._write(figures)

    def _reduced(self, numbers: list[float]) -> list[float]:
        """Return what `reduce` gives for several steps, from the norms, and the sample if there is one, of one step."""
        size, members = len(self._parameters), self.layers.members
        rows = 1 + (len(self._sample) if len(self._sample) == 3 else 0)
        norms, *sample = [numbers[i * size : (i + 1) * size] for i in range(rows)]
        totals = numbers[size * rows :]
        finite = all(map(math.isfinite, norms))
        layers = [_norm([norms[i] for i in own]) for own in members]
        shown = layers if finite or not self._skips else [math.nan] * len(layers)
        zero = [float(norm == 0) for norm in layers]
        sampled = [math.nan] * 3 * len(layers)
        if len(sample) == 3:
            nonzero = [sum(sample[0][i] for i in own) for own in members]
            weights, updates = ([_norm([part[i] for i in own]) for own in members] for part in sample[1:])
            sampled = [*nonzero, *weights, *updates]
        first_bad = [float(math.isfinite(norm)) for norm in norms]
        return [_norm(norms), *first_bad, *shown, *shown, *zero, *sampled, *totals]

    def _layer_gradients(self, by_layer: list[list[float]], *, sampled: bool) -> dict[str, LayerGradient]:
        """Describe each layer; not ``sampled``: a GradScaler skipped the sampled step, so no weight changed."""
        layers = self.layers
        gradients = {name: LayerGradient(untrained=reason) for name, reason in layers.untrained.items()}
        means = by_layer[0]
        for i, (mean, largest, zero_steps, nonzero, weight, update) in enumerate(zip(*by_layer, strict=True)):
            members = layers.members[i]
            has_gradient = not self._silent.issuperset(members)
            if not has_gradient and not any(self._parameters[j].requires_grad for j in members):
                gradients[layers.names[i]] = LayerGradient(untrained=NO_GRAD)  # since the epoch started
                continue
            rate = float(self._rates[i])
            gradients[layers.names[i]] = LayerGradient(
                mean=mean,
                max=largest,
                has_gradient=has_gradient,
                zero_share=1 - nonzero / sum(self._parameters[j].numel() for j in members),
                weight_norm=weight if sampled else math.nan,
                update_norm=update if sampled else math.nan,
                lr=rate,
                lr_rises=float(layers.groups[i]["lr"]) > rate,
                zero_steps=int(zero_steps),
                module_mean=max(means[j] for j in layers.siblings[i]),
            )
        return gradients


def _norm(values: list[float]) -> float:
    """Return the 2-norm; NaN if one of them is, also beside an infinity."""
    return math.nan if any(map(math.isnan, values)) else math.hypot(*values)


def _values(gradient: Tensor) -> Tensor:
    """Return the elements of a gradient that may differ from 0."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the norm of each tensor; half precision, which would overflow and round, is summed in float32."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, t in enumerate(tensors):
        groups.setdefault((t.device, t.dtype), []).append(i)
    norms: list[Tensor] = [torch.empty(())] * len(tensors)
    for (_, dtype), members in groups.items():
        half = dtype in (torch.float16, torch.bfloat16)
        same = [tensors[i] for i in members]
        found = torch._foreach_norm(same, dtype=torch.float32 if half else None)  # noqa: SLF001 - as above
        for i, norm in zip(members, found, strict=True):
            norms[i] = norm
    return norms
