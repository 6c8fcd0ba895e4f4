"""A confusion matrix as an image, drawn with Pillow, which TensorBoard depends on."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fitwatch.records import Image

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from PIL.ImageDraw import ImageDraw as Draw

MOST_CLASSES = 20
"""With more classes, cells are plain blocks, so that the image fits a screen."""

_WIDE = 5
"""With more classes, the names of the columns stand upright, and cells hold one number: cards scale pictures down."""

_WHITE, _INK, _FAINT = (255, 255, 255), (32, 33, 36), (95, 99, 104)
_RIGHT, _WRONG = (66, 133, 244), (230, 81, 0)  # blue on the diagonal, orange elsewhere


def confusion_image(counts: Tensor, classes: Sequence[str], costs: Tensor | None = None, *, title: str = "") -> Image:
    """Draw a confusion matrix: rows true, columns predicted.

    Each cell shows its count, its share of the row and, with costs, its total cost; with more than five classes the
    count, and nothing where it is 0. The colour is the share of the row, blue on the diagonal and orange elsewhere, so
    that the mistakes of a rare class are as visible as those of a common one.

    Args:
        counts: Counts or sums of weights, shape (C, C).
        classes: C names.
        costs: Cost of one example in each cell, shape (C, C).
        title: Text above the matrix.
    """
    from PIL import Image as Pillow  # noqa: PLC0415 - only drawing needs it
    from PIL import ImageDraw  # noqa: PLC0415

    table = counts.detach().cpu().double()
    number, blocks, wide = len(table), len(table) > MOST_CLASSES, len(table) <= _WIDE
    cell, height = (120, 78) if wide else (50, 38) if not blocks else (max(4, 720 // number),) * 2
    left, top, bottom = (108, 78, 34) if wide else (128, 166, 34) if not blocks else (34, 62, 34)
    size = (max(left + number * cell + 14, 360), top + number * height + bottom)
    picture = Pillow.new("RGB", size, _WHITE)
    draw = ImageDraw.Draw(picture)

    shares = table / table.sum(1, keepdim=True).clamp_min(1e-300)
    for i in range(number):
        for j in range(number):
            share, gap = float(shares[i, j]), 0 if blocks else 2
            # The square root, since a share of 5 % is a mistake to see.
            colour = _mix(_RIGHT if i == j else _WRONG, 0.85 * (share if i == j else share**0.5))
            x, y = left + j * cell, top + i * height
            draw.rectangle((x, y, x + cell - gap, y + height - gap), fill=colour)
            if wide:
                cost = None if costs is None or i == j else float(costs[i, j])
                _fill(draw, (x + cell // 2, y), colour, float(table[i, j]), share=share, cost=cost)
            elif not blocks and table[i, j]:
                middle = x + cell // 2 - 1, y + height // 2 - 1
                text = _number(float(table[i, j]))
                font = next((size for size in (20, 16) if draw.textlength(text, font_size=size) <= cell - 4), 12)
                draw.text(middle, text, _ink(colour), font_size=font, anchor="mm")
    draw.text((left if wide or blocks else 14, 8), title, _INK, font_size=15 if wide else 19)
    draw.text(
        (left + number * cell // 2, top - (34 if wide else 16)),
        "predicted",
        _FAINT,
        font_size=12 if wide else 16,
        anchor="mm",
    )
    draw.text((14, top - 22), "true", _FAINT, font_size=12 if wide else 16)
    if not blocks:
        for k, name in enumerate(classes):
            row = (left - 8, top + k * height + height // 2)
            draw.text(row, _short(draw, name, left - 14), _INK, font_size=15 if wide else 17, anchor="rm")
            _column(picture, _short(draw, name, cell - 6 if wide else 104), left + k * cell + cell // 2, top, wide=wide)
    if costs is not None and float(table.sum()):
        spent = float((table * costs.detach().cpu().double()).sum())
        text = f"cost {_number(spent)}, {spent / float(table.sum()):.4g} per example"
        draw.text((left, size[1] - 24), text, _INK, font_size=13)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return Image(file.getvalue(), *size)


def _column(picture: Picture, name: str, middle: int, top: int, *, wide: bool) -> None:
    """Write the name of a column above it: upright unless columns are wide."""
    from PIL import Image as Pillow  # noqa: PLC0415 - as above
    from PIL import ImageDraw  # noqa: PLC0415

    if wide:
        ImageDraw.Draw(picture).text((middle, top - 14), name, _INK, font_size=15, anchor="mm")
        return
    text = Pillow.new("RGB", (110, 22), _WHITE)
    ImageDraw.Draw(text).text((0, 11), name, _INK, font_size=17, anchor="lm")
    turned = text.rotate(90, expand=True)
    picture.paste(turned, (middle - turned.width // 2, top - turned.height - 30))


def _fill(
    draw: Draw, top: tuple[int, int], colour: tuple[int, ...], count: float, *, share: float, cost: float | None
) -> None:
    """Write the numbers of a cell."""
    x, y = top
    ink = _ink(colour)
    draw.text((x, y + 24), _number(count), ink, font_size=21, anchor="mm")
    draw.text((x, y + 46), f"{share:.1%}", ink, font_size=14, anchor="mm")
    if cost is not None:
        draw.text((x, y + 64), f"x {cost:g} = {_number(count * cost)}", ink, font_size=12, anchor="mm")


def _ink(colour: tuple[int, ...]) -> tuple[int, int, int]:
    return _INK if sum(colour) > 420 else _WHITE


def _short(draw: Draw, name: str, width: int) -> str:
    """Return the name, shortened to ``width`` pixels."""
    if draw.textlength(name, font_size=17) <= width:
        return name
    while name and draw.textlength(name + "…", font_size=17) > width:
        name = name[:-1]
    return name + "…"


def _number(value: float) -> str:
    if value != round(value):
        return f"{value:.4g}"
    return f"{value:,.0f}" if value < 1e7 else f"{value:.3g}"


def _mix(colour: tuple[int, int, int], share: float) -> tuple[int, ...]:
    """Return a mixture of white and a share of ``colour``."""
    return tuple(round(255 + (part - 255) * min(max(share, 0.0), 1.0)) for part in colour)
