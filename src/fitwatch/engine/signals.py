"""Ctrl-C, SIGTERM and SIGUSR1 end a fit between two steps, with everything saved."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

_Handler = Callable[[int, FrameType | None], object] | int | None


class Interrupts:
    """Catches SIGINT, SIGTERM and SIGUSR1 while it is entered, in the main thread.

    SIGUSR1 is what Slurm sends on request before the time is up; a handler of the user's stays.

    The first one is only noted. The second ends the process's work at once, as without this class, but not while
    `shielded`, when weights are being put back.

    Attributes:
        received: The name of the signal, such as ``"SIGTERM"``, or None.
        shielded: Whether a second signal waits too.
        passed_on: Whether another fit, around this one, will end by the signal.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.shielded = self.passed_on = False
        self._before: dict[signal.Signals, _Handler] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before is None or before is signal.SIG_IGN:  # not set by Python; or the user wants none
                    continue
                self._before[number] = before
                signal.signal(number, self._handle)
            user = getattr(signal, "SIGUSR1", None)  # not on Windows
            if user is not None and (before := signal.getsignal(user)) == signal.SIG_DFL:  # it would kill the process
                self._before[user] = before
                signal.signal(user, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
            outer = getattr(before, "__self__", None)
            if isinstance(outer, Interrupts) and self.received is not None:
                outer.received = outer.received or self.received  # the fit around this one ends after its own step
                self.passed_on = True
        self._before = {}

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is None or self.shielded:
            self.received = self.received or signal.Signals(number).name
        else:
            raise self.error()

    def error(self) -> BaseException:
        """Return what ends the process: KeyboardInterrupt, or SystemExit with 128 + the signal's number."""
        if self.received == "SIGINT":
            return KeyboardInterrupt()
        return SystemExit(128 + signal.Signals[self.received or "SIGTERM"])


@contextmanager
def held_back() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until the body has ended, so that it leaves nothing half done."""
    waiting = Interrupts()
    waiting.shielded = True
    try:
        with waiting:
            yield
    finally:
        if waiting.received is not None and not waiting.passed_on:
            raise waiting.error()
