"""The pictures of a version as training reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.versions import open_version
from deployments.views import ViewSpec
from tests.train.small import jpeg, write_version
from train.stream import Pictures, pictures_of


def test_what_a_version_admitted_is_read_whatever_the_application_accepts(tmp_path: Path) -> None:
    """``data.prepare --min-side-px 8 --max-pixels …``: the application's own limits are narrower."""
    colours = (np.full((12, 12, 3), colour) for colour in (20, 120, 220))
    rows = [
        {"image": jpeg(pixels), "label": "human", "split": split}
        for pixels, split in zip(colours, ("train", "train", "val"), strict=True)
    ]
    version = open_version(write_version(tmp_path, "aivshuman", rows))
    batch = next(Pictures.of(version, "train", ViewSpec(size_px=32)).load(0, np.arange(2)))
    assert [round(float(pixels.mean()), -1) for pixels in batch["pixels"]] == [20, 120]
    assert pictures_of(version, [0])[0].size == (12, 12)
