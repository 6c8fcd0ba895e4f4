"""How fast training goes, without the time for validation."""

import time


class Clock:
    """Seconds and examples of training; it stands still while the model is validated.

    It is read where the host has just waited for the device, so that work that is merely queued is not taken for done.
    """

    def __init__(self, examples: int) -> None:
        self._examples = examples  # up to the last reading
        self._window = 0.0  # seconds since
        self._epoch = 0.0
        self._since: float | None = None  # when it began to run; None: it stands

    def begin_epoch(self) -> None:
        """Count the seconds of an epoch anew."""
        self.pause()
        self._epoch = 0.0
        self.run()

    def pause(self) -> None:
        """Stand still."""
        if self._since is not None:
            passed = time.perf_counter() - self._since
            self._window, self._epoch, self._since = self._window + passed, self._epoch + passed, None

    def run(self) -> None:
        """Go on."""
        if self._since is None:
            self._since = time.perf_counter()

    def rate(self, examples: int) -> float | None:
        """Examples per second since the last reading, of ``examples`` in all; None if there were none."""
        self.pause()
        new, seconds = examples - self._examples, self._window
        self._examples, self._window = examples, 0.0
        return new / seconds if new and seconds else None

    def epoch_seconds(self) -> float:
        """Seconds of this epoch's training."""
        self.pause()
        return self._epoch
