"""Settings of every trainer, as its command line takes them: data, model, places, time limit, record.

Knows no task.
"""

from __future__ import annotations

import math
import re
from typing import TypeVar

from pydantic import ConfigDict, Field, field_validator

from data.session import RaySettings
from train.job import LoopConfig
from train.tracking import TrackingConfig

_DURATION = re.compile(r"^(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?:in)?)?(?:(\d+(?:\.\d+)?)s?)?$")


class TrainCommand(LoopConfig, RaySettings):
    """Settings of every trainer."""

    model_config = ConfigDict(extra="forbid")

    data: str = Field(description="prepared data set NAME/VERSION, or NAME for its newest version; a path or s3://")
    model: str = Field(description="checkpoint that training starts from: folder, s3://, models:/, starter:, hub id")
    output: str = Field(
        description="where the trained checkpoint goes: a folder or s3://bucket/prefix; a checkpoint that is there is "
        "replaced, anything else is refused"
    )
    name: str = Field(description="name of the run; the same name in the same storage goes on with it")
    storage: str = Field(
        "~/.cache/deeptrust/runs",
        description="where runs keep their checkpoints; on a cluster, seen by all nodes. On s3:// nothing keeps a run "
        "from being started twice at once",
    )
    time_limit: str = Field(
        "", description="end with a checkpoint after this time, e.g. 5h30m; the same command goes on"
    )
    record: bool = Field(True, description="record the run in MLflow")
    tracking: TrackingConfig = Field(TrackingConfig())

    @field_validator("time_limit")
    @classmethod
    def _duration(cls, value: str) -> str:
        if value and not (_DURATION.match(value) and re.search(r"\d", value)):
            raise ValueError(f"{value!r} is no duration: write 5h30m, 45m or 90s")
        return value

    def files(self) -> dict[str, str]:
        """Files that a run reads beside its data and model, by the setting that names them. One that goes on reads
        what it was started with: another content under the same name is refused."""
        return {}

    @property
    def limit_s(self) -> float:
        """The time limit in seconds, or infinity."""
        found = _DURATION.match(self.time_limit)
        if not self.time_limit or found is None:
            return math.inf
        days, hours, minutes, seconds = (float(part or 0) for part in found.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


Command = TypeVar("Command", bound=TrainCommand)
