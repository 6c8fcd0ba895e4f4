"""Seconds of training."""

import time


class Clock:
    """Counts seconds of training; it is paused during validation.

    Read it only after the host has waited for the device: queued work is not done yet.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = None  # when it was started; None if it is paused

    def run(self) -> None:
        """Start the clock unless it is running."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> float:
        """Pause the clock and return the seconds counted so far."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None
        return self._seconds
