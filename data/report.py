"""Quality report of a prepared version: what is in it, what was left out, and whether the files give the class away.

    python -m data.report VERSION

In: the place of a finished version. Out: ``report.html``, one page that needs nothing beside it, and ``report.json``,
its figures, both beside the manifest; ``data.prepare`` makes them at its end. The version itself is not touched, and
stays finished without them. Pictures are not decoded except for the few that are shown. Knows no model.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ConfigDict, Field
from pydantic_settings import CliPositionalArg

from data.browse import pictures, rows
from data.commands import parse
from data.errors import end
from data.leakage import ProbeSettings, probe, summary
from data.locations import Location
from data.pages import (
    QUIET,
    Markup,
    Picture,
    bar_chart,
    chart,
    colour,
    contact_sheet,
    grouped_bar_chart,
    histogram,
    number,
    render,
)
from data.versions import SPLITS, DataVersion, open_version

if TYPE_CHECKING:
    import pandas as pd

PAGE, FIGURES = "report.html", "report.json"
_QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
#: What is shown of each kind.
_EXAMPLES, _GROUPS, _REJECTS, _DOTS, _WORDS = 8, 6, 200, 4000, 25


class ReportConfig(ProbeSettings):
    """Which version."""

    model_config = ConfigDict(extra="forbid", title="Quality report of a prepared version")

    version: CliPositionalArg[str] = Field(description="NAME/VERSION, or NAME for the one made last; local or s3://")


def write_report(version: str | Location | DataVersion, settings: ProbeSettings | None = None) -> dict[str, Any]:
    """Write both files beside the manifest and answer the figures.

    Raises:
        DataError: there is no such version, or its place cannot be written.
    """
    opened = version if isinstance(version, DataVersion) else open_version(version)
    frame = rows(opened)
    figures = measure(opened, frame, settings)
    page = _page(opened, frame, figures)
    (opened.location / PAGE).write_text(page)
    (opened.location / FIGURES).write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")
    return figures


def measure(version: DataVersion, frame: pd.DataFrame, settings: ProbeSettings | None = None) -> dict[str, Any]:
    """The figures of a report, ready for JSON.

    Args:
        version: whose manifest is quoted.
        frame: its rows (``data.browse.rows``).
        settings: of the leakage probe.
    """
    manifest = version.manifest
    labelled = "label" in frame
    by = frame["label"] if labelled else None
    figures: dict[str, Any] = {
        "name": manifest.name,
        "version": manifest.version,
        "created_at": manifest.created_at,
        "input": manifest.input,
        "settings": manifest.settings,
        "rows_listed": manifest.input_rows,
        "pictures": len(frame),
        "splits": {
            split: {
                "pictures": manifest.counts.get(split, 0),
                "bytes": manifest.image_bytes.get(split, 0),
                "labels": manifest.class_balance.get(split, {}),
                "captions": manifest.captions.get(split, 0),
            }
            for split in SPLITS
        },
        "checks": {name: check.model_dump() for name, check in manifest.checks.items()},
        "rejects": manifest.rejects,
        "sources": _crossed(frame["source"], by),
        "generators": _crossed(frame["generator"].fillna("unknown"), by),
        "formats": _crossed(frame["format"], by),
        "modes": _crossed(frame["mode"], by),
        "missing": {name: int(frame[name].isna().sum()) for name in frame.columns},
        "declared": dict(Counter(_trace(text) for row in frame["declared"] for text in row).most_common(40)),
        "sizes": {
            name: {label: _quantiles(part[name]) for label, part in _parts(frame)}
            for name in ("width", "height", "bytes", "jpeg_quality")
        },
        "quantisation_tables": {label: int(part["quantisation"].nunique()) for label, part in _parts(frame)},
        "groups": manifest.groups,
    }
    if labelled:
        figures["leakage"] = probe(frame, settings)
    if "captions" in frame:
        figures["captions"] = _captions(frame)
    return figures


def _parts(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """All rows, then those of each label."""
    parts = [("all", frame)]
    if "label" in frame:
        parts += [(label, frame[frame["label"] == label]) for label in sorted(frame["label"].unique())]
    return parts


def _crossed(column: pd.Series, by: pd.Series | None) -> dict[str, dict[str, int]]:
    """value -> label (or ``all``) -> pictures, the commonest value first."""
    result = {}
    for value, count in column.value_counts().sort_index().sort_values(ascending=False, kind="stable").items():
        own = {"all": int(count)}
        if by is not None:
            own |= {label: int((by[column == value] == label).sum()) for label in sorted(by.unique())}
        result[str(value)] = own
    return result


def _quantiles(column: pd.Series) -> dict[str, float | None]:
    values = column.dropna().to_numpy(float)
    names = ("least", "p5", "median", "p95", "most")
    if not len(values):
        return dict.fromkeys(names)
    return {name: round(float(found), 2) for name, found in zip(names, np.quantile(values, _QUANTILES), strict=True)}


def _trace(text: str) -> str:
    """``exif:Make=Canon`` without its value, which may name somebody."""
    return text.split("=", 1)[0]


def _captions(frame: pd.DataFrame) -> dict[str, Any]:
    """Lengths, vocabulary, and what evaluation meets that training did not."""
    words = {split: Counter[str]() for split in SPLITS}
    lengths: Counter[int] = Counter()
    repeated: Counter[str] = Counter()
    for split, texts in zip(frame["split"], frame["captions"], strict=True):
        for text in texts:
            pieces = text.split()
            words[split].update(pieces)
            lengths[len(pieces)] += 1
            repeated[text] += 1
    total: Counter[str] = sum(words.values(), Counter())
    known = words["train"]
    unknown = {
        split: {
            "words": sum(1 for word in words[split] if word not in known),
            "share_of_text": round(
                sum(count for word, count in words[split].items() if word not in known) / words[split].total(), 4
            ),
        }
        for split in SPLITS
        if split != "train" and words[split]
    }
    return {
        "captions": sum(lengths.values()),
        "a_picture": {str(k): v for k, v in sorted(Counter(len(texts) for texts in frame["captions"]).items())},
        "words": total.total(),
        "vocabulary": len(total),
        "used_once": sum(count == 1 for count in total.values()),
        "lengths": {str(k): v for k, v in sorted(lengths.items())},
        "commonest": dict(total.most_common(_WORDS)),
        "not_in_train": unknown,
        "said_more_than_once": sum(count for count in repeated.values() if count > 1),
        "changed_by_cleaning": sum(
            clean != raw
            for cleaned, raws in zip(frame["captions"], frame["raw_captions"], strict=True)
            for clean, raw in zip(cleaned, raws, strict=True)
        ),
    }


# --------------------------------------------------------------------------------------------------------------- page


def _page(version: DataVersion, frame: pd.DataFrame, figures: dict[str, Any]) -> str:
    rejects = version.table("rejects").to_pandas().head(_REJECTS)
    examples = _examples(frame)
    groups = _groups(frame)
    shown = [id_ for ids in examples.values() for id_ in ids] + [id_ for ids in groups for id_ in ids]
    found = pictures(version, shown)
    texts = {row["id"]: _describe(row) for row in frame[frame["id"].isin(set(shown))].to_dict("records")}

    def sheet(ids: Sequence[str]) -> Markup:
        shots: list[Picture] = [(found[id_], texts[id_]) for id_ in ids if id_ in found]
        return contact_sheet(shots)

    return render(
        "quality.html",
        figures=figures,
        charts=_charts(frame, figures),
        captions=_caption_charts(figures),
        leakage=_leakage_charts(figures),
        rejects=[
            [row["reason"], row["file_name"], row["label"] if isinstance(row["label"], str) else "–", row["detail"]]
            for row in rejects.to_dict("records")
        ],
        examples={name: sheet(ids) for name, ids in examples.items()},
        groups=[sheet(ids) for ids in groups],
        labels=sorted(frame["label"].unique()) if "label" in frame else [],
    )


def _describe(row: dict[str, Any]) -> str:
    """What stands below an example."""
    parts = [row["label"] if "label" in row else row["captions"][0] if len(row["captions"]) else "no caption"]
    generator = row["generator"]
    parts += [generator] if isinstance(generator, str) and generator != "photo" else []
    quality = row["jpeg_quality"]
    kind = f"{row['format']} q{int(quality)}" if quality is not None and math.isfinite(quality) else row["format"]
    parts += [row["source"], f"{row['width']} x {row['height']}", kind, row["split"]]
    return " · ".join(parts)


def _examples(frame: pd.DataFrame) -> dict[str, list[str]]:
    """Ids to look at: the first ones of each label, which ids being hashes are random ones."""
    ordered = frame.sort_values("id")
    if "label" not in frame:
        return {"photos": ordered["id"].head(_EXAMPLES).tolist()}
    return {
        str(label): ordered.loc[ordered["label"] == label, "id"].head(_EXAMPLES).tolist()
        for label in sorted(frame["label"].unique())
    }


def _groups(frame: pd.DataFrame) -> list[list[str]]:
    """Ids of the largest groups of more than one picture."""
    sizes = frame.groupby("group").size()
    sizes = sizes[sizes > 1].sort_index().sort_values(ascending=False, kind="stable").head(_GROUPS)
    return [frame.loc[frame["group"] == name, "id"].sort_values().head(4).tolist() for name in sizes.index]


def _series(frame: pd.DataFrame, column: str) -> dict[str, list[float]]:
    """Values of a column, a series for each label."""
    parts = _parts(frame)
    return {name: part[column].dropna().to_list() for name, part in (parts[1:] or parts)}


def _by_label(crossed: dict[str, dict[str, int]]) -> dict[str, dict[str, float]]:
    """value -> label -> count turned over, without the sum if there are labels."""
    labels = list(dict.fromkeys(label for row in crossed.values() for label in row))
    kept = [label for label in labels if label != "all"] or labels
    return {label: {value: row.get(label, 0) for value, row in crossed.items()} for label in kept}


def _charts(frame: pd.DataFrame, figures: dict[str, Any]) -> dict[str, Markup]:
    splits = {split: row["labels"] or {"all": row["pictures"]} for split, row in figures["splits"].items()}
    found = {
        "splits": grouped_bar_chart("Pictures by split", _by_label(splits), "pictures", "split"),
        "rejects": bar_chart("Rejected rows by reason", figures["rejects"], "rows", "reason", order=True),
        "sources": grouped_bar_chart("Pictures by source", _by_label(figures["sources"]), "pictures", "source"),
        "generators": grouped_bar_chart(
            "Pictures by generator", _by_label(figures["generators"]), "pictures", "generator"
        ),
        "formats": grouped_bar_chart("Pictures by format", _by_label(figures["formats"]), "pictures", "format"),
        "modes": grouped_bar_chart("Pictures by pixel mode", _by_label(figures["modes"]), "pictures", "mode"),
        "dimensions": _dimensions(frame),
        "quality": histogram("JPEG quality", _series(frame, "jpeg_quality"), "quality (libjpeg's scale)", "pictures"),
        "bytes": histogram("File length", _series(frame, "bytes"), "bytes", "pictures", log=True),
        "density": histogram(
            "Bytes a pixel",
            _series(frame.assign(density=frame["bytes"] / (frame["width"] * frame["height"])), "density"),
            "bytes a pixel",
            "pictures",
            log=True,
        ),
    }
    return found


def _dimensions(frame: pd.DataFrame) -> Markup:
    sample = frame.sort_values("id").head(_DOTS)
    parts = _parts(sample)
    shown = parts[1:] or parts

    def draw(axes: Any) -> None:
        for rank, (name, part) in enumerate(shown):
            # the same size twice is one dot: its area says how often
            counts = part.groupby(["width", "height"]).size()
            at = np.array(counts.index.to_list()).reshape(-1, 2)
            area = 8 + 300 * counts.to_numpy() / max(1, len(sample))
            axes.scatter(at[:, 0], at[:, 1], area, color=colour(name, rank), alpha=0.45, linewidths=0, label=name)
        axes.set(xlabel="width, px", ylabel="height, px")
        axes.set_xlim(0)
        axes.set_ylim(0)
        axes.grid(linewidth=0.6, color=QUIET, alpha=0.2)
        if len(shown) > 1:
            legend = axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=8)
            for handle in legend.legend_handles:
                handle.set_sizes([30])

    sizes = "; ".join(
        f"{name}: median {part['width'].median():.0f} x {part['height'].median():.0f} px" for name, part in shown
    )
    return chart("Width and height", draw, f"Width and height of pictures. {sizes}", height=3.6)


def _leakage_charts(figures: dict[str, Any]) -> dict[str, Markup]:
    if "leakage" not in figures:
        return {}
    views = figures["leakage"]["class"]["views"]
    sources = figures["leakage"]["sources"]["by_source"]
    return {"class": _auc_chart("The class, seen by", views), "sources": _auc_chart("Sources of real photos", sources)}


def _auc_chart(title: str, found: dict[str, dict[str, Any]]) -> Markup:
    from data.leakage import CONFOUNDED, TRACES
    from data.pages import SERIES, nothing

    measured = {name: row for name, row in found.items() if row["auc"] is not None}
    if not measured:
        return nothing(title)

    def draw(axes: Any) -> None:
        places = np.arange(len(measured))
        values = np.array([row["auc"] for row in measured.values()])
        spread = [[row["auc"] - row["low"], row["high"] - row["auc"]] for row in measured.values()]
        # a bootstrap percentile interval need not hold the value itself
        errors = np.maximum(np.array(spread).T, 0)
        axes.errorbar(values, places, xerr=errors, fmt="o", color=SERIES[2], markersize=5, linewidth=1.5)
        for border, text in ((0.5, "chance"), (TRACES, "traces"), (CONFOUNDED, "confounded")):
            axes.axvline(border, color=QUIET, linewidth=0.8, linestyle="--")
            axes.text(border, -0.75, f" {text}", fontsize=8, color=QUIET, va="center")
        axes.set_yticks(places, [name.replace("$", r"\$") for name in measured])
        axes.set_ylim(len(measured) - 0.5, -1)
        axes.set_xlim(min(0.4, float(values.min()) - 0.05), 1.02)
        axes.set(xlabel="ROC AUC (95 % interval)")

    said = ", ".join(f"{name} {row['auc']:.3f}" for name, row in measured.items())
    return chart(title, draw, f"{title}: ROC AUC {said}; 0.5 is chance", height=1.3 + 0.32 * len(measured))


def _caption_charts(figures: dict[str, Any]) -> dict[str, Markup]:
    if "captions" not in figures:
        return {}
    lengths = [float(words) for words, count in figures["captions"]["lengths"].items() for _ in range(count)]
    return {
        "lengths": histogram("Length of captions", {"": lengths}, "words", "captions"),
        "commonest": bar_chart("Commonest words", figures["captions"]["commonest"], "times", "word", order=True),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report of the version that the command line names, and say where it lies."""
    config = parse(ReportConfig, arguments)
    try:
        version = open_version(config.version)
        figures = write_report(version, config)
    except Exception as error:
        end(error)
    print(f"{figures['name']}/{figures['version']}: {number(figures['pictures'])} pictures", flush=True)
    if "leakage" in figures:
        print("\n".join(summary(figures["leakage"])), flush=True)
    print(f"written: {version.location / PAGE} and {FIGURES}", flush=True)


if __name__ == "__main__":
    main()
