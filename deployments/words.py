"""The words of a caption: their forms, and what a noun implies by WordNet (``tag_lexicon.json``).

No language package is needed for it. Knows no tag, no model and no grammar.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

from deployments.tag_lexicon import LEXICON_FILE

#: Words that name nothing in a picture.
STOP_WORDS = frozenset(
    """
    a an the and or but nor of in on at to by for from with without into onto over under above below behind beside
    between near next against along across around through off out up down away as than then while during before
    after about be is are was were been being am do does did doing done has have had having can could will would
    may might must shall should get gets getting got go goes going gone went let it its this that these those
    there here he she they them him her his hers their theirs we us our you your i me my who whom whose which what
    where when why how not no yes so too very just only also other another others each every both all any some
    several many few most more much one two three four five six seven eight nine ten first second lot lots bunch
    pair couple group set piece kind type front back side sides top bottom middle end edge way background
    foreground area part something someone somebody thing things looks look looking appears seems photo photograph
    picture image view tag tags caption together
    """.split()  # noqa: SIM905
)
#: Endings after which a plural takes `es`: dishes, but not gates.
_HISSES = ("s", "x", "z", "ch", "sh", "o")
_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Lexicon:
    """What each noun implies, the nearest first, and plurals that no rule makes."""

    implied: dict[str, tuple[str, ...]]
    plurals: dict[str, str]


@lru_cache(maxsize=1)
def lexicon() -> Lexicon:
    """The part of WordNet that is carried along."""
    content = json.loads(LEXICON_FILE.read_text())
    implied = {
        word: tuple(filter(None, words.split(",")))
        for words, nouns in content["nouns"].items()
        for word in nouns.split()
    }
    return Lexicon(implied, content["plurals"])


def words_of(text: str) -> list[str]:
    """The words of a text: lower case, accents removed, hyphens and apostrophes split."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return _WORD.findall(plain.replace("'s", " "))


def lemma(word: str) -> str:
    """A noun's singular (``children`` -> ``child``, ``dogs`` -> ``dog``); any other word as it is."""
    known = lexicon()
    if word in known.plurals:
        return known.plurals[word]
    if word in known.implied:
        return word
    for ending, instead in (
        ("men", "man"),
        ("ies", "y"),
        ("ves", "f"),
        ("ves", "fe"),
        ("s", ""),
        *((e + "es", e) for e in _HISSES),
    ):
        if word.endswith(ending) and not word.endswith("ss") and word.removesuffix(ending) + instead in known.implied:
            return word.removesuffix(ending) + instead
    return word


def stem(word: str) -> str:
    """What a word's forms share: ``runs``, ``running`` -> ``run``; ``rides``, ``riding`` -> ``rid``."""
    word = lemma(word)
    if word in lexicon().implied and not word.endswith("ing"):
        return word.removesuffix("e") if len(word) > 3 else word
    for ending in ("ing", "ed", "es", "s", "e"):
        rest = word.removesuffix(ending)
        if rest != word and len(rest) >= 3 and not (ending == "s" and rest.endswith("s")):
            if ending in ("ing", "ed") and len(rest) > 3 and rest[-1] == rest[-2] and rest[-1] not in "sl":
                rest = rest[:-1]
            return rest.removesuffix("e") if len(rest) > 3 else rest
    return word
