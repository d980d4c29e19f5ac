"""Quality of the tags, measured against the captions they come from and against people's captions of the same photos.

In: captions with references, ``[{"id", "caption", "references": [...]}]`` (``--captions FILE``), or the folder of a
Flickr data set (``--flickr DIR``: one human caption of each photo is the input, the others are the references). The
tagger's own prompt, engine arguments, grammar and rules are used; vLLM runs offline. Out:
``results/tagger_quality.json``.

Definitions. Words are compared by WordNet lemma, then Porter stem.

* rules: 3 to 10 tags, lower case, unique by stem, at most 32 characters and 3 words, valid in the annotation record.
* supported: each word of the tag has its stem in the caption, or the tag (or that word) is a WordNet synonym or
  hypernym, in any sense, of a word of the caption. ``supported_first_sense`` allows a caption word's most frequent
  sense alone.
* reference nouns: words that WordNet's tagged texts use as a noun more often than as anything else, stop words left
  out, that occur in at least two references of the photo. ``recall_any`` takes the nouns of every single reference,
  ``recall_majority`` those of more than half of the references.
* recall: found nouns / nouns over all photos; a noun is found when a word of a tag has its stem.
* leaked: a tag of the prompt's examples that the caption does not support.

``rules_only`` is the same with an empty answer of the model: what the language model adds is the difference. WordNet
serves both the tagger (a small derived lexicon) and this measurement: what is wrong in WordNet goes unnoticed.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nltk.stem.porter import PorterStemmer
from pydantic import TypeAdapter, ValidationError

from deployments.annotation import Tag
from deployments.checkpoints import Checkpoint, resolve
from deployments.offline_tagger import OfflineTagger
from deployments.tag_lexicon import WordNet
from deployments.tag_rules import _STOP, clean_tags, proposed, words_of
from deployments.tagger import load_prompt, machine

RESULT = Path(__file__).parent / "results" / "tagger_quality.json"
_TAG = TypeAdapter(Tag)


class Judge:
    """Answers what is supported, what is a noun and what is found, by WordNet and Porter stems."""

    def __init__(self, wordnet: WordNet) -> None:
        self._wordnet = wordnet
        self._porter = PorterStemmer()

    def stem(self, word: str) -> str:
        return str(self._porter.stem(self._wordnet.lemma(word) or word))

    def stems(self, text: str) -> list[str]:
        return [self.stem(word) for word in words_of(text)]

    def supported(self, tag: str, caption: str, senses: int | None = None) -> bool:
        """Whether the caption says or implies a tag; ``senses``: how many senses of a caption word count."""
        said = set(self.stems(caption))
        words = {self._wordnet.lemma(word) or word for word in words_of(caption)}
        implied = [tag, *words_of(tag)]
        if any(self._wordnet.implies(word, tag, senses) for word in words):
            return True
        return all(
            self.stem(part) in said or any(self._wordnet.implies(word, part, senses) for word in words)
            for part in implied[1:]
        )

    def nouns(self, caption: str) -> set[str]:
        """Stems of a caption's nouns."""
        found = set()
        for word in words_of(caption):
            lemma = self._wordnet.lemma(word)
            if lemma and len(lemma) > 2 and not {word, lemma} & _STOP and self._wordnet.noun_share(lemma) > 0.5:
                found.add(self.stem(lemma))
        return found

    def reference_nouns(self, references: list[str], at_least: int) -> set[str]:
        """Stems of the nouns that occur in at least so many references."""
        counts = Counter(noun for reference in references for noun in self.nouns(reference))
        return {noun for noun, count in counts.items() if count >= at_least}


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


def measure(rows: list[dict[str, Any]], tags: list[list[str]], judge: Judge) -> dict[str, Any]:
    """All figures for the tags of some captions."""
    examples = {tag for example in load_prompt().examples for tag in example.tags}
    total = sum(map(len, tags))
    pairs = [(tag, row["caption"]) for row, some in zip(rows, tags, strict=True) for tag in some]
    unsupported = [(tag, caption) for tag, caption in pairs if not judge.supported(tag, caption)]
    figures: dict[str, Any] = {
        "satisfy_rules": _share(satisfies_rules(some, judge) for some in tags),
        "supported": 1 - len(unsupported) / total,
        "supported_first_sense": _share(judge.supported(tag, caption, 1) for tag, caption in pairs),
        "stem_in_caption": _share(set(judge.stems(tag)) <= set(judge.stems(caption)) for tag, caption in pairs),
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


def _share(values: Iterable[bool]) -> float:
    listed = list(values)
    return sum(listed) / max(len(listed), 1)


def read_flickr(folder: Path, limit: int, seed: int) -> list[dict[str, Any]]:
    """Photos of a Flickr data set: the first human caption is the input, the others are the references."""
    captions: dict[str, list[str]] = {}
    with (folder / "captions.txt").open(newline="") as file:
        for row in csv.DictReader(file):
            captions.setdefault(row["image"], []).append(row["caption"].strip().rstrip(" .").lower())
    names = sorted(name for name, texts in captions.items() if len(texts) > 2)
    random.Random(seed).shuffle(names)
    return [{"id": name, "caption": captions[name][0], "references": captions[name][1:]} for name in names[:limit]]


def ask_offline(captions: list[str], checkpoint: Checkpoint) -> tuple[list[str], dict[str, float]]:
    """The model's raw answers by vLLM's own ``LLM``, and how fast they came."""
    started = time.perf_counter()
    tagger = OfflineTagger(checkpoint)
    loaded = time.perf_counter()
    tagger.answer(["a dog runs on the grass"])
    warm = time.perf_counter()
    answers = tagger.answer(captions)
    took = time.perf_counter() - warm
    return answers, {"load_s": loaded - started, "requests_per_s": len(captions) / took}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description="quality of the tags")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--captions", type=Path, help='JSON: [{"id", "caption", "references": [...]}]')
    source.add_argument("--flickr", type=Path, help="folder with captions.txt (image,caption)")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--uri", default="starter:tagger")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="Debian's wordnet-base")
    parser.add_argument("--answers", type=Path, help="raw answers: read if the file exists, else written")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()

    if options.captions:
        rows = json.loads(options.captions.read_text())[: options.limit]
    else:
        rows = read_flickr(options.flickr, options.limit, options.seed)
    captions = [row["caption"] for row in rows]
    result: dict[str, Any] = {
        "captions": "generated" if options.captions else "human: one of each photo, the others as references",
        "photos": len(rows),
        "uri": options.uri,
        "prompt": load_prompt().version,
        "machine": machine(),
    }
    if options.answers and options.answers.exists():
        kept = json.loads(options.answers.read_text())
        raw = [kept[caption] for caption in captions]
    else:
        raw, result["offline"] = ask_offline(captions, resolve(options.uri))
        if options.answers:
            options.answers.write_text(json.dumps(dict(zip(captions, raw, strict=True)), indent=0))
    judge = Judge(WordNet(options.wordnet))
    tags = [clean_tags(answer, caption) for answer, caption in zip(raw, captions, strict=True)]
    own = [proposed(answer, caption) for answer, caption in zip(raw, captions, strict=True)]
    result["tags"] = measure(rows, tags, judge)
    result["model_share_of_tags"] = sum(map(len, own)) / sum(map(len, tags))
    result["rules_only"] = measure(rows, [clean_tags("", caption) for caption in captions], judge)
    result["bars"] = {
        "satisfy_rules = 1": result["tags"]["satisfy_rules"] == 1,
        "supported >= 0.90": result["tags"]["supported"] >= 0.90,
        "recall >= 0.35": result["tags"]["recall"] >= 0.35,
        "leaked = 0": result["tags"]["leaked"] == 0,
    }
    result["examples"] = [
        {"caption": caption, "model": answer, "tags": some}
        for caption, answer, some in list(zip(captions, raw, tags, strict=True))[:12]
    ]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "examples"}, indent=1))


if __name__ == "__main__":
    main()
