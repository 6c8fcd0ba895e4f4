"""Follows runs that are being written."""

import time
from collections.abc import Callable, Iterator

from fitwatch.logs import NoLogsError, Report
from fitwatch.logs.judging import Diagnosis


def turns(read: Callable[[], Report], *, every: float) -> Iterator[Diagnosis | str]:
    """Yield each run once when it begins to overfit or to diverge; first, and then again, whether there are runs.

    Args:
        read: Judges the runs.
        every: Seconds between two readings.
    """
    told: set[tuple[str, str, str]] = set()
    said = ""
    while True:
        try:
            report = read()
        except NoLogsError as error:
            report, state = Report(), f"waiting for logs: {error}"
        else:
            state = f"watching {len(report.runs)} run{'s' if len(report.runs) != 1 else ''}"
        if state != said:
            said = state
            yield state
        for one in report.judged:
            status = "overfitting" if one.verdict.overfitting else one.verdict.status
            turn = (one.run, one.part, status)
            if status in ("overfitting", "diverging") and turn not in told:
                told.add(turn)
                yield one
        time.sleep(every)
