"""What is not said of people: where they come from, and what their skin is like.

A caption guesses both, and neither is what people are to be found by. Tags leave such words out, and a captioner is
kept from writing them (``deployments.captioner``). A word that means something else as well, a colour or the name of a
nation, goes only where a word for people follows: a white dog stays one. Knows no model.
"""

from __future__ import annotations

import itertools

from deployments.words import lemma, lexicon

#: Left out wherever they stand.
ORIGINS = frozenset(
    ("african", "arab", "asian", "caucasian", "ethnic", "hispanic", "latina", "latino", "oriental", "skin", "skinned")
)
#: Left out before a word for people.
ORIGINS_OF_PEOPLE = frozenset(
    """
    black brown dark light pale tan tanned white
    american chinese european indian japanese korean mexican native russian
    """.split()  # noqa: SIM905
)


def of_people(word: str) -> bool:
    """Whether a word is one for people: ``women``, ``skier``."""
    noun = lemma(word)
    return not {noun, *lexicon().implied.get(noun, ())}.isdisjoint(("person", "people"))


def of_origin(words: list[str]) -> bool:
    """Whether words that follow one another say where somebody comes from, or what their skin is like."""
    return not ORIGINS.isdisjoint(words) or any(
        before in ORIGINS_OF_PEOPLE and of_people(word) for before, word in itertools.pairwise(words)
    )
