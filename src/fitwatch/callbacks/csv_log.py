"""The records of a fit as a CSV file."""

import csv
import errno
import os
from io import StringIO
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, field

from fitwatch import files
from fitwatch.callback import Callback
from fitwatch.helpers.aliases import StateDict
from fitwatch.helpers.options import local_path
from fitwatch.records import Marker
from fitwatch.state import State

if TYPE_CHECKING:
    from io import TextIOWrapper

_HEAD = ["step", "time", "name", "value"]


@define(eq=False, slots=False)
class CSVLog(Callback):
    """Writes everything that is logged, except pictures, histograms and curves, to a CSV file.

    One row per value: ``step``, ``time`` (in seconds since 1970), ``name``, ``value``. A value is a number with all its
    digits, ``inf``, ``-inf`` or ``nan``; a text; or the text of a marker. The settings are the rows
    ``setting/<name>`` before the others, and the last rows are the summary, see `fitwatch.records.Record`. A file name
    in use gets a number: ``log.csv``, ``log-2.csv``, ... A resumed fit continues its file, without the rows beyond the
    point of resumption.

    Args:
        path: The file.

    Raises:
        OSError: When fitting starts: the file can't be written.
    """

    main_only = True

    path: Path = field(default=Path("log.csv"), converter=local_path)

    def __attrs_post_init__(self) -> None:
        self.file: Path | None = None  # set when fitting starts
        self._name: str | None = None  # of the file of the checkpoint
        self._opened: TextIOWrapper | None = None
        self._rows: Any = None
        self._settings_due = False

    def on_fit_start(self, state: State) -> None:
        """Create the file, or cut off the rows that are void."""
        state.summarize()
        first, kept = state.progress.step, [_HEAD]
        before = None if self._name is None or not state.resumed else self.path.with_name(self._name)
        rows = [] if before is None else _rows_of(before)
        if rows[:1] == [_HEAD]:
            kept += [row for row in rows[1:] if _is_whole(row) and int(row[0]) <= first and _is_curve(row[2])]
        else:
            before = None  # it is gone, or no file of ours
        self.file = before or _free(self.path)
        self._settings_due = before is None
        self._name = self.file.name
        with (  # so that a crash loses no row
            files.appearing(self.file) as (descriptor, _),
            os.fdopen(os.dup(descriptor), "w", newline="", encoding="utf-8") as file,
        ):
            csv.writer(file).writerows(kept)
        self._opened = self.file.open("a", newline="", encoding="utf-8")
        self._rows = csv.writer(self._opened)

    def on_log(self, state: State) -> None:
        """Write the records, and before the first ones the settings.

        Raises:
            FileNotFoundError: The file was removed or renamed: what is written would be lost.
        """
        if self._opened is None or self.file is None:
            return
        if not self.file.exists():
            raise FileNotFoundError(
                errno.ENOENT, "CSVLog can't go on, since its file was removed or renamed", self.file
            )
        if self._settings_due:
            self._settings_due, at = False, state.records[0].time
            self._rows.writerows([0, at, f"setting/{name}", value] for name, value in state.settings.items())
        for record in state.records:
            value = record.value.text if isinstance(record.value, Marker) else record.value
            if isinstance(value, (float, int, str)):
                self._rows.writerow([record.step, record.time, record.name, value])
        self._opened.flush()  # written rows survive a crash

    def on_fit_end(self, state: State) -> None:  # noqa: ARG002 - the signature of a hook
        """Close the file."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def state_dict(self) -> StateDict:
        """Return the name of the file."""
        return {"name": self._name}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: The name leads to another folder.
        """
        name = state_dict["name"]
        if name is not None and Path(name).name != name:
            raise ValueError(f"the name of the CSV file must have no folder, got {name!r}")
        self._name = name


def _is_curve(name: str) -> bool:
    """Return whether a row is not part of the summary, which is written again."""
    return not name.startswith(("best/", "baseline/", "report/"))


def _rows_of(path: Path) -> list[list[str]]:
    """Return the rows of a CSV file that were written whole; none if there is no file, or another kind of file."""
    if path.is_symlink() or not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            text = file.read()
        rows = list(csv.reader(StringIO(text, newline="")))
    except csv.Error:
        return []
    return rows if text.endswith("\n") else rows[:-1]  # a crash may have cut off the last one


def _is_whole(row: list[str]) -> bool:
    """Return whether a row was not cut off, by a full disk or a crash."""
    return len(row) == len(_HEAD) and row[0].isascii() and row[0].isdigit()


def _free(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        file = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        try:
            file.touch(exist_ok=False)
        except FileExistsError:
            continue
        return file
    raise AssertionError
