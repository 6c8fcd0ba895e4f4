"""Overfitting verdicts on logged runs: reads the logs of any trainer, and judges each run."""

import os
from collections.abc import Iterable
from pathlib import PurePosixPath

from attrs import define, field

from fitwatch.logs.curves import LogError, NoLogsError
from fitwatch.logs.finding import Found, collect
from fitwatch.logs.judging import Diagnosis, Unusable, judge
from fitwatch.logs.pairing import Pair, find, guess, listed

__all__ = ["Diagnosis", "LogError", "NoLogsError", "Report", "Unusable", "diagnose_logs"]


@define(kw_only=True)
class Report:
    """Verdicts on all runs that were found.

    Attributes:
        runs: A verdict on each run, or why there is none, in natural order.
        skipped: Files that could not be read, with the reason.
    """

    runs: list[Diagnosis | Unusable] = field(factory=list)
    skipped: list[str] = field(factory=list)

    @property
    def judged(self) -> list[Diagnosis]:
        """The runs with a verdict."""
        return [one for one in self.runs if isinstance(one, Diagnosis)]


def diagnose_logs(
    *paths: str | os.PathLike[str],
    run: str | None = None,
    train: str | None = None,
    val: str | None = None,
    each: bool = False,
    higher_is_better: bool = False,
) -> Report:
    """Judge each run in files and folders, by `fitwatch.diagnose`.

    Reads event files of TensorBoard, ``results.csv`` of Ultralytics, ``metrics.csv`` of Lightning,
    ``trainer_state.json`` of Hugging Face, CSV, TSV and JSON lines whose columns say which loss they hold, and the
    folders of MLflow and DVCLive.

    Args:
        *paths: Files, folders with logs at any depth, or patterns such as ``runs/*/metrics.csv``.
        run: Judge only this run.
        train: Name of the training loss: a tag or column, or a sub-run and a tag, as in ``train/loss``. Default:
            guessed, or the series with the name of ``val`` for the other role.
        val: Name of the validation loss or metric, in the same form.
        each: Judge the parts of a loss one by one. Default: their sum, if no total is logged.
        higher_is_better: Whether ``train`` and ``val`` are scores, such as an accuracy.

    Raises:
        NoLogsError: If nothing there is a log.
        LogError: If a path, the run or the names do not exist.
    """
    found = collect(paths, [name for name in (train, val) if name])
    if not found.logged:
        raise NoLogsError(_nothing(found, paths))
    pairs = guess(found.logged, each=each) if train is None and val is None else find(found.logged, train, val)
    shown = _shown(pairs, found)
    if run is not None:
        shown = [pair for pair in pairs if pair.run == run]
        if not shown:
            raise LogError(f"there is no run {run!r}; there are {listed({pair.run for pair in _shown(pairs, found)})}")
    runs = [judge(pair, _notes(pair, found), higher_is_better=higher_is_better) for pair in shown]
    return Report(runs=runs, skipped=found.skipped)


def _nothing(found: Found, paths: Iterable[str | os.PathLike[str]]) -> str:
    where = ", ".join(os.fspath(path) for path in paths)
    if found.skipped:
        more = f"; and {len(found.skipped) - 3} more files" if len(found.skipped) > 3 else ""
        return "; ".join(found.skipped[:3]) + more
    what = "no logs"
    if found.files:
        what = "a file without curves" if found.files == 1 else f"{found.files} files without curves"
    return f"{where} and its subfolders contain {what}"


def _shown(pairs: list[Pair], found: Found) -> list[Pair]:
    """Leave out sub-runs and tables without a pair of losses, and tables that repeat what the event files have."""
    good = {pair.run for pair in pairs if not pair.problem}
    left = [pair for pair in pairs if not _is_repeated(pair, good, found)]
    return [pair for pair in left if not pair.problem or not _is_silent(pair, good, found)] or pairs


def _is_repeated(pair: Pair, good: set[str], found: Found) -> bool:
    """Whether a table repeats the event files in its folder, or in ``runs`` below it, as Hugging Face has them."""
    folder = found.tables.get(pair.run)
    if folder is None:
        return False
    below = "runs/" if folder == "." else f"{folder}/runs/"
    return any((run == folder or run.startswith(below)) and run not in found.tables for run in good)


def _is_silent(pair: Pair, good: set[str], found: Found) -> bool:
    """Whether a run without a pair is not a run of its own: a sub-run for markers, or a table of something else."""
    if pair.run != "." and any(str(parent) in good for parent in PurePosixPath(pair.run).parents):
        return True
    if pair.run not in found.tables:
        return any(found.tables.get(other) == pair.run for other in good)
    tags = found.logged.get(pair.run, {})
    return not any("loss" in tag.lower() for tag in tags) and len(found.logged) > 1


def _notes(pair: Pair, found: Found) -> list[str]:
    """Return what could not be read of a run and its sub-runs."""
    sides = [one.folder for one in (pair.train, pair.val) if one is not None]
    return [note for place in dict.fromkeys([pair.run, *sides]) for note in found.notes.get(place, ())]
