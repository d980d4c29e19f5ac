"""Plots of benchmarks: one look, SVG files beside the results. Knows no benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.load import paired
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


def compared(
    name: str, rates: Mapping[str, Sequence[float]], unit: str, goal: float | None = None, folder: Path = RESULTS
) -> str:
    """Ways of doing the same as a table, and drawn to ``results/NAME.svg``: medians as bars, lowest and highest rounds
    as whiskers.

    Args:
        rates: of each round, by way: what is held against first, and last what is held against the others.
        goal: share of the first way's that the last one should reach.
    """
    ways, ours = list(rates), list(rates)[-1]
    spread = {way: (statistics.median(values), min(values), max(values)) for way, values in rates.items()}

    def draw(axes: Any) -> None:
        for way, (middle, low, high) in spread.items():
            colour = COLOURS[0] if way == ours else COLOURS[-1]
            whiskers: dict[str, Any] = {"xerr": [[middle - low], [high - middle]], "ecolor": COLOURS[1], "capsize": 5}
            axes.barh(way, middle, color=colour, height=0.6, **whiskers)
            note = f"{middle:.4g}" if low == high else f"{middle:.4g}  [{low:.4g}, {high:.4g}]"
            axes.text(0.01, way, note, transform=axes.get_yaxis_transform(), color="white", va="center")
        if goal is not None:
            line = goal * spread[ways[0]][0]
            axes.axvline(line, color="#888888", linewidth=0.8, linestyle="--", label=f"goal: {goal:g} of {ways[0]}")
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))
        axes.invert_yaxis()
        axes.set(xlabel=unit, xlim=(0, None))

    save(name, draw, height=1.1 + 0.55 * len(ways), folder=folder)
    return table(
        [
            {
                "way": way,
                unit: f"{middle:.4g}",
                "lowest": f"{low:.4g}",
                "highest": f"{high:.4g}",
                f"{ours} to it": f"{paired(rates[ours], rates[way]):.3f}",
            }
            for way, (middle, low, high) in spread.items()
        ]
    )


def growth(
    name: str, costs: Mapping[int, Mapping[str, float]], steps: Mapping[str, str], folder: Path = RESULTS
) -> str:
    """Seconds that a thousand pictures cost, by how many there are, as a table, and drawn to ``results/NAME.svg``.

    Args:
        costs: by number of pictures: seconds of each step for a thousand.
        steps: how a step is called where people read it, from the first to the last.
    """
    counts = sorted(costs)

    def draw(axes: Any) -> None:
        below = [0.0] * len(counts)
        for (step, called), colour in zip(steps.items(), COLOURS, strict=False):
            heights = [costs[count][step] for count in counts]
            axes.bar([f"{count:,}" for count in counts], heights, bottom=below, color=colour, width=0.6, label=called)
            below = [low + height for low, height in zip(below, heights, strict=True)]
        axes.set(xlabel="pictures", ylabel="seconds for each thousand")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(steps))

    save(name, draw, folder=folder)
    return table(
        [
            {"pictures": f"{count:,}"}
            | {f"{called}, s/1,000": f"{costs[count][step]:.3f}" for step, called in steps.items()}
            | {"together": f"{sum(costs[count][step] for step in steps):.3f}"}
            for count in counts
        ]
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as text in columns."""
    if not rows:
        return "(nothing)"
    names = list(rows[0])
    cells = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
