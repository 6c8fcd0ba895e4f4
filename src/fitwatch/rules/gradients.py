"""Gradient norms: which layers do not learn, and when training explodes."""

import math
import statistics
from collections.abc import Mapping, Sequence

from attrs import define, field, frozen

from fitwatch.helpers.aliases import StateDict
from fitwatch.helpers.options import Option, integer, number
from fitwatch.rules.layer_status import MIN_NORMS, LayerGradient, LayerHistory, typical_norms
from fitwatch.rules.norms import ClipAdvice, LogHistogram
from fitwatch.rules.stateful import Stateful

__all__ = ["GradientFinding", "GradientRule", "LayerGradient"]

_SPIKE = 10.0  # times the median
_LISTED = 5  # names in a sentence


def _share(instance: object, option: Option, value: float) -> None:
    number(above=0)(instance, option, value)
    if value >= 1:
        raise ValueError(f"{option.name} must be below 1, got {value!r}")


@frozen(kw_only=True)
class GradientFinding:
    """A change of status, in words.

    Attributes:
        status: ``"not finite"``, ``"exploding"``, ``"vanishing"``, ``"dead"``, ``"no gradient"``, ``"frozen"``,
            ``"untrained"``, ``"healthy"`` (a problem is over), or ``"trained"`` (no longer untrained).
        layers: Names of the layers concerned; empty for the model as a whole.
        evidence: A sentence with the figures.
        trouble: Whether to warn: False for the last three.
    """

    status: str
    layers: tuple[str, ...] = ()
    evidence: str
    trouble: bool = True


@define(kw_only=True)
class GradientRule(Stateful):
    """Gives each layer a status after each log window, and reports changes.

    - ``"no gradient"``: no parameter of the layer had a gradient in the window.
    - ``"dead"``: its gradient was exactly zero in every step.
    - ``"vanishing"``: its norm, and its norm relative to its weights, are below ``vanishing`` times those of other
      layers; for 100 steps while the learning rate rises.
    - ``"frozen"``: its weights did not change in two consecutive sampled steps.
    - ``"untrained"``: it is excluded from training, or its learning rate is 0 in two consecutive sampled steps: not a
      problem.
    - ``"exploding"``: two consecutive sampled steps changed a layer by more than the largest norm its weights had. For
      the model as a whole: the median norm of the window is ``exploding`` times that of all steps before, and the
      largest so far.
    - ``"not finite"``: for the model as a whole, a NaN or an infinity in a gradient.

    "Other layers" is the second largest, so that one loud layer does not make all others look silent; of two layers
    it is the larger.

    A layer used only now and then (an expert, a rare category) comes and goes, and is healthy. So a status that lasted
    for some steps and went away is given again only after ten times as many. Steps with a zero gradient among others
    count as such a silence. A sampled step with a zero gradient is ignored for ``"frozen"`` and ``"exploding"``.

    Args:
        vanishing: Share of the norm of other layers; between 0 and 1.
        exploding: Multiple of the median norm so far; above 1.
        readings: Consecutive steps that must show ``"no gradient"``, ``"dead"`` or ``"vanishing"``; 1 or more. A single
            batch can switch off a small layer.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If an option is of the wrong type.
    """

    vanishing: float = field(default=1e-5, validator=_share)
    exploding: float = field(default=100.0, validator=number(above=1))
    readings: int = field(default=3, validator=integer(1))

    norms: LogHistogram = field(factory=LogHistogram, init=False)  # all total norms so far
    statuses: dict[str, str] = field(factory=dict, init=False)  # of the layers that are not healthy
    _spikes: int = field(default=0, init=False)
    _largest: float = field(default=0.0, init=False)  # total norm
    _largest_step: int = field(default=0, init=False)
    _clip: ClipAdvice = field(factory=ClipAdvice, init=False)
    _history: dict[str, LayerHistory] = field(factory=dict, init=False)
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
        """Add a log window.

        Args:
            steps: The steps read, at least one.
            norms: The total norm of each.
            layers: Figures of the layers by name. A layer that is missing keeps its status.
            not_finite: A sentence saying which gradient was not finite and when; "" if all were finite.

        Returns:
            The changes; usually none.
        """
        findings = self._check_model(steps, norms, not_finite)
        typical = typical_norms(layers.values())
        changed: dict[tuple[str, str], list[str]] = {}
        for name, layer in layers.items():
            before = self.statuses.get(name, "healthy")
            history = self._history.setdefault(name, LayerHistory())
            now = history.judge(layer, before, typical, vanishing=self.vanishing, read=len(steps), least=self.readings)
            if now == before:
                continue
            self.statuses[name] = now
            if now == "healthy":
                del self.statuses[name]
            detail = before if now == "healthy" else layer.untrained or "its learning rate is 0"
            changed.setdefault((now, detail if now in ("healthy", "untrained") else ""), []).append(name)
        window = f"(steps {steps[0]} to {steps[-1]})"
        return findings + [_finding(*key, names, layers, window) for key, names in changed.items()]

    @property
    def clip_norm(self) -> float | None:
        """A norm that only spikes exceed: the 0.95 quantile of norms over the running median, times its largest value.

        None before 20 norms. Steps during an explosion are left out.
        """
        return self._clip.value

    def summary(self) -> str:
        """Return the statistics of the total norms so far, as a sentence."""
        median = self.norms.quantile(0.5)
        if median is None:
            return "no finite norm was seen"
        spikes = f", {_times(self._spikes, 'step')} above {_SPIKE:g} times the median" if self._spikes else ""
        high = self.norms.quantile(0.95)
        return (
            f"median {median:.3g}, 95th percentile {high:.3g}, largest {self._largest:.3g} at step "
            f"{self._largest_step}{spikes}"
        )

    def trouble(self) -> str:
        """Return the layers in trouble now, by status; "none" if there are none. See `untrained` for the others."""
        by_status: dict[str, list[str]] = {}
        for name, status in self.statuses.items():
            if status != "untrained":
                by_status.setdefault(status, []).append(name)
        return "; ".join(f"{status}: {_listed(names)}" for status, names in by_status.items()) or "none"

    def untrained(self) -> str:
        """Return the layers excluded from training now; "none" if all are trained."""
        return _listed([name for name, status in self.statuses.items() if status == "untrained"]) or "none"

    def load_state_dict(self, state: StateDict) -> None:
        """Continue from a `state_dict`; see `Stateful.load_state_dict`."""
        super().load_state_dict(state)
        self._history = {name: LayerHistory() for name in state["history"]}
        for name, history in self._history.items():
            history.load_state_dict(state["history"][name])

    def _check_model(self, steps: Sequence[int], norms: Sequence[float], not_finite: str) -> list[GradientFinding]:
        """Update the statistics of the model as a whole, and return what changed."""
        findings = []
        if bool(not_finite) == self._finite:
            self._finite = not not_finite
            findings.append(
                GradientFinding(
                    status="not finite" if not_finite else "healthy",
                    evidence=not_finite or f"All gradients have been finite again since step {steps[0]} at the latest.",
                    trouble=bool(not_finite),
                )
            )
        finite = [norm for norm in norms if math.isfinite(norm)]
        if not finite:
            return findings
        before = self.norms.quantile(0.5) if self.norms.total >= MIN_NORMS else None
        findings += self._check_explosion(before, finite, steps[-1])
        median = statistics.median(finite)
        self._peak = max(self._peak, median)
        typical = median if before is None else before
        if typical:
            self._spikes += sum(norm > _SPIKE * typical for norm in finite)
        if max(finite) > self._largest:
            self._largest = max(finite)
            self._largest_step = steps[list(norms).index(self._largest)]
        self.norms.add(finite)
        if self._calm is None:
            self._clip.add(finite)
        return findings

    def _check_explosion(self, before: float | None, norms: list[float], step: int) -> list[GradientFinding]:
        """Compare the median of the window with that of all windows before, or its second half with its first."""
        calm, half = before if self._calm is None else self._calm, len(norms) // 2
        if calm is None and half >= MIN_NORMS / 2:
            calm, norms = statistics.median(norms[:half]), norms[half:]
        if not calm:
            return []
        now = statistics.median(norms)
        if self._calm is None and now > self.exploding * calm and now > self._peak:
            self._calm = calm
            evidence = (
                f"Exploding gradients: the median norm of the last {_times(len(norms), 'step')} up to step {step} is "
                f"{now:.3g}, {now / calm:.3g} times the previous {calm:.3g}. Try a lower learning rate or clipping."
            )
            return [GradientFinding(status="exploding", evidence=evidence)]
        if self._calm is not None and now < self.exploding / 10 * calm:
            self._calm = None
            evidence = f"Gradients no longer explode: their median norm up to step {step} is {now:.3g}."
            return [GradientFinding(status="healthy", evidence=evidence, trouble=False)]
        return []


def _finding(
    status: str, detail: str, names: list[str], layers: Mapping[str, LayerGradient], window: str
) -> GradientFinding:
    """Write the sentence about ``names``, with the figures of the first of them."""
    listed, first = _listed(names), layers[names[0]]
    ratio = first.update_norm / first.weight_norm if first.weight_norm else math.nan
    if status == "no gradient":
        evidence = f"No gradient in {listed} {window}: unused in the forward pass, or detached."
    elif status == "dead" and not any(layer.max > 0 for layer in layers.values()):
        evidence = f"Every gradient was exactly zero {window}: the loss is flat here, or all units are inactive."
    elif status == "dead":
        evidence = f"Dead: the gradient of {listed} was exactly zero {window}. All of its ReLUs may be inactive."
    elif status == "vanishing":
        norm, _ = typical_norms(layers.values())
        update = f"; a sampled step changed its weights by {ratio:.2g} of their norm" if math.isfinite(ratio) else ""
        evidence = (
            f"Vanishing gradient in {listed}: the norm of `{names[0]}` is {first.mean:.3g} {window}, "
            f"{first.mean / norm:.2g} times the {norm:.3g} of other layers{update}."
        )
    elif status == "exploding":
        evidence = (
            f"Exploding: a step changed {listed} by more than the norm of the weights (`{names[0]}`: {ratio:.3g} times "
            f"that norm, with a gradient norm of {first.mean:.3g}) {window}. Try a lower learning rate or a clip_norm."
        )
    elif status == "untrained":
        evidence = f"Not trained: {listed} ({detail})."
    elif status == "frozen":
        evidence = (
            f"Frozen: {listed} did not change in two sampled steps {window}, with a gradient norm of {first.mean:.3g} "
            f"in `{names[0]}` and a learning rate of {first.lr:.3g}. The updates may be lost to rounding."
        )
    else:
        over = {"no gradient": "No longer without a gradient", "untrained": "Now trained"}
        evidence = (
            f"{over.get(detail, f'No longer {detail}')}: {listed}. "
            f"The norm of `{names[0]}` is {first.mean:.3g} {window}."
        )
        status = "trained" if detail == "untrained" else "healthy"
    trouble = status not in ("untrained", "trained", "healthy")
    return GradientFinding(status=status, layers=tuple(names), evidence=evidence, trouble=trouble)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"


def _times(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"
