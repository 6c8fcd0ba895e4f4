"""The summary of a fit, as records for any writer."""

import time
from collections.abc import Callable, Iterator

from fitwatch.records import Curve, Record
from fitwatch.state import State
from fitwatch.tensorboard import reports
from fitwatch.tensorboard.classifier import ClassCounts, Counts, curve, curve_names
from fitwatch.tensorboard.confusion import confusion_image


class Summary:
    """Follows the evaluations of a fit, for its summary; see `fitwatch.records.Record`.

    Args:
        state: The state of the fit.
    """

    def __init__(self, state: State) -> None:
        self._state, self._counting, self._started = state, ClassCounts(state), time.time()
        self._best: Counts | None = None
        state.validation.observers.append(self._counting)

    def after_validation(self) -> None:
        """Keep the counts of the outputs if this evaluation is the best."""
        if self._state.history.is_best:
            self._best = self._counting.counts

    def records(self) -> Iterator[Record]:
        """Yield the summary."""
        state, best = self._state, self._state.history.best
        if best is not None:
            step = int(best["step"])
            yield from (Record(f"best/{name}", step, value, "last") for name, value in best.items() if name != "step")
            yield from _outputs(self._best, step, reports.best_title(state.history), state.validation.class_names)
        if state.baseline is not None:
            yield Record("baseline/val/loss", state.progress.step, state.baseline.constant, "last")
        report = reports.end(state, "fit", time.time() - self._started)
        yield Record("report/end", state.progress.step, report)


def _outputs(counts: Counts | None, step: int, title: str, names_of: Callable[[int], list[str]]) -> Iterator[Record]:
    if counts is not None and counts.matrix is not None:
        names = names_of(len(counts.matrix))
        yield Record("best/confusion", step, confusion_image(counts.matrix, names, title=title))
    if counts is not None and counts.scores is not None:
        for name, scores in zip(curve_names(counts.scores, names_of), counts.scores.cpu(), strict=True):
            *_, precision, recall = curve(scores)
            yield Record(f"best/pr_curve/{name}", step, Curve(tuple(recall), tuple(precision), "recall", "precision"))
