"""What is trained is what is served: a small BLIP and a small ViT from nothing to a replica, through every command.

In: prepared ``flickr30k`` and ``aivshuman``. Out: ``results/trained_is_served.json``. Both models start with
random weights in their architecture's own format, and are trained, registered, evaluated on a part of the test split
(they are small, and fail the gate), refused by the registry for that part, resolved as ``models:/...@candidate`` and
served by a Serve replica. Compared are

* what the module said of validation pictures **in the training process** (greedy captions, logits), kept in the run's
  last checkpoint, with what the registry's model and the replica say of the same pictures,
* the logits of the module with the best weights of that checkpoint with those of the registry's model, and
* the likelihood of validation captions with that of their words alone (unigrams of the training captions): whether the
  BLIP has learnt anything.

    python -m benchmarks.trained_is_served --captions PREPARED/flickr30k --pictures PREPARED/aivshuman
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file

from benchmarks.report import RESULTS, write_result
from benchmarks.training import random_vit
from data.session import RaySettings, ray_session
from data.versions import DataVersion, open_version
from deployments.captioner import Captioner, CaptionerModel
from deployments.checkpoints import resolve
from deployments.detector import Detector, DetectorModel
from deployments.images import decode
from deployments.views import ViewSpec, render
from train import captioner, detector, evaluate, registry
from train.captioning import CaptionerModule, CaptionerTraining
from train.detector import DetectorTraining
from train.job import Outcome
from train.new_captioner import build_tokenizer
from train.settings import TrainCommand
from train.statistics import described
from train.watch import load_weights
from train.words import Vocabulary

Kind = Literal["captioner", "detector"]
_SIDE_PX = 224
#: How the small BLIP writes: greedily, so that captions can be compared word for word.
_GREEDY = {"num_beams": 1, "max_new_tokens": 16, "min_new_tokens": 3}


class TrainedIsServed(BaseModel):
    """Settings of a run."""

    model_config = ConfigDict(extra="forbid")

    captions: str = Field("", description="prepared flickr30k; empty: no captioner")
    pictures: str = Field("", description="prepared aivshuman; empty: no detector")
    width: int = Field(128, multiple_of=64, description="of every layer of both models")
    layers: int = Field(4, ge=1, description="of BLIP's tower, of its decoder, and of the ViT")
    patch_px: int = Field(32, ge=8, description="side of a patch; 224 must be a multiple")
    captioner_steps: int = Field(600, ge=10)
    captioner_batch: int = Field(16, ge=1)
    detector_steps: int = Field(30, ge=10)
    compared: int = Field(32, ge=4, description="validation pictures on which answers are compared")
    scratch: Path | None = Field(None, description="where 2 GB are free; unset: the temporary folder")
    result: Path = Field(RESULTS, description="folder of the result")


# ------------------------------------------------------------------------------------------------- untrained models


def new_blip(config: TrainedIsServed, captions: Sequence[str], folder: Path) -> int:
    """A BLIP of the published architecture, small, with random weights, whose words are those of the captions; returns
    how many parameters it has."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil

    folder.mkdir(parents=True)
    tokenizer = build_tokenizer(captions, 4, folder)
    tokenizer.save_pretrained(folder)
    size = {
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.width // 64,
        "initializer_range": 0.02,  # the tower's own default, 1e-10, expects trained weights
    }
    text = size | {
        "vocab_size": len(tokenizer),
        "encoder_hidden_size": config.width,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        # numbers of words, not secrets, which bandit takes them for
        "pad_token_id": 0,  # nosec B105
        "bos_token_id": len(tokenizer) - 2,
        "eos_token_id": 3,  # nosec B105
        "sep_token_id": 3,  # nosec B105
    }
    vision = size | {"image_size": _SIDE_PX, "patch_size": config.patch_px}
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    model.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": _SIDE_PX, "width": _SIDE_PX}).save_pretrained(folder)
    card = {"task": "captioning", "architecture": type(model).__name__, "generation": _GREEDY}
    (folder / "card.json").write_text(json.dumps(card))
    return sum(parameter.numel() for parameter in model.parameters())


def new_vit(config: TrainedIsServed, folder: Path) -> int:
    """A small ViT with random weights that tells human and ai apart; returns how many parameters it has."""
    parameters = random_vit(folder, config.width, config.layers, _SIDE_PX, config.patch_px)
    (folder / "card.json").write_text(
        json.dumps({"task": "detection", "architecture": "ViTForImageClassification", "labels": ["human", "ai"]})
    )
    return parameters


# ------------------------------------------------------------------------------------------- through every command


def last_words(config: TrainCommand) -> tuple[Path, dict[int, Any]]:
    """The best weights of a finished run, and what the module said of the validation split in the training process."""
    folder = Path(config.storage) / config.name
    kept = sorted(each for each in folder.glob("checkpoint*") if (each / "best.safetensors").is_file())
    judged = json.loads((kept[-1] / "judged.json").read_text())
    return kept[-1] / "best.safetensors", {int(row): said for row, said in judged}


def refusal(kind: Kind) -> str:
    """What the registry says when the candidate is to be promoted; empty: it was."""
    try:
        registry.main(["promote", kind, "--version", "candidate", "--to", "staging"])
    except SystemExit as refused:
        return str(refused.code)
    return ""


def replica_answers(kind: Kind, uri: str, views: np.ndarray, spec: ViewSpec) -> list[dict[str, Any]]:
    """What a replica of Ray Serve answers to each picture, asked as the application asks it."""
    from ray import serve

    replica: Any = Captioner if kind == "captioner" else Detector
    deployment = serve.deployment(replica, name=kind).options(
        user_config={"uri": uri}, ray_actor_options={"num_cpus": 0.5}, health_check_timeout_s=300
    )
    serve.start(proxy_location="Disabled")
    try:
        handle = serve.run(deployment.bind(), name=kind, route_prefix=None)
        ask = getattr(handle, "caption" if kind == "captioner" else "detect")
        asked = [ask.remote(picture, spec, time.time() + 300) for picture in views]
        return [answer.result(timeout_s=300) for answer in asked]
    finally:
        serve.shutdown()


def views_of(version: DataVersion, count: int, spec: ViewSpec) -> np.ndarray:
    """The first validation pictures as a model reads them."""
    images = version.table("val", ["image"])["image"][:count].to_pylist()
    return np.stack([render(decode(image).image, spec) for image in images])


def common(config: TrainedIsServed, folder: Path, kind: Kind, data: str) -> dict[str, Any]:
    """Settings of both trainings."""
    return {
        "data": data,
        "model": str(folder / kind / "new"),
        "output": str(folder / kind / "trained"),
        "storage": str(folder / "runs"),
        "name": kind,
        "weight_decay": 0.01,
        "epochs": 1000,
        "threads": 1,  # more wait for each other where other programs compute
        "keep": 2,
        "tracking": {"system_metrics_s": 0},
    }


def commands(kind: Kind, folder: Path, data: str, extra: Sequence[str]) -> dict[str, Any]:
    """Register and evaluate what was trained, and ask for its promotion."""
    registry.main(["register", kind, "--checkpoint", str(folder / kind / "trained")])
    report = folder / kind / "report"
    evaluate.main([kind, "--data", data, "--limit", "48", "--resamples", "50", "--output", str(report), *extra])
    return {"refused": refusal(kind), "report": json.loads((report / "report.json").read_text())}


def losses_of(outcome: Outcome) -> dict[str, Any]:
    """The learning curve in a few figures."""
    losses = [loss for _, loss in outcome.losses]
    tenth = max(1, len(losses) // 10)
    return {
        "steps": outcome.steps,
        "first_loss": round(losses[0], 4),
        "mean_loss_of_last_tenth": round(float(np.mean(losses[-tenth:])), 4),
        "pictures_per_s": round(outcome.samples_per_s, 1),
        "metrics": {name: round(value, 4) for name, value in outcome.metrics.items()},
    }


# ------------------------------------------------------------------------------------------------------- comparison


def entropy(vocabulary: Vocabulary, train: Sequence[Sequence[str]], asked: Sequence[str]) -> tuple[float, int]:
    """Cross-entropy of captions, ends included, under the frequencies of words in the training captions, nats a token,
    and their number of tokens; every word counts as seen once more (Laplace)."""
    counts = Counter(
        token for texts in train for text in texts for token in [*vocabulary.encode(text, 30), vocabulary.end]
    )
    total = sum(counts.values()) + len(vocabulary.words)
    tokens = [token for text in asked for token in [*vocabulary.encode(text, 30), vocabulary.end]]
    return -sum(math.log((counts[token] + 1) / total) for token in tokens) / len(tokens), len(tokens)


@torch.inference_mode()
def captioner_logits(module: CaptionerModule, served: CaptionerModel, views: np.ndarray, texts: list[str]) -> float:
    """Largest difference of the two models' logits, each on its own pixels, over given captions."""
    worst = 0.0
    for view, text in zip(views, texts, strict=True):
        read, _ = module.vocabulary.sequence(module.vocabulary.encode(text, 30))
        tokens = {"input_ids": torch.tensor([read]), "attention_mask": torch.ones(1, len(read), dtype=torch.long)}
        model: Any = module.model
        ours = model(pixel_values=module.pixels(torch.from_numpy(view[None])), **tokens).logits
        theirs = served.network(pixel_values=served.pixels(view[None]), **tokens).logits
        worst = max(worst, float((ours - theirs).abs().max()))
    return worst


def captioner_part(config: TrainedIsServed, folder: Path) -> dict[str, Any]:
    """A BLIP from nothing to a replica."""
    version = open_version(config.captions)
    train = version.table("train", ["captions"])["captions"].to_pylist()
    val = version.table("val", ["captions"])["captions"].to_pylist()
    parameters = new_blip(config, [text for texts in train for text in texts], folder / "captioner" / "new")
    settings = CaptionerTraining.model_validate(
        common(config, folder, "captioner", config.captions)
        | {
            "max_steps": config.captioner_steps,
            "validate_every": config.captioner_steps,
            "batch_size": config.captioner_batch,
            "learning_rate": 1e-3,
            "prompt": "",
            "augment": False,
            "validation_photos": config.compared,
        }
    )
    began = time.monotonic()
    outcome = captioner.train(settings)
    seconds = time.monotonic() - began
    found = commands("captioner", folder, config.captions, ["--tagger=", "--templates", "40"])

    best, judged = last_words(settings)
    uri = "models:/captioner@candidate"
    served = CaptionerModel(resolve(uri))
    count = min(config.compared, len(judged))
    views = views_of(version, count, served.views)
    module = captioner.prepare_job(settings, version)[0].module(config.captioner_steps).eval()
    load_weights(module.model, best)
    told = [row["text"] for row in replica_answers("captioner", uri, views, served.views)]

    texts = [next((text for text in texts if served.knows(text)), "") for texts in val[:count]]
    known = [place for place, text in enumerate(texts) if text]
    asked = [texts[place] for place in known]
    own = served.log_likelihood(views[known], asked)
    other = served.log_likelihood(np.roll(views[known], -1, axis=0), asked)
    unigram, tokens = entropy(module.vocabulary, train, asked)
    draws = np.random.default_rng(0).integers(0, len(known), (1000, len(known)))
    return {
        "architecture": served.checkpoint.card.architecture,
        "parameters": parameters,
        "words": len(module.vocabulary.words),
        "photos": {name: version.manifest.counts[name] for name in ("train", "val", "test")},
        "training": losses_of(outcome) | {"seconds": round(seconds, 1)},
        "validation_nats_per_token": {
            "captions": len(asked),
            "tokens": tokens,
            "uniform": round(math.log(len(module.vocabulary.words)), 4),
            "unigram": round(unigram, 4),
            "trained": round(float(-own.sum() / tokens), 4),
            "trained_given_another_photo": round(float(-other.sum() / tokens), 4),
            "photo_gains_nats_per_caption": described((own - other).mean(), (own - other)[draws].mean(axis=1)),
        },
        "evaluated": {name: found["report"]["scores"][name] for name in ("bleu1", "bleu4", "cider")},
        "gate_passed": found["report"]["gate"]["passed"],
        "promotion_refused": found["refused"].splitlines()[:1],
        "revision_evaluated_is_served": found["report"]["model"]["revision"] == served.checkpoint.revision,
        "compared": count,
        "largest_logit_difference": captioner_logits(module, served, views[known], asked),
        "registry_captions_as_in_training": sum(
            text == judged[row] for row, text in enumerate(in_batches(served, views))
        ),
        "replica_captions_as_in_training": sum(text == judged[row] for row, text in enumerate(told)),
        "distinct_captions": len(set(told)),
        "examples": [{"caption": text, "people": val[row][0]} for row, text in list(enumerate(told))[:6]],
    }


def in_batches(model: CaptionerModel, views: np.ndarray, size: int = 8) -> Iterator[str]:
    """Captions in batches of other sizes than training's."""
    for first in range(0, len(views), size):
        yield from model.caption(views[first : first + size])


def detector_part(config: TrainedIsServed, folder: Path) -> dict[str, Any]:
    """A ViT from nothing to a replica."""
    version = open_version(config.pictures)
    parameters = new_vit(config, folder / "detector" / "new")
    settings = DetectorTraining.model_validate(
        common(config, folder, "detector", config.pictures)
        | {
            "max_steps": config.detector_steps,
            "validate_every": config.detector_steps,
            "batch_size": 16,
            "learning_rate": 5e-4,
            "head": "keep",
        }
    )
    began = time.monotonic()
    outcome = detector.train(settings)
    seconds = time.monotonic() - began
    found = commands("detector", folder, config.pictures, ["--no-damages", "--people-by="])

    best, judged = last_words(settings)
    uri = "models:/detector@candidate"
    served = DetectorModel(resolve(uri))
    count = min(config.compared, version.manifest.counts["val"])
    views = views_of(version, count, served.views)
    # rows below the split's size are its pictures in the first tier of delivery, as uploaded
    trained = np.array([judged[row] for row in range(count)])
    # calibration moves the last layer's bias for `ai`, and nothing else, when the checkpoint is written
    moved = served.network.classifier.bias.detach().numpy() - load_file(best)["classifier.bias"].numpy()
    if moved[0]:
        raise RuntimeError(
            f"the served bias differs from the trained one by {moved}: calibration moves that of `ai` alone"
        )
    trained = trained + moved
    logits = np.concatenate([served.logits(views[first : first + 8]) for first in range(0, count, 8)])
    told = np.array([row["ai_probability"] for row in replica_answers("detector", uri, views, served.views)])
    return {
        "architecture": served.checkpoint.card.architecture,
        "parameters": parameters,
        "pictures": {name: version.manifest.counts[name] for name in ("train", "val", "test")},
        "training": losses_of(outcome) | {"seconds": round(seconds, 1)},
        "roc_auc_evaluated": found["report"]["tiers"]["clean"]["roc_auc"],
        "gate_passed": found["report"]["gate"]["passed"],
        "promotion_refused": found["refused"].splitlines()[:1],
        "revision_evaluated_is_served": found["report"]["model"]["revision"] == served.checkpoint.revision,
        "compared": count,
        "bias_by_calibration": [round(float(value), 6) for value in moved],
        "spread_of_logits": round(float(np.ptp(trained[:, 1] - trained[:, 0])), 4),
        "largest_logit_difference": float(np.abs(logits - trained).max()),
        # the replica's answers are rounded to four places
        "largest_probability_difference_of_replica": float(np.abs(told - served.calibrated(trained)).max()),
    }


@contextlib.contextmanager
def own_records(folder: Path) -> Iterator[None]:
    """MLflow and caches of this run alone; Ray's workers and replicas inherit them, so Ray starts within."""
    own = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "DEEPTRUST_CACHE": str(folder / "cache")}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def measure(config: TrainedIsServed) -> dict[str, Any]:
    """All figures."""
    result: dict[str, Any] = {"settings": config.model_dump(mode="json", exclude={"scratch", "result"})}
    with (
        tempfile.TemporaryDirectory(prefix="served-", dir=config.scratch) as name,
        own_records(Path(name)),
        ray_session(RaySettings(num_cpus=4, object_store_bytes=300 * 2**20)),
    ):
        for kind, data, part in (
            ("captioner", config.captions, captioner_part),
            ("detector", config.pictures, detector_part),
        ):
            if data:
                result[kind] = part(config, Path(name))
    for place in ("captions", "pictures"):  # names of folders say nothing elsewhere
        if result["settings"][place]:
            result["settings"][place] = "/".join(Path(open_version(result["settings"][place]).location.path).parts[-2:])
    return result


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    from pydantic_settings import CliApp

    config = CliApp.run(TrainedIsServed, cli_args=arguments)
    result = measure(config)
    print(json.dumps(result, indent=1), write_result("trained_is_served", result, config.result), sep="\n")


if __name__ == "__main__":
    main()
