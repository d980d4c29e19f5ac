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

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import CliSubCommand

from data import pages
from data.locations import Location
from data.session import RaySettings, ray_session
from deployments.checkpoints import mlflow_uri, open_checkpoint
from train import captioner, detector, registry, tracking
from train.captioner import CaptionerTraining
from train.command import check_space, check_workers, end, running
from train.detector import DetectorTraining
from train.gate import Kind
from train.module import TrainingError
from train.publication import check_output, is_published, publish
from train.run_folder import as_finished, base_of, changed_settings, data_of, inputs_as_kept, reported
from train.settings import TrainCommand
from train.tracking import FAILURE_TAG, Run

_TEMPLATES = Path(__file__).parent / "pages"
#: What a trial reports and is judged by: the best value so far of the trainer's own validation figure.
METRIC = "best"
#: Written last, beside the sweep's state: all trials.
_DONE = "trials.json"


class Span(BaseModel):
    """The values of one setting: between two borders, or one of several."""

    model_config = ConfigDict(extra="forbid")

    low: float | None = None
    high: float | None = None
    log: bool = Field(False, description="even in the logarithm")
    whole: bool = Field(False, description="whole numbers only")
    values: list[Any] = Field([], description="one of these")

    @model_validator(mode="after")
    def _is_one_of_two(self) -> Span:
        between = self.low is not None and self.high is not None and self.low < self.high
        if between == bool(self.values) or (self.values and (self.low, self.high) != (None, None)):
            raise ValueError("give low and high (low < high), or values")
        if self.log and not (self.low or 0) > 0:
            raise ValueError("log needs low above 0")
        return self

    def domain(self) -> Any:
        """As Ray Tune has it."""
        from ray import tune

        if self.values:
            return tune.choice(self.values)
        low, high = self.low or 0.0, self.high or 0.0
        if self.whole:
            return (tune.lograndint if self.log else tune.randint)(int(low), int(high) + 1)
        return (tune.loguniform if self.log else tune.uniform)(low, high)


#: Where there is no file with a space.
SPACES: dict[Kind, dict[str, Span]] = {
    "detector": {
        "learning_rate": Span(low=1e-5, high=1e-2, log=True),
        "weight_decay": Span(low=0.001, high=0.1, log=True),
        "label_smoothing": Span(values=[0.0, 0.05, 0.1]),
        "balance": Span(low=0.0, high=1.0),
    },
    "captioner": {
        "learning_rate": Span(low=1e-5, high=1e-3, log=True),
        "weight_decay": Span(low=0.001, high=0.1, log=True),
        "label_smoothing": Span(values=[0.0, 0.1]),
    },
}


class SweepSettings(TrainCommand):
    """What a sweep adds to a trainer's settings."""

    model_config = ConfigDict(extra="forbid")

    trials: int = Field(8, ge=1, description="how many settings are tried")
    concurrent: int = Field(1, ge=1, description="trials at a time; each takes the workers of one run")
    space: Path | None = Field(
        None, description="YAML: setting -> {low, high, log, whole} or {values}; damage.blur names an inner one"
    )
    grace: int = Field(1, ge=1, description="validations of a trial before it may be stopped")
    reduction: float = Field(2.0, gt=1, description="of the trials that come to a rung, one in so many goes on")
    register_best: bool = Field(
        True, description="make the best trial's checkpoint a candidate of the registry, if it has models of its task"
    )


class DetectorSweep(DetectorTraining, SweepSettings):
    """Sweep over the detector's trainer."""

    name: str = Field("detector-sweep", description="name of the sweep; the same name goes on with it")


class CaptionerSweep(CaptionerTraining, SweepSettings):
    """Sweep over the captioner's trainer."""

    name: str = Field("captioner-sweep", description="name of the sweep; the same name goes on with it")


AnySweep = DetectorSweep | CaptionerSweep


class TrialOutcome(BaseModel):
    """What became of one trial."""

    id: str
    parameters: dict[str, Any]
    status: str = Field(description="`finished`, `stopped early`, `failed` or `unfinished`")
    best: float | None
    curve: list[tuple[int, float]] = Field(description="(step, best value so far)")
    reason: str = ""


def kind_of(config: AnySweep) -> Kind:
    """Which trainer."""
    return "detector" if isinstance(config, DetectorSweep) else "captioner"


def read_space(config: AnySweep) -> dict[str, Span]:
    """The space, every name of it a setting of the trainer.

    Raises:
        TrainingError: the file is missing or not understood, or names something else; or its first values or another
            of a list are none that workers can divide.
    """
    space = SPACES[kind_of(config)]
    if config.space is not None:
        try:
            found = yaml.safe_load(config.space.read_text())
            space = {str(name): Span.model_validate(span) for name, span in dict(found).items()}
        except (OSError, yaml.YAMLError, ValidationError, TypeError, ValueError) as error:
            raise TrainingError(f"--space {config.space} cannot be used: {error}") from error
    first = {name: (span.values or [span.low])[0] for name, span in space.items()}
    check_workers(trial_config(config, first, "check", None))
    for name, span in space.items():
        for value in span.values:
            check_workers(trial_config(config, first | {name: value}, "check", None))
    return space


def trial_config(config: AnySweep, parameters: Mapping[str, Any], id_: str, parent: str | None) -> TrainCommand:
    """The trainer's settings of one trial.

    Raises:
        TrainingError: the parameters are no settings of the trainer.
    """
    trainer: type[TrainCommand] = DetectorTraining if isinstance(config, DetectorSweep) else CaptionerTraining
    settings = {name: value for name, value in config.model_dump().items() if name in trainer.model_fields}
    place = Location.of(config.storage) / config.name
    settings |= {
        "storage": str(place / "runs"),
        "name": id_,
        "output": str(place / "models" / id_),
        "time_limit": "",
        "tracking": config.tracking.resolved().model_dump() if parent else config.tracking.model_dump(),
    }
    for name, value in parameters.items():
        *outer, last = name.split(".")
        part = settings
        for step in outer:
            part = part.get(step) or {}
        if last not in part:
            raise TrainingError(f"the space varies {name!r}, which is no setting of the trainer; see its --help")
        part[last] = value
    try:
        return trainer.model_validate(settings)
    except ValidationError as error:
        raise TrainingError(f"the space has values that the trainer does not take: {error}") from error


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
        parent.metrics({f"trials_{status.replace(' ', '_')}": count for status, count in _counts(trials).items()})
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


def _counts(trials: list[TrialOutcome]) -> dict[str, int]:
    counts = dict.fromkeys(("finished", "stopped early", "failed", "unfinished"), 0)
    for trial in trials:
        counts[trial.status] += 1
    return counts


def render_page(config: AnySweep, trials: list[TrialOutcome]) -> str:
    """Every trial: its curve, its settings, what became of it."""
    ranked = sorted(trials, key=lambda trial: (trial.status != "finished", -(trial.best or -math.inf)))
    curves = {
        f"{rank}": ([step for step, _ in trial.curve], [value for _, value in trial.curve])
        for rank, trial in enumerate(ranked, 1)
        if trial.curve
    }
    varied = list(dict.fromkeys(name for trial in ranked for name in trial.parameters))

    def against(name: str) -> Any:
        points = [(trial.parameters[name], trial.best, trial.status) for trial in ranked if trial.best is not None]

        def draw(axes: Any) -> None:
            for rank, status in enumerate(("finished", "stopped early", "failed")):
                chosen = [(value, best) for value, best, each in points if each == status]
                if chosen:
                    axes.scatter(
                        [value for value, _ in chosen],
                        [best for _, best in chosen],
                        color=pages.SERIES[rank],
                        label=status,
                        s=22,
                    )
            numbers = [value for value, *_ in points if isinstance(value, (int, float)) and value > 0]
            if len(numbers) == len(points) and numbers and max(numbers) > 30 * min(numbers):
                axes.set_xscale("log")
            axes.set(xlabel=name, ylabel="best validation figure")
            axes.legend(fontsize=8)

        return pages.chart(name, draw, f"Best validation figure by {name}", 4.6, 3.0) if points else pages.nothing(name)

    return pages.render(
        "sweep.html",
        folder=_TEMPLATES,
        name=config.name,
        kind=kind_of(config),
        trials=ranked,
        counts=_counts(trials),
        varied=varied,
        curves=pages.line_chart(
            "Best validation figure so far, by trial (numbers: rank below)",
            curves,
            "optimiser step",
            "best so far",
            from_zero=False,
            width=9.0,
            height=3.8,
        ),
        charts=[against(name) for name in varied],
    )


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
    counts = ", ".join(f"{count} {status}" for status, count in _counts(trials).items() if count)
    if done:
        print(f"{len(trials)} trials: {counts}; best checkpoint in {config.output}")
    else:
        print(f"time limit: {counts}; the same command goes on")


if __name__ == "__main__":
    # trials import this module by its name: what is pickled must be of that module and not of `__main__`
    from train.sweep import main as run_by_name

    run_by_name()
