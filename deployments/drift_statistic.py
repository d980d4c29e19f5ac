"""Whether pictures still look to a detector as those did that it was trained on: statistic, thresholds, file.

In: *observations*, one a picture: the input of the detector's last layer, projected (``Projection``); its logit margin;
a few facts of the file and its light (``picture_statistics``). Out: for each of these three channels the squared
maximum mean discrepancy between a window of the latest pictures and a reference of training pictures (unbiased,
Gaussian kernel, median heuristic; Gretton et al. 2012), as a multiple of its threshold. Above 1 it is drift.

**Thresholds** are made for an average run between two false alarms, not for a p-value: a p-value looked up at every few
pictures is sure to alarm. The data at hand are split again and again into a reference and held-out pictures; projection
and kernel are fitted to the former, undisturbed streams are drawn from the latter with replacement, and alarms counted.
All channels share one tail probability, so the run is that of the three together. The held-out part is small (a
quarter), so how far it is by chance from the reference is part of what is measured, and is more than in service:
thresholds err towards silence. Assumed: pictures come independently of each other. One sent again is not counted
again while it is in the window; a thousand of one album in a row is drift by this definition.

Why this is not a library's: alibi-detect has an online MMD with an expected run time, but resamples the reference
itself (held-out pictures are farther from it than its own are from each other: with a thousand pictures and a
projection fitted to them that is most of the statistic), needs TensorFlow or PyTorch in the process that watches, and
is under the Business Source Licence; frouros and river calibrate no run length for many dimensions. Exact sums over a
window of 256 take milliseconds in NumPy.

The reference lies in the checkpoint's folder as ``drift.safetensors`` (``train.drift_reference`` makes it); a revision
without one is not watched. Knows no Ray, no HTTP and no model class.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deployments.checkpoints import CheckpointError
from deployments.images import Picture

FILE = "drift.safetensors"
Channel = Literal["embedding", "output", "picture"]
CHANNELS: tuple[Channel, ...] = ("embedding", "output", "picture")
#: What ``picture_statistics`` gives, in its order.
STATISTICS = (
    "size (log2 of pixels)",
    "shape (log2 of width / height)",
    "bits a pixel (log2)",
    "JPEG quality",
    "brightness",
    "contrast",
    "sharpness (log2)",
)
#: Standardised values beyond it tell no more.
_MOST = 5.0
_LAYOUT = 1


def picture_statistics(picture: Picture, view: np.ndarray) -> np.ndarray:
    """Facts of one file, float32 ``(7,)`` in the order of ``STATISTICS``.

    Args:
        view: uint8 ``(S, S, 3)``, what a model sees of it: light is measured there, where it is small.
    """
    # no product of matrices: a threaded one would wait for cores that others use
    light = view[..., 0] * np.float32(0.299) + view[..., 1] * np.float32(0.587) + view[..., 2] * np.float32(0.114)
    edges = 4 * light[1:-1, 1:-1] - light[:-2, 1:-1] - light[2:, 1:-1] - light[1:-1, :-2] - light[1:-1, 2:]
    pixels = picture.width * picture.height
    return np.array(
        [
            np.log2(pixels),
            np.log2(picture.width / picture.height),
            np.log2(8 * picture.size_bytes / pixels),
            # what is no JPEG has lost nothing that a table would tell of
            100.0 if picture.jpeg_quality is None else picture.jpeg_quality,
            light.mean(),
            light.std(),
            np.log2(1 + np.abs(edges).mean()),
        ],
        dtype=np.float32,
    )


class DriftSettings(BaseModel):
    """How a reference is made and its thresholds are found."""

    model_config = ConfigDict(extra="forbid")

    window: int = Field(256, ge=16, le=4096, description="pictures that are compared with the reference at a time")
    step: int = Field(16, ge=1, description="pictures between two looks")
    dimensions: int = Field(48, ge=1, le=256, description="of the projected embedding")
    power: float = Field(
        0.75,
        ge=0,
        le=1,
        description="components are divided by this power of their standard deviation: 0 leaves what pictures show in "
        "front, 1 makes all alike; how pictures were made lies in the smaller ones",
    )
    between_alarms: int = Field(
        40_000, ge=100, description="pictures between two false alarms, all channels together: twice what is promised"
    )
    most: int = Field(768, ge=32, description="training pictures that are kept as the reference")
    held_out: float = Field(0.25, gt=0, lt=1, description="share of the pictures that undisturbed streams are drawn of")
    splits: int = Field(16, ge=1, description="splits into reference and held out")
    stream: int = Field(50_000, ge=100, description="length of the stream drawn in each split")
    seed: int = 0


@dataclass(frozen=True)
class Projection:
    """Of an embedding ``(n, D)`` to ``(n, dimensions)``; in whole numbers of eight bits, which a third of the file is.
    Reference and window are projected alike, so that rounding does no harm.
    """

    centre: np.ndarray
    matrix: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(cls, embeddings: np.ndarray, dimensions: int, power: float) -> Projection:
        """Principal components, each divided by a power of its standard deviation."""
        rows = embeddings.astype(np.float32)
        centre = rows.mean(0).astype(np.float16)
        rows = rows - centre.astype(np.float32)
        # by way of the smaller of the two products: features are many, pictures few
        if len(rows) < rows.shape[1]:
            values, vectors = np.linalg.eigh((rows @ rows.T).astype(np.float64))
            values, vectors = values[::-1][:dimensions], vectors[:, ::-1][:, :dimensions]
            deviation = np.sqrt(np.maximum(values, 1e-12))
            directions = rows.T @ (vectors / deviation).astype(np.float32)
        else:
            values, vectors = np.linalg.eigh((rows.T @ rows).astype(np.float64))
            values, directions = values[::-1][:dimensions], vectors[:, ::-1][:, :dimensions].astype(np.float32)
            deviation = np.sqrt(np.maximum(values, 1e-12))
        used = deviation > 1e-4 * deviation[0]
        directions, deviation = directions[:, used], deviation[used] / np.sqrt(len(rows))
        most = np.abs(directions).max(0)
        matrix = np.round(directions / most * 127).astype(np.int8)
        return cls(centre, matrix, (most / 127 / deviation**power).astype(np.float32))

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        """float32 ``(n, dimensions)`` of float ``(n, D)``."""
        rows = embeddings.astype(np.float32) - self.centre.astype(np.float32)
        return (rows @ self.matrix.astype(np.float32)) * self.scale


@dataclass(frozen=True)
class Reference:
    """What training pictures look like to a detector, and from when on others do not look like them."""

    projection: Projection
    rows: np.ndarray
    """Observations of training pictures, float32 ``(n, d)``, standardised."""
    centre: np.ndarray
    spread: np.ndarray
    """Of the margin and the statistics, the last columns of an observation."""
    bandwidths: dict[Channel, float]
    """exp(-distance² * bandwidth)."""
    thresholds: dict[Channel, float]
    window: int
    step: int
    facts: dict[str, Any] = field(default_factory=dict)
    """What it was made of and how often it was wrong in the bootstrap; for people."""

    def columns(self, channel: Channel) -> slice:
        """Where a channel's values stand in an observation."""
        first = self.rows.shape[1] - len(self.centre)
        return {
            "embedding": slice(0, first),
            "output": slice(first, first + 1),
            "picture": slice(first + 1, None),
        }[channel]

    def observations(self, projected: np.ndarray, margins: np.ndarray, statistics: np.ndarray) -> np.ndarray:
        """float32 ``(n, d)`` of projected embeddings ``(n, k)``, logit margins ``(n,)`` and statistics ``(n, 7)``."""
        rest = standardised(np.column_stack([margins, statistics]), self.centre, self.spread)
        return np.column_stack([projected, rest]).astype(np.float32)

    def save(self, file: Path) -> None:
        """Write it; the same reference is the same bytes."""
        file.write_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        """As in the file."""
        from safetensors.numpy import save

        tensors = {
            "projection.centre": self.projection.centre,
            "projection.matrix": np.ascontiguousarray(self.projection.matrix),
            "projection.scale": self.projection.scale,
            "rows": self.rows.astype(np.float16),
            "centre": self.centre.astype(np.float32),
            "spread": self.spread.astype(np.float32),
        }
        told = {
            "layout": _LAYOUT,
            "window": self.window,
            "step": self.step,
            "bandwidths": self.bandwidths,
            "thresholds": self.thresholds,
            "facts": self.facts,
        }
        return save(tensors, metadata={"drift": json.dumps(told, sort_keys=True)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Reference:
        """Read what ``to_bytes`` made.

        Raises:
            CheckpointError: it is none, or of another layout.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            length = int.from_bytes(data[:8], "little")
            told = _Told.model_validate_json(json.loads(data[8 : 8 + length])["__metadata__"]["drift"])
            tensors = load(data)
            return cls(
                Projection(tensors["projection.centre"], tensors["projection.matrix"], tensors["projection.scale"]),
                tensors["rows"].astype(np.float32),
                tensors["centre"],
                tensors["spread"],
                told.bandwidths,
                told.thresholds,
                told.window,
                told.step,
                told.facts,
            )
        except (SafetensorError, ValidationError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{FILE} is no reference for drift that is understood here ({error}): make it again with "
                "`python -m train.drift_reference`"
            ) from error


class _Told(BaseModel):
    model_config = ConfigDict(extra="forbid")

    layout: Literal[1]
    window: int = Field(ge=2)
    step: int = Field(ge=1)
    bandwidths: dict[Channel, float]
    thresholds: dict[Channel, float]
    facts: dict[str, Any]


def read_reference(folder: Path) -> Reference | None:
    """The reference in a checkpoint's folder; None: it has none.

    Raises:
        CheckpointError: it has one that is not understood.
    """
    file = folder / FILE
    return Reference.from_bytes(file.read_bytes()) if file.is_file() else None


def standardised(values: np.ndarray, centre: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """In standard deviations from the mean, bounded."""
    return np.clip((values - centre) / spread, -_MOST, _MOST)


# ---- the statistic -----------------------------------------------------------------------------------------------


def kernel(some: np.ndarray, others: np.ndarray, bandwidth: float) -> np.ndarray:
    """Gaussian kernel, float32 ``(n, m)`` of ``(n, d)`` and ``(m, d)``."""
    squares = (some * some).sum(1)[:, None] + (others * others).sum(1) - 2 * some @ others.T
    return np.exp(-np.maximum(squares, 0) * bandwidth).astype(np.float32)


def median_bandwidth(rows: np.ndarray) -> float:
    """One over the median squared distance between two rows."""
    squares = (rows * rows).sum(1)[:, None] + (rows * rows).sum(1) - 2 * rows @ rows.T
    return 1 / max(float(np.median(squares[np.triu_indices(len(rows), 1)])), 1e-6)


class Discrepancies:
    """Squared MMD of windows that are drawn from a fixed pool: each is given by how often it has each of the pool's
    pictures, so that many streams cost one product of matrices.

    Args:
        few: that many of the pool's last pictures stand for many others of their kind. Drawn twice, one of them would
            be nearer to itself than two pictures of its kind are to each other, and the kind be noticed by its
            repetitions: two draws of one count as two of its fellows.
    """

    def __init__(self, reference: np.ndarray, pool: np.ndarray, bandwidth: float, few: int = 0) -> None:
        count = len(reference)
        self._among = kernel(pool, pool, bandwidth)
        np.fill_diagonal(self._among, 1)
        if few > 1:
            own = self._among[-few:, -few:]
            np.fill_diagonal(own, (own.sum(1) - 1) / (few - 1))
        self._twice = np.diag(self._among).copy()
        self._across = kernel(pool, reference, bandwidth).mean(1)
        self._own = (float(kernel(reference, reference, bandwidth).sum()) - count) / (count * (count - 1))

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """float64 ``(windows,)`` of counts ``(windows, pool)``, each row's sum the length of the window."""
        length = counts.sum(1)
        among = np.einsum("ij,ij->i", counts @ self._among, counts)
        return (
            (among - counts @ self._twice) / (length * (length - 1)) - 2 * (counts @ self._across) / length + self._own
        )


def window_counts(drawn: np.ndarray, pool: int, window: int, step: int) -> np.ndarray:
    """How often each window of a stream has each picture, float32 ``(looks, pool)``: a look each ``step`` pictures, the
    first when a window is full. ``window`` is a multiple of ``step``.

    Args:
        drawn: places in the pool, in the order of the stream.
    """
    looks = len(drawn) // step
    places = np.repeat(np.arange(1, looks + 1), step) * pool + drawn[: looks * step]
    counts = np.bincount(places, minlength=(looks + 1) * pool).reshape(looks + 1, pool).astype(np.float32).cumsum(0)
    return counts[window // step :] - counts[: -(window // step)]


def alarms(above: np.ndarray, quiet: int) -> int:
    """Alarms among looks ``(looks,)``: one is counted once until ``quiet`` looks have passed."""
    count, last = 0, -quiet
    for look in np.flatnonzero(above):
        if look - last >= quiet:
            count, last = count + 1, int(look)
    return count


def make_reference(
    embeddings: np.ndarray,
    margins: np.ndarray,
    statistics: np.ndarray,
    settings: DriftSettings,
    facts: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Reference:
    """A reference and its thresholds.

    Args:
        embeddings: inputs of the detector's last layer, ``(n, D)``; ``margins`` ``(n,)`` and ``statistics`` ``(n, 7)``
            of the same pictures, which are undisturbed and in the proportions that are expected.

    Raises:
        ValueError: fewer pictures than a window, or a window that is no multiple of the step.
    """
    count, window = len(embeddings), settings.window
    if window % settings.step:
        raise ValueError(f"a window of {window} is no multiple of the step {settings.step}")
    if count < max(window // 4, 32):
        raise ValueError(f"{count} pictures are too few for windows of {window}: give more, or a smaller --window")
    rng = np.random.default_rng(settings.seed)
    nulls = []
    for split in range(settings.splits):
        order = rng.permutation(count)
        held = order[: max(8, int(count * settings.held_out))]
        own = order[len(held) :][: settings.most]
        bare = _fitted(embeddings[own], margins[own], statistics[own], settings)
        pool = bare.observations(bare.projection(embeddings[held]), margins[held], statistics[held])
        drawn = rng.integers(0, len(held), settings.stream)
        counts = window_counts(drawn, len(held), window, settings.step)
        nulls.append(looks_of(bare, pool, counts))
        say(f"bootstrap: {split + 1} of {settings.splits} streams of {settings.stream} pictures")
    thresholds, told = _thresholds(nulls, settings)
    own = rng.permutation(count)[: settings.most]
    bare = _fitted(embeddings[own], margins[own], statistics[own], settings)
    return Reference(
        bare.projection,
        # as it will be read
        bare.rows.astype(np.float16).astype(np.float32),
        bare.centre,
        bare.spread,
        bare.bandwidths,
        thresholds,
        window,
        settings.step,
        {"pictures": count, "settings": settings.model_dump(), "bootstrap": told} | (facts or {}),
    )


def _fitted(embeddings: np.ndarray, margins: np.ndarray, statistics: np.ndarray, settings: DriftSettings) -> Reference:
    """A reference without thresholds."""
    projection = Projection.fit(embeddings, settings.dimensions, settings.power)
    rest = np.column_stack([margins, statistics]).astype(np.float32)
    centre, spread = rest.mean(0), np.maximum(rest.std(0), 1e-3)
    rows = np.column_stack([projection(embeddings), standardised(rest, centre, spread)]).astype(np.float32)
    bare = Reference(projection, rows, centre, spread, {}, {}, settings.window, settings.step)
    for channel in CHANNELS:
        bare.bandwidths[channel] = median_bandwidth(rows[:, bare.columns(channel)])
    return bare


def looks_of(reference: Reference, pool: np.ndarray, counts: np.ndarray, few: int = 0) -> np.ndarray:
    """The statistic of each channel at each look, ``(looks, channels)``, of windows drawn from a pool of
    observations; ``few`` as of ``Discrepancies``."""
    found = []
    for channel in CHANNELS:
        columns = reference.columns(channel)
        measure = Discrepancies(reference.rows[:, columns], pool[:, columns], reference.bandwidths[channel], few)
        found.append(measure(counts))
    return np.column_stack(found)


def _thresholds(nulls: Sequence[np.ndarray], settings: DriftSettings) -> tuple[dict[Channel, float], dict[str, Any]]:
    """One tail probability for all channels, such that together they are silent for long enough."""
    together = np.sort(np.concatenate(nulls), axis=0)
    looks, quiet = len(together), settings.window // settings.step
    pictures = looks * settings.step

    def at(tail: int) -> np.ndarray:
        """Thresholds above which ``tail`` looks are in each channel."""
        return together[looks - 1 - tail]

    def count(tail: int) -> int:
        return sum(alarms(np.any(null > at(tail), axis=1), quiet) for null in nulls)

    allowed = pictures / settings.between_alarms
    low, high = 0, looks // 4  # `count` is not falling anywhere: looks above only become more
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(middle) <= allowed else (low, middle - 1)
    found = at(low) * (1.0 if low else 1.05)  # none was above: a little beyond what was seen
    told = {
        "pictures": pictures,
        "alarms": count(low),
        "alarms_alone": {
            channel: sum(alarms(null[:, place] > at(low)[place], quiet) for null in nulls)
            for place, channel in enumerate(CHANNELS)
        },
    }
    return {channel: round(float(value), 7) for channel, value in zip(CHANNELS, found, strict=True)}, told


# ---- watching ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """What one look at the window said."""

    pictures: int
    """Seen so far."""
    ratios: dict[Channel, float]
    """Statistic over threshold; above 1 is drift."""
    alarm: bool
    changed: bool
    """An alarm began or ended with this look."""


@dataclass(frozen=True)
class Driver:
    """A picture of the window, and how much it is what the window has and the reference has not."""

    sha256: str
    witness: float


class Watch:
    """A window of the latest pictures beside a reference. An alarm begins with a statistic above its threshold, and
    ends when none has been for a whole window.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.pictures = self.repeated = 0
        self.alarm = False
        self._rows: deque[np.ndarray] = deque(maxlen=reference.window)
        self._hashes: deque[str] = deque(maxlen=reference.window)
        self._inside: set[str] = set()
        self._until_look = reference.step
        self._last_above = 0
        self._own: dict[Channel, float] = {}
        for channel in CHANNELS:
            count = len(reference.rows)
            own = kernel(self._part(channel), self._part(channel), reference.bandwidths[channel])
            self._own[channel] = (float(own.sum()) - count) / (count * (count - 1))

    def _part(self, channel: Channel) -> np.ndarray:
        return self.reference.rows[:, self.reference.columns(channel)]

    @property
    def filled(self) -> float:
        """Share of the window that there is."""
        return len(self._rows) / self.reference.window

    def add(self, sha256: str, observation: np.ndarray) -> Look | None:
        """One more picture, float32 ``(d,)``; what a look said, if it was time for one."""
        if sha256 in self._inside:
            self.repeated += 1
            return None
        if len(self._hashes) == self.reference.window:
            self._inside.discard(self._hashes[0])
        self._hashes.append(sha256)
        self._inside.add(sha256)
        self._rows.append(observation)
        self.pictures += 1
        self._until_look -= 1
        if self._until_look > 0 or len(self._rows) < self.reference.window:
            return None
        self._until_look = self.reference.step
        return self._look()

    def _look(self) -> Look:
        ratios = self.ratios()
        before, above = self.alarm, max(ratios.values()) > 1
        if above:
            self.alarm, self._last_above = True, self.pictures
        elif self.pictures - self._last_above >= self.reference.window:
            self.alarm = False
        return Look(self.pictures, ratios, self.alarm, self.alarm != before)

    def ratios(self) -> dict[Channel, float]:
        """Each channel's statistic over its threshold, of the window as it is."""
        rows, found = np.stack(self._rows), {}
        for channel in CHANNELS:
            own, bandwidth = rows[:, self.reference.columns(channel)], self.reference.bandwidths[channel]
            count = len(own)
            among = (float(kernel(own, own, bandwidth).sum(dtype=np.float64)) - count) / (count * (count - 1))
            across = float(kernel(own, self._part(channel), bandwidth).mean(dtype=np.float64))
            found[channel] = (among - 2 * across + self._own[channel]) / self.reference.thresholds[channel]
        return found

    def drivers(self, channel: Channel, most: int) -> list[Driver]:
        """The pictures of the window that are most what it has and the reference has not (the MMD's witness function),
        the strongest first."""
        rows, bandwidth = np.stack(self._rows), self.reference.bandwidths[channel]
        own = rows[:, self.reference.columns(channel)]
        witness = kernel(own, own, bandwidth).mean(1) - kernel(own, self._part(channel), bandwidth).mean(1)
        order = np.argsort(-witness)[:most]
        return [Driver(self._hashes[place], round(float(witness[place]), 5)) for place in order]

    def moved(self) -> dict[str, float]:
        """How far the window's mean margin and statistics are from the reference's, in its standard deviations."""
        first = self.reference.columns("output").start
        names = ("logit margin of AI", *STATISTICS)
        means = np.stack(self._rows)[:, first:].mean(0) - self.reference.rows[:, first:].mean(0)
        return {name: round(float(value), 3) for name, value in zip(names, means, strict=True)}


def strangeness(reference: Reference, observations: np.ndarray, channel: Channel = "embedding") -> np.ndarray:
    """How unlike the reference single pictures are: the share of its own pictures that are nearer to their fellows than
    each is (mean kernel, left out itself), ``(n,)`` in 0..1. One picture is no drift; 0.99 is a rare one."""
    columns, bandwidth = reference.columns(channel), reference.bandwidths[channel]
    rows = reference.rows[:, columns]
    own = (kernel(rows, rows, bandwidth).sum(1) - 1) / (len(rows) - 1)
    near = kernel(observations[:, columns], rows, bandwidth).mean(1)
    return (own[None] > near[:, None]).mean(1)
