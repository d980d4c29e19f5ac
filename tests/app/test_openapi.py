"""The OpenAPI document and the running application say the same: schemathesis finds nothing between them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.application


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


def test_schemathesis_finds_nothing(application: Any, tmp_path: Path) -> None:
    _schemathesis(application.url, tmp_path, examples=1, seed=1, phases="examples,coverage")
    assert httpx.get(f"{application.url}/readyz").json()["ready"]


@pytest.mark.proof
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [2, 3])
def test_schemathesis_finds_nothing_in_a_long_look(application: Any, tmp_path: Path, seed: int) -> None:
    _schemathesis(application.url, tmp_path, examples=60, seed=seed)
    assert httpx.get(f"{application.url}/readyz").json()["ready"]
