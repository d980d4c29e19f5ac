"""Which engine runs the detector fastest on these cores, and do its answers stay the same?

Against PyTorch in bfloat16, eager: what the notes of the project take as the usual way to serve. All engines run the
same network on the same batches, in turn in every round, in a process with the allocator of replicas and as replicas
have them: PyTorch computes a batch in parts, the others have threads of their own. Answers are compared with PyTorch's
in float32 on photos.

    python -m benchmarks.detector_engines --photos DIR [--parts parity,speed]
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.processes import ALLOCATOR, process_with
from benchmarks.report import RESULTS, write_result
from deployments.checkpoints import resolve
from deployments.detector import DetectorModel
from deployments.processor import processor_flags
from train.export import Candidate, batches_of, candidates, parity, read_views, speed, torch_runner

ENGINES: list[Candidate] = [
    "openvino-float32",
    "openvino-bfloat16",
    "openvino-int8",
    "onnxruntime-float32",
    "onnxruntime-int8",
]
_TELLING = {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "bf16"}


class EnginesConfig(BaseModel):
    """Settings of a run."""

    model_config = ConfigDict(extra="forbid")

    photos: Path = Field(description="folder of photos, searched recursively")
    checkpoint: str = Field("starter:detector", description="checkpoint URI of a detector")
    parts: str = Field("parity,speed", description="which measurements; the other's last result is kept")
    count: int = Field(200, ge=2, description="photos of `parity`")
    batch_size: int = Field(8, ge=1)
    batches: int = Field(2, ge=1, description="batches in a round of `speed`")
    rounds: int = Field(5, ge=1)
    threads: int = Field(2, ge=1)


def measure(config: EnginesConfig) -> dict[str, Any]:
    """The chosen parts, in the process that this is called in."""
    torch.set_num_threads(config.threads)
    model = DetectorModel(resolve(config.checkpoint), engine=False, precision=torch.float32)
    parts = config.parts.split(",")
    wanted = config.count if "parity" in parts else config.batch_size * config.batches
    batches = batches_of(model, read_views(model, config.photos, wanted), config.batch_size)
    result: dict[str, Any] = {
        "model": model.checkpoint.name,
        "instructions": sorted(processor_flags() & _TELLING),
    }
    with tempfile.TemporaryDirectory() as scratch:
        found = candidates(model, ENGINES, Path(scratch), config.threads)
        runners = {
            "pytorch-float32": torch_runner(model, threads=config.threads),
            "pytorch-bfloat16": torch_runner(model, torch.bfloat16, config.threads),
            **{name: run for name, (_, run) in found.items()},
        }
        if "parity" in parts:
            # without PyTorch's bfloat16: it is what speed is compared with, and slow where it is emulated
            exported = {name: run for name, run in runners.items() if name != "pytorch-bfloat16"}
            result["parity"] = {"photos": sum(map(len, batches))} | parity(model, exported, batches)
        if "speed" in parts:
            rates = speed(runners, batches[: config.batches], config.rounds)
            base = rates["pytorch-bfloat16"]["pictures_per_s"]
            result["speed"] = {
                name: {key: round(value, 2) for key, value in row.items()}
                | {"times_bfloat16_eager": round(row["pictures_per_s"] / base, 2)}
                for name, row in rates.items()
            } | {"threads": config.threads, "batch_size": config.batch_size}  # type: ignore[dict-item]
    return result


def main(arguments: list[str] | None = None) -> None:
    """Measure and write ``results/detector_engines.json``."""
    from pydantic_settings import CliApp

    config = CliApp.run(EnginesConfig, cli_args=arguments)
    with process_with(ALLOCATOR) as process:
        measured = process.submit(measure, config).result()
    file = RESULTS / "detector_engines.json"
    result: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if result.get("model") != measured["model"]:
        result = {}  # of another checkpoint: no part of it is this one's
    result |= measured
    if "parity" in result and "speed" in result:
        result["reaches_the_bar"] = [
            name
            for name in ENGINES
            if name in result["speed"]
            and result["speed"][name]["times_bfloat16_eager"] >= 1.5
            and result["parity"].get(name, {}).get("max_difference", 1) <= 0.02
        ]
    print(json.dumps(result, indent=1), write_result("detector_engines", result, RESULTS))


if __name__ == "__main__":
    main()
