"""The folders of runs: one for each, and what is void in them when training resumes."""

import re
import shutil
from pathlib import Path

RUNS = ("train", "val", "best", "baseline")
"""All other sub-runs are bars on the loss chart."""


def new_folder(parent: Path, name: str) -> Path:
    """Make the folder of a run; a name in use gets a number.

    Raises:
        OSError: It can't be made; the message names it.
    """
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError as error:
            if not folder.is_dir():
                raise OSError(f"can't make the run folder {folder}: a file of this name is in the way") from error
            number += 1
        except OSError as error:
            raise OSError(f"can't make the run folder {folder}: {error}") from error
        else:
            return folder


def others(run_dir: Path) -> bool:
    """Whether other runs stand beside this one."""
    return any(folder != run_dir and any(folder.glob("*/events.*")) for folder in run_dir.parent.iterdir())


def decided(step: int) -> str:
    """The end of the name of a bar's file.

    A bar may be drawn after the checkpoint of its epoch, and stand at a place long before it was decided. So only its
    file can tell whether it happened before a point of resumption.
    """
    return f".decided-{step}"


def go_back(run_dir: Path, step: int) -> None:
    """Make the folder what it was at ``step``: remove what was written beyond, and the bars that were decided later.

    Raises:
        OSError: It can't be written to; the message names it.
    """
    try:
        _go_back(run_dir, step)
    except OSError as error:
        raise OSError(error.errno, f"can't resume in the run folder {run_dir}: {error.strerror}") from error


def _go_back(run_dir: Path, step: int) -> None:
    from fitwatch.tensorboard import events  # noqa: PLC0415 - a third of a second that only users of this pay

    shutil.rmtree(run_dir / "best", ignore_errors=True)  # of a fit that ended
    for folder in run_dir.iterdir():
        files = sorted(folder.glob("events.out.tfevents.*"))
        if folder.name in RUNS:
            for file in files:
                events.cut(file, step)
        elif any(when > step for when in map(_decided, files)):
            shutil.rmtree(folder)


def _decided(file: Path) -> int:
    """When a bar was decided; -1 for any other file, such as one that a user keeps in the run's folder."""
    match = re.search(r"\.decided-(\d+)$", file.name)
    return -1 if match is None else int(match[1])
