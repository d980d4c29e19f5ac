"""The parts of the OpenAPI document that FastAPI cannot derive: bodies read from the raw request, problems, and local
documentation pages.
"""

from __future__ import annotations

import os
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from app import authentication
from app.callbacks import IDEMPOTENCY_KEY, SIGNATURE
from app.keys import VARIABLE
from app.problems import ProblemModel, responses
from deployments.annotation import Annotation

_EXAMPLE = {
    "id": "holiday-17",
    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "detection": {
        "label": "human",
        "ai_probability": 0.04,
        "provenance": {"c2pa": "absent", "declared_ai": None, "signals": []},
        "heat_map": None,
    },
    "caption": {"text": "a brown dog runs across a grassy field"},
    "tags": ["dog", "grass", "running", "field", "animal"],
    "models": {"detector": "starter:detector#1a2b3c4d5e6f", "prompt": "tags-1"},
    "timings_ms": {"decode": 4, "detector": 80, "captioner": 310, "tagger": 95, "total": 420},
    "errors": [],
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_IMAGE_TYPES = ("jpeg", "png", "webp", "gif", "tiff", "avif", "heic")
_ENCODED = {"type": "string", "description": "base64, or a data URL"}
_ID = {"type": "string", "minLength": 1, "maxLength": 128, "description": "the caller's own, printable"}
_ONE = {
    "type": "object",
    "required": ["image"],
    "properties": {"image": _ENCODED, "id": {**_ID, "type": ["string", "null"]}},
    "additionalProperties": False,
}

#: Request body of the annotating routes: three ways to send pictures.
ANALYZE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "array", "minItems": 1, "maxItems": 32, "items": _BINARY["schema"]},
                        "id": {"type": "array", "items": _ID, "description": "ids of the files, in their order"},
                    },
                }
            },
            **{f"image/{name}": _BINARY for name in _IMAGE_TYPES},
            "application/octet-stream": _BINARY,
            "application/json": {
                "schema": {
                    "oneOf": [
                        _ONE,
                        {
                            "type": "object",
                            "required": ["images"],
                            "properties": {"images": {"type": "array", "minItems": 1, "maxItems": 32, "items": _ONE}},
                            "additionalProperties": False,
                        },
                    ]
                },
                "example": {"image": "data:image/jpeg;base64,/9j/4AAQSkZJRg...", "id": "holiday-17"},
            },
        },
    }
}


ANALYZE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "one picture: its annotation; several: `items` in their order, each an annotation or a problem",
        "content": {
            "application/json": {
                "schema": {
                    "oneOf": [
                        {"$ref": "#/components/schemas/Annotation"},
                        {
                            "type": "object",
                            "required": ["items"],
                            "properties": {
                                "items": {
                                    "type": "array",
                                    "items": {
                                        "oneOf": [
                                            {"$ref": "#/components/schemas/Annotation"},
                                            {"$ref": "#/components/schemas/ProblemModel"},
                                        ]
                                    },
                                }
                            },
                        },
                    ]
                },
                "example": _EXAMPLE,
            }
        },
    },
    **responses(
        *(
            "empty_body",
            "bad_request",
            "bad_base64",
            "too_large",
            "too_many_pixels",
            "too_many_pictures",
            "not_an_image",
        ),
        *("unsupported_media_type", "truncated", "too_small", "unknown_task", "bad_parameter"),
        *("overloaded", "internal_error", "unavailable", "timeout"),
    ),
}

#: What is at the place of a deferred request, once it is answered: what became of its picture too.
RESULT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: ANALYZE_RESPONSES[200],
    **responses(
        *("empty_body", "bad_base64", "not_found", "too_large", "too_many_pixels", "not_an_image", "truncated"),
        *("too_small", "bad_parameter", "overloaded", "internal_error", "unavailable", "timeout"),
    ),
}

#: What is sent to a request's `Callback-Url`; docs/callbacks.md says how to check the signature.
CALLBACKS: dict[str, Any] = {
    "callbacks": {
        "answered": {
            "{$request.header.callback-url}": {
                "post": {
                    "summary": "The answer is there",
                    "description": "At least once: the same `Idempotency-Key` may come again. Tried again until the "
                    "answer is 2xx, or 410 to end it.",
                    "parameters": [
                        {
                            "name": SIGNATURE,
                            "in": "header",
                            "required": True,
                            "description": "`t=SECONDS,v1=HEX`: HMAC-SHA256 of `SECONDS.BODY` with the shared secret; "
                            "one `v1` for each secret that is in use",
                            "schema": {"type": "string"},
                        },
                        {
                            "name": IDEMPOTENCY_KEY,
                            "in": "header",
                            "required": True,
                            "description": "the place of the answer, as in the 202",
                            "schema": {"type": "string"},
                        },
                    ],
                    "requestBody": {
                        "required": True,
                        "content": {
                            "application/json": {
                                "schema": {
                                    "type": "object",
                                    "required": ["id", "result", "status", "answer"],
                                    "properties": {
                                        "id": {"type": "string", "description": "as in the 202"},
                                        "result": {"type": "string", "description": "where the answer can be fetched"},
                                        "status": {
                                            "type": "integer",
                                            "description": "of the answer that is there, a problem's too: it is final",
                                        },
                                        "answer": {
                                            "type": ["object", "null"],
                                            "description": "what `result` answers; null: it is too large to be sent",
                                        },
                                    },
                                }
                            }
                        },
                    },
                    "responses": {"2XX": {"description": "taken"}, "410": {"description": "do not try again"}},
                }
            }
        }
    }
}


def use_local_docs(api: FastAPI) -> None:
    """Serve the API documentation at ``/docs`` from this machine, and complete the OpenAPI document."""
    from swagger_ui_bundle import swagger_ui_path

    api.mount("/docs-files", StaticFiles(directory=swagger_ui_path), name="docs-files")

    @api.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        page = get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="DeepTrust API",
            swagger_js_url="/docs-files/swagger-ui-bundle.js",
            swagger_css_url="/docs-files/swagger-ui.css",
            swagger_favicon_url="/page/favicon.svg",
        )
        # the page starts itself with an inline script: allowed here and nowhere else
        page.headers["content-security-policy"] = (
            "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
            "img-src 'self' data:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
        )
        return page

    derived = api.openapi

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            document = derived()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            model = Annotation.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
            schemas |= model.pop("$defs", {})
            schemas["Annotation"] = model
            schemas["ProblemModel"] = ProblemModel.model_json_schema()
            if os.environ.get(VARIABLE):
                _declare_keys(document)
            else:
                _declare_refusals(document, "host_refused", sending=("forbidden",))
            api.openapi_schema = document
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]


def _declare_keys(document: dict[str, Any]) -> None:
    """Say that every route but health wants an API key, and in which two ways it may come."""
    document["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "`Authorization: Bearer KEY`"},
        "browser": {"type": "http", "scheme": "basic", "description": "the key as password, under any user name"},
    }
    document["security"] = [{"key": []}, {"browser": []}]
    for path in authentication.OPEN & document["paths"].keys():
        for operation in document["paths"][path].values():
            operation["security"] = []
    _declare_refusals(document, "unauthorized", "forbidden", "rate_limited", "quota_exceeded")


def _declare_refusals(document: dict[str, Any], *codes: str, sending: tuple[str, ...] = ()) -> None:
    """Say what every route but health may answer before it is asked, and what else to more than a look."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items() if path not in authentication.OPEN else ():
            for status, refusal in responses(*codes, *(() if method == "get" else sending)).items():
                operation["responses"].setdefault(str(status), refusal)
