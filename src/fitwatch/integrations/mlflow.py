"""fitwatch's records in MLflow."""

import logging
import math
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from fitwatch import Callback, State
from fitwatch.records import Curve, Image, Marker

logger = logging.getLogger("fitwatch")

_MOST_METRICS, _MOST_PARAMS = 1000, 100  # of a request
_LONGEST = 250  # characters of a name
_REFUSED = re.compile(r"[^\w./: -]")


class MLflowLog(Callback):
    """Writes a fit as a run of MLflow: numbers as metrics, settings as parameters, texts and pictures as artifacts.

    Events, such as overfitting, become tags, and so does the first infinite value of a metric: MLflow would store
    another number. Of a name, characters that MLflow refuses become ``_``. A resumed fit continues its run.

    Args:
        experiment: Name of the experiment; created if there is none.
        name: Name of the run. None: MLflow chooses one.
        tracking_uri: Where MLflow stores it. None: as MLflow is configured.
    """

    main_only = True

    def __init__(
        self, experiment: str = "fitwatch", *, name: str | None = None, tracking_uri: str | None = "sqlite:///mlflow.db"
    ) -> None:
        self.experiment, self.name, self.tracking_uri = experiment, name, tracking_uri
        self.run_id: str | None = None
        self._client: Any = None
        self._settings_due = True
        self._infinite: set[str] = set()
        self._renamed: set[str] = set()

    def on_fit_start(self, state: State) -> None:
        """Create the run, or continue that of the checkpoint."""
        state.summarize()
        self._client = MlflowClient(self.tracking_uri)
        if self.run_id is not None and state.resumed:
            self._client.update_run(self.run_id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(self.experiment)
        experiment = self._client.create_experiment(self.experiment) if found is None else found.experiment_id
        self.run_id, self._settings_due = self._client.create_run(experiment, run_name=self.name).info.run_id, True

    def on_log(self, state: State) -> None:
        """Write the records, and before the first ones the settings."""
        if self._settings_due:
            self._settings_due = False
            settings = [Param(self._accepted(name), str(value)) for name, value in state.settings.items()]
            self._log("params", settings, _MOST_PARAMS)
        metrics = []
        for record in state.records:
            name, value, step = self._accepted(record.name), record.value, record.step
            if isinstance(value, (int, float)):
                if not math.isinf(value):
                    metrics.append(Metric(name, value, int(record.time * 1000), step))
                elif name not in self._infinite:
                    self._infinite.add(name)
                    self._client.set_tag(self.run_id, f"infinite {name}", f"{value} at step {step}")
                    logger.warning("MLflow can't store %s = %s (step %d): it is left out", name, value, step)
            elif isinstance(value, str):
                self._client.log_text(self.run_id, value, f"{name}-{step}.md")
            elif isinstance(value, Marker):
                self._client.set_tag(self.run_id, name, f"step {step}, decided at {value.decided}: {value.text}")
            elif isinstance(value, Image):
                with TemporaryDirectory() as folder:
                    path = Path(folder) / f"{name.rpartition('/')[2]}-{step}.png"
                    path.write_bytes(value.png)
                    self._client.log_artifact(self.run_id, path, name.rpartition("/")[0] or None)
            elif isinstance(value, Curve):
                table = {value.x_name: list(value.x), value.y_name: list(value.y)}
                self._client.log_dict(self.run_id, table, f"{name}-{step}.json")
        self._log("metrics", metrics, _MOST_METRICS)

    def _log(self, kind: str, values: list[Any], most: int) -> None:
        for start in range(0, len(values), most):
            self._client.log_batch(self.run_id, **{kind: values[start : start + most]})

    def _accepted(self, name: str) -> str:
        """Return a name that MLflow accepts; say it once if it is another one."""
        accepted = _REFUSED.sub("_", name)[:_LONGEST]
        if accepted != name and name not in self._renamed:
            self._renamed.add(name)
            logger.warning("MLflow refuses the name %s: it stands there as %s", name, accepted)
        return accepted

    def on_fit_end(self, state: State) -> None:
        """End the run."""
        if self.run_id is not None:
            self._client.set_terminated(self.run_id, "FINISHED" if state.error is None else "FAILED")

    def state_dict(self) -> dict[str, Any]:
        """Return which run it is."""
        return {"run_id": self.run_id}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.run_id, self._settings_due = state_dict["run_id"], state_dict["run_id"] is None
