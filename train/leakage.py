"""What gives pictures away without their pixels: how well a classifier that sees none tells them apart.

Where it does well the data are confounded, and so is every figure of a detector on them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import JpegImagePlugin
from sklearn.metrics import roc_auc_score

from deployments.containers import pixels_only, sniff

#: Below this many real photos, a source is not told from the others.
FEWEST_OF_SOURCE = 10


def file_traits(data: bytes, width: int, height: int) -> dict[str, float]:
    """What the file of an upright picture of this size shows without its pixels: format, size, length, quantisation
    tables, chroma subsampling."""
    tables: dict[int, list[int]] = {}
    sampling = -2
    if jpeg := sniff(data) == "JPEG":
        # by its class: to `Image.open` a photo that a second picture follows, as phones save them, is no JPEG
        with JpegImagePlugin.JpegImageFile(BytesIO(pixels_only(data, "JPEG"))) as image:
            tables, sampling = image.quantization, JpegImagePlugin.get_sampling(image)
    return {
        "jpeg": float(jpeg),
        "width": width,
        "height": height,
        "aspect": width / height,
        "length": len(data),
        "bytes_per_pixel": len(data) / (width * height),
        "luma_table": float(np.mean(tables[0])) if 0 in tables else -1.0,
        "chroma_table": float(np.mean(tables[1])) if 1 in tables else -1.0,
        "sampling": float(sampling),
    }


TRAITS: dict[str, tuple[str, ...]] = {
    "all": (
        "jpeg",
        "width",
        "height",
        "aspect",
        "length",
        "bytes_per_pixel",
        "luma_table",
        "chroma_table",
        "sampling",
    ),
    "size": ("width", "height", "aspect"),
    "length": ("length", "bytes_per_pixel"),
    "compression": ("jpeg", "luma_table", "chroma_table", "sampling"),
}


def leakage(facts: Sequence[dict[str, float]], labels: np.ndarray, groups: Sequence[str]) -> dict[str, float]:
    """ROC AUC of classifiers that see ``file_traits`` alone, all of them or some, by five-fold cross-validation over
    the test pictures; pictures of one ``group`` stay in one fold."""
    found = {name: _told_apart(facts, chosen, labels, groups) for name, chosen in TRAITS.items()}
    return {name: value for name, value in found.items() if value is not None}


def source_leakage(
    facts: Sequence[dict[str, float]], labels: np.ndarray, sources: Sequence[str], groups: Sequence[str]
) -> dict[str, Any]:
    """The same for the sources of real photos: ROC AUC of each source with enough of them against all others, and their
    mean; empty where fewer than two have enough."""
    real = np.flatnonzero(labels == 0)
    own, kept = np.array(sources)[real], [groups[row] for row in real]
    traits = [facts[row] for row in real]
    names = [name for name, count in sorted(Counter(own.tolist()).items()) if count >= FEWEST_OF_SOURCE]
    found: dict[str, dict[str, Any]] = {}
    for name in names if len(names) > 1 else ():
        value = _told_apart(traits, TRAITS["all"], (own == name).astype(int), kept)
        if value is not None:
            found[name] = {"pictures": int((own == name).sum()), "roc_auc": value}
    if not found:
        return {}
    return {"mean": round(float(np.mean([row["roc_auc"] for row in found.values()])), 4), "by_source": found}


def _told_apart(
    facts: Sequence[dict[str, float]], chosen: Sequence[str], labels: np.ndarray, groups: Sequence[str]
) -> float | None:
    """ROC AUC of a forest on some traits, out of fold; None where a class has too few pictures or groups."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    folds = min(5, *(len({group for group, own in zip(groups, labels, strict=True) if own == each}) for each in (0, 1)))
    if folds < 2:
        return None
    traits = np.array([[row[key] for key in chosen] for row in facts])
    forest = RandomForestClassifier(60, min_samples_leaf=2, class_weight="balanced", random_state=0)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    chances = cross_val_predict(forest, traits, labels, groups=np.array(groups), cv=splitter, method="predict_proba")
    return round(float(roc_auc_score(labels, chances[:, 1])), 4)
