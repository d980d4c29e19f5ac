"""When to train again: at once, after a time, at so many newly verified labels, or when an alarm of drift rings.

In: when the last retraining began and with how many verified labels; the files of verified items; Prometheus. Out: a
reason to begin, or why there is none. Whatever runs ``python -m train.retrain --when …`` again and again (a timer, a
scheduler of jobs) needs to know nothing else. Knows no model and no MLflow.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
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
        "last one did not have; drift: while Prometheus says that one of --alerts fires. May be repeated: any does",
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


def reason_to_begin(settings: TriggerSettings, last: Last | None, labels: int, now: datetime.datetime) -> str | None:
    """Why a retraining begins now; None: nothing to do."""
    for when in settings.when:
        if when == "now":
            return "asked for"
        if when == "schedule" and (last is None or (now - last.began).total_seconds() >= settings.every_days * 86400):
            return "the first one" if last is None else f"{(now - last.began).days} days after the last one"
        if when == "labels" and (new := labels - (last.labels if last else 0)) >= settings.new_labels:
            return f"{new} newly verified labels"
        if when == "drift" and (firing := firing_alerts(settings)):
            return f"alert {', '.join(firing)}"
    return None


def firing_alerts(settings: TriggerSettings) -> list[str]:
    """Alerts of drift that fire now.

    Raises:
        DataError: Prometheus does not answer.
    """
    import httpx

    try:
        answer = httpx.get(f"{settings.prometheus}/api/v1/alerts", timeout=30)
        answer.raise_for_status()
        alerts = answer.json()["data"]["alerts"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise DataError(f"Prometheus at {settings.prometheus} does not answer: {error!r}; give --prometheus") from error
    names = {each["labels"]["alertname"] for each in alerts if each["state"] == "firing"}
    return sorted(names & set(settings.alerts))
