"""The ingress's side of watching for drift: a bounded sample of what it answers, handed to the watcher now and then.

In: what the detector said of a picture beside its answer, and the picture's own facts. Out: batches for the one
replica of ``deployments.drift``; rows for the store; the watcher's state for operators. Nothing here waits for
anything on a request's path, and what does not fit is not looked at: the sample is bounded by time, so busy hours
are thinned out and no picture is preferred for what it shows.

Knows no statistic and no SQL.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from deployments.drift import Observation
from deployments.metrics import revision_of

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

_log = logging.getLogger("ray.serve")

_HAND_OVER_S, _TIMEOUT_S = 5.0, 10.0
#: What may wait to be handed over, whatever the rate.
_MOST = 1024


class DriftSampleSettings(BaseModel):
    """``args.drift``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    per_s: float = Field(
        8.0, ge=0, le=200, description="pictures a second that each ingress replica has looked at, at most; 0: none"
    )


class Sampler:
    """What one ingress replica has seen and not yet handed over. Belongs to one event loop, ``wants`` aside."""

    def __init__(self, settings: DriftSampleSettings, watcher: DeploymentHandle | None) -> None:
        self._per_s, self._watcher = settings.per_s, watcher
        self._burst = max(1.0, settings.per_s * _HAND_OVER_S)
        self._tokens, self._at = self._burst, time.monotonic()
        self._waiting: list[Observation] = []
        self.state: dict[str, Any] = {"watching": False, "message": "off: args.drift.per_s is 0"}
        if self._per_s:
            self.state = {"watching": False, "message": "the watcher has not answered yet"}

    def wants(self) -> bool:
        """Whether the next picture is one of the sample."""
        if not self._per_s or len(self._waiting) >= _MOST:
            return False
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._per_s)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def offer(self, sha256: str, answer: Mapping[str, Any], statistics: np.ndarray | None) -> None:
        """A picture of the sample has been answered."""
        observed = answer.get("observed")
        if statistics is not None and observed is not None and len(self._waiting) < _MOST:
            self._waiting.append(Observation(sha256, revision_of(answer["model"]), observed, statistics))

    async def run(self, keep: Callable[[list[dict[str, Any]]], None]) -> None:
        """Hand over for ever.

        Args:
            keep: given rows for the store.
        """
        while self._per_s and self._watcher is not None:
            if rows := await self.hand_over():
                keep(rows)
            await asyncio.sleep(_HAND_OVER_S)
        await asyncio.Event().wait()

    async def hand_over(self) -> list[dict[str, Any]]:
        """Give the watcher what waits, and learn its state; rows for the store. With nothing to give, too: a watcher
        that nobody asks does not notice another revision, and its metrics go stale."""
        assert self._watcher is not None
        taken, self._waiting = self._waiting, []
        response = self._watcher.observe.remote(taken)
        try:
            state = await asyncio.wait_for(response, _TIMEOUT_S)
        except Exception as error:  # a watcher that is gone or late costs no picture its answer
            response.cancel()
            self.state = {"watching": False, "message": f"the watcher does not answer: {type(error).__name__}"}
            _log.debug("drift: %d observations are lost: %r", len(taken), error)
            return []
        rows = state.pop("keep")
        self.state = state
        return rows
