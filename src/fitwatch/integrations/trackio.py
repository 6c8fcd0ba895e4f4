"""fitwatch's records in Trackio."""

from typing import Any

import trackio

from fitwatch import Callback, State
from fitwatch.records import Marker


class TrackioLog(Callback):
    """Writes a fit as a run of Trackio: numbers, texts, events, and the summary; no pictures and curves.

    NaN and infinite values are written as such. A resumed fit continues its run.

    Args:
        project: Name of the project.
        name: Name of the run. None: Trackio chooses one.
        options: More options of `trackio.init`.
    """

    main_only = True

    def __init__(self, project: str = "fitwatch", *, name: str | None = None, **options: Any) -> None:
        self.project, self.name, self.options = project, name, options
        self.run: Any = None
        self._resumed = False

    def on_fit_start(self, state: State) -> None:
        """Ask for the summary; the run opens at the first `on_log`, when the settings are complete."""
        state.summarize()
        self._resumed = state.resumed

    def on_log(self, state: State) -> None:
        """Write the records."""
        if self.run is None:
            settings = {name: str(value) for name, value in state.settings.items()}
            again = "allow" if self._resumed else "never"
            self.run = trackio.init(self.project, self.name, config=settings, resume=again, **self.options)
            self.name = self.run.name
        rows: dict[int, dict[str, Any]] = {}
        for record in state.records:
            value: Any = record.value
            if isinstance(value, Marker):
                value = f"step {record.step}, decided at {value.decided}: {value.text}"
            if isinstance(value, (int, float, str)):
                rows.setdefault(record.step, {})[record.name] = value
        for step, values in sorted(rows.items()):
            trackio.log(values, step=step)

    def on_fit_end(self, state: State) -> None:  # noqa: ARG002 - the signature of a hook
        """Close the run."""
        if self.run is not None:
            trackio.finish()
            self.run = None

    def state_dict(self) -> dict[str, Any]:
        """Return which run it is."""
        return {"name": self.name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.name = state_dict["name"]
