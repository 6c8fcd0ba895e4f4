"""Work in a thread beside the training."""

import os
import threading
import weakref
from collections.abc import Callable

_all: "weakref.WeakSet[Background]" = weakref.WeakSet()


class Background:
    """Does one job at a time in a thread. Its error is raised by the next call here.

    A process is forked only when no job runs: the workers of a loader must not inherit a lock that a thread holds. And
    the interpreter waits for a job before it exits.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], object]) -> None:
        """Start a job when the one before has ended."""
        self.wait()
        _all.add(self)
        self._thread = threading.Thread(target=self._run, args=(job,), name="fitwatch-save")
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a job that has ended; else do nothing."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the job, and raise its error."""
        self.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def join(self) -> None:
        """Wait for the job, and keep its error."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001 - raised in the main thread
            self._error = error


def _settle() -> None:
    for background in list(_all):
        background.join()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_settle)
