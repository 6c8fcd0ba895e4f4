"""Run folders: creating one, finding that of a checkpoint, and removing everything after the point of resumption."""

import re
from contextlib import suppress
from pathlib import Path

from attrs import frozen

from fitwatch.tensorboard import events

RUNS = ("train", "val", "best", "baseline")
"""All other sub-runs are bars on the loss chart.

A bar may be drawn after the checkpoint of its epoch, at a position long before. So the name of its file ends with
``.decided-`` and the step at which it was drawn.
"""

# As `events.EventFile` names them: other writers put no fraction of a second there.
_OWN = re.compile(r"events\.out\.tfevents\.\d{10}\.\d{6}\..+\.\d+(\.decided-(?P<step>\d+))?")


@frozen
class Origin:
    """Which run a checkpoint belongs to. Names only: a checkpoint must not say where files are written or deleted.

    Attributes:
        name: The name that the script gave the run.
        folder: The name of its folder: ``name``, or ``name`` with a number.
        file: The name of its first event file, which tells it from another run of this name.
    """

    name: str
    folder: str
    file: str


def new_folder(parent: Path, name: str) -> Path:
    """Create the folder of a run; a name in use gets a number.

    Raises:
        OSError: The folder can't be created; the message names it.
    """
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError as error:
            if not folder.is_dir():
                raise OSError(f"can't create the run folder {folder}: a file with this name exists") from error
            number += 1
        except OSError as error:
            raise OSError(f"can't create the run folder {folder}: {error}") from error
        else:
            return folder


def origin(run_dir: Path, name: str) -> Origin | None:
    """Describe the run in this folder; None if nothing has been written yet."""
    files = _own_files(run_dir / "train")
    return Origin(name, run_dir.name, files[0].name) if files else None


def find(parent: Path, name: str, origin: Origin) -> Path | None:
    """Return the folder of the run that a checkpoint belongs to; None if ``parent`` and ``name`` don't lead there.

    A folder with links is not returned either: what they lead to may belong to others.
    """
    numbered = re.fullmatch(rf"{re.escape(name)}(-[1-9]\d*)?", origin.folder)
    folder = parent / origin.folder
    if origin.name != name or not numbered or not (folder / "train" / origin.file).is_file():
        return None
    inside = [entry for entry in (folder, *folder.iterdir()) if entry.is_symlink()]
    inside += [file for sub in folder.iterdir() for file in _own_files(sub) if file.is_symlink()]
    return None if inside else folder


def rewind(run_dir: Path, step: int) -> None:
    """Restore the folder to its state at ``step``: remove later events and the bars that were drawn later.

    Raises:
        OSError: The folder can't be written; the message names it.
    """
    try:
        remove(run_dir / "best")  # written at the end of a fit
        for folder in run_dir.iterdir():
            files = _own_files(folder)
            drawn = [found["step"] for file in files if (found := _OWN.fullmatch(file.name))]
            if folder.name in RUNS:
                for file in files:
                    events.cut(file, step)
            elif any(at is not None and int(at) > step for at in drawn):
                remove(folder)
    except OSError as error:
        raise OSError(error.errno, f"can't resume in the run folder {run_dir}: {error.strerror}") from error


def remove(folder: Path) -> None:
    """Delete the event files of a sub-run, and its folder unless other files are in it."""
    for file in _own_files(folder):
        file.unlink()
    with suppress(OSError):  # missing, or not empty
        folder.rmdir()


def _own_files(folder: Path) -> list[Path]:
    """Return the event files that fitwatch wrote to this folder, in the order of writing; no others are touched."""
    return sorted(file for file in folder.glob("events.out.tfevents.*") if _OWN.fullmatch(file.name))
