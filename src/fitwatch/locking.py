"""A lock on a folder, so that no two fits write to it at the same time."""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fitwatch import files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("fitwatch")

_RENEWED = 15.0  # seconds between two signs of life
_SILENT = 60.0  # seconds without one, after which a fit on another machine has ended

_Owner = dict[str, Any]


class FolderLock:
    """Says in the file ``fit.lock`` of a folder which process writes there; the file goes when the fit ends.

    A fit that was killed leaves the file. On the same machine its process is looked up: its number, and when it was
    started. Whether a fit on another machine, or in another container, still runs shows by the time of the file, which
    a thread renews: the new fit watches it for a minute, and takes the folder over if it stays as it is.

    Args:
        folder: An existing folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "fit.lock"
        self._owner: _Owner | None = None
        self._released = threading.Event()

    def acquire(self) -> None:
        """Lock the folder.

        Raises:
            RuntimeError: Another fit is running in it; the message names its host and process.
            OSError: It can't be written to.
        """
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), "place": _place()}
        owner["fit"] = f"{time.time_ns()}-{id(self)}"  # a process may run several
        first: tuple[_Owner, int] | None = None  # what the file said, and when it was renewed
        since = time.monotonic()
        while not self._claim(owner, first, waited=time.monotonic() - since > _SILENT):
            if first is None:
                with suppress(FileNotFoundError), self._path.open("rb") as file:
                    first = _read(file) or {}, os.fstat(file.fileno()).st_mtime_ns
                logger.warning("%s", _in_use(self._path, first[0] if first else {}, waits=True))
            time.sleep(0.5)
        self._owner, self._released = owner, threading.Event()
        threading.Thread(target=self._renew, args=(self._released,), daemon=True, name="fitwatch-lock").start()

    def check(self) -> None:
        """Raise RuntimeError if another fit has taken the folder over. A lock that is gone is written again."""
        if self._owner is None:
            return
        try:
            with self._path.open("rb") as file:
                other = _read(file)
        except FileNotFoundError:
            logger.warning(
                "%s was deleted during the fit, perhaps with checkpoints beside it: it is written again", self._path
            )
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._claim(self._owner, None, waited=True)
            return
        if other is not None and other != self._owner:
            raise RuntimeError(_in_use(self._path, other))

    def release(self) -> None:
        """Release the folder, if this lock holds it."""
        owner, self._owner = self._owner, None
        self._released.set()
        if owner is not None and owner["pid"] == os.getpid():  # and not a child of it
            with suppress(OSError), self._opened() as file:
                if _read(file) in (owner, None):
                    self._path.unlink()

    def _claim(self, owner: _Owner, first: tuple[_Owner, int] | None, *, waited: bool) -> bool:
        """Write ``owner`` into the file, unless the other one may be running; return whether it was written."""
        with self._opened() as file:
            other = _read(file)
            ended = True if other is None else _has_ended(other)
            renewed = first is not None and first != (other, os.fstat(file.fileno()).st_mtime_ns)
            if other is not None and (ended is False or (ended is None and renewed)):
                raise RuntimeError(_in_use(self._path, other))
            if ended is None and not waited:
                return False
            file.seek(0)
            file.truncate()
            file.write(json.dumps(owner).encode())
            return True

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        """Open the file, new or not, while no other process of this machine has it open in this way."""
        while True:
            try:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | files.NO_LINKS, 0o666)
            except OSError as error:
                if self._path.is_symlink() or self._path.is_dir():
                    error.strerror = f"{self._path.name} must be a plain file, which locks the folder: delete it"
                raise
            with os.fdopen(descriptor, "r+b") as file:
                if fcntl is not None:
                    with suppress(OSError):  # a file system without locks
                        fcntl.flock(descriptor, fcntl.LOCK_EX)
                if self._path.exists() and os.path.samestat(os.fstat(descriptor), self._path.stat()):
                    yield file
                    return
            # Its owner has deleted it meanwhile.

    def _renew(self, released: threading.Event) -> None:
        while not released.wait(_RENEWED):
            with suppress(OSError):
                os.utime(self._path)


def _read(file: IO[bytes]) -> _Owner | None:
    """Return what a lock says; None if it is empty, cut off or no lock."""
    try:
        owner = json.loads(file.read(10_000))
    except (ValueError, RecursionError):
        return None
    return owner if isinstance(owner, dict) and type(owner.get("pid")) is int else None


def _has_ended(other: _Owner) -> bool | None:
    """Return whether the process of a lock has ended; None if that can't be known here."""
    if (other.get("host"), other.get("place")) != (socket.gethostname(), _place()):
        return None
    running = files.runs(other["pid"])
    return not (running and other.get("started") == _started(other["pid"])) if running is not None else None


def _started(pid: int) -> str:
    """Return when a process was started, in ticks since the machine was; "" if unknown, "ended" if it has ended."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "ended" if state in "ZX" else numbers[18]


def _place() -> str:
    """Return what tells this machine, since it was started, and this container from others with the same name."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _in_use(path: Path, other: _Owner, *, waits: bool = False) -> str:
    """Say who uses a folder, and what can be done."""
    host, pid = str(other.get("host"))[:80], other.get("pid")
    same = (host, pid) == (socket.gethostname(), os.getpid())
    who = "another fit of this process" if same else f"the fit of process {pid} on host {host}"
    if waits:
        return (
            f"{path.parent} was last used by {who}, which can't be looked up from here: waiting {_SILENT:.0f} s for a "
            f"sign of life. If it has ended, delete {path.name} there to go on at once"
        )
    return f"{path.parent} is in use by {who}: wait until it has ended, stop it, or choose another folder"
