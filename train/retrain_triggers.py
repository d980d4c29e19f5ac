"""When to train again: at once, after a time, at so many newly verified labels, or when an alarm of drift rings.

In: when the last retraining began and with how many verified labels; the files of verified items; Prometheus; the
revision in production. Out: a reason to begin, or none. Whatever runs ``python -m train.retrain --when …`` again and
again (a timer, a scheduler of jobs) needs to know nothing else. Knows no model and no MLflow.

An alarm begins one retraining, however long it rings: alerts fire on for a day after their cause has gone, and a model
that the gate refuses leaves the alarm as it was. An alert that ended and became active again is another alarm; so is
one of a Prometheus that was started again, unless its rule has a ``for``.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from data.errors import DataError, explained
from data.locations import Location

When = Literal["now", "schedule", "labels", "drift"]


class TriggerSettings(BaseModel):
    """When a retraining begins. One that was begun and not finished goes on in any case."""

    model_config = ConfigDict(extra="forbid")

    when: list[When] = Field(
        ["now"],
        description="now; schedule: --every-days after the last one; labels: at --new-labels verified labels that the "
        "last one did not have; drift: when Prometheus says that one of --alerts fires, about the revision in "
        "production, and no retraining was begun since. May be repeated: any does",
    )
    every_days: float = Field(30.0, gt=0, description="for schedule")
    new_labels: int = Field(200, ge=1, description="for labels")
    prometheus: str = Field("http://127.0.0.1:9090", description="for drift")
    alerts: list[str] = Field(
        ["DetectorDrift", "VerdictsShifted", "UncertainShareHigh"], description="for drift: names of alerts"
    )


@dataclass(frozen=True)
class Last:
    """The last retraining that came to an end."""

    began: datetime.datetime
    labels: int


@dataclass(frozen=True)
class Alarm:
    """An alert that fires."""

    name: str
    revision: str | None
    """What it is about; None: about all that is served."""
    since: datetime.datetime
    """When it became active."""


def count_labels(files: Sequence[str]) -> int:
    """Pictures with a verified label, each once.

    Raises:
        DataError: a file is missing or no parquet file of verified items.
    """
    import pyarrow.parquet as pq

    found: set[str] = set()
    for place in files:
        file = Location.of(place)
        if not file.is_file():
            raise DataError(f"{file} does not exist: give a file of verified items as --feedback")
        with explained(str(file)):
            table = pq.read_table(file.path, columns=["sha256", "label"], filesystem=file.arrow_filesystem)
        for sha256, label in zip(table["sha256"].to_pylist(), table["label"].to_pylist(), strict=True):
            if label is not None:
                found.add(sha256)
    return len(found)


def reason_to_begin(
    settings: TriggerSettings,
    last: Last | None,
    labels: int,
    now: datetime.datetime,
    production: Callable[[], str | None],
) -> str | None:
    """Why a retraining begins now; None: nothing to do.

    Args:
        production: looks up the revision in production, if it is needed; None: there is none.
    """
    for when in settings.when:
        if when == "now":
            return "asked for"
        if when == "schedule" and (last is None or (now - last.began).total_seconds() >= settings.every_days * 86400):
            return "the first one" if last is None else f"{(now - last.began).days} days after the last one"
        if when == "labels" and (new := labels - (last.labels if last else 0)) >= settings.new_labels:
            return f"{new} newly verified labels"
        if when == "drift" and (alarms := firing_alarms(settings)):
            serving = production()
            due = {alarm.name for alarm in alarms if _is_due(alarm, last, serving)}
            if due:
                return f"alert {', '.join(sorted(due))}"
    return None


def _is_due(alarm: Alarm, last: Last | None, serving: str | None) -> bool:
    """Whether an alarm is about what a retraining starts from, and none was begun on it; says why not."""
    if alarm.revision is not None and alarm.revision != serving:
        print(f"alert {alarm.name} is about {alarm.revision}, and in production is {serving or 'nothing'}", flush=True)
        return False
    if last is not None and last.began >= alarm.since:
        print(f"alert {alarm.name} since {alarm.since:%Y-%m-%d %H:%M}: a retraining was begun on it", flush=True)
        return False
    return True


def firing_alarms(settings: TriggerSettings) -> list[Alarm]:
    """Alerts of drift that fire now.

    Raises:
        DataError: Prometheus does not answer.
    """
    import httpx

    try:
        answer = httpx.get(f"{settings.prometheus}/api/v1/alerts", timeout=30)
        answer.raise_for_status()
        return [
            Alarm(
                each["labels"]["alertname"],
                each["labels"].get("revision"),
                datetime.datetime.fromisoformat(each["activeAt"]),
            )
            for each in answer.json()["data"]["alerts"]
            if each["state"] == "firing" and each["labels"]["alertname"] in settings.alerts
        ]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise DataError(f"Prometheus at {settings.prometheus} does not answer: {error!r}; give --prometheus") from error
