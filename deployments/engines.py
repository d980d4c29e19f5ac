"""Engines: the same network run faster than by plain PyTorch, where a checkpoint's card says that it may be.

In: a checkpoint whose card lists what was admitted (``train.export`` measures it: exported files for CPUs, number
formats and ``torch.compile`` for PyTorch on either device). Out: a function from normalised pixels to logits, or None:
plain PyTorch then does it. Of what is valid for this device and installed, the one that was fastest is taken.

Knows no task, no thresholds and no Ray.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from deployments.checkpoints import Checkpoint, CheckpointError
from deployments.processor import processor_flags

logger = logging.getLogger(__name__)

Logits = Callable[[np.ndarray], np.ndarray]
"""float32 pixels ``(n, ...)`` as the checkpoint's normalisation gives them -> float32 logits ``(n, labels)``."""


class Engine:
    """What computes the network: called as ``Logits`` are.

    Args:
        run: pixels -> logits, and where that can be had what the last layer reads.
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


class EngineEntry(BaseModel):
    """One admitted way to compute the network, as ``card.json`` lists it under ``engines``."""

    model_config = ConfigDict(extra="forbid")

    engine: Literal["openvino", "onnxruntime", "pytorch"]
    precision: Literal["float32", "bfloat16", "int8"]
    file: str = Field(
        "",
        pattern=r"^([\w.-]+\.onnx)?$",
        description="in the checkpoint folder; PyTorch has none and computes from the weights",
    )
    compiled: bool = Field(False, description="by torch.compile, for any batch size")
    device: Literal["cpu", "cuda"] = "cpu"
    needs: list[str] = Field([], description="instruction sets of which the processor must have one; empty: any")
    pictures: int = Field(ge=1, description="on which parity was measured")
    max_difference: float = Field(ge=0, description="largest difference of a probability from PyTorch's in float32")
    speed: float = Field(gt=0, description="pictures a second, in units of PyTorch's float32, where it was measured")

    @model_validator(mode="after")
    def _is_of_its_engine(self) -> EngineEntry:
        if (self.engine == "pytorch") == bool(self.file):
            raise ValueError("openvino and onnxruntime have a file, and pytorch has none")
        if self.engine == "pytorch" and self.precision == "int8":
            raise ValueError("pytorch computes in float32 or bfloat16")
        if self.engine != "pytorch" and (self.compiled or self.device != "cpu"):
            raise ValueError("a file is for CPUs, and nothing else compiles it")
        return self

    @property
    def name(self) -> str:
        """For people: engine, precision, and whether it is compiled."""
        return f"{self.engine}-{self.precision}{'-compiled' if self.compiled else ''}"


def usable(checkpoint: Checkpoint, device: str) -> list[EngineEntry]:
    """What may be used on this machine, the fastest first.

    Raises:
        CheckpointError: the card's list is not understood, or names a file that is not there.
    """
    try:
        entries = [EngineEntry.model_validate(entry) for entry in checkpoint.card.engines]
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.uri}: its card lists engines that are none: {error}") from error
    if not entries:
        return []
    for each in entries:
        if each.file and not (checkpoint.folder / each.file).is_file():
            raise CheckpointError(f"{checkpoint.uri}: its card names {each.file}, which is not there; export it again")
    flags = processor_flags()
    fit = [
        each
        for each in entries
        if each.device == device
        and (not each.needs or flags & set(each.needs))
        and (each.engine == "pytorch" or importlib.util.find_spec(each.engine) is not None)
    ]
    return sorted(fit, key=lambda each: -each.speed)


def open_engine(
    checkpoint: Checkpoint, device: str, by_pytorch: Callable[[EngineEntry], Engine], threads: int | None = None
) -> tuple[EngineEntry, Engine] | None:
    """The fastest usable engine of a checkpoint, loaded; None when plain PyTorch is what there is.

    Args:
        by_pytorch: makes the engine of an entry that PyTorch computes (``pytorch_engine``).

    Raises:
        CheckpointError: as ``usable``.
    """
    for each in usable(checkpoint, device):
        try:
            if each.engine == "pytorch":
                return each, by_pytorch(each)
            return each, load_engine(checkpoint.folder / each.file, each.engine, each.precision, threads)
        except Exception as error:  # of a C++ runtime or a compiler: another, or plain PyTorch, gives the same answers
            logger.warning("%s: %s cannot be used here: %s", checkpoint.uri, each.name, error)
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


def last_layer(network: torch.nn.Module, labels: int) -> torch.nn.Module | None:
    """The linear layer that makes the logits; None: there is none."""
    linear = [module for module in network.modules() if isinstance(module, torch.nn.Linear)]
    return next((layer for layer in reversed(linear) if layer.out_features == labels), None)


def pytorch_engine(
    network: torch.nn.Module,
    last: torch.nn.Module | None,
    precision: str,
    device: str,
    compiled: bool,
    example: np.ndarray,
) -> Engine:
    """PyTorch as an engine, on a copy of the network.

    Compiled, it is compiled here, before anything is asked: for one picture and for any number of them. The last layer
    is computed after what is compiled, so that what it reads can be had: a hook put on later goes unnoticed there.

    Args:
        last: the layer that makes the logits, with nothing after it; None: what it reads cannot be had.
        example: two pictures' pixels, as will be given.
    """
    dtype: torch.dtype = getattr(torch, precision)
    own = copy.deepcopy(network).to(device, dtype).eval()
    final: torch.nn.Module = torch.nn.Identity()
    if last is not None:
        name = next(name for name, module in network.named_modules() if module is last)
        final = own.get_submodule(name)
        own.set_submodule(name, torch.nn.Identity())
    body: Any = torch.compile(own) if compiled else own

    @torch.inference_mode()
    def run(pixels: np.ndarray) -> list[np.ndarray]:
        given = torch.from_numpy(pixels).to(device, dtype)
        if compiled and len(given) > 1:
            torch._dynamo.mark_dynamic(given, 0)  # else each size of a batch would be compiled by itself
        read = body(pixel_values=given).logits
        logits = final(read).float().cpu().numpy()
        return [logits] if last is None else [logits, read.flatten(1).float().cpu().numpy()]

    if compiled:
        run(example[:1])
        run(example)
    return Engine(run, precision)
