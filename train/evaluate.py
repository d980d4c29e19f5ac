"""One report for a model: figures, plots and pictures, judged by the gate, on record in MLflow.

In: a checkpoint URI and a data set (its test split alone is read). Out: ``report.json``, ``report.html`` and the
gate's verdict, in a folder and as artifacts of a run of the experiment ``evaluation``. When the checkpoint is a version
of the registry (``models:/detector@candidate``), the report is tied to that version, and ``train.registry promote``
reads it. The model in production, if there is one, is compared with on the same pictures.

What is measured: ``train.detector_report``, ``train.captioner_report`` and ``train.tagger_report``. What cannot be
measured here (no tagger, no WordNet, nothing in production) is said on the page, in the JSON (``not_measured``) and on
the command line. A model that was trained on some of the test pictures is not evaluated on them. Knows no training.

    python -m train.evaluate detector --data DATA/aivshuman --checkpoint models:/detector@candidate
    python -m train.evaluate captioner --data DATA/flickr30k --checkpoint starter:captioner
    python -m train.evaluate tagger --data DATA/flickr30k --checkpoint starter:tagger
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliSubCommand

from data.errors import DataError
from deployments.checkpoints import Checkpoint, CheckpointError, cache_root, resolve
from train import captioner_report, detector_report, registry, tagger_report, tracking
from train.captioner_report import CaptionerSettings
from train.detector_report import DetectorSettings
from train.evaluation_page import render_page
from train.examples import ExampleSet, read_examples
from train.gate import RULES, GateError, Judged, Judgement, judge, read_rules
from train.registry import REPORT, TASKS
from train.report import Body
from train.tagger_report import TaggerSettings
from train.tracking import DatasetInput, TrackingConfig, TrackingError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

#: Parts of a report whose numbers become metrics of the run.
_METRICS = (
    *("tiers", "damages", "unseen", "leakage", "source_leakage", "scores", "length", "templates", "made_up", "tags"),
    *("retrieval", "comparison"),
)
_TASKS = {**TASKS, "tagger": "tagging"}


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
    output: Path | None = Field(
        None,
        description="folder that gets report.json and report.html beside MLflow; unset: they are kept, in the cache, "
        "only when MLflow does not take them",
    )
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
    seed: int = 7


class TaggerEvaluation(EvaluationConfig, TaggerSettings):
    """Evaluate a tagger."""

    batch_size: int = Field(16, ge=1, description="of the captioner, if one writes the captions")


Evaluation = DetectorEvaluation | CaptionerEvaluation | TaggerEvaluation
_KINDS: dict[type[EvaluationConfig], Judged] = {
    DetectorEvaluation: "detector",
    CaptionerEvaluation: "captioner",
    TaggerEvaluation: "tagger",
}


def evaluate(config: Evaluation) -> tuple[dict[str, Any], Judgement]:
    """Measure, judge, write and record.

    Raises:
        TrackingError, GateError, CheckpointError, DataError, EvaluationError: before anything is measured; what is
            wrong with anything but MLflow is on record as a failed run.
        TrackingError: when all is measured and written, and MLflow does not take it.
    """
    with registry.meant(config.tracking):  # candidate and production are of the registry that gets the report
        return _evaluate(config)


def _evaluate(config: Evaluation) -> tuple[dict[str, Any], Judgement]:
    kind = _KINDS[type(config)]
    started = time.monotonic()
    client = tracking.connect(config.tracking)
    uri = config.checkpoint or ("starter:tagger" if kind == "tagger" else f"models:/{kind}@candidate")
    settings = config.model_dump(mode="json", exclude={"tracking", "output"})
    try:
        rules = read_rules(config.rules)
        rules.of(kind)
        checkpoint = _resolve(uri, kind)
        version = _version(client, uri, kind)
        against = _against(client, config.against, kind, checkpoint)
        examples = read_examples(config.data, kind, config.limit)
        trained = () if kind == "tagger" else (checkpoint, against)  # taggers are prompted
        unknown = [told for model in trained if model is not None and (told := check_held_out(examples, model))]
        if isinstance(config, DetectorEvaluation):
            if config.extra is None:
                config = config.model_copy(update={"extra": _styles(config.data)})
            for folder in config.extra or ():
                detector_report.pictures_below(folder)
    except Exception as error:
        tracking.refused(config.tracking, "evaluation", f"evaluate {uri}", error, {"model": uri} | settings)
        raise
    print(f"{checkpoint.name} on {len(examples.examples)} test pictures of {examples.name}", flush=True)
    if against is not None:
        print(f"compared with {against.name}", flush=True)

    written: list[Path] = []
    source = DatasetInput(name=examples.name, version=examples.version, source=examples.uri, context="evaluation")
    opened = tracking.run(
        config.tracking,
        "evaluation",
        f"evaluate {checkpoint.name}",
        parameters={"model": checkpoint.name, "against": against.name if against else "none"} | settings,
        datasets=[source],
    )
    with _recording(written), opened as run:
        body = _examine(config, checkpoint, examples, against)
        body.figures["not_measured"] += unknown
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
        place = config.output or cache_root() / "evaluations" / run.run_id
        place.mkdir(parents=True, exist_ok=True)
        (place / REPORT).write_text(text)
        (place / "report.html").write_text(page)
        written.append(place / REPORT)
        run.metrics(dict(_numbers(report)))
        run.tags({registry.GATE_TAG: "passed" if judgement.passed else "failed", "deeptrust.model": checkpoint.name})
        run.text(REPORT, text)
        run.text("report.html", page)
        if version is not None:
            registry.record_evaluation(client, version, run.run_id, judgement)
    if config.output is None:
        shutil.rmtree(place, ignore_errors=True)
    return report, judgement


@contextmanager
def _recording(written: list[Path]) -> Iterator[None]:
    """What MLflow raises when the report is written already."""
    try:
        yield
    except Exception as error:  # of any store
        if not written:
            raise
        raise TrackingError(
            f"the report is written to {written[0]}, but MLflow did not take it ({tracking.describe(error)}), so "
            "it promotes nothing: when it answers, the same command measures again and puts it on record"
        ) from error


def _examine(
    config: Evaluation,
    checkpoint: Checkpoint,
    examples: ExampleSet,
    against: Checkpoint | None,
) -> Body:
    options = {"resamples": config.resamples, "batch_size": config.batch_size, "seed": config.seed}
    if isinstance(config, DetectorEvaluation):
        captioner, missing = _helper(config.people_by, "captioner")
        classifier = resolve(config.source_classifier) if config.source_classifier else None
        body = detector_report.examine(
            checkpoint, examples.examples, config, against, captioner=captioner, classifier=classifier, **options
        )
    elif isinstance(config, CaptionerEvaluation):
        tagger, missing = _helper(config.tagger, "tagger")
        body = captioner_report.examine(checkpoint, examples.examples, config, against, tagger=tagger, **options)
    else:
        captioner, missing = (resolve(config.captions_by) if config.captions_by else None), []
        body = tagger_report.examine(checkpoint, examples.examples, captioner, **options)
    body.figures["not_measured"] = [*missing, *body.figures["not_measured"]]
    return body


def check_held_out(examples: ExampleSet, checkpoint: Checkpoint) -> str | None:
    """Make sure that a model was trained and tuned on none of the examples, by the data that its card names, those that
    it was trained on before included; returns why nobody can tell, None: it was not.

    Raises:
        EvaluationError: it was.
    """
    missing = []
    for dataset in (checkpoint.card.dataset, *checkpoint.card.dataset.get("before", [])):
        if examples.keeps_sides_of(dataset):
            continue
        version = examples.beside(dataset)
        if version is None:
            has_version = dataset.get("version")
            missing.append(f"{dataset.get('name')} {has_version}" if has_version else "no version of its data")
            continue
        seen = {id_ for split in ("train", "val") for id_ in version.table(split, ["id"])["id"].to_pylist()}
        if known := sum(example.id in seen for example in examples.examples):
            raise EvaluationError(
                f"{checkpoint.uri} was trained or tuned on {known} of the {len(examples.examples)} test pictures of "
                f"{examples.uri}: evaluate it on the version that had them for that, --data {version.location}, or "
                f"prepare the data again with --with-version {version.location}, and train on that"
            )
    if not missing:
        return None
    return (
        f"whether the test pictures were trained on: the card of {checkpoint.name} names {' and '.join(missing)}, and "
        f"beside {examples.uri} there is none such"
    )


def _helper(uri: str, starter: str) -> tuple[Checkpoint | None, list[str]]:
    """The model that a part of a report needs, and why it is missing; ``auto``: the starter model where it can be had.

    Raises:
        CheckpointError: one was named and is not there.
    """
    if uri != "auto":
        return (resolve(uri) if uri else None), []
    if starter == "tagger" and importlib.util.find_spec("vllm") is None:
        return None, ["starter:tagger, which writes the tags, cannot run: vLLM is not installed"]
    try:
        return resolve(f"starter:{starter}"), []
    except CheckpointError as error:
        return None, [f"starter:{starter} cannot be had: {error}"]


def _styles(data: str) -> list[Path]:
    """The folder ``ghibli`` beside a data set or its versions, if there is one."""
    if "://" in data:
        return []
    beside = [folder / "ghibli" for folder in Path(data).expanduser().absolute().parents[:3]]
    return [folder for folder in beside if folder.is_dir()][:1]


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


def _resolve(uri: str, kind: Judged) -> Checkpoint:
    checkpoint = resolve(uri)
    if checkpoint.card.task not in (_TASKS[kind], "unknown"):
        raise EvaluationError(f"{uri} is a checkpoint for {checkpoint.card.task}, not a {kind}")
    return checkpoint


def _version(client: Any, uri: str, kind: Judged) -> ModelVersion | None:
    """The registry's version that a URI names, None for any other URI."""
    if not uri.startswith("models:/"):
        return None
    model, _, which = uri.removeprefix("models:/").partition("@" if "@" in uri else "/")
    if model != kind:
        raise EvaluationError(f"{uri} is no {kind} of the registry")
    return registry.find_version(client, model, which)


def _against(client: Any, named: str, kind: Judged, checkpoint: Checkpoint) -> Checkpoint | None:
    if kind == "tagger":
        if named not in ("", "production"):
            raise EvaluationError("taggers are not compared: evaluate each and hold the reports side by side")
        return None
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
    tagger: CliSubCommand[TaggerEvaluation]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    from pydantic_settings import CliApp, get_subcommand

    config: Any = get_subcommand(CliApp.run(EvaluateCommands, cli_args=arguments))
    try:
        report, judgement = evaluate(config)
    except (TrackingError, GateError, CheckpointError, DataError, EvaluationError, registry.RegistryError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(map(str, judgement.checks)))
    for told in report["not_measured"]:
        print(f"NOT MEASURED {told}")
    print(f"gate {'passed' if judgement.passed else 'NOT passed'}; report: run {report['run']}", end="")
    print(f", {config.output / 'report.html'}" if config.output else "")
    if config.strict and not judgement.passed:
        sys.exit(1)


if __name__ == "__main__":
    main()
