"""BentoML: its own adaptive batching; files as a form, decoded on threads, a batch in one forward pass."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bentoml
import numpy as np

from benchmarks.peers.model import BATCH, WORKERS, Detector, setting


@bentoml.service(workers=int(setting(WORKERS, 1)), traffic={"timeout": 300, "max_concurrency": 1024})
class DetectorService:
    """The detector as a BentoML service."""

    def __init__(self) -> None:
        self.detector = Detector()
        self.threads = ThreadPoolExecutor(2)

    # its dispatcher drops what it expects to take longer than `max_latency_ms`; here nothing is to be dropped
    @bentoml.api(batchable=True, max_batch_size=int(setting(BATCH, 8)), max_latency_ms=300_000)
    def predict(self, files: list[Path]) -> list[float]:
        views = list(self.threads.map(lambda file: self.detector.view(file.read_bytes()), files))
        return self.detector.probabilities(np.stack(views))
