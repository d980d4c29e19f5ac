"""Starter models: built once, whole or not at all, and never used damaged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deployments.captioner import CaptionerModel
from deployments.checkpoints import CheckpointError, resolve
from deployments.detector import DetectorModel

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPTRUST_CACHE", str(folder))
        yield folder


def test_two_starts_at_a_time_build_it_once(cache: Path) -> None:
    program = "from deployments.checkpoints import resolve; print(resolve('starter:detector').revision)"
    running = [
        subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    revisions = {process.communicate(timeout=120)[0].strip() for process in running}
    assert len(revisions) == 1 and "" not in revisions
    built = [path.name for path in (cache / "starter").iterdir() if path.is_dir()]
    assert len(built) == 1 and built[0].startswith("detector-")


def test_the_starter_detector_gives_a_calibrated_probability_and_a_heat_map(cache: Path) -> None:
    model = DetectorModel(resolve("starter:detector"))
    noise = np.random.default_rng(0).integers(0, 255, (2, *model.views.shape), dtype=np.uint8)
    probabilities = model.detect(noise)
    assert probabilities.shape == (2,) and ((probabilities > 0) & (probabilities < 1)).all()
    maps = model.explain(noise[0])
    assert maps.shape == (len(model.views.views), 14, 14) and 0 <= maps.min() <= maps.max() == 1


def test_the_starter_captioner_writes_a_sentence_and_the_batch_does_not_matter(cache: Path) -> None:
    model = CaptionerModel(resolve("starter:captioner"))
    noise = np.random.default_rng(0).integers(0, 255, (3, *model.views.shape), dtype=np.uint8)
    together = model.caption(noise)
    assert all(len(caption.split()) >= 3 for caption in together)
    assert [model.caption(noise[index : index + 1])[0] for index in range(3)] == together


def test_a_damaged_file_stops_the_start_and_names_the_folder_to_remove(cache: Path) -> None:
    folder = resolve("starter:detector").folder
    weights = folder / "model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    try:
        with pytest.raises(CheckpointError, match=r"starter:detector is damaged \(model.safetensors\).*remove"):
            resolve("starter:detector")
    finally:
        weights.write_bytes(sound)
    assert resolve("starter:detector").folder == folder


def test_a_damaged_model_stops_the_application_with_one_line(cache: Path) -> None:
    config = resolve("starter:detector").folder / "config.json"
    sound = config.read_text()
    config.write_text(sound + " ")
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "app.serve"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )
    finally:
        config.write_text(sound)
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1].startswith("error: starter:detector is damaged (config.json)")
    assert "Traceback" not in ended.stderr
