"""Leakage probes: can the class of a picture be told without looking at it?

In: rows of a prepared version with labels. Out: ROC AUC of classifiers that see format, size, quantisation tables and
file length, never a pixel, and a verdict. If such a classifier is good the data are confounded: a detector trained on
them can learn the files instead of the pictures, and figures on a test split of the same data do not show it.

Two probes. ``class``: the label. ``sources``: which source a *real* photo comes from; where sources can be told apart
and classes are not the same in each, a source is a short cut to the class. Both by five-fold cross-validation that
keeps each group of near-duplicates and twins in one fold. Knows no files.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from data.splits import assign_splits

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["confounded", "traces", "clean", "not measurable"]
#: ROC AUC from which the files say too much, and from which they say something.
CONFOUNDED, TRACES = 0.8, 0.6
#: What each classifier sees.
VIEWS: dict[str, tuple[str, ...]] = {
    "all": ("format", "size", "length", "quantisation"),
    "format": ("format",),
    "size": ("size",),
    "length": ("length",),
    "quantisation": ("quantisation",),
}
_FOLDS = 5
#: Tables seen less often than this many others are one category.
_TABLES = 48
_RESAMPLES = 200
_LEAST_OF_SOURCE = 20
_WORDS = {
    "confounded": "The files alone give the class away. A detector trained on these data can learn codec and size "
    "instead of pictures: encode both classes alike before training, and trust only figures on re-encoded pictures and "
    "on generators that training did not see.",
    "traces": "The files say something about the class. Encode both classes alike before training, and evaluate on "
    "re-encoded pictures too.",
    "clean": "The files say little about the class.",
    "not measurable": "Too few pictures or groups of each class for cross-validation.",
}


class ProbeSettings(BaseModel):
    """How the probes are done."""

    model_config = ConfigDict(extra="forbid")

    probe_pictures: int = Field(5_000, ge=50, description="pictures that the leakage probes look at, at most")
    probe_trees: int = Field(40, ge=1, description="trees of each of their forests")
    probe_seed: int = Field(0, description="of folds, forests and resampling")


def probe(frame: pd.DataFrame, settings: ProbeSettings | None = None) -> dict[str, Any]:
    """Both probes of a data set with labels.

    Args:
        frame: columns ``id``, ``format``, ``mode``, ``width``, ``height``, ``bytes``, ``jpeg_quality``,
            ``quantisation``, ``label``, ``source`` and ``group`` of a version's rows.
        settings: sample and seed.

    Returns:
        ``{"class": {"verdict", "meaning", "views": {view: {"auc", "low", "high"}}, "by_source", "pictures"},
        "sources": {"verdict", "meaning", "auc", "by_source", "pictures"}}``; figures are None where they cannot be had.
    """
    settings = settings or ProbeSettings()
    # ids are hashes: the first of them are a sample, the same on every machine
    frame = frame.sort_values("id").head(settings.probe_pictures)
    return {"class": _class_probe(frame, settings), "sources": _source_probe(frame, settings)}


def verdict(auc: float | None) -> Verdict:
    """What a probe's ROC AUC says of the data."""
    if auc is None:
        return "not measurable"
    return "confounded" if auc >= CONFOUNDED else "traces" if auc >= TRACES else "clean"


def file_traits(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """What files tell without a pixel: view -> float32 ``(rows, traits)``."""
    width, height = frame["width"].to_numpy(float), frame["height"].to_numpy(float)
    length = frame["bytes"].to_numpy(float)
    tables = frame["quantisation"].fillna("none")
    common = tables.value_counts()
    # by count and name: value_counts alone leaves ties in any order
    names = sorted(common.index, key=lambda name: (-common[name], name))[:_TABLES]
    quality = frame["jpeg_quality"].to_numpy(float, na_value=-1)
    views = {
        "format": _one_hot(frame["format"]) + _one_hot(frame["mode"]),
        "size": [width, height, width / height, np.minimum(width, height), np.maximum(width, height)],
        "length": [length, length / (width * height)],
        "quantisation": [quality, *(tables.eq(name).to_numpy(float) for name in names)],
    }
    return {name: np.stack(columns, axis=1).astype(np.float32) for name, columns in views.items()}


def _one_hot(column: pd.Series) -> list[np.ndarray]:
    return [column.eq(value).to_numpy(float) for value in sorted(column.unique())]


def _class_probe(frame: pd.DataFrame, settings: ProbeSettings) -> dict[str, Any]:
    names = sorted(frame["label"].unique())
    empty = {view: {"auc": None, "low": None, "high": None} for view in VIEWS}
    result: dict[str, Any] = {"classes": names, "pictures": len(frame), "views": empty, "by_source": {}}
    if len(names) == 2:
        labels = frame["label"].eq(names[1]).to_numpy(int)
        ids, groups = frame["id"].to_numpy(str), frame["group"].to_numpy(str)
        traits = file_traits(frame)
        for view, parts in VIEWS.items():
            chances = _out_of_fold(np.hstack([traits[part] for part in parts]), labels, ids, groups, settings)
            if chances is None:
                break
            result["views"][view] = _with_interval(labels, chances, groups, settings.probe_seed)
            if view == "all":
                result["by_source"] = _by_source(frame["source"].to_numpy(str), labels, chances)
    found = verdict(result["views"]["all"]["auc"])
    return {"verdict": found, "meaning": _WORDS[found], **result}


def _by_source(sources: np.ndarray, labels: np.ndarray, chances: np.ndarray) -> dict[str, dict[str, Any]]:
    """ROC AUC within each source that has both classes: what is left when the source itself is no help."""
    found = {}
    for source in np.unique(sources):
        own = sources == source
        ones = int(labels[own].sum())
        auc = None
        if min(ones, int(own.sum()) - ones) >= 5:
            auc = roc_auc(labels[own], chances[own])
        found[str(source)] = {"pictures": int(own.sum()), "second_class": ones, "auc": _rounded(auc)}
    return found


def _source_probe(frame: pd.DataFrame, settings: ProbeSettings) -> dict[str, Any]:
    """Whether sources of real photos can be told apart: ROC AUC of each against the others, and their mean."""
    real = frame[frame["label"].isin(("human", "stock", "platform"))]
    counts = real["source"].value_counts()
    names = sorted(name for name, count in counts.items() if count >= _LEAST_OF_SOURCE)
    real = real[real["source"].isin(names)]
    found: dict[str, Any] = {}
    if len(names) >= 2:
        traits = file_traits(real)
        everything = np.hstack([traits[part] for part in VIEWS["all"]])
        ids, groups = real["id"].to_numpy(str), real["group"].to_numpy(str)
        for name in names:
            labels = real["source"].eq(name).to_numpy(int)
            chances = _out_of_fold(everything, labels, ids, groups, settings)
            if chances is not None:
                found[name] = {
                    "pictures": int(labels.sum()),
                    **_with_interval(labels, chances, groups, settings.probe_seed),
                }
    auc = float(np.mean([row["auc"] for row in found.values()])) if found else None
    kind = verdict(auc)
    meaning = {
        "confounded": "Sources of real photos can be told apart by their files. A class that comes from few sources "
        "can be recognised by its source: balance sources within classes, and report figures by source.",
        "traces": "Files say something about the source of a real photo.",
        "clean": "Sources of real photos look alike as files.",
        "not measurable": f"Fewer than two sources have {_LEAST_OF_SOURCE} real photos or more.",
    }[kind]
    return {"verdict": kind, "meaning": meaning, "auc": _rounded(auc), "by_source": found, "pictures": len(real)}


def _out_of_fold(
    traits: np.ndarray, labels: np.ndarray, ids: np.ndarray, groups: np.ndarray, settings: ProbeSettings
) -> np.ndarray | None:
    """Probability of class 1 for each row by a forest that saw none of its group; None if there are too few groups."""
    from sklearn.ensemble import RandomForestClassifier

    if min(len(np.unique(groups[labels == value])) for value in (0, 1)) < 2:
        return None
    # the project's own division: scikit-learn's for groups takes minutes for as many groups as pictures
    names = [f"fold {number}" for number in range(_FOLDS)]
    shares = dict.fromkeys(names, 1 / _FOLDS)
    folds = np.array(assign_splits(ids.tolist(), groups.tolist(), labels.tolist(), shares, settings.probe_seed))
    chances = np.full(len(labels), np.nan)
    for name in names:
        test = folds == name
        train = ~test
        if len(np.unique(labels[train])) < 2:
            return None  # few groups, or groups of both classes, can leave a class in one fold alone
        if not test.any():
            continue
        forest = RandomForestClassifier(
            settings.probe_trees, min_samples_leaf=2, class_weight="balanced", random_state=settings.probe_seed
        )
        chances[test] = forest.fit(traits[train], labels[train]).predict_proba(traits[test])[:, 1]
    return chances


def _with_interval(labels: np.ndarray, chances: np.ndarray, groups: np.ndarray, seed: int) -> dict[str, float | None]:
    """ROC AUC with a 95 % interval by resampling groups (bootstrap percentiles)."""
    names, inverse = np.unique(groups, return_inverse=True)
    generator = np.random.default_rng([seed, zlib.crc32(labels.tobytes())])
    resampled = []
    for _ in range(_RESAMPLES):
        times = np.bincount(generator.integers(0, len(names), len(names)), minlength=len(names))
        chosen = np.repeat(np.arange(len(labels)), times[inverse])
        if 0 < labels[chosen].sum() < len(chosen):
            resampled.append(roc_auc(labels[chosen], chances[chosen]))
    low, high = np.quantile(resampled, (0.025, 0.975)) if resampled else (None, None)
    return {"auc": _rounded(roc_auc(labels, chances)), "low": _rounded(low), "high": _rounded(high)}


def roc_auc(labels: np.ndarray, chances: np.ndarray) -> float:
    """Probability that a row of class 1 has the higher value than one of class 0, ties by half (Mann-Whitney)."""
    from scipy.stats import rankdata

    ones = int(labels.sum())
    return float((rankdata(chances)[labels == 1].sum() - ones * (ones + 1) / 2) / (ones * (len(labels) - ones)))


def _rounded(value: Any) -> float | None:
    return None if value is None else round(float(value), 4)


def summary(result: dict[str, Any]) -> Sequence[str]:
    """Lines for the command line."""
    views = result["class"]["views"]
    figures = ", ".join(f"{name} {row['auc']}" for name, row in views.items())
    return (
        f"leakage probe, ROC AUC: {figures} -> {result['class']['verdict']}",
        f"sources of real photos: {result['sources']['auc']} -> {result['sources']['verdict']}",
    )
