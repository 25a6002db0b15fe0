"""Contact sheets: rows of frames at the same times, to look at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Frame = NDArray[np.uint8]

_CELL = 160
_GAP = 4
_LINE = 20
_SIDE = 96
"""Least width of the labels' column."""


def sample_times(frames: int, count: int = 8) -> list[int]:
    """Up to `count` frame indices spread evenly from the first to the last."""
    return sorted({round(i) for i in np.linspace(0, frames - 1, min(count, frames))})


def contact_sheet(
    path: Path, title: str, columns: Sequence[str], rows: Mapping[str, Sequence[Frame]]
) -> None:
    """Write a PNG with a title, one labelled row of frames per entry, labels over the columns.

    Args:
        path: the PNG.
        title: one line.
        columns: a label for each column.
        rows: label → frames, (H, W, 3) uint8, as many as columns.
    """
    first = next(iter(rows.values()))[0]
    width = _CELL
    height = round(width * first.shape[0] / first.shape[1])
    font = ImageFont.load_default(size=13)
    side = max(_SIDE, 2 * _GAP + math.ceil(max(map(font.getlength, rows))))
    total = (
        side + len(columns) * (width + _GAP),
        2 * _LINE + _GAP + len(rows) * (height + _GAP),
    )
    sheet = Image.new("RGB", total, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 2), title, fill="black", font=font)
    for c, label in enumerate(columns):
        draw.text((side + c * (width + _GAP), _LINE + 2), label, fill="dimgray", font=font)
    for r, (label, frames) in enumerate(rows.items()):
        top = 2 * _LINE + _GAP + r * (height + _GAP)
        draw.text((_GAP, top + height // 2 - 8), label, fill="black", font=font)
        for c, frame in enumerate(frames):
            image = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(image, (side + c * (width + _GAP), top))
    sheet.save(path, format="PNG")
