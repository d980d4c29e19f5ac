"""HTML pages that need nothing beside them, and the charts and pictures in them.

In: a template's name and what it shows; numbers; pictures. Out: text with its style, plots (inline SVG) and pictures
(JPEG as data) in it, readable in light and in dark. Templates lie in ``page_templates/``; a caller's own ones in a
folder that it names, and they may extend ``base.html`` and import ``macros.html``.

Every chart has a title, names of its axes and a text for those who do not see it. Charts take what measurements give:
no values, one value, equal values, values that are no number. Knows no data set and no model.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape

if TYPE_CHECKING:
    from PIL.Image import Image

_TEMPLATES = Path(__file__).parent / "page_templates"
#: Colours that matplotlib writes, and the variable of ``base.html`` that takes their place in the page.
_VARIABLES = {
    "#010101": "--text",
    "#020202": "--quiet",
    "#030303": "--line",
    "#040401": "--series-1",
    "#040402": "--series-2",
    "#040403": "--series-3",
    "#040404": "--series-4",
    "#040405": "--series-5",
    "#040406": "--series-6",
}
TEXT, QUIET, LINE, *SERIES = _VARIABLES
#: Series that mean the same on every page have the same colour on every page.
_MEANINGS = {"human": SERIES[0], "stock": SERIES[0], "ai": SERIES[1], "platform": SERIES[1]}
_MEANINGS |= {"uncertain": SERIES[3], "refused": SERIES[3], "without an answer": SERIES[4]}
_MAX_BARS = 40

Picture = tuple["bytes | Image", str]
"""A picture (encoded or decoded) and what stands below it."""


def render(template: str, folder: Path | None = None, **context: Any) -> str:
    """A page.

    Args:
        template: its file name.
        folder: where it is looked for before ``page_templates``.
        context: what the template shows. A name that the template uses and that is not here is an error. Everything is
            escaped, except what the functions of this module return.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([folder, _TEMPLATES] if folder else [_TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "size": size}
    return environment.get_template(template).render(**context)


def number(value: float | int | str | None, digits: int = 3) -> str:
    """A figure as people read it: thousands apart, ``digits`` after the point, a dash when there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{digits}f}" if isinstance(value, float) else str(value)


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f} %"


def size(value: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


# ------------------------------------------------------------------------------------------------------------- charts


def chart(title: str, draw: Callable[[Any], None], alt: str, width: float = 6.4, height: float = 3.2) -> Markup:
    """What ``draw`` puts on matplotlib axes, as a titled ``<figure>``.

    Args:
        title: stands above.
        draw: given the axes; colours are this module's ``TEXT``, ``QUIET``, ``LINE`` and ``SERIES``.
        alt: what the chart shows, in a sentence with its figures.
        width: inches of 72 px; ``height`` alike.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # text stays text, and the same chart is the same bytes
    style: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, "axes.unicode_minus": False}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), TEXT)
    style |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), QUIET)
    style |= {"grid.color": LINE, "axes.axisbelow": True, "legend.frameon": False, "axes.titlesize": 9}
    with matplotlib.rc_context(style):
        drawing = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(drawing)
        axes = drawing.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[A-Za-z]\w*_\d+">', "<g>", text)  # ids that several charts of a page would share
    text = re.sub(r"font: ((?:\w+ )*[\d.]+px) [^;\"]+", r"font: \1 var(--font)", text)
    text = re.sub(r"#0[1-4]0[1-4]0[1-6]", lambda found: f"var({_VARIABLES[found[0]]})", text)
    opening = f'<svg role="img" aria-label="{escape(alt)}"'
    return Markup('<figure class="chart"><figcaption>{}</figcaption>{}</figure>').format(
        title,
        Markup(text.replace("<svg", opening, 1)),  # noqa: S704  matplotlib escapes, `alt` is escaped  # nosec B704
    )


def bar_chart(
    title: str, values: Mapping[str, float], x: str, y: str, *, order: bool = False, width: float = 6.4
) -> Markup:
    """Horizontal bars, one for each name.

    Args:
        title: stands above.
        values: name -> value.
        x: name of the axis of values.
        y: name of the axis of names.
        order: the longest first; else as they come. More than 40 are cut to the 40 that come first.
        width: inches.
    """
    return grouped_bar_chart(title, {"": values}, x, y, order=order, width=width)


def grouped_bar_chart(
    title: str,
    series: Mapping[str, Mapping[str, float]],
    x: str,
    y: str,
    *,
    order: bool = False,
    width: float = 6.4,
) -> Markup:
    """Horizontal bars side by side, one of each series for each name; arguments as ``bar_chart``."""
    names = list(dict.fromkeys(name for values in series.values() for name in values))
    if order:
        names.sort(key=lambda name: -sum(_finite(values.get(name)) for values in series.values()))
    if not names:
        return nothing(title)
    cut = len(names) - _MAX_BARS
    names = names[:_MAX_BARS]
    places = np.arange(len(names))
    thickness = 0.8 / len(series)

    def draw(axes: Any) -> None:
        for rank, (label, values) in enumerate(series.items()):
            lengths = [_finite(values.get(name)) for name in names]
            offset = (rank - (len(series) - 1) / 2) * thickness
            bars = axes.barh(places + offset, lengths, thickness * 0.92, color=colour(label, rank), label=label or None)
            axes.bar_label(bars, [_short(length) for length in lengths], padding=3, fontsize=8, color=QUIET)
        axes.set_yticks(places, [_cut(name) for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set(xlabel=x, ylabel=y)
        axes.margins(x=0.12)
        if all(_finite(v) == 0 for values in series.values() for v in values.values()):
            axes.set_xlim(0, 1)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", linewidth=0.6)
        _legend(axes, series)

    said = "; ".join(
        (f"{label}: " if label else "") + ", ".join(f"{name} {_short(_finite(values.get(name)))}" for name in names)
        for label, values in series.items()
    )
    more = f"; {cut} more are not shown" if cut > 0 else ""
    height = 0.95 + len(names) * max(0.26, 0.17 * len(series)) + (0.3 if len(series) > 1 else 0)
    return chart(title, draw, f"{title}. {x} by {y}: {said}{more}", width, height)


def line_chart(
    title: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x: str,
    y: str,
    *,
    steps: bool = False,
    from_zero: bool = True,
    log: bool = False,
    width: float = 6.4,
    height: float = 3.0,
) -> Markup:
    """Lines over a numeric axis: name -> (places, values). Values that are no number leave a gap.

    Args:
        title: stands above.
        series: what is drawn; a series of one value is a point.
        x: name of the horizontal axis.
        y: name of the vertical axis.
        steps: a value holds until the next place.
        from_zero: the vertical axis starts at 0.
        log: the vertical axis is logarithmic; values of 0 or less leave a gap.
        width: inches; ``height`` alike.
    """
    drawn = {}
    for name, (places, values) in series.items():
        points = np.array([np.asarray(places, float), np.asarray(values, float)])
        if log:
            points[1][~(points[1] > 0)] = np.nan
        if np.isfinite(points).all(axis=0).any():
            drawn[name] = points
    if not drawn:
        return nothing(title)

    def draw(axes: Any) -> None:
        for rank, (name, (places, values)) in enumerate(drawn.items()):
            few = np.isfinite(values).sum() <= 30
            axes.plot(
                places,
                values,
                color=colour(name, rank),
                label=name,
                linewidth=1.5,
                drawstyle="steps-post" if steps else "default",
                marker="o" if few and not steps else None,
                markersize=3.5,
            )
        axes.set(xlabel=x, ylabel=y)
        if log:
            axes.set_yscale("log")
        elif from_zero:
            highest = max(float(np.nanmax(values)) for _, values in drawn.values())
            axes.set_ylim(0, highest * 1.08 if highest > 0 else 1)
        axes.grid(linewidth=0.6)
        _legend(axes, drawn)

    said = "; ".join(
        f"{name or y} from {_short(float(np.nanmin(values)))} to {_short(float(np.nanmax(values)))}"
        for name, (_, values) in drawn.items()
    )
    return chart(title, draw, f"{title}. {y} over {x}: {said}", width, height)


def histogram(
    title: str,
    series: Mapping[str, Sequence[float]],
    x: str,
    y: str,
    *,
    bins: int = 30,
    log: bool = False,
    width: float = 6.4,
    height: float = 3.0,
) -> Markup:
    """How often values occur, for each series, in bins that all have the same and some width.

    Args:
        title: stands above.
        series: name -> values; those that are no number are left out.
        x: what the values are.
        y: what is counted.
        bins: how many, at most.
        log: bins of the same width in the logarithm; values of 0 or less are left out.
        width: inches; ``height`` alike.
    """
    kept = {}
    for name, values in series.items():
        array = np.asarray(list(values), float)
        array = array[np.isfinite(array) & ((array > 0) | (not log))]
        if len(array):
            kept[name] = array
    if not kept:
        return nothing(title)
    from matplotlib.ticker import LogLocator, NullLocator

    edges = bin_edges(np.concatenate(list(kept.values())), bins, log)

    def draw(axes: Any) -> None:
        for rank, (name, values) in enumerate(kept.items()):
            counts, _ = np.histogram(values, edges)
            shade = colour(name, rank)
            axes.stairs(counts, edges, fill=True, color=shade, alpha=0.35 if len(kept) > 1 else 0.85)
            axes.stairs(counts, edges, color=shade, linewidth=1.2, label=name)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(lambda value, _: _short(value))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel=x, ylabel=y)
        axes.grid(axis="y", linewidth=0.6)
        _legend(axes, kept)

    said = "; ".join(
        f"{name or y}: {len(values)} values from {_short(values.min())} to {_short(values.max())}, "
        f"median {_short(float(np.median(values)))}"
        for name, values in kept.items()
    )
    return chart(title, draw, f"{title}. {y} by {x}. {said}", width, height)


def bin_edges(values: Sequence[float] | np.ndarray, bins: int, log: bool = False) -> np.ndarray:
    """Edges of at most ``bins`` bins over finite values, strictly increasing whatever the values are.

    Whole numbers get bins of whole width, so that none has more of them than its neighbours.
    """
    array = np.asarray(values, float)
    if log:
        low, high = math.log10(array.min()), math.log10(array.max())
        return 10 ** _even_edges(low, high, bins)
    low, high = float(array.min()), float(array.max())
    if (array == np.round(array)).all() and high < 2**52:
        step = max(1, math.ceil((high - low + 1) / bins))
        return low - 0.5 + step * np.arange(math.ceil((high - low + 1) / step) + 1)
    return _even_edges(low, high, bins)


def _even_edges(low: float, high: float, bins: int) -> np.ndarray:
    # values that differ by less than floats can divide are one value
    least = max(1e-9, 1e-9 * max(abs(low), abs(high)))
    if high - low < least:
        half = max(0.5 * abs(low) * 0.1, 1e-6)
        return np.array([low - half, high + half])
    return np.linspace(low, high, bins + 1)


def nothing(title: str) -> Markup:
    """Stands where a chart would be that has no values."""
    return Markup('<figure class="chart"><figcaption>{}</figcaption><p class="empty">no values</p></figure>').format(
        title
    )


def colour(name: str, rank: int) -> str:
    """A series' colour: by meaning if it has one, by rank otherwise."""
    return _MEANINGS.get(name, SERIES[rank % len(SERIES)])


def _legend(axes: Any, series: Mapping[str, Any]) -> None:
    if len(series) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=min(4, len(series)), fontsize=8, borderaxespad=0.2)


def _finite(value: float | None) -> float:
    return float(value) if value is not None and math.isfinite(value) else 0.0


def _short(value: float) -> str:
    value = float(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _cut(name: str, length: int = 34) -> str:
    # matplotlib would take two $ for mathematics
    return (name if len(name) <= length else name[: length - 1] + "…").replace("$", r"\$")


# ----------------------------------------------------------------------------------------------------------- pictures


def contact_sheet(pictures: Iterable[Picture], side_px: int = 240) -> Markup:
    """Small versions of pictures with a line or two below each; those that do not decode leave an empty place."""
    places = [
        Markup('<figure>{}<figcaption title="{}">{}</figcaption></figure>').format(
            _image(picture, text, side_px), text, text
        )
        for picture, text in pictures
    ]
    return Markup('<div class="sheet">{}</div>').format(Markup("").join(places))


def _image(picture: bytes | Image, alt: str, side_px: int) -> Markup:
    source = thumbnail(picture, side_px)
    if source is None:
        return Markup('<div class="unreadable">not readable</div>')
    data = base64.b64encode(source).decode()
    return Markup('<img src="data:image/jpeg;base64,{}" alt="{}">').format(data, alt)


def thumbnail(picture: bytes | Image, side_px: int = 240) -> bytes | None:
    """A picture at ``side_px`` at most, as JPEG; None if it does not decode."""
    from PIL import ImageOps

    from deployments.images import ImageError, ImageLimits, decode

    if isinstance(picture, bytes):
        try:
            image = decode(picture, ImageLimits(min_side_px=1)).image
        except ImageError:
            return None
    else:
        image = ImageOps.exif_transpose(picture)
    small = image.convert("RGB")
    small.thumbnail((side_px, side_px))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()
