"""From a command line to a trained checkpoint: what must hold before workers start, the run, and its publication.

In: a ``TrainCommand`` and the job that a task makes of it. Out: a checkpoint folder at ``--output`` (a folder or
``s3://``), an MLflow run, and an exit status. Everything that can be known to fail fails here, before a worker is
started: the model, the data set version, the labels, the place for checkpoints and its free space, MLflow.

A run is named by ``--storage`` and ``--name``: started again after whatever killed it, it goes on. While it lives, a
second start of it is refused where storage is a local path; S3 has no locks, and nothing refuses it there.

Knows no task.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import to_jsonable_python

from data.errors import DataError, as_data_error
from data.locations import Location
from data.session import RaySettings, ray_session
from data.versions import DataVersion, open_version
from deployments.checkpoints import Checkpoint, CheckpointError, mlflow_uri, pinned, resolve
from train.features import OutOfTime
from train.giving_way import Resource, wait_for_room
from train.loop import Job, LoopConfig, Outcome, quieten, share_of_batch, work
from train.module import TrainingError
from train.registry import meant
from train.tracking import DatasetInput, Run, TrackingConfig, TrackingError, describe, refused, start

logger = logging.getLogger(__name__)

#: Settings that may differ when a run is started again.
_FREE = {
    *("output", "time_limit", "num_workers", "min_workers", "gpus_per_worker", "cpus_per_worker", "threads", "loaders"),
    *("loader_cpus", "checkpoint_every", "keep", "max_failures", "record", "tracking", "num_cpus", "storage", "cache"),
    *("object_store_bytes", "patience", "give_way_s"),
}
#: What the names of a checkpoint's files end with: nothing else is replaced.
_CHECKPOINT = (".json", ".safetensors", ".txt", ".model", ".jinja", ".onnx")
#: Reason of an outcome that an earlier start of the run came to.
_BEFORE = "finished before"
_DURATION = re.compile(r"^(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?:in)?)?(?:(\d+(?:\.\d+)?)s?)?$")


class TrainCommand(LoopConfig, RaySettings):
    """Settings of every trainer."""

    model_config = ConfigDict(extra="forbid")

    data: str = Field(description="prepared data set NAME/VERSION, or NAME for its newest version; a path or s3://")
    model: str = Field(description="checkpoint that training starts from: folder, s3://, models:/, starter:, hub id")
    output: str = Field(
        description="where the trained checkpoint goes: a folder or s3://bucket/prefix; a checkpoint that is there is "
        "replaced, anything else is refused"
    )
    name: str = Field(description="name of the run; the same name in the same storage goes on with it")
    storage: str = Field(
        "~/.cache/deeptrust/runs",
        description="where runs keep their checkpoints; on a cluster, seen by all nodes. On s3:// nothing keeps a run "
        "from being started twice at once",
    )
    time_limit: str = Field(
        "", description="end with a checkpoint after this time, e.g. 5h30m; the same command goes on"
    )
    record: bool = Field(True, description="record the run in MLflow")
    tracking: TrackingConfig = Field(TrackingConfig())

    @field_validator("time_limit")
    @classmethod
    def _duration(cls, value: str) -> str:
        if value and not (_DURATION.match(value) and re.search(r"\d", value)):
            raise ValueError(f"{value!r} is no duration: write 5h30m, 45m or 90s")
        return value

    def files(self) -> dict[str, str]:
        """Files that a run reads beside its data and model, by the setting that names them. One that goes on reads
        what it was started with: another content under the same name is refused."""
        return {}

    @property
    def limit_s(self) -> float:
        """The time limit in seconds, or infinity."""
        found = _DURATION.match(self.time_limit)
        if not self.time_limit or found is None:
            return math.inf
        days, hours, minutes, seconds = (float(part or 0) for part in found.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


Command = TypeVar("Command", bound=TrainCommand)


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
        started = _started(config, folder)
        if folder.is_local and not callbacks:
            _remove_torn(folder)
        finished = _finished(folder)
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
            if kept and (changed := _changed_file(config, kept)):
                raise _gone(config, "what it read", changed)
            _keep_settings(config, folder, started, inputs_as_kept(version, checkpoint) | _files_as_kept(config))
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
            finished = _finished(folder) if outcome.status == "finished" else None
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
    # Ray's defaults are for large machines: a worker that imports torch on two busy cores takes longer than a minute
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
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


def reported(folder: Location) -> list[str]:
    """Names of a run's whole checkpoints, the newest last. Ray copies a checkpoint file by file and then writes its
    list of them: a folder that the list does not name was being copied when its driver was killed.

    Raises:
        TrainingError: the list is damaged.
    """
    snapshot = folder / "checkpoint_manager_snapshot.json"
    if not snapshot.exists():
        return []
    try:
        names = [result["checkpoint_dir_name"] for result in json.loads(snapshot.read_text())["checkpoint_results"]]
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{snapshot} is damaged, so nobody knows which checkpoints are whole: give another --name, or remove "
            f"{folder}"
        ) from error
    there = set(folder.folders())
    return [name for name in sorted(names) if name in there]


def _remove_torn(folder: Location) -> None:
    """Remove what was being copied, or was about to be deleted, when a run's driver was killed: Ray goes by its list
    alone, and neither resumes from the rest nor deletes it. The run must be held."""
    whole = set(reported(folder))
    for name in folder.folders():
        if name.startswith("checkpoint_") and name not in whole:
            shutil.rmtree((folder / name).local_path, ignore_errors=True)


def _finished(folder: Location) -> tuple[Outcome, Location] | None:
    """How a run ended and its checkpoint folder, if it came to its end."""
    for name in reversed(reported(folder)):
        export = folder / name / "export"
        if (export / "card.json").exists():
            progress = json.loads((folder / name / "progress.json").read_text())
            return Outcome(**progress["outcome"]), export
    return None


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


def publish(folder: Path, target: Location) -> None:
    """Put a finished checkpoint folder in its place, in the stead of an older one; on S3 nothing of that stays, and the
    card comes last.

    Raises:
        TrainingError: what is there is no checkpoint.
    """
    there = check_output(target)
    if target.is_local:
        target.parent.make_dir()
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.local_path.parent))
        for file in folder.iterdir():
            shutil.copyfile(file, partial / file.name)
        partial.chmod(0o755)
        target.remove()
        partial.rename(target.local_path)
        return
    files = {file.name: file for file in folder.iterdir()}
    # without its card it is no finished checkpoint, by its configuration it is one that may be replaced
    (target / "card.json").remove()
    for name in there - set(files):
        (target / name).remove()
    for name in sorted(files, key=lambda name: (name == "card.json", name != "config.json")):
        target.filesystem.put_file(str(files[name]), (target / name).path)


def is_published(export: Location, target: Location) -> bool:
    """Whether a run's checkpoint is in its place already: the weights, and a card of the same moment. What was added
    there since (a reference for drift) is no other checkpoint."""
    there = {entry.name: entry.size for entry in target.files()} if target.exists() else {}
    weights = [entry for entry in export.files() if entry.name.endswith(".safetensors")]
    if "card.json" not in there or any(there.get(entry.name) != entry.size for entry in weights):
        return False
    made = [json.loads((folder / "card.json").read_text()).get("created_at") for folder in (export, target)]
    names = [entry.name for entry in weights]
    return made[0] == made[1] and all(_digest(export / name) == _digest(target / name) for name in names)


def _digest(file: Location) -> str:
    digest = hashlib.sha256()
    with file.open() as opened:
        while block := opened.read(2**22):
            digest.update(block)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------- before workers


def check_output(target: Location) -> set[str]:
    """Refuse a place in whose stead no checkpoint may be put: what is there is lost. Returns the names of its files.

    Raises:
        TrainingError: it is a link or a file, or holds something else than one checkpoint that was published there.
    """
    if target.is_local:
        path = target.local_path
        if path.is_symlink():
            raise TrainingError(f"--output {path} is a link to {path.readlink()}: name that folder, or another")
        if path.exists() and (not path.is_dir() or path.is_mount()):
            what = "the root of a file system" if path.is_dir() else "a file"
            raise TrainingError(f"--output {path} is {what}: name a folder, in one that exists or is made")
    there = target.entries()
    needed = {"config.json", "card.json"} if target.is_local else {"config.json"}  # a killed publication has no card
    strange = sorted(name for name, plain in there.items() if not plain or not name.endswith(_CHECKPOINT))
    if strange or (there and not needed <= set(there)):
        what = f"it holds {', '.join(strange[:5])}" if strange else f"it has no {' and '.join(needed - set(there))}"
        raise TrainingError(
            f"--output {target} would be replaced and is no checkpoint of a training ({what}): name a folder of its "
            f"own, as {target / 'NAME'}, or empty this one"
        )
    return set(there)


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


def changed_settings(kind: type[BaseModel], before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the settings (as JSON) by which a run would go on otherwise than it was started.

    A setting that came with a later release has its default in the runs from before it, which is what they did.
    """
    defaults = {
        name: to_jsonable_python(field.get_default(call_default_factory=True, validated_data={}))
        for name, field in kind.model_fields.items()
        if name not in before and not field.is_required()
    }
    return [name for name in now if {**defaults, **before}.get(name) != now[name]]


def _settings(config: TrainCommand) -> dict[str, Any]:
    settings = config.model_dump(mode="json", exclude=_FREE | {"lanes"}) | {"lanes": config.all_lanes}
    return settings | {"data": str(Location.of(config.data)) if "://" not in config.data else config.data}


def _started(config: TrainCommand, folder: Location) -> dict[str, Any]:
    """What a run that goes on was started with; nothing for one that begins: before its first checkpoint nothing
    depends on it.

    Raises:
        TrainingError: it was started with other settings.
    """
    file = folder / "settings.json"
    if not file.exists() or not reported(folder):
        return {}
    before, settings = json.loads(file.read_text()), _settings(config)
    if changed := changed_settings(type(config), before, settings):
        told = ", ".join(f"{name} {before.get(name)!r} -> {settings[name]!r}" for name in changed[:5])
        raise TrainingError(
            f"run {config.name!r} in {config.storage} was started with other settings ({told}): give another --name, "
            f"or remove {folder}"
        )
    return dict(before)


def data_of(config: TrainCommand, started: Mapping[str, str] | None) -> DataVersion:
    """The data version that the settings name now (of a data set its newest), or, where a run goes on, the one that
    they named when it was started.

    Args:
        started: ``inputs_as_kept`` of that start.

    Raises:
        TrainingError: the version that the run was started with is gone.
        DataError: what the settings name is not there.
    """
    if not started:
        return open_version(config.data)
    try:
        version = open_version(started["data"])
    except DataError as error:
        raise _gone(config, started["data"], str(error)) from error
    if version.manifest.version != started["version"]:
        raise _gone(config, f"data version {started['version']}", f"in {started['data']} is {version.manifest.version}")
    return version


def base_of(
    config: Command,
    base: Callable[[Command, DataVersion], str],
    version: DataVersion,
    started: Mapping[str, str] | None,
) -> Checkpoint:
    """The checkpoint that training starts from: of an alias the model that has it now, or had it when the run was
    started.

    Raises:
        TrainingError: what the run was started with is gone or has changed.
        CheckpointError: what the settings name is not there.
    """
    if not started:
        return resolve(absolute(pinned(base(config, version))))
    alias = started["model"].startswith("models:/")
    try:
        # what is no alias may have to be made again: an untrained model
        checkpoint = resolve(started["model"] if alias else absolute(base(config, version)))
    except CheckpointError as error:
        raise _gone(config, started["model"], str(error)) from error
    if checkpoint.revision != started["revision"]:
        raise _gone(config, f"{started['model']}#{started['revision']}", f"now it is #{checkpoint.revision}")
    print(f"{config.name} goes on as it was started: data {version.location}, model {checkpoint.name}", flush=True)
    return checkpoint


def as_finished(config: Command, base: Callable[[Command, DataVersion], str], started: Mapping[str, str] | None) -> str:
    """A finished run or sweep for people: its name and what it was made of.

    Args:
        started: ``inputs_as_kept`` of its start.

    Raises:
        TrainingError: the settings name another data version or model now, and what is finished is not of these.
    """
    if not started:
        return f"{config.name!r} is finished"
    model = f"{started['model']}#{started['revision']}"
    told = f"{config.name!r} is finished (data {started['version']}, model {model})"
    now = ""
    with suppress(DataError, CheckpointError):  # what is gone is not named anew
        version = open_version(config.data)
        if version.manifest.version != started["version"]:
            now = f"data {version.manifest.version}"
        # a starter model comes with the code; `make starter` changes it by what was trained from it
        elif not (named := base(config, version)).startswith("starter:") or named != started["model"]:
            checkpoint = resolve(absolute(pinned(named)))
            now = f"model {checkpoint.name}" if checkpoint.revision != started["revision"] else ""
    if now := now or _changed_file(config, started):
        raise TrainingError(
            f"{told}, and the settings name {now} now: nothing was trained; give another --name to train anew"
        )
    return told


def _files_as_kept(config: TrainCommand) -> dict[str, str]:
    """Digests of ``TrainCommand.files``, for ``_changed_file`` of a later start."""
    return {name: _digest(Location.of(place)) for name, place in config.files().items()}


def _changed_file(config: TrainCommand, started: Mapping[str, str]) -> str:
    """The setting of a file whose content is not what it was when the run was started; nothing of one that is gone."""
    for name, place in config.files().items():
        file = Location.of(place)
        if name in started and file.is_file() and _digest(file) != started[name]:
            return f"another content of --{name} {place}"
    return ""


def _gone(config: TrainCommand, what: str, reason: str) -> TrainingError:
    return TrainingError(
        f"{config.name!r} was started with {what}, which is gone ({reason}): put it back, or give another --name"
    )


def data_before(checkpoint: Checkpoint, new_head: bool = False) -> list[dict[str, str]]:
    """Names and versions of the data that a checkpoint's weights have seen, for the card of what is trained from it: by
    its own card the last that it was trained on, and those before.

    Under a new head the tower stays, and with it what it has seen; a starter model's tower was taught nothing.
    """
    if new_head and checkpoint.uri.startswith("starter:"):
        return []
    dataset = checkpoint.card.dataset
    seen = [dataset, *dataset.get("before", [])]
    named = [{name: str(each.get(name)) for name in ("name", "version")} for each in seen if each.get("version")]
    return [each for place, each in enumerate(named) if each not in named[:place]]


def absolute(uri: str) -> str:
    """A checkpoint URI that means the same in another working directory."""
    return str(Path(uri).expanduser().absolute()) if Path(uri).expanduser().is_dir() else uri


def inputs_as_kept(version: DataVersion, checkpoint: Checkpoint) -> dict[str, str]:
    """What was trained on and from, for ``data_of`` and ``base_of`` of a later start."""
    return {
        "data": str(version.location),
        "version": version.manifest.version,
        "model": checkpoint.uri,
        "revision": checkpoint.revision,
    }


def _keep_settings(
    config: TrainCommand, folder: Location, started: Mapping[str, Any], inputs: Mapping[str, str]
) -> None:
    """For the next start; a run from before inputs were kept is bound to today's."""
    if "inputs" not in started:
        kept = {**(started or _settings(config)), "inputs": inputs}
        (folder / "settings.json").write_text(json.dumps(kept, indent=1) + "\n")


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
