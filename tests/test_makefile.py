"""What the Makefile installs by itself, with stubs in the place of the programs that do it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def asked(folder: Path, what: str, user: int) -> list[str]:
    """What is asked of apt-get and systemctl for a user who has nothing of it."""
    folder.mkdir()
    stubs = {name: f'echo "{name} $1" >>{folder}/asked' for name in ("apt-get", "systemctl")} | {"id": f"echo {user}"}
    for name, does in stubs.items():
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o700)
    ls, make = shutil.which("ls"), shutil.which("make")
    assert ls and make
    (folder / "ls").symlink_to(ls)
    (folder / "asked").touch()
    (folder / "try.mk").write_text(f"include {ROOT}/Makefile\ntry:\n\t@$(INSTALL_{what})\n")
    command = [make, "-f", str(folder / "try.mk"), "try"]
    subprocess.run(command, env={"PATH": str(folder)}, cwd=folder, timeout=60, check=True)
    return (folder / "asked").read_text().splitlines()


@pytest.mark.parametrize("what", ["PROMETHEUS", "HOSTS"])
def test_only_for_root_something_is_installed_or_switched_off(tmp_path: Path, what: str) -> None:
    assert asked(tmp_path / "root", what, 0)[:2] == ["apt-get update", "apt-get install"]
    assert asked(tmp_path / "user", what, 1000) == []
