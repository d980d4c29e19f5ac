"""Checkpoints: a URI becomes a local folder, and the folder a card.

A checkpoint is a folder in Hugging Face format (``config.json``, ``model.safetensors``, processor files) with a
``card.json``. It is named by ``starter:NAME``, a folder, ``s3://bucket/prefix``, ``models:/name@alias`` or
``models:/name/version`` (MLflow), or a hub id ``owner/name@revision``. ``resolve`` is the one place that opens any of
them; weights are safetensors, never pickles, and no code of a checkpoint is ever run.

Knows no HTTP, no Ray and no model class.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

#: Files that unpickle when they are loaded; a checkpoint that has one is refused.
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w.-]+)?$")
#: MLflow's client tries for many minutes; whoever remembers an answer does not wait that long.
_BRIEFLY = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "tokenizer.model", "*.jinja"]
#: Fetches a snapshot of the hub, and prints where it is or why not.
_FETCH = """
import sys
from huggingface_hub import snapshot_download
repository, revision, cache, *files = sys.argv[1:]
try:
    print(snapshot_download(repository, revision=revision or None, cache_dir=cache, allow_patterns=files))
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""

_log = logging.getLogger("ray.serve")  # a replica's log


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged or of a forbidden kind; the message says which and what to do."""


class Thresholds(BaseModel):
    """The two borders between the three answers, chosen on validation data."""

    model_config = ConfigDict(extra="forbid")

    human_below: float = Field(0.5, ge=0, le=1, description="a probability below is answered `human`")
    ai_above: float = Field(0.5, ge=0, le=1, description="a probability at or above is answered `ai`")


class Card(BaseModel):
    """What is written about a checkpoint beside its weights (``card.json``)."""

    model_config = ConfigDict(extra="allow")

    task: str = Field("unknown", description="`detection`, `captioning` or `tagging`")
    architecture: str = Field("unknown", description="the model class")
    labels: list[str] = Field(default_factory=list, description="label of each logit, for a detector")
    thresholds: Thresholds = Field(Thresholds())
    temperature: float = Field(1.0, gt=0, description="logits are divided by it: calibration")
    preprocessing: dict[str, Any] = Field(default_factory=dict, description="the view of a picture that the model sees")
    generation: dict[str, Any] = Field(default_factory=dict, description="decoding settings, for a captioner")
    dataset: dict[str, Any] = Field(default_factory=dict, description="name, version and counts of the training data")
    metrics: dict[str, Any] = Field(default_factory=dict)
    engines: list[dict[str, Any]] = Field(default_factory=list, description="see deployments.engines")
    code_commit: str | None = None
    created_at: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on local disk. ``revision`` is the start of a hash of its files: same bytes, same revision."""

    uri: str
    folder: Path
    revision: str
    card: Card

    @property
    def name(self) -> str:
        """``URI#revision``, as records name the model that answered."""
        return f"{self.uri}#{self.revision}"


def cache_root() -> Path:
    """Where fetched and converted checkpoints are kept: ``DEEPTRUST_CACHE`` or ``~/.cache/deeptrust``."""
    return Path(os.environ.get("DEEPTRUST_CACHE", "~/.cache/deeptrust")).expanduser()


def mlflow_uri() -> str:
    """The MLflow that ``models:/`` means: ``MLFLOW_TRACKING_URI``, or a SQLite file in ``~/.local/share/deeptrust``,
    wherever the process was started."""
    if named := os.environ.get("MLFLOW_TRACKING_URI"):
        return with_driver(named)
    return f"sqlite:///{Path('~/.local/share/deeptrust/mlflow/mlflow.db').expanduser()}"


def with_driver(uri: str) -> str:
    """A database's URI as SQLAlchemy takes it: ``postgresql://`` alone means psycopg2, and what is installed is its
    successor."""
    for scheme in ("postgresql://", "postgres://"):
        if uri.startswith(scheme):
            return f"postgresql+psycopg://{uri.removeprefix(scheme)}"
    return uri


def resolve(uri: str) -> Checkpoint:
    """The checkpoint that ``uri`` names, fetched or built if it is not yet on this machine.

    Raises:
        CheckpointError: it is not there, cannot be read, is damaged, or holds something other than safetensors.
    """
    try:
        if uri.startswith("starter:"):
            from deployments.starter import ensure_starter

            folder = ensure_starter(uri.removeprefix("starter:"))
        elif uri.startswith("models:/"):
            folder = _from_mlflow(uri)
        elif uri.startswith("s3://"):
            folder = _from_s3(uri)
        elif uri and Path(uri).expanduser().is_dir():  # an empty path is the working directory
            folder = Path(uri).expanduser().absolute()
        elif _HUB_ID.match(uri):
            folder = _from_hub(uri)
        else:
            raise CheckpointError(
                f"no such checkpoint: {uri!r}. Expected a folder that exists, starter:NAME (detector, "
                "captioner, tagger), s3://bucket/prefix, models:/name@alias, or a hub id owner/name@revision"
            )
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"cannot fetch checkpoint {uri!r}: {type(error).__name__}: {error}") from error
    return open_checkpoint(folder, uri)


def open_checkpoint(folder: Path, uri: str) -> Checkpoint:
    """Check a checkpoint folder and read its card.

    Raises:
        CheckpointError: no configuration, no safetensors, a pickle among the files, or a card that is not valid.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if "config.json" not in names:
        raise CheckpointError(f"{uri}: {folder} has no config.json: not a checkpoint in Hugging Face format")
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise CheckpointError(f"{uri}: {folder} holds pickled files ({', '.join(pickles)}); convert to safetensors")
    if not any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(f"{uri}: {folder} holds no .safetensors file; fetch or build the checkpoint again")
    card_file = folder / "card.json"
    try:
        card = Card.model_validate_json(card_file.read_text()) if card_file.is_file() else Card()
    except (ValidationError, ValueError) as error:
        raise CheckpointError(f"{uri}: {card_file} is not a valid card: {error}") from error
    return Checkpoint(uri, folder, _revision(folder, names), card)


def _revision(folder: Path, names: list[str]) -> str:
    """Twelve hexadecimal digits over names and bytes of all files; hidden files are bookkeeping and do not count."""
    digest = hashlib.sha256()
    for name in names:
        if name.startswith("."):
            continue
        with (folder / name).open("rb") as file:
            digest.update(f"{name}\0".encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def publish(build: Path, target: Path) -> None:
    """Move a complete folder to its place in one step; a twin that came first is left as it is."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        build.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(build)


def scratch_folder(near: Path) -> Path:
    """A new empty folder on the file system of ``near``, for ``publish``."""
    near.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{near.name}-", dir=near.parent))


def _fetched(key: str, fetch: Any) -> Path:
    """The cache folder of ``key``, filled by ``fetch(folder)`` unless it is there already."""
    target = cache_root() / "fetched" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if not target.is_dir():
        build = scratch_folder(target)
        try:
            fetch(build)
            publish(build, target)
        finally:
            shutil.rmtree(build, ignore_errors=True)
    return target


def pinned(uri: str) -> str:
    """The URI by which the same checkpoint is found later: an alias of the registry (``models:/NAME@ALIAS``) becomes
    the version that has it now, everything else stays what it is.

    Raises:
        CheckpointError: there is no such alias.
    """
    if not uri.startswith("models:/") or "@" not in uri:
        return uri
    from mlflow.tracking import MlflowClient

    model, alias = uri.removeprefix("models:/").split("@", 1)
    registry = mlflow_uri()
    try:
        version = MlflowClient(registry, registry).get_model_version_by_alias(model, alias)
    except Exception as error:  # of whatever store the registry lies in
        raise CheckpointError(f"cannot look up {uri!r}: {type(error).__name__}: {error}") from error
    return f"models:/{model}/{version.version}"


def _from_mlflow(uri: str) -> Path:
    """A model version's artifacts. The registry is asked every time; what it names is fetched once for each version."""
    import mlflow

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    registry = mlflow_uri()
    version, source = _registered(registry, uri.removeprefix("models:/"))

    def fetch(folder: Path) -> None:
        local = Path(
            mlflow.artifacts.download_artifacts(
                artifact_uri=source, dst_path=str(folder / "download"), tracking_uri=registry
            )
        )
        for file in local.iterdir():
            shutil.move(str(file), folder / file.name)
        shutil.rmtree(folder / "download", ignore_errors=True)

    return _fetched(f"mlflow:{registry}:{version}:{source}", fetch)


def _registered(registry: str, name: str) -> tuple[str, str]:
    """``MODEL/VERSION`` that has the name ``MODEL@ALIAS`` or ``MODEL/VERSION``, and where its artifacts are. The
    registry's last answer is kept in the cache and holds while it does not answer: a replica can start meanwhile.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import OperationalError

    kept = cache_root() / "registry" / f"{hashlib.sha256(f'{registry}:{name}'.encode()).hexdigest()[:24]}.json"
    try:
        with _unless_set(_BRIEFLY if kept.is_file() else {}):
            client = MlflowClient(registry, registry)
            if "@" in name:
                model, alias = name.split("@", 1)
                found = client.get_model_version_by_alias(model, alias)
            else:
                model, number = name.split("/", 1)
                found = client.get_model_version(model, number)
    except (MlflowException, OperationalError) as error:
        if isinstance(error, MlflowException) and error.get_http_status_code() < 500:
            raise  # an answer
        try:
            version, source = json.loads(kept.read_text())
        except (OSError, ValueError):
            raise error from None
        _log.warning("the registry does not answer (%s): models:/%s is %s, as it was last", error, name, version)
        return version, source
    answer = f"{model}/{found.version}", str(found.source)
    with contextlib.suppress(OSError):  # a full disk costs what would be remembered, and not the replica
        _keep(kept, json.dumps(answer))
    return answer


@contextlib.contextmanager
def _unless_set(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables for a while, but for those that somebody has set."""
    added = {key: value for key, value in variables.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


def _keep(file: Path, text: str) -> None:
    """Write a small file whole, unless it says so already."""
    if file.is_file() and file.read_text() == text:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    with os.fdopen(descriptor, "w") as written:
        written.write(text)
    Path(partial).replace(file)


def _from_s3(uri: str) -> Path:
    """All objects directly under a prefix; names and ETags are the cache key, so changed content is fetched anew."""
    import s3fs

    system = s3fs.S3FileSystem()
    prefix = uri.removeprefix("s3://").rstrip("/")
    found = [item for item in system.ls(prefix, detail=True, refresh=True) if item["type"] == "file"]
    if not found:
        raise CheckpointError(f"{uri} holds no files")
    key = json.dumps([[item["name"], item.get("ETag"), item["size"]] for item in found])

    def fetch(folder: Path) -> None:
        for item in found:
            system.get_file(item["name"], str(folder / Path(item["name"]).name))

    return _fetched(f"s3:{uri}:{key}", fetch)


def _from_hub(uri: str) -> Path:
    """A pinned snapshot of a hub repository, safetensors and text files only.

    A child fetches it: a tagger's replica is offline (``tagger.engine_environment``), and huggingface_hub goes for the
    life of a process by what ``HF_HUB_OFFLINE`` was when it was imported. All else (``HF_TOKEN``, ``HF_ENDPOINT``,
    proxies) is the child's too; a snapshot that is complete is found without the hub.
    """
    repository, _, revision = uri.partition("@")
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    fetched = subprocess.run(
        [sys.executable, "-c", _FETCH, repository, revision, str(cache_root() / "hub"), *_HUB_FILES],
        env=environment | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if fetched.returncode != 0:
        raise CheckpointError(f"cannot fetch checkpoint {uri!r}: {fetched.stderr.strip()[-2000:]}")
    return Path(fetched.stdout.strip().splitlines()[-1])
