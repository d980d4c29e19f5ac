"""The store's routes and the page in a small server of their own: no Ray and no model.

`python -m tests.app.small_store PORT SETTINGS [page]` serves what the ingress serves of them. `POST /v1/analyze`
answers a record made up from the picture's bytes and keeps it as the ingress does: a test says in the query what the
record is to hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, JSONResponse

from app import cluster
from app.feedback import router
from app.problems import install
from app.store.settings import StoreSettings
from app.store.store import Store
from app.uploads import UploadLimits, read_uploads
from deployments.annotation import Annotation, Caption, Detection, Provenance

ROOT = Path(__file__).parents[2]


def small_store(settings: StoreSettings, page: bool) -> FastAPI:
    """The application; its store starts and ends with it."""
    store = Store(settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        store.start()
        yield
        store.close()

    async def store_of() -> Store:
        return store

    app = FastAPI(lifespan=lifespan)
    if page:
        from app.ingress import SecurityHeaders  # with all of Ray

        app.add_middleware(SecurityHeaders)
    install(app)
    app.include_router(router(store_of))

    @app.post("/v1/analyze")
    async def analyze(
        request: Request,
        label: str = "ai",
        caption: str = "a brown dog runs across a field",
        tag: Annotated[list[str], Query()] = ["dog", "field", "running"],  # noqa: B006
    ) -> JSONResponse:
        (upload,) = await read_uploads(request, UploadLimits(max_pictures=1))
        assert upload.data is not None
        record = Annotation(
            id=upload.id or uuid.uuid4().hex,
            sha256=hashlib.sha256(upload.data).hexdigest(),
            detection=Detection(
                label=label, ai_probability=0.9, provenance=Provenance(c2pa="absent", declared_ai=None)
            ),
            caption=Caption(text=caption),
            tags=tag,
            models={"detector": "starter:detector#1"},
            timings_ms={"total": 5.0},
        )
        store.offer(record, upload.data)
        return JSONResponse(record.model_dump(mode="json"))

    @app.get("/readyz")
    async def readyz() -> dict[str, Any]:
        return {"ready": True, "stages": {}}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"detector": {"thresholds": {"human_below": 0.3, "ai_above": 0.7}}}

    @app.get("/samples")
    async def samples() -> list[Any]:
        return []

    @app.get("/")
    async def index() -> FileResponse:
        return FileResponse(ROOT / "app" / "page" / "index.html")

    @app.get("/page/{name}")
    async def page_file(name: str) -> FileResponse:
        return FileResponse(ROOT / "app" / "page" / Path(name).name)

    return app


class SmallStore:
    """The server in a process of its own, to be killed and started again."""

    def __init__(self, settings: StoreSettings, page: bool = False) -> None:
        self.settings, self.page, self.port = settings, page, cluster.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.app.small_store", str(self.port), self.settings.model_dump_json()]
        command += ["page"] if self.page else []
        self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        limit = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/v1/store", timeout=5).json()["state"] != "starting":
                    return
            assert self.process.poll() is None, "the server ended"
            assert time.monotonic() < limit, "the server did not start"
            time.sleep(0.05)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()


@contextlib.contextmanager
def running_store(settings: StoreSettings, page: bool = False) -> Iterator[SmallStore]:
    """A server, stopped afterwards."""
    server = SmallStore(settings, page)
    server.start()
    try:
        yield server
    finally:
        server.stop()


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(
        small_store(StoreSettings.model_validate_json(sys.argv[2]), "page" in sys.argv[3:]),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_level="warning",
    )
