"""Settings of a sweep: over which trainer, which of its settings are tried, and where their values lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data.locations import Location
from train.captioning import CaptionerTraining
from train.command import check_workers
from train.detector import DetectorTraining
from train.gate import Kind
from train.module import TrainingError
from train.settings import TrainCommand


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
