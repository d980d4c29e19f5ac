"""Captions of the test photos by the class that serves, scored with BLEU and CIDEr and bootstrap intervals.

In: a checkpoint URI and a caption data set. Out: a JSON result for ``benchmarks/results``, and on request the captions
themselves beside their references, for ``benchmarks.tagger_quality``.

    python -m train.evaluate_captioner --data DIR --checkpoint starter:captioner --output
    benchmarks/results/captioner_quality.json
"""

from __future__ import annotations

import io
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from deployments.captioner import CaptionerModel
from deployments.checkpoints import resolve
from deployments.views import render
from train.captions import CaptionedPhoto, read_captions, score_captions, split_photos


class EvaluationConfig(BaseModel):
    """Settings of one evaluation."""

    model_config = ConfigDict(extra="forbid")

    data: Path = Field(description="folder with Images/ and captions.txt")
    checkpoint: str = Field("starter:captioner", description="checkpoint URI")
    output: Path = Field(description="JSON file for the result")
    captions: Path | None = Field(None, description="also write the captions and their references here")
    photos: int = Field(1000, ge=10, description="test photos to caption")
    batch_size: int = Field(16, ge=1)
    resamples: int = Field(100, ge=10, description="bootstrap resamples of photos")
    seed: int = 7


def generate(model: CaptionerModel, folder: Path, photos: Sequence[CaptionedPhoto], batch_size: int) -> dict[str, str]:
    """One caption a photo, by name."""
    from PIL import Image

    captions: dict[str, str] = {}
    started = time.monotonic()
    for first in range(0, len(photos), batch_size):
        batch = photos[first : first + batch_size]
        views = []
        for photo in batch:
            with Image.open(io.BytesIO((folder / "Images" / photo.name).read_bytes())) as image:
                views.append(render(image.convert("RGB"), model.views))
        captions |= dict(zip((photo.name for photo in batch), model.caption(np.stack(views)), strict=True))
        if first // batch_size % 10 == 0:
            rate = len(captions) / (time.monotonic() - started)
            print(f"captioned {len(captions)}/{len(photos)}, {rate:.1f}/s", flush=True)
    return captions


def bootstrap(
    captions: dict[str, str], photos: Sequence[CaptionedPhoto], resamples: int, seed: int
) -> dict[str, list[float]]:
    """95 % intervals of the corpus scores over photos drawn with replacement.

    A photo that is drawn twice enters twice, under two names; CIDEr's document frequencies are those of the resample.
    """
    generator = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {"bleu4": [], "cider": []}
    for _ in range(resamples):
        chosen = [photos[index] for index in generator.integers(0, len(photos), len(photos))]
        scores = score_captions(
            {str(place): captions[photo.name] for place, photo in enumerate(chosen)},
            {str(place): photo.captions for place, photo in enumerate(chosen)},
        )
        for name, values in drawn.items():
            values.append(scores[name])
    return {
        name: [round(float(edge), 3) for edge in np.quantile(values, (0.025, 0.975))] for name, values in drawn.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Caption, score, write."""
    from pydantic_settings import CliApp

    config = CliApp.run(EvaluationConfig, cli_args=arguments)
    checkpoint = resolve(config.checkpoint)
    photos = split_photos(read_captions(config.data))["test"][: config.photos]
    captions = generate(CaptionerModel(checkpoint), config.data, photos, config.batch_size)
    scores = score_captions(captions, {photo.name: photo.captions for photo in photos})
    lengths = [len(text.split()) for text in captions.values()]
    result = {
        "checkpoint": checkpoint.name,
        "photos": len(photos),
        "scores": {name: round(value, 4) for name, value in scores.items()},
        "intervals_95": bootstrap(captions, photos, config.resamples, config.seed),
        "tokenisation": "lower case, punctuation dropped, split at spaces",
        "words_mean": round(float(np.mean(lengths)), 2),
        "distinct_captions": len(set(captions.values())),
        "machine": platform.machine(),
    }
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps(result, indent=1) + "\n")
    if config.captions:
        rows = [{"id": photo.name, "caption": captions[photo.name], "references": photo.captions} for photo in photos]
        config.captions.write_text(json.dumps(rows))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
