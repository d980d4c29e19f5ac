"""What a picture weighs, and what turns a detector's logits into answers: temperature, bias and the two thresholds,
fitted on validation data.

In: scores (log-odds of the second label), labels and weights of validation pictures. Out: numbers for the card. Knows
no model and no picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch.nn import functional


def calibrate(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Temperature T and bias b that minimise the weighted NLL of ``sigmoid((score + b) / T)`` (Platt 1999; Guo et al.
    2017).

    The bias goes into the head; detectors drift to one side on other data, which a temperature cannot repair.

    Scores that part the labels without an error, or that rank them the wrong way round, have no best pair: both numbers
    stay within bounds that are counted in the scores' own deviations.
    """
    z, y, w = (torch.from_numpy(np.asarray(values, dtype=np.float64)) for values in (scores, labels, weights))
    mean, deviation = float(z.mean()), float(z.std(correction=0)) or 1.0
    z = (z - mean) / deviation
    log_scale, bias = (
        torch.zeros((), dtype=torch.float64, requires_grad=True),
        torch.zeros((), dtype=torch.float64, requires_grad=True),
    )
    optimizer = torch.optim.LBFGS([log_scale, bias], max_iter=200, line_search_fn="strong_wolfe")

    def scale() -> torch.Tensor:
        return log_scale.clamp(-5, 7).exp()

    def shift() -> torch.Tensor:
        return bias.clamp(-10, 10)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = functional.binary_cross_entropy_with_logits((z + shift()) * scale(), y, weight=w)
        loss.backward()
        return loss

    optimizer.step(closure)
    return deviation / float(scale().detach()), deviation * float(shift().detach()) - mean


def balanced_weights(labels: np.ndarray, strata: Sequence[Hashable], power: float) -> np.ndarray:
    """A weight for each picture, mean 1: half of the sum for each label, and within a label ``n ** power`` for a
    stratum of n pictures.
    """
    sizes = Counter(strata)
    weights = np.array([sizes[stratum] ** (power - 1.0) for stratum in strata])
    for label in set(labels.tolist()):
        own = labels == label
        weights[own] *= len(labels) / len(set(labels.tolist())) / weights[own].sum()
    return weights


def choose_thresholds(
    probabilities: np.ndarray, labels: np.ndarray, real_error: float, ai_error: float
) -> dict[str, float]:
    """The borders of the three answers, on validation data.

    ``ai_above`` is the lowest border at which at most ``real_error`` of the real pictures are called AI;
    ``human_below`` the highest, not above ``ai_above``, at which at most ``ai_error`` of the AI pictures are called
    human. Between them the answer is `uncertain`.
    """
    ai_above = float(np.quantile(probabilities[labels == 0], 1 - real_error, method="higher"))
    human_below = float(np.quantile(probabilities[labels == 1], ai_error, method="lower"))
    # `ai` is a probability at or above the border, so it must lie just beyond the last real picture
    ai_above = float(np.nextafter(ai_above, 1.0))
    return {"human_below": min(human_below, ai_above), "ai_above": ai_above}


def sigmoid(values: np.ndarray) -> np.ndarray:
    """Logistic function without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * values))
