"""Figures with intervals: ranking, verdicts at fixed thresholds, calibration, and the difference of two models.

In: probabilities or scores as arrays. Out: JSON-ready figures. Intervals are percentiles (95 %) of a bootstrap over
pictures, each class by itself; where groups of near-duplicates are given, over these: ten copies of a picture say no
more than one. A share of all or of none, of which every resample says the same, has the exact interval. Knows no
pictures, no model and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score

Interval = dict[str, float]


def described(value: float, samples: np.ndarray) -> Interval:
    """A value with the 95 % percentile interval of its bootstrap samples."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return {"value": round(float(value), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def numbered(groups: np.ndarray | None, rows: int) -> np.ndarray:
    """The number of each row's group, by their first rows; without groups each row is one."""
    if groups is None:
        return np.arange(rows)
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def redraw(random: np.random.Generator, numbers: np.ndarray) -> np.ndarray:
    """Rows of one resample: as many groups as there are, drawn with replacement."""
    count = int(numbers.max()) + 1
    times = np.bincount(random.integers(count, size=count), minlength=count)
    return np.repeat(np.arange(len(numbers)), times[numbers])


def interval(
    figure: Callable[..., float],
    arrays: list[np.ndarray],
    resamples: int,
    seed: int,
    groups: Sequence[np.ndarray] | None = None,
) -> Interval:
    """A figure of several independent samples, with the 95 % bootstrap interval; each array is resampled by itself
    along its first axis, by the groups of its rows if there are any."""
    random = np.random.default_rng(seed)
    numbers = [numbered(groups[place] if groups else None, len(array)) for place, array in enumerate(arrays)]
    drawn = [
        figure(*(array[redraw(random, own)] for array, own in zip(arrays, numbers, strict=True)))
        for _ in range(resamples)
    ]
    return described(float(figure(*arrays)), np.array(drawn))


def share_of(hits: np.ndarray, resamples: int, seed: int, groups: np.ndarray | None = None) -> Interval:
    """A share with its 95 % interval: ``interval``'s, and where all or none are hits the one of Clopper & Pearson
    (1934) over groups, which is wide where there are few."""
    if hits.any() and not hits.all():
        return interval(
            lambda each: float(each.mean()), [hits], resamples, seed, [groups] if groups is not None else None
        )
    value = float(hits.all())
    end = 0.025 ** (1 / (int(numbered(groups, len(hits)).max()) + 1))
    low, high = (end, 1.0) if value else (0.0, 1 - end)
    return {"value": value, "low": round(low, 4), "high": round(high, 4)}


def paired_difference(
    figure: Callable[..., float],
    ours: list[np.ndarray],
    theirs: list[np.ndarray],
    resamples: int,
    seed: int,
    groups: Sequence[np.ndarray] | None = None,
) -> Interval:
    """``figure(*ours) - figure(*theirs)`` with its 95 % interval; both sides are drawn from the same pictures each
    time, so what the pictures do to both cancels out (Efron & Tibshirani 1993, chapter 10)."""
    random = np.random.default_rng(seed)
    numbers = [numbered(groups[place] if groups else None, len(array)) for place, array in enumerate(ours)]
    drawn = np.empty(resamples)
    for index in range(resamples):
        rows = [redraw(random, own) for own in numbers]
        drawn[index] = figure(*(array[row] for array, row in zip(ours, rows, strict=True))) - figure(
            *(array[row] for array, row in zip(theirs, rows, strict=True))
        )
    return described(figure(*ours) - figure(*theirs), drawn)


def auc(ai: np.ndarray, real: np.ndarray) -> float:
    """ROC AUC: the chance that an AI picture scores above a real one, ties counting half."""
    order = np.sort(real)
    below, upto = np.searchsorted(order, ai, "left"), np.searchsorted(order, ai, "right")
    return float(((below + upto) / 2).mean() / len(real))


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> list[dict[str, float]]:
    """Equal-width bins of stated probability that hold a picture: mean stated, share observed, pictures."""
    index = np.minimum((probabilities * bins).astype(int), bins - 1)
    return [
        {
            "stated": float(probabilities[index == number].mean()),
            "observed": float(labels[index == number].mean()),
            "pictures": int((index == number).sum()),
        }
        for number in range(bins)
        if (index == number).any()
    ]


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> float:
    """Mean distance of stated probability and observed share over equal-width bins, weighted by their pictures (Guo et
    al. 2017)."""
    return float(
        sum(
            entry["pictures"] / len(labels) * abs(entry["stated"] - entry["observed"])
            for entry in reliability(probabilities, labels, bins)
        )
    )


def answers(probabilities: np.ndarray, below: float, above: float) -> dict[str, float]:
    """Shares of the three answers."""
    return {
        "human": round(float((probabilities < below).mean()), 4),
        "uncertain": round(float(((probabilities >= below) & (probabilities < above)).mean()), 4),
        "ai": round(float((probabilities >= above).mean()), 4),
    }


def balanced_accuracy(ai: np.ndarray, real: np.ndarray, above: float) -> float:
    """Mean of the AI pictures' recall and the real pictures' accuracy at one threshold."""
    return float(((ai >= above).mean() + (real < above).mean()) / 2)


def verdict_figures(
    probabilities: np.ndarray,
    labels: np.ndarray,
    thresholds: Mapping[str, float],
    resamples: int,
    seed: int,
    groups: np.ndarray | None = None,
) -> dict[str, Any]:
    """Everything about one tier of one set: ranking, verdicts at the fixed thresholds, calibration; label 1 is AI.

    Raises:
        ValueError: one of the classes is absent.
    """
    ai, real = probabilities[labels == 1], probabilities[labels == 0]
    if not len(ai) or not len(real):
        raise ValueError(f"a detector is judged on both classes; here are {len(ai)} AI and {len(real)} real pictures")
    above, below = thresholds["ai_above"], thresholds["human_below"]
    numbers = numbered(groups, len(labels))
    of_ai, of_real = numbers[labels == 1], numbers[labels == 0]
    nll = -np.log(np.clip(np.where(labels == 1, probabilities, 1 - probabilities), 1e-12, 1))
    return {
        "ai": len(ai),
        "real": len(real),
        "roc_auc": interval(auc, [ai, real], resamples, seed, [of_ai, of_real]),
        "average_precision": round(float(average_precision_score(labels, probabilities)), 4),
        "real_accuracy": share_of(real < above, resamples, seed, of_real),
        "ai_recall": share_of(ai >= above, resamples, seed, of_ai),
        "balanced_accuracy": interval(
            lambda x, y: balanced_accuracy(x, y, above), [ai, real], resamples, seed, [of_ai, of_real]
        ),
        "real_answers": answers(real, below, above),
        "ai_answers": answers(ai, below, above),
        "nll": round(float(nll.mean()), 4),
        "ece": round(expected_calibration_error(probabilities, labels), 4),
    }


def by_generator(
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]],
    column: int,
    resamples: int,
    seed: int,
    groups: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> dict[str, Any]:
    """ROC AUC by generator for one tier, their plain mean and their mean weighted by pictures.

    ``scores`` holds, for each generator, scores ``(pictures, tiers)`` of its pictures and of the real photos, and
    ``groups`` their groups. The photos are the same each time, so one draw of them serves all generators of a resample.
    """
    random = np.random.default_rng(seed)
    names = list(scores)
    sizes = np.array([len(scores[name][0]) for name in names])
    sides = {name: groups[name] if groups else (None, None) for name in names}
    numbers = {name: numbered(sides[name][0], len(scores[name][0])) for name in names}
    of_photos = numbered(sides[names[0]][1], len(scores[names[0]][1]))
    drawn = np.empty((resamples, len(names)))
    for row in drawn:
        kept = redraw(random, of_photos)
        for place, name in enumerate(names):
            ai, real = scores[name]
            row[place] = auc(ai[redraw(random, numbers[name]), column], real[kept, column])
    exact = np.array([auc(scores[name][0][:, column], scores[name][1][:, column]) for name in names])
    return {
        "mean_over_generators": described(float(exact.mean()), drawn.mean(1)),
        "mean_over_pictures": described(float(exact @ sizes / sizes.sum()), drawn @ sizes / sizes.sum()),
        "generators": {
            name: {"pictures": int(size)} | described(value, drawn[:, place])
            for place, (name, size, value) in enumerate(zip(names, sizes, exact, strict=True))
        },
    }
