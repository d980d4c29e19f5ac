"""Pictures with words under them: one sheet to look at.

In: RGB pictures and a text for each. Out: one ``PIL.Image``. Knows no model.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_SIDE_PX, _LINE_PX, _LINES, _MARGIN_PX = 220, 16, 3, 8


def sheet(pictures: Sequence[tuple[Image.Image, str]], columns: int = 4) -> Image.Image:
    """The pictures in rows of ``columns``, each scaled to fit a square, at most three lines of text below it."""
    rows = max(1, -(-len(pictures) // columns))
    width, height = _SIDE_PX + _MARGIN_PX, _SIDE_PX + _LINES * _LINE_PX + 2 * _MARGIN_PX
    page = Image.new("RGB", (columns * width + _MARGIN_PX, rows * height + _MARGIN_PX), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for index, (picture, text) in enumerate(pictures):
        left, top = _MARGIN_PX + index % columns * width, _MARGIN_PX + index // columns * height
        small = picture.convert("RGB")
        small.thumbnail((_SIDE_PX, _SIDE_PX))
        page.paste(small, (left + (_SIDE_PX - small.width) // 2, top + (_SIDE_PX - small.height) // 2))
        lines = textwrap.wrap(text, 33, max_lines=_LINES, placeholder=" …")
        for number, line in enumerate(lines):
            draw.text((left, top + _SIDE_PX + 4 + number * _LINE_PX), line, fill="black", font=font)
    return page
