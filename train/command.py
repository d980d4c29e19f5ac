"""From a command line to a trained checkpoint: what must hold before workers start, the run, and its end.

In: a ``TrainCommand`` and the job that a task makes of it. Out: a checkpoint folder at ``--output`` (a folder or
``s3://``), an MLflow run, and an exit status. Everything that can be known to fail fails here, before a worker is
started: the model, the data set version, the labels, the place for checkpoints and its free space, MLflow.

A run is named by ``--storage`` and ``--name``: started again after whatever killed it, it goes on. While it lives, a
second start of it is refused where storage is a local path; S3 has no locks, and nothing refuses it there.

Knows no task.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from data.errors import DataError, as_data_error
from data.locations import Location
from data.session import RaySettings, ray_session
from data.versions import DataVersion
from deployments.checkpoints import Checkpoint, CheckpointError, mlflow_uri
from train.features import OutOfTime
from train.giving_way import Resource, wait_for_room
from train.job import Job, Outcome, share_of_batch
from train.loop import quieten, work
from train.module import TrainingError
from train.publication import check_output, is_published, publish
from train.registry import meant
from train.run_folder import (
    as_finished,
    base_of,
    check_files,
    data_of,
    finished_in,
    keep,
    remove_torn,
    started_with,
)
from train.settings import Command, TrainCommand
from train.tracking import DatasetInput, Run, TrackingError, describe, refused, start

#: Reason of an outcome that an earlier start of the run came to.
_BEFORE = "finished before"


def launch(
    config: TrainCommand,
    experiment: str,
    base: Callable[[Any, DataVersion], str],
    prepare: Callable[[Any, DataVersion, Checkpoint], tuple[Any, int]],
    features: Callable[[Any, float], Job] | None = None,
    callbacks: Sequence[Any] = (),
    parent: str | None = None,
) -> Outcome:
    """Run a job to its end and publish what came out. What keeps it from starting is on record as a failed run.

    Args:
        experiment: of MLflow.
        base: from settings and data to the URI of the checkpoint that training starts from.
        prepare: from settings, data and that checkpoint to the job (a dataclass, whose deadline and MLflow run are set
            here) and the model's parameters, for the space that checkpoints need.
        features: from the job, and the seconds after which to give way to serving (0: never), to the job on what is
            computed once (features of a frozen tower); called when Ray is there.
        callbacks: of Ray Train's ``RunConfig``: how a sweep listens.
        parent: MLflow run id of a sweep.

    Raises:
        TrainingError, DataError, CheckpointError, TrackingError: nothing was trained, or what came out is of no use.
    """
    with meant(config.tracking), ExitStack() as held:  # the checkpoint is of the registry that gets the run
        return _launch(config, experiment, base, prepare, features, callbacks, parent, held)


def _launch(
    config: TrainCommand,
    experiment: str,
    base: Callable[[Any, DataVersion], str],
    prepare: Callable[[Any, DataVersion, Checkpoint], tuple[Any, int]],
    features: Callable[[Any, float], Job] | None,
    callbacks: Sequence[Any],
    parent: str | None,
    held: ExitStack,
) -> Outcome:
    began = time.time()
    quieten()
    place = Location.of(config.storage)
    folder = place / config.name
    published = folder / "published"
    job: Any = None
    try:
        folder.ready()
        if not callbacks:  # a sweep has its trials: one that outlives its driver for a moment must not stop the next
            held.enter_context(folder.alone(running(config, folder)))
        output = Location.of(config.output)
        check_output(output)
        output.parent.ready()
        check_workers(config)
        started = started_with(config, folder)
        if folder.is_local and not callbacks:
            remove_torn(folder)
        finished = finished_in(folder)
        kept = started.get("inputs")
        if finished is not None and published.exists():
            told = as_finished(config, base, kept)
            print(f"run {told}: nothing was trained; give another --name to train anew", flush=True)
            if not is_published(finished[1], output):
                _publish(finished[1], output, None)
            return replace(finished[0], reason=_BEFORE)
        version = data_of(config, kept)
        if finished is None:
            checkpoint = base_of(config, base, version, kept)
            job, parameters = prepare(config, version, checkpoint)
            check_space(config, place, parameters)
            check_files(config, kept)
            keep(config, folder, started, version, checkpoint)
    except Exception as error:
        if config.record:
            refused(config.tracking, experiment, config.name, error, _parameters(config), parent)
        raise
    run = _record(config, experiment, version, folder, parent, bool(started)) if config.record else None
    try:
        if finished is None:
            reference = run.reference() if run is not None else None
            ready = replace(job, deadline=began + config.limit_s, run=reference)
            patience_s = config.give_way_s if _gives_way(config, callbacks) else 0.0
            outcome = _fit(config, lambda: features(ready, patience_s) if features else ready, place, callbacks)
            finished = finished_in(folder) if outcome.status == "finished" else None
        else:  # the driver died between the last step and here
            outcome = finished[0]
        if outcome.status == "failed":
            raise TrainingError(outcome.reason)
        if finished is not None:
            _publish(finished[1], output, run)
    except BaseException as error:
        if run is not None:
            run.close(error)
        raise
    if run is not None and outcome.status == "stopped":
        run.close(SystemExit("time limit"))
    elif run is not None:
        with _recording(config.output):
            run.end()
    if finished is not None:
        published.write_text(config.output)
    return outcome


def running(config: TrainCommand, folder: Location) -> TrainingError:
    """Of a second start of a run or sweep while the first lives."""
    return TrainingError(
        f"{config.name!r} in {config.storage} is running: another process has {folder / 'lock'}. Wait until it ends, "
        "or give another --name"
    )


@contextmanager
def _recording(output: object) -> Iterator[None]:
    """What MLflow raises when the checkpoint is there already."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # of any store
        raise TrackingError(
            f"the checkpoint is written to {output}, but MLflow did not take it ({describe(error)}): when it answers, "
            "the same command puts it on record"
        ) from error


def _fit(config: TrainCommand, make_job: Callable[[], Job], place: Location, callbacks: Sequence[Any]) -> Outcome:
    # how long the workers' places are waited for. A fixed number may wait for others to leave; where a smaller one will
    # do, a node that has just died is still counted, and Ray counts anew only after this
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60" if config.min_workers else "600")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it says every line twice
    if _on_a_cluster():
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard's Train page
    with ray_session(RaySettings(num_cpus=config.num_cpus, object_store_bytes=config.object_store_bytes)):
        try:
            job = make_job()
        except OutOfTime:
            return Outcome("stopped", 0, 0, reason="time")
        while True:
            outcome = Outcome(**ray_trainer(config, job, place, callbacks).fit().return_value)
            if outcome.reason != "way":
                return outcome
            resource, amount = _held(config, job)
            found = wait_for_room(resource, amount, job.deadline)
            if found == "time":
                return replace(outcome, reason="time")
            if found == "no help":
                print("serving did not take the room: this run goes on, and keeps what it has from now on", flush=True)
                config = config.model_copy(update={"give_way_s": 0.0})


def _publish(export: Location, target: Location, run: Run | None) -> None:
    """A finished run's checkpoint folder to its place, and into MLflow."""
    with tempfile.TemporaryDirectory(prefix="export-") as name:
        local = Path(name) / "checkpoint"
        local.mkdir()
        for file in export.files():
            (local / file.name).write_bytes((export / file.name).read_bytes())
        publish(local, target)
        if run is not None:
            with _recording(target):
                run.tags({"checkpoint": run.checkpoint(local)})


def ray_trainer(config: TrainCommand, job: Job, place: Location, callbacks: Sequence[Any] = ()) -> Any:
    """Ray's trainer for a job; Ray must be there."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            found = super()._create_default_callbacks()
            if callbacks or _on_a_cluster():  # a sweep listens: it also stops trials, and its own Ray has a dashboard
                return found
            # it asks the dashboard, which an own Ray does not have, and an own Ray dies with this process anyway
            return [one for one in found if not isinstance(one, PlacementGroupCleanerCallback)]

    most = config.num_workers
    reserved = reservation(config, ray.cluster_resources(), _loading(config, job))
    sought = _sought(reserved)
    storage: dict[str, Any] = {"storage_path": place.path}
    if not place.is_local:
        storage["storage_filesystem"] = place.arrow_filesystem
    return Trainer(
        _work,
        train_loop_config={
            "job": job,
            "holds": sought if _gives_way(config, callbacks) else None,
            "registry": mlflow_uri(),
        },
        # before a step has brought the model to its GPU, workers exchange numbers of the CPU
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if sought == "GPU" else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(config.min_workers, most) if config.min_workers else most,
            use_gpu=sought == "GPU",
            resources_per_worker=reserved,
        ),
        run_config=RunConfig(
            name=config.name,
            checkpoint_config=CheckpointConfig(num_to_keep=config.keep),
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=list(callbacks),
            **storage,
        ),
    )


def _work(settings: dict[str, Any]) -> dict[str, Any]:
    """``work`` in a process whose environment may name another registry than the driver's."""
    os.environ["MLFLOW_TRACKING_URI"] = settings["registry"]
    return work(settings)


def _loading(config: TrainCommand, job: Job) -> float:
    return 0.0 if job.in_process() else config.loader_cpus


def _sought(reserved: Mapping[str, float]) -> Resource:
    """What replicas of Serve may want of what a worker has reserved."""
    return "GPU" if reserved.get("GPU") else "CPU"


def _held(config: TrainCommand, job: Job) -> tuple[Resource, float]:
    """What a run holds that a replica of Serve may want, all workers together."""
    import ray

    reserved = reservation(config, ray.cluster_resources(), _loading(config, job))
    sought = _sought(reserved)
    held = (config.min_workers or config.num_workers) * reserved[sought]
    return sought, held + (_loading(config, job) if sought == "CPU" else 0.0)


def reservation(config: TrainCommand, resources: Mapping[str, float], loading: float) -> dict[str, float]:
    """What Ray reserves for each worker. Those that must be there to begin are ``min_workers``, if that is given: the
    others join when their nodes do.

    Args:
        resources: of the whole cluster, as it is now.
        loading: CPUs of a loader.

    Raises:
        TrainingError: so many do not fit, or there are GPUs and too few of them: that is no reason to train on CPUs.
            Or workers would share one, which NCCL refuses.
    """
    least, gpus = config.min_workers or config.num_workers, config.gpus_per_worker
    here = resources.get("GPU", 0)
    if 0 < gpus < 1 and config.num_workers > 1:
        raise TrainingError(
            f"--gpus-per-worker {gpus:g} would let two of {config.num_workers} workers share a GPU, and NCCL cannot: "
            "give each a whole one, or --num-workers 1 a fraction"
        )
    if gpus < 0:
        gpus = 1.0 if here else 0.0
        if 0 < here < least:
            raise TrainingError(
                f"{least} workers want a GPU each and this Ray has {here:g}: lower --num-workers, or let --min-workers "
                "begin with fewer; --gpus-per-worker 0 trains on CPUs"
            )
    if least * config.cpus_per_worker + loading > resources.get("CPU", 0):
        raise TrainingError(
            f"{least} workers of {config.cpus_per_worker} CPUs and a loader of {loading} do not fit into the "
            f"{resources.get('CPU', 0):g} CPUs of this Ray: lower "
            f"{'--min-workers' if config.min_workers else '--num-workers'} or --cpus-per-worker (a reservation; "
            "--threads says how many are used)"
        )
    return {"CPU": config.cpus_per_worker, **({"GPU": gpus} if gpus else {})}


def _on_a_cluster() -> bool:
    return os.environ.get("RAY_ADDRESS", "local") != "local"


def _gives_way(config: TrainCommand, callbacks: Sequence[Any]) -> bool:
    """An own Ray has nobody to give way to, and but for a sweep's no dashboard to ask."""
    return config.give_way_s > 0 and (bool(callbacks) or _on_a_cluster())


# --------------------------------------------------------------------------------------------------- before workers


def check_workers(config: TrainCommand) -> None:
    """Batch, lanes and every possible number of workers must divide."""
    lanes = config.all_lanes
    if config.batch_size % lanes:
        raise TrainingError(f"--batch-size {config.batch_size} does not divide into {lanes} lanes: choose a multiple")
    if lanes % config.num_workers:
        raise TrainingError(f"--lanes {lanes} is no multiple of --num-workers {config.num_workers}")
    if config.min_workers > config.num_workers:
        raise TrainingError("--min-workers is more than --num-workers")
    for world in range(config.min_workers or config.num_workers, config.num_workers + 1):
        if lanes % world:
            raise TrainingError(
                f"--lanes {lanes} is no multiple of {world}, a possible number of workers: try "
                f"{math.lcm(*range(config.min_workers or 1, config.num_workers + 1))}"
            )
        share_of_batch(config, world)
    if config.ema and config.strategy == "fsdp":
        raise TrainingError("--ema works with --strategy ddp only: averages of parts are not gathered")
    if config.strategy == "fsdp" and config.precision == "16-mixed":
        raise TrainingError("--strategy fsdp scales no losses, as 16-mixed has to: use --precision bf16-mixed")
    if config.ema and config.precision == "bf16-true":
        raise TrainingError("--ema moves weights by less than bf16 can tell apart: use --precision bf16-mixed")


def check_space(config: TrainCommand, place: Location, parameters: int, runs: int = 1, at_once: int = 1) -> None:
    """Checkpoints hold weights, two moments and, if there is one, the moving average in float32, and the best weights.
    In storage one is being written while others are kept; in the temporary folder lie the best weights once more, one
    on its way and one being written, whatever the number of workers. The one that was resumed from is read where it
    lies; from S3 each machine fetches it once, and it is gone before another is written. A sweep's ``runs`` all keep
    theirs, and ``at_once`` write them."""
    each, temporary = (20 if config.ema else 16) * parameters, Path(tempfile.gettempdir())
    places = [("the temporary folder (TMPDIR)", temporary, 3 * each * at_once + 2**28)]
    if place.is_local:
        places.insert(0, ("--storage", place.local_path, each * (config.keep * runs + at_once) + 2**28))
    output = Location.of(config.output)
    if output.is_local:  # the new one lies beside the old one for a moment
        places.append(("the folder of --output", output.parent.local_path, 4 * parameters + 2**26))
    for what, path, needed in places:
        path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path).free
        if free < needed:
            raise TrainingError(
                f"{what} {path} has {free / 2**30:.1f} GiB free and the run's checkpoints need "
                f"{needed / 2**30:.1f}: free some space, lower --keep, or choose another place"
            )


def _parameters(config: TrainCommand) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"tracking", "record"})


def _record(
    config: TrainCommand, experiment: str, version: DataVersion, folder: Location, parent: str | None, going_on: bool
) -> Run:
    manifest = version.manifest
    dataset = DatasetInput(
        name=manifest.name,
        version=manifest.version,
        source=str(version.location),
        profile={"counts": manifest.counts, "class_balance": manifest.class_balance},
    )
    options: dict[str, Any] = {"key": str(folder), "going_on": going_on, "datasets": [dataset]}
    return start(config.tracking, experiment, config.name, parent=parent, parameters=_parameters(config), **options)


def end(error: BaseException) -> NoReturn:
    """End the program: a message of one line for what a person can put right, the exception itself otherwise."""
    known = (TrainingError, DataError, CheckpointError, TrackingError)
    found: BaseException | None = next((cause for cause in _causes(error) if isinstance(cause, known)), None)
    found = found or as_data_error(error)
    if found is None:
        raise error
    print(f"error: {found if isinstance(found, known) else describe(found)}", file=sys.stderr, flush=True)
    raise SystemExit(1) from error


def run_command(settings: type[Command], train: Callable[[Command], Outcome], arguments: list[str] | None) -> None:
    """A trainer's command line: settings, training, and the last line or the error for people."""
    from pydantic_settings import CliApp

    config = CliApp.run(settings, cli_args=arguments)
    try:
        tell(train(config), config.output)
    except Exception as error:
        end(error)


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is None or current in found:
            continue
        found.append(current)
        waiting += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        waiting += list(getattr(current, "worker_failures", {}).values())
    return found


def tell(outcome: Outcome, output: str) -> None:
    """The last line for people."""
    if outcome.status == "stopped" and not outcome.total_steps:
        print("time limit: stopped while features were computed; the same command goes on")
        return
    if outcome.status == "stopped":
        print(
            f"time limit: stopped with a checkpoint after step {outcome.steps} of {outcome.total_steps}; "
            f"the same command goes on"
        )
        return
    figures = ", ".join(f"{name} {value:.4f}" for name, value in outcome.metrics.items())
    if outcome.reason == _BEFORE:
        print(f"{output} has what it came to: {figures}")
        return
    print(f"trained in {outcome.steps} steps: {figures}\nwritten to {output}")
