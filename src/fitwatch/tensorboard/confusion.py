"""A confusion matrix as an image, drawn with Pillow, which TensorBoard depends on."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fitwatch.records import Image

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw as Draw

MOST_CLASSES = 12
"""With more classes, cells are plain blocks, so that the image fits a screen."""

_WHITE, _INK, _FAINT = (255, 255, 255), (32, 33, 36), (95, 99, 104)
_RIGHT, _WRONG = (66, 133, 244), (230, 81, 0)  # blue on the diagonal, orange elsewhere


def confusion_image(counts: Tensor, classes: Sequence[str], costs: Tensor | None = None, *, title: str = "") -> Image:
    """Draw a confusion matrix: rows true, columns predicted.

    Each cell shows its count, its share of the row and, with costs, its total cost. Diagonal cells are bluer the larger
    their share of the row; the others are more orange the larger their part of all costs (without costs, mistakes).

    Args:
        counts: Counts or sums of weights, shape (C, C).
        classes: C names.
        costs: Cost of one example in each cell, shape (C, C).
        title: Text above the matrix.
    """
    from PIL import Image as Pillow  # noqa: PLC0415 - only drawing needs it
    from PIL import ImageDraw  # noqa: PLC0415

    table = counts.detach().cpu().double()
    number, blocks = len(table), len(table) > MOST_CLASSES
    cell = max(4, 720 // number) if blocks else max(96, 200 // number)
    height = cell if blocks else 78
    left, top, bottom = (34, 62, 34) if blocks else (108, 78, 34)
    size = (max(left + number * cell + 14, 330), top + number * height + bottom)
    picture = Pillow.new("RGB", size, _WHITE)
    draw = ImageDraw.Draw(picture)

    spent = table if costs is None else table * costs.detach().cpu().double()
    off = spent.clone().fill_diagonal_(0)
    shares = table / table.sum(1, keepdim=True).clamp_min(1e-300)
    worst = float(off.max()) or 1.0
    for i in range(number):
        for j in range(number):
            part = float(shares[i, j]) if i == j else float(off[i, j]) / worst
            colour = _mix(_RIGHT if i == j else _WRONG, 0.85 * part)
            x, y = left + j * cell, top + i * height
            draw.rectangle((x, y, x + cell - 2 * (not blocks), y + height - 2 * (not blocks)), fill=colour)
            if not blocks:
                cost = None if costs is None or i == j else float(costs[i, j])
                _fill(draw, (x + cell // 2, y), colour, float(table[i, j]), share=float(shares[i, j]), cost=cost)
    draw.text((left, 8), title, _INK, font_size=15)
    draw.text((left + number * cell // 2, top - (16 if blocks else 34)), "predicted", _FAINT, font_size=12, anchor="mm")
    draw.text((14, top - 14), "true", _FAINT, font_size=12)
    if not blocks:
        for k, name in enumerate(classes):
            column, row = (left + k * cell + cell // 2, top - 12), (left - 8, top + k * height + height // 2)
            draw.text(column, _short(draw, name, cell - 6), _INK, font_size=13, anchor="mm")
            draw.text(row, _short(draw, name, left - 16), _INK, font_size=13, anchor="rm")
    if costs is not None and float(table.sum()):
        total, mean = float(spent.sum()), float(spent.sum() / table.sum())
        draw.text((left, size[1] - 24), f"cost {_number(total)}, {mean:.4g} per example", _INK, font_size=13)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return Image(file.getvalue(), *size)


def _fill(
    draw: Draw, top: tuple[int, int], colour: tuple[int, ...], count: float, *, share: float, cost: float | None
) -> None:
    """Write the numbers of a cell."""
    x, y = top
    ink = _INK if sum(colour) > 420 else _WHITE
    draw.text((x, y + 24), _number(count), ink, font_size=19, anchor="mm")
    draw.text((x, y + 45), f"{share:.1%}", ink, font_size=12, anchor="mm")
    if cost is not None:
        draw.text((x, y + 62), f"x {cost:g} = {_number(count * cost)}", ink, font_size=12, anchor="mm")


def _short(draw: Draw, name: str, width: int) -> str:
    """Return the name, shortened to ``width`` pixels."""
    if draw.textlength(name, font_size=13) <= width:
        return name
    while name and draw.textlength(name + "…", font_size=13) > width:
        name = name[:-1]
    return name + "…"


def _number(value: float) -> str:
    if value != round(value):
        return f"{value:.4g}"
    return f"{value:,.0f}" if value < 1e7 else f"{value:.3g}"


def _mix(colour: tuple[int, int, int], share: float) -> tuple[int, ...]:
    """Return a mixture of white and a share of ``colour``."""
    return tuple(round(255 + (part - 255) * min(max(share, 0.0), 1.0)) for part in colour)
