"""The HTTP interface, version 1, and the page: the first deployment that a request meets.

Admission, limits and problems are decided here; the work is ``app.analysis``, and what is kept of its answers
``app.store``. Uploads are held in memory only, unless the store's settings say otherwise, and their names are never
used. Knows no model.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Header, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import idempotency
from app.access import RequestLines, Taken
from app.admission import Admission
from app.analysis import TASKS, Explain, Graph
from app.authentication import RequireKey, caller_of, check_exposure, is_operator
from app.callbacks import Callbacks, CallbackSettings
from app.closing import Closing, Gate
from app.config import IngressConfig, Limits
from app.deferred import Deferral, PlaceId, Waiting, wants_to_wait
from app.drift import DriftSampleSettings, Sampler
from app.feedback import router
from app.openapi import ANALYZE_BODY, ANALYZE_RESPONSES, CALLBACKS, RESULT_RESPONSES, use_local_docs
from app.problems import Problem, install, responses
from app.receiving import Receiving
from app.store import key_uses
from app.store.settings import StoreSettings
from app.store.store import Store
from app.uploads import Upload, UploadLimits, check_declared, in_time, read_uploads
from deployments import telemetry
from deployments.annotation import Annotation, Task
from deployments.images import ImageError
from deployments.metrics import Metrics

_PAGE = Path(__file__).parent / "page"
_SAMPLES = Path(__file__).parent.parent / "samples"

_Answering = Callable[[Request, frozenset[Task], Explain | None], Awaitable[Response]]

#: How often gauges are set: what they show changes with every request.
_SAMPLE_S = 5.0

#: No inline script, nothing from elsewhere; pictures come from the page's own blobs and from data URLs of heat maps.
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "frame-ancestors 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}


class SecurityHeaders:
    """ASGI middleware: the same protective headers on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)


class Heads:
    """ASGI middleware: HEAD is answered as GET would be, to whoever may ask for that, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        if scope["type"] == "http" and scope["method"] == "HEAD":
            # a copy: the server goes by the method, too
            await self.app({**scope, "method": "GET"}, receive, without_body)
        else:
            await self.app(scope, receive, send)


api = FastAPI(
    title="DeepTrust",
    version="1",
    summary="Is a picture AI-generated, what does it show, and which tags find it again.",
    description="A verdict is a calibrated probability, not proof: never take a picture down on it alone.\n\n"
    "Every answer to a request whose headers have come bears an `X-Request-ID`: the request's own, or one that was "
    "made. Logs and problems name it. `traceparent` is honoured where traces are on.",
    docs_url=None,
    redoc_url=None,
    # behind a proxy that ends TLS it would lead to http://, and a picture be sent again for all to read
    redirect_slashes=False,
)


def _gate() -> Gate:
    """The gate of the replica that answers."""
    return serve.get_replica_context().servable_object.gate


async def _share(day: int, uses: Mapping[str, int]) -> Mapping[str, int]:
    """What keys come to on a day, in all replicas, by way of the store."""
    store: Store = serve.get_replica_context().servable_object.store
    return await store.commit(partial(key_uses.add, day=day, uses=uses))


api.add_middleware(Closing, gate=_gate)
api.add_middleware(RequireKey, share=_share, hosts=lambda: serve.get_replica_context().servable_object.limits.hosts)
api.add_middleware(SecurityHeaders)
api.add_middleware(Heads)
api.add_middleware(RequestLines)
api.add_middleware(Taken)
install(api)
use_local_docs(api)


async def _store() -> Store:
    """The store of the replica that answers."""
    return serve.get_replica_context().servable_object.store


def _judged(part: str, answer: str, is_right: bool, revision: str) -> None:
    """Count an event of feedback."""
    serve.get_replica_context().servable_object.metrics.feedback(part, answer, is_right, revision)


api.include_router(router(_store, _judged))

Tasks = Annotated[str, Query(description="comma-separated: detect, caption, tag", examples=["detect,caption"])]
ExplainQuery = Annotated[
    Literal["false", "true", "png", "grid"], Query(description="add a heat map; `true` means `png`")
]
Prefer = Annotated[
    str | None,
    Header(
        description="`respond-async`: answered with 202 and a place as soon as the pictures are on disk, and worked on "
        "when there is room (RFC 7240)"
    ),
]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=128,
        pattern=r"^[^\x00-\x1f\x7f]+$",
        description="the caller's own name of this request: sent again under it, it gets the same answer or the same "
        "place, and is kept once",
    ),
]
CallbackUrl = Annotated[
    str | None,
    Header(
        max_length=2048,
        json_schema_extra={"format": "uri"},
        description="with `respond-async`: told by a signed `POST` when the answer is there. Only addresses that the "
        "service's settings allow",
    ),
]
_ONE_PART: dict[int | str, dict[str, Any]] = {**ANALYZE_RESPONSES, **responses("conflict")}
PictureId = Annotated[
    str | None, Query(min_length=1, max_length=128, description="the caller's own id of a single picture")
]  # read by app.uploads; declared here for the documentation


# Helpers stand above the class: Serve pickles the application with what its routes name at the moment of decoration.


def _static(folder: Path, name: str) -> Response:
    """A file that lies directly in a folder; nothing else, whatever the name says."""
    if name not in {path.name for path in folder.iterdir() if path.is_file()}:
        raise Problem("not_found", f"there is no {name[:100]!r} here")
    return FileResponse(folder / name, headers={"cache-control": "no-cache"})


def _http_host() -> str | None:
    """Where Serve listens; None: nowhere."""
    from ray.serve.context import _get_global_client

    return _get_global_client().http_config.host


def _parse_tasks(text: str) -> frozenset[Task]:
    chosen = {name.strip() for name in text.split(",") if name.strip()}
    unknown = chosen - set(TASKS)
    if unknown or not chosen:
        raise Problem("unknown_task", f"tasks={text[:100]!r}: choose from {', '.join(TASKS)}")
    return frozenset(task for task in TASKS if task in chosen)


def _why_not(settings: StoreSettings) -> str:
    """Why a store cannot be used on this cluster, or "": replicas on two nodes would each have a SQLite file."""
    import ray

    if not settings.database_url.startswith("sqlite"):
        return ""
    # several raylets may run on one machine
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = len({(node["NodeManagerHostname"], node["NodeManagerAddress"]) for node in alive})
    if nodes > 1:
        return f"a SQLite store serves one node and there are {nodes}: give store.url a PostgreSQL"
    return ""


def _revisions(in_service: Mapping[str, str], tasks: frozenset[Task]) -> str:
    """Revisions of the models that tasks need, as one label."""
    needed = {"detector": "detect" in tasks, "captioner": bool(tasks & {"caption", "tag"}), "tagger": "tag" in tasks}
    return "+".join(in_service.get(stage, "none") for stage, is_needed in needed.items() if is_needed)


def _item(result: dict[str, Any] | BaseException) -> dict[str, Any]:
    """One picture's place in the answer for several: its record, or its problem."""
    if isinstance(result, Problem):
        return result.to_dict()
    if isinstance(result, BaseException):
        if not isinstance(result, Exception):
            raise result
        return Problem("internal_error", "the picture could not be analysed").to_dict()
    return result


@serve.ingress(api)
class Ingress:
    """The application's HTTP side; holds the graph and what is in flight."""

    def __init__(
        self,
        limits: Limits,
        production: Mapping[str, DeploymentHandle],
        canary: Mapping[str, DeploymentHandle],
        store: StoreSettings,
        callbacks: CallbackSettings,
        drift: DriftSampleSettings,
        watcher: DeploymentHandle,
    ) -> None:
        # one warning for each malformed body would let anybody fill the log
        logging.getLogger("python_multipart").setLevel(logging.ERROR)
        self.limits = limits
        self.uploads = UploadLimits(
            max_pictures=limits.max_pictures,
            max_bytes=limits.picture.max_bytes,
            max_request_bytes=limits.max_request_bytes,
        )
        self.metrics = Metrics()
        self.drift = Sampler(drift, watcher)
        self.graph = Graph(limits, production, canary, self.metrics, self.drift)
        self.store = Store(store, limits.picture.max_bytes, lambda: _why_not(store))
        self.store.start()
        self.admission = Admission(limits.max_in_flight, limits.max_waiting, limits.max_wait_s, limits.target_s)
        self.gate = Gate()
        self.deferral = Deferral(
            self.store, self.graph, self.admission, limits.request_timeout_s, lambda: self.gate.closed
        )
        self.callbacks = Callbacks(callbacks, self.store, lambda outcome: self.metrics.record("callbacks", 1, outcome))
        self.receiving = Receiving(
            limits.max_receiving, limits.max_receiving_bytes, limits.max_waiting, limits.max_wait_s
        )
        self._watcher: asyncio.Task[None] | None = None
        self._deferred: asyncio.Task[None] | None = None
        self._calling_back: asyncio.Task[None] | None = None
        self._sampler: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve's call at start and on a change of ``user_config``: shares of the canaries, and whether it stops.

        Trials are the canaries' and follow their shares; what else ``app.canary`` notes there is for itself.

        Raises:
            KeyFileError: others reach the application, and there are no API keys.
        """
        config = IngressConfig.model_validate(user_config)
        self.graph.shares, self.graph.shadow = config.canary, config.shadow
        self.gate.closed = config.stopping
        if self._watcher is None:
            check_exposure(await asyncio.to_thread(_http_host))
            self._watcher = asyncio.get_running_loop().create_task(self.graph.watch())
            self._sampler = asyncio.get_running_loop().create_task(self._sample())
            self._watching = asyncio.get_running_loop().create_task(self.drift.run(self.store.offer_drift))
            self._deferred = asyncio.get_running_loop().create_task(self.deferral.run())
            self._calling_back = asyncio.get_running_loop().create_task(self.callbacks.run())

    async def _sample(self) -> None:
        """Set the gauges and hand what trials have shown to the store, for ever."""
        while True:
            if tried := self.graph.take_tried():
                self.store.offer_trials(tried)
            self.metrics.queue(self.admission.in_work, self.admission.limit, self.admission.waiting)
            self.metrics.deferred(await self.deferral.backlog())
            self.metrics.record("callbacks_due", await self.callbacks.count_due())
            self.metrics.store(self.store.status())
            self.metrics.stages(
                {stage: route.info is not None for stage, route in self.graph.routes.items()},
                self.graph.shares.model_dump(),
            )
            await asyncio.sleep(_SAMPLE_S)

    def __del__(self) -> None:
        """Serve's call when the replica ends: what waits is written."""
        if hasattr(self, "store"):
            if tried := self.graph.take_tried():
                self.store.offer_trials(tried)
            self.deferral.close()
            self.store.close()
            self.callbacks.close()

    async def check_health(self) -> None:
        """Serve's health check: what runs beside the requests is alive."""
        for task in (self._watcher, self._sampler, self._deferred, self._calling_back, self._watching):
            if task is not None and task.done():
                raise RuntimeError(f"a task of the ingress ended: {task.exception()!r}")

    # ---- analysis -----------------------------------------------------------------------------------------------

    @api.post(
        "/v1/analyze",
        tags=["annotate"],
        openapi_extra=ANALYZE_BODY | CALLBACKS,
        responses={
            **ANALYZE_RESPONSES,
            **responses("truncated", "too_small", "unknown_task", "bad_parameter", "callback_refused", "conflict"),
            202: {"model": Waiting, "description": "accepted with `Prefer: respond-async`; `Location` has the answer"},
        },
    )
    async def analyze(
        self,
        request: Request,
        tasks: Tasks = "detect,caption,tag",
        explain: ExplainQuery = "false",
        id: PictureId = None,
        prefer: Prefer = None,
        idempotency_key: IdempotencyKey = None,
        callback_url: CallbackUrl = None,
    ) -> Response:
        """Verdict, caption and tags of one picture, or of several in their order."""
        waits, is_possible = wants_to_wait(request.headers.getlist("prefer")), self.deferral.is_possible
        if callback_url is not None:
            self.callbacks.check(callback_url, waits, is_possible)
        if waits and is_possible:
            own = idempotency.own(caller_of(request.scope), idempotency_key)
            how = partial(self._deferring, own, callback_url)
            return await self._answer(request, _parse_tasks(tasks), explain, how)
        return await self._answer(request, _parse_tasks(tasks), explain, key=idempotency_key)

    @api.get(
        "/v1/results/{place}",
        tags=["annotate"],
        responses={**RESULT_RESPONSES, 202: {"model": Waiting, "description": "not there yet"}},
    )
    async def result(self, place: PlaceId) -> Response:
        """The answer to a request that was accepted with `Prefer: respond-async`: as it would have been at once.

        A problem with `"final": true` is that answer, whatever its status: do not ask again. A 429 or 503 without it
        says that nobody can look there at the moment.
        """
        return await self.deferral.result(place)

    @api.post("/v1/detect", tags=["annotate"], openapi_extra=ANALYZE_BODY, responses=_ONE_PART)
    async def detect(
        self,
        request: Request,
        explain: ExplainQuery = "false",
        id: PictureId = None,
        idempotency_key: IdempotencyKey = None,
    ) -> Response:
        """The verdict alone."""
        return await self._answer(request, frozenset({"detect"}), explain, key=idempotency_key)

    @api.post("/v1/caption", tags=["annotate"], openapi_extra=ANALYZE_BODY, responses=_ONE_PART)
    async def caption(self, request: Request, id: PictureId = None, idempotency_key: IdempotencyKey = None) -> Response:
        """The caption alone."""
        return await self._answer(request, frozenset({"caption"}), "false", key=idempotency_key)

    @api.post("/v1/tag", tags=["annotate"], openapi_extra=ANALYZE_BODY, responses=_ONE_PART)
    async def tag(self, request: Request, id: PictureId = None, idempotency_key: IdempotencyKey = None) -> Response:
        """Tags, and the caption that they were made from."""
        return await self._answer(request, frozenset({"tag"}), "false", key=idempotency_key)

    async def _answer(
        self,
        request: Request,
        tasks: frozenset[Task],
        explain: str,
        how: _Answering | None = None,
        key: str | None = None,
    ) -> Response:
        started, code = time.perf_counter(), "disconnected"
        wanted: Explain | None = None if explain == "false" else ("grid" if explain == "grid" else "png")
        try:
            own = idempotency.own(caller_of(request.scope), key)
            answer = await (how or partial(self._admitted, own))(request, tasks, wanted)
            code = request.state.code = "ok" if answer.status_code == 200 else "accepted"
            return answer
        except Problem as problem:
            code = problem.code
            raise
        except ClientDisconnect:
            raise
        except Exception:
            code = "internal_error"
            raise
        finally:
            revision = getattr(request.state, "revision", "")
            self.metrics.request(request.scope["route"].path, code, time.perf_counter() - started, revision)

    async def _deferring(
        self,
        key: str | None,
        callback: str | None,
        request: Request,
        tasks: frozenset[Task],
        explain: Explain | None,
    ) -> Response:
        """Take the pictures in, for a sender who can wait."""
        most = self.uploads.max_body_bytes
        declared = check_declared(request, most)  # what is refused anyway takes no room
        async with AsyncExitStack() as stack:
            with telemetry.span("wait for a place"):
                await stack.enter_async_context(self.receiving.room(most if declared is None else declared))
            async with in_time(self.limits.request_timeout_s):
                with telemetry.span("read body"):
                    uploads = await read_uploads(request, self.uploads)
            request.state.pictures = len(uploads)
            return await self.deferral.accept(uploads, tasks, explain, key, callback)  # the store has its own time

    async def _admitted(
        self, key: str | None, request: Request, tasks: frozenset[Task], explain: Explain | None
    ) -> Response:
        deadline = time.time() + self.limits.request_timeout_s
        # before the body is read: an overloaded server buffers little (`app.access.HeldBack`)
        with telemetry.span("wait for a place"):
            await self.admission.enter()
        places = 1
        try:
            async with in_time(deadline - time.time()):
                with telemetry.span("read body"):
                    uploads = await read_uploads(request, self.uploads)
            self.admission.widen(len(uploads) - 1)
            places = request.state.pictures = len(uploads)
            work = [
                self._one(upload, tasks, explain, deadline, key and idempotency.name_of(key, tasks, number))
                for number, upload in enumerate(uploads)
            ]
            # what is in service when the models are asked; whoever's answer it is stands in the picture's own figures
            request.state.revision = _revisions(self.graph.revisions, tasks)
            if len(work) == 1:
                return JSONResponse(await work[0])
            items = await asyncio.gather(*work, return_exceptions=True)
            return JSONResponse({"items": [_item(item) for item in items]})
        finally:
            self.admission.leave(places)

    async def _one(
        self, upload: Upload, tasks: frozenset[Task], explain: Explain | None, deadline: float, name: str | None
    ) -> dict[str, Any]:
        """One picture's record.

        Args:
            name: of a request that may be sent again, and of this picture in it.
        """
        if upload.problem is not None or upload.data is None:
            raise upload.problem or Problem("empty_body", "The request holds no picture.")
        data = upload.data

        async def analyze(identity: str | None, wanted: frozenset[Task]) -> Annotation:
            try:
                with self.admission.observing():
                    return await self.graph.analyze(data, identity, wanted, explain, deadline)
            except ImageError as error:
                raise Problem.of_image(error) from None

        if name is not None:
            record = await idempotency.answer(
                self.store, name, data, upload.id, tasks, analyze, with_maps=explain is not None
            )
        else:
            began_s = time.time()
            record = await analyze(upload.id, tasks)
            self.store.offer(record, data, began_s=began_s)
        return record.model_dump(mode="json")

    # ---- what runs ----------------------------------------------------------------------------------------------

    @api.get("/v1/models", tags=["operate"])
    async def models(self, request: Request) -> dict[str, Any]:
        """What runs: URI, revision, card and thresholds of each model, and of its canary with its share. `refused` is
        what a model was told to serve and could not load, so that it goes on with what it has; with a key of scope
        `admin`, or where there are no keys, with the reason.
        """
        answer: dict[str, Any] = {}
        for stage, route in self.graph.routes.items():
            message = route.detail if is_operator(request.scope) else route.message
            entry: dict[str, Any] = {"status": "ready" if route.info else "starting", "message": message}
            if route.info is not None:
                card = route.info.card
                entry |= {"uri": route.info.uri, "revision": route.info.revision, "card": card}
                if (refused := route.info.refused) is not None:
                    entry["refused"] = refused.model_dump(include=None if is_operator(request.scope) else {"uri"})
                if stage == "detector":
                    entry["thresholds"] = card.get("thresholds")
                    entry["drift"] = self.drift.state
            share, shadow = getattr(self.graph.shares, stage), getattr(self.graph.shadow, stage)
            if share + shadow > 0:
                canary = route.canary_info
                entry["canary"] = {
                    "share": share,
                    "shadow": shadow,
                    "uri": canary.uri if canary else None,
                    "revision": canary.revision if canary else None,
                }
            answer[stage] = entry
        return answer

    @api.get("/healthz", tags=["operate"])
    async def healthz(self) -> dict[str, str]:
        """The HTTP side is alive."""
        return {"status": "ok"}

    @api.get("/readyz", tags=["operate"], responses={503: {"description": "a stage is not ready yet"}})
    async def readyz(self, request: Request) -> JSONResponse:
        """Whether every stage can answer, stage by stage; with a key of scope `admin`, or where there are no keys, in
        the words of what keeps it from answering.
        """
        stages = {
            stage: {
                "status": "ready" if route.info else ("failed" if route.failed else "starting"),
                "message": route.detail if is_operator(request.scope) else route.message,
            }
            for stage, route in self.graph.routes.items()
        }
        ready = self.graph.ready and not self.gate.closed
        state: dict[str, Any] = {"ready": ready, "stages": stages}
        if self.gate.closed:  # each replica speaks for itself
            state["stopping"] = {"replica": serve.get_replica_context().replica_tag, "inside": self.gate.inside}
        return JSONResponse(state, 200 if ready else 503)

    # ---- the page -----------------------------------------------------------------------------------------------

    @api.get("/", include_in_schema=False)
    async def page(self) -> Response:
        return FileResponse(_PAGE / "index.html", headers={"cache-control": "no-cache"})

    @api.get("/page/{name}", include_in_schema=False)
    async def page_file(self, name: str) -> Response:
        return _static(_PAGE, name)

    @api.get("/samples", include_in_schema=False)
    async def samples(self) -> Response:
        listing = _SAMPLES / "samples.json"
        return JSONResponse(json.loads(listing.read_text()) if listing.is_file() else [])

    @api.get("/samples/{name}", include_in_schema=False)
    async def sample(self, name: str) -> Response:
        return _static(_SAMPLES, name)
