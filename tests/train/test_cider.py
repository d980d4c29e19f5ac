"""The reward is the score: CIDEr of single captions agrees with the published scorer's."""

from __future__ import annotations

import numpy as np
import pytest

from data.captions import score_captions
from train.cider import CiderReward

REFERENCES = [
    ["a brown dog runs across the grass", "a dog running in a field", "the dog runs"],
    ["two men ride bicycles down a street", "men on bikes in the city"],
    ["a child jumps into a pool", "a boy is jumping into the water", "child in the pool"],
]


def test_the_reward_is_pycocoevalcaps_cider() -> None:
    captions = ["a brown dog runs in a field", "two men on a street", "a boy jumps into the pool"]
    reward = CiderReward(REFERENCES)
    own = [reward(number, caption) for number, caption in enumerate(captions)]
    published = score_captions(
        {str(number): caption for number, caption in enumerate(captions)},
        {str(number): texts for number, texts in enumerate(REFERENCES)},
    )["cider"]
    assert float(np.mean(own)) == pytest.approx(published, rel=1e-6)
    assert all(value > 0 for value in own)


def test_a_caption_of_another_photo_earns_less_and_nothing_earns_nothing() -> None:
    reward = CiderReward(REFERENCES)
    assert reward(0, REFERENCES[0][0]) > reward(0, REFERENCES[1][0])
    assert reward(0, "") == 0 and reward(0, "xyzzy") == 0


def test_with_ends_a_torn_off_sentence_earns_less_than_a_whole_one() -> None:
    plain, reward = CiderReward(REFERENCES), CiderReward(REFERENCES, with_ends=True)
    assert plain(0, "a dog runs in a") > plain(0, "a dog runs")  # what the ends are for
    assert reward(0, "a dog runs") > reward(0, "a dog runs in a")
    assert reward(0, "a dog runs") > reward(0, "a dog runs", has_ended=False)
    assert reward(0, "") == 0


def test_what_can_be_said_of_the_photos_like_it_earns_less_than_what_is_its_own() -> None:
    references = [
        *REFERENCES,
        ["a dog runs across the grass with a red frisbee", "the dog runs with a frisbee"],
        ["a black dog runs across the grass past a fence", "the dog runs past a fence"],
    ]
    plain, reward = CiderReward(references), CiderReward(references, distinct=1.0, like=2)
    assert set(reward.alike(2)[3]) == {0, 4} and all(len(set(others)) == 2 for others in reward.alike(2))
    common, own = "a dog runs across the grass", "the dog runs with a red frisbee"
    assert reward(3, own) - reward(3, common) > plain(3, own) - plain(3, common)
    both = sum(plain(other, common) for other in (4, 0)) / 2
    assert reward(3, common) == pytest.approx(plain(3, common) - both)
    assert CiderReward(REFERENCES[:1], distinct=1.0)(0, "a dog runs") == CiderReward(REFERENCES[:1])(0, "a dog runs")
