"""A small application around `read_uploads` and `decode`, for tests that need HTTP but no model."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from app.problems import Problem, install
from app.uploads import Upload, UploadLimits, read_uploads
from deployments.images import ImageError, ImageLimits, decode
from deployments.provenance import read_provenance

LIMITS = UploadLimits()


def _describe(upload: Upload) -> dict[str, Any]:
    """What stands for one picture. Raises Problem."""
    if upload.data is None:
        assert upload.problem is not None
        raise upload.problem
    try:
        picture = decode(upload.data, ImageLimits())
    except ImageError as error:
        raise Problem.of_image(error) from error
    provenance = read_provenance(upload.data, picture.format)
    return {
        "id": upload.id,
        "sha256": picture.sha256,
        "width": picture.width,
        "height": picture.height,
        "provenance": provenance.model_dump(),
    }


def _describe_item(upload: Upload) -> dict[str, Any]:
    try:
        return _describe(upload)
    except Problem as problem:
        return problem.to_dict()


def small_app(limits: UploadLimits = LIMITS) -> FastAPI:
    """`POST /v1/analyze|detect|caption|tag` that answer what they read, and `/fail`, which does not."""
    app = FastAPI()
    install(app)

    async def analyze(request: Request) -> JSONResponse:
        uploads = await read_uploads(request, limits)
        if len(uploads) == 1:
            return JSONResponse(await asyncio.to_thread(_describe, uploads[0]))
        return JSONResponse({"items": [await asyncio.to_thread(_describe_item, upload) for upload in uploads]})

    for path in ("/v1/analyze", "/v1/detect", "/v1/caption", "/v1/tag"):
        app.add_api_route(path, analyze, methods=["POST"])

    @app.get("/fail")
    def fail(number: int = 0) -> None:
        raise RuntimeError("a secret of the inside")

    return app


def send(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    """One request to the application, in this process."""

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(run())
