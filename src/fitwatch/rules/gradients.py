"""What the norms of the gradients say: which layers learn nothing, and where a training goes off."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import define, evolve, field, frozen

from fitwatch.options import integer, number
from fitwatch.rules.clipping import ClipAdvice
from fitwatch.rules.layer_memory import LayerMemory
from fitwatch.rules.quantiles import LogHistogram

_ENOUGH = 10  # norms that make a median to compare with
_SPIKE = 10.0  # times the median
_LISTED = 5  # names in a sentence
_WARM_UP = 100  # steps of "vanishing" while the learning rate rises: layers that begin near zero need it to grow
_ROUNDING = 1e-6  # in float32, of the rest of the module: a bias before a BatchNorm has a gradient of 0 but for this
_OVER = {"no gradient": "without a gradient", "untrained": "frozen"}  # "no longer ..."


def _share(instance: Any, option: Any, value: Any) -> None:
    number(above=0)(instance, option, value)
    if value >= 1:
        raise ValueError(f"{option.name} must be below 1, got {value!r}")


@frozen(kw_only=True)
class LayerGradient:
    """A layer in one log window.

    From `zero_share` to `lr` they are of one step of the window, and NaN where it was not sampled.

    Attributes:
        mean: Of the norm of the layer's gradient, over the steps read.
        max: The largest of these norms.
        has_gradient: False if none of its parameters had a gradient in any of these steps.
        untrained: Why the layer is left out of training, as the end of "it is not trained: ..."; "" if it is trained.
        zero_share: Share of exact zeros among the elements of the gradient, 0 to 1.
        weight_norm: 2-norm of the weights before the step.
        update_norm: 2-norm of what the step added to them.
        lr: Learning rate.
        lr_rises: Whether the learning rate is higher after the window.
        zero_steps: Steps read in which the norm was exactly 0, or there was no gradient.
        module_mean: The largest mean among the layers that have parameters of the same modules.
    """

    mean: float = math.nan
    max: float = math.nan
    has_gradient: bool = True
    untrained: str = ""
    zero_share: float = math.nan
    weight_norm: float = math.nan
    update_norm: float = math.nan
    lr: float = math.nan
    lr_rises: bool = False
    zero_steps: int = 0
    module_mean: float = 0.0


@frozen(kw_only=True)
class GradientFinding:
    """A change of status, in words.

    Attributes:
        status: ``"not finite"``, ``"exploding"``, ``"vanishing"``, ``"dead"``, ``"no gradient"``, ``"frozen"``,
            ``"untrained"``, ``"healthy"`` (what was wrong is over), or ``"trained"`` (no longer untrained).
        layers: Those that it is about; empty if it is about the model as a whole.
        evidence: A sentence with the figures.
        trouble: Whether to warn: False for the last three.
    """

    status: str
    layers: tuple[str, ...] = ()
    evidence: str
    trouble: bool = True


@define(kw_only=True)
class GradientRule:
    """Gives each layer a status, window by window, and says when it changes.

    - ``"no gradient"``: no parameter of the layer got a gradient in the window.
    - ``"dead"``: it got one that was exactly zero in every step.
    - ``"vanishing"``: its norm, and its norm relative to its weights, are below ``vanishing`` times those of other
      layers. While the learning rate rises, for 100 steps.
    - ``"frozen"``: its weights did not move in two sampled steps in a row.
    - ``"untrained"``: it is left out of training, or its learning rate is 0 in two sampled steps in a row: no fault.
    - ``"exploding"``: two sampled steps in a row moved a layer by more than the largest norm its weights had. For the
      model as a whole: the median norm of the window is ``exploding`` times that of all steps before, and the largest
      so far.
    - ``"not finite"``: for the model as a whole, a NaN or an infinity in a gradient.

    "Other layers" is the second largest, so that one loud layer does not make all others look silent; of two layers
    it is the larger.

    A layer that is used only now and then (an expert, a rare category) comes and goes, and is healthy. So a status that
    is over, having lasted for some steps, is given again only after ten times as many. Zero gradients between others
    count as such a silence. A step in which the gradient was zero says nothing of ``"frozen"`` and ``"exploding"``.

    Args:
        vanishing: Share of the norm of other layers; between 0 and 1.
        exploding: Multiple of the median norm so far; above 1.
        readings: Steps in a row that must show ``"no gradient"``, ``"dead"`` or ``"vanishing"``; 1 or more. A single
            batch can switch off a small layer.

    Raises:
        ValueError: An option is out of its range.
        TypeError: An option has the wrong type.
    """

    vanishing: float = field(default=1e-5, validator=_share)
    exploding: float = field(default=100.0, validator=number(above=1))
    readings: int = field(default=3, validator=integer(1))

    norms: LogHistogram = field(factory=LogHistogram, init=False)  # all total norms so far
    statuses: dict[str, str] = field(factory=dict, init=False)  # of the layers that are not healthy
    spikes: int = field(default=0, init=False)
    largest: tuple[float, int] = field(default=(0.0, 0), init=False)  # total norm, and its step
    _clip: ClipAdvice = field(factory=ClipAdvice, init=False)
    _memory: dict[str, LayerMemory] = field(factory=dict, init=False)
    _peak: float = field(default=0.0, init=False)  # largest median of a window
    _calm: float | None = field(default=None, init=False)  # while the model explodes: the median before
    _finite: bool = field(default=True, init=False)

    def update(
        self,
        *,
        steps: Sequence[int],
        norms: Sequence[float],
        layers: Mapping[str, LayerGradient],
        not_finite: str = "",
    ) -> list[GradientFinding]:
        """Take in one more log window.

        Args:
            steps: The steps that were read, one or more.
            norms: The total norm of each.
            layers: By name. One that is not there keeps its status.
            not_finite: Which gradient was not finite and when, as a sentence; "" if all were finite.

        Returns:
            What changed; mostly nothing.
        """
        findings = self._whole(steps, norms, not_finite)
        window = f"(steps {steps[0]} to {steps[-1]})"
        changed: dict[tuple[str, str], list[str]] = {}
        reference = _reference(layers)
        for name, layer in layers.items():
            before = self.statuses.get(name, "healthy")
            now = self._judge(name, layer, reference, len(steps))
            if now == before:
                continue
            self.statuses[name] = now
            if now == "healthy":
                del self.statuses[name]
            changed.setdefault((now, _detail(layer, now, before)), []).append(name)
        findings += [self._finding(*key, names, layers, window) for key, names in changed.items()]
        return findings

    @property
    def clip_norm(self) -> float | None:
        """A norm that only spikes exceed: the 0.95 quantile of norms over the running median, times its largest value.

        None before 20 norms. Steps in which the model explodes are left out.
        """
        return self._clip.value

    def summary(self) -> str:
        """The total norms so far, in a sentence."""
        median = self.norms.quantile(0.5)
        if median is None:
            return "no finite norm was seen"
        spikes = f", {_times(self.spikes, 'step')} above {_SPIKE:g} times the median" if self.spikes else ""
        high = self.norms.quantile(0.95)
        largest, step = self.largest
        return f"median {median:.3g}, 95 % up to {high:.3g}, largest {largest:.3g} at step {step}{spikes}"

    def trouble(self) -> str:
        """The layers that are not healthy now, by status; "none" if all are. `untrained` names those left out."""
        by_status: dict[str, list[str]] = {}
        for name, status in self.statuses.items():
            if status != "untrained":
                by_status.setdefault(status, []).append(name)
        return "; ".join(f"{status}: {_listed(names)}" for status, names in by_status.items()) or "none"

    def untrained(self) -> str:
        """The layers that are left out of training now; "none" if all are trained."""
        return _listed([name for name, status in self.statuses.items() if status == "untrained"]) or "none"

    # -- the model as a whole ------------------------------------------------------------------------------------

    def _whole(self, steps: Sequence[int], norms: Sequence[float], not_finite: str) -> list[GradientFinding]:
        findings = []
        if bool(not_finite) == self._finite:
            self._finite = not not_finite
            over = f"All gradients are finite again, since step {steps[0]} at the latest."
            findings.append(
                GradientFinding(
                    status="not finite" if not_finite else "healthy",
                    evidence=not_finite or over,
                    trouble=bool(not_finite),
                )
            )
        finite = [norm for norm in norms if math.isfinite(norm)]
        if not finite:
            return findings
        before = self.norms.quantile(0.5) if self.norms.total >= _ENOUGH else None
        findings += self._explosion(before, finite, steps[-1])
        median = statistics.median(finite)
        self._peak = max(self._peak, median)
        typical = median if before is None else before
        if typical:
            self.spikes += sum(norm > _SPIKE * typical for norm in finite)
        largest = max(finite)
        if largest > self.largest[0]:
            self.largest = largest, steps[list(norms).index(largest)]
        self.norms.add(finite)
        if self._calm is None:
            self._clip.add(finite)
        return findings

    def _explosion(self, before: float | None, norms: list[float], step: int) -> list[GradientFinding]:
        """Compare the median of the window with that of all windows before, or its second half with its first."""
        calm, half = before if self._calm is None else self._calm, len(norms) // 2
        if calm is None and half >= _ENOUGH / 2:
            calm, norms = statistics.median(norms[:half]), norms[half:]
        if not calm:
            return []
        now = statistics.median(norms)
        if self._calm is None and now > self.exploding * calm and now > self._peak:
            self._calm = calm
            evidence = (
                f"Exploding gradients: the median norm of the last {_times(len(norms), 'step')} up to {step} is "
                f"{now:.3g}, {now / calm:.3g} times the {calm:.3g} of those before. "
                f"A lower learning rate or clipping may help."
            )
            return [GradientFinding(status="exploding", evidence=evidence)]
        if self._calm is not None and now < self.exploding / 10 * calm:
            self._calm = None
            evidence = f"The gradients no longer explode: their median norm up to step {step} is {now:.3g}."
            return [GradientFinding(status="healthy", evidence=evidence, trouble=False)]
        return []

    # -- layer by layer ------------------------------------------------------------------------------------------

    def _look(self, layer: LayerGradient, reference: tuple[float, float], before: str, heaviest: float) -> str | None:
        """What this window alone says of a layer; None if nothing."""
        if layer.untrained:
            return "untrained"
        if not layer.has_gradient:
            return "no gradient"
        if not math.isfinite(layer.max):
            return None
        if layer.max == 0 and not layer.zero_share < 1:  # a norm of 0 may also be one that is too small to square
            return "dead"
        return self._look_at_sizes(layer, reference, before, heaviest)

    def _look_at_sizes(self, layer: LayerGradient, reference: tuple[float, float], before: str, heaviest: float) -> str:
        norm, relative = reference
        share = self.vanishing * (10 if before == "vanishing" else 1)  # so that it does not come and go
        small = layer.mean < share * norm and not layer.mean >= share * relative * layer.weight_norm
        if small and layer.mean >= _ROUNDING * layer.module_mean:  # else it is 0 but for rounding
            return "vanishing"
        if math.isnan(layer.update_norm) or layer.zero_share == 1:
            return before if before in ("frozen", "untrained", "exploding") else "healthy"
        if layer.update_norm == 0:
            return "untrained" if layer.lr == 0 else "frozen"
        return "exploding" if 0 < heaviest < layer.update_norm else "healthy"

    def _judge(self, name: str, layer: LayerGradient, reference: tuple[float, float], readings: int) -> str:
        """The status of a layer, which is what was seen once it was seen for long enough."""
        before, memory = self.statuses.get(name, "healthy"), self._memory.setdefault(name, LayerMemory())
        memory.heaviest = max(memory.heaviest, layer.weight_norm)  # stays where it is NaN
        seen = self._look(layer, reference, before, memory.heaviest)
        if seen is None:
            return before
        lasted = memory.steps if memory.seen == before else 0
        memory.see(seen, readings)
        now = seen if seen == "healthy" or self._long_enough(layer, memory) else before
        if now != before != "healthy":
            memory.outlived(before, max(lasted, self.readings))
        if seen == "healthy":
            for silence in ("dead", "no gradient"):
                memory.at_least(silence, layer.zero_steps)
        return now

    def _long_enough(self, layer: LayerGradient, memory: LayerMemory) -> bool:
        windows, steps = 0, self.readings
        if layer.untrained:
            steps = 0
        elif memory.seen in ("frozen", "untrained"):
            windows, steps = 2, 0
        elif memory.seen == "exploding":
            windows, steps = 2, _ENOUGH  # weights that begin at zero are outgrown by their first few updates
        elif memory.seen == "vanishing" and (layer.lr_rises or layer.lr == 0):
            steps = _WARM_UP
        return memory.confirms(windows=windows, steps=steps)

    def _finding(
        self, status: str, detail: str, names: list[str], layers: Mapping[str, LayerGradient], window: str
    ) -> GradientFinding:
        """The sentence about ``names``, with the figures of the first of them."""
        listed, first, trouble = _listed(names), layers[names[0]], status != "healthy"
        alive = [layer for layer in layers.values() if layer.max > 0]
        ratio = first.update_norm / first.weight_norm if first.weight_norm else math.nan
        if status == "no gradient":
            evidence = f"No gradient at all in {listed} {window}: not used in the forward pass, or detached."
        elif status == "dead" and not alive:
            evidence = f"Every gradient was exactly zero {window}: the loss is flat here, or all units are off."
        elif status == "dead":
            evidence = f"Dead: the gradient of {listed} was exactly zero {window}. Its units may all be off (ReLU)."
        elif status == "vanishing":
            norm, _ = _reference(layers)
            evidence = (
                f"Vanishing gradient in {listed}: the norm of `{names[0]}` is {first.mean:.3g} {window}, "
                f"{first.mean / norm:.2g} times the {norm:.3g} of other layers{_update(ratio)}."
            )
        elif status == "exploding":
            evidence = (
                f"Exploding: a step moved {listed} by more than its own weights (`{names[0]}`: {ratio:.3g} times them, "
                f"with a gradient of norm {first.mean:.3g}) {window}. A lower learning rate or a clip_norm may help."
            )
        elif status == "untrained":
            evidence, trouble = f"Frozen: {listed} is not trained: {detail}.", False
        elif status == "frozen":
            evidence = (
                f"Frozen: {listed} did not move in two sampled steps {window}, with a norm of `{names[0]}` of "
                f"{first.mean:.3g} and learning rate {first.lr:.3g}. Is the update below the rounding of the weights?"
            )
        else:
            status = "trained" if detail == "untrained" else status
            over = f"No longer {_OVER.get(detail, detail)}: {listed}."
            evidence = f"{over} The norm of `{names[0]}` is {first.mean:.3g} {window}."
        return GradientFinding(status=status, layers=tuple(names), evidence=evidence, trouble=trouble)

    # -- for checkpoints -----------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything seen; the options stay."""
        self.load_state_dict(evolve(self).state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Everything seen so far, in plain values; the options are not part of it."""
        return {
            "norms": self.norms.state_dict(),
            "statuses": dict(self.statuses),
            "spikes": self.spikes,
            "largest": list(self.largest),
            "clip": self._clip.state_dict(),
            "memory": {name: memory.state_dict() for name, memory in self._memory.items()},
            "peak": self._peak,
            "calm": self._calm,
            "finite": self._finite,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict` as if never interrupted, given the same options."""
        self.norms.load_state_dict(state["norms"])
        self.statuses, self.spikes = dict(state["statuses"]), state["spikes"]
        self.largest = (state["largest"][0], state["largest"][1])
        self._clip.load_state_dict(state["clip"])
        self._memory = {
            name: LayerMemory(**{**memory, "patience": dict(memory["patience"])})
            for name, memory in state["memory"].items()
        }
        self._peak, self._calm, self._finite = state["peak"], state["calm"], state["finite"]


def _reference(layers: Mapping[str, LayerGradient]) -> tuple[float, float]:
    """The norm of "other layers", and that relative to their weights; 0 where there is none."""
    trained = [layer for layer in layers.values() if layer.max > 0 and math.isfinite(layer.max)]
    norms = sorted((layer.mean for layer in trained), reverse=True)
    relative = sorted((layer.mean / layer.weight_norm for layer in trained if layer.weight_norm > 0), reverse=True)
    first, second = ([*values, 0.0][min(len(values) // 3, 1)] for values in (norms, relative))
    return first, second


def _detail(layer: LayerGradient, status: str, before: str) -> str:
    if status == "healthy":
        return before
    return layer.untrained or "its learning rate is 0" if status == "untrained" else ""


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"


def _update(ratio: float) -> str:
    return f"; a sampled step changed its weights by {ratio:.2g} of their norm" if math.isfinite(ratio) else ""


def _times(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"
