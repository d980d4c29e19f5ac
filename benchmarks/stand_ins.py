"""The served graph with models that only take their time: what it costs to route, batch and control them.

``build`` is ``app.main.build`` itself, ingress, doors, batches and routers included, with models that sleep as long as
their checkpoint's name says: ``stand-in:BASE+EACH`` seconds for a batch of pictures; of a tagger, seconds of a step,
and ``xTOKENS`` of an answer. They compute nothing, so that many fit on a machine and what is measured is all else.
Imports no PyTorch where replicas run.
"""

# No postponed annotations here: Ray reads the annotation of `build`.
import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ray.serve import Application

from app.config import AppArgs
from deployments.annotation import Stage
from deployments.checkpoints import Card, Checkpoint
from deployments.replica import ModelInfo, Replica, ReplicaConfig
from deployments.views import ViewSpec


def parse(uri: str) -> tuple[float, float, float]:
    """(seconds of a batch or step, and for each in it, tokens of an answer)."""
    times, _, tokens = uri.removeprefix("stand-in:").partition("x")
    base, _, each = times.partition("+")
    return float(base), float(each or 0), float(tokens or 0)


class _Sleeper:
    """In a model's place."""

    in_parts = False

    def __init__(self, uri: str, task: Any, architecture: str) -> None:
        self.base_s, self.each_s, _ = parse(uri)
        self.views = ViewSpec()
        self.checkpoint = Checkpoint(uri, Path(), "1", Card(task=task, architecture=architecture))


class _SleepingReplica(Replica[_Sleeper]):
    """The real replica's door and batches; only the model is another."""

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        config = ReplicaConfig.model_validate(user_config)
        self._door.size = config.max_batch_size
        self._batch.set_max_batch_size(config.max_batch_size)  # type: ignore[attr-defined]
        self._batch.set_batch_wait_timeout_s(config.batch_wait_timeout_s)  # type: ignore[attr-defined]
        self._model = _Sleeper(config.uri, self.stage, "stand-in")

    def answer(self, model: _Sleeper, views: np.ndarray) -> list[dict[str, Any]]:
        time.sleep(model.base_s + model.each_s * len(views))
        return [dict(self.says, model=model.checkpoint.name) for _ in views]

    says: ClassVar[dict[str, Any]] = {}


class SleepingDetector(_SleepingReplica):
    """Takes a detector's time."""

    stage: ClassVar[Stage] = "detector"
    says: ClassVar[dict[str, Any]] = {"label": "uncertain", "ai_probability": 0.5}

    async def detect(self, views: np.ndarray, spec: ViewSpec, deadline: float) -> dict[str, Any]:
        return await self.batched(views, spec, deadline)


class SleepingCaptioner(_SleepingReplica):
    """Takes a captioner's time."""

    stage: ClassVar[Stage] = "captioner"
    says: ClassVar[dict[str, Any]] = {"text": "a picture"}

    async def caption(self, views: np.ndarray, spec: ViewSpec, deadline: float) -> dict[str, Any]:
        return await self.batched(views, spec, deadline)


class SleepingTagger:
    """Takes a vLLM engine's time: all requests advance by a token in each step."""

    def __init__(self, settings: Any) -> None:
        self.size, self.uri = settings.max_num_seqs, "stand-in:0.001+0x1"
        self._running: list[tuple[asyncio.Future[None], list[float]]] = []
        self._outside: list[asyncio.Future[None]] = []
        self._engine: asyncio.Task[None] | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        self.uri = user_config["uri"]

    async def tag(self, caption: str) -> dict[str, Any]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._outside.append(future)
        if self._engine is None or self._engine.done():
            self._engine = asyncio.get_running_loop().create_task(self._steps())
        await future
        name = f"{self.uri}#1"
        return {"tags": ["a", "b", "c"], "revision": "1", "model": name, "prompt": "none", "proposed": 3}

    async def _steps(self) -> None:
        base_s, each_s, tokens = parse(self.uri)
        due = time.monotonic()
        while self._running or self._outside:
            while self._outside and len(self._running) < self.size:
                self._running.append((self._outside.pop(0), [tokens]))
            # against a clock and not from sleep to sleep: what a timer is late would add up
            due = max(due, time.monotonic() - 0.02) + base_s + each_s * len(self._running)
            await asyncio.sleep(due - time.monotonic())
            for _, left in self._running:
                left[0] -= 1
            for future, left in self._running:
                if left[0] <= 0:
                    with contextlib.suppress(asyncio.InvalidStateError):  # its sender has gone away
                        future.set_result(None)
            self._running = [(future, left) for future, left in self._running if left[0] > 0]

    async def info(self) -> dict[str, Any]:
        card = Card(task="tagger", architecture="stand-in").model_dump()
        return ModelInfo(uri=self.uri, revision="1", card=card, views=None).model_dump()


def build(args: AppArgs) -> Application:
    """``app.main.build`` with stand-ins."""
    from app import main
    from deployments import tagger

    main.Detector, main.Captioner = SleepingDetector, SleepingCaptioner  # type: ignore[assignment,misc]
    tagger.Tagger = SleepingTagger  # type: ignore[assignment,misc]
    return main.build(args)
