"""Curves that earlier fits have filled: their points are merged in the files, to make room for another fit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fitwatch.tensorboard import thinning


def shorten(run_dir: Path, curves: Mapping[str, tuple[str, float]]) -> dict[str, int]:
    """Merge points of some curves, until each has `thinning.FULL` at most. No file of the folder may be open.

    Args:
        run_dir: The folder of the run.
        curves: Sub-run and tag, as ``train/optim/lr`` -> what stands for several values, and where it begins.

    Returns:
        How many points each of them has now.

    Raises:
        OSError: The files can't be written; the message names the folder.
    """
    runs: dict[str, dict[str, tuple[str, float]]] = {}
    for name, options in curves.items():
        run, _, tag = name.partition("/")
        runs.setdefault(run, {})[tag] = options
    left: dict[str, int] = {}
    for run, tags in runs.items():
        try:
            counts = _shorten(sorted((run_dir / run).glob("events.out.tfevents.*")), tags)
        except OSError as error:
            raise OSError(error.errno, f"can't shorten the curves in {run_dir / run}: {error.strerror}") from error
        left.update((f"{run}/{tag}", count) for tag, count in counts.items())
    return left


def _shorten(files: Sequence[Path], tags: Mapping[str, tuple[str, float]]) -> dict[str, int]:
    from fitwatch.tensorboard import events  # noqa: PLC0415 - a third of a second that only users of this pay

    contents = [[event for _, event in events.events(file)] for file in files]
    points: dict[str, list[tuple[int, Any]]] = {tag: [] for tag in tags}  # step, and the value in its event
    for content in contents:
        for event in content:
            for value in event.summary.value:
                if value.tag in points and value.HasField("simple_value"):
                    points[value.tag].append((event.step, value))
    left = dict.fromkeys(tags, 0)
    for tag, curve in points.items():
        new = thinning.merged([(step, value.simple_value) for step, value in curve], *tags[tag])
        for (_, value), number in zip(curve, new, strict=True):
            if number is None:
                value.Clear()  # no value is without a tag but these
            else:
                value.simple_value = number
                left[tag] += 1
    for file, content in zip(files, contents, strict=True):
        events.rewrite(file, [event.SerializeToString() for event in content if _tidy(event)])
    return left


def _tidy(event: Any) -> bool:
    """Take out the values that were cleared; whether anything is left."""
    if not event.HasField("summary"):
        return True
    kept = [value for value in event.summary.value if value.tag]
    if len(kept) < len(event.summary.value):
        summary = type(event.summary)(value=kept)
        event.summary.CopyFrom(summary)
    return bool(kept)
