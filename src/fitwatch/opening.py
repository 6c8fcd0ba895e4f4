"""``fitwatch open``: TensorBoard on a folder of runs, at the page that shows them."""

import re
import signal
import subprocess
import sys
import webbrowser
from pathlib import Path

from fitwatch.helpers.terminal import with_links


def runs_in(folder: Path) -> list[str]:
    """Return the names of the runs in a folder that the callback `TensorBoard` has written, in order."""
    return sorted({path.parent.parent.name for path in folder.glob("*/*/events.out.tfevents.*")})


def serve(folder: Path, *, port: int | None, browser: bool) -> int:
    """Start a TensorBoard server on ``folder``, print the address of the page, and wait for the server's end.

    Args:
        folder: The folder of the runs.
        port: Port of the server. None: 6006, or another if it is in use.
        browser: Whether to open the page in a browser.

    Returns:
        The exit status of the server; 0 after Ctrl-C.
    """
    from fitwatch.tensorboard import page  # noqa: PLC0415 - imports torch

    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder)]
    command += ["--port", str(port)] if port is not None else []
    seen: list[str] = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603 - no shell
        try:
            for line in process.stderr or ():
                seen.append(line)
                found = re.search(r"http://\S+?:(\d+)", line)
                if found is None:
                    continue
                runs = runs_in(folder)
                address = page.link(int(found[1]), runs if len(runs) == 1 else [], [])
                print(with_links(f"{address}\n(Ctrl-C ends it)", sys.stdout), flush=True)  # noqa: T201 - a command
                seen.clear()
                if browser:
                    webbrowser.open(address)
            status = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            return 0
    if status and seen:
        print("".join(seen), end="", file=sys.stderr)  # noqa: T201 - as above
    return status
