"""The graph at work: one picture's bytes in, one annotation out.

Decoding, checking, provenance and the views are done once, on a thread of this process; detector and captioner then
run side by side and the tagger reads the caption. A stage that fails or is late leaves null and an entry in
``errors``; the others' answers still come. In a trial (``app.trials``) a share of the pictures is answered by the
canary, and of a share both models are asked, the second beside the answer.

Only arrays of a fixed, small size leave this process (``deployments.views``), never the picture. Knows handles, no
model; no HTTP beyond the problem that is raised when no stage could answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from grpc.aio import AioRpcError
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from app.config import CanaryShares, Limits
from app.drift import Sampler
from app.problems import Problem
from app.trials import Role, Tried, agreement, arm_of, said
from deployments import telemetry
from deployments.annotation import Annotation, Provenance, Stage, Task
from deployments.drift_statistic import picture_statistics
from deployments.heat_map import heat_map
from deployments.images import decode
from deployments.metrics import Metrics, revision_of
from deployments.pixels import ViewMismatch
from deployments.provenance import read_provenance
from deployments.replica import DeadlineExceeded, ModelFailed, ModelInfo
from deployments.views import Box, ViewSpec, regions, render

_log = logging.getLogger("ray.serve")

Explain = Literal["png", "grid"]
TASKS: tuple[Task, ...] = ("detect", "caption", "tag")
_MODEL_STAGES: tuple[Stage, ...] = ("detector", "captioner", "tagger")

#: An idle stage is asked this often what it runs, a starting one that often.
_REFRESH_S, _REFRESH_STARTING_S = 5.0, 1.0
#: What Serve calls a deployment whose replicas are well.
_HEALTHY = frozenset(("HEALTHY", "UPSCALING", "DOWNSCALING"))
#: What Serve calls a deployment that it has given up.
_FAILED = "deploy_failed"
#: How long a replica may take to say what it runs before it counts as not answering.
_INFO_TIMEOUT_S = 3.0
#: A candidate that answers a canary's picture has this share of the time that is left for it.
_CANDIDATES_SHARE = 0.5
#: How often a model is asked for one picture's answer while its replicas are being exchanged.
_MOST_ATTEMPTS = 6
#: Answers of a trial that wait to be written down.
_MOST_WRITTEN = 10_000

#: Asks a model through its handle, told what it runs and until when anybody waits.
Request = Callable[[DeploymentHandle, ModelInfo, float], Awaitable[dict[str, Any]]]


class _Gone(Exception):
    """A model has no replica any more."""


@dataclass
class ModelRoute:
    """How one stage is reached: production, canary, and what each runs."""

    production: DeploymentHandle
    canary: DeploymentHandle | None = None
    info: ModelInfo | None = None
    canary_info: ModelInfo | None = None
    detail: str = "starting"
    """Why it does not answer, in Serve's words and a replica's: for operators, it may name files, hosts and code."""

    def runs(self, role: Role) -> ModelInfo | None:
        """What production or the candidate runs, if it answers."""
        return self.canary_info if role == "candidate" else self.info

    @property
    def failed(self) -> bool:
        """It does not answer and will not by itself."""
        return self.info is None and self.detail.startswith(_FAILED)

    @property
    def message(self) -> str:
        """Why it does not answer, for everybody; "" if it does."""
        if self.info is not None:
            return ""
        if self.failed:
            return "the model could not be started; the service's log says why"
        starting = self.detail.startswith(("starting", "updating", "upscaling"))
        return "the model is starting" if starting else "the model does not answer at the moment"


@dataclass
class Prepared:
    """What is left of an upload once it has been decoded: its bytes and small arrays."""

    data: bytes
    provenance: Provenance
    views: dict[ViewSpec, np.ndarray]
    regions: dict[ViewSpec, list[Box]]
    statistics: np.ndarray | None = None
    """For whoever watches for drift, of a picture of the sample."""


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
        sampler: Sampler,
    ) -> None:
        self.limits = limits
        self.metrics = metrics
        self._sampler = sampler
        self.shares, self.shadow = CanaryShares(), CanaryShares()
        self._comparing: set[asyncio.Task[None]] = set()
        self._written: list[Tried] = []
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
            route.detail = ""
        except Exception as error:  # whatever keeps a model from answering is what readiness reports
            detail, busy = await asyncio.to_thread(_deployment_message, route.production, error)
            if not (route.info is not None and busy):
                if detail != route.detail:
                    _log.warning("the %s does not answer: %s", stage, detail)
                route.info, route.detail = None, detail
        if route.canary is None or getattr(self.shares, stage) + getattr(self.shadow, stage) == 0:
            route.canary_info = None
            return
        try:
            route.canary_info = await self._info(route.canary)
        except Exception as error:
            if route.canary_info is None:
                return
            detail, busy = await asyncio.to_thread(_deployment_message, route.canary, error)
            if not busy:
                _log.warning("the canary of the %s does not answer, its share is production's: %s", stage, detail)
                route.canary_info = None

    @staticmethod
    async def _info(handle: DeploymentHandle) -> ModelInfo:
        response = handle.info.remote()
        try:
            return ModelInfo.model_validate(await asyncio.wait_for(response, _INFO_TIMEOUT_S))
        except TimeoutError:
            response.cancel()
            raise

    @property
    def revisions(self) -> dict[str, str]:
        """What production runs, as far as it is known."""
        return {stage: route.info.revision for stage, route in self.routes.items() if route.info is not None}

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
            Problem: no stage could answer, or the picture's turn came too late.
        """
        loop, started = asyncio.get_running_loop(), time.perf_counter()
        specs = self._wanted_views(tasks)
        sampled = "detect" in tasks and self._sampler.wants()
        with telemetry.span("decode", bytes=len(data)):
            try:
                sha256, prepared = await loop.run_in_executor(
                    self._threads, self._prepare, data, specs, deadline, sampled
                )
            except DeadlineExceeded as error:
                raise Problem("timeout", str(error)) from None
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
        self.metrics.picture(record, self.revisions)
        _note(record, {stage: route.detail for stage, route in self.routes.items()})
        if record.detection is None and record.caption is None and record.tags is None:
            raise _no_answer(record)
        return record

    def _wanted_views(self, tasks: frozenset[Task]) -> list[ViewSpec]:
        wanted = []
        needs: dict[Stage, bool] = {"detector": "detect" in tasks, "captioner": bool(tasks & {"caption", "tag"})}
        for stage, needed in needs.items():
            route = self.routes[stage]
            # of a canary that is only compared with, views are made when the answer has been given
            canary = route.canary_info if getattr(self.shares, stage) > 0 else None
            for info in (route.info, canary):
                if needed and info is not None and info.views is not None:
                    wanted.append(info.views)
        return wanted

    def _prepare(
        self, data: bytes, specs: list[ViewSpec], deadline: float, sampled: bool = False
    ) -> tuple[str, Prepared]:
        if time.time() >= deadline:  # it has waited for a thread, and nobody waits for it any more
            raise DeadlineExceeded("the request's time was over before the picture could be decoded")
        picture = decode(data, self.limits.picture)
        size = picture.image.size
        views = {spec: render(picture.image, spec) for spec in set(specs)}
        return picture.sha256, Prepared(
            data,
            read_provenance(data, picture.format),
            views,
            {spec: regions(size, spec) for spec in set(specs)},
            # the first view is the one that production's detector reads
            picture_statistics(picture, views[specs[0]][0]) if sampled and specs else None,
        )

    async def _views(self, prepared: Prepared, spec: ViewSpec, deadline: float) -> np.ndarray:
        """The views that a model asks for. Another revision with other views may have come into service since the
        picture was decoded: then it is decoded once more.
        """
        if spec not in prepared.views:
            loop = asyncio.get_running_loop()
            _, again = await loop.run_in_executor(self._threads, self._prepare, prepared.data, [spec], deadline)
            prepared.views |= again.views
            prepared.regions |= again.regions
        return prepared.views[spec]

    async def _detect(self, progress: _Progress, prepared: Prepared, explain: Explain | None) -> None:
        async def detect(handle: DeploymentHandle, info: ModelInfo, deadline: float) -> dict[str, Any]:
            assert info.views is not None
            views = await self._views(prepared, info.views, deadline)
            return await _await(handle.detect.remote(views, info.views, deadline), deadline)

        async def explained(handle: DeploymentHandle, info: ModelInfo, deadline: float) -> dict[str, Any]:
            assert info.views is not None
            answer = await detect(handle, info, deadline)
            answered = time.perf_counter()
            views = await self._views(prepared, info.views, deadline)
            maps = await _await(handle.explain.remote(views, info.views, deadline), deadline)
            loop, where = asyncio.get_running_loop(), prepared.regions[info.views]
            drawn = await loop.run_in_executor(self._threads, heat_map, maps, where, explain == "png")
            return answer | {"heat_map": drawn, "explained_s": time.perf_counter() - answered}

        answer = await self._stage(progress, "detector", explained if explain else detect, detect)
        if answer is not None:
            progress.annotation.detected(answer, prepared.provenance, answer.get("heat_map"))
            self._sampler.offer(progress.annotation.sha256, answer, prepared.statistics)

    async def _describe(self, progress: _Progress, prepared: Prepared, tag: bool) -> None:
        async def caption(handle: DeploymentHandle, info: ModelInfo, deadline: float) -> dict[str, Any]:
            assert info.views is not None
            views = await self._views(prepared, info.views, deadline)
            return await _await(handle.caption.remote(views, info.views, deadline), deadline)

        captioned = await self._stage(progress, "captioner", caption, caption)
        if captioned is None:
            if tag:
                progress.annotation.failed("tagger", "skipped", "there is no caption to tag")
            return
        progress.annotation.captioned(captioned)
        if not tag:
            return

        async def tags(handle: DeploymentHandle, _: ModelInfo, deadline: float) -> dict[str, Any]:
            return await _await(handle.tag.remote(captioned["text"]), deadline)

        tagged = await self._stage(progress, "tagger", tags, tags)
        if tagged is not None:
            progress.annotation.tagged(tagged)

    async def _stage(self, progress: _Progress, stage: Stage, request: Request, plain: Request) -> Any:
        """One stage's answer, or None and an entry in ``errors``.

        A picture of the canary's share is answered by the canary and, if that fails, by production.

        Args:
            request: asks a model.
            plain: the same without what only the caller wants; asks the other model of a trial.
        """
        with telemetry.span(f"stage {stage}") as span:
            answer, failure = await self._answered(progress, stage, request, plain)
            name = answer.get("model", "") if failure is None else ""
            span.set_attributes({"code": failure[0] if failure else "ok", "revision": revision_of(name)})
        if failure is not None:
            progress.annotation.failed(stage, *failure)
        return answer

    async def _answered(
        self, progress: _Progress, stage: Stage, request: Request, plain: Request
    ) -> tuple[Any, tuple[str, str] | None]:
        started, sha256 = time.perf_counter(), progress.annotation.sha256
        arm = arm_of(sha256, getattr(self.shares, stage), getattr(self.shadow, stage))
        answer: Any = None
        failure: tuple[str, str] | None = None
        role: Role = "production"
        if arm == "canary" and self.routes[stage].canary_info is not None:
            role = "candidate"
            # a candidate that hangs leaves production time to answer in its place
            until = time.time() + (progress.deadline - time.time()) * _CANDIDATES_SHARE
            answer, failure = await self._ask(stage, role, request, until)
            self._tried(stage, role, True, sha256, answer, failure, started)
        if answer is None and (role == "production" or time.time() < progress.deadline):
            role, began = "production", time.perf_counter()
            answer, failure = await self._ask(stage, role, request, progress.deadline)
            if arm is not None:
                self._tried(stage, role, True, sha256, answer, failure, began)
        progress.annotation.timings_ms[stage] = _milliseconds(started)
        if failure is None and arm in ("canary", "shadow"):
            self._compare(stage, "production" if role == "candidate" else "candidate", sha256, answer, plain)
        return answer, failure

    async def _ask(
        self, stage: Stage, role: Role, request: Request, deadline: float
    ) -> tuple[Any, tuple[str, str] | None]:
        """A model's answer, or None and why there is none: code and detail.

        It is asked again when a replica dies under the request, with growing pauses for a few seconds, and when it has
        just taken a revision into service that reads other views: with several replicas that may happen more than once.
        """
        route, has_died = self.routes[stage], False
        for attempt in range(_MOST_ATTEMPTS):
            handle = route.canary if role == "candidate" else route.production
            info = route.runs(role)
            if handle is None or info is None:
                return None, ("unavailable", route.message or "the model has no replica that answers")
            try:
                asked = request(handle, info, deadline)
                watched = has_died or role == "candidate"
                return await (self._while_there(route, role, asked) if watched else asked), None
            except (TimeoutError, DeadlineExceeded):
                return None, ("timeout", "the request's time was over")
            except BackPressureError:
                return None, ("overloaded", "the model's queue is full")
            except ViewMismatch:
                await asyncio.sleep(0.05 * attempt)
                await self.refresh(stage)
            except _Gone:
                return None, ("unavailable", route.message or "the model's replica went away")
            except (RayActorError, DeploymentUnavailableError, AioRpcError):  # the last: its server was stopped
                has_died = True
                pause_s = min(1.0, 0.1 * 2**attempt)
                if role == "candidate" or time.time() + pause_s >= deadline:
                    break
                # another replica takes it at once; where there is none, Serve starts one in a few seconds
                await asyncio.sleep(pause_s)
            except ModelFailed as error:
                return None, ("failed", f"the model failed: {error.args[0]}")
            except RayTaskError as error:
                return None, ("failed", f"the model failed: {type(error.cause).__name__}")
            except Exception as error:
                return None, ("failed", f"the stage failed: {type(error).__name__}")
        return None, ("unavailable", "the model is being exchanged, or its replica went away")

    @staticmethod
    async def _while_there(route: ModelRoute, role: Role, asked: Awaitable[dict[str, Any]]) -> dict[str, Any]:
        """A model's answer, as long as it is known to run. Serve keeps a request that has no replica to go to until
        its time is over, and the picture's other stages, and its place in the service, would wait with it.

        Raises:
            _Gone: no replica answers any more.
        """
        asking = asyncio.ensure_future(asked)
        try:
            while not asking.done():
                await asyncio.wait({asking}, timeout=_REFRESH_STARTING_S)
                if route.runs(role) is None and not asking.done():
                    raise _Gone
            return asking.result()
        finally:
            asking.cancel()

    # ---- trials -------------------------------------------------------------------------------------------------

    def _compare(self, stage: Stage, role: Role, sha256: str, answer: Any, plain: Request) -> None:
        """Ask the other model of a trial too, beside the answer and without anybody waiting for it."""
        info = self.routes[stage].runs(role)
        if info is None:
            return
        if len(self._comparing) >= self.limits.max_comparing:
            self.metrics.tried(stage, role, "dropped", info.revision)
            return

        async def compare() -> None:
            started = time.perf_counter()
            other, failure = await self._ask(stage, role, plain, time.time() + self.limits.request_timeout_s)
            agreed = agreement(answer, other) if failure is None else None
            if agreed is not None:
                candidate = other if role == "candidate" else answer
                self.metrics.agreed(stage, revision_of(candidate.get("model", "")), agreed)
            self._tried(stage, role, False, sha256, other, failure, started, agreed)

        task = asyncio.get_running_loop().create_task(compare())
        self._comparing.add(task)
        task.add_done_callback(self._comparing.discard)

    def _tried(
        self,
        stage: Stage,
        role: Role,
        returned: bool,
        sha256: str,
        answer: Any,
        failure: tuple[str, str] | None,
        started: float,
        agreed: float | None = None,
    ) -> None:
        info = self.routes[stage].runs(role)
        revision = revision_of(answer["model"]) if failure is None and "model" in answer else ""
        # the other model is not asked for a heat map
        explained_s = answer.get("explained_s", 0.0) if failure is None else 0.0
        tried = Tried(
            model=stage,
            role=role,
            returned=returned,
            revision=revision or (info.revision if info is not None else ""),
            sha256=sha256,
            code="ok" if failure is None else failure[0],
            seconds=round(time.perf_counter() - started - explained_s, 4),
            at_s=time.time(),
            said=said(answer) if failure is None else None,
            agreement=agreed,
        )
        self.metrics.tried(stage, role, tried.code, tried.revision)
        if len(self._written) < _MOST_WRITTEN:
            self._written.append(tried)

    def take_tried(self) -> list[dict[str, Any]]:
        """What trials have shown since the last call, as rows of the store."""
        taken, self._written = self._written, []
        return [tried.row() for tried in taken]


async def _await(response: Any, deadline: float) -> Any:
    """A replica's answer, or ``TimeoutError`` at the deadline, the work cancelled in either case of leaving early."""
    try:
        async with asyncio.timeout(max(0.0, deadline - time.time())):
            return await response
    except (TimeoutError, asyncio.CancelledError):
        response.cancel()
        raise


def _note(record: Annotation, details: Mapping[str, str]) -> None:
    """A line about a picture: what took how long, which revisions answered, which stage did not and why.

    Args:
        details: what operators are told of each stage that does not answer, and clients are not.
    """
    why = {error.stage: detail for error in record.errors if (detail := details.get(error.stage))}
    telemetry.note(
        "picture",
        **({"why": why} if why else {}),
        code="ok" if not record.errors else "partial" if record.models else "failed",
        errors={error.stage: error.code for error in record.errors},
        revisions={stage: revision_of(name) for stage, name in record.models.items() if "#" in name},
        timings_ms=record.timings_ms,
    )


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
    """What Serve's controller says of a deployment that does not answer, and whether it is only busy."""
    from ray import serve

    with contextlib.suppress(Exception):
        for application in serve.status().applications.values():
            status = application.deployments.get(handle.deployment_name)
            if status is not None:
                lines = (status.message or "").strip().splitlines()
                told = f"{status.status.value.lower()}" + (f": {lines[-1][:300]}" if lines else "")
                healthy = status.status.value in _HEALTHY
                return told, healthy and isinstance(error, (TimeoutError, BackPressureError))
    return f"no answer: {type(error).__name__}", False
