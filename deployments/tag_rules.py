"""From what the language model wrote to tags that hold: the rules after the model.

In: the model's answer (a JSON array, possibly cut off) and the caption it was asked about. Out: 3 to 10 tags.

Who does what, honestly. The model proposes; the engine's grammar already forces an array of one- and two-word
strings. The rules drop what the caption neither says nor plainly implies (which includes everything that leaks from
the prompt's examples), bring words to one form (``dogs`` -> ``dog``), and then complete the list from the caption
itself: nouns that the model left out, then the search words that those nouns imply by WordNet (a puppy is a dog and
an animal). No tag says where people come from or what their skin is like. With a 135 M model the completion carries a
good part of the result, with a 7 B model it should carry less; ``benchmarks/tagger_quality.py`` measures the model's
share.

Knows no engine, no prompt and no HTTP; no language package is needed at serve time, only ``tag_lexicon.json``.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

from deployments.tag_lexicon import LEXICON_FILE

MIN_TAGS, MAX_TAGS, MAX_TAG_LETTERS, MAX_TAG_WORDS = 3, 10, 32, 3

#: True of every picture: what is left to say when a caption has not enough words for three tags.
_LAST_RESORT = ("photo", "picture", "image")

_STOP = frozenset(
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
#: What a caption says of where people come from or what their skin is like. It is a guess, and not what people are to
#: be found by; a colour before a word for people says it too.
_ORIGINS = frozenset(
    ("african", "arab", "asian", "caucasian", "ethnic", "hispanic", "latina", "latino", "oriental", "skin", "skinned")
)
_COLOURS = frozenset(("black", "brown", "dark", "light", "white"))
#: Endings after which a plural takes `es`: dishes, but not gates.
_HISSES = ("s", "x", "z", "ch", "sh", "o")
_WORD = re.compile(r"[a-z0-9]+")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class _Lexicon:
    implied: dict[str, tuple[str, ...]]
    plurals: dict[str, str]


@lru_cache(maxsize=1)
def _lexicon() -> _Lexicon:
    content = json.loads(LEXICON_FILE.read_text())
    implied = {
        word: tuple(filter(None, words.split(",")))
        for words, nouns in content["nouns"].items()
        for word in nouns.split()
    }
    return _Lexicon(implied, content["plurals"])


def words_of(text: str) -> list[str]:
    """The words of a text: lower case, accents removed, hyphens and apostrophes split."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return _WORD.findall(plain.replace("'s", " "))


def lemma(word: str) -> str:
    """A noun's singular (``children`` -> ``child``, ``dogs`` -> ``dog``); any other word as it is."""
    lexicon = _lexicon()
    if word in lexicon.plurals:
        return lexicon.plurals[word]
    if word in lexicon.implied:
        return word
    for ending, instead in (
        ("men", "man"),
        ("ies", "y"),
        ("ves", "f"),
        ("ves", "fe"),
        ("s", ""),
        *((e + "es", e) for e in _HISSES),
    ):
        if word.endswith(ending) and not word.endswith("ss") and word.removesuffix(ending) + instead in lexicon.implied:
            return word.removesuffix(ending) + instead
    return word


def stem(word: str) -> str:
    """What a word's forms share: ``runs``, ``running`` -> ``run``; ``rides``, ``riding`` -> ``rid``."""
    word = lemma(word)
    if word in _lexicon().implied and not word.endswith("ing"):
        return word.removesuffix("e") if len(word) > 3 else word
    for ending in ("ing", "ed", "es", "s", "e"):
        rest = word.removesuffix(ending)
        if rest != word and len(rest) >= 3 and not (ending == "s" and rest.endswith("s")):
            if ending in ("ing", "ed") and len(rest) > 3 and rest[-1] == rest[-2] and rest[-1] not in "sl":
                rest = rest[:-1]
            return rest.removesuffix("e") if len(rest) > 3 else rest
    return word


def _root(word: str) -> str:
    """A coarser stem, to tell tags apart by: ``skateboarder`` and ``skateboarding`` are one tag's worth."""
    word = stem(word)
    for ending in ("ing", "er", "es", "e", "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word.removesuffix(ending)
    return word


def clean_tags(raw: str, caption: str) -> list[str]:
    """The tags of a picture: 3 to 10, lower case, unique by stem, at most 32 characters and 3 words, all supported.

    Args:
        raw: what the model wrote; anything is accepted, an empty text too.
        caption: what it was asked about.
    """
    tags: dict[tuple[str, ...], str] = {}
    for tag in (*proposed(raw, caption), *_nouns(caption), *_implied(caption)):
        _add(tags, tag)
    if len(tags) < MIN_TAGS:
        for word in (*_content(caption), *_LAST_RESORT):
            if len(tags) < MIN_TAGS:
                _add(tags, word)
    return list(tags.values())


def proposed(raw: str, caption: str) -> list[str]:
    """What holds of the model's own answer, in its order, before anything is completed."""
    tags: dict[tuple[str, ...], str] = {}
    said = [stem(word) for word in words_of(caption)]
    allowed = {stem(word) for word in _implied(caption)}
    for text in _strings(raw):
        words = words_of(text)
        stems = [stem(word) for word in words]
        if 1 <= len(words) <= MAX_TAG_WORDS and words[-1] not in _STOP and _adjacent(stems, said):
            _add(tags, " ".join((*words[:-1], lemma(words[-1]))))
            continue
        # "dog running" is no phrase of the caption, but each of its words may stand
        for word, one in zip(words, stems, strict=True):
            if word not in _STOP and (one in said or one in allowed):
                _add(tags, lemma(word))
    return list(tags.values())


def _strings(raw: str) -> list[str]:
    """The strings of a JSON array, also of one that was cut off."""
    try:
        parsed = json.loads(raw)
        return [item for item in parsed if isinstance(item, str)] if isinstance(parsed, list) else []
    except ValueError:
        return _STRING.findall(raw)


def _adjacent(part: list[str], whole: list[str]) -> bool:
    return any(whole[start : start + len(part)] == part for start in range(len(whole) - len(part) + 1))


def _add(tags: dict[tuple[str, ...], str], tag: str) -> None:
    words = tag.split()
    fits = len(tags) < MAX_TAGS and 2 <= len(tag) <= MAX_TAG_LETTERS
    if fits and words[0] not in _STOP - set(_LAST_RESORT) and not _of_origin(words):
        tags.setdefault(tuple(_root(word) for word in words), tag)


def _of_origin(words: list[str]) -> bool:
    return not _ORIGINS.isdisjoint(words) or any(
        colour in _COLOURS and _of_people(word) for colour, word in itertools.pairwise(words)
    )


def _of_people(word: str) -> bool:
    noun = lemma(word)
    return not {noun, *_lexicon().implied.get(noun, ())}.isdisjoint(("person", "people"))


def _content(caption: str) -> list[str]:
    return [word for word in words_of(caption) if word not in _STOP and len(word) > 2]


def _nouns(caption: str) -> list[str]:
    """The caption's nouns, singular, in its order."""
    return [noun for word in _content(caption) if (noun := lemma(word)) in _lexicon().implied and noun not in _STOP]


def _implied(caption: str) -> list[str]:
    """What the caption's nouns are: the nearest word of each noun first, then the more general ones."""
    chains = [_lexicon().implied[noun] for noun in _nouns(caption)]
    depth = max(map(len, chains), default=0)
    return [chain[level] for level in range(depth) for chain in chains if level < len(chain)]
