"""Export a detector for faster serving: other ways to compute the same network, admitted by a parity gate.

In: a checkpoint, and pictures on which to compare. Out: the checkpoint's folder again with a card that lists what
passes, and the files of it; ``deployments.engines`` takes the fastest that is valid for a replica's device. What does
not pass is left out, and the table says why. Parity: the largest difference of the calibrated probability from plain
PyTorch's in float32. Speed is measured in turn with that, batch after batch, as a replica computes: with its allocator,
and on a CPU plain PyTorch in as many parts of a batch as there are threads.

On a CPU: OpenVINO and ONNX Runtime, from one ONNX file. On a GPU: PyTorch in bfloat16, and by ``torch.compile``; a
detector that was exported there is served in float32 where bfloat16 did not pass. What an earlier export admitted for
the other device stays in the card, with its files. Knows no MLflow and no Ray.

    python -m train.export --checkpoint starter:detector --photos DIR --output FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from deployments.checkpoints import Checkpoint, CheckpointError, publish, resolve, scratch_folder
from deployments.detector import DetectorModel, reading, verdict
from deployments.engines import EngineEntry, Logits, load_engine
from deployments.images import ImageError, decode
from deployments.memory import ALLOCATOR, process_with
from deployments.processor import processor_flags
from deployments.views import render

Candidate = Literal[
    "openvino-float32",
    "openvino-bfloat16",
    "openvino-int8",
    "onnxruntime-float32",
    "onnxruntime-int8",
    "pytorch-bfloat16",
    "pytorch-float32-compiled",
    "pytorch-bfloat16-compiled",
]
#: What is tried where nothing else is asked for.
_USUAL: dict[str, list[Candidate]] = {
    "cpu": ["openvino-float32", "openvino-bfloat16", "onnxruntime-float32", "onnxruntime-int8"],
    "cuda": ["pytorch-bfloat16", "pytorch-float32-compiled", "pytorch-bfloat16-compiled"],
}
#: Processors without these emulate bfloat16, more slowly than they compute float32.
_BFLOAT16 = ["avx512_bf16", "amx_bf16", "bf16"]


class ExportConfig(BaseModel):
    """Settings of an export."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str = Field("starter:detector", description="checkpoint URI of a detector")
    photos: Path = Field(description="folder of pictures on which engines are compared, searched recursively")
    output: Path = Field(description="folder that is written: the checkpoint with its engine files; must not exist")
    engines: list[Candidate] = Field(
        [],
        description="what is tried; unset: on a CPU OpenVINO and ONNX Runtime, on a GPU bfloat16 and torch.compile",
    )
    count: int = Field(200, ge=2, description="pictures compared")
    batch_size: int = Field(8, ge=1)
    rounds: int = Field(5, ge=1, description="timed rounds, all engines in turn in each")
    most_difference: float = Field(0.02, ge=0, description="of a probability, for an engine to be admitted")
    least_speed: float = Field(1.05, ge=0, description="times PyTorch's float32, for an engine to be worth its file")
    threads: int = Field(2, ge=1, description="CPU threads of every engine")


class _Outputs(torch.nn.Module):
    """A model that answers its logits and what its last layer reads, where it has one."""

    def __init__(self, model: torch.nn.Module, last: torch.nn.Module | None) -> None:
        super().__init__()
        self.model, self.last = model, last

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with reading(self.last) as read:
            logits = self.model(pixel_values=pixel_values).logits
        return (logits, read[0]) if read else (logits,)


def export_onnx(model: DetectorModel, file: Path) -> None:
    """The network as ONNX in float32, any batch size.

    Raises:
        CheckpointError: it holds something that the exporter does not know.
    """
    shape = model.views.shape
    pixels = torch.zeros((2, *(shape[:1] if shape[0] > 1 else ()), 3, shape[1], shape[2]))
    outputs = ["logits"] if model.last_layer is None else ["logits", "embedding"]
    axes = {name: {0: "batch"} for name in ("pixel_values", *outputs)}
    names = {"input_names": ["pixel_values"], "output_names": outputs}
    try:
        with torch.no_grad():
            torch.onnx.export(
                _Outputs(model.network, model.last_layer).eval(),
                (pixels,),
                str(file),
                dynamic_axes=axes,
                opset_version=18,
                dynamo=False,
                **names,  # type: ignore[arg-type]
            )
    except Exception as error:  # the exporter raises whatever a module's tracing raises
        raise CheckpointError(f"{model.checkpoint.uri} cannot be exported to ONNX: {error}") from error


def quantise(source: Path, target: Path) -> None:
    """Matrix products in int8: weights for each channel, activations as they come."""
    import logging

    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger("root").setLevel(logging.ERROR)
    quantize_dynamic(
        source,
        target,
        weight_type=QuantType.QInt8,
        per_channel=True,
        # seven bits: processors without VNNI add products of eight up in sixteen, which overflows
        reduce_range=True,
        op_types_to_quantize=["MatMul", "Gemm"],
    )


def read_views(model: DetectorModel, folder: Path, count: int) -> np.ndarray:
    """The views of the first pictures of a folder that decode, uint8 ``(n, V, S, S, 3)``.

    Raises:
        CheckpointError: there are fewer than two.
    """
    views = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")):
        try:
            views.append(render(decode(path.read_bytes()).image, model.views))
        except ImageError:
            continue
        if len(views) == count:
            break
    if len(views) < 2:
        raise CheckpointError(f"{folder} holds fewer than two pictures that decode; name another with --photos")
    return np.stack(views)


def batches_of(model: DetectorModel, views: np.ndarray, size: int) -> list[np.ndarray]:
    """What every engine reads: normalised float32 pixels."""
    return [model.normalised(views[first : first + size]) for first in range(0, len(views), size)]


def parity(
    model: DetectorModel, runners: Mapping[str, Logits], batches: Sequence[np.ndarray]
) -> dict[str, dict[str, float]]:
    """For each runner the largest and mean difference of a probability from the first one's, and how many verdicts
    it changes."""
    result: dict[str, dict[str, float]] = {}
    reference: np.ndarray | None = None
    thresholds = model.checkpoint.card.thresholds
    for name, run in runners.items():
        chances = np.concatenate([model.calibrated(run(batch)) for batch in batches])
        reference = chances if reference is None else reference
        pairs = zip(chances, reference, strict=True)
        result[name] = {
            "max_difference": float(np.abs(chances - reference).max()),
            "mean_difference": float(np.abs(chances - reference).mean()),
            "verdicts_changed": sum(verdict(a, thresholds) != verdict(b, thresholds) for a, b in pairs),
        }
    return result


def speed(runners: Mapping[str, Logits], batches: Sequence[np.ndarray], rounds: int) -> dict[str, dict[str, float]]:
    """Pictures a second of each runner: in every round all are timed in turn on the same batches."""
    for run in runners.values():
        run(batches[0])
    rates: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            begun = time.perf_counter()
            for batch in batches:
                run(batch)
            rates[name].append(sum(map(len, batches)) / (time.perf_counter() - begun))
    return {
        name: {
            "pictures_per_s": float(np.median(values)),
            "slowest_round": min(values),
            "fastest_round": max(values),
        }
        for name, values in rates.items()
    }


def torch_runner(model: DetectorModel, dtype: torch.dtype = torch.float32, threads: int = 2) -> Logits:
    """PyTorch, eager, in a number format; on a CPU a batch in a part for each thread. Weights of float32 are the
    model's own."""
    network: Any = model.network
    if dtype is not torch.float32:
        import copy

        network = copy.deepcopy(network).to(dtype)
    in_parts = model.device == "cpu"
    workers = ThreadPoolExecutor(threads if in_parts else 1, "part", torch.set_num_threads, (1,))

    @torch.inference_mode()
    def part(pixels: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(pixels).to(model.device, dtype)
        return network(pixel_values=given).logits.float().cpu().numpy()

    def run(pixels: np.ndarray) -> np.ndarray:
        parts = min(threads, len(pixels)) if in_parts else 1
        return np.concatenate(list(workers.map(part, np.array_split(pixels, parts))))

    return run


def candidates(
    model: DetectorModel, wanted: Sequence[Candidate], folder: Path, threads: int
) -> dict[str, tuple[str, Logits]]:
    """The wanted engines: each one's file in ``folder`` (none: "") and what runs it. What cannot be had here is said
    and left out."""
    found: dict[str, tuple[str, Logits]] = {}
    for name in wanted:
        engine, precision, *compiled = name.split("-")
        try:
            if engine == "pytorch":
                found[name] = "", model.by_pytorch(precision, bool(compiled))
                continue
            if model.device != "cpu":
                print(f"{name}: is for CPUs: export where there is no GPU", flush=True)
                continue
            if precision == "bfloat16" and not processor_flags() & set(_BFLOAT16):
                # OpenVINO would quietly compute in float32, and what was measured would be true of no other machine
                print(f"{name}: this processor has no bfloat16", flush=True)
                continue
            file = _onnx(model, folder, small=precision == "int8")
            found[name] = file.name, load_engine(file, engine, precision, threads)
        except CheckpointError:
            raise
        except Exception as error:  # of a C++ runtime or a compiler, or the package is not installed
            told = (str(error).splitlines() or [""])[0][:160]
            print(f"{name}: not available here ({type(error).__name__}: {told})", flush=True)
    return found


def _onnx(model: DetectorModel, folder: Path, small: bool) -> Path:
    """The network's file in a folder, in float32 or int8, written where it is not there yet."""
    plain, eight = folder / "detector.onnx", folder / "detector.int8.onnx"
    if not plain.exists():
        export_onnx(model, plain)
    if small and not eight.exists():
        quantise(plain, eight)
    return eight if small else plain


def export(config: ExportConfig) -> dict[str, dict[str, Any]]:
    """As ``export_here``, in a process of its own that has the allocator of replicas."""
    with process_with(ALLOCATOR) as process:
        return process.submit(export_here, config).result()


def export_here(config: ExportConfig) -> dict[str, dict[str, Any]]:
    """Write the folder; returns what was measured of every engine, PyTorch included.

    Raises:
        CheckpointError: no detector, no pictures, or the output exists.
    """
    if config.output.exists():
        raise CheckpointError(f"{config.output} is there already: name another --output, or remove it")
    checkpoint: Checkpoint = resolve(config.checkpoint)
    torch.set_num_threads(config.threads)
    model = DetectorModel(checkpoint, engine=False, precision=torch.float32)
    views = read_views(model, config.photos, config.count)
    build = scratch_folder(config.output)
    try:
        kept = _copied(checkpoint, build, model.device)
        found = candidates(model, config.engines or _USUAL[model.device], build, config.threads)
        runners = {"pytorch-float32": torch_runner(model, threads=config.threads)}
        runners |= {name: run for name, (_, run) in found.items()}
        batches = batches_of(model, views, config.batch_size)
        rates = speed(runners, batches[:3], config.rounds)
        measured: dict[str, dict[str, Any]] = {
            name: {**row, **rates[name]} for name, row in parity(model, runners, batches).items()
        }
        for name in found:
            _judge(measured[name], measured["pytorch-float32"]["pictures_per_s"], config)
        admitted = [
            _entry(name, file, model.device, len(views), measured[name])
            for name, (file, _) in found.items()
            if measured[name]["admitted"]
        ]
        if model.device == "cuda":
            # plain PyTorch would be served in bfloat16 there, whatever the gate says of it
            plain = {"max_difference": 0.0, "speed": 1.0}
            admitted.append(_entry("pytorch-float32", "", "cuda", len(views), plain))
        named = {each.file for each in [*admitted, *kept]}
        for file in build.glob("*.onnx"):
            if file.name not in named:
                file.unlink()
        card = json.loads((build / "card.json").read_text()) if (build / "card.json").is_file() else {}
        card["engines"] = [each.model_dump() for each in [*kept, *admitted]]
        (build / "card.json").write_text(json.dumps(card, indent=2) + "\n")
        build.chmod(0o755)
        publish(build, config.output)
    finally:
        shutil.rmtree(build, ignore_errors=True)
    return measured


def _copied(checkpoint: Checkpoint, build: Path, device: str) -> list[EngineEntry]:
    """Copy a checkpoint without what an export to ``device`` makes again; returns the entries that stay."""
    kept = [
        EngineEntry.model_validate(entry) for entry in checkpoint.card.engines if entry.get("device", "cpu") != device
    ]
    files = {each.file for each in kept}
    for path in checkpoint.folder.iterdir():
        if path.is_file() and not path.name.startswith(".") and (path.suffix != ".onnx" or path.name in files):
            shutil.copyfile(path, build / path.name)
    return kept


def _judge(figures: dict[str, Any], base: float, config: ExportConfig) -> None:
    """Add to an engine's figures whether it is admitted, and why not."""
    figures["speed"] = figures["pictures_per_s"] / base
    agrees = figures["max_difference"] <= config.most_difference
    figures["admitted"] = agrees and figures["speed"] >= config.least_speed
    figures["why"] = "" if figures["admitted"] else "differs too much" if not agrees else "not faster than PyTorch"


def _entry(name: str, file: str, device: str, pictures: int, figures: Mapping[str, Any]) -> EngineEntry:
    """What the card says of an admitted engine."""
    engine, precision, *compiled = name.split("-")
    return EngineEntry(
        engine=engine,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        file=file,
        compiled=bool(compiled),
        device=device,  # type: ignore[arg-type]
        needs=_needs(precision) if device == "cpu" else [],
        pictures=pictures,
        max_difference=figures["max_difference"],
        speed=round(figures["speed"], 3),
    )


def _needs(precision: str) -> list[str]:
    """Instructions that a processor must have for what was measured to be true there. Dynamic int8 was timed on this
    one; one with other instructions may be slower than float32."""
    if precision != "int8":
        return _BFLOAT16 if precision == "bfloat16" else []
    flags = processor_flags()
    best_first = ("amx_int8", "avx512_vnni", "avx_vnni", "asimddp", "avx512bw", "avx2")
    return [flag for flag in best_first if flag in flags][:1]


def table(measured: dict[str, dict[str, Any]]) -> str:
    """For people."""
    lines = [f"{'engine':27}{'pictures/s':>12}{'x float32':>11}{'max |dp|':>11}"]
    base = measured["pytorch-float32"]["pictures_per_s"]
    for name, row in measured.items():
        verdict = "" if "admitted" not in row else "admitted" if row["admitted"] else f"refused: {row['why']}"
        rate, difference = row["pictures_per_s"], row["max_difference"]
        lines.append(f"{name:27}{rate:12.2f}{rate / base:11.2f}{difference:11.5f}   {verdict}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    from pydantic_settings import CliApp

    config = CliApp.run(ExportConfig, cli_args=arguments)
    try:
        measured = export(config)
    except CheckpointError as error:
        sys.exit(f"error: {error}")
    print(table(measured))
    print(f"written to {config.output}")


if __name__ == "__main__":
    main()
