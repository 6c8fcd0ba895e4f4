"""Draws the two curves of a run: as text, and as a picture where Pillow is installed."""

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from fitwatch.logs.judging import Diagnosis

if TYPE_CHECKING:
    from PIL import ImageDraw

_WIDTH = 60  # characters of a sparkline
_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.-~=+*#"
_PANELS = 12  # runs in one picture
_SIZE = (480, 300)
_MARGIN = (56, 28, 12, 24)  # left, top, right, bottom
_COLOURS = {"train": "#1f77b4", "val": "#d95f02", "best": "#2ca02c", "onset": "#d62728", "frame": "#999999"}
_WIDE = 30.0  # ratio of largest to smallest loss, above which the scale is logarithmic


def sparkline(curve: Sequence[float], *, unicode: bool) -> str:
    """Return a curve as a line of blocks, and its range; a space stands where there is no finite value.

    Args:
        curve: The values.
        unicode: Whether block characters can be shown; otherwise ASCII.
    """
    levels = _BLOCKS if unicode else _ASCII
    means = _binned(curve)
    known = [value for value in means if math.isfinite(value)]
    if not known:
        return "-"
    line = "".join(_level(value, known, levels) for value in means)
    return f"{line.rstrip()}  {min(known):.4g} to {max(known):.4g}"


def _binned(curve: Sequence[float]) -> list[float]:
    """Return the means of up to `_WIDTH` stretches of a curve."""
    width = min(_WIDTH, len(curve))
    means = []
    for i in range(width):
        part = curve[i * len(curve) // width : (i + 1) * len(curve) // width]
        finite = [value for value in part if math.isfinite(value)]
        means.append(sum(value / len(finite) for value in finite) if finite else math.nan)
    return means


def _level(value: float, known: Sequence[float], levels: str) -> str:
    if not math.isfinite(value):
        return " "
    share = _share(value, min(known), max(known))
    return levels[min(int(share * len(levels)), len(levels) - 1)]


def _share(value: float, low: float, high: float) -> float:
    """Return where a value lies between two others, from 0 to 1; by its logarithm if they are far apart."""
    if low > 0 and high / low > _WIDE:
        value, low, high = math.log(value), math.log(low), math.log(high)
    length = high - low
    return (value - low) / length if 0 < length < math.inf else 0.5 if not length else float(value > 0)


def draw(runs: Sequence[Diagnosis], path: str | os.PathLike[str]) -> int:
    """Write a picture of the curves of up to 12 runs, with the best evaluation and the onset.

    Returns:
        Number of runs that were left out.

    Raises:
        ImportError: If Pillow is not installed.
        OSError: If the file can't be written.
        ValueError: If its suffix names no picture format.
    """
    from PIL import Image, ImageDraw  # noqa: PLC0415 - need not be installed

    shown = runs[:_PANELS]
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    picture = Image.new("RGB", (columns * _SIZE[0], rows * _SIZE[1]), "white")
    pen = ImageDraw.Draw(picture)
    for number, one in enumerate(shown):
        _panel(pen, one, (number % columns * _SIZE[0], number // columns * _SIZE[1]))
    picture.save(path)
    return len(runs) - len(shown)


def _panel(pen: "ImageDraw.ImageDraw", one: Diagnosis, corner: tuple[int, int]) -> None:
    """Draw a run into its panel."""
    left, top = corner[0] + _MARGIN[0], corner[1] + _MARGIN[1]
    right, bottom = corner[0] + _SIZE[0] - _MARGIN[2], corner[1] + _SIZE[1] - _MARGIN[3]
    pen.rectangle((left, top, right, bottom), outline=_COLOURS["frame"])
    finite = [value for curve in (one.train_losses, one.losses) for value in curve if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    first, last = one.steps[0], one.steps[-1]

    def x(index: int) -> float:
        return left + _share(one.steps[index], first, last) * (right - left) if last > first else (left + right) / 2

    for name, curve in (("train", one.train_losses), ("val", one.losses)):
        points = [
            (x(i), bottom - _share(value, low, high) * (bottom - top)) if math.isfinite(value) else None
            for i, value in enumerate(curve)
        ]
        for a, b in pairwise(points):
            if a and b:
                pen.line((*a, *b), fill=_COLOURS[name], width=2)
    for name, index in (("best", one.verdict.best), ("onset", one.verdict.onset)):
        if index is not None:
            pen.line((x(index), top, x(index), bottom), fill=_COLOURS[name])
    title = f"{one.run} {one.part} {one.verdict.status}"
    for text, place in (
        (title, (left, corner[1] + 8)),
        (f"{high:.4g}", (corner[0] + 4, top)),
        (f"{low:.4g}", (corner[0] + 4, bottom - 12)),
        (f"{first:.6g}", (left, bottom + 6)),
        (f"{last:.6g}", (right - 40, bottom + 6)),
    ):
        pen.text(place, text[:70].encode("ascii", "replace").decode(), fill="black")
