"""The same three models without HTTP and without Ray, batch after batch: what the graph and bulk annotation are held
against. Every core is theirs, and they compute as replicas do, batches in parts where that is faster.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from deployments.captioner import Captioner
from deployments.checkpoints import resolve
from deployments.detector import Detector
from deployments.images import Picture, decode
from deployments.offline_tagger import OfflineTagger
from deployments.provenance import read_provenance
from deployments.tagger import TaggerSettings
from deployments.views import ViewSpec, render


class BackToBack:
    """Detector, captioner and vLLM offline in one process.

    Args:
        uris: checkpoints by ``detector``, ``captioner`` and ``tagger``; those that are not named are the starter's.
        threads: that each model computes with; None: as many as there are cores.
    """

    def __init__(self, uris: Mapping[str, str] | None = None, threads: int | None = None) -> None:
        threads, uris = threads or os.cpu_count() or 1, uris or {}
        torch.set_num_threads(threads)
        self._detector, self._captioner = Detector(), Captioner()
        self._detects = self._detector.load(resolve(uris.get("detector", "starter:detector")))
        self._captions = self._captioner.load(resolve(uris.get("captioner", "starter:captioner")))
        self._tagger = OfflineTagger(resolve(uris.get("tagger", "starter:tagger")), TaggerSettings(threads=threads))

    def run(self, photos: Sequence[bytes | Path], batch_size: int = 8, group: int = 64) -> float:
        """Seconds for all photos: files read, decoded, detected and captioned in batches, tagged by groups."""
        started = time.perf_counter()
        for begin in range(0, len(photos), group):
            captions: list[str] = []
            for first in range(begin, min(begin + group, len(photos)), batch_size):
                batch = photos[first : min(first + batch_size, begin + group)]
                files = [photo.read_bytes() if isinstance(photo, Path) else photo for photo in batch]
                pictures = [decode(data) for data in files]
                for data, picture in zip(files, pictures, strict=True):
                    read_provenance(data, picture.format)
                self._detector.answers(self._detects, _views(pictures, self._detects.views))
                answers = self._captioner.answers(self._captions, _views(pictures, self._captions.views))
                captions += [answer["text"] for answer in answers if isinstance(answer, dict)]
            self._tagger.tag(captions)
        return time.perf_counter() - started


def _views(pictures: Sequence[Picture], spec: ViewSpec) -> np.ndarray:
    return np.stack([render(picture.image, spec) for picture in pictures])
