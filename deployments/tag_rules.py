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

import json
import re

from deployments.people import origins_in
from deployments.words import STOP_WORDS, lemma, lexicon, stem, words_of

MIN_TAGS, MAX_TAGS, MAX_TAG_LETTERS, MAX_TAG_WORDS = 3, 10, 32, 3

#: True of every picture: what is left to say when a caption has not enough words for three tags.
_LAST_RESORT = ("photo", "picture", "image")

_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


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
    unsaid = origins_in(words_of(caption))
    for tag in (*proposed(raw, caption), *_nouns(caption), *_implied(caption)):
        _add(tags, tag)
    if len(tags) < MIN_TAGS:
        for word in (*_content(caption), *_LAST_RESORT):
            if len(tags) < MIN_TAGS and word not in unsaid:
                _add(tags, word)
    return list(tags.values())


def proposed(raw: str, caption: str) -> list[str]:
    """What holds of the model's own answer, in its order, before anything is completed."""
    tags: dict[tuple[str, ...], str] = {}
    told = words_of(caption)
    said, left_out = [stem(word) for word in told], STOP_WORDS | origins_in(told)
    allowed = {stem(word) for word in _implied(caption)}
    for text in _strings(raw):
        words = words_of(text)
        stems = [stem(word) for word in words]
        if 1 <= len(words) <= MAX_TAG_WORDS and words[-1] not in left_out and _adjacent(stems, said):
            _add(tags, " ".join((*words[:-1], lemma(words[-1]))))
            continue
        # "dog running" is no phrase of the caption, but each of its words may stand
        for word, one in zip(words, stems, strict=True):
            if word not in left_out and (one in said or one in allowed):
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
    if fits and words[0] not in STOP_WORDS - set(_LAST_RESORT) and not origins_in(words):
        tags.setdefault(tuple(_root(word) for word in words), tag)


def _content(caption: str) -> list[str]:
    return [word for word in words_of(caption) if word not in STOP_WORDS and len(word) > 2]


def _nouns(caption: str) -> list[str]:
    """The caption's nouns, singular, in its order."""
    return [noun for word in _content(caption) if (noun := lemma(word)) in lexicon().implied and noun not in STOP_WORDS]


def _implied(caption: str) -> list[str]:
    """What the caption's nouns are: the nearest word of each noun first, then the more general ones."""
    chains = [lexicon().implied[noun] for noun in _nouns(caption)]
    depth = max(map(len, chains), default=0)
    return [chain[level] for level in range(depth) for chain in chains if level < len(chain)]
