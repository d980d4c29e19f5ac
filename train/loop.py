"""The loop of every trainer: Lightning on Ray Train workers, which may be killed at any moment and go on.

In: a ``Job`` (settings, and what a task makes of them: sources, a module, an export) and a storage place. Out: a
checkpoint folder (contract 1) in the run's last Ray checkpoint, and an ``Outcome``. What a run's place in storage
holds:

    STORAGE/NAME/settings.json      what the run was started with: another start must agree
    STORAGE/NAME/checkpoint_.../    last.ckpt (Lightning), best.safetensors and judged.json (the best weights so far and
                                    what they say of the validation split), progress.json; the final one: export/

A checkpoint is taken before a batch, so it holds whole steps; order and place of the data follow from the step alone
(``train.order``), so a resumed run has as many steps and the same batches as an undisturbed one.

Knows no task, no command line and no MLflow server but the run it is given.
"""

from __future__ import annotations

import copy
import fcntl
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pytorch_lightning as pl
import torch
from pydantic import ConfigDict, Field
from safetensors.torch import load_file, save_file

from data.versions import DataVersion
from deployments.processor import step_back
from train.beside import batches_beside
from train.gauges import Gauges
from train.giving_way import GiveWay
from train.module import NonFinite, Optimisation, TrainedModule, TrainingError
from train.order import Order
from train.strategies import StrategyName, local_strategy, ray_strategy
from train.stream import PassOnce, Shard, Source, local_batches, ray_batches
from train.tracking import Run, RunReference, attach

#: Losses are compared and the clock is looked at about this often.
_SYNC_S, _MOST_STEPS_BETWEEN = 2.0, 50
#: Why a run ends before its last step, to go on from there: its time is over, or serving wants what it holds.
_ENDS = ("", "time", "way")


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
    steps = config.epochs * order.steps
    return min(steps, config.max_steps) if config.max_steps else steps


#: Takes figures, a checkpoint's folder (None on other workers than the first), and whether to wait until it is kept.
Report = Callable[[dict[str, Any], Path | None, bool], None]


class Watch(pl.Callback):
    """Losses, clock, best weights and checkpoints of a run.

    Args:
        scratch: a folder of this process.
        deadline: ``time.time()`` at which to stop.
        report: hands a checkpoint to whoever keeps them; None keeps none.
        run: the MLflow run, on the first worker.
        gauges: what operators see, on the first worker.
        give_way: whether serving wants what the run holds, on the first worker.
        loaded: told when nothing of the checkpoint that the run goes on from is read any more.
    """

    def __init__(
        self,
        config: LoopConfig,
        steps_per_epoch: int,
        scratch: Path,
        deadline: float = float("inf"),
        report: Report | None = None,
        run: Run | None = None,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
        gauges: Gauges | None = None,
        give_way: GiveWay | None = None,
        loaded: Callable[[], None] = lambda: None,
    ) -> None:
        self.loaded = loaded
        self.gauges, self.give_way = gauges, give_way
        self.config, self.steps_per_epoch, self.scratch = config, steps_per_epoch, scratch
        self.deadline, self.report, self.run, self.say = deadline, report, run, say
        self.best, self.bad, self.best_metrics = -float("inf"), 0, dict[str, float]()
        self.validations = 0
        self.losses: list[tuple[int, float]] = []
        self.stopped = ""
        self._pending: list[tuple[int, torch.Tensor]] = []
        self._parts: list[torch.Tensor] = []
        self.step, self._saved, self._due, self._interval = 0, 0, False, 1
        self._said = self._paused = 0.0
        self._epoch: dict[str, Any] = {}
        self.began, self.ended, self.began_step = 0.0, 0.0, 0

    # ------------------------------------------------------------------------------------------------- every step

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.loaded()
        self.step = self._saved = self.began_step = trainer.global_step
        self.began = self._synced = time.monotonic()

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._due:
            self._save(trainer, module)
        self._epoch = copy.deepcopy(trainer.fit_loop.epoch_progress.state_dict())

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._parts.append(outputs["loss"].detach().float())
        if trainer.global_step == self.step:
            return  # a part of a step
        self.step = trainer.global_step
        if not self.losses and not self._pending:
            # the first step waits for loaders and allocates: speed is that of the others
            self.began, self.began_step = time.monotonic(), self.step
        self.ended = time.monotonic()
        self._pending.append((self.step, torch.stack(self._parts).sum()))  # Lightning has divided each part
        self._parts = []
        if len(self._pending) >= self._interval or self.step == trainer.max_steps:
            self._sync(trainer, module)
        if self.step % self.config.checkpoint_every == 0:
            self._due = True
        if self.step == trainer.max_steps:
            trainer.val_check_batch = 1  # whatever its interval, a run ends with a validation

    def _sync(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Mean losses over the workers, and the first worker's clock: all of them stop at the same step."""
        if not self._pending:
            return
        now = time.monotonic()
        each = (now - self._synced) / len(self._pending)
        self._synced = now
        interval = int(np.clip(_SYNC_S / max(each, 1e-6), 1, _MOST_STEPS_BETWEEN))
        first = trainer.is_global_zero
        shared = torch.stack(
            [value for _, value in self._pending]
            + [
                torch.tensor(value, device=module.device)
                for value in (float(first and self._ends()), float(first and interval))
            ]
        )
        world = trainer.world_size
        if world > 1:
            torch.distributed.all_reduce(shared)
        values = shared.tolist()
        steps, self._pending = [step for step, _ in self._pending], []
        self._interval = max(1, int(values[-1]))
        means = [value / world for value in values[:-2]]
        for step, mean in zip(steps, means, strict=True):
            self.losses.append((step, mean))
            if not np.isfinite(mean):
                raise NonFinite(
                    f"the loss is {mean} at step {step}: lower --learning-rate (now "
                    f"{self.config.learning_rate:g}), raise "
                    "--warmup, keep --gradient-clip above 0, or use --precision bf16-mixed instead of 16-mixed"
                )
        # after the last step there is nothing to go on with: the run ends as it would have
        if values[-2] and not trainer.should_stop and steps[-1] < trainer.max_steps:
            self.stopped = _ENDS[int(values[-2])]
            trainer.should_stop = True
            if steps[-1] % (self.config.validate_every or self.steps_per_epoch):
                trainer.limit_val_batches = 0  # Lightning would validate before it stops
        if first:
            self._tell(trainer, steps, means)

    def _ends(self) -> int:
        """Which of ``_ENDS`` has come, by the first worker's clock and what it has been told."""
        if time.time() > self.deadline:
            return _ENDS.index("time")
        return _ENDS.index("way") if self.give_way is not None and self.give_way.to else 0

    def _tell(self, trainer: pl.Trainer, steps: list[int], means: list[float]) -> None:
        step, total = steps[-1], int(trainer.max_steps)
        rate = trainer.optimizers[0].param_groups[-1]["lr"]
        speed = (step - self.began_step) / max(1e-9, self.ended - self.began)
        if self.gauges is not None:
            self.gauges.tell(step, means[-1], speed * self.config.batch_size)
        if self.run is not None:
            for each, mean in zip(steps, means, strict=True):
                if each % 10 == 0 or each in (1, total):
                    epoch = each / self.steps_per_epoch
                    self.run.metrics({"train_loss": mean, "learning_rate": rate, "epoch": epoch}, each)
            if speed:
                self.run.metrics({"samples_per_s": speed * self.config.batch_size}, step)
        if time.monotonic() - self._said > 10 or step == total or not self._said:
            self._said = time.monotonic()
            pace = f", {speed * self.config.batch_size:.1f} pictures/s" if speed else ""
            left = f", {(total - step) / speed / 60:.0f} min left" if speed else ""
            self.say(
                f"step {step}/{total}, epoch {step / self.steps_per_epoch:.2f}, loss {means[-1]:.4f}, rate {rate:.2e}"
                f"{pace}{left}"
            )

    # -------------------------------------------------------------------------------------------------- validation

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._sync(trainer, module)
        self._paused = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, TrainedModule)
        value = module.results[module.metric]
        self.validations += 1
        self.bad = 0 if value > self.best else self.bad + 1
        if value > self.best:
            self.best, self.best_metrics = value, dict(module.results)
            if trainer.is_global_zero:
                assert module._judge is not None
                save_weights(module._judge, self.scratch / "best.safetensors")
                (self.scratch / "judged.json").write_text(json.dumps(list(module.judged.items())))
        self._due = True
        if self._is_out_of_patience():
            self.stopped = "patience"
            trainer.should_stop = True
        if trainer.is_global_zero:
            figures = ", ".join(f"{name} {value:.4f}" for name, value in module.results.items())
            self.say(f"step {self.step}: {figures}{'' if self.bad else ' (best so far)'}")
            if self.run is not None:
                self.run.metrics(module.results, self.step)
        # speed is that of training
        self._synced = time.monotonic()
        self.began += self._synced - self._paused
        self.ended += self._synced - self._paused

    # ------------------------------------------------------------------------------------------------- checkpoints

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._sync(trainer, module)
        if self.step > self._saved or self._due:
            self._save(trainer, module, between=False)

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule, between: bool = True) -> None:
        """A checkpoint of whole steps. Before a batch starts, Lightning counts it as begun already."""
        self._sync(trainer, module)
        self._due, self._saved = False, self.step
        if self.report is None:
            return
        # not in the scratch folder: whatever ends the run, this may still be on its way to where checkpoints are kept
        folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=self.scratch.parent))
        loop = trainer.fit_loop
        batches, epochs = loop.epoch_loop.batch_progress, loop.epoch_progress
        kept = copy.deepcopy(epochs.state_dict())
        if between:
            batches.total.ready -= 1
            batches.current.ready -= 1
        else:
            epochs.load_state_dict(self._epoch)  # the one long pass is not over
        trainer.save_checkpoint(folder / "last.ckpt")
        epochs.load_state_dict(kept)
        if between:
            batches.total.ready += 1
            batches.current.ready += 1
        if trainer.is_global_zero:
            for name in ("best.safetensors", "judged.json"):
                if (self.scratch / name).is_file():
                    shutil.copy(self.scratch / name, folder / name)
            (folder / "progress.json").write_text(json.dumps(self.progress()))
        if not trainer.is_global_zero:
            shutil.rmtree(folder)
        self.report(self.progress(), folder if trainer.is_global_zero else None, not between)

    def progress(self) -> dict[str, Any]:
        """Where the run stands."""
        return {
            "step": self.step,
            "best": self.best,
            "bad": self.bad,
            "validations": self.validations,
            **self.best_metrics,
        }

    def restore(self, folder: Path, first: bool = True) -> int:
        """Go on from a checkpoint's counts and, on the first worker, its best weights; returns the step that it was
        taken after."""
        progress = json.loads((folder / "progress.json").read_text())
        self.step = self.began_step = int(progress.pop("step"))
        self.best, self.bad = progress.pop("best"), progress.pop("bad")
        self.validations = progress.pop("validations", 0)  # runs of earlier releases did not count them
        self.best_metrics = progress
        for name in ("best.safetensors", "judged.json"):
            if first and (folder / name).is_file():
                shutil.copy(folder / name, self.scratch / name)
        if self._is_out_of_patience():
            self.stopped = "patience"
        return self.step

    def _is_out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.bad


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """A model's weights, tied ones once."""
    seen: dict[int, str] = {}
    weights = {}
    for name, value in model.state_dict().items():
        if value.data_ptr() not in seen or not value.numel():
            seen[value.data_ptr()] = name
            weights[name] = value.detach().cpu().contiguous()
    partial = path.with_suffix(".part")
    save_file(weights, partial, metadata={"format": "pt"})
    partial.replace(path)


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """What ``save_weights`` wrote; tied weights come along."""
    model.load_state_dict(load_file(path), strict=False)


class Loader:
    """What Lightning iterates: a stream's batches as a module's tensors."""

    def __init__(
        self, batches: Callable[[], Any], prepare: Callable[[dict[str, np.ndarray]], dict[str, torch.Tensor]]
    ) -> None:
        self._batches, self._prepare = batches, prepare

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self._batches():
            yield self._prepare(batch)


def trainer_of(
    config: LoopConfig, order: Order, total_steps: int, watch: Watch, strategy: Any, plugins: list[Any]
) -> pl.Trainer:
    """Lightning's trainer: one long pass, whose epochs are told by its steps."""
    return pl.Trainer(
        max_steps=total_steps,
        max_epochs=-1,
        accelerator="gpu" if strategy.root_device.type == "cuda" else "cpu",
        devices="auto" if strategy.root_device.type == "cuda" else 1,
        strategy=strategy,
        plugins=plugins,
        precision=config.precision,
        callbacks=[watch],
        gradient_clip_val=config.gradient_clip or None,
        accumulate_grad_batches=config.accumulate,
        val_check_interval=(config.validate_every or order.steps) * config.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        inference_mode=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def quieten() -> None:
    """Only what is ours to say: a run's own lines, not the libraries' bars and hints."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for chatty in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(chatty).setLevel(logging.ERROR)


def threads_of(config: LoopConfig) -> int:
    return config.threads or max(1, (os.cpu_count() or 1) // config.num_workers)


def share_of_batch(config: LoopConfig, world: int) -> int:
    """Rows that a worker's model sees at once."""
    if config.batch_size % (world * config.accumulate):
        raise TrainingError(
            f"--batch-size {config.batch_size} does not divide by {world} workers times --accumulate "
            f"{config.accumulate}"
        )
    return config.batch_size // world // config.accumulate


def train_steps(
    job: Job, watch: Watch, strategy: Any, plugins: list[Any], rank: int, world: int, resume: Path | None, streams: str
) -> TrainedModule:
    """Train from the start or from a checkpoint's folder, in this process's part.

    Args:
        streams: where batches come from: `ray`, or `beside` (a process without Ray) or `here`.
    """
    quieten()
    config = job.config
    source = job.train_source()
    order = order_of(config, source)
    total_steps = total_steps_of(config, order)
    start = watch.restore(resume, rank == 0) if resume else 0
    if rank == 0 and (resume or config.min_workers):
        told = f"resuming after step {start} of {total_steps}" if resume else f"starting {total_steps} steps"
        watch.say(told + (f" with {world} of {config.num_workers} workers" if config.min_workers else ""))
    # the same weights everywhere, FSDP does not send them around; then draws of each worker's own
    pl.seed_everything(config.seed, workers=True, verbose=False)
    module = job.module(total_steps)
    module.freeze_unreached(job.example(module))
    torch.manual_seed(config.seed + 1000 * start + rank)
    micro = share_of_batch(config, world)
    pieces = Shard(order, rank, world, start, total_steps, micro).pieces(source.window)

    def batches() -> Iterator[dict[str, np.ndarray]]:
        if streams == "ray":
            return ray_batches(source, pieces, micro, config.loaders, config.loader_cpus)
        return (batches_beside if streams == "beside" else local_batches)(source, pieces, micro)

    validation = PassOnce(job.val_source(), rank, world, micro, config.loaders, config.loader_cpus, streams == "ray")
    if start < total_steps and not watch.stopped:
        trainer_of(config, order, total_steps, watch, strategy, plugins).fit(
            module,
            Loader(batches, module.prepare),
            Loader(lambda: validation, module.prepare_judged),
            ckpt_path=str(resume / "last.ckpt") if resume else None,
            weights_only=True,
        )
    return module


def outcome_of(config: LoopConfig, watch: Watch, total_steps: int) -> Outcome:
    """How training went."""
    done = watch.step - watch.began_step
    return Outcome(
        "stopped" if watch.stopped in _ENDS[1:] else "finished",
        watch.step,
        total_steps,
        watch.best_metrics,
        watch.losses,
        config.batch_size * done / (watch.ended - watch.began) if done else 0.0,
        watch.stopped,
    )


@contextmanager
def scratch_of(run: str, rank: int) -> Iterator[Path]:
    """A folder of this process for the length of the block; around it lies one for checkpoints, which may be on their
    way longer. What a killed worker of this run and rank left on this machine is removed: a lock tells it from what is
    in use, which the kernel gives back when the process ends."""
    prefix = f"training-{re.sub(r'[^A-Za-z0-9_.-]', '_', run)}-rank{rank}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError):
            descriptor = _locked(left)
            shutil.rmtree(left, ignore_errors=True)
            os.close(descriptor)
    fresh = Path(tempfile.mkdtemp(prefix="new-"))
    with suppress(OSError):  # where a file system has no locks nothing is removed either
        _locked(fresh)
    around = fresh.rename(fresh.with_name(f"{prefix}{fresh.name.removeprefix('new-')}"))  # locked before it is found
    try:
        with tempfile.TemporaryDirectory(dir=around) as scratch:
            yield Path(scratch)
    finally:
        with suppress(OSError):  # a checkpoint is on its way
            around.rmdir()


def _locked(folder: Path) -> int:
    """A descriptor that keeps a folder locked while it is open.

    Raises:
        OSError: another process has it, or its file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def work(settings: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker runs; the first one's answer is the run's.

    Args:
        settings: `job`, and as `holds` what serving may want of it (None: it keeps what it has).
    """
    import ray.train
    from ray.train import Checkpoint
    from ray.train.lightning import RayLightningEnvironment
    from ray.train.v2.api.report_config import CheckpointUploadMode

    job: Job = settings["job"]
    config, context = job.config, ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if not torch.cuda.is_available():
        step_back()
    torch.set_num_threads(threads_of(config))
    order = order_of(config, job.train_source())
    total_steps = total_steps_of(config, order)

    def report(metrics: dict[str, Any], folder: Path | None, wait: bool) -> None:
        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(folder) if folder else None,
            checkpoint_upload_mode=CheckpointUploadMode.SYNC if wait else CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )

    with scratch_of(context.get_experiment_name(), rank) as scratch, ExitStack() as stack:
        resume, held = None, stack.enter_context(ExitStack())
        if checkpoint := ray.train.get_checkpoint():
            # where it lies, or from S3 one copy for all workers of a machine, which goes when each has loaded it
            resume = Path(held.enter_context(checkpoint.as_directory()))
            if (resume / "export").is_dir():
                return json.loads((resume / "progress.json").read_text())["outcome"]
        run = attach(job.run) if rank == 0 and job.run is not None else None
        gauges = give_way = None
        if rank == 0:
            if settings["holds"] is not None:
                give_way = stack.enter_context(GiveWay(settings["holds"], config.give_way_s))
            manifest = job.version.manifest
            gauges = Gauges(context.get_experiment_name(), f"{manifest.name} {manifest.version}")
        watch = Watch(
            config, order.steps, scratch, job.deadline, report, run, gauges=gauges, give_way=give_way, loaded=held.close
        )
        try:
            module = train_steps(
                job,
                watch,
                ray_strategy(config.strategy),
                [RayLightningEnvironment()],
                rank,
                world,
                resume,
                "here" if job.in_process() else "ray",
            )
            outcome = outcome_of(config, watch, total_steps)
            if outcome.reason == "way" and give_way is not None:
                watch.say(f"stopped after step {outcome.steps} of {total_steps}: serving wants room for {give_way.to}")
            return vars(outcome) if outcome.status == "stopped" else _finish(job, module, watch, outcome, report, rank)
        except NonFinite as error:
            # not raised: Ray would start the workers again, and they would come to the same point
            return vars(Outcome("failed", watch.step, total_steps, losses=watch.losses, reason=str(error)))
        finally:
            if run is not None:
                run.leave()


def _finish(
    job: Job, module: TrainedModule, watch: Watch, outcome: Outcome, report: Report, rank: int
) -> dict[str, Any]:
    """Write the best weights as a checkpoint folder and report them as the run's last checkpoint."""
    answer = vars(outcome)
    folder = None
    if rank == 0:
        folder = Path(tempfile.mkdtemp(dir=watch.scratch))
        metrics = export(job, module, watch, folder / "export")
        answer = {**answer, "metrics": metrics}
        if watch.run is not None:
            watch.run.metrics(metrics, outcome.steps)
            if samples := job.samples(module):
                watch.run.pictures("samples.png", samples)
        (folder / "progress.json").write_text(json.dumps({**watch.progress(), "outcome": answer}))
    report(watch.progress(), folder, True)
    return answer


def export(job: Job, module: TrainedModule, watch: Watch, folder: Path) -> dict[str, float]:
    """Write the best weights of a run as a checkpoint folder; returns the figures of its card."""
    keep = module.unsharded()
    load_weights(keep, watch.scratch / "best.safetensors")
    judged = {int(row): value for row, value in json.loads((watch.scratch / "judged.json").read_text())}
    module.judged = judged
    return job.export(module, keep, judged, folder, watch.best_metrics)


def fit_locally(
    job: Job,
    scratch: Path,
    streams: str = "beside",
    resume: Path | None = None,
    report: Report | None = None,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> tuple[Outcome, TrainedModule, Watch]:
    """The same Lightning loop in this process without Ray: what benchmarks compare with.

    Raises:
        NonFinite: the loss is no number any more.
    """
    config = job.config
    torch.set_num_threads(threads_of(config))
    order = order_of(config, job.train_source())
    total_steps = total_steps_of(config, order)
    watch = Watch(config, order.steps, scratch, job.deadline, report, None, say)
    module = train_steps(job, watch, local_strategy(), [], 0, 1, resume, streams)
    return outcome_of(config, watch, total_steps), module, watch
