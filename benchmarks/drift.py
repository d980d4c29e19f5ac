"""Drift: how often it is cried for nothing, and after how many pictures a generator that nobody knew is noticed.

In: a prepared version of aivshuman, a detector on a frozen tower, folders of further pictures. Out:
``results/drift.json`` and a table. Nothing is served: the statistic is the service's own, on the detector's own outputs
of real pictures. What is stopped goes on with the part that is missing.

* **undisturbed**: streams drawn with replacement from pictures that the reference has not: the test split against the
  reference that is served, and a random fifth against a reference made of the rest, again and again. The pools are
  small (a fifth is 250 pictures), so how they differ from the reference by chance counts as false alarm too.
* **held-out generators**: the reference is made without one generator (and its near relatives); a quarter of the other
  pictures is kept out and makes the stream, into which the generator is mixed at ``--share`` from a full window on. The
  delay is counted from its first picture to the alarm. The tower is frozen and knows no generator; the output is that
  of ridge heads that saw neither the generator nor the picture they answer about.
* **channel by channel**: in these data size and compression tell most sources apart, which on a platform they may not.
  So every figure is given for all three channels, for each alone, and for embedding and output without the file's own
  facts.
  Generators have 15 to 500 pictures here, which come again and again in a stream: their repetitions are not allowed to
  tell (``Discrepancies``).
* **one by one**: how strange each further picture is for itself, by how much it moves a window, and the delay if all of
  them were a generator. Four pictures are few to say what their kind is like.

    python -m benchmarks.drift --data PREPARED/aivshuman --extra GHIBLI
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.report import RESULTS, write_result
from data.versions import open_version
from deployments.checkpoints import resolve
from deployments.detector import DetectorModel
from deployments.drift_statistic import (
    CHANNELS,
    Channel,
    DriftSettings,
    Reference,
    alarms,
    looks_of,
    make_reference,
    read_reference,
    strangeness,
    window_counts,
)
from train.calibration import sigmoid
from train.drift_reference import Observed, kind_of, observe, read_pictures

#: Which channels may raise the alarm.
SETS: dict[str, tuple[Channel, ...]] = {
    "all": CHANNELS,
    "embedding and output": ("embedding", "output"),
    **{channel: (channel,) for channel in CHANNELS},
}
PROMISED = 20_000


class DriftBenchmark(BaseModel):
    """Settings of a run."""

    model_config = ConfigDict(extra="forbid")

    data: str = Field(description="prepared aivshuman NAME/VERSION, or NAME for its newest version")
    checkpoint: str = Field("starter:detector", description="a detector with a reference for drift")
    extra: list[Path] = Field([], description="folders of pictures that are reported one by one")
    cache: Path | None = Field(None, description="folder for what the detector said of the pictures; unset: not kept")
    share: float = Field(0.2, gt=0, lt=1, description="of the new generator in the stream")
    within: int = Field(500, ge=1, description="pictures within which it should be noticed")
    longest: int = Field(4000, ge=1, description="pictures after which a stream is given up")
    repeats: int = Field(4, ge=1, description="random splits for each generator")
    splits: int = Field(8, ge=1, description="of the bootstrap that makes thresholds, in each of them")
    streams: int = Field(100, ge=1, description="streams in each")
    folds: int = Field(16, ge=1, description="random fifths that undisturbed streams are drawn of")
    undisturbed: int = Field(400_000, ge=1000, description="length of the undisturbed streams of each")
    threads: int = Field(2, ge=1)
    seed: int = 0


@dataclass(frozen=True)
class Pictures:
    """All pictures of a version, and what the detector said of them."""

    rows: list[dict[str, Any]]
    observed: Observed
    kinds: np.ndarray
    """``photo`` or a family of generators."""


def kept(cache: Path | None, name: str, make: Callable[[], Observed]) -> Observed:
    """From the cache, or made and put there."""
    file = cache / f"{name}.npz" if cache is not None else None
    if file is not None and file.is_file():
        with np.load(file) as found:
            return Observed(found["embeddings"], found["margins"], found["statistics"])
    observed = make()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, embeddings=observed.embeddings, margins=observed.margins, statistics=observed.statistics)
    return observed


def settings_of(served: Reference, config: DriftBenchmark) -> DriftSettings:
    """The served reference's, with a shorter bootstrap."""
    return DriftSettings.model_validate(served.facts["settings"] | {"splits": config.splits})


def reference_of(observed: Observed, settings: DriftSettings) -> Reference:
    return make_reference(observed.embeddings, observed.margins, observed.statistics, settings)


def pool_of(reference: Reference, observed: Observed) -> np.ndarray:
    """Observations as the watcher makes them."""
    projected = reference.projection(observed.embeddings)
    return reference.observations(projected, observed.margins, observed.statistics)


def above_of(reference: Reference, looks: np.ndarray, channels: Sequence[Channel]) -> np.ndarray:
    """Looks ``(n, channels)`` at which one of some channels is above its threshold."""
    found = [looks[:, CHANNELS.index(channel)] > reference.thresholds[channel] for channel in channels]
    return np.any(found, axis=0)


def false_alarms(reference: Reference, pool: np.ndarray, length: int, rng: np.random.Generator) -> dict[str, int]:
    """Alarms in undisturbed streams of so many pictures, by who may raise them."""
    counted = dict.fromkeys(SETS, 0)
    piece = 100_000
    for first in range(0, length, piece):
        drawn = rng.integers(0, len(pool), min(piece, length - first))
        looks = looks_of(reference, pool, window_counts(drawn, len(pool), reference.window, reference.step))
        for name, channels in SETS.items():
            above = above_of(reference, looks, channels)
            counted[name] += alarms(above, reference.window // reference.step)
    return counted


def delays(
    reference: Reference, usual: np.ndarray, new: np.ndarray, config: DriftBenchmark, rng: np.random.Generator
) -> dict[str, list[float]]:
    """Pictures from the first of a new kind to the alarm, by who may raise it; infinite: not within ``longest``."""
    pool = np.concatenate([usual, new])
    found: dict[str, list[float]] = {name: [] for name in SETS}
    for _ in range(config.streams):
        before = rng.integers(0, len(usual), reference.window)
        mixed = rng.integers(0, len(usual), config.longest)
        is_new = rng.random(config.longest) < config.share
        mixed[is_new] = len(usual) + rng.integers(0, len(new), int(is_new.sum()))
        drawn = np.concatenate([before, mixed])
        # the first look is at the undisturbed window; an alarm there is a false one and counted elsewhere
        counts = window_counts(drawn, len(pool), reference.window, reference.step)
        looks = looks_of(reference, pool, counts, few=len(new))[1:]
        for name, channels in SETS.items():
            hits = np.flatnonzero(above_of(reference, looks, channels))
            found[name].append(float(hits[0] + 1) * reference.step if len(hits) else math.inf)
    return found


def summary(found: Sequence[float], within: int) -> dict[str, Any]:
    """Of delays."""
    values = np.array(found)

    def shown(value: float) -> int | None:
        return int(value) if math.isfinite(value) else None

    return {
        "median": shown(float(np.quantile(values, 0.5, method="higher"))),
        "p90": shown(float(np.quantile(values, 0.9, method="higher"))),
        "p95": shown(float(np.quantile(values, 0.95, method="higher"))),
        f"within_{within}": round(float((values <= within).mean()), 3),
        "never": round(float(np.isinf(values).mean()), 3),
        "streams": len(values),
    }


def heads_without(pictures: Pictures, chosen: np.ndarray, new: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Margins of all pictures by ridge heads trained on ``chosen`` ones: of these by heads that did not see them (five
    folds), of ``new`` ones by a head that saw all."""
    from sklearn.linear_model import RidgeClassifier

    values = pictures.observed.embeddings
    labels = np.array([row["label"] == "ai" for row in pictures.rows])
    margins = np.zeros(len(labels))

    def answer(seen: np.ndarray, asked: np.ndarray) -> None:
        head = RidgeClassifier(alpha=1000.0, class_weight="balanced").fit(values[seen], labels[seen])
        margins[asked] = head.decision_function(values[asked])

    for fold in np.array_split(rng.permutation(chosen), 5):
        answer(np.setdiff1d(chosen, fold), fold)
    answer(chosen, new)
    return margins


def held_out(
    pictures: Pictures, name: str, settings: DriftSettings, config: DriftBenchmark, rng: np.random.Generator
) -> dict[str, Any]:
    """One generator that the reference does not have."""
    is_new = pictures.kinds == name
    others, new = np.flatnonzero(~is_new), np.flatnonzero(is_new)
    found: dict[str, list[float]] = {each: [] for each in SETS}
    false, shares = dict.fromkeys(SETS, 0), []
    for _ in range(config.repeats):
        margins = heads_without(pictures, others, new, rng)
        observed = Observed(pictures.observed.embeddings, margins, pictures.observed.statistics)
        order = rng.permutation(others)
        usual, own = order[: len(order) // 4], order[len(order) // 4 :]
        reference = reference_of(observed[own], settings)
        pool = pool_of(reference, observed[usual])
        more = delays(reference, pool, pool_of(reference, observed[new]), config, rng)
        counted = false_alarms(reference, pool, config.undisturbed // 4, rng)
        for each in SETS:
            found[each] += more[each]
            false[each] += counted[each]
        shares.append(round(float((np.array(more["all"]) <= config.within).mean()), 3))
    pictures_drawn = config.repeats * (config.undisturbed // 4)
    return {
        "pictures": len(new),
        "delay": {each: summary(values, config.within) for each, values in found.items()},
        f"within_{config.within}_by_split": shares,
        "false_alarms_per_20000": {each: round(count / pictures_drawn * PROMISED, 3) for each, count in false.items()},
    }


def undisturbed(
    pictures: Pictures, served: Reference, config: DriftBenchmark, rng: np.random.Generator
) -> dict[str, Any]:
    """False alarms where nothing has changed."""
    test = np.array([row["split"] == "test" for row in pictures.rows])
    pool = pool_of(served, pictures.observed[test])
    length = 5 * config.undisturbed
    own = false_alarms(served, pool, length, rng)
    settings = settings_of(served, config)
    rates: list[float] = []
    for _ in range(config.folds):
        order = rng.permutation(len(pictures.rows))
        usual, rest = order[: len(order) // 5], order[len(order) // 5 :]
        reference = reference_of(pictures.observed[rest], settings)
        counted = false_alarms(reference, pool_of(reference, pictures.observed[usual]), config.undisturbed, rng)
        rates.append(counted["all"] / config.undisturbed * PROMISED)
        print(f"undisturbed: {rates[-1]:.2f} false alarms in {PROMISED} pictures", flush=True)
    means = np.array([rng.choice(rates, len(rates)).mean() for _ in range(2000)])
    return {
        "served": {
            "pool": f"{int(test.sum())} pictures of the test split, of which the reference has none",
            "drawn": length,
            "alarms": own,
            "alarms_per_20000": {name: round(count / length * PROMISED, 3) for name, count in own.items()},
        },
        "random_fifths": {
            "drawn_each": config.undisturbed,
            "alarms_per_20000": [round(rate, 3) for rate in rates],
            "mean": round(float(np.mean(rates)), 3),
            "mean_95": [round(float(value), 3) for value in np.quantile(means, [0.025, 0.975])],
            "folds_above_the_promise": sum(rate > 1 for rate in rates),
        },
        "how": "bootstrap: streams drawn with replacement from held-out pictures, independent of each other; alarms a "
        "window apart are one. Intervals: bootstrap over the folds",
    }


def one_by_one(
    folder: Path,
    model: DetectorModel,
    served: Reference,
    usual: np.ndarray,
    config: DriftBenchmark,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Every picture of a folder for itself, and all of them as if they were a generator."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    made = (path.read_bytes() for path in paths)
    observed = kept(config.cache, f"extra-{folder.name}", lambda: observe(model, made, len(paths)))
    pool = pool_of(served, observed)
    strange = {channel: strangeness(served, pool, channel) for channel in CHANNELS}
    order = rng.permutation(len(usual))
    windows = np.stack([usual[rng.permutation(order)[: min(served.window, len(usual))]] for _ in range(20)])
    before = np.stack([one_window(served, window) for window in windows])
    told: dict[str, Any] = {}
    for place, path in enumerate(paths):
        changed = windows.copy()
        changed[:, 0] = pool[place]
        moved = (np.stack([one_window(served, window) for window in changed]) - before).mean(0)
        told[path.name] = {
            "ai_probability": round(float(sigmoid(observed.margins[place : place + 1])[0]), 3),
            "stranger_than": {channel: round(float(strange[channel][place]), 3) for channel in CHANNELS},
            "moves_a_window_by": dict(zip(CHANNELS, np.round(moved, 4).tolist(), strict=True)),
        }
    together = delays(served, usual, pool, config, rng)
    return {
        "one_by_one": told,
        "all_mixed_in": {name: summary(values, config.within) for name, values in together.items()},
    }


def one_window(reference: Reference, window: np.ndarray) -> np.ndarray:
    """Each channel's statistic over its threshold."""
    looks = looks_of(reference, window, np.ones((1, len(window)), dtype=np.float32))[0]
    return looks / [reference.thresholds[channel] for channel in CHANNELS]


def begun(told: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run that was stopped had measured of the same things in the same way."""
    file = RESULTS / "drift.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    parts = ("undisturbed", "held_out_generators", "extra")
    same = {key: found.get(key) for key in told} == told
    return told | {part: found[part] for part in parts if same and part in found}


def measure(config: DriftBenchmark) -> Iterator[dict[str, Any]]:
    """All figures so far, again after each part."""
    torch.set_num_threads(config.threads)
    checkpoint = resolve(config.checkpoint)
    served = read_reference(checkpoint.folder)
    if served is None:
        raise SystemExit(f"error: {checkpoint.uri} has no reference: make one with `python -m train.drift_reference`")
    model, version = DetectorModel(checkpoint), open_version(config.data)
    rows, contents = read_pictures(version, ["train", "val", "test"], 10**9)
    observed = kept(config.cache, version.manifest.version, lambda: observe(model, contents, len(rows)))
    pictures = Pictures(rows, observed, np.array([kind_of(row) for row in rows]))
    settings = settings_of(served, config)
    result = begun(
        {
            "model": checkpoint.name,
            "data": {"name": version.manifest.name, "version": version.manifest.version, "pictures": len(rows)},
            "settings": settings.model_dump(),
            "measured_with": config.model_dump(
                include={"share", "within", "longest", "repeats", "streams", "folds", "undisturbed", "seed"}
            ),
            "thresholds_made_by": served.facts["bootstrap"],
        }
    )
    if "undisturbed" not in result:
        result["undisturbed"] = undisturbed(pictures, served, config, np.random.default_rng(config.seed))
        yield result
    generators: dict[str, Any] = result.setdefault("held_out_generators", {})
    for number, name in enumerate(sorted(set(pictures.kinds) - {"photo"})):
        if name not in generators:
            rng = np.random.default_rng([config.seed, number])
            generators[name] = held_out(pictures, name, settings, config, rng)
            print(line(name, generators[name], config), flush=True)
            yield result
    usual = pool_of(served, observed[np.array([row["split"] == "test" for row in rows])])
    further: dict[str, Any] = result.setdefault("extra", {})
    for folder in config.extra:
        if folder.name not in further:
            rng = np.random.default_rng(config.seed)
            further[folder.name] = one_by_one(folder.expanduser(), model, served, usual, config, rng)
            yield result


def line(name: str, figures: dict[str, Any], config: DriftBenchmark) -> str:
    """A generator's figures for people."""
    cells = []
    for each in SETS:
        delay = figures["delay"][each]
        cells.append(f"{each} {delay['median'] or 'never'} ({delay[f'within_{config.within}']:.0%})")
    return f"{name[:24]:24} median delay (within {config.within}): " + ", ".join(cells)


def main(arguments: list[str] | None = None) -> None:
    """Measure and write ``results/drift.json``."""
    from pydantic_settings import CliApp

    config = CliApp.run(DriftBenchmark, cli_args=arguments)
    for result in measure(config):
        print(write_result("drift", result), flush=True)


if __name__ == "__main__":
    main()
