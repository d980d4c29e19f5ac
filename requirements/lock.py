"""Make the pinned lists again: ``python requirements/lock.py [cpu] [gpu] [dev]``.

Asks pip to resolve the extras of ``pyproject.toml`` without installing anything, and writes every package with its
version. The lists are installed with ``--no-deps``, so that what is left out here stays out. Uses whatever package
index this machine's pip is set up with; no list names one.
"""

from __future__ import annotations

import json
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
    "dev": set[str](),
}


def resolve(requirements: list[str], constraints: Path | None = None) -> dict[str, str]:
    """Name -> version of everything that the requirements come down to."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, report = Path(folder) / "in.txt", Path(folder) / "report.json"
        wanted.write_text("\n".join(requirements))
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--report", str(report), "-r", str(wanted)]
        if constraints is not None:
            command += ["-c", str(constraints)]
        subprocess.run(command, check=True)
        found = json.loads(report.read_text())["install"]
    return {item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"] for item in found}


def main() -> None:
    """Write the lists that are named on the command line, or all."""
    settings = tomllib.loads((HERE.parent / "pyproject.toml").read_text())
    project, weights = settings["project"], settings["tool"]["deeptrust"]["weights"]
    extras = project["optional-dependencies"]
    for name in sys.argv[1:] or ["cpu", "gpu", "dev"]:
        if name == "dev":
            base = HERE / "cpu.txt"
            pinned = resolve(extras["dev"], base)
            held = {line.split("==")[0] for line in base.read_text().splitlines() if "==" in line} | LEFT_OUT["cpu"]
            pinned = {package: version for package, version in pinned.items() if package not in held}
        else:
            pinned = resolve(project["dependencies"] + extras[name])
            pinned |= dict(package.split("==") for package in weights)
        lines = [
            f"{package}=={version}" for package, version in sorted(pinned.items()) if package not in LEFT_OUT[name]
        ]
        header = f"# made by requirements/lock.py from pyproject.toml ({name}); install with pip install --no-deps -r\n"
        (HERE / f"{name}.txt").write_text(header + "\n".join(lines) + "\n")
        print(f"requirements/{name}.txt: {len(lines)} packages")


if __name__ == "__main__":
    main()
