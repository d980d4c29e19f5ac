"""What is held to say of people where they come from, or what their skin is like."""

from __future__ import annotations

import pytest

from deployments.people import of_people, origins_in
from deployments.words import words_of


@pytest.mark.parametrize("word", ["man", "women", "children", "skiers", "people", "toddler", "crowd", "families"])
def test_words_for_people(word: str) -> None:
    assert of_people(word)


@pytest.mark.parametrize("word", ["dog", "shirt", "standing", "haired", "boxer"])
def test_words_for_something_else(word: str) -> None:
    assert not of_people(word)


@pytest.mark.parametrize(
    ("text", "origins"),
    [
        ("an African-American girl", {"african", "american"}),
        ("a dark skinned man", {"dark", "skinned"}),
        ("two Asian kids and a white woman", {"asian", "white"}),
        ("Asians at a market", {"asians"}),
        ("an Indian family", {"indian"}),
        ("a black young man in a brown coat", {"black"}),
        ("a middle eastern couple", {"eastern"}),
    ],
)
def test_origins(text: str, origins: set[str]) -> None:
    assert origins_in(words_of(text)) == origins


@pytest.mark.parametrize(
    "text",
    ["a black and white dog", "a man in white", "a dark haired woman", "an American flag", "a brown boxer", "white"],
)
def test_colours_and_nations_of_things_stay(text: str) -> None:
    assert origins_in(words_of(text)) == set()
