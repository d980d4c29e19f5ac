"""The starter captioner's model: a BLIP whose image tower is CLIP's (``deployments.towers``) and whose text decoder was
trained here.

In: the trained half, as ``train.new_captioner`` writes it. Out: a checkpoint folder like any other BLIP's. Knows no Ray
and no HTTP.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration

from deployments.towers import CLIP_MEAN, CLIP_STD, blip_vision_config, blip_vision_state, clip_state


def assemble_captioner(source: Path, target: Path) -> None:
    """Write a complete BLIP checkpoint from CLIP's tower and a trained decoder (``decoder.safetensors``,
    ``vocab.txt``, ``card.json``).
    """
    text = json.loads((source / "text_config.json").read_text())
    config = BlipConfig(text_config=text, vision_config=blip_vision_config().to_dict())
    model = BlipForConditionalGeneration(config)
    model.vision_model.load_state_dict(blip_vision_state(clip_state()))
    decoder = {name: value.float() for name, value in load_file(source / "decoder.safetensors").items()}
    missing, unexpected = model.text_decoder.load_state_dict(decoder, strict=False)
    # the output layer is tied to the word embeddings and its bias to the head's: neither is stored twice
    if unexpected or set(missing) - {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}:
        raise RuntimeError(f"{source} does not fit the decoder: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.save_pretrained(target)
    BertTokenizer(
        vocab=str(source / "vocab.txt"),
        do_lower_case=True,
        bos_token="[DEC]",  # noqa: S106  # nosec B106 # a word of the vocabulary
        additional_special_tokens=["[ENC]"],
    ).save_pretrained(target)
    size = config.vision_config.image_size
    processor = {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "BlipProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
    (target / "preprocessor_config.json").write_text(json.dumps(processor, indent=1))
    shutil.copy(source / "card.json", target / "card.json")
