"""With `DEEPTRUST_TEST_ALL` a test that did not run makes the run fail, whatever it wanted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_SKIPS = """
import pytest

@pytest.mark.parametrize("reason", {reasons!r})
def test_it(reason: str) -> None:
    pytest.skip(reason)
"""
_ROOT, _PROCESSOR = "namespaces and links want root", "without VNNI, it is wrong there"


@pytest.mark.parametrize(
    ("reasons", "variable", "said"),
    [
        ([_ROOT, _PROCESSOR, "no wordnet-base here"], "1", f"{_ROOT}; no wordnet-base here"),
        ([_PROCESSOR], "1", ""),
        ([_ROOT], "", ""),
    ],
)
def test_what_is_left_out_makes_the_run_fail(tmp_path: Path, reasons: list[str], variable: str, said: str) -> None:
    (tmp_path / "test_it.py").write_text(_SKIPS.format(reasons=reasons))
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"DEEPTRUST_TEST_ALL": variable, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == (pytest.ExitCode.TESTS_FAILED if said else pytest.ExitCode.OK), ended.stderr
    assert ended.stdout.partition("left out, and DEEPTRUST_TEST_ALL is set: ")[2].partition("\n")[0] == said
