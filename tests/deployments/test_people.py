"""What is held to say of people where they come from, or what their skin is like."""

from __future__ import annotations

import pytest

from deployments.people import of_origin, of_people
from deployments.words import words_of


@pytest.mark.parametrize("word", ["man", "women", "children", "skiers", "people", "toddler"])
def test_words_for_people(word: str) -> None:
    assert of_people(word)


@pytest.mark.parametrize("word", ["dog", "shirt", "standing", "haired", "crowdedly"])
def test_words_for_something_else(word: str) -> None:
    assert not of_people(word)


@pytest.mark.parametrize(
    "text",
    [
        "an African-American girl",
        "a dark skinned man",
        "two Asian kids",
        "a white woman",
        "Chinese tourists",
        "her skin",
    ],
)
def test_of_origin(text: str) -> None:
    assert of_origin(words_of(text))


@pytest.mark.parametrize(
    "text", ["a black and white dog", "a man in white", "a dark haired woman", "an American flag", "brown grass"]
)
def test_colours_and_nations_of_things_stay(text: str) -> None:
    assert not of_origin(words_of(text))
