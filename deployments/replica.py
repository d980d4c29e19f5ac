"""What the picture models' replicas share: loading by URI, swapping a revision in place, batches on a worker thread.

A replica's event loop never computes: Serve's health checks, cancellations and queueing run on it. Batches run on one
thread of their own, which is also where a new revision is loaded, so that loading waits for the batch in flight and no
request is lost.

Knows no model class (a subclass names it) and no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from deployments.checkpoints import Checkpoint, resolve
from deployments.views import ViewSpec


class DeadlineExceeded(TimeoutError):
    """The request's time was over before its batch began; nobody waits for the answer."""


class ReplicaConfig(BaseModel):
    """A model deployment's ``user_config``: what may change without restarting a replica."""

    model_config = ConfigDict(extra="forbid")

    uri: str = Field(description="checkpoint to serve, see deployments.checkpoints")
    max_batch_size: int = Field(8, ge=1, le=256)
    batch_wait_timeout_s: float = Field(0.005, ge=0, le=1, description="how long a batch waits for company")


class ModelInfo(BaseModel):
    """What a replica says of the model it runs (``GET /v1/models``)."""

    uri: str
    revision: str
    card: dict[str, Any]
    views: ViewSpec | None = Field(None, description="the view of a picture to send; none for a model that reads text")


class PictureModel(Protocol):
    """A loaded checkpoint that reads views of pictures."""

    checkpoint: Checkpoint
    views: ViewSpec


Model = TypeVar("Model", bound=PictureModel)

#: A batch that runs longer than this is taken for a hang: the health check fails and Serve starts a new replica.
_STUCK_AFTER_S = 120.0


class Replica(Generic[Model]):
    """Base of ``Detector`` and ``Captioner``; subclasses implement ``load`` and their own requests."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._model: Model | None = None
        self._busy_since: float | None = None

    def load(self, checkpoint: Checkpoint) -> Model:
        """Load a checkpoint, on the worker thread."""
        raise NotImplementedError

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve's call at start and whenever ``user_config`` changes: same revision, no work; another, swapped in
        place.
        """
        config = ReplicaConfig.model_validate(user_config)
        self.configure_batching(config)
        checkpoint = await asyncio.to_thread(resolve, config.uri)
        current = self._model
        if (
            current is None
            or current.checkpoint.revision != checkpoint.revision
            or current.checkpoint.uri != config.uri
        ):
            self._model = await asyncio.get_running_loop().run_in_executor(self._worker, self.load, checkpoint)

    def configure_batching(self, config: ReplicaConfig) -> None:
        """Apply batch size and wait to the subclass's ``@serve.batch`` method."""

    @property
    def model(self) -> Model:
        """The model in service; a request keeps the one it started with."""
        if self._model is None:
            raise RuntimeError("no model is loaded: the deployment has no user_config")
        return self._model

    async def compute(self, function: Any, *arguments: Any) -> Any:
        """Run ``function`` on the worker thread."""

        def timed() -> Any:
            self._busy_since = time.monotonic()
            try:
                return function(*arguments)
            finally:
                self._busy_since = None

        return await asyncio.get_running_loop().run_in_executor(self._worker, timed)

    async def info(self) -> dict[str, Any]:
        """``ModelInfo`` of the model in service."""
        checkpoint = self.model.checkpoint
        return ModelInfo(
            uri=checkpoint.uri, revision=checkpoint.revision, card=checkpoint.card.model_dump(), views=self.model.views
        ).model_dump()

    def check_health(self) -> None:
        """Serve's health check.

        Raises:
            RuntimeError: one batch has been running for two minutes.
        """
        since = self._busy_since
        if since is not None and time.monotonic() - since > _STUCK_AFTER_S:
            raise RuntimeError(f"a batch has been running for {time.monotonic() - since:.0f} s")


def alive(deadlines: list[float]) -> list[int]:
    """Positions of the requests of a batch whose time is not over (``deadline`` is ``time.time()`` seconds)."""
    now = time.time()
    return [position for position, deadline in enumerate(deadlines) if deadline > now]
