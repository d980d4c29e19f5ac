"""From verified labels to a better detector in production, and nobody has to be there.

    python -m train.retrain --input RAW --prepared PREPARED --work WORK --feedback verified.parquet
    python -m train.retrain … --when labels --new-labels 200      # exits 0 with "nothing to do" until there are
    ray job submit --working-dir . -- python -m train.retrain …   # with absolute paths

Steps: a new data set version -> training from the checkpoint in production -> export where it is valid -> registered as
candidate -> judged (``train.gate`` and ``train.retrain_gate``) -> staging: answers beside production's to real
pictures, none returned -> canary -> watched -> promoted, or rolled back. A report is tied to the files that it is
about, so a candidate is registered before it is judged; what is refused stays a candidate and goes no further. Before
each alias it is judged again if another model came into production since.

Each step's outcome is a tag of one MLflow run (experiment ``retraining``): whatever kills this program, the same
command goes on after the last step that was finished, and a step that was begun goes on or replaces. One retraining
at a time (a lock in ``--work``, which every node sees). At the end ``retraining.html`` says what was done and why.

Knows no HTTP: the canary is driven by ``python -m app.canary``.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationError

from data import pages
from data.browse import pictures
from data.errors import DataError
from data.locations import Location
from data.prepare import AivshumanConfig, prepare
from data.versions import DataVersion, open_version
from deployments.checkpoints import CheckpointError, mlflow_uri, open_checkpoint, pinned, resolve
from deployments.detector import DetectorModel
from deployments.engines import EngineEntry
from train import detector, drift_reference, registry, tracking
from train.detector_report import score
from train.drift_reference import DriftReferenceConfig
from train.evaluate import DetectorEvaluation, EvaluationError, check_held_out, evaluate
from train.evaluation_page import TEMPLATES
from train.examples import read_examples
from train.export import ExportConfig, export
from train.gate import RULES, GateError
from train.module import TrainingError
from train.retrain_gate import RetrainRules, compare
from train.retrain_triggers import Last, TriggerSettings, count_labels, reason_to_begin
from train.tracking import KEY_TAG, Run, TrackingConfig, TrackingError

MODEL: registry.Kind = "detector"
EXPERIMENT = "retraining"
STEP_TAG, OUTCOME_TAG, LABELS_TAG = "deeptrust.step", "deeptrust.outcome", "deeptrust.verified_labels"
STEPS = ("base", "data", "train", "export", "register", "judge", "staging", "canary", "promote")
_ROOT = Path(__file__).parent.parent
#: Exit status of ``app.canary watch`` for a candidate that was rolled back.
_ROLLED_BACK = 3


class RetrainError(RuntimeError):
    """It cannot go on; the message says why and what to do. The same command goes on where it stopped."""


class RetrainConfig(TriggerSettings):
    """Settings of a retraining."""

    model_config = ConfigDict(extra="forbid")

    input: str | None = Field(None, description="raw data of aivshuman: folder, zip or s3://")
    feedback: list[str] = Field([], description="files of verified items; may be repeated")
    prepared: str = Field(description="where data set versions lie: PREPARED/aivshuman/VERSION; folder or s3://")
    work: Path = Field(description="folder for what is made on the way, seen by all nodes")
    prepare: dict[str, Any] = Field(default_factory=dict, description="further settings of data.prepare, as JSON")
    train: dict[str, Any] = Field(default_factory=dict, description="further settings of train.detector, as JSON")
    drift: dict[str, Any] = Field(default_factory=dict, description="settings of train.drift_reference, as JSON")
    evaluation: dict[str, Any] = Field(default_factory=dict, description="further settings of train.evaluate, as JSON")
    export: bool = Field(True, description="export the detector, for the kind of device that this runs on")
    rules: Path = Field(RULES, description="the gate for every model")
    gate: RetrainRules = Field(RetrainRules(), description="what a retrained model must show besides")
    deploy: bool = Field(True, description="off: end with a candidate that has passed")
    staging_share: float = Field(0.5, gt=0, le=1, description="of the pictures whose answers are compared in staging")
    canary_share: float = Field(0.1, gt=0, le=1, description="of the pictures that the canary answers")
    staging_rules: Path | None = Field(None, description="rules of app.canary in staging; unset: its own")
    canary_rules: Path | None = Field(None, description="rules of app.canary in the canary; unset: its own")
    interval_s: float = Field(15.0, gt=0, description="between two looks of the watcher")
    replay_clients: int = Field(
        0, ge=0, description="clients that send held-out pictures to --url in staging and canary; 0: users do"
    )
    url: str = Field("http://127.0.0.1:8000", description="the application, for --replay-clients")
    tracking: TrackingConfig = Field(TrackingConfig())


class Retraining:
    """One retraining, begun or gone on with."""

    def __init__(self, config: RetrainConfig, run: Run) -> None:
        self.config, self.run = config, run
        self.folder = config.work.expanduser().absolute() / f"retraining-{run.run_id[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.done: dict[str, dict[str, Any]] = {}

    def go(self) -> str:
        """All steps, or those that are left; returns the outcome: promoted, passed, refused or rolled back."""
        for name in STEPS[:6]:
            self._once(name, getattr(self, f"_{name}"))
        judged = self.done["judge"]
        if not judged["passed"] and not judged.get("again"):  # judged again, there may be a trial to end
            return "refused"
        if not self.config.deploy:
            return "passed"
        for name in STEPS[STEPS.index("staging") :]:
            outcome = self._once(name, getattr(self, f"_{name}"))
            if not outcome["passed"]:
                self._once("withdraw", self._withdraw)
                return "refused" if outcome.get("refused") else "rolled back"
        return "promoted"

    def _once(self, name: str, work: Callable[[], dict[str, Any]], again: bool = False) -> dict[str, Any]:
        tag = f"{STEP_TAG}.{name}"
        found = None if again else self.run.client.get_run(self.run.run_id).data.tags.get(tag)
        if found is None:
            say(f"{name} …")
            self.run.tags({STEP_TAG: name})
            started = time.monotonic()
            outcome = work() | {"seconds": round(time.monotonic() - started, 1)}
            self.run.tags({tag: json.dumps(outcome)})
        else:
            outcome = json.loads(found)
        self.done[name] = outcome
        say(f"{name}: {outcome['told']}" + (" (done before)" if found else ""))
        return outcome

    # ---- steps: each may be begun again ------------------------------------------------------------------------

    def _base(self) -> dict[str, Any]:
        if "production" not in registry.aliases_of(self.run.client, MODEL):
            raise RetrainError(
                f"no {MODEL} of the registry is in production, so there is nothing to start from: "
                f"`python -m train.registry register {MODEL} --checkpoint …`, evaluate and promote it"
            )
        uri = pinned(f"models:/{MODEL}@production")
        return {"uri": uri, "revision": resolve(uri).revision, "told": uri}

    def _data(self) -> dict[str, Any]:
        config = self.config
        if config.input is None:
            version = open_version(f"{config.prepared}/aivshuman")
        else:
            settings = {"input": config.input, "output": config.prepared, "feedback": config.feedback, "report": False}
            version = prepare(AivshumanConfig.model_validate(settings | config.prepare)).version
        manifest = version.manifest
        # what judging would refuse, before hours of training
        check_held_out(read_examples(str(version.location), MODEL), resolve(self.done["base"]["uri"]))
        older = [name.partition("/")[2] for name in manifest.settings.get("with_version", []) if "aivshuman/" in name]
        labels = count_labels(config.feedback)
        self.run.tags({LABELS_TAG: str(labels)})
        counts = ", ".join(f"{count} {split}" for split, count in manifest.counts.items())
        return {
            "version": manifest.version,
            "place": str(version.location),
            "older": older[-1] if older else None,
            "labels": labels,
            "told": f"aivshuman/{manifest.version}: {counts}; {labels} verified labels",
        }

    @property
    def version(self) -> DataVersion:
        """The new data set version."""
        return open_version(self.done["data"]["place"])

    def _train(self) -> dict[str, Any]:
        output = self.folder / "trained"
        settings = {
            "data": self.done["data"]["place"],
            "model": self.done["base"]["uri"],
            "output": str(output),
            "storage": str(self.folder / "runs"),
            "name": f"retrain-{self.run.run_id[:12]}",
            "tracking": self.config.tracking,
        }
        outcome = detector.train(detector.DetectorTraining.model_validate(settings | self.config.train))
        if outcome.status != "finished":
            raise RetrainError(f"training stopped after step {outcome.steps} of {outcome.total_steps}: run it again")
        figures = ", ".join(f"{name} {value:.4f}" for name, value in outcome.metrics.items())
        told = f"{outcome.steps} steps: {figures}; {self._reference(output)}"
        return {"folder": str(output), "steps": outcome.steps, "told": told}

    def _reference(self, checkpoint: Path) -> str:
        """What the new detector will be watched for drift with, in its folder before that is registered."""
        settings = {"checkpoint": str(checkpoint), "data": self.done["data"]["place"]}
        try:
            _, made = drift_reference.make(DriftReferenceConfig.model_validate(settings | self.config.drift))
        except (CheckpointError, DataError) as error:  # it serves as well without one, unwatched
            return f"no reference for drift: {error}"[:500]
        return f"reference for drift of {len(made.rows)} pictures"

    def _export(self) -> dict[str, Any]:
        trained, output = Path(self.done["train"]["folder"]), self.folder / "exported"
        if not self.config.export:
            return {"folder": str(trained), "told": "none: served by PyTorch"}
        photos = self.folder / "photos"
        shutil.rmtree(output, ignore_errors=True)
        photos.mkdir(exist_ok=True)
        ids = self.version.table("val", ["id"])["id"].slice(0, 64).to_pylist()
        for id_, data in pictures(self.version, ids, ["val"]).items():
            (photos / f"{id_}.jpg").write_bytes(data)
        try:
            export(ExportConfig(checkpoint=str(trained), photos=photos, output=output, count=64, rounds=3))
        except (CheckpointError, ImportError) as error:  # an architecture that no engine takes; no exporter here
            return {"folder": str(trained), "told": f"none: {error}"[:500]}
        engines = [EngineEntry.model_validate(each).name for each in open_checkpoint(output, str(output)).card.engines]
        return {"folder": str(output), "told": ", ".join(engines) or "none was as exact and faster than PyTorch"}

    def _register(self) -> dict[str, Any]:
        version = registry.register(self.run, MODEL, Path(self.done["export"]["folder"]))
        uri = f"models:/{MODEL}/{version.version}"
        return {"version": str(version.version), "uri": uri, "told": f"{uri}, alias candidate"}

    def _judge(self) -> dict[str, Any]:
        place, uri = self.done["data"]["place"], self.done["register"]["uri"]
        # not what training started from, hours ago: promotion wants a comparison with what is in production now
        base = pinned(f"models:/{MODEL}@production")
        settings: dict[str, Any] = {
            "data": place,
            "checkpoint": uri,
            "against": base,
            "rules": self.config.rules,
            "output": self.folder / "evaluation",
            "tracking": self.config.tracking,
            "damages": False,
            "people_by": "",
        }
        chosen = DetectorEvaluation.model_validate(settings | self.config.evaluation)
        report, judgement = evaluate(chosen)
        production, found = resolve(base), read_examples(place, MODEL, chosen.limit)
        examples = found.examples
        before, _ = score(DetectorModel(production), examples, ["clean"], chosen.batch_size)
        shown = compare(
            report["labels"],
            {id_: row[0] for id_, row in report["probabilities"].items()},
            {example.id: float(row[0]) for example, row in zip(examples, before, strict=True)},
            self._old_ids(found.beside(production.card.dataset)),
            {example.id: example.group or example.id for example in examples},
            self.config.gate,
        )
        client, failures = self.run.client, judgement.failures
        version = registry.find_version(client, MODEL, self.done["register"]["version"])
        if (reason := registry.objection(client, MODEL, version, report)) is not None:  # e.g. settings with a limit
            failures = [f"{uri} {reason}", *failures]
        checks = [str(check) for check in judgement.checks]
        passed = not failures and all(each.passed for each in shown)
        told = "; ".join(f"{each.rule}: {'yes' if each.passed else 'NO'}, {each.text}" for each in shown)
        gate = f"gate: {len(judgement.checks) - len(judgement.failures)} of {len(checks)} checks"
        return {
            "passed": passed,
            "evaluation": report["run"],
            "shown": [each.model_dump() for each in shown],
            "failures": failures[:5],
            "told": f"{'passed' if passed else 'REFUSED'}: {told}; {gate}",
        }

    def _old_ids(self, version: DataVersion | None) -> set[str]:
        """Ids of all pictures of the version that production was trained on; None, its card does not say: of the one
        that the new version was divided with."""
        if version is None:
            older = self.done["data"]["older"]
            if older is None:
                return set(self.version.table("test", ["id"])["id"].to_pylist())
            version = open_version(f"{self.config.prepared}/aivshuman/{older}")
        return {id_ for split in version.manifest.counts for id_ in version.table(split, ["id"])["id"].to_pylist()}

    def _staging(self) -> dict[str, Any]:
        if (why := self._refused("staging")) is not None:
            return self._ended(why)
        share, rules = self.config.staging_share, self.config.staging_rules
        return self._tried("staging", share, rules, start=["--shadow"], watch=["--no-promote"])

    def _canary(self) -> dict[str, Any]:
        if (why := self._refused("canary")) is not None:
            return self._ended(why)
        return self._tried("canary", self.config.canary_share, self.config.canary_rules, start=[], watch=[])

    def _tried(
        self, name: str, share: float, rules: Path | None, start: Sequence[str], watch: Sequence[str]
    ) -> dict[str, Any]:
        uri, log = self.done["register"]["uri"], self.folder / f"{name}.jsonl"
        looks = [f"--interval-s={self.config.interval_s}", f"--log={log}"]
        looks += [f"--rules={rules.absolute()}"] if rules else []
        if (why := _rejected(log, uri)) is not None:
            status, said = canary("rollback", MODEL)
            if status:
                raise RetrainError(f"the {name} was not rolled back: {said}")
            return {"passed": False, "told": f"rolled back: {why}"[:1000]}
        with self._replay(name):
            status, said = canary("start", MODEL, f"--uri={uri}", f"--share={share}", *start)
            # killed after the promotion and before this step's tag: it is in production already
            if status and "in production already" not in said:
                raise RetrainError(f"the {name} did not start: {said}")
            status, said = canary("watch", MODEL, f"--uri={uri}", *looks, *watch)
        if status not in (0, _ROLLED_BACK):
            raise RetrainError(f"the watcher of the {name} ended with {status}: {said}")
        return {"passed": status == 0, "told": said[-1000:]}

    def _promote(self) -> dict[str, Any]:
        number = self.done["register"]["version"]
        before = registry.aliases_of(self.run.client, MODEL).get("production")
        if before != number and (why := self._refused("production")) is not None:
            return self._ended(why, "--production")  # the watcher of the canary has promoted it in the application
        return {"passed": True, "told": f"{MODEL} {number} is in production, before: {before}"}

    def _refused(self, to: registry.Stage) -> str | None:
        """Give the candidate an alias; why it may not have it, None: it has it. It is judged again where its report is
        no ground any more: another model came into production since, with which nobody has compared it."""
        client, number = self.run.client, self.done["register"]["version"]
        version = registry.find_version(client, MODEL, number)
        try:
            reason = registry.objection(client, MODEL, version, registry.read_report(client, version))
        except registry.RegistryError as error:  # the report is gone
            reason = str(error)
        if reason is not None:
            say(f"{MODEL} {number} {reason}"[:1000])
            self._once("judge", lambda: self._judge() | {"again": True}, again=True)
        if not self.done["judge"]["passed"]:
            return str(self.done["judge"]["told"])
        try:
            registry.promote(client, MODEL, number, to, self.config.rules)
        except registry.RegistryError as error:  # the rules may be others than they were
            return str(error)
        return None

    def _ended(self, why: str, *what: str) -> dict[str, Any]:
        """The outcome of a step that was refused; a trial of the candidate, if there may be one, is at its end."""
        given = registry.aliases_of(self.run.client, MODEL)
        if self.done["register"]["version"] in (given.get("staging"), given.get("canary")):
            status, said = canary("rollback", MODEL, *what)
            if status:
                raise RetrainError(f"the trial was not ended: {said}")
        return {"passed": False, "refused": True, "told": why[:1000]}

    def _withdraw(self) -> dict[str, Any]:
        number, given = self.done["register"]["version"], registry.aliases_of(self.run.client, MODEL)
        for alias in ("staging", "canary"):
            if given.get(alias) == number:
                self.run.client.delete_registered_model_alias(MODEL, alias)
        return {"told": f"{MODEL} {number} is a candidate again"}

    @contextlib.contextmanager
    def _replay(self, name: str) -> Iterator[None]:
        """Held-out pictures for the application while a trial runs, where users send too few."""
        if not self.config.replay_clients:
            yield
            return
        settings = [f"--url={self.config.url}", f"--clients={self.config.replay_clients}", "--pattern=constant"]
        command = [sys.executable, "-m", "data.simulate", self.done["data"]["place"], *settings, "--phase-s=86400"]
        folder = self.folder / f"replay-{name}"
        with (self.folder / f"replay-{name}.log").open("a") as log:
            process = subprocess.Popen([*command, f"--output={folder}"], cwd=_ROOT, stdout=log, stderr=log)
            try:
                yield
            finally:
                process.terminate()
                process.wait()

    # ---- the end -----------------------------------------------------------------------------------------------

    def page(self, outcome: str) -> str:
        """The summary as HTML."""
        rows = [(name, step["told"], float(step["seconds"])) for name, step in self.done.items()]
        return pages.render(
            "retraining.html",
            folder=TEMPLATES,
            outcome=outcome,
            run=self.run.run_id,
            steps=rows,
            shown_rows=[
                ("passed" if each["passed"] else "refused", each["rule"], each["pictures"], each["text"])
                for each in self.done.get("judge", {}).get("shown", [])
            ],
            failures=self.done.get("judge", {}).get("failures", []),
        )


def _rejected(log: Path, uri: str) -> str | None:
    """Why the watcher's last look was the end of this candidate's trial; None: it was not. The watcher writes down what
    it decides before it does it, and may have done it just before this program was killed."""
    lines = log.read_text().splitlines() if log.is_file() else []
    try:
        last = json.loads(lines[-1])
    except (IndexError, ValueError):  # it has not looked yet, or was killed while it wrote
        return None
    return str(last["why"]) if last["action"] == "roll_back" and last["candidate"]["uri"] == uri else None


def canary(*arguments: str) -> tuple[int, str]:
    """``python -m app.canary``: exit status, and the last lines that it said. What it says is passed on."""
    command = [sys.executable, "-m", "app.canary", *arguments]
    said: list[str] = []
    with subprocess.Popen(
        command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            say(f"  {line.rstrip()}")
            said.append(line.strip())
    return process.returncode, " / ".join(said[-2:])


def retrain(config: RetrainConfig) -> str:
    """One retraining from its trigger to its end; returns the outcome, or why there was nothing to do.

    Raises:
        RetrainError, and the errors of its steps: the same command goes on.
    """
    os.environ["MLFLOW_TRACKING_URI"] = config.tracking.uri or mlflow_uri()
    config.work.expanduser().mkdir(parents=True, exist_ok=True)
    with _alone(config.work.expanduser()):
        client = tracking.connect(config.tracking)
        reason = "goes on" if _begun(client) else None
        reason = reason or reason_to_begin(
            config,
            _last(client),
            count_labels(config.feedback),
            datetime.datetime.now(datetime.UTC),
            lambda: revision_in_production(client),
        )
        if reason is None:
            return "nothing to do"
        say(f"retraining: {reason}")
        options: dict[str, Any] = {"key": _key(), "parameters": config.model_dump(mode="json", exclude={"tracking"})}
        with tracking.run(config.tracking, EXPERIMENT, f"retrain {MODEL}", **options) as run:
            run.tags({"deeptrust.reason": reason} if reason != "goes on" else {})
            retraining = Retraining(config, run)
            outcome = retraining.go()
            page = retraining.page(outcome)
            (retraining.folder / "retraining.html").write_text(page)
            run.text("retraining.html", page)
            run.tags({OUTCOME_TAG: outcome})
        say(f"{outcome}; summary: {retraining.folder / 'retraining.html'}, MLflow run {run.run_id}")
        return outcome


def _key() -> str:
    return f"retrain:{MODEL}"


def runs(client: Any) -> list[Any]:
    """MLflow runs of retrainings, the newest first."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    wanted = f"tags.`{KEY_TAG}` = '{_key()}'"
    return list(client.search_runs([experiment.experiment_id], wanted, order_by=["attributes.start_time DESC"]))


def revision_in_production(client: Any) -> str | None:
    """As metrics and alerts name it; None: nothing is in production."""
    if "production" not in registry.aliases_of(client, MODEL):
        return None
    return registry.find_version(client, MODEL, "production").tags.get(registry.REVISION_TAG)


def _begun(client: Any) -> bool:
    """Whether one was begun and has not come to its end."""
    return any(run.info.status != "FINISHED" for run in runs(client))


def _last(client: Any) -> Last | None:
    for run in runs(client):
        began = datetime.datetime.fromtimestamp(run.info.start_time / 1000, datetime.UTC)
        return Last(began, int(run.data.tags.get(LABELS_TAG, "0")))
    return None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other retraining in this folder for the length of the block.

    Raises:
        RetrainError: one is running.
    """
    with Location.of(folder.absolute()).alone(RetrainError(f"a retraining is running in {folder}: one at a time")):
        yield


def say(text: str) -> None:
    """A line for people."""
    print(text, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Command line; exit status 0 whatever the outcome, 1 when it cannot go on."""
    from pydantic_settings import CliApp

    try:
        say(retrain(CliApp.run(RetrainConfig, cli_args=arguments)))
    except (RetrainError, TrainingError, DataError, CheckpointError, TrackingError, GateError) as error:
        sys.exit(f"error: {error}")
    except (EvaluationError, registry.RegistryError, ValidationError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
