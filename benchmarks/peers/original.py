"""The original system's way: FastAPI, a picture as base64 in JSON, one after another, float32."""

import base64
import os

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.peers.model import PORT, Detector

app = FastAPI()
detector = Detector(engine=False)


class Body(BaseModel):
    """What is posted."""

    image: str


@app.post("/predict")
async def predict(body: Body) -> dict[str, float]:
    """Everything on the event loop, as it was."""
    view = detector.view(base64.b64decode(body.image))
    return {"ai_probability": detector.probabilities(view[None])[0]}


@app.get("/ready")
async def ready() -> str:
    return "ready"


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ[PORT]), log_level="warning")
