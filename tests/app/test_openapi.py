"""The OpenAPI document says what routes answer, and schemathesis finds nothing between it and the application."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.ingress import api
from app.openapi import ANALYZE_RESPONSES
from app.problems import MEDIA_TYPE

#: Refusals of a whole request, whether its sender can wait or not.
_AT_ONCE = {"bad_request", "too_many_pictures", "unsupported_media_type", "unknown_task"}


def _codes(answers: dict[Any, Any]) -> set[str]:
    return {
        code for answer in answers.values() for code in answer["content"].get(MEDIA_TYPE, {"examples": {}})["examples"]
    }


def test_a_place_may_have_whatever_becomes_of_a_picture_and_problems_that_are_final(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(api, "openapi_schema", None)
    route = api.openapi()["paths"]["/v1/results/{place}"]["get"]
    assert _codes(route["responses"]) == _codes(ANALYZE_RESPONSES) - _AT_ONCE | {"not_found", "host_refused"}
    problems = {status: answer for status, answer in route["responses"].items() if int(status) >= 400}
    assert {"400", "404", "413", "415", "422", "429", "500", "503", "504"} <= problems.keys()
    for answer in problems.values():
        assert answer["content"][MEDIA_TYPE]["schema"]["properties"]["final"]["type"] == "boolean"
    assert "final" in route["description"]


def _schemathesis(url: str, folder: Path, examples: int, seed: int, phases: str = "examples,coverage,fuzzing") -> None:
    """Every check that it has, against every route of the document."""
    # a body that is binary by its schema is refused unless it is a picture, and a text unless it is a list of tasks:
    # no schema can say that, so these refusals are no fault; nor that feedback must be on an answer that was given
    (folder / "schemathesis.toml").write_text(
        '[checks.positive_data_acceptance]\nexpected-statuses = ["2xx", 400, 404, 409, 413, 415, 422, 429]\n'
        "[checks.negative_data_rejection]\n"
        "expected-statuses = [400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 428, 429]\n"
    )
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--url", url),
        *("--phases", phases, "--mode", "all", "--max-examples", str(examples)),
        *("--checks", "all", "--seed", str(seed)),
        *("--generation-database", "none", "--request-timeout", "60", "--workers", "1", "--continue-on-failure"),
    ]
    ended = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"NO_COLOR": "1", "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-12000:]


@pytest.mark.application
def test_schemathesis_finds_nothing(application: Any, tmp_path: Path) -> None:
    _schemathesis(application.url, tmp_path, examples=1, seed=1, phases="examples,coverage")
    assert httpx.get(f"{application.url}/readyz").json()["ready"]


@pytest.mark.application
@pytest.mark.proof
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [2, 3])
def test_schemathesis_finds_nothing_in_a_long_look(application: Any, tmp_path: Path, seed: int) -> None:
    _schemathesis(application.url, tmp_path, examples=60, seed=seed)
    assert httpx.get(f"{application.url}/readyz").json()["ready"]
