"""A reliability diagram as an image: how often predictions come true, by how sure they are."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from torch import Tensor

from fitwatch.calibration.reliability import calibration_error
from fitwatch.records import Image

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw as Draw

_SIDE, _LEFT, _TOP, _BELOW = 260, 52, 62, 84  # of one panel, in pixels
_WHITE, _INK, _FAINT, _LINE = (255, 255, 255), (32, 33, 36), (95, 99, 104), (218, 220, 224)
_BAR, _GAP = (66, 133, 244), (244, 180, 148)


def reliability_image(tables: Tensor, *, title: str = "") -> Image:
    """Draw the share of predictions that came true in bins of their confidence, before and after calibration.

    A calibrated model has its bars on the diagonal; what lacks or exceeds is orange. Below each bar stands a mark whose
    height is the share of the predictions in that bin.

    Args:
        tables: Two tables of `reliability`, shape (2, 3, bins): before, and after.
        title: Text above the diagrams.
    """
    from PIL import Image as Pillow  # noqa: PLC0415 - only drawing needs it
    from PIL import ImageDraw  # noqa: PLC0415

    size = (2 * (_SIDE + _LEFT) + 24, _TOP + _SIDE + _BELOW)
    picture = Pillow.new("RGB", size, _WHITE)
    draw = ImageDraw.Draw(picture)
    draw.text((_LEFT, 8), title, _INK, font_size=15)
    for panel, (name, table) in enumerate(zip(("before calibration", "after"), tables.cpu().double(), strict=True)):
        _panel(draw, panel * (_SIDE + _LEFT) + _LEFT, name, table)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return Image(file.getvalue(), *size)


def _panel(draw: Draw, left: int, name: str, table: Tensor) -> None:
    """Draw one diagram."""
    weight, confidence, truth = table.tolist()
    bins, total, bottom = len(weight), sum(weight) or 1.0, _TOP + _SIDE
    draw.text((left, _TOP - 22), f"{name}: error {calibration_error(table):.1%}", _INK, font_size=13)
    draw.rectangle((left, _TOP, left + _SIDE, bottom), outline=_LINE)
    for k, (w, c, t) in enumerate(zip(weight, confidence, truth, strict=True)):
        if not w:
            continue
        x, right = left + round(k * _SIDE / bins) + 1, left + round((k + 1) * _SIDE / bins) - 1
        right_share, sure = bottom - round(t / w * _SIDE), bottom - round(c / w * _SIDE)
        draw.rectangle((x, right_share, right, bottom), fill=_BAR)
        draw.rectangle((x, min(right_share, sure), right, max(right_share, sure)), fill=_GAP)
        draw.rectangle((x, bottom + 44 - max(1, round(w / total * 40)), right, bottom + 44), fill=_FAINT)
    draw.line((left, bottom, left + _SIDE, _TOP), fill=_INK)
    for value in (0, 0.5, 1):
        draw.text((left + value * _SIDE, bottom + 56), f"{value:g}", _FAINT, font_size=12, anchor="mm")
        draw.text((left - 6, bottom - value * _SIDE), f"{value:g}", _FAINT, font_size=12, anchor="rm")
    draw.text((left + _SIDE // 2, bottom + 72), "confidence", _FAINT, font_size=12, anchor="mm")
    draw.text((left + 4, _TOP + 4), "share that came true", _FAINT, font_size=12)
