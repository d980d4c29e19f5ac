"""The model registry: versions of ``detector`` and ``captioner`` in MLflow, and who may serve.

A version is a checkpoint folder among the artifacts of an MLflow run. Its aliases say how far it has come:
``candidate`` (registered last), ``staging``, ``canary``, ``production``; ``models:/detector@production`` is a
checkpoint URI that the application serves. Nothing moves beyond ``candidate`` unless the report of its evaluation
passes the gate **as the gate stands now**, is of exactly these files and of the whole test split, and compares them
with what is in production **now**; the first version has nothing to be compared with. ``rollback`` gives an alias back
to the version that had it before and whose files can still be had, and asks for no report.

In: a checkpoint URI, or a model and a version or alias. Out: tables for people; exit status 1 and a reason where
something is refused. Knows no model class, no HTTP and no data.

    python -m train.registry list
    python -m train.registry register detector --checkpoint starter:detector
    python -m train.registry promote detector --version candidate --to production
    python -m train.registry rollback detector --alias production
    python -m train.registry show detector --version production
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliPositionalArg, CliSubCommand

from deployments.checkpoints import Checkpoint, CheckpointError, mlflow_uri, open_checkpoint, resolve
from train import tracking
from train.gate import RULES, GateError, Judgement, Kind, judge, read_rules
from train.tracking import Run, TrackingConfig, TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

Stage = Literal["staging", "canary", "production"]
ALIASES = ("candidate", *get_args(Stage))
#: What the card of a model of each kind calls its task.
TASKS: dict[str, str] = {"detector": "detection", "captioner": "captioning"}
#: Tags of a version: its files' revision, and the run that holds the report of its evaluation.
REVISION_TAG, EVALUATION_TAG, GATE_TAG = "deeptrust.revision", "deeptrust.evaluation", "deeptrust.gate"
REPORT = "report.json"


class RegistryError(RuntimeError):
    """The registry refuses; the message says why and what to do."""


@contextlib.contextmanager
def meant(config: TrackingConfig) -> Iterator[None]:
    """For the length of the block ``models:/`` is the registry that these settings name: ``resolve`` knows no settings
    and reads the environment, and would fetch a version of the same number from another registry."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = config.uri or mlflow_uri()
    try:
        yield
    finally:
        if before is None:
            del os.environ["MLFLOW_TRACKING_URI"]
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before


def register(run: Run, model: Kind, folder: Path, source: str | None = None) -> ModelVersion:
    """Make a checkpoint folder the next version of a model, alias ``candidate``; what this run has registered already,
    before it was killed, keeps its version.

    Args:
        run: the run that made it.
        source: where ``run.checkpoint`` logged the folder; None logs it now.

    Raises:
        RegistryError: the folder is a checkpoint of another kind.
        deployments.checkpoints.CheckpointError: it is none.
    """
    checkpoint = open_checkpoint(folder, str(folder))
    if checkpoint.card.task != TASKS[model]:
        raise RegistryError(
            f"{folder} is a checkpoint for {checkpoint.card.task!r}, a {model} does {TASKS[model]!r}; "
            "register it under its own kind, or write its card.json"
        )
    client, revision = run.client, checkpoint.revision
    found = [
        version
        for version in client.search_model_versions(f"name='{model}'")
        if version.run_id == run.run_id and version.tags.get(REVISION_TAG) == revision
    ]
    if found:
        version = found[0]
    else:
        _ensure_model(client, model)
        version = client.create_model_version(
            model,
            # a place of its own: a run may come to another checkpoint, and the files of this version stay
            source=source or run.checkpoint(folder, f"checkpoint-{revision}"),
            run_id=run.run_id,
            tags={
                REVISION_TAG: revision,
                "deeptrust.dataset": str(checkpoint.card.dataset.get("version", "unknown")),
                "deeptrust.architecture": checkpoint.card.architecture,
            },
        )
    client.set_registered_model_alias(model, "candidate", version.version)
    return client.get_model_version(model, version.version)


def find_version(client: MlflowClient, model: str, version: str) -> ModelVersion:
    """A version by its number or alias.

    Raises:
        RegistryError: there is none.
    """
    from mlflow.exceptions import MlflowException

    try:
        if version.isdigit():
            return client.get_model_version(model, version)
        return client.get_model_version_by_alias(model, version)
    except MlflowException as error:
        raise RegistryError(
            f"{model} has no version {version!r}; `python -m train.registry list` shows what there is"
        ) from error


def record_evaluation(client: MlflowClient, version: ModelVersion, run_id: str, judgement: Judgement) -> None:
    """Tie the report of an evaluation run to a version; promotion reads it there."""
    for name, value in ((EVALUATION_TAG, run_id), (GATE_TAG, "passed" if judgement.passed else "failed")):
        client.set_model_version_tag(version.name, version.version, name, value)


def read_report(client: MlflowClient, version: ModelVersion) -> dict[str, Any] | None:
    """The report of the last evaluation of a version, None when it was never evaluated.

    Raises:
        RegistryError: the report is gone.
    """
    run_id = version.tags.get(EVALUATION_TAG)
    if not run_id:
        return None
    try:
        with tempfile.TemporaryDirectory() as folder:
            return json.loads(Path(client.download_artifacts(run_id, REPORT, folder)).read_text())
    except Exception as error:  # of whatever store artifacts lie in
        raise RegistryError(
            f"the report of {version.name} {version.version} (run {run_id}) cannot be read: {error}; evaluate it again"
        ) from error


def promote(
    client: MlflowClient, model: Kind, version: str, to: Stage, rules: Path = RULES
) -> tuple[ModelVersion, str | None]:
    """Give ``to`` to a version whose evaluation passes the gate; returns it and the version that had the alias.

    Raises:
        RegistryError: no such version, never evaluated, its report says nothing about it or nothing about production
            (``objection``), or a check fails.
        GateError: the rules cannot be read.
    """
    chosen = find_version(client, model, version)
    name = f"{model} {chosen.version}"
    report = read_report(client, chosen)
    if (reason := objection(client, model, chosen, report)) is not None:
        raise RegistryError(f"{name} {reason}")
    assert report is not None
    judgement = judge(report, read_rules(rules))
    if not judgement.passed:
        lines = "\n  ".join(judgement.failures)
        raise RegistryError(f"{name} does not pass the gate ({rules}):\n  {lines}")
    before = aliases_of(client, model).get(to)
    if before == str(chosen.version):
        return chosen, before
    history = _history(client, model, to)
    if before is not None and (not history or history[-1]["version"] != before):
        history.append({"version": before, "until": _now()})
    # the note first: killed between the two, the alias is still where it was and the note says nothing new
    _write_history(client, model, to, history)
    client.set_registered_model_alias(model, to, chosen.version)
    return chosen, before


def objection(client: MlflowClient, model: Kind, version: ModelVersion, report: dict[str, Any] | None) -> str | None:
    """Why the last report of a version is no ground for promoting it today, and the command that makes one that is;
    None: it is. A comparison with what was in production once shows nothing: between that and the candidate may lie a
    better model."""
    command = f"`python -m train.evaluate {model} --checkpoint models:/{model}/{version.version} --data …`"
    if report is None:
        return f"has not been evaluated; run {command}"
    revision, evaluated = version.tags.get(REVISION_TAG), report["model"]["revision"]
    if evaluated != revision:
        return f"has the files {revision}, but its report is about {evaluated}; run {command}"
    if limit := report.get("settings", {}).get("limit"):
        return f"was evaluated on {limit} test pictures only (--limit); run {command} on all of them"
    number = aliases_of(client, model).get("production")
    if number is None or number == str(version.version):
        return None
    production = find_version(client, model, number).tags.get(REVISION_TAG)
    compared = report.get("comparison", {}).get("with")
    # registered twice, the same files have nothing to be compared with
    if production == revision or (compared and compared.rpartition("#")[2] == production):
        return None
    return (
        f"was compared with {compared or 'no other model'}, and {model} {number} ({production}) is in production now; "
        f"run {command}, which compares with it, and promote again"
    )


def rollback(client: MlflowClient, model: Kind, alias: Stage = "production") -> tuple[str, str]:
    """Give an alias back to the version that had it before; returns (the version now, the one that was). Those whose
    files cannot be had are passed over, and named. ``models:/`` has to be the client's registry (``meant``).

    Raises:
        RegistryError: there is none to go back to.
    """
    current = aliases_of(client, model).get(alias)
    if current is None:
        raise RegistryError(f"{model} has nothing in {alias}: there is nothing to roll back")
    history = _history(client, model, alias)
    available = {str(found.version) for found in client.search_model_versions(f"name='{model}'")}
    passed_over = []
    while history:
        previous = history.pop()["version"]
        if previous == current or previous not in available:
            continue
        if (why := _unusable(client, model, previous)) is None:
            client.set_registered_model_alias(model, alias, previous)
            _write_history(client, model, alias, history)
            return previous, current
        passed_over.append(previous)
        print(f"{model} {previous} is passed over: {why}", file=sys.stderr, flush=True)
    if passed_over:
        raise RegistryError(
            f"{model} {current} stays in {alias}: of what was there before it, nothing can be served "
            f"({', '.join(passed_over)})"
        )
    raise RegistryError(f"{model} {current} is the first version that was in {alias}: there is none before it")


def _unusable(client: MlflowClient, model: str, number: str) -> str | None:
    """Why a version cannot serve; None: its files are here or can be had, and are those that were registered."""
    registered = find_version(client, model, number).tags.get(REVISION_TAG)
    try:
        found = resolve(f"models:/{model}/{number}").revision
    except CheckpointError as error:
        return str(error)
    return None if registered in (None, found) else f"its files are {found}, and {registered} was registered"


def table(client: MlflowClient) -> str:
    """All versions of both models, newest first."""
    rows = [("model", "version", "aliases", "gate", "data set", "revision", "registered")]
    for model in TASKS:
        if not _exists(client, model):
            continue
        aliases: dict[str, list[str]] = {}
        for alias, number in aliases_of(client, model).items():
            aliases.setdefault(number, []).append(alias)
        versions = sorted(client.search_model_versions(f"name='{model}'"), key=lambda each: -int(each.version))
        for each in versions:
            created = datetime.datetime.fromtimestamp(each.creation_timestamp / 1000, datetime.UTC)
            rows.append(
                (
                    model,
                    str(each.version),
                    ",".join(sorted(aliases.get(str(each.version), []))) or "-",
                    each.tags.get(GATE_TAG, "not evaluated"),
                    each.tags.get("deeptrust.dataset", "-"),
                    each.tags.get(REVISION_TAG, "-"),
                    f"{created:%Y-%m-%d %H:%M}",
                )
            )
    if len(rows) == 1:
        return "no versions yet; `python -m train.registry register detector --checkpoint starter:detector` makes one"
    return _columns(rows)


def describe(client: MlflowClient, model: Kind, version: str, rules: Path = RULES) -> str:
    """Everything about one version: where it came from, its evaluation against today's gate, who had its aliases."""
    chosen = find_version(client, model, version)
    report = read_report(client, chosen)
    lines = [f"{model} {chosen.version}", f"  files     {chosen.source}", f"  run       {chosen.run_id}"]
    lines += [f"  {name.removeprefix('deeptrust.'):9} {value}" for name, value in sorted(chosen.tags.items())]
    if report is None:
        lines.append("  never evaluated")
    else:
        lines += [f"  {check}" for check in judge(report, read_rules(rules)).checks]
        if (reason := objection(client, model, chosen, report)) is not None:
            lines.append(f"  may not be promoted: {reason}")
    aliases = aliases_of(client, model)
    for alias in ALIASES:
        if alias in aliases:
            before = [entry["version"] for entry in _history(client, model, alias)]
            lines.append(f"  {alias}: version {aliases[alias]}" + (f", before {', '.join(before)}" if before else ""))
    return "\n".join(lines)


def _exists(client: MlflowClient, model: str) -> bool:
    return any(found.name == model for found in client.search_registered_models(f"name='{model}'"))


def aliases_of(client: MlflowClient, model: str) -> dict[str, str]:
    """Alias -> number of the version; empty when there is no such model. MLflow's stores disagree on whether a number
    is text."""
    if not _exists(client, model):
        return {}
    return {alias: str(number) for alias, number in client.get_registered_model(model).aliases.items()}


def _ensure_model(client: MlflowClient, model: str) -> None:
    from mlflow.exceptions import MlflowException

    if not _exists(client, model):
        try:
            client.create_registered_model(model)
        except MlflowException:  # made by another process at the same moment
            if not _exists(client, model):
                raise


def _history(client: MlflowClient, model: str, alias: str) -> list[dict[str, str]]:
    return json.loads(client.get_registered_model(model).tags.get(f"deeptrust.history.{alias}", "[]"))


def _write_history(client: MlflowClient, model: str, alias: str, history: list[dict[str, str]]) -> None:
    # MLflow holds 5,000 characters in a tag; a hundred steps back are enough
    client.set_registered_model_tag(model, f"deeptrust.history.{alias}", json.dumps(history[-60:]))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


class _Command(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tracking: TrackingConfig = Field(TrackingConfig())


class ListCommand(_Command):
    """All versions with their aliases."""

    def run(self) -> str:
        """What is printed."""
        return table(tracking.connect(self.tracking))


class RegisterCommand(_Command):
    """Make a checkpoint the next version, alias candidate."""

    model: CliPositionalArg[Kind]
    checkpoint: str = Field(description="checkpoint URI: a folder, starter:NAME, s3://…, a hub id")

    def run(self) -> str:
        """What is printed."""
        with meant(self.tracking):
            found: Checkpoint = resolve(self.checkpoint)
        card = found.card.model_dump(mode="json", exclude={"metrics"})
        with tracking.run(
            self.tracking, "registered", f"register {self.checkpoint}", parameters={"checkpoint": self.checkpoint}
        ) as run:
            run.text("card.json", json.dumps(card, indent=1))
            version = register(run, self.model, found.folder)
        return f"{self.model} {version.version} is {self.checkpoint} ({found.revision}), alias candidate"


class PromoteCommand(_Command):
    """Give an alias to a version that passed the gate."""

    model: CliPositionalArg[Kind]
    version: str = Field("candidate", description="number or alias")
    to: Stage = Field(description="the alias that it gets")
    rules: Path = Field(RULES, description="the gate")

    def run(self) -> str:
        """What is printed."""
        version, before = promote(tracking.connect(self.tracking), self.model, self.version, self.to, self.rules)
        if before == str(version.version):
            return f"{self.model} {version.version} is in {self.to} already"
        return f"{self.model} {version.version} is in {self.to} now" + (f", before: {before}" if before else "")


class RollbackCommand(_Command):
    """Give an alias back to the version that had it before."""

    model: CliPositionalArg[Kind]
    alias: Stage = Field("production")

    def run(self) -> str:
        """What is printed."""
        with meant(self.tracking):
            now, was = rollback(tracking.connect(self.tracking), self.model, self.alias)
        return f"{self.model} {now} is in {self.alias} again, instead of {was}"


class ShowCommand(_Command):
    """Everything about one version."""

    model: CliPositionalArg[Kind]
    version: str = Field("production", description="number or alias")
    rules: Path = Field(RULES, description="the gate")

    def run(self) -> str:
        """What is printed."""
        return describe(tracking.connect(self.tracking), self.model, self.version, self.rules)


class RegistryCommands(BaseModel):
    """Versions of the two models, and who may serve."""

    model_config = ConfigDict(extra="forbid")

    list: CliSubCommand[ListCommand]
    register_: CliSubCommand[RegisterCommand] = Field(alias="register")
    promote: CliSubCommand[PromoteCommand]
    rollback: CliSubCommand[RollbackCommand]
    show: CliSubCommand[ShowCommand]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    from pydantic_settings import CliApp, get_subcommand

    commands = CliApp.run(RegistryCommands, cli_args=None if arguments is None else [*arguments])
    command: Any = get_subcommand(commands)
    try:
        print(command.run())
    except (RegistryError, GateError, TrackingError, CheckpointError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
