"""From the uint8 views that cross between processes to the tensor that a model reads.

Resizing has been done by ``deployments.views`` in the process that decoded the picture; what is left is scaling and the
normalisation that the checkpoint's own processor states. Knows no model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


class ViewMismatch(ValueError):
    """The views are not those that the model reads; the sender's view specification is out of date."""


@dataclass(frozen=True)
class Normalisation:
    """Per-channel ``(pixel * scale - mean) / std`` of a checkpoint's image processor."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255

    @classmethod
    def from_processor(cls, folder: Path) -> Normalisation:
        """Of a checkpoint folder, by the settings of its image processor.

        Raises:
            FileNotFoundError: the checkpoint has no such settings.
        """
        settings = processor_settings(folder)
        normalised = settings.get("do_normalize", True)
        return cls(
            tuple(settings.get("image_mean") or (0.5,) * 3) if normalised else (0.0,) * 3,
            tuple(settings.get("image_std") or (0.5,) * 3) if normalised else (1.0,) * 3,
            float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 1.0,
        )

    def __call__(self, views: np.ndarray) -> torch.Tensor:
        """uint8 ``(..., height, width, 3)`` -> float32 ``(..., 3, height, width)``."""
        import torch  # here: the shape check below is used by processes that have no model

        pixels = torch.from_numpy(np.ascontiguousarray(views)).movedim(-1, -3).float()
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels * self.scale - mean) / std


def processor_settings(folder: Path) -> dict[str, Any]:
    """The image processor's settings of a checkpoint: ``preprocessor_config.json``, or the image part of
    ``processor_config.json``, as its version of transformers wrote them.

    Raises:
        FileNotFoundError: the checkpoint has neither.
    """
    plain, combined = folder / "preprocessor_config.json", folder / "processor_config.json"
    if plain.is_file():
        return json.loads(plain.read_text())
    # beside the plain file, this one names the processor's class alone
    if combined.is_file() and (settings := json.loads(combined.read_text()).get("image_processor")):
        return settings
    raise FileNotFoundError(
        f"{folder} has no preprocessor_config.json, and no processor_config.json with an image_processor: the "
        "checkpoint does not say how pictures are prepared"
    )


def check_views(views: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise ``ViewMismatch`` unless ``views`` is uint8 of exactly ``shape``."""
    if views.dtype != np.uint8 or views.shape != shape:
        raise ViewMismatch(f"expected uint8 {shape}, got {views.dtype} {views.shape}")
