"""What the loop is told and tells: a run's settings, the job that a task makes of them, the outcome.

Knows no task and does no work.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import ConfigDict, Field

from data.versions import DataVersion
from train.module import Optimisation, TrainedModule, TrainingError
from train.order import Order
from train.strategies import StrategyName
from train.stream import Source
from train.tracking import RunReference


class LoopConfig(Optimisation):
    """How a run is spread, stopped and resumed."""

    model_config = ConfigDict(extra="forbid")

    epochs: int = Field(5, ge=1, description="passes over the training split")
    max_steps: int = Field(0, ge=0, description="optimiser steps at most; 0: what the epochs come to")
    batch_size: int = Field(32, ge=1, description="pictures of an optimiser step, all workers together")
    accumulate: int = Field(1, ge=1, description="parts that each worker's share of a batch is computed in")
    validate_every: int = Field(0, ge=0, description="steps between validations; 0: each epoch")
    patience: int = Field(0, ge=0, description="validations without improvement before the run ends early; 0: never")
    num_workers: int = Field(1, ge=1, description="training workers; one for each GPU, where there are any")
    min_workers: int = Field(
        0, ge=0, description="go on with as few as this while nodes are missing; 0: a fixed number"
    )
    lanes: int = Field(
        0,
        ge=0,
        description="equal shares of the data, a multiple of every possible number of workers; 0: --num-workers",
    )
    strategy: StrategyName = Field("ddp", description="ddp: each worker has the model; fsdp: each has a part of it")
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"] = Field(
        "32-true", description="of the computation; `true` stores weights in it too"
    )
    gpus_per_worker: float = Field(
        -1, ge=-1, description="-1: one where the cluster has GPUs (too few for the workers is an error), else none"
    )
    cpus_per_worker: float = Field(0.5, gt=0, description="that Ray reserves for a worker; the rest is for loaders")
    threads: int = Field(0, ge=0, description="CPU threads of a worker; 0: the machine's cores over the workers")
    loaders: int = Field(1, ge=1, description="tasks that read and decode for each worker at a time")
    loader_cpus: float = Field(0.25, gt=0, description="CPUs that Ray reserves for a loader")
    checkpoint_every: int = Field(
        200, ge=1, description="steps between checkpoints; one follows each validation anyway"
    )
    keep: int = Field(2, ge=1, description="checkpoints that are kept for resuming")
    max_failures: int = Field(3, ge=-1, description="deaths of workers that a run survives; -1: any number")
    give_way_s: float = Field(
        30.0,
        ge=0,
        description="on a cluster: when a replica of Serve has waited as long for what the run holds, the run stops "
        "with a checkpoint, lets it have that, and goes on when there is room again; 0: never",
    )
    seed: int = 20260101

    @property
    def all_lanes(self) -> int:
        return self.lanes or self.num_workers


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: Literal["finished", "stopped", "failed"]
    steps: int
    total_steps: int
    metrics: dict[str, float] = field(default_factory=dict)
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean loss of all workers) of every step since the worker started."""
    samples_per_s: float = 0.0
    reason: str = ""


class Job(Protocol):
    """What a task hands to the loop; pickled into every worker."""

    @property
    def config(self) -> LoopConfig: ...

    @property
    def version(self) -> DataVersion: ...

    @property
    def deadline(self) -> float:
        """``time.time()`` at which to stop, or infinity."""
        ...

    @property
    def run(self) -> RunReference | None: ...

    def train_source(self) -> Source: ...

    def val_source(self) -> Source: ...

    def in_process(self) -> bool:
        """Whether loading is too cheap for tasks of its own."""
        ...

    def module(self, total_steps: int) -> TrainedModule: ...

    def example(self, module: TrainedModule) -> dict[str, torch.Tensor]:
        """A small batch that reaches whatever the loss reaches."""
        ...

    def export(
        self, module: TrainedModule, model: Any, judged: dict[int, Any], folder: Path, metrics: dict[str, float]
    ) -> dict[str, float]:
        """Write ``model`` (the best weights, whole) as the checkpoint folder; returns the figures of its card."""
        ...

    def samples(self, module: TrainedModule) -> list[tuple[Any, str]]:
        """A few validation pictures and what the model says of them."""
        ...


def order_of(config: LoopConfig, source: Source) -> Order:
    """The order of a source's rows under these settings."""
    return Order(source.groups, config.batch_size, config.all_lanes, source.window, config.seed)


def total_steps_of(config: LoopConfig, order: Order) -> int:
    """Optimiser steps of the whole run."""
    steps = config.epochs * order.steps
    return min(steps, config.max_steps) if config.max_steps else steps


def threads_of(config: LoopConfig) -> int:
    """CPU threads that each worker computes with."""
    return config.threads or max(1, (os.cpu_count() or 1) // config.num_workers)


def share_of_batch(config: LoopConfig, world: int) -> int:
    """Rows that a worker's model sees at once."""
    if config.batch_size % (world * config.accumulate):
        raise TrainingError(
            f"--batch-size {config.batch_size} does not divide by {world} workers times --accumulate "
            f"{config.accumulate}"
        )
    return config.batch_size // world // config.accumulate
