"""LitServe: its own batching; the file as a form, which it hands to its worker process; a batch decoded on threads."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import litserve as ls
import numpy as np
from fastapi import Request

from benchmarks.peers.model import BATCH, PORT, WAIT_S, WORKERS, Detector, setting


class DetectorAPI(ls.LitAPI):
    """The detector in LitServe's steps. It would decode one file after another: the batch's step does that instead."""

    def setup(self, device: str) -> None:
        self.detector = Detector()
        self.threads = ThreadPoolExecutor(2)

    def decode_request(self, request: Request) -> bytes:
        form: Any = request  # LitServe hands over the form of a request, not the request
        return form["file"].file.read()

    def batch(self, inputs: list[bytes]) -> np.ndarray:
        return np.stack(list(self.threads.map(self.detector.view, inputs)))

    def predict(self, x: np.ndarray) -> list[float]:
        return self.detector.probabilities(x)

    def unbatch(self, output: list[float]) -> list[float]:
        return output

    def encode_response(self, output: Any) -> dict[str, float]:
        return {"ai_probability": float(output)}


if __name__ == "__main__":
    # `mcp` is there for vLLM, in another version than LitServe's tools for language models can use; no part of this
    ls.server._MCP_AVAILABLE = False
    api = DetectorAPI(max_batch_size=int(setting(BATCH, 8)), batch_timeout=setting(WAIT_S, 0.005))
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=int(setting(WORKERS, 1)), timeout=300)
    server.run(
        host="127.0.0.1", port=int(os.environ[PORT]), num_api_servers=1, log_level="warning", generate_client_file=False
    )
