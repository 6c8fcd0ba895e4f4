"""The two texts of a run: how it was set up, and how it ended."""

import math
import subprocess
from collections.abc import Iterable
from typing import Any

from fitwatch.state import State


def start(state: State) -> str:
    """The settings, as a table."""
    rows = {**state.settings, **dict(_baseline(state)), "git": _git_revision()}
    return _table(("setting", "value"), rows.items())


def end(state: State, name: str, seconds: float) -> str:
    """What one would paste into a message: the values of the best epoch, and how it came to an end."""
    rows: list[tuple[str, Any]] = _baseline(state)
    rows.append(("epochs, steps", f"{state.progress.epoch}, {state.progress.step}"))
    rows.append(("seconds", f"{seconds:.1f}"))
    rows.append(("ended by", repr(state.error) if state.error else state.stop_reason or "the end of training"))
    rows += state.report.items()
    if state.verdict is not None:
        rows.append(("verdict", f"{state.verdict.status}: {state.verdict.evidence}"))
    return "\n\n".join([*_best(state, name), _table((name, "value"), rows)])


def _best(state: State, name: str) -> list[str]:
    """The values of the best epoch, train beside validation."""
    best = state.history.best
    if best is None:
        return []
    values: dict[str, dict[str, str]] = {}
    for key, value in best.items():
        run, _, metric = key.partition("/")
        if metric:
            values.setdefault(metric, {})[run] = f"{value:.6g}"
    where = f"{name}, best epoch {best['epoch']:g} (from 0, by {state.history.monitor}), step {best['step']:g}"
    rows = [(metric, found.get("train", ""), found.get("val", "")) for metric, found in values.items()]
    return [_table((where, "train", "val"), rows)]


def _baseline(state: State) -> list[tuple[str, Any]]:
    """What the validation loss is to be compared with."""
    if state.baseline is None:
        return []
    rows: list[tuple[str, Any]] = [("val/loss of the best constant prediction", f"{state.baseline.constant:.6g}")]
    if math.isfinite(state.baseline.uniform):
        rows.append(("val/loss of equal logits", f"{state.baseline.uniform:.6g}"))
    return rows


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    cells = [[str(cell).replace("|", "&#124;") for cell in row] for row in [head, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def _git_revision() -> str:
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "none"
    return run.stdout.strip()
