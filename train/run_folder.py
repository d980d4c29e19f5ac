"""The folder of a run: its whole checkpoints, how it ended, and what it was started with.

In: ``--storage`` and ``--name`` as a location, the settings of a start. Out: what a start goes on from. A run that
goes on does so with the data version, the model and the files it was started with, whatever their names mean by now;
with other settings it is refused. A sweep keeps and asks for the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from data.errors import DataError
from data.locations import Location
from data.versions import DataVersion, open_version
from deployments.checkpoints import Checkpoint, CheckpointError, pinned, resolve
from train.job import Outcome
from train.module import TrainingError
from train.publication import digest_of
from train.settings import Command, TrainCommand

#: Settings that may differ when a run is started again.
_FREE = {
    *("output", "time_limit", "num_workers", "min_workers", "gpus_per_worker", "cpus_per_worker", "threads", "loaders"),
    *("loader_cpus", "checkpoint_every", "keep", "max_failures", "record", "tracking", "num_cpus", "storage", "cache"),
    *("object_store_bytes", "patience", "give_way_s"),
}


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


def remove_torn(folder: Location) -> None:
    """Remove what was being copied, or was about to be deleted, when a run's driver was killed: Ray goes by its list
    alone, and neither resumes from the rest nor deletes it. The run must be held."""
    whole = set(reported(folder))
    for name in folder.folders():
        if name.startswith("checkpoint_") and name not in whole:
            shutil.rmtree((folder / name).local_path, ignore_errors=True)


def finished_in(folder: Location) -> tuple[Outcome, Location] | None:
    """How a run ended and its checkpoint folder, if it came to its end."""
    for name in reversed(reported(folder)):
        export = folder / name / "export"
        if (export / "card.json").exists():
            progress = json.loads((folder / name / "progress.json").read_text())
            return Outcome(**progress["outcome"]), export
    return None


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


def settings_as_kept(config: TrainCommand) -> dict[str, Any]:
    settings = config.model_dump(mode="json", exclude=_FREE | {"lanes"}) | {"lanes": config.all_lanes}
    return settings | {"data": str(Location.of(config.data)) if "://" not in config.data else config.data}


def started_with(config: TrainCommand, folder: Location) -> dict[str, Any]:
    """What a run that goes on was started with; nothing for one that begins: before its first checkpoint nothing
    depends on it.

    Raises:
        TrainingError: it was started with other settings.
    """
    file = folder / "settings.json"
    if not file.exists() or not reported(folder):
        return {}
    before, settings = json.loads(file.read_text()), settings_as_kept(config)
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


def inputs_as_kept(config: TrainCommand, version: DataVersion, checkpoint: Checkpoint) -> dict[str, str]:
    """What was trained on and from, for ``data_of``, ``base_of`` and ``check_files`` of a later start."""
    files = {name: digest_of(Location.of(place)) for name, place in config.files().items()}
    return {
        "data": str(version.location),
        "version": version.manifest.version,
        "model": checkpoint.uri,
        "revision": checkpoint.revision,
        **files,
    }


def keep(
    config: TrainCommand, folder: Location, started: Mapping[str, Any], version: DataVersion, checkpoint: Checkpoint
) -> None:
    """For the next start; a run from before inputs were kept is bound to today's."""
    if "inputs" not in started:
        kept = {**(started or settings_as_kept(config)), "inputs": inputs_as_kept(config, version, checkpoint)}
        (folder / "settings.json").write_text(json.dumps(kept, indent=1) + "\n")


def _changed_file(config: TrainCommand, started: Mapping[str, str]) -> str:
    """The setting of a file whose content is not what it was when the run was started; nothing of one that is gone."""
    for name, place in config.files().items():
        file = Location.of(place)
        if name in started and file.is_file() and digest_of(file) != started[name]:
            return f"another content of --{name} {place}"
    return ""


def check_files(config: TrainCommand, started: Mapping[str, str] | None) -> None:
    """Refuse to go on with other contents of ``TrainCommand.files`` than the run was started with.

    Raises:
        TrainingError: one has changed.
    """
    if started and (changed := _changed_file(config, started)):
        raise _gone(config, "what it read", changed)


def _gone(config: TrainCommand, what: str, reason: str) -> TrainingError:
    return TrainingError(
        f"{config.name!r} was started with {what}, which is gone ({reason}): put it back, or give another --name"
    )


def absolute(uri: str) -> str:
    """A checkpoint URI that means the same in another working directory."""
    return str(Path(uri).expanduser().absolute()) if Path(uri).expanduser().is_dir() else uri
