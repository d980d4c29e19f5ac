"""Quality of tags and captions by their words: what is supported, what is a noun, what is found, what is made up.

In: texts. Out: shares. Words are compared by WordNet lemma, then Porter stem; WordNet is Debian's ``wordnet-base``.

* rules: 3 to 10 tags, lower case, unique by stem, at most 32 characters and 3 words, valid in the annotation record.
* supported: each word of the tag has its stem in the caption, or the tag (or that word) is a WordNet synonym or
  hypernym, in any sense, of a word of the caption. ``supported_first_sense`` allows a caption word's most frequent
  sense alone.
* reference nouns: words that WordNet's tagged texts use as a noun more often than as anything else, stop words left
  out, that occur in at least two references of the photo. ``recall_any`` takes the nouns of every single reference,
  ``recall_majority`` those of more than half of the references.
* recall: found nouns / nouns over all photos; a noun is found when a word of a tag has its stem.
* leaked: a tag of the prompt's examples that the caption does not support.
* made up: a noun of a generated caption that no human caption of the photo says or implies (after Rohrbach et al.
  2018, CHAIR, with all nouns instead of 80 object classes).

WordNet serves both the tagger (a small derived lexicon) and this measurement: what is wrong in WordNet goes unnoticed.
Knows no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from deployments.annotation import Tag
from deployments.tag_lexicon import WordNet
from deployments.tagger import load_prompt
from deployments.words import STOP_WORDS, words_of

WORDNET = Path("/usr/share/wordnet")
_TAG = TypeAdapter(Tag)


class Judge:
    """Answers what is supported, what is a noun and what is found, by WordNet and Porter stems."""

    def __init__(self, wordnet: WordNet) -> None:
        from nltk.stem.porter import PorterStemmer

        self.wordnet = wordnet
        self._porter = PorterStemmer()

    @lru_cache(maxsize=50_000)  # noqa: B019  one judge lives as long as the program
    def stem(self, word: str) -> str:
        return str(self._porter.stem(self.wordnet.lemma(word) or word))

    def stems(self, text: str) -> list[str]:
        return [self.stem(word) for word in words_of(text)]

    def supported(self, tag: str, caption: str, senses: int | None = None) -> bool:
        """Whether the caption says or implies a tag; ``senses``: how many senses of a caption word count."""
        said = set(self.stems(caption))
        words = {self.wordnet.lemma(word) or word for word in words_of(caption)}
        implied = [tag, *words_of(tag)]
        if any(self.wordnet.implies(word, tag, senses) for word in words):
            return True
        return all(
            self.stem(part) in said or any(self.wordnet.implies(word, part, senses) for word in words)
            for part in implied[1:]
        )

    def noun_lemmas(self, caption: str) -> set[str]:
        """Lemmas of a caption's nouns."""
        found = set()
        for word in words_of(caption):
            lemma = self.wordnet.lemma(word)
            if lemma and len(lemma) > 2 and not {word, lemma} & STOP_WORDS and self.wordnet.noun_share(lemma) > 0.5:
                found.add(lemma)
        return found

    def nouns(self, caption: str) -> set[str]:
        """Stems of a caption's nouns."""
        return {self.stem(lemma) for lemma in self.noun_lemmas(caption)}

    def reference_nouns(self, references: Sequence[str], at_least: int) -> set[str]:
        """Stems of the nouns that occur in at least so many references."""
        counts = Counter(noun for reference in references for noun in self.nouns(reference))
        return {noun for noun, count in counts.items() if count >= at_least}

    def made_up(self, caption: str, references: Sequence[str]) -> list[str]:
        """Nouns of a caption that the references neither say nor imply, nor are implied by: a `puppy` is no invention
        where people wrote `dog`."""
        together = " ".join(references)
        said = {self.wordnet.lemma(word) or word for word in words_of(together)}
        return sorted(
            noun
            for noun in self.noun_lemmas(caption)
            if not self.supported(noun, together) and not any(self.wordnet.implies(noun, word, None) for word in said)
        )


def open_judge(folder: Path = WORDNET) -> Judge | None:
    """The judge, or None where Debian's ``wordnet-base`` or nltk is not installed."""
    try:
        return Judge(WordNet(folder))
    except (FileNotFoundError, ImportError):
        return None


def satisfies_rules(tags: list[str], judge: Judge) -> bool:
    """Whether a list of tags obeys every rule that can be checked without the caption."""
    try:
        for tag in tags:
            _TAG.validate_python(tag)
    except ValidationError:
        return False
    stems = [tuple(judge.stems(tag)) for tag in tags]
    return (
        3 <= len(tags) <= 10
        and len(set(stems)) == len(tags)
        and all(tag == tag.lower() and len(tag) <= 32 and 1 <= len(tag.split()) <= 3 for tag in tags)
    )


def measure_tags(rows: Sequence[Mapping[str, Any]], tags: list[list[str]], judge: Judge) -> dict[str, Any]:
    """All figures for the tags of some captions: rows with ``caption`` and ``references``."""
    examples = {tag for example in load_prompt().examples for tag in example.tags}
    total = sum(map(len, tags))
    pairs = [(tag, row["caption"]) for row, some in zip(rows, tags, strict=True) for tag in some]
    unsupported = [(tag, caption) for tag, caption in pairs if not judge.supported(tag, caption)]
    figures: dict[str, Any] = {
        "satisfy_rules": share(satisfies_rules(some, judge) for some in tags),
        "supported": 1 - len(unsupported) / total,
        "supported_first_sense": share(judge.supported(tag, caption, 1) for tag, caption in pairs),
        "stem_in_caption": share(set(judge.stems(tag)) <= set(judge.stems(caption)) for tag, caption in pairs),
        "leaked": sum(tag in examples for tag, _ in unsupported),
        "tags_per_picture": total / len(tags),
        "unsupported_most": Counter(tag for tag, _ in unsupported).most_common(12),
    }
    for name, least in (
        ("recall", lambda n: 2),
        ("recall_any", lambda n: 1),
        ("recall_majority", lambda n: n // 2 + 1),
    ):
        found = wanted = 0
        for row, some in zip(rows, tags, strict=True):
            nouns = judge.reference_nouns(row["references"], least(len(row["references"])))
            found += len(nouns & {one for tag in some for one in judge.stems(tag)})
            wanted += len(nouns)
        figures[name] = found / max(wanted, 1)
    return figures


def share(values: Iterable[bool]) -> float:
    """Share of true values; 0 of none."""
    listed = list(values)
    return sum(listed) / max(len(listed), 1)
