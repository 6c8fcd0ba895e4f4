"""The two texts of a run: its settings and its results."""

import math
import subprocess
from collections.abc import Mapping

from fitwatch.helpers.markdown import table
from fitwatch.measuring.per_class import KINDS
from fitwatch.state import State
from fitwatch.state.history import History


def start(state: State) -> str:
    """Return the settings as a table."""
    return table(("setting", "value"), {**state.settings, **_baseline(state), "git": _git_revision()}.items())


def best_title(history: History) -> str:
    """Return the title of a picture of the best evaluation: its epoch, and the metric by which it is the best."""
    return "" if history.best is None else f"best epoch by {history.monitor}: {history.best['epoch'] + 1:g}"


def end(state: State, name: str, seconds: float) -> str:
    """Return the values of the best epoch and how the fit ended, ready to paste into a message."""
    rows = {
        **_baseline(state),
        **_calibration(state),
        "epochs, steps": f"{state.progress.epoch}, {state.progress.step}",
        "seconds": f"{seconds:.1f}",
        "ended by": repr(state.error) if state.error else state.stop_reason or "the end of training",
        **_lines(state),
        **{name: f"{value:.6g}" for name, value in state.test.items()},
    }
    if state.verdict is not None:
        rows["verdict"] = f"{state.verdict.summary} {state.verdict.evidence}"
    report = table((name, "value"), rows.items())
    best = state.history.best
    if best is None:
        return report
    classes = (state.validation.classes or ()) if state.validation.named else ()
    known = {kind: [f"val/{kind}/{one}" for one in classes] for kind in KINDS}
    known = {kind: names for kind, names in known.items() if names and all(name in best for name in names)}
    apart = {name for names in known.values() for name in names}
    parts = [_best({key: v for key, v in best.items() if key not in apart}, name, state.history.monitor), report]
    if known:
        columns = [[f"{best[name]:.4g}" for name in names] for names in known.values()]
        head = ("class, at the best epoch", *(kind.replace("_", " ") for kind in known))
        parts.insert(1, table(head, zip(classes, *columns, strict=True)))
    return "\n\n".join(parts)


def _best(best: Mapping[str, float], name: str, monitor: str) -> str:
    """Return the values of the best epoch, train beside validation."""
    values: dict[str, dict[str, str]] = {}
    for key, value in best.items():
        run, _, metric = key.partition("/")
        if metric:
            values.setdefault(metric, {})[run] = f"{value:.6g}"
    where = f"{name}, best epoch {best['epoch'] + 1:g} (by {monitor}), step {best['step']:g}"
    rows = [(metric, found.get("train", ""), found.get("val", "")) for metric, found in values.items()]
    return table((where, "train", "val"), rows)


def _lines(state: State) -> dict[str, str]:
    """Return the callbacks' lines."""
    lines = {name: line if isinstance(line, str) else line() for name, line in state.report.items()}
    return {name: line for name, line in lines.items() if line}


def _baseline(state: State) -> dict[str, str]:
    """Return the losses to compare the validation loss with."""
    if state.baseline is None:
        return {}
    rows = {"val/loss of the best constant prediction": f"{state.baseline.constant:.6g}"}
    if math.isfinite(state.baseline.uniform):
        rows["val/loss of equal logits"] = f"{state.baseline.uniform:.6g}"
    return rows


def _calibration(state: State) -> dict[str, str]:
    """Return log-loss and cost of the best epoch, as they are and calibrated."""
    best = state.history.best or {}
    if "val/refined_loss" not in best:
        return {}
    values = {
        "log-loss": f"{best['val/log_loss']:.6g}",
        "calibrated log-loss": f"{best['val/refined_loss']:.6g} (difference ± {best['val/refined_loss_se']:.2g})",
    }
    if "val/cost_calibrated" in best:
        values |= {"cost": f"{best['val/cost']:.6g}", "calibrated cost": f"{best['val/cost_calibrated']:.6g}"}
    return values


def _git_revision() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)  # noqa: S603 - constant
    except (OSError, subprocess.SubprocessError):
        return "none"
    return run.stdout.strip()
