"""Runs validations: those of the fit, which enter the history, and measurements of other batches."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fitwatch import ranks
from fitwatch.calibration.calibrated import Fitted
from fitwatch.callback import Callbacks
from fitwatch.data import batches
from fitwatch.data.joining import mapped
from fitwatch.data.loading import read
from fitwatch.data.sharding import split
from fitwatch.engine.recorder import Recorder
from fitwatch.engine.rehearsal import rehearse
from fitwatch.helpers.aliases import Batch, Loader
from fitwatch.helpers.modules import copied_weights
from fitwatch.measuring.kept_logits import KeptLogits
from fitwatch.measuring.metrics import Metric, evaluating
from fitwatch.measuring.predictions import predictions
from fitwatch.measuring.validation import NO_BASELINE, Pass
from fitwatch.state import State

ValidationStep = Callable[[Batch], object]


class Validator:
    """Runs validation passes over a model.

    Args:
        state: The state of the fit.
        hooks: Its callbacks.
        recorder: Keeps its history.
        step: Measures one batch, on the device.
        metrics: The user's metrics, which `measure` computes.
        place: Moves the losses to the device.
        fast_loading: Whether to read plain loaders as `data.loading.read` does.

    Attributes:
        running: The current pass; None between passes.
    """

    def __init__(
        self,
        state: State,
        hooks: Callbacks,
        recorder: Recorder,
        *,
        step: ValidationStep,
        metrics: Mapping[str, Metric],
        place: Callable[[], None],
        fast_loading: bool,
    ) -> None:
        self._state, self._hooks, self._recorder, self._step, self._place = state, hooks, recorder, step, place
        self._metrics, self._fast_loading = dict(metrics), fast_loading
        self.running: Pass | None = None

    @contextmanager
    def validating(self) -> Iterator[None]:
        """See `Watch.validating`."""
        if self._recorder.give_up():
            with self._measuring(Pass(self.loss, {}, NO_BASELINE)):  # dropped
                yield
            self._recorder.close_window()
            return
        with self._recording() as done, self._measuring(done):
            yield

    def validate(self) -> None:
        """See `Watch.validate`."""
        loader = self._state.val_loader
        if loader is None:
            self._recorder.add_evaluation({})
        elif self._recorder.give_up():
            self._recorder.close_window()
        else:
            with self._recording() as done:
                self._see_all(done, loader)

    def evaluate(self, loader: Loader) -> dict[str, float]:
        """See `Watch.evaluate`."""
        state = self._state
        self._align()
        if loader is not state.val_loader:
            return self._measure_all(state.validation.start(self.loss, of_fit=False), loader)
        done = state.validation.start(self.loss)
        values = self._measure_all(done, loader)
        state.validation.finish(done)
        return values

    def rehearse(self, step: ValidationStep) -> dict[str, float]:
        """Validate a few batches without a trace, and learn the names of what metrics measure; return the values."""
        state, values = self._state, dict[str, float]()
        for under, loader in [
            ("val", state.val_loader),
            *zip(state.places[1:], state.val_loaders.values(), strict=True),
        ]:
            if loader is None:
                continue
            found = rehearse(state, loader, self.loss, step, self._measuring)
            if found is None:
                continue
            values |= {f"{under}/{name.removeprefix('val/')}": value for name, value in found.items()}
            parts = {f"{under}/{name.removeprefix('val/')}" for name in found}
            for metric in state.validation.metrics:
                name = f"{under}/{metric}"
                if name not in parts:  # a vector or a dict
                    state.history.names.discard(name)
                    state.history.names |= {part for part in parts if part.startswith(f"{name}/")}
        return values

    def predict(self, loader: Loader, step: Callable[[Batch], Any]) -> Any:
        """Return what ``step`` returns for each batch, joined on the CPU, in eval mode and without gradients."""
        self._align()
        model, outputs = self._state.model, []
        with evaluating(model), ranks.unsynchronised(model):
            for number, batch in enumerate(split(loader)):
                try:
                    output = step(batches.move(batch, self._state.device))
                except Exception as error:
                    error.add_note(f"raised in predict(), batch {number}")
                    raise
                outputs.append(
                    mapped(lambda t: t.detach().cpu(), output)
                )  # at once: the device may be too small for all
        return predictions(outputs)

    def measure(self, loader: Loader) -> dict[str, float]:
        """Return the loss and the user's metrics over other batches, without ``val/``."""
        metrics = copy.deepcopy(self._metrics)  # the originals hold the validation's results
        values = self._measure_all(
            Pass(self.loss, metrics, NO_BASELINE, classes=self._state.validation.classes), loader
        )
        return {name.removeprefix("val/"): value for name, value in values.items()}

    @property
    def loss(self) -> Any:
        """The loss that validation measures."""
        return self._state.loss if self._state.eval_loss is None else self._state.eval_loss

    @contextmanager
    def _recording(self) -> Iterator[Pass]:
        """Run a hook before the pass; then add it to the history, run a hook, and close the log window."""
        state = self._state
        self._hooks.on_validation_start(state)
        self._align()
        done = state.validation.start(self.loss, logits=self._logits() if state.validation.keeps_logits else None)
        yield done
        values = ranks.from_main(done.values())
        state.validation.finish(done)
        state.fitted = None if done.refined is None else Fitted(done.refined.calibration, state.progress.step)
        values |= self._others(values)
        # Now, not when a callback finds them to be the best: another may have swapped weights back by then.
        state.validation.weights = copied_weights(state.model) if state.validation.keeps_weights else None
        self._recorder.add_evaluation(values)
        self._hooks.on_validation_end(state)
        state.validation.weights = None
        self._recorder.close_window()

    def _logits(self) -> KeptLogits:
        # The newest temperature is that of the history, so that a resumed fit starts where the other would have.
        newest = self._state.history.newest.get("val/temperature", math.nan)
        return KeptLogits(self.loss, self._state.loss, start=newest if 0 < newest < math.inf else 1.0)

    def _others(self, first: Mapping[str, float]) -> dict[str, float]:
        """Return the values for each of several loaders under its name; those of the first are known."""
        state = self._state
        found: dict[str, float] = {}
        for number, (name, loader) in enumerate(state.val_loaders.items()):
            values = first
            if number:
                metrics = copy.deepcopy(state.validation.metrics)  # the originals hold the results of the first
                given = state.validation.named
                classes = state.validation.classes if given else batches.class_names(loader)
                values = self._measure_all(Pass(self.loss, metrics, NO_BASELINE, classes=classes), loader)
            found |= {f"val/{name}/{key.removeprefix('val/')}": value for key, value in values.items()}
        return found

    @contextmanager
    def _measuring(self, done: Pass) -> Iterator[None]:
        self.running = done
        try:
            with done.running(self._state.model):
                yield
        finally:
            self.running = None

    def _see_all(self, done: Pass, loader: Loader) -> None:
        with self._measuring(done):
            for batch in read(split(loader), fast=self._fast_loading):
                self._step(batches.move(batch, self._state.device))

    def _measure_all(self, done: Pass, loader: Loader) -> dict[str, float]:
        self._see_all(done, loader)
        return ranks.from_main(done.values())

    def _align(self) -> None:
        """Move the losses and copy rank 0's buffers to all ranks; a fit has aligned the parameters."""
        self._place()
        ranks.align([self._state.model], buffers_only=self._state.progress.step > 0)
