"""A BLIP and a ViT with random weights go through train, register, evaluate and serve, on real photos: what a Serve
replica answers is what the module said in the training process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.trained_is_served import main
from data.prepare import main as prepare

pytestmark = [pytest.mark.proof, pytest.mark.timeout(3600)]


def test_what_is_trained_from_nothing_is_what_is_served(shared_data: Path, tmp_path: Path) -> None:
    prepared = tmp_path / "prepared"
    for name, raw in (("flickr30k", "flickr8k-224"), ("aivshuman", "aivshuman-mini")):
        prepare([name, "--input", str(shared_data / raw), "--output", str(prepared), "--split", "starter"])
    main(
        [
            *("--captions", str(prepared / "flickr30k"), "--pictures", str(prepared / "aivshuman")),
            *("--scratch", str(tmp_path), "--result", str(tmp_path)),
        ]
    )
    found = json.loads((tmp_path / "trained_is_served.json").read_text())
    blip, vit = found["captioner"], found["detector"]
    assert blip["architecture"] == "BlipForConditionalGeneration" and vit["architecture"] == "ViTForImageClassification"

    # it has learnt: its captions are likelier than their words alone, which are likelier than any words
    assert blip["training"]["mean_loss_of_last_tenth"] < 0.8 * blip["training"]["first_loss"]
    likelihood = blip["validation_nats_per_token"]
    assert likelihood["trained"] < likelihood["unigram"] - 0.2 < likelihood["uniform"]

    for model in (blip, vit):
        assert model["revision_evaluated_is_served"]
        # a few minutes make no model that may be promoted, and of a part of the test split none is
        assert not model["gate_passed"] and "was evaluated on 48 test pictures only" in model["promotion_refused"][0]
        assert model["largest_logit_difference"] <= 1e-4
    assert blip["registry_captions_as_in_training"] == blip["replica_captions_as_in_training"] == blip["compared"]
    assert vit["largest_probability_difference_of_replica"] <= 1e-4
    assert vit["bias_by_calibration"][0] == 0  # the one step between training and serving that is meant
    assert vit["spread_of_logits"] > 1e-2  # a model that says the same of everything would prove nothing
