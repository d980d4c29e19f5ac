"""Code is named where it came without its repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from train.source import PACKAGES, describe_trees

ROOT = Path(__file__).parents[2]


def test_code_without_its_repository_is_named_by_the_trees_that_git_knows(tmp_path: Path) -> None:
    """Copied as Ray copies a working directory, and committed by git itself."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    script = "from train.tracking import code_commit; print(code_commit())"
    told = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PATH": os.defpath, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    git = ["git", "-c", "core.fileMode=false", "-c", "core.autocrlf=false", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / ".git/info/exclude").write_text("__pycache__/\n")
    subprocess.run([*git, "add", *PACKAGES], check=True)
    whole = subprocess.run([*git, "write-tree"], check=True, capture_output=True, text=True).stdout.strip()
    for name in PACKAGES:
        tree = subprocess.run([*git, "rev-parse", f"{whole}:{name}"], check=True, capture_output=True, text=True)
        assert f"{name} {tree.stdout.strip()[:12]}" in told
    (tmp_path / "train/source.py").write_text("")
    assert describe_trees(tmp_path) != told
