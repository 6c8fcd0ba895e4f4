"""Reads the folders of MLflow and DVCLive, which keep a file for each metric."""

import math
import re
from pathlib import Path, PurePath

from fitwatch.logs.curves import Curve, LogError

_LINE = re.compile(rb"\s*(\d+)\s+(\S+)(?:\s+(-?\d+))?\s*")  # timestamp, value, step
_HEAD = 1 << 12
_LONGEST = 1 << 10  # bytes of a line


def metric_place(file: PurePath) -> tuple[PurePath, str] | None:
    """Return the run's folder and the name of the metric, by the path of a file; None if it is not a file of a metric.

    MLflow: ``mlruns/<experiment>/<run>/metrics/<name>``; DVCLive: ``<run>/plots/metrics/<name>.tsv``. The name may
    have slashes.
    """
    for parent in file.parents:
        if parent.name not in ("metrics", "scalars"):
            continue
        name = file.relative_to(parent)
        if file.suffix == ".tsv":
            folder = parent.parent
            return (folder.parent if folder.name == "plots" else folder), name.with_suffix("").as_posix()
        return (parent.parent, name.as_posix()) if parent.name == "metrics" else None
    return None


def is_metric_file(head: bytes) -> bool:
    """Whether a file that begins with these bytes holds lines of MLflow: ``timestamp value step``."""
    line = head.split(b"\n", 1)[0]
    return len(line) < _LONGEST and _LINE.fullmatch(line) is not None


def read_metric_file(path: Path) -> Curve:
    """Read a metric of MLflow; without steps, as in its first versions, its points are counted.

    Raises:
        LogError: If no line is one of a metric.
        OSError: If the file can't be read.
    """
    curve, others = Curve(), 0
    with path.open("rb") as file:
        while line := file.readline(_LONGEST):
            match = _LINE.fullmatch(line)
            value = None if match is None else _float(match[2])
            if match is None or value is None:
                others += bool(line.strip())
                continue
            step = float(len(curve)) if match[3] is None else float(match[3])
            if math.isfinite(step):  # a step does not have so many digits
                curve.add(step, value, float(match[1]) / 1000)
            else:
                others += 1
    if not len(curve):
        raise LogError("has no lines of the form: timestamp value step")
    if others:
        curve.notes.append(f"{others} damaged lines of {{}} are left out")
    return _in_order(curve)


def _float(text: bytes) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _in_order(curve: Curve) -> Curve:
    """Return the points in order of steps: several threads may write them in another one."""
    order = sorted(
        range(len(curve)), key=lambda i: (curve.steps[i], curve.times[i] if math.isfinite(curve.times[i]) else 0.0)
    )
    ordered = Curve(notes=curve.notes)
    for i in order:
        ordered.add(curve.steps[i], curve.values[i], curve.times[i])
    return ordered


def run_name(folder: Path) -> str:
    """Return the name that MLflow's user gave a run; "" if there is none."""
    try:
        with (folder / "tags" / "mlflow.runName").open("rb") as file:
            return file.read(_HEAD).decode(errors="replace").strip()
    except OSError:
        return ""
