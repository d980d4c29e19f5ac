"""Plots of benchmarks: one look, SVG files beside the results. Knows no benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS

#: Distinct for the colour-blind (Okabe and Ito), dark enough on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")


def save(name: str, draw: Callable[[Any], None], panels: int = 1, height: float = 3.4, folder: Path = RESULTS) -> Path:
    """Write ``results/NAME.svg``.

    Args:
        draw: is given the axes: one, or a list of ``panels`` side by side.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # text stays text, and the same figures give the same file
    style: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "legend.frameon": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.2 * panels if panels > 1 else 6.4, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(1, panels)
        for one in axes if panels > 1 else [axes]:
            one.spines[["top", "right"]].set_visible(False)
            one.grid(True, color="#dddddd", linewidth=0.6)
            one.set_axisbelow(True)
        draw(axes)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.svg"
        figure.savefig(path, metadata=dict.fromkeys(("Creator", "Date", "Format")))
    return path


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as text in columns."""
    if not rows:
        return "(nothing)"
    names = list(rows[0])
    cells = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
