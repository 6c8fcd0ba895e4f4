"""Logged values, as a callback that writes to a tracker receives them."""

import time

from attrs import field, frozen

__all__ = ["Curve", "Histogram", "Image", "Marker", "Record"]


@frozen
class Marker:
    """An event on the loss chart, drawn as a vertical bar. The name of its `Record` is the name of the event.

    Attributes:
        low: Lower end of the bar, in units of the loss.
        high: Upper end of the bar, in units of the loss.
        text: What happened, in a sentence; "" if the name says it all.
        decided: The step at which it was decided; its `Record` has the step at which it happened, often long before.
            None: the same step.
    """

    low: float
    high: float
    text: str = ""
    decided: int | None = None


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


@frozen
class Curve:
    """A curve of its own, not over the steps, such as precision over recall.

    Attributes:
        x: n values.
        y: n values.
        x_name: What x is.
        y_name: What y is.
    """

    x: tuple[float, ...] = field(repr=False)
    y: tuple[float, ...] = field(repr=False)
    x_name: str
    y_name: str


Value = float | str | Marker | Image | Histogram | Curve


@frozen
class Record:
    """One logged value, on the host.

    A callback that writes to a tracker (set ``main_only``, so that only rank 0 writes) needs three hooks:

    - ``on_fit_start``: open the tracker. If ``state.resumed``, everything logged beyond ``state.progress.step`` is
      void. Call ``state.summarize()`` for a summary at the end.
    - ``on_log``: write ``state.records``, which holds everything logged since the last ``on_log``, each value once.
      Numbers have the current step. The others have the step at which they were logged, and a name may occur several
      times. A number may be NaN or infinite. A marker may have a step long before the current one. ``on_log`` may be
      called twice at one step, after a log window and after a validation. ``state.settings`` is complete at the first.
      The last one has the summary if a callback asked for it; then ``state.ended`` is True.
    - ``on_fit_end``: close the tracker. ``state.error`` is the exception that ended the fit, or None; otherwise
      ``state.stop_reason`` is the reason for stopping early, or None if the fit ran to its end.

    The summary, with the step of the best evaluation: ``best/epoch``, ``best/train/loss``, ``best/val/loss`` and so on;
    for a classifier ``best/confusion`` (an `Image`) and ``best/pr_curve/<class>`` (a `Curve`); ``baseline/val/loss``,
    the loss of the best constant prediction; and with the last step ``report/end``, a text.

    Attributes:
        name: ``train/...`` or ``val/...``; for a `Marker`, the name of the event.
        step: Optimizer steps completed when the value was logged.
        value: A number, a Markdown text, a `Marker`, an `Image`, a `Histogram`, or a `Curve`.
        reduce: How the values of the log window were reduced to this number: ``"mean"``, ``"max"`` or ``"last"``;
            empty for a custom function, and for values that are not numbers.
        time: When it was recorded, in seconds since 1970. Numbers are recorded when their log window closes.
    """

    name: str
    step: int
    value: Value
    reduce: str = ""
    time: float = field(factory=time.time, eq=False, repr=False)

    @property
    def merge(self) -> str:
        """How to merge the numbers of several log windows: ``reduce``, or a mode derived from the name if empty."""
        return self.reduce or ("max" if "_max/" in f"{self.name}/" else "mean")
