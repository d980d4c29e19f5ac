"""The one place where drift is watched for: a deployment of a single replica, off the path of every request.

In: observations that the ingress replicas hand over now and then, a bounded sample of the pictures that production's
detector answered; from the detector its revision's reference (``deployments.drift_statistic``). Out: metrics, a log
line when an alarm begins or ends, and, to whoever handed over, the state and what is to be kept of it. Another
revision's pictures are left out; with a new revision, or after a restart, the window fills anew.

Knows no HTTP, no database and no torch.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deployments.checkpoints import CheckpointError
from deployments.drift_statistic import CHANNELS, Channel, Look, Reference, Watch
from deployments.metrics import Metrics
from deployments.processor import step_back

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

_log = logging.getLogger("ray.serve")

#: How often the detector is asked which revision it runs, and how long it may take to say it.
_ASK_S, _ASK_TIMEOUT_S = 5.0, 5.0
#: A look is kept this often, and this often with the pictures that drove it; the beginning of an alarm always is.
_KEEP_S, _KEEP_PICTURES_S = 60.0, 3600.0
_DRIVERS = 24


@dataclass(frozen=True)
class Observation:
    """What is seen of one picture."""

    sha256: str
    revision: str
    observed: np.ndarray
    """The detector's own: projected embedding and margin, float32 ``(dimensions + 1,)``."""
    statistics: np.ndarray
    """``picture_statistics``, float32 ``(7,)``."""


class Drift:
    """The watcher's replica.

    Args:
        detector: production's.
    """

    def __init__(self, detector: DeploymentHandle) -> None:
        self._detector = detector
        self._metrics = Metrics()
        self._alone = asyncio.Lock()
        self._revision, self._message = "", "the detector has not said what it runs"
        self._watch: Watch | None = None
        self._asked_at = self._kept_at = self._kept_pictures_at = -float("inf")
        self._last: Look | None = None

    async def observe(self, observations: Sequence[Observation]) -> dict[str, Any]:
        """Take observations in; returns the state, and under ``keep`` rows that belong into the store."""
        async with self._alone:  # one window, one order
            await self._follow()
            rows = await asyncio.to_thread(self._take, observations)
            return self.state() | {"keep": rows}

    def state(self) -> dict[str, Any]:
        """What there is to say at present."""
        told: dict[str, Any] = {"revision": self._revision, "message": self._message, "watching": False}
        if self._watch is not None:
            told |= {"watching": True, "filled": round(self._watch.filled, 3), "alarm": self._watch.alarm}
            told["pictures"] = self._watch.pictures
            told["ratios"] = {} if self._last is None else _rounded(self._last)
        return told

    async def _follow(self) -> None:
        """Watch what the detector runs now."""
        if time.monotonic() - self._asked_at < _ASK_S:
            return
        self._asked_at = time.monotonic()
        response = self._detector.drift_reference.remote(self._revision)
        try:
            revision, data = await asyncio.wait_for(response, _ASK_TIMEOUT_S)
        except Exception as error:  # whatever keeps a model from answering is others' to report
            response.cancel()
            _log.debug("the detector does not say what it runs: %r", error)
            return
        if revision == self._revision:
            return
        self._revision, self._watch, self._last, self._message = revision, None, None, ""
        try:
            if data is not None:
                self._watch = await asyncio.to_thread(lambda: Watch(Reference.from_bytes(data)))
        except CheckpointError as error:
            self._message = str(error)
        if self._watch is None:
            self._message = self._message or (
                f"detector {revision} has no reference, and is not watched for drift: make one with `python -m "
                "train.drift_reference --checkpoint FOLDER --data PREPARED/aivshuman` before it is registered"
            )
            _log.warning(self._message)
        else:
            _log.info("detector %s is watched for drift, by a window of %d", revision, self._watch.reference.window)

    def _take(self, observations: Sequence[Observation]) -> list[dict[str, Any]]:
        step_back()  # nobody waits for it
        rows: list[dict[str, Any]] = []
        watch = self._watch
        self._metrics.drift_reference(self._revision, watch is not None)
        if watch is None:
            return rows
        before, counted = watch.repeated, 0
        for each in observations:
            if each.revision != self._revision:
                continue
            counted += 1
            projected, margin = each.observed[None, :-1], each.observed[-1:]
            row = watch.reference.observations(projected, margin, each.statistics[None])[0]
            look = watch.add(each.sha256, row)
            if look is not None:
                self._last = look
                rows += self._looked(watch, look)
        repeated = watch.repeated - before
        self._metrics.drift_pictures(self._revision, counted - repeated, repeated, len(observations) - counted)
        ratios = dict.fromkeys(CHANNELS, 0.0) if self._last is None else self._last.ratios
        self._metrics.drift(self._revision, ratios, watch.alarm)
        return rows

    def _looked(self, watch: Watch, look: Look) -> list[dict[str, Any]]:
        now = time.monotonic()
        begins = look.changed and look.alarm
        if look.changed:
            _log.warning(_line(self._revision, look, watch))
        with_pictures = begins or now - self._kept_pictures_at >= _KEEP_PICTURES_S
        if not (look.changed or with_pictures or now - self._kept_at >= _KEEP_S):
            return []
        self._kept_at = now
        if with_pictures:
            self._kept_pictures_at = now
        channel = strongest(look)
        drivers = watch.drivers(channel, _DRIVERS) if with_pictures else []
        return [
            {
                "at_s": time.time(),
                "revision": self._revision,
                "alarm": look.alarm,
                "changed": look.changed,
                "told": {
                    "pictures": look.pictures,
                    "window": watch.reference.window,
                    "ratios": _rounded(look),
                    "moved": watch.moved(),
                    "channel": channel,
                    "data": watch.reference.facts.get("data"),
                },
                "pictures": [(driver.sha256, driver.witness) for driver in drivers],
            }
        ]


def strongest(look: Look) -> Channel:
    """The channel that is nearest to its threshold, or farthest beyond it."""
    return max(CHANNELS, key=lambda channel: look.ratios[channel])


def _rounded(look: Look) -> dict[str, float]:
    return {channel: round(ratio, 4) for channel, ratio in look.ratios.items()}


def _line(revision: str, look: Look, watch: Watch) -> str:
    told = ", ".join(f"{channel} {ratio:.2f}" for channel, ratio in look.ratios.items())
    if not look.alarm:
        return f"drift has ended: the last {watch.reference.window} pictures look to detector {revision} as training's"
    return (
        f"DRIFT: the last {watch.reference.window} pictures do not look to detector {revision} as those that it was "
        f"trained on (times the threshold: {told}). Look with `python -m app.drift_report`; if it is the world and no "
        "fault of a sender's, label some (`python -m app.review push`) and `python -m train.retrain --when drift`"
    )
