"""What is logged, as a writer gets it."""

from attrs import field, frozen


@frozen
class Marker:
    """A vertical bar on the loss chart, from ``low`` to ``high`` (both in units of the loss)."""

    low: float
    high: float


@frozen
class Image:
    """A picture: the bytes of a PNG file, and its size in pixels."""

    png: bytes = field(repr=False)
    width: int
    height: int


@frozen
class Histogram:
    """How values are spread: one count for each bucket.

    Attributes:
        edges: The limits of the buckets, rising, one more than there are buckets.
        counts: How many values lie in each bucket.
        sum: Of the values.
        sum_squares: Of the values.
    """

    edges: tuple[float, ...] = field(repr=False)
    counts: tuple[int, ...] = field(repr=False)
    sum: float
    sum_squares: float


Value = float | str | Marker | Image | Histogram


@frozen
class Record:
    """One logged value, on the host.

    Attributes:
        name: ``train/...`` or ``val/...``; for a `Marker`, the name of the event.
        step: Optimizer steps completed when it was measured.
        value: A number, a Markdown text, a `Marker`, an `Image`, or a `Histogram`.
        reduce: What stands for the window: ``"mean"``, ``"max"`` or ``"last"``; empty where a function did it.
    """

    name: str
    step: int
    value: Value
    reduce: str = ""

    @property
    def merge(self) -> str:
        """What is to stand for several windows, as in ``reduce``; where that is empty, the name tells."""
        return self.reduce or ("max" if "_max/" in f"{self.name}/" else "mean")
