"""Errors as the HTTP API answers them: problem+json (RFC 9457) with a machine-readable `code`.

Defines every code with its status and title, the exception that carries one (`Problem`), and the handlers that turn
whatever an endpoint raises into one (`install`). An answer never quotes internals, nor the request beyond parameter
names. Knows no model and no graph.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match
from starlette.types import Scope

from deployments.images import ImageError

logger = logging.getLogger("ray.serve")

MEDIA_TYPE = "application/problem+json"

#: code -> (status, title). The title is the same for each occurrence; what is particular stands in `detail`.
CODES: dict[str, tuple[int, str]] = {
    "empty_body": (400, "No picture was sent"),
    "bad_request": (400, "The request cannot be read"),
    "bad_base64": (400, "The picture is not valid base64"),
    "unauthorized": (401, "There is no valid key with the request"),
    "forbidden": (403, "This is not allowed"),
    "host_refused": (403, "The service does not answer under this name"),
    "not_found": (404, "There is nothing at this address"),
    "method_not_allowed": (405, "This address does not take this method"),
    "conflict": (409, "This was said before, and otherwise"),
    "too_large": (413, "The picture or the request is too large"),
    "too_many_pixels": (413, "The picture has too many pixels"),
    "too_many_pictures": (413, "Too many pictures in one request"),
    "not_an_image": (415, "The file is not a picture in a supported format"),
    "unsupported_media_type": (415, "This content type is not supported"),
    "truncated": (422, "The picture is cut off or damaged"),
    "too_small": (422, "The picture is too small"),
    "callback_refused": (422, "Nobody can be told at this address"),
    "unknown_task": (422, "There is no such task"),
    "bad_parameter": (422, "A parameter has a value that is not allowed"),
    "overloaded": (429, "Too many requests at the moment"),
    "rate_limited": (429, "Too many requests with this key"),
    "quota_exceeded": (429, "This key has used up its requests of the day"),
    "internal_error": (500, "Something went wrong on our side"),
    "unavailable": (503, "The service cannot answer at the moment"),
    "timeout": (504, "The request ran out of time"),
}

_STATUS_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "too_large",
    415: "unsupported_media_type",
    422: "bad_parameter",
    429: "overloaded",
    503: "unavailable",
    504: "timeout",
}


class ProblemModel(BaseModel):
    """RFC 9457 problem details, as documented in the OpenAPI description."""

    model_config = ConfigDict(extra="allow")

    type: str = Field("about:blank", description="always `about:blank`: `code` says which problem it is")
    title: str = Field(description="for people; the same for each occurrence of a code")
    status: int = Field(description="the HTTP status, or what it would be for this picture alone")
    detail: str = Field(description="for people; what is particular to this occurrence")
    code: str = Field(description="machine-readable", examples=sorted(CODES))
    request_id: str | None = Field(
        None, description="the request's `X-Request-ID`, its own or one made here: the logs know it by this"
    )
    final: bool = Field(
        False,
        description="true: it is the answer at the place of a deferred request, and asking there again changes nothing",
    )


class Problem(Exception):
    """An answer that is an error. `code` is a key of `CODES`, which gives status and title."""

    def __init__(self, code: str, detail: str, headers: Mapping[str, str] | None = None, **extra: Any) -> None:
        """`extra` becomes further members of the body, such as `id` of the picture that is meant."""
        super().__init__(detail)
        self.code = code
        self.status, self.title = CODES[code]
        self.detail = detail
        self.headers = dict(headers or {})
        self.extra = extra

    @classmethod
    def of_image(cls, error: ImageError, **extra: Any) -> Problem:
        """The problem that a refused file is."""
        return cls(error.code, error.detail, **extra)

    def to_dict(self) -> dict[str, Any]:
        """The body: what stands in `items` for one picture among several, too."""
        members = {"type": "about:blank", "title": self.title, "status": self.status, "detail": self.detail}
        return {**self.extra, **members, "code": self.code}

    def to_response(self, scope: Scope | None = None) -> JSONResponse:
        """The answer.

        Args:
            scope: of the request that is answered: its id goes into the body, and the code to whoever logs it.
        """
        body = self.to_dict()
        if scope is not None:
            scope.setdefault("state", {})["code"] = self.code
            if request_id := Headers(scope=scope).get("x-request-id"):
                body["request_id"] = request_id
        return JSONResponse(body, self.status, self.headers, MEDIA_TYPE)


def responses(*codes: str) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses=` for these codes: one entry for each status, with an example for each code."""
    documented: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        status, title = CODES[code]
        entry = documented.setdefault(
            status,
            {
                "description": HTTPStatus(status).phrase,
                "content": {MEDIA_TYPE: {"schema": ProblemModel.model_json_schema(), "examples": {}}},
            },
        )
        value = Problem(code, f"{title}.").to_dict()
        entry["content"][MEDIA_TYPE]["examples"][code] = {"summary": title, "value": value}
    return documented


def install(app: FastAPI) -> None:
    """Makes every error of an application a problem."""
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(ImageError, _on_image_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_unexpected)


async def _on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return error.to_response(request.scope)


async def _on_image_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ImageError)
    return Problem.of_image(error).to_response(request.scope)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code < 400:
        return Response(status_code=error.status_code, headers=error.headers)
    code = _STATUS_CODES.get(error.status_code, "bad_request" if error.status_code < 500 else "internal_error")
    headers = error.headers
    if error.status_code == 405:
        # Starlette names the methods of the first route of this address, not of all
        routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
        methods = {method for route in routes for method in getattr(route, "methods", None) or ()}
        headers = {"Allow": ", ".join(sorted(methods))}
    problem = Problem(code, str(error.detail) if error.status_code < 500 else CODES[code][1] + ".", headers)
    # A status that has no code of its own (401, say) stays what it is.
    problem.status = error.status_code
    return problem.to_response(request.scope)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = [
        {"where": ".".join(str(part) for part in fault["loc"]), "message": str(fault["msg"])}
        for fault in error.errors()[:16]
    ]
    where = faults[0]["where"] if faults else "request"
    unreadable = any(fault["type"] == "json_invalid" for fault in error.errors())
    return Problem(
        "bad_request" if unreadable else "bad_parameter", f"Not allowed: {where}.", errors=faults
    ).to_response(request.scope)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    # Nobody reads this answer; without it the log would show an error of ours.
    problem = Problem("bad_request", "The client went away before the request was complete.")
    return problem.to_response(request.scope)


async def _on_unexpected(request: Request, error: Exception) -> Response:
    logger.error("unexpected error in %s %s", request.method, request.url.path, exc_info=error)
    problem = Problem("internal_error", "The request could not be answered; the error was logged.")
    return problem.to_response(request.scope)
