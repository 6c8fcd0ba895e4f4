"""Logged values, as a callback that writes to a tracker receives them."""

from attrs import field, frozen

__all__ = ["Histogram", "Image", "Marker", "Record"]


@frozen
class Marker:
    """An event on the loss chart, drawn as a vertical bar. The name of its `Record` is the name of the event.

    Attributes:
        low: Lower end of the bar, in units of the loss.
        high: Upper end of the bar, in units of the loss.
    """

    low: float
    high: float


@frozen
class Image:
    """A picture.

    Attributes:
        png: The content of a PNG file.
        width: Width in pixels.
        height: Height in pixels.
    """

    png: bytes = field(repr=False)
    width: int
    height: int


@frozen
class Histogram:
    """A distribution of values as a histogram with n buckets.

    Attributes:
        edges: The n + 1 bucket edges, in ascending order.
        counts: Number of values in each of the n buckets.
        sum: Sum of all values.
        sum_squares: Sum of the squares of all values.
    """

    edges: tuple[float, ...] = field(repr=False)
    counts: tuple[int, ...] = field(repr=False)
    sum: float
    sum_squares: float


Value = float | str | Marker | Image | Histogram


@frozen
class Record:
    """One logged value, on the host.

    A callback that writes to a tracker (set ``main_only``, so that only rank 0 writes) needs four hooks:

    - ``on_fit_start``: open the tracker. ``state.settings`` holds the Trainer's settings; callbacks may add to it in
      ``on_fit_start``, so it is complete at the first ``on_epoch_start``. If ``state.resumed``, everything logged
      beyond ``state.progress.step`` is void.
    - ``on_log``: write ``state.records``, which holds everything logged since the last ``on_log``, each value once.
      Numbers have the current step. Texts, images, histograms and markers have the step at which they were logged, and
      a name may occur several times. A number may be NaN or infinite. A marker may have a step long before the current
      one. ``on_log`` may be called twice at one step, after a log window and after a validation.
    - After a validation ``state.history.best`` is the best evaluation so far, or None, and
      ``state.history.is_best`` is True if that is the newest.
    - ``on_fit_end``: close the tracker. ``state.error`` is the exception that ended the fit, or None; otherwise
      ``state.stop_reason`` is the reason for stopping early, or None if the fit ran to its end.

    Attributes:
        name: ``train/...`` or ``val/...``; for a `Marker`, the name of the event.
        step: Optimizer steps completed when the value was logged.
        value: A number, a Markdown text, a `Marker`, an `Image`, or a `Histogram`.
        reduce: How the values of the log window were reduced to this number: ``"mean"``, ``"max"`` or ``"last"``;
            empty for a custom function, and for values that are not numbers.
    """

    name: str
    step: int
    value: Value
    reduce: str = ""

    @property
    def merge(self) -> str:
        """How to merge the numbers of several log windows: ``reduce``, or a mode derived from the name if empty."""
        return self.reduce or ("max" if "_max/" in f"{self.name}/" else "mean")
