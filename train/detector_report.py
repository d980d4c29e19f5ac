"""How good a detector is, asked the way a sceptic would: tiers of delivery, one fixed threshold, generators by name.

In: a checkpoint, loaded by the class that serves it, and test examples. Out: the JSON-ready body of a report and the
pictures that belong to it (worst errors, heat maps). The thresholds are the card's; nothing is tuned on these
pictures. Intervals draw whole groups of near-duplicates.

* ``tiers``: every picture three times, as uploaded, at 768 px q60 and at 512 px q40; ranking, verdicts, calibration.
* ``damages``: the same pictures after single injuries (JPEG qualities, halving, blur, WebP, a screenshot).
* ``generators``: each generator against all real photos; those that the card's training data do not name are
  ``unseen``, and their mean is the figure that counts.
* ``slices``: size, compression, source, with and without people (by captions of a captioner, if one is given), near to
  and far from the training pictures (by a classifier of sources, if one is given).
* ``leakage``: how well a classifier that sees no pixel does. If it is good, the data are confounded.
* ``source_leakage``: how well such a classifier tells the sources of *real* photos apart. Where it does and sources are
  not of both classes alike, a source is a short cut to the class.
* ``distance``: a classifier of sources (``train.detector`` on the data set ``source``) gives the probability that a
  picture is a platform's upload and not one of the stock photos that detectors are trained on: how far each lies from
  the training distribution.
* ``comparison``: the difference to another model on the same pictures, by paired bootstrap.
* ``not_measured``: what is missing from the above, and how to have it.

Knows no MLflow and no HTML.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from pydantic import BaseModel, ConfigDict, Field

from data.errors import DataError
from deployments.checkpoints import Checkpoint
from deployments.detector import DetectorModel, verdict
from deployments.heat_map import combine, render_png
from deployments.images import ADMITTED, decode
from deployments.views import regions, render
from deployments.words import words_of
from train.aivshuman import family
from train.damage import TIERS, Tier, deliver, reduce_to, reencode
from train.examples import Example, batches
from train.generate import caption_all
from train.leakage import FEWEST_OF_SOURCE, file_traits, leakage, source_leakage
from train.report import Body, Picture
from train.statistics import (
    Interval,
    answers,
    auc,
    balanced_accuracy,
    by_generator,
    interval,
    paired_difference,
    reliability,
    verdict_figures,
)

#: Words that mean that a caption speaks of people.
PEOPLE = frozenset(
    """man men woman women boy boys girl girls child children kid kids baby people person persons guy guys lady ladies
    player players crowd couple toddler family human face he she someone""".split()  # noqa: SIM905
)
#: Below this many pictures of a class, a slice says nothing.
_FEWEST = 5
THIRDS = ("a third nearest to the training pictures", "the third between", "the third farthest from them")


def _screenshot(image: Image.Image) -> Image.Image:
    """Shown smaller than it is on a screen, captured and saved as a sharp JPEG by another program."""
    return reencode(reduce_to(image, 900, Image.Resampling.BILINEAR), "JPEG", 90, subsampling=0)


def _half(image: Image.Image) -> Image.Image:
    return image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.BICUBIC)


DAMAGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg_q95": lambda image: reencode(image, "JPEG", 95),
    "jpeg_q80": lambda image: reencode(image, "JPEG", 80),
    "jpeg_q60": lambda image: reencode(image, "JPEG", 60),
    "jpeg_q40": lambda image: reencode(image, "JPEG", 40),
    "half_size": _half,
    "blur_1px": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "webp_q75": lambda image: reencode(image, "WEBP", 75),
    "screenshot": _screenshot,
}


class DetectorSettings(BaseModel):
    """What is examined, beyond the tiers."""

    model_config = ConfigDict(extra="forbid")

    damages: bool = Field(True, description="also score every picture after eight single injuries")
    people_by: str = Field(
        "auto",
        description="checkpoint of a captioner whose captions tell pictures with people; auto: starter:captioner where "
        "it can be had; empty: not told apart",
    )
    source_classifier: str = Field(
        "",
        description="checkpoint of a classifier of sources (python -m train.detector on the data set `source`): "
        "how far pictures lie from the training distribution; empty: not told",
    )
    extra: list[Path] | None = Field(
        None,
        description="folders of AI pictures that are scored one by one; unset: the folder `ghibli` beside the data set "
        "or its versions, if there is one",
    )
    heat_maps: int = Field(8, ge=0, le=64, description="heat maps of the worst errors")
    worst: int = Field(16, ge=0, le=64, description="worst errors shown as pictures")


#: Parts of a report that may be missing, and what to do about it.
_WANTED = {
    "unseen": "generators that training did not see: the test split names none that the card's training data do not",
    "damages": "single injuries: leave --no-damages away",
    "leakage": "the leakage probe: a class has too few pictures or groups",
    "source_leakage": f"the leakage probe of real sources: fewer than two have {FEWEST_OF_SOURCE} test photos",
    "distance": "distance from the training distribution: give a classifier of sources by --source-classifier",
    "extra": "styles one by one (Ghibli): give folders of such pictures by --extra",
    "comparison": "the difference to production: nothing else is there to compare with",
}


def score(
    model: DetectorModel, examples: Sequence[Example], versions: Sequence[str], batch_size: int
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Calibrated probabilities of AI, float64 ``(examples, versions)``, and what the files show without their pixels.

    A version is a tier or a name in ``DAMAGES``.
    """
    chances = np.empty((len(examples), len(versions)))
    facts = []
    started, row = time.monotonic(), 0
    for group in batches(list(examples), batch_size):
        views = []
        for example in group:
            data = example.read()
            picture = decode(data, ADMITTED)
            facts.append(file_traits(data, picture.width, picture.height))
            views += [render(injure(picture.image, version), model.views) for version in versions]
        # batches of one size whatever the versions: a batch's size must not move a probability from run to run
        rows = np.concatenate([model.detect(np.stack(part)) for part in _parts(views, batch_size)])
        chances[row : row + len(group)] = rows.reshape(len(group), len(versions))
        row += len(group)
        if row % (batch_size * 10) < batch_size or row == len(examples):
            rate = row * len(versions) / (time.monotonic() - started)
            print(f"scored {row}/{len(examples)} pictures, {rate:.1f} views of them a second", flush=True)
    return chances, facts


def _parts(views: list[np.ndarray], size: int) -> list[list[np.ndarray]]:
    return [views[first : first + size] for first in range(0, len(views), size)]


def injure(image: Image.Image, version: str) -> Image.Image:
    """The picture as a tier or an injury delivers it."""
    if version in DAMAGES:
        return DAMAGES[version](image)
    return deliver(image, version)  # type: ignore[arg-type]


def distance(
    classifier: DetectorModel, examples: Sequence[Example], labels: np.ndarray, batch_size: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """How far pictures lie from the training distribution: figures, and the rows of each third.

    The thirds are by rank: a classifier that is sure of all pictures still orders them.
    """
    chances = score(classifier, examples, ["clean"], batch_size)[0][:, 0]
    thirds = np.array_split(np.argsort(chances, kind="stable"), 3)
    rows = {name: np.isin(np.arange(len(chances)), third) for name, third in zip(THIRDS, thirds, strict=True)}
    deciles = [round(place / 10, 1) for place in range(11)]
    figures = {
        "classifier": classifier.checkpoint.name,
        "meaning": "probability that the picture is a platform's upload and not a stock photo as in training",
        "quantiles": {
            truth: [round(float(value), 4) for value in np.quantile(chances[labels == number], deciles)]
            for number, truth in enumerate(("human", "ai"))
        },
        "share_called_platform": round(float((chances >= 0.5).mean()), 4),
        "thirds": {
            name: [round(float(chances[third].min()), 4), round(float(chances[third].max()), 4)]
            for name, third in rows.items()
            if third.any()
        },
        "probabilities": {example.id: round(float(value), 6) for example, value in zip(examples, chances, strict=True)},
    }
    return figures, rows


def trained_on(checkpoint: Checkpoint) -> set[str] | None:
    """Families of the generators that the card's training data name; None when the card does not say.

    Read from ``dataset.generators`` (names, or a table of counts; null: nobody knows), which names those that the
    weights saw before this training too, or else from ``dataset.counts.train``, whose names are generators or strata
    (``ai: NAME``, ``real: SOURCE``).
    """
    dataset = checkpoint.card.dataset
    if "generators" in dataset:
        named = dataset["generators"]
        return None if named is None else {family(str(name)) for name in named} - {"photo", "unknown"}
    strata = dict(dataset.get("counts") or {}).get("train")
    if isinstance(strata, dict):
        named = {family(name.removeprefix("ai: ")) for name in strata if not name.startswith("real: ")}
        return named - {"photo", "unknown"}
    return None


def has_people(caption: str) -> bool:
    """Whether a caption speaks of people."""
    return bool(PEOPLE & set(words_of(caption)))


def slices(
    examples: Sequence[Example],
    facts: Sequence[dict[str, Any]],
    chances: np.ndarray,
    labels: np.ndarray,
    above: float,
    further: Mapping[str, np.ndarray],
    groups: np.ndarray,
    resamples: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Figures of parts of the pictures: by size, compression, file format, source, and whatever else tells them
    apart."""
    long_side = np.array([max(fact["width"], fact["height"]) for fact in facts])
    density = np.array([fact["bytes_per_pixel"] for fact in facts])
    parts: dict[str, np.ndarray] = {
        "long side up to 512 px": long_side <= 512,
        "long side 513 to 1024 px": (long_side > 512) & (long_side <= 1024),
        "long side above 1024 px": long_side > 1024,
        "below 0.15 bytes a pixel": density < 0.15,
        "0.15 to 0.4 bytes a pixel": (density >= 0.15) & (density < 0.4),
        "above 0.4 bytes a pixel": density >= 0.4,
        "JPEG": np.array([fact["jpeg"] == 1 for fact in facts]),
        "other formats": np.array([fact["jpeg"] != 1 for fact in facts]),
    }
    for source in sorted({example.source for example in examples}):
        parts[f"source {source}"] = np.array([example.source == source for example in examples])
    parts |= further
    result = {}
    for name, rows in parts.items():
        of_ai, of_real = rows & (labels == 1), rows & (labels == 0)
        ai, real = chances[of_ai], chances[of_real]
        if not len(ai) and not len(real):
            continue
        entry: dict[str, Any] = {"ai": len(ai), "real": len(real), "roc_auc": None}
        if len(ai) >= _FEWEST and len(real) >= _FEWEST:
            entry["roc_auc"] = interval(auc, [ai, real], resamples, seed, [groups[of_ai], groups[of_real]])
        entry["ai_recall"] = round(float((ai >= above).mean()), 4) if len(ai) else None
        entry["real_accuracy"] = round(float((real < above).mean()), 4) if len(real) else None
        result[name] = entry
    return result


def compare(
    ours: np.ndarray,
    theirs: np.ndarray,
    labels: np.ndarray,
    our_threshold: float,
    their_threshold: float,
    groups: np.ndarray,
    resamples: int,
    seed: int,
) -> dict[str, Interval]:
    """Our figures minus theirs on the same pictures in one tier, each model at its own threshold."""
    sides = [[chances[labels == 1], chances[labels == 0]] for chances in (ours, theirs)]
    # one border for both sides: shifted by its own threshold, a probability is a call when it is not negative
    shifted = [
        [side - border for side in pair] for pair, border in zip(sides, (our_threshold, their_threshold), strict=True)
    ]
    grouped = [groups[labels == 1], groups[labels == 0]]
    result = {"roc_auc": paired_difference(auc, sides[0], sides[1], resamples, seed, grouped)}
    figures: dict[str, Callable[..., float]] = {
        "balanced_accuracy": lambda ai, real: balanced_accuracy(ai, real, 0.0),
        "ai_recall": lambda ai, _: float((ai >= 0).mean()),
        "real_accuracy": lambda _, real: float((real < 0).mean()),
    }
    return result | {
        name: paired_difference(figure, shifted[0], shifted[1], resamples, seed, grouped)
        for name, figure in figures.items()
    }


def examine(
    checkpoint: Checkpoint,
    examples: Sequence[Example],
    settings: DetectorSettings,
    against: Checkpoint | None,
    resamples: int,
    batch_size: int,
    seed: int,
    captioner: Checkpoint | None = None,
    classifier: Checkpoint | None = None,
) -> Body:
    """All figures of a detector on test examples.

    Raises:
        ValueError: only one class is among the examples; ``train.examples`` gives none such.
        deployments.checkpoints.CheckpointError: the classifier of sources does not know `platform`.
    """
    model = DetectorModel(checkpoint)
    sources = DetectorModel(classifier, positive="platform") if classifier is not None else None
    thresholds = checkpoint.card.thresholds
    labels = np.array([int(example.label == "ai") for example in examples])
    tiers: list[Tier] = list(TIERS)
    versions: list[str] = [*tiers, *(DAMAGES if settings.damages else ())]
    chances, facts = score(model, examples, versions, batch_size)
    column = {version: place for place, version in enumerate(versions)}
    borders = thresholds.model_dump()
    groups = [example.group or example.id for example in examples]
    drawn_by = np.array(groups)
    figures: dict[str, Any] = {
        "tiers": {
            tier: verdict_figures(chances[:, column[tier]], labels, borders, resamples, seed, drawn_by)
            for tier in tiers
        },
        "damages": {
            name: {
                "roc_auc": round(auc(chances[labels == 1, column[name]], chances[labels == 0, column[name]]), 4),
                "ai_recall": round(float((chances[labels == 1, column[name]] >= thresholds.ai_above).mean()), 4),
                "real_accuracy": round(float((chances[labels == 0, column[name]] < thresholds.ai_above).mean()), 4),
            }
            for name in versions
            if name in DAMAGES
        },
        "confusion": {
            tier: {
                truth: {
                    answer: sum(verdict(chance, thresholds) == answer for chance in chances[labels == number, place])
                    for answer in ("human", "uncertain", "ai")
                }
                for number, truth in enumerate(("human", "ai"))
            }
            for place, tier in enumerate(tiers)
        },
        "reliability": {tier: reliability(chances[:, column[tier]], labels) for tier in tiers},
        "leakage": leakage(facts, labels, groups),
        "source_leakage": source_leakage(facts, labels, [example.source for example in examples], groups),
    }
    families = [family(example.generator or "unknown") if example.label == "ai" else "photo" for example in examples]
    figures |= generator_figures(families, chances[:, : len(tiers)], tiers, checkpoint, drawn_by, resamples, seed)
    further: dict[str, np.ndarray] = {}
    if captioner is not None:
        people = np.array([has_people(caption) for caption in caption_all(captioner, examples, batch_size)])
        further = {"with people": people, "without people": ~people}
    if sources is not None:
        figures["distance"], thirds = distance(sources, examples, labels, batch_size)
        further |= thirds
    figures["slices"] = slices(
        examples, facts, chances[:, 0], labels, thresholds.ai_above, further, drawn_by, resamples, seed
    )
    figures["labels"] = {example.id: example.label for example in examples}
    figures["probabilities"] = {
        example.id: [round(float(value), 6) for value in row[: len(tiers)]]
        for example, row in zip(examples, chances, strict=True)
    }
    if against is not None:
        theirs, _ = score(DetectorModel(against), examples, tiers, batch_size)
        figures["comparison"] = {"with": against.name} | {
            tier: compare(
                chances[:, place],
                theirs[:, place],
                labels,
                thresholds.ai_above,
                against.card.thresholds.ai_above,
                drawn_by,
                resamples,
                seed,
            )
            for place, tier in enumerate(tiers)
        }
    body = Body(figures)
    figures["extra"] = {}
    for folder in settings.extra or ():
        figures["extra"][folder.name], body.pictures[f"extra: {folder.name}"] = one_by_one(model, folder, batch_size)
    _show_errors(body, model, examples, chances[:, 0], labels, settings)
    figures["not_measured"] = [told for part, told in _WANTED.items() if not figures.get(part)]
    if captioner is None:
        figures["not_measured"].append("pictures with people and without: give a captioner by --people-by")
    return body


def generator_figures(
    families: Sequence[str],
    chances: np.ndarray,
    tiers: Sequence[Tier],
    checkpoint: Checkpoint,
    groups: np.ndarray,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """``generators``: each one's figures, and whether training saw it; ``unseen``: means over those that it did not.

    Of pictures whose generator nobody stated, ``unknown``, nobody can tell either.
    """
    known = trained_on(checkpoint)
    names = [name for name, _ in Counter(name for name in families if name != "photo").most_common()]
    seen = {name: None if known is None or name == "unknown" else name in known for name in names}
    rows = {name: np.array([each == name for each in families]) for name in [*names, "photo"]}
    above = checkpoint.card.thresholds.ai_above
    pairs = {name: (chances[rows[name]], chances[rows["photo"]]) for name in names}
    grouped = {name: (groups[rows[name]], groups[rows["photo"]]) for name in names}
    table = {
        tier: by_generator(pairs, place, resamples, seed, grouped)["generators"] for place, tier in enumerate(tiers)
    }
    generators = {
        name: {
            "pictures": int(rows[name].sum()),
            "trained_on": seen[name],
            "roc_auc": {tier: table[tier][name] for tier in tiers},
            "answers": {
                tier: answers(chances[rows[name], place], checkpoint.card.thresholds.human_below, above)
                for place, tier in enumerate(tiers)
            },
        }
        for name in names
    }
    result: dict[str, Any] = {"generators": generators}
    unseen = [name for name in names if seen[name] is False]
    if unseen:
        pairs = {name: (chances[rows[name]], chances[rows["photo"]]) for name in unseen}
        result["unseen"] = {
            tier: {
                key: value
                for key, value in by_generator(pairs, place, resamples, seed, grouped).items()
                if key != "generators"
            }
            for place, tier in enumerate(tiers)
        }
    return result


def pictures_below(folder: Path) -> list[Path]:
    """Files of pictures in a folder and in those below it.

    Raises:
        DataError: there is no such folder, or no picture in it.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if not paths:
        what = "has no JPEG, PNG or WebP file in it" if folder.is_dir() else "is no folder"
        raise DataError(f"--extra {folder} {what}: correct the path, or give none by --extra=[]")
    return paths


def one_by_one(model: DetectorModel, folder: Path, batch_size: int) -> tuple[dict[str, Any], list[Picture]]:
    """Probability of AI of each picture of a folder and of those below it, in each tier, and its heat map."""
    paths = pictures_below(folder)
    examples = [Example(path.name, path.name, path.read_bytes, "ai") for path in paths]
    chances, _ = score(model, examples, list(TIERS), batch_size)
    figures = {
        path.name: {tier: round(float(row[place]), 4) for place, tier in enumerate(TIERS)}
        for path, row in zip(paths, chances, strict=True)
    }
    thresholds = model.checkpoint.card.thresholds
    pictures = []
    for example, row in zip(examples, chances, strict=True):
        image = decode(example.read(), ADMITTED).image
        text = f"{example.file_name}: {row[0]:.2f}, {verdict(float(row[0]), thresholds)}"
        pictures.append(Picture(text, image))
        if (seen := heat(model, image)) is not None:
            pictures.append(Picture("what moved it", seen))
    return figures, pictures


def heat(model: DetectorModel, image: Image.Image) -> Image.Image | None:
    """The picture under its heat map; None where the architecture gives none."""
    try:
        maps = model.explain(render(image, model.views))
    except (RuntimeError, ValueError, TypeError, IndexError):  # Grad-CAM on tokens needs tokens
        return None
    small = reduce_to(image, 448)
    overlay = Image.open(BytesIO(render_png(combine(maps.tolist(), regions(image.size, model.views)))))
    return Image.alpha_composite(small.convert("RGBA"), overlay.resize(small.size)).convert("RGB")


def _show_errors(
    body: Body,
    model: DetectorModel,
    examples: Sequence[Example],
    chances: np.ndarray,
    labels: np.ndarray,
    settings: DetectorSettings,
) -> None:
    """The pictures that were most surely judged wrong, of both classes, as uploaded."""
    distance = np.abs(chances - labels)
    order = [int(row) for row in np.argsort(-distance, kind="stable") if distance[row] > 0.5]
    chosen = _alternating([row for row in order if labels[row]], [row for row in order if not labels[row]])
    body.figures["worst"] = []
    shown: list[Picture] = []
    for place, row in enumerate(chosen[: settings.worst]):
        example = examples[row]
        truth = "AI" if labels[row] else "real"
        origin = example.generator if labels[row] and example.generator else example.source
        body.figures["worst"].append(
            {
                "id": example.id,
                "file_name": example.file_name,
                "label": example.label,
                "ai_probability": round(float(chances[row]), 4),
                "source": example.source,
                "generator": example.generator,
            }
        )
        image = decode(example.read(), ADMITTED).image
        shown.append(Picture(f"{truth} ({origin}), called AI with {chances[row]:.2f}", reduce_to(image, 448)))
        if place < settings.heat_maps and (seen := heat(model, image)) is not None:
            shown.append(Picture("what moved it", seen))
    body.pictures["worst"] = shown


def _alternating(first: list[int], second: list[int]) -> list[int]:
    """Turn by turn from both, what is left of the longer at the end."""
    mixed = [row for pair in zip(first, second, strict=False) for row in pair]
    return mixed + first[len(second) :] + second[len(first) :]
