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

import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from deployments.processor import step_back
from train.beside import batches_beside
from train.gauges import Gauges
from train.giving_way import GiveWay
from train.job import Job, LoopConfig, Outcome, order_of, share_of_batch, threads_of, total_steps_of
from train.module import NonFinite, TrainedModule
from train.order import Order
from train.scratch import scratch_of
from train.strategies import local_strategy, ray_strategy
from train.stream import PassOnce, Shard, local_batches, ray_batches
from train.tracking import attach
from train.watch import ENDS, Report, Watch, load_weights


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
        "stopped" if watch.stopped in ENDS[1:] else "finished",
        watch.step,
        total_steps,
        watch.best_metrics,
        watch.losses,
        config.batch_size * done / (watch.ended - watch.began) if done else 0.0,
        watch.stopped,
    )


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
