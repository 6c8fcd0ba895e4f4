"""Finds the logs in files and folders, and tells their formats by their content."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from attrs import define, field

from fitwatch.helpers.options import local_path
from fitwatch.logs.curves import Curve, LogError, printable
from fitwatch.logs.event_files import EventFile, is_event_file, read_event_file, sessions
from fitwatch.logs.metric_files import is_metric_file, metric_place, read_metric_file, run_name
from fitwatch.logs.pairing import is_role, natural
from fitwatch.logs.tables import may_be_table, read_table

_PASSED_OVER = {".git", ".venv", "node_modules", "__pycache__", "site-packages"}
_TABLES = {".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".log", ".txt"}
_OFTEN_OTHER = {".json", ".log", ".txt"}  # most of these are not logs, and need no note
_STATE = "trainer_state.json"
_HEAD = 1 << 10
_REASONS = {
    b"version https://git-lfs": "a Git LFS pointer, and not the file itself: fetch it with `git lfs pull`",
    **dict.fromkeys((b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ"), "compressed: unpack it first"),
    b"SQLite format 3": "an SQLite database: of MLflow, the folder mlruns is read; or export the metrics as CSV",
}


@define
class Found:
    """What was read.

    Attributes:
        logged: Run or sub-run -> tag -> curve.
        notes: Run or sub-run -> what could not be read, a sentence each.
        tables: Run -> the folder of the table that it comes from.
        skipped: Files that could not be read, with the reason.
        files: Number of files that may have been logs.
    """

    logged: dict[str, dict[str, Curve]] = field(factory=dict)
    notes: dict[str, list[str]] = field(factory=dict)
    tables: dict[str, str] = field(factory=dict)
    skipped: list[str] = field(factory=list)
    files: int = 0

    def add(self, run: str, curves: dict[str, Curve], notes: Iterable[str] = ()) -> None:
        """Add curves of a run."""
        run = printable(run)
        if curves := {printable(tag): curve for tag, curve in curves.items() if len(curve)}:
            self.logged.setdefault(run, {}).update(curves)
            self.notes.setdefault(run, []).extend(map(printable, notes))
        else:
            self.skipped.extend(map(printable, notes))

    def skip(self, file: Path, reason: object) -> None:
        """Name a file that could not be read."""
        why = reason.strerror or reason if isinstance(reason, OSError) else reason
        self.skipped.append(printable(f"{file}: {why}"))


@define
class _Place:
    """The logs of one folder."""

    name: str
    events: list[Path] = field(factory=list)
    tables: list[Path] = field(factory=list)
    metrics: list[tuple[str, Path]] = field(factory=list)  # name of the metric, its file


def collect(paths: Iterable[str | os.PathLike[str]], named: Iterable[str] = ()) -> Found:
    """Read all logs in files, folders and what matches patterns.

    Args:
        paths: The files, folders and patterns.
        named: Names of curves that are asked for: a table in a folder is read if it has one of them.

    Raises:
        LogError: If a path does not exist, or is an address.
    """
    found = Found()
    tops = [top for path in paths for top in _tops(path)]
    places: dict[Path, _Place] = {}
    for top in tops:
        base = "" if len(tops) == 1 else top.as_posix()
        if top.is_dir():
            for file in _walk(top):
                _take(found, places, file, top, base, named)
        else:
            _take(found, places, top, None, base or top.name, named)
    states = [folder for folder, place in places.items() if any(file.name == _STATE for file in place.tables)]
    for folder, place in sorted(places.items(), key=lambda item: natural(item[1].name)):
        _read_events(found, place)
        _read_metrics(found, place)
        _read_tables(found, place, folder, states)
    return found


def _tops(path: str | os.PathLike[str]) -> list[Path]:
    """Return the file or folder of this name, or what matches it as a pattern."""
    try:
        top = local_path(path)
        if top.is_dir() or top.is_file():
            return [top]
        if top.exists():
            raise LogError(f"{printable(top)} is neither a file nor a folder")
        if matches := sorted(glob.glob(str(top), recursive=True), key=natural):  # noqa: PTH207 - a pattern may be absolute
            return [Path(match) for match in matches]
    except (ValueError, OSError) as error:  # an address, a name with a zero byte
        raise error if isinstance(error, LogError) else LogError(str(error)) from error
    raise LogError(f"there is no folder or file {printable(top)}")


def _walk(top: Path) -> Iterator[Path]:
    """Yield the regular files below a folder; links to folders are followed, as TensorBoard does."""
    seen = set()
    for place, folders, names in os.walk(top, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a circular link
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if name not in _PASSED_OVER]
        for name in sorted(names):
            file = Path(place, name)
            if _may_be_log(file) and os.path.isfile(file):  # noqa: PTH113 - no dangling link, no pipe, and no error
                yield file


def _may_be_log(file: Path) -> bool:
    name = file.name
    return (
        ("tfevents" in name and not name.endswith(".profile-empty"))
        or file.suffix.lower() in _TABLES
        or "metrics" in file.parts[:-1]
        or name == "mlflow.db"
    )


def _take(
    found: Found, places: dict[Path, _Place], file: Path, top: Path | None, base: str, named: Iterable[str]
) -> None:
    """Put a file to the others of its folder, by its content; ``top`` is None if the user has named it."""
    try:
        with file.open("rb") as opened:
            head = opened.read(_HEAD)
    except OSError as error:
        found.skip(file, error)
        return
    is_events = "tfevents" in file.name or is_event_file(head[:12])
    place = None if top is None or is_events else metric_place(file)
    folder = file if top is None else file.parent if place is None else Path(place[0])

    def at() -> _Place:
        return places.setdefault(folder, _Place(base if top is None else _name(folder, top, base)))

    reason = next((why for start, why in _REASONS.items() if head.startswith(start)), "")
    if reason:
        found.skip(file, reason)
    elif is_events:
        at().events.append(file)
    elif place is not None and (file.suffix == ".tsv" or is_metric_file(head)):
        at().metrics.append((place[1], file))
    elif top is None and is_metric_file(head):
        at().metrics.append((file.name, file))
    elif top is None or (file.suffix.lower() in _TABLES and may_be_table(file, named)):
        folder = file if top is None else file.parent
        at().tables.append(file)
    else:
        return
    found.files += 1


def _name(folder: Path, top: Path, base: str) -> str:
    inside = folder.relative_to(top).as_posix() if folder.is_relative_to(top) else folder.as_posix()
    return inside if not base else base if inside == "." else f"{base}/{inside}"


def _read_events(found: Found, place: _Place) -> None:
    files: list[EventFile] = []
    for path in place.events:  # in the order of their names, which is that of writing
        try:
            files.append(read_event_file(path))
        except OSError as error:
            found.skip(path, error)
    trainings = sessions(files)
    several = len(trainings) > 1
    for number, training in enumerate(trainings, 1):
        # The last one keeps the name in a sub-run, so that its partner finds it, and where there is only one.
        last = number == len(trainings)
        plain = not several or (last and is_role(Path(place.name).name))
        notes = list(training.notes)
        if several:
            names = ", ".join(file.name for file in training.files)
            notes.append(f"number {number} of {len(trainings)} runs in one folder, told apart by file: {names}")
        found.add(place.name if plain else f"{place.name}#{number}", training.curves, notes)


def _read_metrics(found: Found, place: _Place) -> None:
    curves = {}
    for name, path in place.metrics:
        try:
            if path.suffix == ".tsv":
                columns = list([*read_table(path).values()][-1].values())
                curves[name] = columns[-1]
            else:
                curves[name] = read_metric_file(path)
        except (LogError, OSError) as error:
            found.skip(path, error)
    title = run_name(place.metrics[0][1].parents[1]) if curves and place.metrics[0][1].suffix != ".tsv" else ""
    found.add(place.name, curves, [f"its name in MLflow is {title}"] if title else [])


def _read_tables(found: Found, place: _Place, folder: Path, states: list[Path]) -> None:
    tables: dict[Path, dict[str, dict[str, Curve]]] = {}
    for path in place.tables:
        if path.name == _STATE and _is_older(folder, states):
            continue
        try:
            runs = read_table(path)
        except (LogError, OSError) as error:
            if folder == path or path.name == _STATE or path.suffix.lower() not in _OFTEN_OTHER:
                found.skip(path, error)
            continue
        # In a table that nobody has named, a single row is not a curve.
        sure = folder == path or path.name == _STATE
        if kept := {name: run for name, run in runs.items() if sure or max(map(len, run.values())) > 1}:
            tables[path] = kept
    single = {path: run for path, runs in tables.items() if len(runs) == 1 for run in runs.values() if len(run) == 1}
    if len(single) > 1:  # a file for each curve, as TensorBoard exports them
        curves = {
            tag if tag == path.stem else f"{path.stem}/{tag}": curve
            for path, table in single.items()
            for tag, curve in table.items()
        }
        tables = {path: runs for path, runs in tables.items() if path not in single} | {folder: {"1": curves}}
    for path, runs in tables.items():
        _add_table(found, place, path, runs, alone=folder == path or len(tables) == 1)


def _add_table(found: Found, place: _Place, path: Path, runs: dict[str, dict[str, Curve]], *, alone: bool) -> None:
    """Add the runs of a table, which have the name of their folder if there is nothing else in it."""
    name = place.name
    if path.name == _STATE and path.parent.name.startswith("checkpoint-"):  # the training is what wrote the checkpoints
        name = name.rpartition("/")[0] or "."
    elif not (alone and printable(name) not in found.logged):
        name = f"{name}/{path.name}".removeprefix("./")
    for number, (title, curves) in enumerate(runs.items(), 1):
        run = name if len(runs) == 1 else f"{name}#{title}"
        found.tables[printable(run)] = printable(place.name)
        notes = [f"number {number} of {len(runs)} runs in one file, {path.name}"] if len(runs) > 1 else []
        found.add(run, curves, notes)


def _is_older(folder: Path, states: list[Path]) -> bool:
    """Whether a later checkpoint, or the folder of the training itself, has the whole history of a checkpoint."""
    if not folder.name.startswith("checkpoint-"):
        return False
    others = [other for other in states if other.parent == folder.parent and other.name.startswith("checkpoint-")]
    return folder.parent in states or max(others, key=lambda other: natural(other.name)) != folder
