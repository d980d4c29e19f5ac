"""Search for good settings of a trainer: Ray Tune proposes (Optuna), stops what falls behind (ASHA), keeps the best.

In: a trainer's own settings, and the space in which some of them vary. Out: the best trial's checkpoint at ``--output``
and in the registry as a candidate, a page with every trial's curve, a parent run in MLflow with a child for each trial.

Each trial is a Ray Train run of its own, with its own checkpoints. A sweep is named by ``--storage`` and ``--name``:
started again after whatever killed it, it goes on, and so do the trials that were running; a second start while the
first lives is refused as a run's is. A trial whose loss becomes
NaN, or that cannot run with its settings, fails alone. Knows no task.

    python -m train.sweep detector --data DATA/aivshuman --output BEST --trials 8 --epochs 4 [--space space.yaml]
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_settings import CliSubCommand

from data.locations import Location
from data.session import RaySettings, ray_session
from deployments.checkpoints import mlflow_uri, open_checkpoint
from train import captioner, detector, registry, tracking
from train.command import check_space, end, running
from train.gate import Kind
from train.module import TrainingError
from train.publication import check_output, is_published, publish
from train.run_folder import as_finished, base_of, changed_settings, data_of, inputs_as_kept, reported
from train.settings import TrainCommand
from train.sweep_page import TrialOutcome, counts_of, render_page
from train.sweep_settings import AnySweep, CaptionerSweep, DetectorSweep, Span, kind_of, read_space, trial_config
from train.tracking import FAILURE_TAG, Run

#: What a trial reports and is judged by: the best value so far of the trainer's own validation figure.
METRIC = "best"
#: Written last, beside the sweep's state: all trials.
_DONE = "trials.json"


def run_trial(parameters: dict[str, Any], sweep: dict[str, Any], kind: Kind, parent: str | None) -> None:
    """One trial, in a process of Ray Tune."""
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    config = (DetectorSweep if kind == "detector" else CaptionerSweep).model_validate(sweep)
    settings = trial_config(config, parameters, tune.get_context().get_trial_id(), parent)
    train: Any = detector.train if kind == "detector" else captioner.train
    outcome = train(settings, (TuneReportCallback(),), parent)
    last = {name: value for name, value in outcome.metrics.items() if isinstance(value, (int, float))}
    # the run's own reports have said how good it is; this one says that its checkpoint is whole
    tune.report({"finished": 1, "step": outcome.steps, METRIC: _best_of(settings), **last})


def _best_of(settings: TrainCommand) -> float:
    """The run's best validation figure, from the progress beside its last checkpoint."""
    place = Location.of(settings.storage) / settings.name
    values = [json.loads((place / folder / "progress.json").read_text())["best"] for folder in reported(place)]
    return float(values[-1]) if values else -math.inf


def sweep(config: AnySweep) -> tuple[list[TrialOutcome], bool]:
    """Run or go on with a sweep; returns its trials, and whether it is done (the time limit ends it before).

    Raises:
        TrainingError, TrackingError, DataError: before a trial starts; or no trial came to its end.
    """
    with registry.meant(config.tracking), ExitStack() as held:
        return _sweep(config, held)


def _sweep(config: AnySweep, held: ExitStack) -> tuple[list[TrialOutcome], bool]:
    place, told = Location.of(config.storage) / config.name, ""
    try:
        space = read_space(config)
        place.make_dir()
        held.enter_context(place.alone(running(config, place)))
        output = Location.of(config.output)
        check_output(output)
        _check_same(config, space, place)
        done = (place / _DONE).exists()
        if done:
            kept = json.loads((place / "sweep.json").read_text()).get("inputs")
            told = as_finished(config, _trainer(config).base_of, kept)
        else:
            config = _with_inputs(config, place)
    except Exception as error:
        if config.record:
            tracking.refused(config.tracking, kind_of(config), config.name, error, _parameters(config))
        raise
    if done:
        print(f"sweep {told}: nothing was tried; give another --name to search anew", flush=True)
        trials = [TrialOutcome.model_validate(each) for each in json.loads((place / _DONE).read_text())]
        best = _best_trial(trials)
        if best is not None and not is_published(place / "models" / best.id, output):
            with _model_of(best, place) as folder:
                publish(folder, output)
        return trials, True
    parent = None
    if config.record:
        parent = tracking.start(
            config.tracking,
            kind_of(config),
            config.name,
            key=str(place),
            parameters=_parameters(config) | {"space": {name: span.model_dump() for name, span in space.items()}},
            tags={"deeptrust.sweep": "parent"},
        )
    try:
        trials, done = _tune(config, space, place, parent)
        if done:
            _conclude(config, trials, place, parent)
    except BaseException as error:
        if parent is not None:
            parent.close(error)
        raise
    if parent is not None:
        parent.close(None if done else SystemExit("time limit"))
    return trials, done


def _parameters(config: AnySweep) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"tracking", "record"})


def _trainer(config: AnySweep) -> Any:
    return detector if kind_of(config) == "detector" else captioner


def _with_inputs(config: AnySweep, place: Location) -> AnySweep:
    """The sweep on the data version and the model that its settings name now, or named when it was started: every
    trial has the same. Both are opened, so that what no trial could use is told before any starts.

    Raises:
        TrainingError, DataError, CheckpointError: data or model are missing, or not fit for the trainer.
    """
    trainer = _trainer(config)
    file = place / "sweep.json"
    before = json.loads(file.read_text())
    kept = before.get("inputs")
    version = data_of(config, kept)
    checkpoint = base_of(config, trainer.base_of, version, kept)
    _, parameters = trainer.prepare_job(config, version, checkpoint)
    # of a sweep that goes on, nobody knows here how many trials have theirs already
    check_space(config, place, parameters, config.concurrent if kept else config.trials, config.concurrent)
    if kept is None:
        if (place / "tune").exists():
            return config  # from before inputs were kept: its trials know them as the settings have them
        file.write_text(json.dumps(before | {"inputs": inputs_as_kept(config, version, checkpoint)}, indent=1))
    model = checkpoint.uri if checkpoint.uri.startswith("models:/") else config.model
    return config.model_copy(update={"data": str(version.location), "model": model})


def _as_sent(config: AnySweep) -> dict[str, Any]:
    """The settings for trials, in whose processes the environment may name another registry."""
    tracking_here = config.tracking.model_copy(update={"uri": mlflow_uri()})
    return config.model_copy(update={"tracking": tracking_here}).model_dump(mode="json")


def _tune(
    config: AnySweep, space: Mapping[str, Span], place: Location, parent: Run | None
) -> tuple[list[TrialOutcome], bool]:
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # trials keep this folder
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "0")
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")  # what a kill may lose
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    own = RaySettings(num_cpus=config.num_cpus, object_store_bytes=config.object_store_bytes)
    # or every trial that is stopped early would keep the CPUs of its workers, until there are none for the next
    with ray_session(own, state_api=True):
        trainable = tune.with_resources(
            tune.with_parameters(
                run_trial,
                sweep=_as_sent(config),
                kind=kind_of(config),
                parent=parent.run_id if parent else None,
            ),
            # a trial only waits for its run's workers; with a CPU each, two trials would starve them. Tune refuses 0
            {"cpu": 0.001},
        )
        storage: dict[str, Any] = {} if place.is_local else {"storage_filesystem": place.arrow_filesystem}
        state = (place / "tune").path
        if tune.Tuner.can_restore(state, **storage):
            print(f"going on with {config.name}", flush=True)
            tuner = tune.Tuner.restore(state, trainable, resume_unfinished=True, **storage)
            try:
                before = list(tuner.get_results())
            except RuntimeError:  # no trial has answered yet
                before = []
            if _worth_another_try(before):
                tuner = tune.Tuner.restore(state, trainable, resume_unfinished=True, resume_errored=True, **storage)
        else:
            logging.getLogger("optuna").setLevel(logging.WARNING)
            tuner = tune.Tuner(
                trainable,
                param_space={name: span.domain() for name, span in space.items()},
                tune_config=tune.TuneConfig(
                    metric=METRIC,
                    mode="max",
                    search_alg=OptunaSearch(seed=config.seed),
                    scheduler=scheduler(config),
                    num_samples=config.trials,
                    max_concurrent_trials=config.concurrent,
                ),
                run_config=tune.RunConfig(name="tune", storage_path=place.path, verbose=1, **storage),
            )
        with _time_limit(config.limit_s) as over:
            results = tuner.fit()
        trials = [_outcome(result, over.is_set()) for result in results]
    return trials, not over.is_set() and all(trial.status != "unfinished" for trial in trials)


def scheduler(config: AnySweep) -> Any:
    """ASHA whose rungs are numbers of validations: trials are compared after as many, however often they report and
    wherever they went on from, and none before its first."""
    from ray.air.constants import EXPR_RESULT_FILE
    from ray.tune.schedulers import ASHAScheduler

    class Scheduler(ASHAScheduler):
        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            """Ray keeps trials and no scheduler: in a sweep that goes on, each comes with what it reported before."""
            super().on_trial_add(tune_controller, trial)
            if trial.storage.trial_dir_name is None:
                return  # a new one
            here, kept = Path(trial.local_path, EXPR_RESULT_FILE), f"{trial.storage.trial_fs_path}/{EXPR_RESULT_FILE}"
            # Ray appends to what it has here, and would put that in the place of what is kept
            if not here.exists():
                with suppress(FileNotFoundError), trial.storage.storage_filesystem.open_input_stream(kept) as file:
                    here.write_bytes(file.readall())
            if here.exists():
                text = here.read_bytes()
                here.write_bytes(whole := text[: text.rfind(b"\n") + 1])  # a kill may tear the last line
                for line in whole.splitlines():
                    self.on_trial_result(tune_controller, trial, json.loads(line))

    return Scheduler(
        time_attr="validations",
        max_t=10**6,  # rungs far beyond any run: coming to the last one must not end a run before it has exported
        grace_period=config.grace,
        reduction_factor=config.reduction,
        stop_last_trials=False,  # or a rung whose report a kill has lost would get what the trial came to much later
    )


def _worth_another_try(results: Iterable[Any]) -> bool:
    """Whether failed trials of a sweep that goes on are run again: one failed by something other than its settings
    (data that were away, MLflow that was down), or none came to its end. They go on from their own checkpoints."""
    results = list(results)
    failed = [result.error for result in results if result.error is not None]
    finished = any((result.metrics or {}).get("finished") for result in results)
    return bool(failed) and (not finished or any(not isinstance(_cause(error), TrainingError) for error in failed))


def _outcome(result: Any, interrupted: bool) -> TrialOutcome:
    metrics = result.metrics or {}
    frame = result.metrics_dataframe
    curve: list[tuple[int, float]] = []
    if frame is not None and METRIC in frame:
        for step, best in zip(frame["step"], frame[METRIC], strict=True):
            if math.isfinite(best):
                curve.append((int(step), float(best)))
    if result.error is not None:
        status, reason = "failed", tracking.describe(_cause(result.error))
    elif metrics.get("finished"):
        status, reason = "finished", ""
    else:
        status, reason = ("unfinished" if interrupted else "stopped early"), ""
    return TrialOutcome(
        id=str(metrics.get("trial_id") or Path(result.path).name),
        parameters=dict(result.config or {}),
        status=status,
        best=curve[-1][1] if curve else None,
        curve=curve,
        reason=reason[:500],
    )


def _cause(error: BaseException) -> BaseException:
    """What a trial raised: Ray keeps it in ``cause``."""
    while isinstance(getattr(error, "cause", None), BaseException):
        error = error.cause  # type: ignore[attr-defined]
    return error


@contextmanager
def _time_limit(seconds: float) -> Iterator[threading.Event]:
    """Interrupt Ray Tune after so many seconds as Ctrl-C does: it then keeps the state from which it goes on."""
    over = threading.Event()

    def interrupt() -> None:
        over.set()
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it otherwise
    timer = threading.Timer(seconds, interrupt) if math.isfinite(seconds) else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield over
    finally:
        if timer is not None:
            timer.cancel()
        signal.signal(signal.SIGINT, before)


def _conclude(config: AnySweep, trials: list[TrialOutcome], place: Location, parent: Run | None) -> None:
    """The best trial's checkpoint, the page, and what MLflow should know."""
    best = _best_trial(trials)
    page = render_page(config, trials)
    (place / "sweep.html").write_text(page)
    if parent is not None:
        _close_children(parent)
        parent.text("sweep.html", page)
        parent.text("trials.json", json.dumps([trial.model_dump() for trial in trials], indent=1))
        parent.metrics({f"trials_{status.replace(' ', '_')}": count for status, count in counts_of(trials).items()})
    if best is None:
        reasons = "; ".join(sorted({trial.reason for trial in trials if trial.reason})) or "all were stopped early"
        raise TrainingError(
            f"no trial came to its end ({reasons}): the same command tries those that failed again; or widen --space, "
            "or raise --grace, under another --name"
        )
    with _model_of(best, place) as folder:
        publish(folder, Location.of(config.output))
        if parent is not None:
            parent.metrics({"best": best.best or 0.0})
            parent.tags({"deeptrust.best": best.id} | {f"best.{k}": str(v) for k, v in best.parameters.items()})
            if config.register_best:
                print(_registered(parent, kind_of(config), folder), flush=True)
    (place / _DONE).write_text(json.dumps([trial.model_dump() for trial in trials], indent=1))


def _registered(parent: Run, kind: Kind, folder: Path) -> str:
    """Make a checkpoint a candidate if the registry has such (it has no classifiers of sources); returns what became
    of it, for people."""
    task, wanted = open_checkpoint(folder, str(folder)).card.task, registry.TASKS[kind]
    if task != wanted:
        return f"not registered: the best checkpoint is for {task!r}, and a {kind} of the registry does {wanted!r}"
    return f"registered as {kind} {registry.register(parent, kind, folder).version}, alias candidate"


def _best_trial(trials: Iterable[TrialOutcome]) -> TrialOutcome | None:
    """The best of those that came to their end; None: none did."""
    finished = [(trial.best, trial) for trial in trials if trial.status == "finished" and trial.best is not None]
    return max(finished, key=lambda each: each[0])[1] if finished else None


@contextmanager
def _model_of(trial: TrialOutcome, place: Location) -> Iterator[Path]:
    """A trial's checkpoint, on this machine for the length of the block."""
    model = place / "models" / trial.id
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        folder.mkdir()
        for name in model.filesystem.ls(model.path, detail=False):
            model.filesystem.get_file(name, str(folder / Path(name).name))
        yield folder


def _close_children(parent: Run) -> None:
    """Runs of trials that were stopped early: their processes were ended and could not say so."""
    experiment = parent.client.get_run(parent.run_id).info.experiment_id
    query = f"tags.`mlflow.parentRunId` = '{parent.run_id}' and attributes.status = 'RUNNING'"
    for child in parent.client.search_runs([experiment], query, max_results=1000):
        parent.client.set_tag(child.info.run_id, FAILURE_TAG, "stopped early: it fell behind other trials")
        parent.client.set_terminated(child.info.run_id, "KILLED")


def _check_same(config: AnySweep, space: Mapping[str, Span], place: Location) -> None:
    """A sweep goes on only with the settings that it was started with. Before its first trial nothing depends on them:
    a start that failed by its data or model is corrected under the same name."""
    free = {"time_limit", "output", "tracking", "record", "num_cpus", "object_store_bytes", "threads", "register_best"}
    settings = json.loads(config.model_dump_json(exclude=free))
    settings["space"] = {name: span.model_dump(mode="json") for name, span in space.items()}
    file = place / "sweep.json"
    if file.exists() and ((place / "tune").exists() or (place / _DONE).exists()):
        before = json.loads(file.read_text())
        if changed := changed_settings(type(config), before, settings):
            raise TrainingError(
                f"sweep {config.name!r} was started with other settings ({', '.join(changed[:5])}): give another "
                f"--name, or remove {place}"
            )
    else:
        file.write_text(json.dumps(settings, indent=1))


class SweepCommands(BaseModel):
    """Search for good settings of a trainer."""

    model_config = ConfigDict(extra="forbid")

    detector: CliSubCommand[DetectorSweep]
    captioner: CliSubCommand[CaptionerSweep]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    from pydantic_settings import CliApp, get_subcommand

    config: Any = get_subcommand(CliApp.run(SweepCommands, cli_args=arguments))
    try:
        trials, done = sweep(config)
    except registry.RegistryError as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        end(error)
    counts = ", ".join(f"{count} {status}" for status, count in counts_of(trials).items() if count)
    if done:
        print(f"{len(trials)} trials: {counts}; best checkpoint in {config.output}")
    else:
        print(f"time limit: {counts}; the same command goes on")


if __name__ == "__main__":
    # trials import this module by its name: what is pickled must be of that module and not of `__main__`
    from train.sweep import main as run_by_name

    run_by_name()
