"""The graph at work: one picture's bytes in, one annotation out.

Decoding, checking, provenance and the views are done once, on a thread of this process; detector and captioner then
run side by side and the tagger reads the caption. A stage that fails or is late leaves null and an entry in
``errors``; the others' answers still come.

Only arrays of a fixed, small size leave this process (``deployments.views``), never the picture. Knows handles, no
model; no HTTP beyond the problem that is raised when no stage could answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from app.config import CanaryShares, Limits
from app.problems import Problem
from deployments.annotation import Annotation, Provenance, Stage, Task
from deployments.heat_map import heat_map
from deployments.images import decode
from deployments.metrics import Metrics
from deployments.pixels import ViewMismatch
from deployments.provenance import read_provenance
from deployments.replica import DeadlineExceeded, ModelFailed, ModelInfo
from deployments.views import Box, ViewSpec, regions, render

Explain = Literal["png", "grid"]
TASKS: tuple[Task, ...] = ("detect", "caption", "tag")
_MODEL_STAGES: tuple[Stage, ...] = ("detector", "captioner", "tagger")

#: An idle stage is asked this often what it runs, a starting one that often.
_REFRESH_S, _REFRESH_STARTING_S = 5.0, 1.0
#: What Serve calls a deployment whose replicas are well.
_HEALTHY = frozenset(("HEALTHY", "UPSCALING", "DOWNSCALING"))
#: How long a replica may take to say what it runs before it counts as not answering.
_INFO_TIMEOUT_S = 3.0


@dataclass
class ModelRoute:
    """How one stage is reached: production, canary, and what each runs."""

    production: DeploymentHandle
    canary: DeploymentHandle | None = None
    info: ModelInfo | None = None
    canary_info: ModelInfo | None = None
    message: str = "starting"


@dataclass
class Prepared:
    """What is left of an upload once it has been decoded: its bytes and small arrays."""

    data: bytes
    provenance: Provenance
    views: dict[ViewSpec, np.ndarray]
    regions: dict[ViewSpec, list[Box]]


@dataclass
class _Progress:
    """One picture on its way."""

    annotation: Annotation
    deadline: float
    started: float = field(default_factory=time.perf_counter)


class Graph:
    """The models' handles, what they run, and how a picture goes through them."""

    def __init__(
        self,
        limits: Limits,
        production: Mapping[str, DeploymentHandle],
        canary: Mapping[str, DeploymentHandle],
        metrics: Metrics,
    ) -> None:
        self.limits = limits
        self.metrics = metrics
        self.shares = CanaryShares()
        self.routes = {stage: ModelRoute(production[stage], canary.get(stage)) for stage in _MODEL_STAGES}
        self._threads = ThreadPoolExecutor(limits.decode_threads, thread_name_prefix="decode")

    # ---- what runs ----------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Keep ``routes`` up to date for ever: which revision runs, which views it wants, or why it does not run."""
        while True:
            await asyncio.gather(*(self.refresh(stage) for stage in _MODEL_STAGES))
            await asyncio.sleep(_REFRESH_S if self.ready else _REFRESH_STARTING_S)

    async def refresh(self, stage: Stage) -> None:
        """Ask one stage, and its canary if it has a share, what it runs."""
        route = self.routes[stage]
        try:
            route.info = await self._info(route.production)
            route.message = ""
        except Exception as error:  # whatever keeps a model from answering is what readiness reports
            message, healthy = await asyncio.to_thread(_deployment_message, route.production, error)
            if route.info is not None and healthy and isinstance(error, (TimeoutError, BackPressureError)):
                return  # busy and not gone: what it runs is known
            route.info, route.message = None, message
        if route.canary is not None and getattr(self.shares, stage) > 0:
            with contextlib.suppress(Exception):
                route.canary_info = await self._info(route.canary)

    @staticmethod
    async def _info(handle: DeploymentHandle) -> ModelInfo:
        response = handle.info.remote()
        try:
            return ModelInfo.model_validate(await asyncio.wait_for(response, _INFO_TIMEOUT_S))
        except TimeoutError:
            response.cancel()
            raise

    @property
    def ready(self) -> bool:
        """Every stage has a replica that answers."""
        return all(route.info is not None for route in self.routes.values())

    # ---- one picture --------------------------------------------------------------------------------------------

    async def analyze(
        self, data: bytes, picture_id: str | None, tasks: frozenset[Task], explain: Explain | None, deadline: float
    ) -> Annotation:
        """Annotate one picture.

        Args:
            deadline: ``time.time()`` seconds after which nobody waits for the answer.

        Raises:
            ImageError: the bytes are not a picture that is accepted.
            Problem: no stage could answer.
        """
        loop, started = asyncio.get_running_loop(), time.perf_counter()
        specs = self._wanted_views(tasks)
        sha256, prepared = await loop.run_in_executor(self._threads, self._prepare, data, specs)
        progress = _Progress(Annotation(id=picture_id or uuid.uuid4().hex, sha256=sha256), deadline, started)
        record = progress.annotation
        record.timings_ms["decode"] = _milliseconds(started)

        branches: list[Awaitable[None]] = []
        if "detect" in tasks:
            branches.append(self._detect(progress, prepared, explain))
        if tasks & {"caption", "tag"}:
            branches.append(self._describe(progress, prepared, "tag" in tasks))
        running = [asyncio.ensure_future(branch) for branch in branches]
        try:
            await asyncio.gather(*running)
        finally:
            # a client that goes away cancels this task: what still runs for it is cancelled with it
            for branch in running:
                branch.cancel()
        record.timings_ms["total"] = _milliseconds(started)
        self.metrics.picture(record)
        if record.detection is None and record.caption is None and record.tags is None:
            raise _no_answer(record)
        return record

    def _wanted_views(self, tasks: frozenset[Task]) -> list[ViewSpec]:
        wanted = []
        needs: dict[Stage, bool] = {"detector": "detect" in tasks, "captioner": bool(tasks & {"caption", "tag"})}
        for stage, needed in needs.items():
            route = self.routes[stage]
            for info in (route.info, route.canary_info):
                if needed and info is not None and info.views is not None:
                    wanted.append(info.views)
        return wanted

    def _prepare(self, data: bytes, specs: list[ViewSpec]) -> tuple[str, Prepared]:
        picture = decode(data, self.limits.picture)
        size = picture.image.size
        return picture.sha256, Prepared(
            data,
            read_provenance(data, picture.format),
            {spec: render(picture.image, spec) for spec in set(specs)},
            {spec: regions(size, spec) for spec in set(specs)},
        )

    async def _views(self, prepared: Prepared, spec: ViewSpec) -> np.ndarray:
        """The views that a model asks for. Another revision with other views may have come into service since the
        picture was decoded: then it is decoded once more.
        """
        if spec not in prepared.views:
            loop = asyncio.get_running_loop()
            _, again = await loop.run_in_executor(self._threads, self._prepare, prepared.data, [spec])
            prepared.views |= again.views
            prepared.regions |= again.regions
        return prepared.views[spec]

    async def _detect(self, progress: _Progress, prepared: Prepared, explain: Explain | None) -> None:
        async def request(handle: DeploymentHandle, info: ModelInfo) -> tuple[dict[str, Any], Any]:
            assert info.views is not None
            views = await self._views(prepared, info.views)
            verdict = await _await(handle.detect.remote(views, info.views, progress.deadline), progress.deadline)
            if explain is None:
                return verdict, None
            maps = await _await(handle.explain.remote(views, info.views, progress.deadline), progress.deadline)
            return verdict, heat_map(maps, prepared.regions[info.views], explain == "png")

        answer = await self._stage(progress, "detector", request)
        if answer is not None:
            verdict, overlay = answer
            progress.annotation.detected(verdict, prepared.provenance, overlay)

    async def _describe(self, progress: _Progress, prepared: Prepared, tag: bool) -> None:
        async def caption(handle: DeploymentHandle, info: ModelInfo) -> dict[str, Any]:
            assert info.views is not None
            views = await self._views(prepared, info.views)
            return await _await(handle.caption.remote(views, info.views, progress.deadline), progress.deadline)

        captioned = await self._stage(progress, "captioner", caption)
        if captioned is None:
            if tag:
                progress.annotation.failed("tagger", "skipped", "there is no caption to tag")
            return
        progress.annotation.captioned(captioned)
        if not tag:
            return

        async def tags(handle: DeploymentHandle, _: ModelInfo) -> dict[str, Any]:
            return await _await(handle.tag.remote(captioned["text"]), progress.deadline)

        tagged = await self._stage(progress, "tagger", tags)
        if tagged is not None:
            progress.annotation.tagged(tagged)

    async def _stage(
        self,
        progress: _Progress,
        stage: Stage,
        request: Callable[[DeploymentHandle, ModelInfo], Awaitable[Any]],
    ) -> Any:
        """One stage's answer, or None and an entry in ``errors``.

        A stage is asked again, once, when a replica dies under a request, or has just taken a revision into service
        that reads other views.
        """
        route, started = self.routes[stage], time.perf_counter()
        handle, info = route.production, route.info
        if (
            route.canary is not None
            and route.canary_info is not None
            and self._to_canary(stage, progress.annotation.sha256)
        ):
            handle, info = route.canary, route.canary_info
        for attempt in (1, 2):
            if info is None:
                progress.annotation.failed(
                    stage, "unavailable", route.message or "the model has no replica that answers"
                )
                break
            try:
                answer = await request(handle, info)
                progress.annotation.timings_ms[stage] = _milliseconds(started)
                return answer
            except (TimeoutError, DeadlineExceeded):
                progress.annotation.failed(stage, "timeout", "the request's time was over")
            except BackPressureError:
                progress.annotation.failed(stage, "overloaded", "the model's queue is full")
            except ViewMismatch:
                if attempt == 1:
                    await self.refresh(stage)
                    info = route.canary_info if handle is route.canary else route.info
                    continue
                progress.annotation.failed(stage, "unavailable", "the model is being exchanged")
            except (RayActorError, DeploymentUnavailableError):
                if attempt == 1 and time.time() < progress.deadline:
                    handle, info = route.production, route.info
                    continue
                progress.annotation.failed(stage, "unavailable", "the model's replica went away")
            except ModelFailed as error:
                progress.annotation.failed(stage, "failed", f"the model failed: {error.args[0]}")
            except RayTaskError as error:
                progress.annotation.failed(stage, "failed", f"the model failed: {type(error.cause).__name__}")
            except Exception as error:
                progress.annotation.failed(stage, "failed", f"the stage failed: {type(error).__name__}")
            break
        progress.annotation.timings_ms[stage] = _milliseconds(started)
        return None

    def _to_canary(self, stage: Stage, sha256: str) -> bool:
        """Whether a picture belongs to a stage's canary: the same picture always gives the same answer."""
        return int(sha256[:8], 16) / 2**32 < getattr(self.shares, stage)


async def _await(response: Any, deadline: float) -> Any:
    """A replica's answer, or ``TimeoutError`` at the deadline, the work cancelled in either case of leaving early."""
    try:
        async with asyncio.timeout(max(0.0, deadline - time.time())):
            return await response
    except (TimeoutError, asyncio.CancelledError):
        response.cancel()
        raise


def _milliseconds(since: float) -> float:
    return round((time.perf_counter() - since) * 1000, 1)


def _no_answer(record: Annotation) -> Problem:
    """The problem to answer when every stage failed: the one that tells the client most about what to do."""
    codes = {error.code for error in record.errors}
    detail = "; ".join(f"{error.stage}: {error.detail}" for error in record.errors)
    for code in ("overloaded", "timeout", "unavailable"):
        if code in codes:
            return Problem(code, detail)
    return Problem("internal_error", detail)


def _deployment_message(handle: DeploymentHandle, error: Exception) -> tuple[str, bool]:
    """What Serve's controller says of a deployment that does not answer, and whether it takes it for healthy."""
    from ray import serve

    with contextlib.suppress(Exception):
        for application in serve.status().applications.values():
            status = application.deployments.get(handle.deployment_name)
            if status is not None:
                lines = (status.message or "").strip().splitlines()
                told = f"{status.status.value.lower()}" + (f": {lines[-1][:300]}" if lines else "")
                return told, status.status.value in _HEALTHY
    return f"no answer: {type(error).__name__}", False
