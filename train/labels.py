"""Labels and weights of the pictures that a classifier learns from and is judged on.

Knows no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from data.versions import DatasetName, DataVersion
from train.aivshuman import family
from train.calibration import balanced_weights
from train.damage import Tier
from train.module import TrainingError
from train.stream import Batch, Deliver, Pictures

#: Data set -> labels in the order of the logits; the second is the one that scores speak of.
LABELS: dict[DatasetName, tuple[str, str]] = {"aivshuman": ("human", "ai"), "source": ("stock", "platform")}


@dataclass(frozen=True)
class Annotations:
    """Labels and weights of a split's rows, 0 for those left out; row numbers beyond the split mean its pictures in
    another tier."""

    labels: np.ndarray
    weights: np.ndarray
    generators: tuple[str, ...]
    ids: tuple[str, ...]

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        place = rows % len(self.labels)
        return self.labels[place], self.weights[place]

    def counts(self) -> Counter[str]:
        """Pictures of each generator that are not left out."""
        return Counter(name for name, weight in zip(self.generators, self.weights, strict=True) if weight)


def read_annotations(
    version: DataVersion,
    split: Literal["train", "val"],
    labels: tuple[str, str],
    power: float,
    without: Collection[str] = (),
) -> Annotations:
    """A split's labels, and weights of mean 1: half of the sum for each label, and within a label ``n ** power`` for a
    source (of real pictures) or a generator with its relatives, of n pictures. ``without`` names generators and sources
    whose pictures weigh nothing.

    Raises:
        TrainingError: nothing of a label is left.
    """
    table = version.table(split, ["id", "label", "source", "generator"])
    numbers = np.array([labels.index(label) for label in table["label"].to_pylist()], dtype=np.int64)
    generators = tuple(family(generator or "unknown") for generator in table["generator"].to_pylist())
    sources = table["source"].to_pylist()
    left_out = {family(name) for name in without}
    kept = np.array([not left_out & {g, s} for g, s in zip(generators, sources, strict=True)])
    if set(numbers[kept].tolist()) != {0, 1}:
        raise TrainingError(f"without {', '.join(sorted(left_out))} split {split} has not both labels left")
    strata = [
        (label, source if generator == "photo" else generator)
        for label, source, generator, keep in zip(numbers.tolist(), sources, generators, kept, strict=True)
        if keep
    ]
    weights = np.zeros(len(numbers))
    weights[kept] = balanced_weights(numbers[kept], strata, power) * len(numbers) / kept.sum()
    return Annotations(numbers, weights, generators, tuple(table["id"].to_pylist()))


@dataclass(frozen=True)
class InTiers:
    """A split several times over, each time in another tier of delivery: row ``tier * n + row``."""

    pictures: Pictures
    tiers: tuple[Tier, ...]

    @property
    def groups(self) -> tuple[int, ...]:
        return self.pictures.groups * len(self.tiers)

    @property
    def window(self) -> int:
        return self.pictures.window

    def load(self, epoch: int, rows: np.ndarray) -> Iterator[Batch]:
        count = sum(self.pictures.groups)
        for number, tier in enumerate(self.tiers):
            own = rows[rows // count == number]
            if len(own):
                delivered = replace(self.pictures, augment=Deliver(tier))
                for block in delivered.load(epoch, own - number * count):
                    yield {**block, "row": block["row"] + number * count}


def few_of_each(rows: Annotations, most: int) -> np.ndarray:
    """Rows that fit thresholds: all of the first label, and of the second at most ``most`` of one generator, the first
    by id; more would let the largest decide."""
    seen: Counter[str] = Counter()
    chosen = []
    for row in sorted(range(len(rows.ids)), key=lambda row: rows.ids[row]):
        seen[rows.generators[row]] += 1
        if rows.labels[row] == 0 or rows.generators[row] == "photo" or seen[rows.generators[row]] <= most:
            chosen.append(row)
    return np.array(chosen)
