"""Annotates whole archives: pictures in, records equal to ``POST /v1/analyze``'s answers out, as parquet.

    python -m data.annotate --input FOLDER --output FOLDER
    ray job submit --working-dir . -- python -m data.annotate --input s3://bucket/photos --output s3://bucket/annotated

In: a folder (searched for pictures with all its subfolders), an ``s3://`` prefix, or parquet with `image` bytes or a
`path` (a split of a prepared version, for instance). Out: ``OUTPUT/records/*.parquet`` (``data.annotations``), and
``OUTPUT/manifest.json`` when all is done.

One Ray Data stream: read and decode -> detector -> captioner -> tagger -> publish, each stage with as many actors as it
is given. What flows is a shard, and each is published as one file at once; run the same command again after whatever
ended it, and it goes on with the shards that are missing. Memory is bounded by the number of shards under way.

Knows no HTTP. How a shard is done is in ``data.annotate_stages``, what belongs to one in ``data.annotate_plan``.
"""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, field_validator

from data.annotate_plan import (
    MANIFEST,
    PICTURE_SUFFIXES,
    Kind,
    Plan,
    finished_shards,
    list_input,
    open_plan,
    remove_partial_files,
    shard_name,
    unfinished,
)
from data.annotate_stages import CaptionerStage, DetectorStage, ModelName, Publisher, Reader, TaggerStage
from data.annotations import FOLDER, read_shard
from data.errors import DataError, end
from data.locations import Location
from data.session import RaySettings, gpus_hidden, ray_session
from deployments.annotation import Task
from deployments.checkpoints import Checkpoint, CheckpointError, resolve
from deployments.images import ImageLimits
from deployments.tagger import TaggerSettings, engine_arguments, load_prompt
from deployments.views import ViewSpec

#: Shards that one Ray Data stream takes: what its driver has to remember is bounded by it.
_SHARDS_A_STREAM = 4096
#: What a picture actor asks of the cluster for each of its threads: detector and captioner share the cores, the
#: operating system gives them to whichever has work, and something must be left for tagger and readers.
_SHARE_A_THREAD = 0.35
#: The rate is that of the last shards, and of not more than the last minutes.
_RATE_SHARDS, _RATE_WINDOW_S = 1000, 300.0
#: Shards that are read at a time at the end, to check and count them.
_READ_BACK = 16


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PictureStage(_Strict):
    """Detector or captioner."""

    uri: str = Field(description="checkpoint, see deployments.checkpoints")
    batch_size: int = Field(8, ge=1, le=1024)
    actors: int = Field(
        0, ge=0, description="0: enough for every CPU of the cluster; with `num_gpus`, one for each GPU"
    )
    threads: int = Field(0, ge=0, description="of an actor on a CPU; 0: one, more on machines with more than 8 cores")
    num_gpus: float = Field(0, ge=0, description="GPU, or fraction of one, of each actor")


class TagStage(_Strict):
    """The tagger."""

    uri: str = "starter:tagger"
    actors: int = Field(0, ge=0, description="0: one; on GPUs, one for each (or each `tensor_parallel` of them)")
    engine: TaggerSettings = Field(TaggerSettings(), description="vLLM's settings, those of serving")


class AnnotateSettings(_Strict):
    """Settings of a bulk annotation."""

    input: str = Field(description="folder of pictures, s3://bucket/prefix, or parquet (a file or a folder of them)")
    output: str = Field(description="folder or s3://bucket/prefix, empty or of an earlier start of the same")
    kind: Kind | None = Field(None, description="what to read of the input; what it holds, if not given")
    suffixes: tuple[str, ...] = Field(PICTURE_SUFFIXES, description="names of pictures end so")
    tasks: tuple[Task, ...] = Field(("detect", "caption", "tag"), description="`tag` needs `caption`")
    shard_pictures: int | None = Field(
        None, ge=1, le=4096, description="pictures that are done as a whole or not at all; if not given, 8 to 64"
    )
    detector: PictureStage = Field(PictureStage(uri="starter:detector"))
    captioner: PictureStage = Field(PictureStage(uri="starter:captioner"))
    tagger: TagStage = Field(TagStage())
    readers: int = Field(0, ge=0, description="shards that are read and decoded at a time; 0: half the CPUs")
    limits: ImageLimits = Field(ImageLimits())
    ray: RaySettings = Field(RaySettings(), description="a Ray of its own, where no cluster is given")
    progress_s: float = Field(10.0, ge=0, description="time between two lines of progress")

    @field_validator("tasks")
    @classmethod
    def _in_order(cls, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
        if not tasks or ("tag" in tasks and "caption" not in tasks):
            raise ValueError("tasks are some of detect, caption and tag, and `tag` needs `caption`")
        order: tuple[Task, ...] = ("detect", "caption", "tag")
        return tuple(task for task in order if task in tasks)


class _Models:
    """The checkpoints of a run, resolved once, as the plan pins them."""

    def __init__(self, settings: AnnotateSettings) -> None:
        wanted = {
            "detector": ("detect", settings.detector.uri),
            "captioner": ("caption", settings.captioner.uri),
            "tagger": ("tag", settings.tagger.uri),
        }
        try:
            self.checkpoints: dict[str, Checkpoint] = {
                stage: resolve(uri) for stage, (task, uri) in wanted.items() if task in settings.tasks
            }
            self.views = {
                stage: ViewSpec.from_processor(checkpoint.folder)
                for stage, checkpoint in self.checkpoints.items()
                if stage != "tagger"
            }
        except (CheckpointError, FileNotFoundError, ValueError) as error:
            raise DataError(f"a model cannot be used: {error}") from error

    def name(self, stage: str) -> ModelName:
        checkpoint = self.checkpoints[stage]
        return ModelName(checkpoint.uri, checkpoint.revision)

    def pinned(self) -> dict[str, str]:
        return {stage: checkpoint.name for stage, checkpoint in self.checkpoints.items()}


def fixed_settings(settings: AnnotateSettings, models: _Models) -> dict[str, Any]:
    """What the records depend on: it must not change between two starts."""
    fixed: dict[str, Any] = {
        "tasks": list(settings.tasks),
        "models": models.pinned(),
        "suffixes": list(settings.suffixes),
        "limits": settings.limits.model_dump(),
    }
    if "detect" in settings.tasks:
        fixed["detector_batch"] = settings.detector.batch_size
    if "caption" in settings.tasks:
        fixed["captioner_batch"] = settings.captioner.batch_size
    if "tag" in settings.tasks:
        arguments = engine_arguments(settings.tagger.engine)
        fixed["prompt"] = load_prompt().version
        fixed["tagger_engine"] = {name: arguments[name] for name in ("max_model_len", "max_num_seqs", "dtype")}
        fixed["tagger_max_tokens"] = settings.tagger.engine.max_tokens
    return fixed


class _Progress:
    """Lines with what is done, the rate of the last minutes and the time left."""

    def __init__(self, pictures: int, done: int, every_s: float) -> None:
        self._pictures, self._done, self._every_s = pictures, done, every_s
        self._printed = time.monotonic()
        # when how much was done; the first entry is from before the models were loaded
        self._seen = deque([(self._printed, done)])
        self._loading = True

    def add(self, pictures: int) -> None:
        self._done += pictures
        now = time.monotonic()
        self._seen.append((now, self._done))
        if self._loading and len(self._seen) > 2:
            self._loading = False
            self._seen.popleft()
        while len(self._seen) > 2 and (len(self._seen) > _RATE_SHARDS or now - self._seen[0][0] > _RATE_WINDOW_S):
            self._seen.popleft()
        if now - self._printed >= self._every_s or self._done == self._pictures:
            self._printed = now
            print(self.line(), flush=True)

    def line(self) -> str:
        (since, before), (now, done) = self._seen[0], self._seen[-1]
        rate = (done - before) / max(now - since, 1e-9)
        left = f"{_duration((self._pictures - done) / rate)} left" if rate else "time left unknown"
        return f"annotated {done:,} of {self._pictures:,} pictures ({done / self._pictures:.1%}), {rate:.2f}/s, {left}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def annotate(settings: AnnotateSettings) -> dict[str, Any]:
    """Do what is left of an annotation; returns its manifest.

    Raises:
        DataError: input, output, models or settings are at fault.
    """
    place, output = Location.of(settings.input), Location.of(settings.output)
    if f"{output}/".startswith(f"{place}/"):
        raise DataError(f"{output} lies inside of the input {place}: choose an --output outside")
    listing = list_input(place, settings.kind, settings.suffixes)
    models = _Models(settings)
    plan = open_plan(output, place, listing, settings.shard_pictures, fixed_settings(settings, models))
    others = f"; {listing.others} other files are left out" if listing.others else ""
    print(f"{plan.pictures:,} pictures of {place} in {plan.shards:,} shards{others}", flush=True)
    del listing
    remove_partial_files(output)
    done = finished_shards(output)
    if len(done) < plan.shards:
        with ray_session(settings.ray) as cpus:
            _run(settings, plan, place, output, models, done, cpus)
        done = finished_shards(output)
        if len(done) != plan.shards:
            raise DataError(f"{plan.shards - len(done)} shards were not written to {output}: run the same again")
    return _finish(plan, output)


def _run(
    settings: AnnotateSettings,
    plan: Plan,
    place: Location,
    output: Location,
    models: _Models,
    done: set[int],
    cpus: int,
) -> None:
    progress: _Progress | None = None
    for shards in unfinished(output, done, _SHARDS_A_STREAM):
        if progress is None:
            before = plan.pictures - sum(
                sum(table.column("pictures").to_pylist()) for table in unfinished(output, done, _SHARDS_A_STREAM)
            )
            progress = _Progress(plan.pictures, before, settings.progress_s)
            already = f"{before:,} pictures are done already; " if before else ""
            print(f"{already}loading the models, first results in a minute or two", flush=True)
        stream = pipeline(settings, plan, place, output, models, shards, cpus)
        for batch in stream.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            progress.add(sum(batch.column("pictures").to_pylist()))


def pipeline(
    settings: AnnotateSettings,
    plan: Plan,
    place: Location,
    output: Location,
    models: _Models,
    shards: pa.Table,
    cpus: int,
) -> Any:
    """The stream of ``shards``: a lazy ``ray.data.Dataset`` with one row for each published shard."""
    import ray
    from ray.data import ActorPoolStrategy, ExecutionResources, TaskPoolStrategy

    gpus = int(ray.cluster_resources().get("GPU", 0))
    readers = settings.readers or max(2, cpus // 2)
    whole: dict[str, Any] = {"batch_size": None, "batch_format": "numpy"}
    # a shard is one block from end to end: no stage may cut or join
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = None
    context.issue_detectors_config.detectors = []  # they take a loaded model for a leak
    with ray.data.DataContext.current(context):
        stream = ray.data.from_blocks([shards.slice(row, 1) for row in range(shards.num_rows)])
        stream = stream.map_batches(
            Reader(place, plan.kind, settings.limits, models.views).__call__,
            batch_size=None,
            batch_format="pyarrow",
            compute=TaskPoolStrategy(size=readers),
            num_cpus=1 if cpus >= 8 else 0.05,
            max_retries=5,
        )
        under_way = readers
        for task, stage, config, kind in (
            ("detect", "detector", settings.detector, DetectorStage),
            ("caption", "captioner", settings.captioner, CaptionerStage),
        ):
            if task not in settings.tasks:
                continue
            threads = config.threads or max(1, cpus // 8)
            actors = config.actors or max(1, gpus if config.num_gpus else cpus // threads)
            under_way += 2 * actors
            stream = stream.map_batches(
                kind,
                fn_constructor_args=(models.name(stage), config.batch_size, threads),
                compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
                num_cpus=round(threads * _SHARE_A_THREAD, 2),
                num_gpus=config.num_gpus or None,
                **({"runtime_env": {"env_vars": gpus_hidden(config.num_gpus)}} if gpus else {}),
                **whole,
            )
        if "tag" in settings.tasks:
            engine = settings.tagger.engine
            actors = settings.tagger.actors or max(1, gpus // engine.tensor_parallel if engine.device == "gpu" else 1)
            under_way += 2 * actors
            stream = stream.map_batches(
                TaggerStage,
                fn_constructor_args=(models.name("tagger"), engine),
                compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
                num_cpus=0.2 if engine.device == "cpu" else engine.num_cpus,
                num_gpus=engine.num_gpus * engine.tensor_parallel if engine.device == "gpu" else None,
                **whole,
            )
        stream = stream.map_batches(
            Publisher(output).__call__, num_cpus=0.05, compute=TaskPoolStrategy(size=2), **whole
        )
    pixels = sum(spec.shape[0] * spec.shape[1] * spec.shape[2] * 3 for spec in models.views.values())
    # readers and detector are faster than what follows them: no more shards than this may wait in between
    bound = 2 * under_way * plan.shard_pictures * (pixels + 4096)
    stream.context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=bound)
    return stream


def _finish(plan: Plan, output: Location) -> dict[str, Any]:
    """Read everything back, and write the manifest: its presence says that the annotation is complete.

    Raises:
        DataError: a shard is damaged, or they do not add up to the plan.
    """
    file = output / MANIFEST
    if file.is_file():
        print(f"{output} is complete, nothing is left to do", flush=True)
        return json.loads(file.read_text())
    remove_partial_files(output)
    pictures, verdicts, errors = 0, Counter[str](), Counter[str]()
    with ThreadPoolExecutor(_READ_BACK, thread_name_prefix="read-back") as threads:
        for first in range(0, plan.shards, 64 * _READ_BACK):
            part = range(first, min(first + 64 * _READ_BACK, plan.shards))
            for rows, labels, codes in threads.map(_read_back, (output / FOLDER / shard_name(shard) for shard in part)):
                pictures += rows
                verdicts += labels
                errors += codes
    if pictures != plan.pictures:
        raise DataError(f"{output} holds {pictures} records of {plan.pictures} pictures: remove it and begin anew")
    manifest = plan.model_dump() | {
        "verdicts": dict(sorted(verdicts.items())),
        "errors": dict(sorted(errors.items())),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    file.write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"annotated {pictures:,} pictures; records in {output / FOLDER}", flush=True)
    for name, counts in (("verdicts", verdicts), ("errors", errors)):
        if counts:
            print(f"{name}: {', '.join(f'{key} {count:,}' for key, count in sorted(counts.items()))}", flush=True)
    return manifest


def _read_back(location: Location) -> tuple[int, Counter[str], Counter[str]]:
    """Rows, verdicts and errors of a shard."""
    try:
        table = read_shard(location, ["detection", "errors"])
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{location} cannot be read ({error}): remove it and run the same again") from error
    labels = pc.struct_field(table["detection"], "label").to_pylist()
    codes = (f"{error['stage']}: {error['code']}" for row in table["errors"].to_pylist() for error in row)
    return table.num_rows, Counter(label for label in labels if label is not None), Counter(codes)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    from pydantic_settings import CliApp

    settings = CliApp.run(AnnotateSettings, cli_args=arguments)
    try:
        annotate(settings)
    except Exception as error:
        end(error)
    except KeyboardInterrupt:
        print("stopped; run the same again to go on", flush=True)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
