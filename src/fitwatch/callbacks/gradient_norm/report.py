"""Output of the gradient inspector: curves, histograms, warnings, and lines of the end report."""

import logging
import math
from functools import partial
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from fitwatch.callbacks.gradient_norm.reading import Figures
from fitwatch.records import Histogram
from fitwatch.rules.gradients import GradientFinding, GradientRule, LayerGradient
from fitwatch.state import State

logger = logging.getLogger("fitwatch")

SERIES = 20  # most layers in a chart
_BUCKETS = 64
_LARGEST = 15  # with more layers, this many have the largest norms; the other places are for layers in trouble


@define
class Report:
    """Turns measurements of log windows into logged values.

    Attributes:
        shown: Layers with a curve.
        clipped: Steps that were clipped.
        steps: Steps that could have been clipped.
        windows: Log windows so far.
    """

    shown: list[str] = field(factory=list)
    clipped: int = 0
    steps: int = 0
    windows: int = 0

    def add_window(self, state: State, rule: GradientRule, figures: Figures) -> dict[str, float | str | Histogram]:
        """Update ``rule`` and ``state.report`` with a log window and return the values to log."""
        self.windows += 1
        findings = rule.update(
            steps=[place.step for place in figures.places],
            norms=figures.norms,
            layers=figures.layers,
            not_finite=_not_finite(figures),
        )
        self._choose(figures.layers, rule)
        skipped = figures.skips and not any(map(math.isfinite, figures.norms))
        values: dict[str, float | str | Histogram] = {
            **self._totals(figures, state.plan.clip_norm),
            **({} if skipped else self._curves(figures.layers)),
            **_texts(findings),
            **_histograms(figures.samples),
        }
        if "gradient norm" not in state.report:  # in words only when the report is written
            state.report["gradient norm"] = partial(self._summary, rule)
            state.report["layers not healthy"] = rule.trouble
            state.report["layers not trained"] = lambda: rule.untrained().removeprefix("none")
        return values

    def histograms_due(self, layers: list[str], every: int | None) -> list[str]:
        """Return the layers whose histograms are due in the current log window, one in ``every``."""
        if every is None or self.windows % every:
            return []
        return self.shown or (layers if len(layers) <= SERIES else [])

    def _totals(self, figures: Figures, clip_norm: float | None) -> dict[str, float]:
        norms, totals = figures.norms, figures.totals
        values = {}
        if figures.skips:
            taken = [math.isfinite(norm) for norm in norms]
            values["train/optim/skipped_share"] = taken.count(False) / len(norms)
            totals = [total for total, ok in zip(totals, taken, strict=True) if ok] if totals else totals
            norms = [norm for norm, ok in zip(norms, taken, strict=True) if ok]
        if norms:
            values["train/optim/grad_norm"] = sum(norms) / len(norms)
            # max() may pass over a NaN
            values["train/optim/grad_norm_max"] = math.nan if any(map(math.isnan, norms)) else max(norms)
        if norms and totals and clip_norm is not None:
            scales = [clip_norm / (total + 1e-6) for total in totals]  # as torch's clip_grad_norm_
            after = [norm if scale >= 1 else norm * scale for norm, scale in zip(norms, scales, strict=True)]
            clipped = sum(scale < 1 for scale in scales)
            self.clipped, self.steps = self.clipped + clipped, self.steps + len(norms)
            values["train/optim/grad_norm_clipped"] = sum(after) / len(after)
            values["train/optim/clipped_share"] = clipped / len(norms)
        return values

    def _choose(self, layers: dict[str, LayerGradient], rule: GradientRule) -> None:
        """Choose the layers to draw; layers drawn once stay."""
        others = [name for name, layer in layers.items() if not layer.untrained and name not in self.shown]
        if len(self.shown) + len(others) > SERIES:
            others.sort(key=lambda name: (math.isfinite(layers[name].mean), layers[name].mean), reverse=True)
            largest = others[: max(0, _LARGEST - len(self.shown))]
            others = largest + [name for name in others if name in rule.statuses and name not in largest]
        self.shown += others[: SERIES - len(self.shown)]

    def _curves(self, layers: dict[str, LayerGradient]) -> dict[str, float]:
        values = {}
        for name in self.shown:
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

    def _summary(self, rule: GradientRule) -> str:
        text = rule.summary()
        if self.steps:
            text += f"; {self.clipped / self.steps:.0%} of the steps were clipped"
        if (limit := suggested_clip_norm(rule)) is not None:
            share = rule.norms.share_above(limit)
            text += f"; suggested clip_norm: {limit:g}, which {share:.1%} of the norms exceed"
        return text

    def state_dict(self) -> dict[str, Any]:
        """Return the layers drawn and the counts."""
        return {"shown": list(self.shown), "clipped": [self.clipped, self.steps], "windows": self.windows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.shown, self.windows = list(state_dict["shown"]), state_dict["windows"]
        self.clipped, self.steps = state_dict["clipped"]


def suggested_clip_norm(rule: GradientRule) -> float | None:
    """Return the rule's clip norm in two digits."""
    return None if rule.clip_norm is None else float(f"{rule.clip_norm:.2g}")


def _texts(findings: list[GradientFinding]) -> dict[str, str]:
    """Pass the findings to the logger and return them as warnings and notes."""
    texts: dict[str, list[str]] = {}
    for finding in findings:
        logger.log(logging.WARNING if finding.trouble else logging.INFO, "gradients: %s", finding.evidence)
        kind = "warnings" if finding.trouble or finding.status == "healthy" else "gradients"
        texts.setdefault(f"train/report/{kind}", []).append(finding.evidence)
    return {name: "\n\n".join(evidence) for name, evidence in texts.items()}


def _histograms(samples: dict[str, Tensor]) -> dict[str, Histogram]:
    finite = {layer: values[values.isfinite()].cpu().double() for layer, values in samples.items()}
    return {f"train/params/gradient/{layer}": _histogram(values) for layer, values in finite.items() if values.numel()}


def _histogram(values: Tensor) -> Histogram:
    """Count ``values`` in buckets of equal width."""
    low, high = values.min().item(), values.max().item()
    if low == high:  # one bucket needs a width
        low, high = low - abs(low) / 2 - 1e-30, high + abs(high) / 2 + 1e-30
    edges = torch.linspace(low, high, _BUCKETS + 1, dtype=torch.float64)
    index = torch.bucketize(values, edges[1:-1], right=True)
    counts = torch.bincount(index, minlength=_BUCKETS)
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()), values.sum().item(), values.square().sum().item())


def _not_finite(figures: Figures) -> str:
    """Name the first non-finite gradient in a sentence; "" if all are finite, or a scaler skipped some steps only."""
    first, steps = min(figures.first_bad), len(figures.places)
    bad = [math.isfinite(norm) for norm in figures.norms].count(False)
    if first == steps or (figures.skips and bad < steps):
        return ""
    place = figures.places[first]
    where = f"step {place.step}"
    if place.end_batch:
        last = place.end_batch - 1
        batches = f"batch index {last}" if last == place.first_batch else f"batch indices {place.first_batch} to {last}"
        where += f" (epoch {place.epoch + 1}, {batches})"
    names = [name for name, step in zip(figures.parameters, figures.first_bad, strict=True) if step == first]
    # The backward pass carries a NaN from the last layer to the first, so it started in the last one listed.
    what = f"the gradient of `{names[-1]}` is not finite"
    if len(names) == len(figures.parameters) > 1:
        what = f"no gradient is finite, from `{names[-1]}` back to `{names[0]}`: check the loss and this batch"
    elif len(names) > 1:
        others = ", ".join(f"`{name}`" for name in names[-2:-7:-1])
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        what += f", nor are those of {others}{more}"
    why = "The GradScaler skipped every step of this log window. " if figures.skips else ""
    return f"{why}At {where} {what}. It is the first non-finite step; this log window contains {bad} in {steps}."
