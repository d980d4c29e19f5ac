"""Runs on record: MLflow keeps what was trained, on which data, by which code, how it went and what came out.

In: settings (two of them say where: a tracking URI and a place for artifacts). Out: a ``Run`` that takes parameters,
data sets, curves, pictures and checkpoints. By default everything lies in one SQLite file and a folder beside it, no
server needed; ``MLFLOW_TRACKING_URI=postgresql://…`` and ``DEEPTRUST_ARTIFACTS=s3://…`` are the two settings of a
cluster.

The driver opens a run with ``run(...)`` before any worker starts, so that a server that is down is noticed then, and
passes ``Run.reference()`` to its workers; rank 0 goes on with ``attach(reference)``. A run with the same ``key`` that
did not finish is continued, so a job that was killed and submitted again stays one run. Points that are logged while
the server does not answer are kept and sent when it does: training goes on.

Knows no model, no Ray and no trainer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field

from deployments.checkpoints import mlflow_uri, open_checkpoint, with_driver
from train.source import describe_trees

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from PIL.Image import Image

logger = logging.getLogger(__name__)

#: Tags of our own on a run.
KEY_TAG, FAILURE_TAG, COMMIT_TAG = "deeptrust.key", "deeptrust.failure", "mlflow.source.git.commit"
#: MLflow refuses more in one request.
_METRICS_AT_ONCE, _PARAMETERS_AT_ONCE = 1000, 100
#: MLflow's limit for the value of a parameter.
_PARAMETER_CHARACTERS = 6000
_ANSWER_S = 10.0
#: After a failure points are kept for so long at least before they are sent again.
_PAUSE_S = 30.0


class TrackingError(RuntimeError):
    """MLflow or its place for artifacts cannot be used; the message says which and what to do."""


class TrackingConfig(BaseModel):
    """Where runs are recorded."""

    model_config = ConfigDict(extra="forbid")

    uri: str | None = Field(
        None,
        description="MLflow: sqlite:///FILE, postgresql://USER@HOST/DATABASE or http://HOST:PORT; unset: "
        "MLFLOW_TRACKING_URI, or a SQLite file in ~/.local/share/deeptrust",
    )
    artifacts: str | None = Field(
        None,
        description="where a new experiment keeps its artifacts: a folder or s3://BUCKET/PREFIX; unset: "
        "DEEPTRUST_ARTIFACTS, or a folder beside the SQLite file, or what the MLflow server was started with",
    )
    system_metrics_s: float = Field(
        10.0, ge=0, description="seconds between samples of CPU, memory, disk, network and GPU; 0 is none"
    )

    def resolved(self) -> TrackingConfig:
        """The same with every default filled in, for workers whose environment is another."""
        uri = with_driver(self.uri) if self.uri else mlflow_uri()
        artifacts = self.artifacts or os.environ.get("DEEPTRUST_ARTIFACTS") or None
        if artifacts is None and uri.startswith("sqlite:///"):
            artifacts = str(Path(uri.removeprefix("sqlite:///")).parent / "artifacts")
        if artifacts is None and uri.startswith("postgresql"):
            raise TrackingError(
                "runs go to PostgreSQL but nothing says where artifacts go; set DEEPTRUST_ARTIFACTS to "
                "s3://BUCKET/PREFIX or to a folder that every node sees"
            )
        if artifacts is not None and "://" not in artifacts:
            artifacts = str(Path(artifacts).expanduser().absolute())
        return self.model_copy(update={"uri": uri, "artifacts": artifacts})


class RunReference(BaseModel):
    """What a worker needs to go on with a run that the driver opened."""

    model_config = ConfigDict(extra="forbid")

    tracking: TrackingConfig
    run_id: str


class DatasetInput(BaseModel):
    """A data set version as MLflow shows it among a run's inputs."""

    model_config = ConfigDict(extra="forbid")

    name: str
    version: str = Field(description="the version's hash: MLflow's digest")
    source: str = Field(description="its URI")
    context: str = Field("training", description="`training`, `validation` or `evaluation`")
    profile: dict[str, Any] = Field(default_factory=dict, description="counts and class balance, for the page")


def connect(config: TrackingConfig) -> MlflowClient:
    """A client of MLflow that has answered once.

    Raises:
        TrackingError: it does not answer, or its database cannot be used.
    """
    config = config.resolved()
    uri = str(config.uri)
    _reach("MLflow", uri)
    if (config.artifacts or "").startswith("s3://") and (endpoint := _s3_endpoint()):
        _reach("the S3 endpoint of MLflow's artifacts", endpoint)
    # the defaults try for minutes; a run that cannot be recorded should be known at once
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    for chatty in ("alembic", "mlflow.store.db.utils", "mlflow.tracking"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    try:
        client = MlflowClient(uri, uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # whatever a driver of the database raises: the reader needs the address and the reason
        raise TrackingError(
            f"MLflow at {_shown(uri)} cannot be used: {type(error).__name__}: {str(error).splitlines()[0]}. "
            "Set MLFLOW_TRACKING_URI to a server or database that works, or unset it to record in a local file"
        ) from error
    return client


class Run:
    """An MLflow run that is being written."""

    def __init__(self, client: MlflowClient | None, config: TrackingConfig, run_id: str) -> None:
        self._client, self.config, self.run_id = client, config, run_id
        self._waiting: list[Any] = []
        self._silent_until = 0.0
        self._monitor: Any = None

    @property
    def client(self) -> MlflowClient:
        """MLflow; a worker that came while it was down connects when it is asked for."""
        if self._client is None:
            self._client = connect(self.config)
        return self._client

    def reference(self) -> RunReference:
        """For ``attach`` in a worker."""
        return RunReference(tracking=self.config, run_id=self.run_id)

    @property
    def artifact_uri(self) -> str:
        """Where the run's artifacts lie."""
        return str(self.client.get_run(self.run_id).info.artifact_uri)

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Settings, nested ones with dots (``damage.blur``). A value that a continued run has changed is kept as it
        was first, as MLflow demands; the new one goes into a tag ``changed.NAME``."""
        from mlflow.entities import Param, RunTag

        known = self.client.get_run(self.run_id).data.params
        flat = {name: str(value)[:_PARAMETER_CHARACTERS] for name, value in _flatten(values)}
        fresh = [Param(name, value) for name, value in flat.items() if name not in known]
        changed = [
            RunTag(f"changed.{name}", value[:5000])
            for name, value in flat.items()
            if name in known and known[name] != value
        ]
        for first in range(0, len(fresh), _PARAMETERS_AT_ONCE):
            self.client.log_batch(self.run_id, params=fresh[first : first + _PARAMETERS_AT_ONCE])
        if changed:
            self.client.log_batch(self.run_id, tags=changed)

    def dataset(self, *inputs: DatasetInput) -> None:
        """Data set versions among the run's inputs."""
        import json

        from mlflow.entities import Dataset, InputTag
        from mlflow.entities import DatasetInput as Input

        self.client.log_inputs(
            self.run_id,
            [
                Input(
                    dataset=Dataset(
                        name=each.name,
                        digest=each.version,
                        source_type="deeptrust",
                        source=json.dumps({"uri": each.source}),
                        profile=json.dumps(each.profile) if each.profile else None,
                    ),
                    tags=[InputTag("mlflow.data.context", each.context)],
                )
                for each in inputs
            ],
        )

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Points of curves. While MLflow does not answer they wait here and training goes on: after a failure it is
        left alone for a while, ten times as long as the failure took, so that a server that hangs costs a run no more
        than a tenth of its time."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(name, float(value), now, step) for name, value in values.items()]
        if time.monotonic() >= self._silent_until:
            self._send()

    def _send(self) -> None:
        began = time.monotonic()
        try:
            while self._waiting:
                self.client.log_batch(self.run_id, metrics=self._waiting[:_METRICS_AT_ONCE])
                self._waiting = self._waiting[_METRICS_AT_ONCE:]
        except Exception as error:  # of any store; losing a run over a lost point of a curve would be worse
            ended = time.monotonic()
            self._silent_until = ended + max(_PAUSE_S, 10 * (ended - began))
            logger.warning("MLflow does not answer, %d points wait: %s", len(self._waiting), error)

    def tags(self, values: Mapping[str, str]) -> None:
        """Tags of the run."""
        from mlflow.entities import RunTag

        self.client.log_batch(self.run_id, tags=[RunTag(name, value[:5000]) for name, value in values.items()])

    def pictures(self, path: str, pictures: Sequence[tuple[Image, str]], columns: int = 4) -> None:
        """Sample predictions as one sheet of pictures with a line of text under each, artifact ``path`` (``.png``).
        When MLflow does not take it, it is left out."""
        from train.pictures import sheet

        drawn = sheet(pictures, columns)
        try:
            self.client.log_image(self.run_id, drawn, path)
        except Exception as error:  # of any store; losing a run over a picture would be worse
            logger.warning("MLflow does not take %s: %s", path, error)

    def figure(self, path: str, figure: Any) -> None:
        """A matplotlib figure as artifact ``path``."""
        self.client.log_figure(self.run_id, figure, path)

    def text(self, path: str, text: str) -> None:
        """A text file (JSON, HTML) as artifact ``path``."""
        self.client.log_text(self.run_id, text, path)

    def checkpoint(self, folder: Path, path: str = "checkpoint") -> str:
        """A checkpoint folder (contract 1) as artifacts; returns the URI that a model version's source is.

        Raises:
            deployments.checkpoints.CheckpointError: it is none, or holds a pickle.
        """
        open_checkpoint(folder, str(folder))
        self.client.log_artifacts(self.run_id, str(folder), path)
        return f"{self.artifact_uri}/{path}"

    def watch_system(self) -> None:
        """Log this process's machine (CPU, memory, disk, network, GPUs) until the run is left."""
        if not self.config.system_metrics_s or self._monitor is not None:
            return
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
        self._monitor = SystemMetricsMonitor(
            self.run_id,
            sampling_interval=self.config.system_metrics_s,
            resume_logging=True,
            tracking_uri=str(self.config.uri),
        )
        self._monitor.start()

    def leave(self) -> None:
        """Stop watching and send what waits; the run stays open."""
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        if self._waiting:
            self._send()
        if self._waiting:
            logger.error("%d points of the curves of run %s were lost: no answer", len(self._waiting), self.run_id)

    def end(self, error: BaseException | None = None) -> None:
        """Close the run: finished, killed (interrupted) or failed, with the reason in tag ``deeptrust.failure``."""
        self.leave()
        if error is None:
            self.client.set_terminated(self.run_id, "FINISHED")
            return
        self.client.set_tag(self.run_id, FAILURE_TAG, describe(error)[:5000])
        killed = isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit))
        self.client.set_terminated(self.run_id, "KILLED" if killed else "FAILED")

    def close(self, error: BaseException | None = None) -> None:
        """``end`` where MLflow's own error is only logged: what ended the run is what to tell."""
        try:
            self.end(error)
        except Exception as trouble:  # of any store
            logger.warning("MLflow does not know how run %s ended: %s", self.run_id, describe(trouble))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()


def start(
    config: TrackingConfig,
    experiment: str,
    name: str,
    *,
    key: str | None = None,
    going_on: bool = True,
    parent: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    datasets: Sequence[DatasetInput] = (),
    tags: Mapping[str, str] | None = None,
) -> Run:
    """Open a run, or open again the one with ``key`` that did not finish.

    Args:
        experiment: `detector`, `captioner`, `evaluation`, …; made if it is not there.
        name: of the run, for people.
        key: what is the same when a killed job is submitted again, e.g. storage path and run name.
        going_on: whether that job goes on where it was; one that begins anew with other parameters is another run.
        parent: run id of a sweep.

    Raises:
        TrackingError: MLflow or its artifacts cannot be reached.
    """
    config = config.resolved()
    client = connect(config)
    try:
        experiment_id = _experiment(client, experiment, config.artifacts)
        run_id = _unfinished(client, experiment_id, key) if key else None
        if run_id is not None and not going_on and _differs(client, run_id, parameters or {}):
            if client.get_run(run_id).info.status == "RUNNING":
                client.set_tag(run_id, FAILURE_TAG, "killed, and begun anew with other settings")
                client.set_terminated(run_id, "KILLED")
            run_id = None
        if run_id is not None:
            client.update_run(run_id, status="RUNNING")
            client.set_tag(run_id, FAILURE_TAG, "")
        else:
            all_tags = {"mlflow.runName": name, COMMIT_TAG: code_commit(), **(tags or {})}
            if key:
                all_tags[KEY_TAG] = key
            if parent:
                all_tags["mlflow.parentRunId"] = parent
            run_id = client.create_run(experiment_id, tags=all_tags, run_name=name).info.run_id
        opened = Run(client, config, run_id)
        if parameters:
            opened.parameters(parameters)
        if datasets:
            opened.dataset(*datasets)
    except TrackingError:
        raise
    except Exception as error:
        raise TrackingError(f"MLflow at {_shown(str(config.uri))} refused a new run: {describe(error)}") from error
    return opened


@contextlib.contextmanager
def run(config: TrackingConfig, experiment: str, name: str, **options: Any) -> Iterator[Run]:
    """A run for the length of the block (``start`` explains the options): finished at its end, failed with the reason
    when it raises."""
    opened = start(config, experiment, name, **options)
    try:
        yield opened
    except BaseException as error:
        opened.close(error)
        raise
    opened.end()


def refused(
    config: TrackingConfig,
    experiment: str,
    name: str,
    error: BaseException,
    parameters: Mapping[str, Any] | None = None,
    parent: str | None = None,
) -> None:
    """Put on record, as a failed run of its own, what could not begin, and why. Where MLflow is down that is only
    logged: the error is the one to tell."""
    try:
        run = start(config, experiment, name, parent=parent, parameters=parameters)
        run.client.set_tag(run.run_id, FAILURE_TAG, f"{type(error).__name__}: {error}"[:5000])
        run.client.set_terminated(run.run_id, "FAILED")
    except Exception as trouble:  # of any store
        logger.warning("that this failed is not on record: %s", describe(trouble))


def attach(reference: RunReference) -> Run:
    """Go on with a run in another process (rank 0 of the workers); use as a context manager, it stays open. Where
    MLflow is down its points wait until it is back."""
    attached = Run(None, reference.tracking, reference.run_id)
    try:
        attached.client  # noqa: B018  (connects)
        attached.watch_system()
    except Exception as error:  # of any store
        logger.warning("MLflow cannot be reached, training goes on: %s", describe(error))
    return attached


def code_commit() -> str:
    """The commit that this code stands at, ``-dirty`` when files differ from it. Where the code came without its
    repository (a Ray job's working directory, an image): ``DEEPTRUST_COMMIT``, or the git trees that it is."""
    if named := os.environ.get("DEEPTRUST_COMMIT"):
        return named
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:  # an image without git
        return describe_trees()
    return result.stdout.strip() if result.returncode == 0 else describe_trees()


def describe(error: BaseException) -> str:
    """One line: the root cause's type and message; Ray and Lightning wrap it several times."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = " ".join(str(cause).split()) or "no message"
    return f"{type(cause).__name__}: {text}"


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """The experiment's id; made, or made by another process at the same moment."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=f"{artifacts}/{name}" if artifacts else None)
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise TrackingError(f"experiment {name!r} was deleted in MLflow; restore it there or name another")
    return str(found.experiment_id)


def _unfinished(client: MlflowClient, experiment_id: str, key: str) -> str | None:
    """The newest run with a key, unless it finished."""
    quoted = key.replace("'", "")
    query = f"tags.`{KEY_TAG}` = '{quoted}'"
    for found in client.search_runs([experiment_id], query, max_results=1, order_by=["attributes.start_time DESC"]):
        if found.info.status != "FINISHED":
            return str(found.info.run_id)
    return None


def _differs(client: MlflowClient, run_id: str, parameters: Mapping[str, Any]) -> bool:
    known = client.get_run(run_id).data.params
    return any(known.get(name) != str(value)[:_PARAMETER_CHARACTERS] for name, value in _flatten(parameters))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _s3_endpoint() -> str | None:
    return os.environ.get("MLFLOW_S3_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL")


def _shown(uri: str) -> str:
    """The URI without a password."""
    parts = urllib.parse.urlsplit(uri)
    if parts.password is None:
        return uri
    return uri.replace(f":{parts.password}@", ":…@", 1)


def _reach(what: str, uri: str) -> None:
    """Fail within seconds where nothing listens; the libraries try for minutes."""
    parts = urllib.parse.urlsplit(uri)
    if not parts.hostname:
        return
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 5432)
    try:
        socket.create_connection((parts.hostname, port), timeout=_ANSWER_S).close()
    except OSError as error:
        raise TrackingError(
            f"{what} at {_shown(uri)} does not answer ({error}); start it, or correct MLFLOW_TRACKING_URI, "
            "DEEPTRUST_ARTIFACTS and AWS_ENDPOINT_URL"
        ) from error
