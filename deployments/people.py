"""What is not said of people: where they come from, and what their skin is like.

A caption guesses both, and neither is what people are to be found by. Tags leave such words out, and a captioner is
kept from writing them (``deployments.captioner``). A word that means something else as well, a colour or the name of a
nation, goes only where a word for people follows: a white dog stays one. Knows no model.
"""

from __future__ import annotations

import itertools

from deployments.words import lemma, lexicon


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Left out wherever they stand, and in the plural.
_ORIGINS = _words("african arab asian caucasian ethnic hispanic latina latino oriental skin skinned")
#: Left out before a word for people.
_OF_PEOPLE = _words(
    """
    black brown dark light pale tan tanned white
    aboriginal american arabian australian brazilian british canadian chinese cuban dutch eastern english european
    french german greek hawaiian indian irish israeli italian japanese korean mexican native polish russian scottish
    spanish swedish thai turkish vietnamese
    """
)
#: What may stand between the two.
_BETWEEN = _words("young old older elderly little small tall big pretty beautiful handsome adult")
#: Words for people that imply no person by WordNet, and words that do and mean a dog or clothes in a caption.
_PEOPLE = _words("band biker couple crowd driver family group team teen")
_OTHERS = _words("boxer jumper shepherd")


def is_origin(word: str) -> bool:
    """Whether a word is left out wherever it stands."""
    return word in _ORIGINS or word.removesuffix("s") in _ORIGINS


def is_origin_of_people(word: str) -> bool:
    """Whether a word is left out before one for people."""
    return word in _OF_PEOPLE


def is_between(word: str) -> bool:
    """Whether a word may stand between those two and changes nothing: a black young man."""
    return word in _BETWEEN


def of_people(word: str) -> bool:
    """Whether a word is one for people: ``women``, ``skier``, ``crowd``."""
    noun = lemma(word)
    implied = {noun, *lexicon().implied.get(noun, ())}
    return noun in _PEOPLE or (noun not in _OTHERS and not implied.isdisjoint(("person", "people")))


def origins_in(words: list[str]) -> set[str]:
    """Those of some words, in their order, that say where somebody comes from, or what their skin is like."""
    told = [word for word in words if not is_between(word)]
    followed = {first for first, word in itertools.pairwise(told) if of_people(word) or is_origin(word)}
    return {word for word in followed if is_origin_of_people(word)} | {word for word in words if is_origin(word)}
