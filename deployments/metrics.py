"""What operators see: one place for the name, the labels and the buckets of every figure that this application exports.

Replicas and the ingress record here; Ray's agent on each node exports the figures for Prometheus with Ray's prefix,
as ``ray_deeptrust_requests_total``, ``ray_deeptrust_stage_seconds_bucket`` and so on, and Serve adds ``application``,
``deployment`` and ``replica``. What a model says or takes bears its ``revision``, and a request those of all models
that it needs; outcomes of pictures and what files declare are no model's.

Labels never take their values from what a client sends, and each metric has at most so many combinations of them in a
process (``MOST_SERIES``, where it says no other): what comes later is counted as ``other``.

Knows no HTTP and no Prometheus.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from deployments.annotation import Annotation

#: Combinations of label values that one metric may have in one process.
MOST_SERIES = 128
#: `off` in a process's environment: nothing is recorded there (what `benchmarks.observability` compares with).
VARIABLE = "DEEPTRUST_METRICS"
#: Before every name, and what Ray puts before that when it exports.
PREFIX, EXPORTED_PREFIX = "deeptrust_", "ray_"
OTHER = "other"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TENTHS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
_WORDS = (2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 15.0, 20.0, 30.0, 50.0)
# Ray's agent takes the middle of its bucket for every value (ray-project/ray#64852), so that a mean is right where the
# middles are the values: whole numbers, usual sizes of a full batch, and whether two verdicts agree
_FEW = (0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5, 9.5, 10.5)
_COUNTS = (*_FEW[:9], 15.5, 16.5, 31.5, 32.5, 63.5, 64.5, 127.5, 128.5)
_AGREEMENT = (0.001, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.05)


@dataclass(frozen=True)
class Definition:
    """What a metric is: its name without prefix, its kind, its labels, and a histogram's upper bounds."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    description: str
    buckets: tuple[float, ...] = ()
    most: int = MOST_SERIES
    """Combinations of label values that it may have in one process."""

    def exported(self) -> list[str]:
        """What the metric is called where Prometheus reads it."""
        full = f"{EXPORTED_PREFIX}{PREFIX}{self.name}"
        if self.kind == "counter":
            return [f"{full}_total"]
        return [full] if self.kind == "gauge" else [f"{full}_{part}" for part in ("bucket", "sum", "count")]


def _counter(name: str, labels: tuple[str, ...], description: str, most: int = MOST_SERIES) -> Definition:
    return Definition(name, "counter", labels, description, most=most)


def _gauge(name: str, labels: tuple[str, ...], description: str) -> Definition:
    return Definition(name, "gauge", labels, description)


def _histogram(name: str, buckets: tuple[float, ...], labels: tuple[str, ...], description: str) -> Definition:
    return Definition(name, "histogram", labels, description, buckets)


METRICS = {
    definition.name: definition
    for definition in (
        # the ingress
        _counter(
            "requests",
            ("endpoint", "code", "revision"),
            "Requests that annotate, by end point and `ok`, or the code of their problem; revisions of the models "
            "where these came to be asked",
            most=1024,
        ),
        _counter(
            "http_requests",
            ("route", "status", "key"),
            "Requests to all routes by class of status; 401, 403 and 429 by themselves, with the name of the key",
            most=1024,
        ),
        _histogram(
            "request_seconds",
            _SECONDS,
            ("endpoint", "revision"),
            "Time from a request's head to its answer, without what was refused with 429 or accepted for later; "
            "revisions as of `requests`",
        ),
        _counter("pictures", ("outcome",), "Pictures: `answered`, `partial` (a stage failed), `failed` (all did)"),
        _gauge("pictures_in_work", (), "Pictures that an ingress replica has in work"),
        _gauge("pictures_limit", (), "Pictures that an ingress replica lets in at present"),
        _gauge("requests_waiting", (), "Requests that wait for a place"),
        _gauge("pictures_deferred", (), "Pictures in the store's queue, whose senders can wait; NaN: not known"),
        _gauge("deferred_age_seconds", (), "Time since the oldest of those was taken in; NaN: not known"),
        _gauge(
            "deferred_room_used",
            (),
            "Share of their room that is taken, by number or by bytes, whichever is more; NaN: not known",
        ),
        _gauge("callbacks_due", (), "Call-backs that are to be made and have not been"),
        _counter(
            "callbacks",
            ("outcome",),
            "Call-backs: `delivered`, `failed` (tried again), `given_up`, `gone` (the picture was deleted)",
        ),
        _gauge("store_ready", (), "1 while a replica's store can be used, else 0; nothing where none is wanted"),
        _gauge("store_queued", (), "Answers that wait to be written"),
        # a gauge, so that it is there before the first one is lost
        _gauge(
            "store_dropped",
            ("what",),
            "`answers` and `pictures` that a replica's store could not keep since it began: the queue was full, or it "
            "could not write",
        ),
        _counter(
            "feedback",
            ("part", "answer", "judged", "revision"),
            "Feedback by the part of an answer, the verdict that had been given, and whether it is called `right` or "
            "`wrong`",
        ),
        _gauge("stage_ready", ("stage",), "1 while a stage has a replica that answers"),
        _gauge("canary_share", ("stage",), "Share of the pictures that goes to a stage's canary"),
        # one picture
        _histogram("stage_seconds", _SECONDS, ("stage", "revision"), "Wall time of a stage, its queue included"),
        _counter(
            "stage_errors",
            ("stage", "code", "revision"),
            "Stages that gave no answer to an accepted request; the revision that production ran",
        ),
        _counter(
            "trial_answers",
            ("stage", "role", "outcome", "revision"),
            "Answers of a trial: `ok` or why there is none; `dropped`: the other model was not asked, too many were",
        ),
        _histogram(
            "trial_agreement",
            _AGREEMENT,
            ("stage", "revision"),
            "How well a candidate's answer agrees with production's: 1 or 0 for verdicts, words in common for text",
        ),
        _counter("verdicts", ("verdict", "revision"), "Verdicts: `ai`, `human`, `uncertain`"),
        _histogram("ai_probability", _TENTHS, ("revision",), "Calibrated probability that a picture is AI-made"),
        _counter("provenance", ("c2pa", "declared"), "What files declare of themselves"),
        _histogram("caption_words", _WORDS, ("revision",), "Words of a caption"),
        _histogram("picture_tags", _FEW, ("revision",), "Tags of a picture"),
        # the models' replicas
        _histogram("batch_pictures", _COUNTS, ("stage", "revision"), "Pictures that a model computed together"),
        _histogram("batch_seconds", _SECONDS, ("stage", "revision"), "Time that a model computed a batch"),
        _counter("tags", ("origin", "revision"), "Tags that the `model` gave and that `rules` filled up"),
        _gauge(
            "drift_statistic",
            ("channel", "revision"),
            "How far the latest pictures are from training's, in units of the threshold: above 1 is drift; 0 until the "
            "window is full",
        ),
        _gauge("drift_alarm", ("revision",), "1 while there is an alarm of drift"),
        _gauge("drift_reference", ("revision",), "0 where a detector is not watched: it has no reference"),
        _counter(
            "drift_pictures",
            ("outcome", "revision"),
            "Pictures of the sample: `observed`, `repeated` (in the window already), `other` (another revision's)",
        ),
        _gauge("model", ("stage", "revision"), "1 for the revision that a replica has in service, 0 for earlier ones"),
        _gauge("revision_refused", ("stage",), "1 while a replica was told to serve a revision and could not, else 0"),
        # training, which records them itself (`train.gauges`)
        _gauge("training_step", ("run",), "Optimiser steps that a run has made"),
        _gauge("training_loss", ("run",), "Loss of the latest step, mean of all workers"),
        _gauge("training_samples_per_second", ("run",), "Pictures that a run trains on in a second"),
        _gauge("training_data", ("run", "version"), "1 for the data set version that a run trains on"),
    )
}


class Metric:
    """One metric, with its bounded label values.

    The mapping of labels is made once for each combination and not for each record.
    """

    def __init__(self, name: str) -> None:
        # imported where a replica starts: Serve's metrics take their tags from the replica that they are made in
        from ray.serve import metrics

        definition = METRICS[name]
        full, text, keys = PREFIX + name, definition.description, definition.labels
        self._keys, self._most = keys, definition.most
        self._tags: dict[tuple[str, ...], dict[str, str]] = {}
        self._record: Any
        if definition.kind == "histogram":
            self._record = metrics.Histogram(full, text, boundaries=list(definition.buckets), tag_keys=keys).observe
        elif definition.kind == "gauge":
            self._record = metrics.Gauge(full, text, tag_keys=keys).set
        else:
            self._record = metrics.Counter(full, text, tag_keys=keys).inc

    def record(self, value: float, *labels: str) -> None:
        """Add to a counter, set a gauge, or observe in a histogram; ``labels`` in the order of ``METRICS``."""
        tags = self._tags.get(labels)
        if tags is None:
            if len(self._tags) >= self._most:
                labels = (OTHER,) * len(labels)
            tags = self._tags.setdefault(labels, dict(zip(self._keys, labels, strict=True)))
        self._record(value, tags)


class Metrics:
    """Every metric by its name, each made when it is first recorded."""

    def __init__(self) -> None:
        self._made: dict[str, Metric] = {}
        self._off = os.environ.get(VARIABLE) == "off"

    def record(self, name: str, value: float, *labels: str) -> None:
        """See ``Metric.record``."""
        if self._off:
            return
        metric = self._made.get(name)
        if metric is None:
            metric = self._made[name] = Metric(name)
        metric.record(value, *labels)

    # ---- the ingress --------------------------------------------------------------------------------------------

    def request(self, endpoint: str, code: str, seconds: float, revision: str = "") -> None:
        """A request has been answered: ``ok``, ``accepted`` for later, or with the code of a problem."""
        self.record("requests", 1, endpoint, code, revision)
        # these take no time: the more of them, the faster would the others look
        if code not in ("accepted", "overloaded"):
            self.record("request_seconds", seconds, endpoint, revision)

    def picture(self, record: Annotation, in_service: Mapping[str, str] = MappingProxyType({})) -> None:
        """A picture has been through the graph: all that its record says.

        Args:
            in_service: stage -> revision, for stages that gave no answer to say it themselves.
        """
        revisions = {stage: revision_of(name) for stage, name in record.models.items()}
        failed = {error.stage for error in record.errors}
        for error in record.errors:
            self.record("stage_errors", 1, error.stage, error.code, in_service.get(error.stage, ""))
        for stage, milliseconds in record.timings_ms.items():
            if stage not in failed:
                self.record("stage_seconds", milliseconds / 1000, stage, revisions.get(stage, ""))
        answered = 0
        if (detection := record.detection) is not None:
            answered += 1
            revision = revisions["detector"]
            self.record("verdicts", 1, detection.label, revision)
            self.record("ai_probability", detection.ai_probability, revision)
            declared = {True: "ai", False: "camera", None: "nothing"}[detection.provenance.declared_ai]
            self.record("provenance", 1, detection.provenance.c2pa, declared)
        if record.caption is not None:
            answered += 1
            self.record("caption_words", len(record.caption.text.split()), revisions["captioner"])
        if record.tags is not None:
            answered += 1
            self.record("picture_tags", len(record.tags), revisions["tagger"])
        self.record("pictures", 1, "failed" if not answered else "partial" if record.errors else "answered")

    def tried(self, stage: str, role: str, outcome: str, revision: str) -> None:
        """A model of a trial has answered, or has not."""
        self.record("trial_answers", 1, stage, role, outcome, revision)

    def agreed(self, stage: str, revision: str, agreement: float) -> None:
        """A candidate of this revision and the model in production have answered the same picture."""
        self.record("trial_agreement", agreement, stage, revision)

    def feedback(self, part: str, answer: str, is_right: bool, revision: str) -> None:
        """Somebody has judged a part of an answer."""
        self.record("feedback", 1, part, answer, "right" if is_right else "wrong", revision)

    def store(self, status: Mapping[str, Any]) -> None:
        """What a store says of itself (``Store.status``)."""
        if (state := status.get("state")) != "off":
            self.record("store_ready", float(state == "ready"))
        self.record("store_queued", status.get("queued", 0))
        self.record("store_dropped", status.get("dropped", 0), "answers")
        self.record("store_dropped", status.get("pictures_dropped", 0), "pictures")

    def queue(self, in_work: int, limit: int, waiting: int) -> None:
        """How full an ingress replica is."""
        self.record("pictures_in_work", in_work)
        self.record("pictures_limit", limit)
        self.record("requests_waiting", waiting)

    def deferred(self, backlog: tuple[int, float, float] | None) -> None:
        """How many pictures wait whose senders can, for how many seconds the oldest, and the share of the room that
        they take; None: not known. A gauge that is not set keeps what it showed.
        """
        pictures, age_s, room_used = backlog or (math.nan,) * 3
        self.record("pictures_deferred", pictures)
        self.record("deferred_age_seconds", age_s)
        self.record("deferred_room_used", room_used)

    def stages(self, ready: Mapping[str, bool], canary_shares: Mapping[str, float]) -> None:
        """Which stages answer, and what their canaries get."""
        for stage, is_ready in ready.items():
            self.record("stage_ready", float(is_ready), stage)
        for stage, share in canary_shares.items():
            self.record("canary_share", share, stage)

    # ---- the watcher for drift ----------------------------------------------------------------------------------

    def drift_reference(self, revision: str, there: bool) -> None:
        """Whether a detector can be watched for drift."""
        self.record("drift_reference", float(there), revision)

    def drift_pictures(self, revision: str, observed: int, repeated: int, other: int) -> None:
        """Pictures of the sample have come."""
        for outcome, count in (("observed", observed), ("repeated", repeated), ("other", other)):
            if count:
                self.record("drift_pictures", count, outcome, revision)

    def drift(self, revision: str, ratios: Mapping[Any, float], alarm: bool) -> None:
        """What the last look at the window said."""
        for channel, ratio in ratios.items():
            self.record("drift_statistic", ratio, channel, revision)
        self.record("drift_alarm", float(alarm), revision)

    # ---- the models' replicas -----------------------------------------------------------------------------------

    def batch(self, stage: str, revision: str, pictures: int, seconds: float) -> None:
        """A model has computed a batch."""
        self.record("batch_pictures", pictures, stage, revision)
        self.record("batch_seconds", seconds, stage, revision)

    def tagged(self, revision: str, tags: int, proposed: int) -> None:
        """A caption has its tags, of which the model itself ``proposed`` so many."""
        if proposed:
            self.record("tags", min(proposed, tags), "model", revision)
        if tags > proposed:
            self.record("tags", tags - proposed, "rules", revision)

    def in_service(self, stage: str, revision: str, before: str | None = None) -> None:
        """A replica has taken a revision into service, in place of the one ``before``."""
        if before is not None and before != revision:
            self.record("model", 0.0, stage, before)
        self.record("model", 1.0, stage, revision)

    def refused(self, stage: str, is_refused: bool) -> None:
        """Whether a replica was told to serve a revision last that it could not."""
        self.record("revision_refused", float(is_refused), stage)


def revision_of(name: str) -> str:
    """The revision in a checkpoint's full name ``URI#revision``."""
    return name.rpartition("#")[2]
