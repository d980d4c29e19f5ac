"""Problems: every error of the application has the one form, and says nothing of its inside."""

from __future__ import annotations

import pytest
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

from app.problems import CODES, MEDIA_TYPE, Problem, ProblemModel, install, responses
from deployments.images import ImageError
from tests.app.small_app import send, small_app


class Body(BaseModel):
    number: int


@pytest.fixture
def app() -> FastAPI:
    app = small_app()

    @app.post("/body")
    def body(body: Body) -> None:
        return None

    @app.get("/busy")
    def busy() -> None:
        raise Problem("overloaded", "Try again.", {"Retry-After": "2"}, id="a")

    @app.put("/busy")
    def more() -> None:
        return None

    @app.get("/image")
    def image() -> None:
        raise ImageError("too_small", "Too small.")

    @app.get("/http/{status}")
    def http(status: int) -> None:
        raise HTTPException(status, "what happened", {"WWW-Authenticate": "Bearer"})

    return app


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/busy", "overloaded"),
        ("GET", "/image", "too_small"),
        ("GET", "/nowhere", "not_found"),
        ("GET", "/v1/analyze", "method_not_allowed"),
        ("GET", "/fail?number=x", "bad_parameter"),
        ("GET", "/fail", "internal_error"),
        ("POST", "/v1/analyze", "empty_body"),
        ("GET", "/http/503", "unavailable"),
    ],
)
def test_every_error_is_a_problem(app: FastAPI, method: str, path: str, code: str) -> None:
    answer = send(app, method, path)
    problem = ProblemModel.model_validate(answer.json())
    assert answer.headers["content-type"] == MEDIA_TYPE
    assert (problem.code, problem.status, problem.title) == (code, *CODES[code])
    assert answer.status_code == problem.status
    assert problem.type == "about:blank"
    assert problem.detail


def test_headers_and_further_members_are_kept(app: FastAPI) -> None:
    answer = send(app, "GET", "/busy")
    assert answer.headers["retry-after"] == "2"
    assert answer.json()["id"] == "a"
    assert send(app, "GET", "/v1/analyze").headers["allow"] == "POST"
    assert send(app, "DELETE", "/busy").headers["allow"] == "GET, PUT", "of all routes with this address"


def test_a_status_without_a_code_of_its_own_stays(app: FastAPI) -> None:
    answer = send(app, "GET", "/http/401")
    assert (answer.status_code, answer.json()["status"], answer.json()["code"]) == (401, 401, "bad_request")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_an_unexpected_error_tells_nothing_of_the_inside(app: FastAPI, lines: pytest.LogCaptureFixture) -> None:
    answer = send(app, "GET", "/fail")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "secret" in lines.text


def test_a_body_that_fails_validation(app: FastAPI) -> None:
    answer = send(app, "POST", "/body", json={"number": "many"})
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_parameter")
    assert answer.json()["errors"][0]["where"] == "body.number"
    assert "many" not in answer.text
    answer = send(app, "POST", "/body", content=b"{", headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")


def test_members_of_a_problem_cannot_be_overwritten_by_extras() -> None:
    assert Problem("timeout", "Late.", status=200, title="x", id="a").to_dict() == {
        "type": "about:blank",
        "title": CODES["timeout"][1],
        "status": 504,
        "detail": "Late.",
        "code": "timeout",
        "id": "a",
    }


def test_problems_are_documented_for_openapi() -> None:
    documented = responses("too_large", "too_many_pixels", "timeout")
    assert set(documented) == {413, 504}
    assert set(documented[413]["content"][MEDIA_TYPE]["examples"]) == {"too_large", "too_many_pixels"}
    app = FastAPI()
    install(app)
    app.add_api_route("/", lambda: None, responses=documented)
    assert "413" in app.openapi()["paths"]["/"]["get"]["responses"]
