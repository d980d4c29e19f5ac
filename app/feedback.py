"""Routes of what is kept: feedback, pictures, search, and the store's own state.

``router`` takes where to find the store, so that the same routes run in the ingress and in a test's
small server. Knows no SQL, no model and no graph.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)

from app.authentication import caller_of, is_operator
from app.idempotency import event_key
from app.problems import Problem, responses
from app.store.database import StoreUnavailable
from app.store.events import Event, KeyConflict, UnknownAnswer
from app.store.models import first_id
from app.store.search import MAX_ID, BadCursor, Place
from app.store.search import Query as StoreQuery
from app.store.store import Store, StoreBusy, StoreOff
from app.trials import PARTS
from app.uploads import UploadLimits, in_time, read_body, read_uploads
from deployments.annotation import Annotation as Record
from deployments.annotation import Tag
from deployments.metrics import revision_of

Judged = Callable[[str, str, bool, str], None]

#: The model that makes each part of an answer.
_MODELS = {part: model for model, part in PARTS.items()}
#: Seconds after which who was told 503 may come back.
_RETRY_AFTER_S = 2
#: Pictures that are taken in at a time: each is held in memory.
_PICTURES_AT_ONCE = 4
#: How long a body may take to arrive: what it keeps others from is theirs again then.
_BODY_S = 60.0
_MAX_EVENT_BYTES = 64 * 1024
_NO_CONTROLS = r"^[^\x00-\x1f\x7f]*$"
_PRINTABLE = r"^[^\x00-\x1f\x7f]+$"
_DATE = re.compile(r"^\d{4}-\d\d-\d\d[Tt ]")

AnswerId = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=_PRINTABLE)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def _written_out(value: Any) -> Any:
    """Refuses numbers, which pydantic takes for seconds since 1970 although the schema says `date-time`."""
    if not isinstance(value, str) or not _DATE.match(value):
        raise ValueError("a date with time and zone is wanted, as in 2026-11-01T00:00:00Z")
    return value


#: RFC 3339, as the schema's `date-time` says.
Moment = Annotated[AwareDatetime, BeforeValidator(_written_out)]


class _Feedback(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: AnswerId = Field(description="`id` of the answer; the last one that had it")
    sha256: Sha256 | None = Field(None, description="`sha256` of the answer, where an id was given to several pictures")
    right: bool = Field(description="whether this part of the answer is right")
    by: AnswerId | None = Field(None, description="who says so, in the caller's own terms")


class VerdictFeedback(_Feedback):
    """What is said of a verdict."""

    part: Literal["verdict"]
    value: Literal["ai", "human"] | None = Field(None, description="what would be right")


class CaptionFeedback(_Feedback):
    """What is said of a caption."""

    part: Literal["caption"]
    value: Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=_NO_CONTROLS)] | None = Field(
        None, description="a better caption"
    )


class TagsFeedback(_Feedback):
    """What is said of the tags."""

    part: Literal["tags"]
    value: list[Tag] | None = Field(
        None, max_length=32, description="all tags that would be right: those kept, and those added"
    )


_EVENT: TypeAdapter[VerdictFeedback | CaptionFeedback | TagsFeedback] = TypeAdapter(
    Annotated[VerdictFeedback | CaptionFeedback | TagsFeedback, Field(discriminator="part")]
)


class FeedbackReceipt(BaseModel):
    """Feedback that is kept."""

    id: str = Field(description="of this event")
    sha256: str = Field(description="the picture that it is about")
    picture: Literal["wanted", "kept", "not kept"] = Field(
        description="`wanted`: send it to `PUT /v1/pictures/{sha256}`, so that a reviewer can see it"
    )


class SearchItem(BaseModel):
    """An answer that was found."""

    at: datetime = Field(description="when it was given, UTC")
    annotation: Record
    picture: bool = Field(description="`GET /v1/pictures/{sha256}` has the picture")
    feedback: list[Literal["verdict", "caption", "tags"]] = Field(description="parts that somebody has judged")


class SearchPage(BaseModel):
    """A page of what was found."""

    items: list[SearchItem]
    next: str | None = Field(description="`cursor` of the next page; null: this is the last one")


class Deleted(BaseModel):
    """What was removed."""

    pictures: int
    predictions: int
    feedback: int


class StoreStatus(BaseModel):
    """What the store of the process that answers does."""

    model_config = ConfigDict(extra="allow")

    state: Literal["ready", "starting", "unavailable", "off"]
    message: str
    keep: Literal["off", "all", "sampled", "flagged"]
    pictures: Literal["none", "flagged", "all"]
    queued: int = Field(0, description="answers that wait to be written")
    written: int = Field(0, description="answers written since the process began")
    dropped: int = Field(0, description="answers that were not kept, because the queue was full")
    pictures_dropped: int = 0


_FEEDBACK_EXAMPLES: dict[str, Any] = {
    "verdict": {
        "summary": "the verdict is wrong",
        "value": {"id": "holiday-17", "part": "verdict", "right": False, "value": "human"},
    },
    "caption": {
        "summary": "a better caption",
        "value": {"id": "holiday-17", "part": "caption", "right": False, "value": "two dogs run on a beach"},
    },
    "tags": {
        "summary": "the right tags",
        "value": {"id": "holiday-17", "part": "tags", "right": False, "value": ["dog", "beach"], "by": "moderator-4"},
    },
}
_RECEIPT = {"id": "7532358157491954854", "sha256": "9f86d081884c7d65" * 4, "picture": "wanted"}


def _body(model: type[_Feedback]) -> dict[str, Any]:
    return model.model_json_schema()


#: Read from the raw request, so that its size is bounded while it is read.
_FEEDBACK_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"oneOf": [_body(VerdictFeedback), _body(CaptionFeedback), _body(TagsFeedback)]},
                "examples": _FEEDBACK_EXAMPLES,
            }
        },
    }
}
_PICTURE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_PICTURE: dict[str, Any] = {
    "description": "the picture's bytes",
    "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
}
_KEY = Header(
    alias="Idempotency-Key",
    min_length=1,
    max_length=128,
    pattern=_PRINTABLE,
    description="the caller's own name of this event: sent again with the same key it is kept once. Without one, the "
    "same content is the same event",
)
_SHA256 = Path(pattern=r"^[0-9a-f]{64}$", description="of the picture's bytes, as answers have it")
_FILE_SIZE = Query(description="`small` is a JPEG of at most 384 pixels a side")


def router(store_of: Callable[[], Awaitable[Store]], judged: Judged | None = None) -> APIRouter:
    """The routes, for an application whose store ``store_of`` gives.

    Args:
        judged: told of each new event: part, verdict of the answer or "", whether it is right, revision of its model.
    """
    routes, given = APIRouter(), Depends(store_of)

    @routes.post(
        "/v1/feedback",
        tags=["feedback"],
        status_code=201,
        openapi_extra=_FEEDBACK_BODY,
        responses={
            201: {"model": FeedbackReceipt, "content": {"application/json": {"example": _RECEIPT}}},
            200: {"model": FeedbackReceipt, "description": "it was kept before, and is kept once"},
            **responses("empty_body", "bad_request", "not_found", "conflict", "too_large", "unsupported_media_type"),
            **responses("bad_parameter", "overloaded", "internal_error", "unavailable", "timeout"),
        },
    )
    async def feedback(request: Request, key: Annotated[str | None, _KEY] = None, store: Store = given) -> Response:
        """Say of one part of an answer whether it is right, and what would be. Answered when it is on disk."""
        event = await _read_event(request)
        key = event_key(caller_of(request.scope), key)
        try:
            receipt = await store.feedback(
                Event(event.id, event.part, event.right, event.value, event.sha256, event.by, key)
            )
        except UnknownAnswer:
            raise Problem("not_found", "No answer that is kept here has this id.") from None
        except KeyConflict:
            raise Problem("conflict", "This Idempotency-Key was used for another event.") from None
        except (StoreUnavailable, StoreOff) as error:
            raise store_problem(error) from None
        picture = "kept" if receipt.has_picture else "wanted" if store.wants_pictures else "not kept"
        if judged is not None and receipt.is_new:
            said = (receipt.verdict or "") if event.part == "verdict" else ""
            judged(event.part, said, event.right, revision_of(receipt.models.get(_MODELS[event.part], "")))
        answer = {"id": str(receipt.id), "sha256": receipt.sha256, "picture": picture}
        return JSONResponse(answer, 201 if receipt.is_new else 200)

    @routes.put(
        "/v1/pictures/{sha256}",
        tags=["feedback"],
        status_code=201,
        response_model=None,
        openapi_extra=_PICTURE_BODY,
        responses={
            201: {"description": "it is kept"},
            **responses("empty_body", "bad_request", "bad_base64", "not_found", "too_large", "too_many_pictures"),
            **responses("unsupported_media_type", "bad_parameter", "overloaded", "internal_error", "unavailable"),
            **responses("timeout"),
        },
    )
    async def put_picture(request: Request, sha256: Annotated[str, _SHA256], store: Store = given) -> Response:
        """Send the picture that feedback was given on, for reviewers to see."""
        if store.taking_in >= _PICTURES_AT_ONCE:
            raise Problem("overloaded", "Too many pictures at the moment.", {"Retry-After": str(_RETRY_AFTER_S)})
        store.taking_in += 1
        try:
            limits = UploadLimits(max_pictures=1, max_bytes=store.max_picture_bytes)
            async with in_time(_BODY_S):
                (upload,) = await read_uploads(request, limits)
            data = upload.data or b""
            if await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest()) != sha256:
                raise Problem("bad_parameter", "The picture's SHA-256 is not the one in the address.")
            if not await store.keep_picture(sha256, data):
                raise Problem("not_found", "There is no feedback on this picture, so it is not kept.")
        except (StoreUnavailable, StoreBusy, StoreOff) as error:
            raise store_problem(error) from None
        finally:
            store.taking_in -= 1
        return Response(status_code=201)

    @routes.get(
        "/v1/pictures/{sha256}",
        tags=["search"],
        response_class=Response,
        responses={
            200: _PICTURE,
            **responses("not_found", "bad_parameter", "overloaded", "internal_error", "unavailable"),
        },
    )
    async def get_picture(
        sha256: Annotated[str, _SHA256],
        size: Annotated[Literal["full", "small"], _FILE_SIZE] = "full",
        store: Store = given,
    ) -> Response:
        """A picture that is kept."""
        try:
            found = await store.picture(sha256, small=size == "small")
        except (StoreUnavailable, StoreBusy, StoreOff) as error:
            raise store_problem(error) from None
        if found is None:
            raise Problem("not_found", "This picture is not kept here.")
        data, kind = found
        # somebody's file on our own origin: whatever a browser makes of it, it runs nothing and stays nowhere
        headers = {
            "content-security-policy": "default-src 'none'; sandbox",
            "x-content-type-options": "nosniff",
            "cache-control": "no-store",
        }
        return Response(data, media_type=kind, headers=headers)

    @routes.delete(
        "/v1/pictures/{sha256}",
        tags=["feedback"],
        responses={
            200: {"model": Deleted, "description": "nothing of it is left; counts of what there was"},
            **responses("not_found", "bad_parameter", "overloaded", "internal_error", "unavailable"),
        },
    )
    async def delete_picture(sha256: Annotated[str, _SHA256], store: Store = given) -> Deleted:
        """Remove a picture, every answer about it, and what was said of them."""
        try:
            return Deleted(**await store.delete_picture(sha256))
        except (StoreUnavailable, StoreBusy, StoreOff) as error:
            raise store_problem(error) from None

    @routes.get(
        "/v1/search",
        tags=["search"],
        responses={
            200: {"model": SearchPage, "description": "the tags' matches first, then the captions', newest first"},
            **responses("not_found", "bad_parameter", "overloaded", "internal_error", "unavailable"),
        },
    )
    async def search(
        q: Annotated[str | None, Query(max_length=200, description="words; all must be in caption or tags")] = None,
        verdict: Annotated[Literal["ai", "human", "uncertain"] | None, Query()] = None,
        tag: Annotated[list[Tag] | None, Query(max_length=5, description="exact tags; all must be there")] = None,
        since: Annotated[Moment | None, Query(alias="from", description="answers from then on")] = None,
        until: Annotated[Moment | None, Query(alias="to", description="answers before then")] = None,
        limit: Annotated[int, Query(ge=1, le=100, description="items of a page")] = 24,
        cursor: Annotated[str | None, Query(max_length=64, description="`next` of the page before")] = None,
        store: Store = given,
    ) -> SearchPage:
        """Answers by words, verdict, tags and dates: those whose tags have all words first, newest first in each."""
        try:
            query = StoreQuery(
                words=q or None,
                verdict=verdict,
                tags=tuple(tag or ()),
                from_id=0 if since is None else _id_at(since),
                until_id=MAX_ID if until is None else _id_at(until),
                place=Place() if cursor is None else Place.parse(cursor),
                limit=limit,
            )
            found, following = await store.search(query)
        except BadCursor:
            raise Problem("bad_parameter", "No page gave this cursor.") from None
        except (StoreUnavailable, StoreBusy, StoreOff) as error:
            raise store_problem(error) from None
        items = [
            SearchItem(at=item.at, annotation=item.annotation, picture=item.has_picture, feedback=list(item.judged))
            for item in found
        ]
        return SearchPage(items=items, next=None if following is None else str(following))

    @routes.get("/v1/store", tags=["operate"])
    async def status(request: Request, store: Store = given) -> StoreStatus:
        """Whether answers are kept, how many wait and how many were dropped, in the process that answers; with a key of
        scope `admin`, or where there are no keys, in the words of what keeps them from being kept.
        """
        found = StoreStatus(**store.status())
        if found.state == "unavailable" and not is_operator(request.scope):  # its own words name hosts and files
            found.message = "the store does not answer at the moment; the service's log says why"
        return found

    return routes


async def _read_event(request: Request) -> VerdictFeedback | CaptionFeedback | TagsFeedback:
    """The body of a feedback request.

    Raises:
        Problem: it is too large, no JSON, or does not arrive in time.
        RequestValidationError: it is no feedback.
    """
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise Problem("unsupported_media_type", "Send application/json.")
    async with in_time(_BODY_S):
        body = await read_body(request, _MAX_EVENT_BYTES)
    if not body:
        raise Problem("empty_body", "The request has no body.")
    try:
        return _EVENT.validate_json(body)
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors(include_url=False)]
        raise RequestValidationError(faults) from None


def _id_at(moment: datetime) -> int:
    """The least id of a moment, as far as ids go."""
    return min(MAX_ID, first_id(max(0.0, moment.timestamp())))


def store_problem(error: Exception) -> Problem:
    """What a store's refusal is over HTTP."""
    if isinstance(error, StoreUnavailable):
        # its own words are for operators: they name hosts and files
        return Problem(
            "unavailable",
            f"What is kept cannot be reached at the moment; try again in {_RETRY_AFTER_S} s. "
            "The service's log says why.",
            {"Retry-After": str(_RETRY_AFTER_S)},
        )
    if isinstance(error, StoreBusy):
        return Problem(
            "overloaded", "Too much is asked of what is kept at the moment.", {"Retry-After": str(_RETRY_AFTER_S)}
        )
    if isinstance(error, StoreOff):
        return Problem("not_found", "Nothing of the kind is kept here, by the settings of this service.")
    raise error
