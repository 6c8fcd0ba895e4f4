"""Run folders: creating one, and removing everything after the point of resumption."""

import re
import shutil
from pathlib import Path

from fitwatch.tensorboard import events

RUNS = ("train", "val", "best", "baseline")
"""All other sub-runs are bars on the loss chart.

A bar may be drawn after the checkpoint of its epoch, at a position long before. So the name of its file ends with
``.decided-`` and the step at which it was drawn.
"""


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


def rewind(run_dir: Path, step: int) -> None:
    """Restore the folder to its state at ``step``: remove later events and the bars that were drawn later.

    Raises:
        OSError: The folder can't be written; the message names it.
    """
    try:
        shutil.rmtree(run_dir / "best", ignore_errors=True)  # written at the end of a fit
        for folder in run_dir.iterdir():
            files = sorted(folder.glob("events.out.tfevents.*"))
            drawn = [re.search(r"\.decided-(\d+)$", file.name) for file in files]
            if folder.name in RUNS:
                for file in files:
                    events.cut(file, step)
            elif any(match and int(match[1]) > step for match in drawn):
                shutil.rmtree(folder)
    except OSError as error:
        raise OSError(error.errno, f"can't resume in the run folder {run_dir}: {error.strerror}") from error
