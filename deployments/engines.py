"""Engines: the same network run by something faster than PyTorch, where a checkpoint's card says that it may be.

In: a checkpoint whose card lists exported files (``train.export`` writes them, each with the parity it was measured to
have). Out: a function from normalised pixels to logits, or None: PyTorch then does it. Of the files that are valid for
this device and whose engine is installed, the one that was fastest is taken.

Knows no task, no thresholds and no Ray.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from deployments.checkpoints import Checkpoint, CheckpointError
from deployments.processor import processor_flags

logger = logging.getLogger(__name__)

Logits = Callable[[np.ndarray], np.ndarray]
"""float32 pixels ``(n, ...)`` as the checkpoint's normalisation gives them -> float32 logits ``(n, labels)``."""


class Engine:
    """A loaded file: called as ``Logits`` are.

    Args:
        run: pixels -> the file's outputs: logits, and in files that have it what its last layer reads.
    """

    def __init__(self, run: Callable[[np.ndarray], Sequence[np.ndarray]], precision: str) -> None:
        self._run, self._precision = run, precision

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        return self._run(pixels)[0]

    def outputs(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Logits, and the last layer's input ``(n, D)``. None: the file was exported without it, or computes in eight
        bits, which moves it from where PyTorch has it.
        """
        found = self._run(pixels)
        return found[0], found[1] if len(found) > 1 and self._precision != "int8" else None


class EngineFile(BaseModel):
    """An exported file, as ``card.json`` lists it under ``engines``."""

    model_config = ConfigDict(extra="forbid")

    engine: Literal["openvino", "onnxruntime"]
    precision: Literal["float32", "bfloat16", "int8"]
    file: str = Field(pattern=r"^[\w.-]+\.onnx$", description="in the checkpoint folder")
    device: Literal["cpu"] = "cpu"
    needs: list[str] = Field([], description="instruction sets of which the processor must have one; empty: any")
    pictures: int = Field(ge=1, description="on which parity was measured")
    max_difference: float = Field(ge=0, description="largest difference of a probability from PyTorch's in float32")
    speed: float = Field(gt=0, description="pictures a second, in units of PyTorch's float32, where it was exported")


def usable(checkpoint: Checkpoint, device: str) -> list[EngineFile]:
    """The files that may be used on this machine, the fastest first.

    Raises:
        CheckpointError: the card's list is not understood, or names a file that is not there.
    """
    try:
        files = [EngineFile.model_validate(entry) for entry in checkpoint.card.engines]
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.uri}: its card lists engines that are none: {error}") from error
    if not files:
        return []
    for each in files:
        if not (checkpoint.folder / each.file).is_file():
            raise CheckpointError(f"{checkpoint.uri}: its card names {each.file}, which is not there; export it again")
    flags = processor_flags()
    fit = [
        each
        for each in files
        if each.device == device
        and (not each.needs or flags & set(each.needs))
        and importlib.util.find_spec(each.engine) is not None
    ]
    return sorted(fit, key=lambda each: -each.speed)


def open_engine(checkpoint: Checkpoint, device: str, threads: int | None = None) -> tuple[EngineFile, Engine] | None:
    """The fastest usable engine of a checkpoint, loaded; None when PyTorch is what there is.

    Raises:
        CheckpointError: as ``usable``.
    """
    for each in usable(checkpoint, device):
        try:
            return each, load_engine(checkpoint.folder / each.file, each.engine, each.precision, threads)
        except Exception as error:  # of a C++ runtime: another engine, or PyTorch, gives the same answers
            logger.warning("%s: %s cannot load %s: %s", checkpoint.uri, each.engine, each.file, error)
    return None


def load_engine(file: Path, engine: str, precision: str, threads: int | None = None) -> Engine:
    """A function that runs an ONNX file.

    Args:
        threads: of the engine; None follows ``OMP_NUM_THREADS``, as PyTorch does.
    """
    threads = threads or int(os.environ.get("OMP_NUM_THREADS", "0")) or None
    run = (_openvino if engine == "openvino" else _onnxruntime)(file, precision, threads)
    return Engine(run, precision)


def _openvino(file: Path, precision: str, threads: int | None) -> Callable[[np.ndarray], Sequence[np.ndarray]]:
    # its TBB opens a library past the allocator that replicas preload, with glibc's, and the process aborts when the
    # one frees what is the other's; not when TBB believes that a sanitizer is there (uxlfoundation/oneTBB #1645)
    os.environ.setdefault("TBB_ENABLE_SANITIZERS", "1")
    import openvino

    core = openvino.Core()
    # what is not said would follow the processor: bfloat16 where it has it, and other answers than were measured
    settings: dict[str, object] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
    }
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(core.read_model(file), "CPU", settings)
    outputs = list(compiled.outputs)

    def run(pixels: np.ndarray) -> list[np.ndarray]:
        found = compiled([pixels])
        return [np.array(found[output], dtype=np.float32) for output in outputs]

    return run


def _onnxruntime(file: Path, precision: str, threads: int | None) -> Callable[[np.ndarray], Sequence[np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda pixels: session.run(None, {name: pixels})
