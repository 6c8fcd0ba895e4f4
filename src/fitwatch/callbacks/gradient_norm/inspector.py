"""Gradients: their norms, what they do to the weights, and which layers are in trouble."""

import logging
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from attrs import define, field
from torch import Tensor

from fitwatch.callback import Callback
from fitwatch.callbacks.gradient_norm import histogram
from fitwatch.callbacks.gradient_norm.reading import Figures, Place, Reading
from fitwatch.options import instance, integer
from fitwatch.records import Histogram
from fitwatch.rules.gradients import GradientRule, LayerGradient
from fitwatch.saving import unwrap
from fitwatch.state import State

logger = logging.getLogger("fitwatch")

SERIES = 20  # layers in a chart, at most
_NO_GRAD = "requires_grad is False"
_LARGEST = 15  # where there are more: so many with the largest norms; the rest is for those in trouble


def _norm_type(_: Any, option: Any, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{option.name} must be a number greater than 0 or inf, got {value!r}")
    if not value > 0:
        raise ValueError(f"{option.name} must be greater than 0, or inf, got {value!r}")


def _pattern(_: Any, option: Any, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise TypeError(f"{option.name} must be a regular expression or None, got {value!r}")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{option.name} must be a regular expression, got {value!r}: {error}") from error


def _siblings(names: list[str], members: list[list[int]]) -> list[set[int]]:
    """For each layer those that have parameters of the same modules, itself too."""
    parts: dict[str, set[int]] = {}  # of a module
    for layer, parameters in enumerate(members):
        for i in parameters:
            parts.setdefault(names[i].rpartition(".")[0], set()).add(layer)
    return [set().union(*(parts[names[i].rpartition(".")[0]] for i in parameters)) for parameters in members]


@define(eq=False, slots=False)
class GradientNorm(Callback):
    """Logs the norms of the gradients, and says which layers learn nothing, and where a NaN came from.

    The gradients are those of the whole step, unscaled, before clipping; only read, never changed. Of parameters that
    the optimizer holds; one without a gradient counts as 0. Nothing waits for the device within a step.

    For each log window it logs:

    - ``train/optim/grad_norm``, ``grad_norm_max``: the mean and the largest of the total norms.
    - ``train/optim/grad_norm_clipped``, ``clipped_share``: the mean after clipping, and the share of steps that were
      clipped; with a ``clip_norm`` only.
    - ``train/optim/skipped_share``: the share of steps that overflowed and were left out; with a GradScaler only.
    - ``train/params/grad_norm/<layer>``, ``grad_norm_max/<layer>``: the mean and the largest of a layer's norms.
    - ``train/params/update_ratio/<layer>``: the norm of an update over that of the weights before it, both 2-norms, at
      the first step read in the window.
    - ``train/params/zero_share/<layer>``: the share of exact zeros in the gradient, at the same step.

    At most 20 layers are drawn: of more, the 15 with the largest norm in the first window, and those that get into
    trouble. All are judged by ``rule``. When the status of a layer changes, a sentence goes to the log and to the text
    ``train/report/warnings``. So does the first gradient that is not finite, with parameter, step and batch. A layer
    that is frozen on purpose is a note in ``train/report/gradients``. For the update ratio the weights are copied once
    a window, for the length of one step.

    Norms of float16 and bfloat16 gradients are taken in float32; a norm beyond its range counts as not finite. Under a
    GradScaler, a step with a gradient that is not finite did not happen, so the other figures leave it out; only a
    window of nothing else is a warning.

    Args:
        norm_type: The p of the norm: a number above 0, or ``float("inf")``. The Trainer's ``clip_norm`` means 2.
        every: Steps between two readings. At 1, the default, no spike escapes ``grad_norm_max``.
        per_layer: Whether to look at layers at all, or at the total alone.
        depth: Parts of a module's name that make a layer: 1 puts all of ``encoder.*`` together. None: each module that
            has parameters of its own is a layer.
        layers: In place of ``depth``, a regular expression. What it finds in a parameter's name, or its first group,
            is the layer; where it finds nothing, the parameter is in the total only.
        histogram_every: Log windows between two histograms of the values of each layer drawn, from about 10,000 of
            them. None: no histograms.
        rule: The decision rule, with its options. Default: ``GradientRule()``.

    Raises:
        ValueError: An option is out of its range, or ``depth`` and ``layers`` are both given.
        TypeError: An option has the wrong type.
    """

    norm_type: float = field(default=2.0, kw_only=True, validator=_norm_type)
    every: int = field(default=1, kw_only=True, validator=integer(1))
    per_layer: bool = field(default=True, kw_only=True, validator=instance(bool))
    depth: int | None = field(default=None, kw_only=True, validator=integer(1, or_none=True))
    layers: str | None = field(default=None, kw_only=True, validator=_pattern)
    histogram_every: int | None = field(default=None, kw_only=True, validator=integer(1, or_none=True))
    rule: GradientRule = field(factory=GradientRule, kw_only=True, validator=instance(GradientRule))

    def __attrs_post_init__(self) -> None:
        if self.depth is not None and self.layers is not None:
            raise ValueError(f"give depth or layers, not both: got depth={self.depth!r} and layers={self.layers!r}")
        self._forget()

    def _forget(self) -> None:
        self._shown: list[str] = []  # layers with a curve
        self._clipped = [0, 0]  # steps that were clipped, and all
        self._windows = 0

    @property
    def suggested_clip_norm(self) -> float | None:
        """A ``clip_norm`` that cuts spikes and little else: see `GradientRule.clip_norm`.

        None before the first 20 steps are read, and where ``norm_type`` is not 2.
        """
        value = self.rule.clip_norm if self.norm_type == 2 else None
        return None if value is None else float(f"{value:.2g}")

    def on_fit_start(self, state: State) -> None:
        """Begin anew, unless training resumes."""
        if not state.resumed:
            self.rule.reset()
            self._forget()
        self._key: Any = None
        self._batches, self._read, self._grouped = 0, False, False
        self._reading: Reading | None = None

    def on_epoch_start(self, state: State) -> None:  # noqa: ARG002
        """Layers may be frozen or given to the optimizer between epochs, also by a callback after this one."""
        self._batches, self._grouped = 0, False

    def on_gradients_ready(self, state: State) -> None:
        """Take the norms; they stay on the device."""
        if not self._grouped:
            self._grouped = True
            self._group(state)
        progress, reading = state.progress, self._reading
        if reading is None or (self.every > 1 and (progress.step + 1) % self.every):
            return
        self._read = True
        first = not reading.places
        place = Place(progress.step + 1, progress.epoch, self._batches, progress.epoch_batch)
        state.log.defer(reading.norms(place), self._receiver, reduce=reading.reduce)
        if first and self._layers:
            reading.begin_sample()
            rates = [group["lr"] for group in self._optimized]
            self._rates = [
                rate.detach().clone() if isinstance(rate, Tensor) else rate for rate in rates
            ]  # may change in place
            self._take_histograms(reading)

    def on_step_end(self, state: State) -> None:
        """See what the step did to the weights, where it is the sampled one."""
        self._batches = state.progress.epoch_batch
        if self._read and self._reading is not None:
            self._read = False
            self._reading.end_sample()
            if state.plan.clip_norm is not None and state.total_norm is not None:
                self._reading.add_total(state.total_norm)

    def state_dict(self) -> dict[str, Any]:
        """What was seen, and which layers are drawn."""
        return {
            "rule": self.rule.state_dict(),
            "shown": list(self._shown),
            "clipped": list(self._clipped),
            "windows": self._windows,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self.rule.load_state_dict(state_dict["rule"])
        self._shown, self._clipped = list(state_dict["shown"]), list(state_dict["clipped"])
        self._windows = state_dict["windows"]

    # -- layers --------------------------------------------------------------------------------------------------

    def _group(self, state: State) -> None:
        """Find the parameters that are trained, and their layers."""
        groups = {id(p): group for group in state.optimizer.param_groups for p in group["params"]}
        named = [(name, p) for name, p in unwrap(state.model).named_parameters() if p.numel()]
        key = [(name, id(p), p.dtype, p.device, p.requires_grad, id(p) in groups) for name, p in named]
        if key == self._key:
            return
        self._key = key
        # Only what the optimizer moves: nobody clears the gradients of the others.
        moved = [(name, p) for name, p in named if p.requires_grad and id(p) in groups]
        of = [self._layer_of(name) for name, _ in moved]
        self._layers = list(dict.fromkeys(layer for layer in of if layer is not None))
        number = {layer: i for i, layer in enumerate(self._layers)}
        self._members: list[list[int]] = [[] for _ in self._layers]
        for i, layer in enumerate(of):
            if layer is not None:
                self._members[number[layer]].append(i)
        self._names, self._moved = [name for name, _ in moved], [p for _, p in moved]
        self._siblings = _siblings(self._names, self._members)
        self._sizes = [sum(moved[i][1].numel() for i in members) for members in self._members]
        self._optimized = [groups[id(moved[members[0]][1])] for members in self._members]
        self._untrained = {}
        for name, p in named:
            layer = self._layer_of(name)
            if layer is not None and layer not in number:
                self._untrained[layer] = "the optimizer does not hold it" if p.requires_grad else _NO_GRAD
        self._values: dict[str, Tensor] = {}
        self._reading = None
        if moved:
            self._reading = Reading(
                [p for _, p in moved],
                [-1 if layer is None else number[layer] for layer in of],
                norm_type=self.norm_type,
                device=moved[0][1].device,
                skips=state.scaler is not None,
            )
            # its own object for each grouping: a window that is still open is closed by the one that filled it
            self._receiver = partial(self._receive, state, self._reading)

    def _layer_of(self, parameter: str) -> str | None:
        if not self.per_layer:
            return None
        if self.layers is not None:
            found = re.search(self.layers, parameter)
            return None if found is None else found.group(1 if found.re.groups else 0)
        module = parameter.rpartition(".")[0] or parameter
        return module if self.depth is None else ".".join(module.split(".")[: self.depth])

    def _take_histograms(self, reading: Reading) -> None:
        if self.histogram_every is None or self._windows % self.histogram_every:
            return
        shown = self._shown or (self._layers if len(self._layers) <= SERIES else [])
        for i, layer in enumerate(self._layers):
            if layer in shown and (values := reading.values(i)) is not None:
                self._values[layer] = values

    # -- on the host, at the end of a log window -----------------------------------------------------------------

    def _receive(self, state: State, reading: Reading, numbers: list[float]) -> Mapping[str, float | str | Histogram]:
        """What to log for a window."""
        figures = reading.close_window(numbers)
        self._windows += 1
        layers = self._layer_gradients(figures)
        steps = [place.step for place in figures.places]
        not_finite = self._not_finite(figures, reading)
        findings = self.rule.update(steps=steps, norms=figures.norms, layers=layers, not_finite=not_finite)
        for finding in findings:
            logger.log(logging.WARNING if finding.trouble else logging.INFO, "gradients: %s", finding.evidence)
        loud = [f.evidence for f in findings if f.trouble or f.status == "healthy"]
        notes = [f.evidence for f in findings if not (f.trouble or f.status == "healthy")]
        self._choose(layers)
        totals = self._totals(state, figures, reading)
        state.report["gradient norm"] = self._summary()
        state.report["layers not healthy"] = self.rule.trouble()
        if (untrained := self.rule.untrained()) != "none":
            state.report["layers not trained"] = untrained
        else:
            state.report.pop("layers not trained", None)
        texts = {"train/report/warnings": "\n\n".join(loud), "train/report/gradients": "\n\n".join(notes)}
        return {
            **totals,
            **({} if reading.skips and not any(map(math.isfinite, figures.norms)) else self._curves(layers)),
            **{name: text for name, text in texts.items() if text},
            **self._count_histograms(),
        }

    def _layer_gradients(self, figures: Figures) -> dict[str, LayerGradient]:
        layers = {layer: LayerGradient(untrained=why) for layer, why in self._untrained.items()}
        # An overflow at the sampled step makes the scaler leave it out: no weight moved.
        sampled = math.isfinite(figures.norms[0])
        for i, layer in enumerate(self._layers):
            has_gradient = not figures.silent.issuperset(self._members[i])
            if not has_gradient and not any(self._moved[j].requires_grad for j in self._members[i]):
                layers[layer] = LayerGradient(untrained=_NO_GRAD)  # since the epoch began
                continue
            rate = float(self._rates[i])
            layers[layer] = LayerGradient(
                mean=figures.mean[i],
                max=figures.max[i],
                has_gradient=has_gradient,
                zero_share=1 - figures.nonzero[i] / self._sizes[i],
                weight_norm=figures.weight[i] if sampled else math.nan,
                update_norm=figures.update[i] if sampled else math.nan,
                lr=rate,
                lr_rises=float(self._optimized[i]["lr"]) > rate,
                zero_steps=int(figures.zero_steps[i]),
                module_mean=max(figures.mean[j] for j in self._siblings[i]),
            )
        return layers

    def _not_finite(self, figures: Figures, reading: Reading) -> str:
        """A sentence that names the first gradient that was not finite, "" if there was none."""
        first, steps = min(figures.first_bad), len(figures.places)
        bad = [math.isfinite(norm) for norm in figures.norms].count(False)
        if first == steps or (reading.skips and bad < steps):
            return ""
        place = figures.places[first]
        where = f"step {place.step}"
        if place.end_batch:
            last = place.end_batch - 1
            batches = f"batch {last}" if last == place.first_batch else f"batches {place.first_batch} to {last}"
            where += f" (epoch {place.epoch}, {batches}, counted from 0)"
        names = [name for name, i in zip(self._names, figures.first_bad, strict=True) if i == first]
        # Backward runs from the last layer to the first, and a NaN goes along: the last one listed is where it began.
        what = f"the gradient of `{names[-1]}` is not finite"
        if len(names) == len(self._names) > 1:
            what = f"no gradient is finite, from `{names[-1]}` back to `{names[0]}`: look at the loss and this batch"
        elif len(names) > 1:
            others = ", ".join(f"`{name}`" for name in names[-2:-7:-1])
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            what += f", and with it {others}{more}"
        why = "The GradScaler left out every step of this window. " if reading.skips else ""
        return f"{why}At {where} {what}. It is the first such step; {bad} of the {steps} read in this window."

    def _totals(self, state: State, figures: Figures, reading: Reading) -> dict[str, float]:
        norms, totals = figures.norms, figures.totals
        values = {}
        if reading.skips:
            made = [math.isfinite(norm) for norm in norms]
            values["train/optim/skipped_share"] = made.count(False) / len(norms)
            totals = [total for total, ok in zip(totals, made, strict=True) if ok] if totals else totals
            norms = [norm for norm, ok in zip(norms, made, strict=True) if ok]
        if norms:
            values["train/optim/grad_norm"] = sum(norms) / len(norms)
            # max() may pass over a NaN
            values["train/optim/grad_norm_max"] = math.nan if any(map(math.isnan, norms)) else max(norms)
        if norms and totals and state.plan.clip_norm is not None:
            scales = [state.plan.clip_norm / (total + 1e-6) for total in totals]  # as torch's clip_grad_norm_
            after = [norm if scale >= 1 else norm * scale for norm, scale in zip(norms, scales, strict=True)]
            clipped = sum(scale < 1 for scale in scales)
            self._clipped = [self._clipped[0] + clipped, self._clipped[1] + len(norms)]
            values["train/optim/grad_norm_clipped"] = sum(after) / len(after)
            values["train/optim/clipped_share"] = clipped / len(norms)
        return values

    def _choose(self, layers: Mapping[str, LayerGradient]) -> None:
        """Which layers have a curve: once drawn, always drawn."""
        left = [layer for layer in self._layers if layer not in self._shown]
        if len(self._shown) + len(left) > SERIES:
            left.sort(key=lambda layer: (math.isfinite(layers[layer].mean), layers[layer].mean), reverse=True)
            largest = left[: max(0, _LARGEST - len(self._shown))]
            left = largest + [layer for layer in left if layer in self.rule.statuses and layer not in largest]
        self._shown += left[: SERIES - len(self._shown)]

    def _curves(self, layers: Mapping[str, LayerGradient]) -> dict[str, float]:
        values = {}
        for name in self._shown:
            layer = layers.get(name)
            if layer is None or layer.untrained:
                continue
            values[f"train/params/grad_norm/{name}"] = layer.mean
            values[f"train/params/grad_norm_max/{name}"] = layer.max
            if layer.weight_norm > 0 and math.isfinite(layer.update_norm):
                values[f"train/params/update_ratio/{name}"] = layer.update_norm / layer.weight_norm
            if math.isfinite(layer.zero_share):
                values[f"train/params/zero_share/{name}"] = layer.zero_share
        return values

    def _count_histograms(self) -> dict[str, Histogram]:
        counted = {layer: histogram.count(values) for layer, values in self._values.items()}
        self._values = {}
        return {f"train/params/gradient/{layer}": h for layer, h in counted.items() if h is not None}

    def _summary(self) -> str:
        text = self.rule.summary()
        clipped, steps = self._clipped
        if steps:
            text += f"; {clipped / steps:.0%} of the steps were clipped"
        if self.suggested_clip_norm is not None:
            share = self.rule.norms.share_above(self.suggested_clip_norm)
            text += f"; suggested clip_norm: {self.suggested_clip_norm:g}, which {share:.1%} of the norms exceed"
        return text
