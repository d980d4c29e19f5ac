"""Make the pinned lists again: ``python requirements/lock.py [cpu] [gpu] [s3] [dev] [review] [audit] [--upgrade]``.

Asks pip to resolve the extras of ``pyproject.toml`` without installing anything, and writes every package with its
version. What a list pins already keeps its version unless ``--upgrade`` is given. The lists are installed with
``--no-deps``, so that what is left out here stays out. Uses whatever package index this machine's pip is set up with;
no list names one. ``s3`` and ``dev`` hold only what comes on top of the serving list. ``review`` and ``audit`` are
environments of their own, whose pins do not go with the others.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent

#: torch comes first and on its own (the Makefile says why); the rest are CUDA builds that vLLM names and this project
#: does not use.
LEFT_OUT = {
    "cpu": {"torch", "torchvision", "torchaudio", "torchcodec", "triton"},
    "gpu": set[str](),
    "s3": set[str](),
    "dev": set[str](),
    "review": set[str](),
    "audit": set[str](),
}

#: Of these there are builds for CPUs beside the plain ones, with a local part ("+cpu") that "==" overlooks and pip
#: counts as newer.
PLAIN_BUILD = {"gpu": {"torch"}}


def read_pins(path: Path) -> dict[str, str]:
    """Name -> version of a list that has been written; empty when there is none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return dict(re.split("={2,3}", line) for line in lines if "==" in line)


def resolve(requirements: list[str], constraints: dict[str, str]) -> dict[str, str]:
    """Name -> version of everything that the requirements come down to, at the versions that ``constraints`` hold."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, held, report = (Path(folder) / name for name in ("in.txt", "held.txt", "report.json"))
        wanted.write_text("\n".join(requirements))
        held.write_text("\n".join(f"{package}=={version}" for package, version in constraints.items()))
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--report", str(report), "-r", str(wanted), "-c", str(held)]
        subprocess.run(command, check=True)
        found = json.loads(report.read_text())["install"]
    # one package calls its version v0.0.21, which means the same
    return {
        item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"].removeprefix("v")
        for item in found
    }


def main() -> None:
    """Write the lists that are named on the command line, or all."""
    settings = tomllib.loads((HERE.parent / "pyproject.toml").read_text())
    project, weights = settings["project"], settings["tool"]["deeptrust"]["weights"]
    extras = project["optional-dependencies"]
    upgrade = "--upgrade" in sys.argv
    for name in [argument for argument in sys.argv[1:] if argument != "--upgrade"] or list(LEFT_OUT):
        held = {} if upgrade else read_pins(HERE / f"{name}.txt")
        if name in ("s3", "dev"):
            serving = read_pins(HERE / "cpu.txt")
            pinned = resolve(extras[name], held | serving)
            pinned = {key: version for key, version in pinned.items() if key not in serving.keys() | LEFT_OUT["cpu"]}
        elif name in ("review", "audit"):
            pinned = resolve(settings["tool"]["deeptrust"][name], held)
        else:
            pinned = resolve(project["dependencies"] + extras[name], held)
            pinned |= dict(package.split("==") for package in weights)
        lines = [
            f"{package}{'===' if package in PLAIN_BUILD.get(name, ()) else '=='}{version}"
            for package, version in sorted(pinned.items())
            if package not in LEFT_OUT[name]
        ]
        header = f"# made by requirements/lock.py from pyproject.toml ({name}); install with pip install --no-deps -r\n"
        (HERE / f"{name}.txt").write_text(header + "\n".join(lines) + "\n")
        print(f"requirements/{name}.txt: {len(lines)} packages")


if __name__ == "__main__":
    main()
