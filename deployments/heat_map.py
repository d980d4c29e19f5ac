"""Heat maps: the detector's evidence, view by view, laid over the whole picture.

In: one map a view and the part of the picture that each view shows. Out: one grid, or a transparent PNG to lay over
the picture. Knows no model and no HTTP.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from deployments.annotation import HeatMap
from deployments.views import Box

_ROWS = 28
#: A dark-violet-to-yellow ramp (the corner colours of matplotlib's inferno, CC0), opaque where the evidence is.
_RAMP = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], dtype=np.float32)


def combine(maps: Sequence[Sequence[Sequence[float]]], boxes: Sequence[Box]) -> np.ndarray:
    """One grid, float ``(28, 28)`` in 0..1, over the whole picture: the mean of the views that show a cell.

    Args:
        maps: for each view, rows of values in 0..1.
        boxes: for each view, (left, top, right, bottom) as fractions of the picture.
    """
    total, count = np.zeros((_ROWS, _ROWS), np.float32), np.zeros((_ROWS, _ROWS), np.float32)
    for values, (left, top, right, bottom) in zip(maps, boxes, strict=True):
        x0, y0 = int(left * _ROWS), int(top * _ROWS)
        x1, y1 = max(x0 + 1, round(right * _ROWS)), max(y0 + 1, round(bottom * _ROWS))
        picture = Image.fromarray(np.asarray(values, np.float32))
        total[y0:y1, x0:x1] += np.asarray(picture.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR))
        count[y0:y1, x0:x1] += 1
    grid = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    return np.clip(grid / grid.max() if grid.max() > 0 else grid, 0, 1)


def render_png(grid: np.ndarray, side_px: int = 448) -> bytes:
    """The grid as a square RGBA PNG, to be stretched over the picture; what moved nothing is transparent."""
    smooth = np.asarray(
        Image.fromarray(grid.astype(np.float32)).resize((side_px, side_px), Image.Resampling.BICUBIC)
    ).clip(0, 1)
    position = smooth * (len(_RAMP) - 1)
    low = position.astype(int).clip(0, len(_RAMP) - 2)
    share = (position - low)[..., None]
    colour = _RAMP[low] * (1 - share) + _RAMP[low + 1] * share
    pixels = np.dstack([colour, 215 * smooth**0.7]).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "PNG")
    return buffer.getvalue()


def heat_map(maps: Sequence[Sequence[Sequence[float]]], boxes: Sequence[Box], as_png: bool) -> HeatMap:
    """The record's heat map, as a PNG overlay or as a grid."""
    grid = combine(maps, boxes)
    if as_png:
        return HeatMap(method="grad-cam", png=base64.b64encode(render_png(grid)).decode())
    return HeatMap(method="grad-cam", grid=np.round(grid.astype(float), 3).tolist())
