"""The gradient-norm inspector: its options and hooks."""

import re
from functools import partial

from attrs import Attribute, define, field

from fitwatch.callback import Callback
from fitwatch.callbacks.gradient_norm.layers import Layers, group
from fitwatch.callbacks.gradient_norm.reading import Place, Reading
from fitwatch.callbacks.gradient_norm.report import Report, suggested_clip_norm
from fitwatch.helpers.aliases import StateDict
from fitwatch.helpers.options import instance, integer
from fitwatch.rules.gradients import GradientRule
from fitwatch.state import State


def _pattern(_: object, option: "Attribute[str | None]", value: object) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise TypeError(f"{option.name} must be a regular expression or None, got {value!r}")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{option.name} must be a regular expression, got {value!r}: {error}") from error


@define(eq=False, slots=False)
class GradientNorm(Callback):
    """Logs gradient norms (2-norms) and reports layers that do not learn and the origin of a NaN.

    The gradients are those of the whole step, unscaled and before clipping. They are read, never changed. Only
    parameters that the optimizer holds are read; one without a gradient counts as 0. No step waits for the device.

    Logged for each log window:

    - ``train/optim/grad_norm``, ``grad_norm_max``: mean and maximum of the total norm.
    - ``train/optim/grad_norm_clipped``, ``clipped_share``: mean norm after clipping and share of clipped steps; only
      with a ``clip_norm``.
    - ``train/optim/skipped_share``: share of steps skipped because of an overflow; only with a GradScaler.
    - ``train/params/grad_norm/<layer>``, ``grad_norm_max/<layer>``: mean and maximum of the layer's norm.
    - ``train/params/update_ratio/<layer>``: norm of the update divided by the norm of the weights before it, at the
      first step read in the log window.
    - ``train/params/zero_share/<layer>``: share of exact zeros in the gradient at the same step.

    At most 20 layers are drawn. If there are more, these are the 15 with the largest norm in the first log window, and
    layers with problems. The ``rule`` judges all layers. A sentence is logged, also as text in
    ``train/report/warnings``, when the status of a layer changes, and at the first non-finite gradient, with its
    parameter, step and batch. Layers frozen on purpose are noted in ``train/report/gradients``. The update ratio needs
    a copy of the weights for one step of each log window.

    Norms of float16 and bfloat16 gradients are computed in float32; a norm beyond its range counts as non-finite. A
    GradScaler skips steps with a non-finite gradient, so all other figures exclude them; there is a warning only if
    it skips a whole log window.

    Args:
        every: Steps between two readings. The default of 1 catches every spike in ``grad_norm_max``.
        per_layer: Whether to read layers, or only the total norm.
        layers: A regular expression. The part of a parameter's name that it (or its first group) matches is the layer;
            parameters without a match count in the total only. ``r"^[^.]+"`` groups by the first part of the name, such
            as ``encoder``. Default: each module with direct parameters is a layer.
        histogram_every: Log windows between two histograms of gradient values, for each layer drawn and from about
            10,000 of its values. None: no histograms.
        rule: The decision rule with its options. Default: ``GradientRule()``.

    Raises:
        ValueError: An option is out of its range.
        TypeError: An option has the wrong type.
    """

    every: int = field(default=1, kw_only=True, validator=integer(1))
    per_layer: bool = field(default=True, kw_only=True, validator=instance(bool))
    layers: str | None = field(default=None, kw_only=True, validator=_pattern)
    histogram_every: int | None = field(default=None, kw_only=True, validator=integer(1, or_none=True))
    rule: GradientRule = field(factory=GradientRule, kw_only=True, validator=instance(GradientRule))

    def __attrs_post_init__(self) -> None:
        self._report = Report()
        self._layers: Layers | None = None
        self._grouped = False  # in this epoch
        self._reading: Reading | None = None
        self._batches = 0  # of this epoch, before the current step

    @property
    def suggested_clip_norm(self) -> float | None:
        """A ``clip_norm`` that clips only spikes (see `GradientRule.clip_norm`).

        None before 20 steps have been read.
        """
        return suggested_clip_norm(self.rule)

    def on_fit_start(self, state: State) -> None:
        """Forget earlier fits, unless training resumes."""
        if not state.resumed:
            self.rule.reset()
            self._report = Report()
        self._layers, self._reading = None, None
        self.on_epoch_start(state)

    def on_epoch_start(self, state: State) -> None:
        """Group the layers again at the next step: a callback may have frozen or added some."""
        self._batches, self._grouped = state.progress.epoch_batch, False

    def on_gradients_ready(self, state: State) -> None:
        """Measure the gradients; the figures stay on the device."""
        if not self._grouped:
            self._grouped = True
            self._group(state)
        progress, reading = state.progress, self._reading
        if reading is None or (progress.step + 1) % self.every:
            return
        first = not reading.places
        place = Place(progress.step + 1, progress.epoch, self._batches, progress.epoch_batch)
        state.log.defer(reading.norms(place), reading.receive, reduce=reading.reduce)
        if first and reading.layers.names:
            reading.begin_sample(self._report.histograms_due(reading.layers.names, self.histogram_every))

    def on_step_end(self, state: State) -> None:
        """Measure the update of a sampled step."""
        self._batches = state.progress.epoch_batch
        if self._reading is not None:
            self._reading.end_step(state.total_norm)

    def state_dict(self) -> StateDict:
        """Return the state of the rule and the layers drawn."""
        return {"rule": self.rule.state_dict(), **self._report.state_dict()}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore what `state_dict` returned."""
        self.rule.load_state_dict(state_dict["rule"])
        self._report.load_state_dict(state_dict)

    def _group(self, state: State) -> None:
        """Start a new reading if the trained parameters have changed."""
        pattern = self.layers if self.per_layer else "(?!)"  # matches nothing
        layers = group(state.model, state.optimizer, pattern)
        if self._layers is not None and layers.key == self._layers.key:
            return
        self._layers, self._reading = layers, None
        if layers.parameters:
            write = partial(self._report.add_window, state, self.rule)
            self._reading = Reading(layers, write, skips=state.scaler is not None)
