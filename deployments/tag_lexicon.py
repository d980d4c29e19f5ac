"""What a word plainly implies, from WordNet: a dog is an animal, a lake is water.

Reads the WordNet 3.0 database files (Debian's ``wordnet-base``) and derives ``tag_lexicon.json``, the small part of
them that the tag rules carry at serve time. In: the folder of the database. Out: for single-word nouns that name
something visible, the search words among their hypernyms. ``WordNet`` also answers the benchmarks' question whether
one word is a synonym or a hypernym of another.

    python -m deployments.tag_lexicon /usr/share/wordnet        writes tag_lexicon.json beside this file

WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved. Licence: ``tag_lexicon.json``, key ``licence``.
Knows no model, no prompt and no Ray.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from functools import cached_property
from pathlib import Path

LEXICON_FILE = Path(__file__).with_name("tag_lexicon.json")

_LICENCE = (
    "Derived from WordNet 3.0. WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved. "
    "Permission to use, copy, modify and distribute this software and database and its documentation for any "
    "purpose and without fee or royalty is hereby granted, provided that you agree to comply with the "
    "following copyright notice and statements, including the disclaimer, and that the same appear on ALL "
    "copies of the software, database and documentation, including modifications that you make for internal "
    'use or for distribution. THIS SOFTWARE AND DATABASE IS PROVIDED "AS IS" AND PRINCETON UNIVERSITY MAKES NO '
    "REPRESENTATIONS OR WARRANTIES, EXPRESS OR IMPLIED. BY WAY OF EXAMPLE, BUT NOT LIMITATION, PRINCETON "
    "UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES OF MERCHANTABILITY OR FITNESS FOR ANY PARTICULAR "
    "PURPOSE OR THAT THE USE OF THE LICENSED SOFTWARE, DATABASE OR DOCUMENTATION WILL NOT INFRINGE ANY THIRD "
    "PARTY PATENTS, COPYRIGHTS, TRADEMARKS OR OTHER RIGHTS. The name of Princeton University or Princeton may "
    "not be used in advertising or publicity pertaining to distribution of the software and/or database. Title "
    "to copyright in this software, database and any associated documentation shall at all times remain with "
    "Princeton University and LICENSEE agrees to preserve same."
)

#: Words that people search photos by, with the WordNet sense that is meant; the more special before the more general.
SEARCH_WORDS: tuple[tuple[str, int], ...] = (
    ("dog", 1), ("cat", 1), ("horse", 1), ("bird", 1), ("fish", 1), ("insect", 1), ("animal", 1),
    ("athlete", 1), ("musician", 1), ("child", 1), ("person", 1),
    ("bicycle", 1), ("motorcycle", 1), ("car", 1), ("truck", 1), ("boat", 1), ("ship", 1), ("train", 1),
    ("aircraft", 1), ("vehicle", 1),
    ("fruit", 1), ("vegetable", 1), ("dessert", 1), ("beverage", 1), ("food", 2),
    ("footwear", 1), ("hat", 1), ("clothing", 1), ("jewelry", 1),
    ("furniture", 1), ("musical instrument", 1), ("toy", 1), ("weapon", 1), ("tool", 1), ("ball", 1),
    ("house", 1), ("building", 1), ("room", 1), ("street", 1), ("road", 1),
    ("flower", 1), ("tree", 1), ("plant", 2), ("water", 2), ("mountain", 1), ("sport", 1),
)  # fmt: skip
#: WordNet's lexicographer files of visible things: tops, act (sports), animal, artifact, body, event, food, group,
#: location, object, person, phenomenon, plant, substance.
_VISIBLE = frozenset({3, 4, 5, 6, 8, 11, 13, 14, 15, 17, 18, 19, 20, 27})
#: Words whose first sense is not the one that is meant under a photo: the sense to take instead.
_SENSE = {"bike": 2, "climber": 2, "male": 2, "female": 2, "tiger": 2, "stroller": 2}
#: Nouns that under a photo are mostly not what WordNet implies (an orange shirt is no fruit): they imply nothing.
_IMPLY_NOTHING = frozenset(
    [
        "orange",
        "rose",
        "balloon",
        "tank",
        "hose",
        "giant",
        "scooter",
        "pacifier",
        "mannequin",
        "dummy",
        "counter",
        "snowball",
        "trunks",
        "queen",
    ]
)
#: Words that under a photo are mostly no nouns.
_NO_NOUNS = frozenset(
    ["hind", "dun", "pol", "chased", "pursued", "homeless", "flamboyant", "ornamental", "jumping", "riding", "sidecar"]
)
#: Nouns of photo captions that WordNet has only capitalised or as two words, or counts as verbs; and what they imply.
_ADDED = {
    **dict.fromkeys(("frisbee", "kite"), "toy"),
    **dict.fromkeys(("wetsuit", "snowsuit", "dress", "jersey", "bikini"), "clothing"),
    "drink": "beverage",
    "dirtbike": "vehicle",
    **dict.fromkeys(
        (
            "book",
            "desert",
            "goal",
            "hurdle",
            "obstacle",
            "path",
            "ring",
            "selfie",
            "sign",
            "stage",
            "sunset",
            "tunnel",
            "yard",
        ),
        "",
    ),
}
_ACT = 4
#: A word counts as a noun when at least this share of its uses are.
_NOUN_SHARE = 0.4
#: Longer words are rare names; leaving them out keeps the file small.
_MAX_LETTERS = 14


class WordNet:
    """The noun hierarchy of WordNet 3.0, and how often each word is a noun, verb, adjective or adverb."""

    def __init__(self, folder: Path) -> None:
        """Read the index and data files in ``folder`` (2 s).

        Raises:
            FileNotFoundError: a database file is missing.
        """
        self._folder = folder
        self.senses: dict[str, list[int]] = {}
        for line in _records(folder / "index.noun"):
            fields = line.split()
            count = int(fields[2])
            self.senses[fields[0].replace("_", " ")] = [int(offset) for offset in fields[-count:]]
        self.words: dict[int, list[str]] = {}
        self.kind: dict[int, int] = {}
        self._parents: dict[int, list[int]] = {}
        for line in _records(folder / "data.noun"):
            fields = line.split("|")[0].split()
            offset, words = int(fields[0]), int(fields[3], 16)
            self.kind[offset] = int(fields[1])
            self.words[offset] = [fields[4 + 2 * index].replace("_", " ") for index in range(words)]
            pointers = fields[5 + 2 * words :]
            self._parents[offset] = [
                int(pointers[index + 1]) for index in range(0, len(pointers) - 3, 4) if pointers[index] in ("@", "@i")
            ]

    @cached_property
    def _uses(self) -> dict[str, list[int]]:
        """Word -> occurrences as noun, verb, adjective, adverb in WordNet's tagged texts."""
        uses: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        for line in (self._folder / "cntlist.rev").read_text("utf-8", "replace").splitlines():
            key, _, count = line.split()[:3]
            word, part = key.split("%")
            uses[word.replace("_", " ")][{1: 0, 2: 1, 3: 2, 5: 2, 4: 3}[int(part[0])]] += int(count)
        return uses

    def noun_share(self, word: str) -> float:
        """How much of a word's uses are as a noun, 0 to 1; 1 for an unused word that is a noun alone."""
        if word not in self.senses:
            return 0.0
        uses = self._uses.get(word)
        if uses is None or not sum(uses):
            return 0.5 if any(word in names for names in self._other_words) else 1.0
        return uses[0] / sum(uses)

    @cached_property
    def _other_words(self) -> list[set[str]]:
        return [
            {line.split(" ", 1)[0].replace("_", " ") for line in _records(self._folder / f"index.{part}")}
            for part in ("verb", "adj", "adv")
        ]

    def lemma(self, word: str) -> str | None:
        """The noun that ``word`` is a form of (``children`` -> ``child``), or None."""
        if word in self._exceptions:
            return self._exceptions[word]
        if word in self.senses:
            return word
        for ending, instead in (("ies", "y"), ("ves", "f"), ("men", "man"), ("s", ""), ("es", "")):
            stem = word.removesuffix(ending) + instead
            if word.endswith(ending) and stem in self.senses:
                return stem
        return None

    @cached_property
    def _exceptions(self) -> dict[str, str]:
        lines = (self._folder / "noun.exc").read_text().splitlines()
        return {fields[0]: fields[1] for line in lines if len(fields := line.split()) >= 2 and fields[1] in self.senses}

    def ancestors(self, offset: int) -> list[int]:
        """The synset's hypernyms, transitively, nearest first."""
        found: list[int] = []
        level = [offset]
        while level:
            level = [parent for child in level for parent in self._parents[child] if parent not in found]
            found.extend(dict.fromkeys(level))
        return found

    def implies(self, word: str, other: str, senses: int | None = None) -> bool:
        """Whether ``other`` is a synonym or hypernym of ``word`` in its first ``senses`` senses (default: any)."""
        goals = set(self.senses.get(other, ()))
        return any(
            goal in goals for sense in self.senses.get(word, ())[:senses] for goal in (sense, *self.ancestors(sense))
        )


def _records(file: Path) -> list[str]:
    return [line for line in file.read_text("utf-8", "replace").splitlines() if line and not line.startswith("  ")]


def derive(wordnet: WordNet) -> dict[str, object]:
    """The lexicon: visible single-word nouns by what their most frequent sense implies, and irregular plurals."""
    goals = {wordnet.senses[word][sense - 1]: word for word, sense in SEARCH_WORDS}
    order = [word for word, _ in SEARCH_WORDS]
    groups: dict[str, list[str]] = defaultdict(list)
    for word, senses in wordnet.senses.items():
        if word in _NO_NOUNS or word in _ADDED:
            continue
        sense = senses[_SENSE.get(word, 1) - 1]
        if not word.isalpha() or not 3 <= len(word) <= _MAX_LETTERS or wordnet.kind[sense] not in _VISIBLE:
            continue
        # names of peoples, genera and places are capitalised in the data file
        if word not in wordnet.words[sense] or wordnet.noun_share(word) < _NOUN_SHARE:
            continue
        found = {goals[synset] for synset in (sense, *wordnet.ancestors(sense)) if synset in goals} - {word}
        if wordnet.kind[sense] == _ACT and "sport" not in found:
            continue  # of what people do, sports alone can be seen as things
        if word in _IMPLY_NOTHING:
            found = set()
        # three at most: a greyhound is a dog and an animal
        groups[",".join(sorted(found, key=order.index)[:3])].append(word)
    for word, implied in _ADDED.items():
        groups[implied].append(word)
    plurals = {
        word: lemma
        for word, lemma in wordnet._exceptions.items()
        if word.isalpha() and not word.endswith("s") and any(lemma in group for group in groups.values())
    }
    return {
        "licence": _LICENCE,
        "nouns": {implied: " ".join(sorted(words)) for implied, words in sorted(groups.items())},
        "plurals": plurals,
    }


def main() -> None:
    """Write the lexicon."""
    parser = argparse.ArgumentParser(description="derive tag_lexicon.json from the WordNet database")
    parser.add_argument("wordnet", type=Path, help="folder with index.noun, data.noun, noun.exc, cntlist.rev")
    lexicon = derive(WordNet(parser.parse_args().wordnet))
    LEXICON_FILE.write_text(json.dumps(lexicon, indent=0, ensure_ascii=True) + "\n")
    print(f"{LEXICON_FILE}: {LEXICON_FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
