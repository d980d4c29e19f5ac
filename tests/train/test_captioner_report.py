"""Intervals of a captioner's scores: made of the published scorers' own counts, and about the published scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.captions import score_captions
from deployments.checkpoints import Card, Checkpoint
from train import captioner_report
from train.captioner_report import CaptionerSettings, _bleu4, _by_photo, bootstrap
from train.examples import Example

WORDS = ["a", "the", "dog", "man", "child", "runs", "jumps", "sits", "on", "in", "grass", "water", "red", "big", "ball"]


def made(photos: int, wrong: float, seed: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Captions and five human ones of each photo, which share words with them unless they are drawn to be wrong; each
    has a word that no other caption has."""
    random = np.random.default_rng(seed)
    captions, references = {}, {}
    for number in range(photos):
        words = list(random.choice(WORDS, 8))

        def told(words: list[str] = words) -> str:
            return " ".join([word for word in words if random.random() > 0.2] + [f"word{random.integers(10**9)}"])

        references[str(number)] = [told() for _ in range(5)]
        captions[str(number)] = " ".join(random.choice(WORDS, 7)) if random.random() < wrong else told()
    return captions, references


def test_counts_of_photos_come_to_the_published_scores() -> None:
    captions, references = made(60, 0.3, seed=1)
    published = score_captions(captions, references)
    # in any order of the captions
    counts, cider = _by_photo(dict(sorted(captions.items(), reverse=True)), references)
    assert float(cider.mean()) == published["cider"]
    assert _bleu4(counts.sum(0)) == pytest.approx(published["bleu4"], rel=1e-12)
    # and of a part of them, BLEU that pycocoevalcap has of that part
    part = dict(list(references.items())[:20])
    own = score_captions({name: captions[name] for name in part}, part)
    assert _bleu4(counts[:20].sum(0)) == pytest.approx(own["bleu4"], rel=1e-12)
    nothing = dict.fromkeys(references, "")
    assert _bleu4(_by_photo(nothing, references)[0].sum(0)) == 0


def test_intervals_lie_about_their_scores() -> None:
    captions, references = made(120, 0.3, seed=2)
    published = score_captions(captions, references)
    (drawn,) = bootstrap([captions], references, 1000, seed=7)
    for name, values in drawn.items():
        error = values.std()
        assert 0 < error < 0.2 * published[name]
        assert abs(values.mean() - published[name]) < 0.1 * error, name


def test_a_model_does_not_differ_from_itself_and_a_worse_one_does() -> None:
    captions, references = made(80, 0.2, seed=3)
    worse = {name: " ".join(text.split()[:4]) for name, text in captions.items()}
    ours, same, theirs = bootstrap([captions, dict(captions), worse], references, 200, seed=7)
    for name in ("bleu4", "cider"):
        assert (ours[name] == same[name]).all()
        assert np.percentile(ours[name] - theirs[name], 2.5) > 0


def test_a_photo_of_one_caption_takes_no_figure_away(monkeypatch: pytest.MonkeyPatch) -> None:
    captions, references = made(12, 0.2, seed=4)
    references["0"] = references["0"][:1]  # as feedback gives it
    references["1"] = references["1"][:2]
    monkeypatch.setattr(captioner_report, "caption_all", lambda *_: list(captions.values()))
    monkeypatch.setattr(captioner_report, "open_judge", lambda: None)
    examples = [Example(name, name, bytes, captions=tuple(texts)) for name, texts in references.items()]
    model, settings = Checkpoint("a", Path("a"), "1", Card()), CaptionerSettings(templates=0, tagger="", samples=0)
    figures = captioner_report.examine(model, examples, settings, model, 10, 1, 0).figures
    searched = figures["retrieval"]
    assert (searched["photos"], searched["left_out"], searched["queries"]) == (12, 1, 2 + 10 * 5)
    assert set(figures["comparison"]) == {"with", "bleu4", "cider", "recall_at_1", "recall_at_10"}
