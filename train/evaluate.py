"""One report for a model: figures, plots and pictures, judged by the gate, on record in MLflow.

In: a checkpoint URI and a data set (its test split alone is read). Out: ``report.json``, ``report.html`` and the
gate's verdict, in a folder and as artifacts of a run of the experiment ``evaluation``. When the checkpoint is a version
of the registry (``models:/detector@candidate``), the report is tied to that version, and ``train.registry promote``
reads it. The model in production, if there is one, is compared with on the same pictures.

What is measured: ``train.detector_report`` and ``train.captioner_report``. Knows no training.

    python -m train.evaluate detector --data DATA/aivshuman --checkpoint models:/detector@candidate
    python -m train.evaluate captioner --data DATA/flickr30k --checkpoint starter:captioner --tagger starter:tagger
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliSubCommand

from data.errors import DataError
from deployments.checkpoints import Checkpoint, CheckpointError, resolve
from train import captioner_report, detector_report, registry, tracking
from train.captioner_report import CaptionerSettings
from train.detector_report import Body, DetectorSettings
from train.evaluation_page import render_page
from train.examples import ExampleSet, read_examples
from train.gate import RULES, GateError, Judgement, Kind, judge, read_rules
from train.registry import REPORT, TASKS
from train.tracking import DatasetInput, TrackingConfig, TrackingError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

#: Parts of a report whose numbers become metrics of the run.
_METRICS = ("tiers", "damages", "unseen", "scores", "length", "templates", "made_up", "tags", "retrieval", "comparison")


class EvaluationError(RuntimeError):
    """The evaluation cannot be made; the message says why and what to do."""


class EvaluationConfig(BaseModel):
    """Settings that both kinds share."""

    model_config = ConfigDict(extra="forbid")

    data: str = Field(description="test data: NAME/VERSION of data.prepare, or a folder with train.csv or captions.txt")
    checkpoint: str = Field("", description="checkpoint URI; empty: the candidate of the registry")
    against: str = Field(
        "production", description="checkpoint URI to compare with; `production`: the registry's, if any; empty: none"
    )
    output: Path | None = Field(None, description="folder that gets report.json and report.html beside MLflow")
    limit: int | None = Field(None, ge=10, description="evaluate on so many test pictures only, the first by id")
    resamples: int = Field(1000, ge=10, description="bootstrap resamples")
    batch_size: int = Field(8, ge=1)
    rules: Path = Field(RULES, description="the gate")
    strict: bool = Field(False, description="exit status 1 when the gate is not passed")
    tracking: TrackingConfig = Field(TrackingConfig())
    seed: int = 0


class DetectorEvaluation(EvaluationConfig, DetectorSettings):
    """Evaluate a detector."""


class CaptionerEvaluation(EvaluationConfig, CaptionerSettings):
    """Evaluate a captioner."""

    batch_size: int = Field(16, ge=1)
    resamples: int = Field(100, ge=10, description="bootstrap resamples; CIDEr is slow")
    seed: int = 7


def evaluate(config: DetectorEvaluation | CaptionerEvaluation) -> tuple[dict[str, Any], Judgement]:
    """Measure, judge, write and record.

    Raises:
        TrackingError, GateError, CheckpointError, DataError, EvaluationError: before anything is measured; what is
            wrong with anything but MLflow is on record as a failed run.
    """
    with registry.meant(config.tracking):  # candidate and production are of the registry that gets the report
        return _evaluate(config)


def _evaluate(config: DetectorEvaluation | CaptionerEvaluation) -> tuple[dict[str, Any], Judgement]:
    kind: Kind = "detector" if isinstance(config, DetectorEvaluation) else "captioner"
    started = time.monotonic()
    client = tracking.connect(config.tracking)
    uri = config.checkpoint or f"models:/{kind}@candidate"
    settings = config.model_dump(mode="json", exclude={"tracking", "output"})
    try:
        rules = read_rules(config.rules)
        checkpoint = _resolve(uri, kind)
        version = _version(client, uri, kind)
        against = _against(client, config.against, kind, checkpoint)
        examples = read_examples(config.data, kind, config.limit)
        if isinstance(config, DetectorEvaluation):
            for folder in config.extra:
                detector_report.pictures_below(folder)
    except Exception as error:
        tracking.refused(config.tracking, "evaluation", f"evaluate {uri}", error, {"model": uri} | settings)
        raise
    print(f"{checkpoint.name} on {len(examples.examples)} test pictures of {examples.name}", flush=True)
    if against is not None:
        print(f"compared with {against.name}", flush=True)

    with tracking.run(
        config.tracking,
        "evaluation",
        f"evaluate {checkpoint.name}",
        parameters={"model": checkpoint.name, "against": against.name if against else "none"} | settings,
        datasets=[
            DatasetInput(name=examples.name, version=examples.version, source=examples.uri, context="evaluation")
        ],
    ) as run:
        body = _examine(config, checkpoint, examples, against)
        report = {
            "kind": kind,
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "code_commit": tracking.code_commit(),
            "run": run.run_id,
            "model": describe(checkpoint),
            "dataset": examples.header() | {"pictures": len(examples.examples)},
            **body.figures,
            "settings": config.model_dump(mode="json", exclude={"tracking", "output", "data"}),
            "machine": platform.machine(),
            "seconds": round(time.monotonic() - started, 1),
        }
        judgement = judge(report, rules)
        report["gate"] = json.loads(judgement.model_dump_json())
        page, text = render_page(report, body.pictures), json.dumps(report, indent=1) + "\n"
        run.metrics(dict(_numbers(report)))
        run.tags({registry.GATE_TAG: "passed" if judgement.passed else "failed", "deeptrust.model": checkpoint.name})
        run.text(REPORT, text)
        run.text("report.html", page)
        if config.output is not None:
            config.output.mkdir(parents=True, exist_ok=True)
            (config.output / REPORT).write_text(text)
            (config.output / "report.html").write_text(page)
        if version is not None:
            registry.record_evaluation(client, version, run.run_id, judgement)
    return report, judgement


def _examine(
    config: DetectorEvaluation | CaptionerEvaluation,
    checkpoint: Checkpoint,
    examples: ExampleSet,
    against: Checkpoint | None,
) -> Body:
    options = {"resamples": config.resamples, "batch_size": config.batch_size, "seed": config.seed}
    if isinstance(config, DetectorEvaluation):
        captioner = resolve(config.people_by) if config.people_by else None
        return detector_report.examine(checkpoint, examples.examples, config, against, captioner=captioner, **options)
    tagger = resolve(config.tagger) if config.tagger else None
    return captioner_report.examine(checkpoint, examples.examples, config, against, tagger=tagger, **options)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """A model as reports name it."""
    card = checkpoint.card
    return {
        "uri": checkpoint.uri,
        "name": checkpoint.name,
        "revision": checkpoint.revision,
        "architecture": card.architecture,
        "thresholds": card.thresholds.model_dump(),
        "temperature": card.temperature,
        "trained_on": {key: card.dataset.get(key) for key in ("name", "version")},
        "code_commit": card.code_commit,
        "created_at": card.created_at,
    }


def _resolve(uri: str, kind: Kind) -> Checkpoint:
    checkpoint = resolve(uri)
    if checkpoint.card.task not in (TASKS[kind], "unknown"):
        raise EvaluationError(f"{uri} is a checkpoint for {checkpoint.card.task}, not a {kind}")
    return checkpoint


def _version(client: Any, uri: str, kind: Kind) -> ModelVersion | None:
    """The registry's version that a URI names, None for any other URI."""
    if not uri.startswith("models:/"):
        return None
    model, _, which = uri.removeprefix("models:/").partition("@" if "@" in uri else "/")
    if model != kind:
        raise EvaluationError(f"{uri} is no {kind} of the registry")
    return registry.find_version(client, model, which)


def _against(client: Any, named: str, kind: Kind, checkpoint: Checkpoint) -> Checkpoint | None:
    if named == "production":
        if "production" not in registry.aliases_of(client, kind):
            return None
        named = f"models:/{kind}@production"
    if not named:
        return None
    other = _resolve(named, kind)
    return None if other.revision == checkpoint.revision else other


def _numbers(report: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The report's main numbers by dotted name, in the letters that MLflow takes."""

    def walk(value: Any, name: str) -> Iterator[tuple[str, float]]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if key != "histogram":
                    yield from walk(inner, f"{name}.{key}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield re.sub(r"[^\w.\- ]", "_", name), float(value)

    for part in _METRICS:
        if part in report:
            yield from walk(report[part], part)


class EvaluateCommands(BaseModel):
    """One report for a model, judged by the gate."""

    model_config = ConfigDict(extra="forbid")

    detector: CliSubCommand[DetectorEvaluation]
    captioner: CliSubCommand[CaptionerEvaluation]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    from pydantic_settings import CliApp, get_subcommand

    config: Any = get_subcommand(CliApp.run(EvaluateCommands, cli_args=arguments))
    try:
        report, judgement = evaluate(config)
    except (TrackingError, GateError, CheckpointError, DataError, EvaluationError, registry.RegistryError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(map(str, judgement.checks)))
    print(f"gate {'passed' if judgement.passed else 'NOT passed'}; report: run {report['run']}", end="")
    print(f", {config.output / 'report.html'}" if config.output else "")
    if config.strict and not judgement.passed:
        sys.exit(1)


if __name__ == "__main__":
    main()
