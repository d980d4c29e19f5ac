"""What the picture models' replicas share: loading by URI, swapping a revision in place, batches on a worker thread.

A replica's event loop never computes: Serve's health checks, cancellations and queueing run on it. Batches run on one
thread of their own, which on a CPU has as many parts of a batch computed beside each other as it may use cores: threads
that share every layer wait for each other after each, and whatever else a core does meanwhile keeps all of them. A new
revision is loaded on another, beside the one in service, which goes on answering until the two are exchanged between
two batches: no request is lost, none waits, and for that time both are in memory. One that cannot be loaded is refused,
and the one in service goes on.

Pictures are batched by ``serve.batch``, behind a ``Door``. ``serve.batch`` closes a batch when its wait is over,
whether the model is free or not: pictures that come one by one during a long batch would each become a batch of one,
queued behind it. The door keeps them outside until the model is free, and then lets them in together.

Before a revision comes into service it answers a known picture, which makes it ready for the first real one too; the
answer is kept, and ``deployments.health`` decides when Serve's health check has it computed again.

Knows no model class (a subclass names it) and no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from deployments import memory, telemetry
from deployments.annotation import Stage
from deployments.checkpoints import Checkpoint, CheckpointError, resolve
from deployments.health import Health, known_picture
from deployments.metrics import Metrics
from deployments.pixels import ViewMismatch, check_views
from deployments.processor import step_back
from deployments.views import ViewSpec

_log = logging.getLogger("ray.serve")


class DeadlineExceeded(TimeoutError):
    """The request's time was over before its batch began; nobody waits for the answer."""


class ModelFailed(RuntimeError):
    """A model could not compute an answer; the message is the name of the error, which its replica has logged.

    Raised in place of the libraries' own exceptions: whoever waits for an answer unpickles what is raised, and would
    import PyTorch or vLLM (half a gigabyte) for the sake of its class.
    """


class NotFinite(ModelFailed):
    """A model's answer is no number; it is given to nobody."""


class ReplicaConfig(BaseModel):
    """A model deployment's ``user_config``: what may change without restarting a replica."""

    model_config = ConfigDict(extra="forbid")

    uri: str = Field(description="checkpoint to serve, see deployments.checkpoints")
    max_batch_size: int = Field(8, ge=1, le=256)
    batch_wait_timeout_s: float = Field(
        0.0,
        ge=0,
        le=1,
        description="how long a batch waits for company; the door gathers what comes while the model is busy, so that "
        "only a free model would be kept waiting",
    )
    health_every_s: float = Field(
        60.0,
        ge=1,
        le=3600,
        description="a model that has answered nothing for so long is given its known input by the next health check",
    )
    most_failures: int = Field(
        3, ge=1, le=100, description="batches that may fail one after another until the health check fails"
    )


class Refusal(BaseModel):
    """What a replica was told to serve and could not, so that it goes on with what it has."""

    uri: str
    why: str = Field(description="for operators: it may name files and hosts")


class ModelInfo(BaseModel):
    """What a replica says of the model it runs (``GET /v1/models``)."""

    uri: str
    revision: str
    card: dict[str, Any]
    views: ViewSpec | None = Field(None, description="the view of a picture to send; none for a model that reads text")
    refused: Refusal | None = Field(None, description="what it was told to serve last, if it could not")


class PictureModel(Protocol):
    """A loaded checkpoint that reads views of pictures."""

    checkpoint: Checkpoint
    views: ViewSpec
    in_parts: bool
    """Parts of a batch may be computed by several threads at a time, and gain by it."""


Model = TypeVar("Model", bound=PictureModel)

_CODES: dict[type[BaseException], str] = {ViewMismatch: "other_views", DeadlineExceeded: "deadline"}
#: A canary's deployment is called as production's is, with this behind it.
_CANARY = "Canary"
#: A batch that runs longer than this is taken for a hang: the health check fails and Serve starts a new replica.
_STUCK_AFTER_S = 120.0


@dataclass(frozen=True)
class _Computed:
    """One picture's part of a batch."""

    answer: dict[str, Any] | Exception
    revision: str
    pictures: int
    """How many were computed together."""
    began: float
    ended: float
    """``time.perf_counter()`` seconds."""


class Door:
    """An asynchronous context that up to ``size`` requests enter together, while no batch is being computed.

    First come, first served. Belongs to one event loop.
    """

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self._inside = 0
        self._shut = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    def shut(self) -> None:
        """The batch has begun: whoever comes now waits until all who are inside have left."""
        self._shut = True

    async def __aenter__(self) -> None:
        if not self._shut and not self._waiting and self._inside < self.size:
            self._inside += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn  # `__aexit__` of the last one inside has counted us in when it resolves this
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()  # let in at the very moment of going away
            with contextlib.suppress(ValueError):
                self._waiting.remove(turn)
            raise

    async def __aexit__(self, *error: object) -> None:
        self._leave()

    def _leave(self) -> None:
        self._inside -= 1
        if self._inside == 0:
            self._shut = False
            while self._waiting and self._inside < self.size:
                turn = self._waiting.popleft()
                if not turn.cancelled():
                    self._inside += 1
                    turn.set_result(None)


class Replica(Generic[Model]):
    """Base of ``Detector`` and ``Captioner``; subclasses implement ``load``, ``answer`` and their own requests."""

    stage: ClassVar[Stage]
    """What the model is in the graph; a subclass says it."""

    def __init__(self) -> None:
        import torch

        memory.keep_freed()
        self._metrics = Metrics()
        threads = torch.get_num_threads()
        self._worker = ThreadPoolExecutor(1, "model", _use_threads, (threads,))
        self._loader = ThreadPoolExecutor(1, "load", _use_threads, (threads,))
        self._parts, self._most_parts = ThreadPoolExecutor(threads, "part", _use_threads, (1,)), threads
        self._door = Door()
        self._model: Model | None = None
        self._busy_since: float | None = None
        self._health = Health()
        self._known: tuple[Model, dict[str, Any]] | None = None
        self._replaced: weakref.ref[Model] | None = None
        self._refused: Refusal | None = None

    def load(self, checkpoint: Checkpoint) -> Model:
        """Load a checkpoint, on a thread beside the one that computes."""
        raise NotImplementedError

    def answer(self, model: Model, views: np.ndarray) -> Sequence[dict[str, Any] | NotFinite]:
        """Answers to a batch of uint8 views ``(n, V, S, S, 3)``, on the worker thread."""
        raise NotImplementedError

    def answers(self, model: Model, views: np.ndarray) -> Sequence[dict[str, Any] | NotFinite]:
        """As ``answer``, in as many parts as there are threads for where that is faster."""
        parts = min(self._most_parts, len(views)) if model.in_parts else 1
        if parts <= 1:
            return self.answer(model, views)
        found = self._parts.map(functools.partial(self.answer, model), np.array_split(views, parts))
        return [answer for part in found for answer in part]

    def known_answer(self, model: Model) -> dict[str, Any]:
        """The answer to the known picture; the same whenever the same model computes it.

        Raises:
            NotFinite: it is no number.
        """
        (answer,) = self.answer(model, known_picture(model.views.shape)[None])
        if isinstance(answer, NotFinite):
            raise answer
        return answer

    def difference(self, before: dict[str, Any], now: dict[str, Any]) -> str:
        """What is wrong with the answer to the known picture, which was another ``before``; "": nothing."""
        return "" if now == before else f"the known picture is answered with {now}, and was with {before}"

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve's call at start and whenever ``user_config`` changes: same revision, no work; another, swapped in
        place; one that cannot be had, refused (``refusal``).

        Raises:
            CheckpointError: the URI names no sound checkpoint, and nothing is in service.
        """
        try:
            await self._take(user_config)
        except Exception as error:
            if self._model is None:
                raise
            self._refused = refusal(self.stage, self._model.checkpoint, str(user_config.get("uri")), error)
        else:
            self._refused = None

    async def _take(self, user_config: dict[str, Any]) -> None:
        """Take what ``user_config`` says into service; where that raises, the model is the one that it was."""
        config = ReplicaConfig.model_validate(user_config)
        self._door.size = config.max_batch_size
        self._batch.set_max_batch_size(config.max_batch_size)  # type: ignore[attr-defined]
        self._batch.set_batch_wait_timeout_s(config.batch_wait_timeout_s)  # type: ignore[attr-defined]
        self._health.every_s, self._health.most_failures = config.health_every_s, config.most_failures
        checkpoint = await asyncio.to_thread(resolve, config.uri)
        current = self._model
        if (
            current is None
            or current.checkpoint.revision != checkpoint.revision
            or current.checkpoint.uri != config.uri
        ):
            self._known = await asyncio.get_running_loop().run_in_executor(self._loader, self._loaded, checkpoint)
            self._model = self._known[0]
            self._health.renewed()
            before = None if current is None else current.checkpoint.revision
            self._metrics.in_service(self.stage, checkpoint.revision, before)
            self._replaced = None if current is None else weakref.ref(current)

    def _loaded(self, checkpoint: Checkpoint) -> tuple[Model, dict[str, Any]]:
        """A checkpoint's model, and its answer to the known picture.

        Raises:
            CheckpointError: the answer is no number.
        """
        model = self.load(checkpoint)
        try:
            return model, self.known_answer(model)
        except NotFinite as error:
            raise CheckpointError(f"{checkpoint.uri}: {error}; serve another revision") from None

    @property
    def model(self) -> Model:
        """The model in service; a request keeps the one it started with."""
        if self._model is None:
            raise RuntimeError("no model is loaded: the deployment has no user_config")
        return self._model

    async def compute(self, function: Any, *arguments: Any) -> Any:
        """Run ``function`` on the worker thread.

        Raises:
            ModelFailed: it raised something.
        """

        def timed() -> Any:
            self._busy_since = time.monotonic()
            try:
                return function(*arguments)
            except Exception as error:
                raise failed(error) from None
            finally:
                self._busy_since = None

        return await asyncio.get_running_loop().run_in_executor(self._worker, timed)

    def check(self, views: np.ndarray, spec: ViewSpec) -> None:
        """Raise ``ViewMismatch`` unless these are views ``(V, S, S, 3)`` made as the model in service asks for."""
        if spec != self.model.views:
            raise ViewMismatch(f"views made by {spec}, and this revision reads {self.model.views}")
        check_views(views, spec.shape)

    async def batched(self, views: np.ndarray, spec: ViewSpec, deadline: float) -> dict[str, Any]:
        """The answer to one picture's views ``(V, S, S, 3)``, made by ``spec``, computed in a batch with others'.

        Raises:
            ViewMismatch: ask ``info`` for the view specification again.
            DeadlineExceeded: ``deadline`` (``time.time()`` seconds) passed while the picture waited.
        """
        self.check(views, spec)
        with self._told() as told:
            async with self._door:
                computed = await self._batch(views, spec, deadline)  # type: ignore[call-arg]
            told.append(computed)
            if isinstance(computed.answer, Exception):
                raise computed.answer
            return computed.answer

    @contextlib.contextmanager
    def _told(self) -> Iterator[list[_Computed]]:
        """Log one picture's way through this replica, and make spans of it: here and not where the batch is computed,
        which belongs to no request.
        """
        came, code = time.perf_counter(), "ok"
        computed: list[_Computed] = []
        try:
            yield computed
        except BaseException as error:
            code = _CODES.get(type(error), "cancelled" if isinstance(error, asyncio.CancelledError) else "failed")
            raise
        finally:
            for one in computed:
                telemetry.past_span("wait for a batch", came, one.began)
                if one.pictures:
                    attributes = {"pictures": one.pictures, "revision": one.revision}
                    telemetry.past_span("compute a batch", one.began, one.ended, **attributes)
            began, ended = (computed[0].began, computed[0].ended) if computed else (time.perf_counter(),) * 2
            telemetry.note(
                "stage",
                stage=self.stage,
                revision=computed[0].revision if computed else self.model.checkpoint.revision,
                code=code,
                waited_ms=telemetry.milliseconds(began - came),
                computed_ms=telemetry.milliseconds(ended - began),
                pictures=computed[0].pictures if computed else 0,
            )

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.0)
    async def _batch(self, views: list[np.ndarray], specs: list[ViewSpec], deadline: list[float]) -> list[_Computed]:
        self._door.shut()
        model, started = self.model, time.perf_counter()
        answers: list[dict[str, Any] | Exception] = [
            # a revision with other views may have come into service while they waited
            ViewMismatch("another revision has come into service")
            if spec != model.views
            else DeadlineExceeded("the model had no time left for this picture")
            for spec in specs
        ]
        chosen = [index for index in alive(deadline) if specs[index] == model.views]
        if chosen:
            try:
                found = await self.compute(self.answers, model, np.stack([views[index] for index in chosen]))
            except ModelFailed as error:
                self._health.failed(str(error))
                raise
            self._seen(found)
            self._metrics.batch(self.stage, model.checkpoint.revision, len(chosen), time.perf_counter() - started)
            for index, answer in zip(chosen, found, strict=True):
                answers[index] = answer
        ended, revision = time.perf_counter(), model.checkpoint.revision
        return [_Computed(answer, revision, len(chosen), started, ended) for answer in answers]

    def _seen(self, answers: Sequence[dict[str, Any] | NotFinite]) -> None:
        """A batch has been computed."""
        spoilt = [answer for answer in answers if isinstance(answer, NotFinite)]
        if spoilt:
            _log.error("%d of %d answers of a batch are no numbers", len(spoilt), len(answers))
            self._health.spoilt(f"{len(spoilt)} of {len(answers)} answers of a batch were no numbers")
        if len(spoilt) == len(answers):
            self._health.failed(NotFinite.__name__)
        elif not spoilt:
            self._health.answered()

    async def info(self) -> dict[str, Any]:
        """``ModelInfo`` of the model in service."""
        checkpoint = self.model.checkpoint
        return ModelInfo(
            uri=checkpoint.uri,
            revision=checkpoint.revision,
            card=checkpoint.card.model_dump(),
            views=self.model.views,
            refused=self._refused,
        ).model_dump()

    async def check_health(self) -> None:
        """Serve's health check, and the occasion to say again which revision is in service, and whether another one is
        refused: Ray forgets a gauge that is not set for a while.

        Raises:
            RuntimeError: one batch has been running for two minutes.
            Unhealthy: see ``Health.check``.
        """
        if self._model is not None:
            self._metrics.in_service(self.stage, self._model.checkpoint.revision)
            self._metrics.refused(self.stage, self._refused is not None)
        if self._replaced is not None and self._replaced() is None:  # the last request that it began has its answer
            self._replaced = None
            await asyncio.to_thread(memory.give_back)
        since = self._busy_since
        if since is not None and time.monotonic() - since > _STUCK_AFTER_S:
            raise RuntimeError(f"a batch has been running for {time.monotonic() - since:.0f} s")
        await self._health.check(self._repeat_known)

    async def _repeat_known(self) -> str | None:
        """Compute the known picture again; see ``Health.check``."""
        async with self._door:  # as a picture of its own: it waits for the batch in work, and the next wait for it
            self._door.shut()
            if self._known is None:
                return None
            model, before = self._known
            return self.difference(before, await self.compute(self.known_answer, model))


def _use_threads(number: int) -> None:
    """PyTorch computes what this thread asks for with so many, whatever other threads set for themselves."""
    import torch

    if not torch.cuda.is_available():  # else it only says what a GPU is to do next, and must not be late with it
        step_back()
    torch.get_num_threads()  # the first call takes over what any thread set last: not to be left to the first operation
    torch.set_num_threads(number)


def failed(error: Exception) -> ModelFailed:
    """Log what a model raised; what to raise to the caller."""
    _log.error("the model failed", exc_info=error)
    if isinstance(error, ModelFailed):
        return error
    return ModelFailed(type(error).__name__)


def refusal(stage: Stage, current: Checkpoint, uri: str, error: Exception) -> Refusal:
    """Log that a replica goes on with ``current`` where it was told to serve ``uri``; what to say of it.

    Serve stops a replica whose ``reconfigure`` raises, and starts others that cannot load it either. A canary is left
    to that: production answers in its place, and another revision's answers must not be taken for the candidate's.

    Raises:
        Exception: ``error``, in a canary.
    """
    if serve.get_replica_context().deployment.endswith(_CANARY):
        raise error
    _log.error("the %s goes on with %s, %r is refused", stage, current.name, uri, exc_info=error)
    return Refusal(uri=uri, why=f"{type(error).__name__}: {error}")


def alive(deadlines: list[float]) -> list[int]:
    """Positions of the requests of a batch whose time is not over (``deadline`` is ``time.time()`` seconds)."""
    now = time.time()
    return [position for position, deadline in enumerate(deadlines) if deadline > now]
