"""Label Studio over its HTTP API: the project, its tasks, the pictures in it, and what reviewers submitted.

In: an address and a token; what goes into a task. Out: tasks with their annotations, and clear errors. Requests that a
server may answer better a little later are made again; one that makes something is made again only when it is certain
that nothing was made. Knows no store and no form.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

_RETRIES_S = (0.5, 2.0, 5.0)
_TIMEOUT_S = 60.0
_PAGE = 100
_TOO_BUSY = (429, 502, 503, 504)


class ReviewError(RuntimeError):
    """Review cannot go on; the message says why and what to do."""


class Gone(ReviewError):
    """What was asked for has been deleted in Label Studio."""


@dataclass(frozen=True)
class Task:
    """A task as Label Studio has it."""

    id: int
    sha256: str | None
    """None: somebody else made it."""
    data: Mapping[str, Any]
    annotations: list[dict[str, Any]]


class LabelStudio:
    """A server, and who asks it."""

    def __init__(self, url: str, token: str, retries_s: tuple[float, ...] = _RETRIES_S) -> None:
        self.url, self._token, self._retries_s = url.rstrip("/"), token.strip(), retries_s
        self._http = httpx.Client(base_url=self.url, timeout=_TIMEOUT_S, trust_env=False)
        self._access: str | None = None

    def close(self) -> None:
        self._http.close()

    # ---- the project --------------------------------------------------------------------------------------------

    def project(self, title: str) -> int | None:
        """Id of the project with a title, the oldest of several; None: there is none."""
        found = [each for each in self._pages("/api/projects/", {}, "results") if each["title"] == title]
        return min((each["id"] for each in found), default=None)

    def make_project(self, title: str, description: str, form: str, reviewers: int) -> int:
        settings = self._project_settings(form, reviewers) | {"title": title, "description": description}
        return int(self._json("POST", "/api/projects/", json=settings)["id"])

    def update_project(self, project: int, form: str, reviewers: int) -> None:
        """Bring its form up to date; a form that reviewers have used is changed only where that loses nothing."""
        self._json("PATCH", f"/api/projects/{project}/", json=self._project_settings(form, reviewers))

    @staticmethod
    def _project_settings(form: str, reviewers: int) -> dict[str, Any]:
        return {"label_config": form, "maximum_annotations": reviewers, "show_collab_predictions": True}

    # ---- tasks --------------------------------------------------------------------------------------------------

    def tasks(self, project: int) -> Iterator[Task]:
        """Every task, with its annotations."""
        query = {"project": project, "fields": "all"}
        for task in self._pages("/api/tasks/", query, "tasks"):
            data = task.get("data") or {}
            sha256 = data.get("sha256")
            annotations = [each for each in task.get("annotations") or [] if isinstance(each, dict)]
            yield Task(int(task["id"]), sha256 if isinstance(sha256, str) else None, data, annotations)

    def add_task(self, project: int, data: dict[str, Any], prediction: dict[str, Any]) -> None:
        """Make a task.

        Raises:
            Gone: the project was deleted.
        """
        task = {"data": data, "predictions": [prediction]}
        self._json("POST", f"/api/projects/{project}/import", json=[task])

    def upload(self, project: int, name: str, content: bytes, media_type: str) -> tuple[int, str]:
        """Put a picture into the project; its number, and its address on the server."""
        files = {"file": (name, content, media_type)}
        made = self._json("POST", f"/api/projects/{project}/import?commit_to_project=false", files=files)
        (number,) = made["file_upload_ids"]
        return int(number), "/data/" + str(self._json("GET", f"/api/import/file-upload/{number}")["file"]).lstrip("/")

    def remove_task(self, task: Task) -> None:
        """Remove a task with its picture and what was said in it; nothing happens when it is gone."""
        numbers = [task.data.get("upload")]
        for address in [f"/api/import/file-upload/{n}" for n in numbers if n is not None] + [f"/api/tasks/{task.id}/"]:
            try:
                self._send("DELETE", address)
            except Gone:
                continue

    def users(self) -> dict[int, str]:
        """Number of a user -> who that is."""
        found = self._json("GET", "/api/users/")
        listed = found if isinstance(found, list) else found.get("results", [])
        return {int(user["id"]): str(user.get("email") or user.get("username") or user["id"]) for user in listed}

    # ---- requests -----------------------------------------------------------------------------------------------

    def _pages(self, path: str, query: Mapping[str, Any], key: str) -> Iterator[dict[str, Any]]:
        page = 1
        while True:
            asked = {**query, "page": page, "page_size": _PAGE}
            try:
                found = self._json("GET", path, params=asked)
            except Gone:
                if page > 1:  # the page after the last one is "not found"
                    return
                raise
            rows = found if isinstance(found, list) else found[key]
            yield from rows
            if len(rows) < _PAGE:
                return
            page += 1

    def _json(self, method: str, path: str, **request: Any) -> Any:
        answer = self._send(method, path, **request)
        try:
            return answer.json()
        except ValueError:
            raise ReviewError(
                f"{self.url} answered something that is no Label Studio's: is the address right?"
            ) from None

    def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        waits = list(self._retries_s)
        renewed = False
        while True:
            try:
                answer = self._http.request(method, path, headers=self._headers(), **request)
            except httpx.ConnectError as error:  # nothing was asked yet
                reason = (
                    f"Label Studio does not answer at {self.url} ({error}): start it with `make review`, or give --url"
                )
            except httpx.TransportError as error:
                reason = f"Label Studio at {self.url} broke off ({type(error).__name__})"
                if method == "POST":
                    raise ReviewError(f"{reason}: run the command again, it makes nothing twice") from error
            else:
                if answer.status_code == 401 and self._access is not None and not renewed:
                    self._access, renewed = None, True
                    continue
                if answer.status_code not in _TOO_BUSY and not _is_locked(answer):
                    return self._checked(answer, path)
                reason = f"Label Studio at {self.url} is too busy (status {answer.status_code}): try again later"
            if not waits:
                raise ReviewError(reason)
            time.sleep(waits.pop(0))

    def _checked(self, answer: httpx.Response, path: str) -> httpx.Response:
        if answer.status_code in (401, 403):
            raise ReviewError(
                f"Label Studio at {self.url} refuses the token (status {answer.status_code}): take a new one from its "
                "page Account & Settings, and put it into LABEL_STUDIO_API_KEY"
            )
        if answer.status_code == 404:
            raise Gone(f"{path} is not at {self.url}: it was deleted, or the address is no Label Studio's")
        if answer.status_code >= 400:
            raise ReviewError(f"Label Studio at {self.url} refused {path} ({answer.status_code}): {answer.text[:300]}")
        return answer

    def _headers(self) -> dict[str, str]:
        """A legacy token is sent as it is; a personal one is a JSON web token that buys one of five minutes."""
        if self._token.count(".") != 2:
            return {"Authorization": f"Token {self._token}"}
        if self._access is None:
            answer = self._http.post("/api/token/refresh", json={"refresh": self._token})
            self._access = str(self._checked(answer, "/api/token/refresh").json()["access"])
        return {"Authorization": f"Bearer {self._access}"}


def _is_locked(answer: httpx.Response) -> bool:
    """Its SQLite was written by another request."""
    return answer.status_code == 500 and "database is locked" in answer.text
