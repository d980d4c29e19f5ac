"""Plain FastAPI with threads: endpoints on its thread pool, bytes as the body, no batches.

Decoding runs side by side; how many forward passes may is tuned (``THREADS``), and each has its share of the cores.
"""

import os
import threading

import torch
import uvicorn
from fastapi import Body, FastAPI

from benchmarks.peers.model import PORT, THREADS, Detector, setting

app = FastAPI()
detector = Detector()
_at_a_time = max(1, int(setting(THREADS, 1)))
torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "2")) // _at_a_time))
_passes = threading.Semaphore(_at_a_time)


@app.post("/predict")
def predict(data: bytes = Body(media_type="application/octet-stream")) -> dict[str, float]:
    view = detector.view(data)
    with _passes:
        return {"ai_probability": detector.probabilities(view[None])[0]}


@app.get("/ready")
def ready() -> str:
    return "ready"


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ[PORT]), log_level="warning")
