"""BLIP-base at its full size (224 M parameters, 384 px) takes two optimiser steps under DDP on this machine.

The architecture is that of ``Salesforce/blip-image-captioning-base``; where its weights cannot be fetched they are
drawn at random. What is shown: the trainer fits, gradients reach every part, a checkpoint of 1 GB is written and
resumed from.

    python -m benchmarks.blip_base --data PREPARED/flickr30k --config F --processor F --vocabulary F
"""

from __future__ import annotations

import json
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.report import write_result
from data.session import RaySettings, ray_session
from train.captioner import train
from train.captioning import CaptionerTraining


class Architecture(BaseModel):
    """Where BLIP-base is described."""

    config: Path = Field(description="the architecture's config.json")
    processor: Path = Field(description="its preprocessor_config.json")
    vocabulary: Path = Field(description="vocab.txt of bert-base-uncased")


class BlipBaseBenchmark(Architecture):
    """Settings of a run."""

    model_config = ConfigDict(extra="forbid")

    data: str = Field(description="prepared flickr30k")
    workers: int = Field(2, ge=1, description="DDP workers")
    batch_size: int = Field(2, ge=1)
    steps: int = Field(2, ge=1)
    scratch: Path | None = Field(None, description="where 5 GB are free; unset: the temporary folder")


def random_blip(config: Architecture, folder: Path, spread: float | None = None) -> int:
    """A checkpoint of the architecture with random weights; returns how many parameters it has.

    Args:
        spread: standard deviation of all matrices; None: as the architecture draws them, which makes all pictures alike
            and all words equally likely.
    """
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration

    torch.manual_seed(0)
    model = BlipForConditionalGeneration(BlipConfig.from_dict(json.loads(config.config.read_text())))
    if spread is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, spread)
    model.save_pretrained(folder)
    shutil.copyfile(config.processor, folder / "preprocessor_config.json")
    words = config.vocabulary.read_text(encoding="utf-8").rstrip("\n") + "\n[DEC]\n[ENC]\n"
    (folder / "vocab.txt").write_text(words, encoding="utf-8")
    BertTokenizer(
        vocab=str(folder / "vocab.txt"),
        do_lower_case=True,
        bos_token="[DEC]",  # nosec B106 # a word of the vocabulary
        additional_special_tokens=["[ENC]"],
    ).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def main(arguments: list[str] | None = None) -> None:
    """Train and write ``results/blip_base.json``."""
    from pydantic_settings import CliApp

    config = CliApp.run(BlipBaseBenchmark, cli_args=arguments)
    with tempfile.TemporaryDirectory(prefix="blip-", dir=config.scratch) as name:
        folder = Path(name)
        parameters = random_blip(config, folder / "model")
        began = time.monotonic()
        values: dict[str, Any] = {
            "data": config.data,
            "model": str(folder / "model"),
            "output": str(folder / "out"),
            "storage": str(folder / "runs"),
            "record": False,
            "num_workers": config.workers,
            "batch_size": config.batch_size,
            "max_steps": config.steps,
            "validate_every": config.steps,
            "validation_photos": 2,
            "keep": 1,
        }
        with ray_session(RaySettings(num_cpus=4)):
            outcome = train(CaptionerTraining.model_validate(values))
        size = sum(file.stat().st_size for file in (folder / "out").iterdir())
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        result = {
            "parameters": parameters,
            "workers": config.workers,
            "steps": outcome.steps,
            "losses": [round(loss, 4) for _, loss in outcome.losses],
            "seconds": round(time.monotonic() - began, 1),
            "checkpoint_bytes": size,
            "largest_child_bytes": children * 1024,
        }
    print(json.dumps(result, indent=1), write_result("blip_base", result), sep="\n")


if __name__ == "__main__":
    main()
