"""The trained half of a checkpoint on CLIP's tower: what is committed for ``starter:detector`` and
``starter:captioner``.

In: a folder that ``train.detector`` (a ``ClipBlocksForImageClassification``) or ``train.captioner`` (a BLIP on CLIP's
tower) wrote with ``--freeze tower``; a tower that is not the packaged one is refused. Out: a folder from which
``deployments.starter`` makes the whole checkpoint again.

    python -m train.extract --checkpoint ~/models/captioner --target deployments/starter_weights/captioner
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file

from deployments.checkpoints import Checkpoint, CheckpointError, resolve, scratch_folder
from deployments.drift_statistic import FILE
from deployments.towers import blip_vision_state, clip_state
from train.new_captioner import write_decoder


class ExtractConfig(BaseModel):
    """Take the trained half out of a checkpoint."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str = Field(description="folder or URI of the trained checkpoint")
    target: Path = Field(description="folder for the trained half and its card")


def extract(config: ExtractConfig) -> None:
    """Write what is committed: a detector's head as it is, a captioner's decoder in float16. What is there stays until
    all of it is made.

    Raises:
        CheckpointError: there is no such checkpoint, it is neither of the two, its tower is not the packaged one, or it
            is a detector without its reference.
    """
    checkpoint = resolve(config.checkpoint)
    parts = {"ClipBlocksForImageClassification": _detector, "BlipForConditionalGeneration": _captioner}
    if checkpoint.card.architecture not in parts:
        raise CheckpointError(
            f"{checkpoint.uri} is a {checkpoint.card.architecture}: only models on CLIP's tower come apart like this"
        )
    scratch = scratch_folder(config.target)
    try:
        parts[checkpoint.card.architecture](checkpoint, scratch)
        config.target.mkdir(exist_ok=True)
        for file in scratch.iterdir():
            file.replace(config.target / file.name)
    finally:
        shutil.rmtree(scratch)


def _card(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is committed says what its base is called and not where it lay on the machine that trained it."""
    card: dict[str, Any] = json.loads((checkpoint.folder / "card.json").read_text())
    base = str(card.get("training", {}).get("model", ""))
    if base.startswith("/"):
        card["training"]["model"] = Path(base).name
    return card


def _check_tower(
    checkpoint: Checkpoint, tower: Mapping[str, torch.Tensor], packaged: Mapping[str, torch.Tensor]
) -> None:
    """Make sure that the half that is left out is the one that will be put in again."""
    if tower.keys() != packaged.keys() or not all(
        torch.equal(value.float(), packaged[name]) for name, value in tower.items()
    ):
        raise CheckpointError(
            f"the image tower of {checkpoint.uri} is not the packaged one, on which its other half would be put: "
            "extract what was trained with --freeze tower on a starter model, or on --model new"
        )


def _detector(checkpoint: Checkpoint, target: Path) -> None:
    from deployments.detector_model import ClipBlocksForImageClassification

    if not (checkpoint.folder / FILE).is_file():
        raise CheckpointError(f"{checkpoint.uri} has no reference for drift: `python -m train.drift_reference` first")
    model: Any = ClipBlocksForImageClassification.from_pretrained(checkpoint.folder, use_safetensors=True)
    packaged = {name.removeprefix("vision_model."): value for name, value in clip_state().items()}
    tower = model.tower.state_dict()
    _check_tower(checkpoint, tower, {name: value for name, value in packaged.items() if name in tower})
    weights = {name: value.contiguous() for name, value in model.head.state_dict().items()}
    save_file(weights, target / "head.safetensors", metadata={"format": "pt"})
    (target / "head.safetensors").chmod(0o644)
    (target / "config.json").write_text(json.dumps(model.config.to_diff_dict(), indent=2) + "\n")
    (target / "card.json").write_text(json.dumps(_card(checkpoint), indent=2) + "\n")
    shutil.copyfile(checkpoint.folder / FILE, target / FILE)


def _captioner(checkpoint: Checkpoint, target: Path) -> None:
    from transformers import AutoTokenizer, BlipForConditionalGeneration

    model: Any = BlipForConditionalGeneration.from_pretrained(checkpoint.folder, use_safetensors=True)  # nosec B615 # a folder on disk
    _check_tower(checkpoint, model.vision_model.state_dict(), blip_vision_state(clip_state()))
    write_decoder(model.text_decoder, target, _card(checkpoint), torch.float16)
    words = AutoTokenizer.from_pretrained(checkpoint.folder).get_vocab()  # nosec B615 # a folder on disk
    (target / "vocab.txt").write_text("\n".join(sorted(words, key=words.__getitem__)) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    from pydantic_settings import CliApp

    try:
        extract(CliApp.run(ExtractConfig, cli_args=arguments))
    except CheckpointError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
