"""Status of a single layer: what one log window shows, and how long it must last."""

import math
from collections.abc import Iterable

from attrs import define, field, frozen

from fitwatch.rules.stateful import Stateful

MIN_NORMS = 10  # needed for a median to compare with
_WARM_UP = 100  # steps of "vanishing" while the learning rate rises: layers that start near zero need time to grow
_ROUNDING = 1e-6  # float32 rounding, relative to the module: a bias before a BatchNorm has a gradient of 0 but for this
_BACKOFF = 10  # a status that has come and gone must last this many times as long


@frozen(kw_only=True)
class LayerGradient:
    """Figures of a layer in one log window.

    `zero_share`, `weight_norm`, `update_norm` and `lr` are of one sampled step of the window, NaN if there is none.

    Attributes:
        mean: Mean norm of the layer's gradient over the steps read.
        max: Largest of these norms.
        has_gradient: False if none of its parameters had a gradient in any of these steps.
        untrained: Why the layer is excluded from training, such as "requires_grad is False"; "" if it is trained.
        zero_share: Share of exact zeros among the elements of the gradient, 0 to 1.
        weight_norm: 2-norm of the weights before the step.
        update_norm: 2-norm of the change that the step made to them.
        lr: Learning rate.
        lr_rises: Whether the learning rate is higher after the window.
        zero_steps: Steps read with a norm of exactly 0, or without a gradient.
        module_mean: Largest mean among the layers with parameters of the same modules.
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


def typical_norms(layers: Iterable[LayerGradient]) -> tuple[float, float]:
    """Return the norm of "other layers", and that norm relative to their weights; 0 where unknown."""
    trained = [layer for layer in layers if layer.max > 0 and math.isfinite(layer.max)]
    norms = sorted((layer.mean for layer in trained), reverse=True)
    relative = sorted((layer.mean / layer.weight_norm for layer in trained if layer.weight_norm > 0), reverse=True)
    first, second = ([*values, 0.0][min(len(values) // 3, 1)] for values in (norms, relative))
    return first, second


@define
class LayerHistory(Stateful):
    """How long a layer has shown its present status, and how long each status lasted before without harm."""

    seen: str = field(default="", init=False)  # status in the last windows
    windows: int = field(default=0, init=False)  # in a row
    steps: int = field(default=0, init=False)  # read in them
    heaviest: float = field(default=0.0, init=False)  # largest norm of the weights
    _patience: dict[str, int] = field(factory=dict, init=False)  # steps, of a status that has come and gone

    def judge(
        self,
        layer: LayerGradient,
        status: str,
        typical: tuple[float, float],
        *,
        vanishing: float,
        read: int,
        least: int,
    ) -> str:
        """Return the new status of the layer: what its windows show, once they have shown it for long enough.

        Args:
            layer: Figures of the new window.
            status: Status before it.
            typical: `typical_norms` of the window.
            vanishing: Share of the typical norm below which a norm is vanishing.
            read: Steps read in the window.
            least: Steps for which a status must last.
        """
        self.heaviest = max(self.heaviest, layer.weight_norm)  # unchanged by a NaN
        shown = self._shown(layer, status, typical, vanishing)
        if shown is None:
            return status
        lasted = self.steps if self.seen == status else 0
        if shown != self.seen:
            self.seen, self.windows, self.steps = shown, 0, 0
        self.windows, self.steps = self.windows + 1, self.steps + read
        new = shown if shown == "healthy" or self._lasts(layer, least) else status
        if new != status != "healthy":  # over: next time it must last longer
            self._patience[status] = _BACKOFF * max(lasted, least, self._patience.get(status, 0))
        if shown == "healthy":  # so many steps without a gradient were harmless
            for silence in ("dead", "no gradient"):
                self._patience[silence] = max(_BACKOFF * layer.zero_steps, self._patience.get(silence, 0))
        return new

    def _shown(self, layer: LayerGradient, status: str, typical: tuple[float, float], vanishing: float) -> str | None:
        """Return the status that the window alone shows; None if nothing can be told."""
        if layer.untrained:
            return "untrained"
        if not layer.has_gradient:
            return "no gradient"
        if not math.isfinite(layer.max):
            return None
        if layer.max == 0 and not layer.zero_share < 1:  # a norm of 0 may also be one too small to square
            return "dead"
        return self._shown_by_norms(layer, status, typical, vanishing)

    def _shown_by_norms(self, layer: LayerGradient, status: str, typical: tuple[float, float], vanishing: float) -> str:
        norm, relative = typical
        share = vanishing * (10 if status == "vanishing" else 1)  # so that it does not flip at the threshold
        small = layer.mean < share * norm and not layer.mean >= share * relative * layer.weight_norm
        if small and layer.mean >= _ROUNDING * layer.module_mean:  # otherwise it is 0 but for rounding
            return "vanishing"
        if math.isnan(layer.update_norm) or layer.zero_share == 1:
            return status if status in ("frozen", "untrained", "exploding") else "healthy"
        if layer.update_norm == 0:
            return "untrained" if layer.lr == 0 else "frozen"
        return "exploding" if 0 < self.heaviest < layer.update_norm else "healthy"

    def _lasts(self, layer: LayerGradient, least: int) -> bool:
        """Return whether the status has been seen for long enough."""
        windows, steps = 0, least
        if layer.untrained:
            steps = 0
        elif self.seen in ("frozen", "untrained"):
            windows, steps = 2, 0
        elif self.seen == "exploding":
            windows, steps = 2, MIN_NORMS  # the first updates of weights that start at zero exceed them
        elif self.seen == "vanishing" and (layer.lr_rises or layer.lr == 0):
            steps = _WARM_UP
        return self.windows >= windows and self.steps >= max(steps, self._patience.get(self.seen, 0))
