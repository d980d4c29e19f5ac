"""A report as one HTML page: tables, plots, pictures.

In: the JSON-ready report of ``train.evaluate`` and its pictures. Out: text. Knows no model and no MLflow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data import pages
from train.report import Picture

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "pages"


def render_page(report: Mapping[str, Any], pictures: Mapping[str, Sequence[Picture]]) -> str:
    """The page of a report."""
    plots = (_detector_plots if report["kind"] == "detector" else _text_plots)(report)
    sheets = {
        name: pages.contact_sheet((each.image, each.title) for each in group)
        for name, group in pictures.items()
        if group
    }
    return pages.render("evaluation.html", folder=TEMPLATES, report=report, plots=plots, sheets=sheets, figure=figure)


def figure(value: Any) -> str:
    """A number with its interval, if it has one."""
    if isinstance(value, Mapping):
        return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    return pages.number(value)


def _whiskers(found: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Distances from the values to the ends of their intervals; a percentile interval need not hold the value."""
    distances = [[each["value"] - each["low"] for each in found], [each["high"] - each["value"] for each in found]]
    return np.maximum(distances, 0)


def _detector_plots(report: Mapping[str, Any]) -> dict[str, Markup]:
    tiers = list(report["tiers"])

    def reliability(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=pages.QUIET, linewidth=1, linestyle="--")
        for rank, tier in enumerate(tiers):
            bins = report["reliability"][tier]
            stated, observed = [each["stated"] for each in bins], [each["observed"] for each in bins]
            # the area of a point is its pictures: a bin of two says little
            axes.scatter(stated, observed, [6 + 2 * each["pictures"] for each in bins], color=pages.SERIES[rank])
            axes.plot(stated, observed, linewidth=1, color=pages.SERIES[rank], label=tier)
        axes.set(xlabel="stated probability of AI", ylabel="share that is AI", xlim=(-0.03, 1.03), ylim=(-0.05, 1.05))
        axes.legend(fontsize=8)

    def generators(axes: Any) -> None:
        names = list(report["generators"])
        places = np.arange(len(names))
        for rank, tier in enumerate(tiers):
            found = [report["generators"][name]["roc_auc"][tier] for name in names]
            values, shift = [each["value"] for each in found], (rank - 1) * 0.22
            options = {"fmt": "o", "markersize": 4, "linewidth": 1, "color": pages.SERIES[rank], "label": tier}
            axes.errorbar(values, places + shift, xerr=_whiskers(found), **options)
        axes.axvline(0.5, color=pages.QUIET, linewidth=1, linestyle="--")
        axes.set_yticks(
            places, [f"{name} ({report['generators'][name]['pictures']})".replace("$", "") for name in names]
        )
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set(xlabel="ROC AUC against all real photos", ylabel="generator (pictures)")
        axes.set_xlim(min(0.45, axes.get_xlim()[0]), 1.01)
        axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)

    clean = report["tiers"]["clean"]
    means = ", ".join(f"{name} {row['roc_auc']['clean']['value']:.2f}" for name, row in report["generators"].items())
    chances: dict[str, list[float]] = {"human": [], "ai": []}
    for id_, row in report["probabilities"].items():
        chances[report["labels"][id_]].append(row[0])
    plots: dict[str, Markup] = {}
    if "distance" in report:
        far: dict[str, list[float]] = {"human": [], "ai": []}
        for id_, chance in report["distance"]["probabilities"].items():
            far[report["labels"][id_]].append(chance)
        plots["distance"] = pages.histogram(
            "Distance from the training pictures", far, "probability of a platform's upload", "pictures", bins=25
        )
    return plots | {
        "reliability": pages.chart(
            "Reliability (area: pictures)",
            reliability,
            f"Observed share of AI pictures by stated probability; calibration error {clean['ece']:.3f} as uploaded",
            height=3.8,
        ),
        "histogram": pages.histogram(
            "Probability of AI, as uploaded", chances, "probability of AI", "pictures", bins=25, height=3.8
        ),
        "generators": pages.chart(
            "Generators, ROC AUC with intervals",
            generators,
            f"ROC AUC of each generator against all real photos, as uploaded: {means}",
            width=9.0,
            height=1.3 + 0.42 * len(report["generators"]),
        ),
    }


def _text_plots(report: Mapping[str, Any]) -> dict[str, Markup]:
    plots: dict[str, Markup] = {}
    if "length" in report:
        lengths = [int(words) for words, count in report["length"]["histogram"].items() for _ in range(count)]
        plots["lengths"] = pages.histogram("Words in a caption", {"": lengths}, "words", "captions", height=2.6)
    if "retrieval" in report:
        systems = report["retrieval"]["systems"]
        series = {
            cut.replace("_", " "): {name.replace("_", " "): row[cut]["value"] for name, row in systems.items()}
            for cut in ("recall_at_1", "recall_at_10")
        }
        plots["retrieval"] = pages.grouped_bar_chart(
            "Queries that find their picture", series, "share of queries", "what is searched"
        )
    return plots
