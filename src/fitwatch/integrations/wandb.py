"""fitwatch's records in Weights & Biases."""

import io
from typing import Any

import wandb

from fitwatch import Callback, State
from fitwatch.records import Curve, Histogram, Image, Marker


class WandbLog(Callback):
    """Writes a fit as a run of Weights & Biases, over the axis ``step``; NaN and infinite values are written as such.

    Events, such as overfitting, and the summary stand in the run's summary. A resumed fit continues its run.

    Args:
        project: Name of the project.
        options: More options of `wandb.init`, such as ``name``, ``group`` and ``mode="offline"``.
    """

    main_only = True

    def __init__(self, project: str = "fitwatch", **options: Any) -> None:
        self.project, self.options = project, options
        self.run: Any = None
        self._id: str | None = None
        self._settings_due = True

    def on_fit_start(self, state: State) -> None:
        """Open the run, or that of the checkpoint."""
        state.summarize()
        again = {"id": self._id, "resume": "allow"} if self._id is not None and state.resumed else {}
        self.run = wandb.init(project=self.project, **{**self.options, **again})
        self._id, self._settings_due = self.run.id, True
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def on_log(self, state: State) -> None:
        """Write the records, and before the first ones the settings."""
        if self._settings_due:
            self._settings_due = False
            self.run.config.update({name: str(value) for name, value in state.settings.items()}, allow_val_change=True)
        rows: dict[int, dict[str, Any]] = {}
        for record in state.records:
            if state.ended or isinstance(record.value, Marker):
                self.run.summary[record.name] = _shown(record.value, record.step)
            else:
                rows.setdefault(record.step, {})[record.name] = _shown(record.value, record.step)
        for step, values in sorted(rows.items()):
            self.run.log({**values, "step": step})

    def on_fit_end(self, state: State) -> None:
        """Close the run."""
        if self.run is not None:
            self.run.finish(exit_code=0 if state.error is None else 1)
            self.run = None

    def state_dict(self) -> dict[str, Any]:
        """Return which run it is."""
        return {"id": self._id}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._id = state_dict["id"]


def _shown(value: Any, step: int) -> Any:
    if isinstance(value, Marker):
        return {"step": step, "decided": value.decided, "text": value.text}
    if isinstance(value, Histogram):
        return wandb.Histogram(np_histogram=(list(value.counts), list(value.edges)))
    if isinstance(value, Curve):
        return wandb.Table([value.x_name, value.y_name], list(map(list, zip(value.x, value.y, strict=True))))
    if isinstance(value, Image):
        from PIL import Image as Pillow  # noqa: PLC0415 - only pictures need it

        return wandb.Image(Pillow.open(io.BytesIO(value.png)))
    return value
