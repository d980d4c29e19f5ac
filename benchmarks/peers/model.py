"""The detector as every server here runs it: the same checkpoint, engine, decoding and views.

Without Ray: a peer's process imports what its own users would import.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageClassification

import deployments.detector_model  # noqa: F401  registers our own class with transformers
from deployments.checkpoints import resolve
from deployments.engines import Engine, EngineEntry, last_layer, open_engine, pytorch_engine
from deployments.images import ImageLimits, decode
from deployments.pixels import Normalisation
from deployments.views import ViewSpec, render

#: How the program tells servers what to serve, where, and in what batches.
CHECKPOINT, PORT, BATCH, WAIT_S, THREADS, WORKERS = (
    f"DEEPTRUST_PEER_{name}" for name in ("CHECKPOINT", "PORT", "BATCH", "WAIT_S", "THREADS", "WORKERS")
)


def setting(name: str, default: float) -> float:
    """A number that the program has set."""
    return float(os.environ.get(name, default))


class Detector:
    """A loaded checkpoint.

    Args:
        engine: use the fastest engine that the checkpoint's card admits, as the project does; else PyTorch in float32.
    """

    def __init__(self, uri: str | None = None, engine: bool = True) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
        checkpoint = resolve(uri or os.environ.get(CHECKPOINT, "starter:detector"))
        self.views = ViewSpec.from_processor(checkpoint.folder)
        self._normalise = Normalisation.from_processor(checkpoint.folder)
        self._temperature = checkpoint.card.temperature
        self._ai = [label.lower() for label in checkpoint.card.labels].index("ai")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" and engine else torch.float32
        self.network = AutoModelForImageClassification.from_pretrained(  # nosec B615 # a folder on disk
            Path(checkpoint.folder), use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
        self.network.to(self.device, self.dtype).eval()
        self.engine = open_engine(checkpoint, self.device, self._by_pytorch) if engine else None

    def _by_pytorch(self, entry: EngineEntry) -> Engine:
        example = self._normalised(np.zeros((2, *self.views.shape), dtype=np.uint8))
        last = last_layer(self.network, self.network.config.num_labels)
        return pytorch_engine(self.network, last, entry.precision, self.device, entry.compiled, example)

    def _pixels(self, views: np.ndarray) -> torch.Tensor:
        pixels = self._normalise(views)
        return pixels if len(self.views.views) > 1 else pixels[:, 0]

    def _normalised(self, views: np.ndarray) -> np.ndarray:
        """As an engine reads it."""
        return np.ascontiguousarray(self._pixels(views).numpy())

    def view(self, data: bytes) -> np.ndarray:
        """A file's bytes -> uint8 views ``(V, S, S, 3)``."""
        return render(decode(data, ImageLimits()).image, self.views)

    @torch.inference_mode()
    def probabilities(self, views: np.ndarray) -> list[float]:
        """Of `ai`, calibrated, of views ``(n, V, S, S, 3)``."""
        if self.engine is not None:
            logits = self.engine[1](self._normalised(views))
        else:
            pixels = self._pixels(views).to(self.device, self.dtype)
            logits = self.network(pixel_values=pixels).logits.float().cpu().numpy()
        scaled = logits / self._temperature
        exponent = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return [float(value) for value in exponent[:, self._ai] / exponent.sum(axis=1)]
