"""How good a captioner is: agreement with people, length and repetition, behaviour, inventions, tags, retrieval.

In: a checkpoint, loaded by the class that serves it, and captioned test examples. Out: the JSON-ready body of a report
and sample pictures.

* ``scores``: BLEU-1..4, CIDEr, ROUGE-L (pycocoevalcap) and METEOR (nltk's, of 2005, with WordNet's nouns as synonyms:
  the COCO tools' METEOR 1.5 needs Java). Both sides are lower-cased, freed of punctuation and split at spaces; this is
  not the PTB tokeniser. Intervals: bootstrap over photos.
* ``templates``: a human caption with one word changed must fit its picture less well; with a synonym, about as well. A
  caption's fit is its log-likelihood given the picture minus that given another picture, which takes out how common
  its words are.
* ``made_up``: nouns that no person used of the picture (``train.tag_quality``).
* ``tags``, ``retrieval``: what a tagger makes of the captions, and whether pictures are found by them.
* ``comparison``: difference to another model on the same photos, paired bootstrap.
* ``not_measured``: what is missing from the above, and how to have it.

Knows no MLflow and no HTML.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from data.captions import clean_caption, score_captions
from deployments.captioner import CaptionerModel
from deployments.checkpoints import Checkpoint
from deployments.images import ADMITTED, decode
from train.examples import Example
from train.generate import caption_all, tag_all, view_of
from train.report import Body, Picture
from train.retrieval import difference, retrieval
from train.statistics import Interval, described
from train.tag_quality import WORDNET, Judge, measure_tags, open_judge, share

#: Words that caption writers use for the same thing.
SYNONYMS = {
    "bicycle": "bike",
    "bike": "bicycle",
    "child": "kid",
    "children": "kids",
    "big": "large",
    "large": "big",
    "little": "small",
    "small": "little",
    "jumps": "leaps",
    "jumping": "leaping",
    "lady": "woman",
    "woman": "lady",
    "man": "guy",
    "ocean": "sea",
    "road": "street",
    "street": "road",
    "rock": "stone",
    "sidewalk": "pavement",
    "photo": "picture",
}
#: Words whose exchange makes a caption wrong.
CHANGES = {
    "dog": "car",
    "dogs": "cars",
    "man": "horse",
    "woman": "bus",
    "boy": "bird",
    "girl": "boat",
    "children": "horses",
    "people": "dogs",
    "grass": "snow",
    "snow": "grass",
    "water": "street",
    "beach": "street",
    "street": "beach",
    "red": "green",
    "blue": "yellow",
    "black": "white",
    "white": "black",
    "running": "sitting",
    "sitting": "running",
    "ball": "bicycle",
}


#: Parts of a report that may be missing, and what to do about it.
_WANTED = {
    "templates": "changed words and synonyms: --templates is 0, or no human caption has a word to change",
    "made_up": "objects that nobody else saw: Debian's wordnet-base and nltk are needed",
    "tags": "tags: give a tagger by --tagger (wordnet-base and nltk are needed besides)",
    "retrieval": "whether pictures are found: no photo has two human captions",
    "comparison": "the difference to production: nothing else is there to compare with",
}


class CaptionerSettings(BaseModel):
    """What is examined, beyond the scores."""

    model_config = ConfigDict(extra="forbid")

    templates: int = Field(100, ge=0, description="human captions that are changed by a word; 0: none")
    tagger: str = Field(
        "auto", description="checkpoint of a tagger; auto: starter:tagger where it can be had; empty: no tags"
    )
    samples: int = Field(24, ge=0, le=200, description="pictures shown with their captions")


def bootstrap(
    sides: Sequence[Mapping[str, str]], references: Mapping[str, Sequence[str]], resamples: int, seed: int
) -> list[dict[str, np.ndarray]]:
    """Corpus BLEU-4 and mean CIDEr of each side over photos drawn with replacement, the same draws for all sides.

    A caption keeps the CIDEr that it has among all photos: a resample has fewer different photos, and with document
    frequencies of its own every caption would score by another measure.
    """
    generator = np.random.default_rng(seed)
    counted = [_by_photo(side, references) for side in sides]
    count = len(references)
    drawn: list[dict[str, list[float]]] = [{"bleu4": [], "cider": []} for _ in sides]
    for _ in range(resamples):
        chosen = generator.integers(0, count, count)
        for (counts, cider), values in zip(counted, drawn, strict=True):
            values["bleu4"].append(_bleu4(counts[chosen].sum(0)))
            values["cider"].append(float(cider[chosen].mean()))
    return [{figure: np.array(found) for figure, found in values.items()} for values in drawn]


def _by_photo(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """What BLEU-4 is counted from, for each photo: n-grams that are right and n-grams, of each order, and words of the
    caption and of the human one that is closest in length; and CIDEr of each photo."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider import Cider

    hypotheses = {name: [clean_caption(captions[name])] for name in references}
    truths = {name: [clean_caption(text) for text in texts] for name, texts in references.items()}
    _, cider = Cider().compute_score(truths, hypotheses)
    scorer = BleuScorer(n=4)
    for name, (text,) in hypotheses.items():
        scorer += (text, truths[name])
    counts = [
        [
            *(*each["correct"], *each["guess"], each["testlen"]),
            min((abs(length - each["testlen"]), length) for length in each["reflen"])[1],
        ]
        for each in scorer.ctest
    ]
    return np.array(counts), np.asarray(cider)


def _bleu4(counts: np.ndarray) -> float:
    """BLEU-4 of a corpus (Papineni et al. 2002; as pycocoevalcap has it) from the sums of its photos' counts."""
    small, tiny = 1e-9, 1e-15  # pycocoevalcap's: nothing is divided by nought
    right, said, (words, closest) = counts[:4] + tiny, counts[4:8] + small, counts[8:]
    brevity = math.exp(min(0.0, 1 - (closest + small) / (words + tiny)))
    return float(np.prod(right / said)) ** 0.25 * brevity


def rouge_l(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> float:
    """ROUGE-L with beta 1.2, mean over photos (Lin 2004; pycocoevalcap)."""
    from pycocoevalcap.rouge.rouge import Rouge

    mean, _ = Rouge().compute_score(
        {name: [clean_caption(text) for text in references[name]] for name in captions},
        {name: [clean_caption(text)] for name, text in captions.items()},
    )
    return float(mean)


class _Nouns:
    """WordNet as nltk's METEOR asks for it, from Debian's files, nouns alone, by stems: nltk's own reader wants files
    that Debian does not pack, and its METEOR looks synonyms of stems up."""

    class _Lemma:
        def __init__(self, name: str) -> None:
            self._name = name

        def name(self) -> str:
            return self._name

    class _Synset:
        def __init__(self, names: list[str]) -> None:
            self._names = names

        def lemmas(self) -> list[_Nouns._Lemma]:
            return [_Nouns._Lemma(name) for name in self._names]

    def __init__(self, judge: Judge, words: set[str]) -> None:
        self._synsets: dict[str, list[_Nouns._Synset]] = {}
        for word in words:
            offsets = judge.wordnet.senses.get(judge.wordnet.lemma(word) or word, [])
            single = [[judge.stem(name) for name in judge.wordnet.words[each] if " " not in name] for each in offsets]
            self._synsets[judge.stem(word)] = [self._Synset(names) for names in single]

    def synsets(self, stem: str) -> list[_Synset]:
        return self._synsets.get(stem, [])


def meteor(captions: Mapping[str, str], references: Mapping[str, Sequence[str]], judge: Judge) -> float:
    """METEOR (Banerjee & Lavie 2005), mean over photos of the best reference; words are compared by their stems."""
    from nltk.translate.meteor_score import meteor_score

    said = {name: clean_caption(text).split() for name, text in captions.items()}
    nouns: Any = _Nouns(judge, {word for words in said.values() for word in words})

    class AsTheyAre:
        def stem(self, word: str) -> str:
            return word

    values = [
        meteor_score(
            [clean_caption(each).split() for each in references[name]],
            words,
            preprocess=judge.stem,
            stemmer=AsTheyAre(),
            wordnet=nouns,
        )
        for name, words in said.items()
    ]
    return float(np.mean(values))


def repetitive(caption: str) -> bool:
    """Whether a caption stutters: a word twice in a row, or five words that come again."""
    words = clean_caption(caption).split()
    if any(first == second for first, second in itertools.pairwise(words)):
        return True
    fives = [tuple(words[place : place + 5]) for place in range(len(words) - 4)]
    return len(set(fives)) < len(fives)


def length_figures(captions: Sequence[str]) -> dict[str, Any]:
    """Length, repetition, variety."""
    lengths = [len(clean_caption(caption).split()) for caption in captions]
    return {
        "words_mean": round(float(np.mean(lengths)), 2),
        "words_shortest": int(min(lengths)),
        "words_longest": int(max(lengths)),
        "histogram": {str(words): count for words, count in sorted(Counter(lengths).items())},
        "empty": round(share(length == 0 for length in lengths), 4),
        "repetitive": round(share(repetitive(caption) for caption in captions), 4),
        "distinct": len(set(captions)),
        "distinct_share": round(len(set(captions)) / len(captions), 4),
        "most_common": Counter(captions).most_common(5),
        "words_used": len({word for caption in captions for word in clean_caption(caption).split()}),
    }


def exchange(caption: str, table: Mapping[str, str]) -> str | None:
    """The caption with its first word of ``table`` exchanged; None when it has none."""
    words = clean_caption(caption).split()
    for place, word in enumerate(words):
        if word in table:
            return " ".join([*words[:place], table[word], *words[place + 1 :]])
    return None


def template_figures(
    model: CaptionerModel, examples: Sequence[Example], cases: int, batch_size: int
) -> dict[str, Any] | None:
    """How a changed word and a synonym move the fit of human captions to their pictures; None without a caption to
    change.

    Every caption is scored with its own picture and with the picture of the next case.
    """
    chosen: list[tuple[Example, str, str, str | None]] = []
    for example in examples:
        for caption in example.captions:
            plain, changed = clean_caption(caption), exchange(caption, CHANGES)
            if changed and model.knows(plain) and model.knows(changed):
                same = exchange(caption, SYNONYMS)
                chosen.append((example, plain, changed, same if same and model.knows(same) else None))
                break
        if len(chosen) == cases:
            break
    if len(chosen) < 2:
        return None
    own_views = np.stack([view_of(model, example) for example, *_ in chosen])
    other = np.roll(own_views, -1, axis=0)

    def fit(rows: list[int], texts: list[str]) -> np.ndarray:
        values = np.zeros(len(rows))
        for first in range(0, len(rows), batch_size):
            part, said = rows[first : first + batch_size], texts[first : first + batch_size]
            values[first : first + len(part)] = model.log_likelihood(own_views[part], said) - model.log_likelihood(
                other[part], said
            )
        return values

    every = list(range(len(chosen)))
    own = fit(every, [case[1] for case in chosen])
    loss = own - fit(every, [case[2] for case in chosen])
    with_synonym = [row for row in every if chosen[row][3] is not None]
    result: dict[str, Any] = {
        "cases": len(chosen),
        "human_caption_fits_own_picture": round(share(value > 0 for value in own), 4),
        "changed_word_fits_worse": round(share(value > 0 for value in loss), 4),
        "changed_word_mean_loss": round(float(loss.mean()), 4),
        "synonyms": len(with_synonym),
    }
    if with_synonym:
        moved = np.abs(own[with_synonym] - fit(with_synonym, [str(chosen[row][3]) for row in with_synonym]))
        result["synonym_mean_shift"] = round(float(moved.mean()), 4)
        result["synonym_moves_less_than_change"] = round(
            share(small < large for small, large in zip(moved, np.abs(loss[with_synonym]), strict=True)), 4
        )
    order = np.argsort(loss)
    result["worst"] = [
        {"caption": chosen[row][1], "changed": chosen[row][2], "loss": round(float(loss[row]), 3)} for row in order[:5]
    ]
    return result


def made_up_figures(captions: Sequence[str], examples: Sequence[Example], judge: Judge) -> dict[str, Any]:
    """Nouns that no human caption of the picture supports: per noun, per caption, and which most.

    What one person writes against the others' captions is the measure: some disagreement is no invention.
    ``above_people`` holds both against the same captions, those of the others; None where no picture has any.
    """
    nouns = [judge.noun_lemmas(caption) for caption in captions]
    invented = [judge.made_up(caption, example.captions) for caption, example in zip(captions, examples, strict=True)]

    def share_of_nouns(said: Sequence[tuple[str, Sequence[str]]]) -> float:
        wrong = sum(len(judge.made_up(text, others)) for text, others in said)
        return wrong / max(sum(len(judge.noun_lemmas(text)) for text, _ in said), 1)

    several = [
        (caption, example.captions)
        for caption, example in zip(captions, examples, strict=True)
        if len(example.captions) > 1
    ]
    ours = share_of_nouns([(caption, people[1:]) for caption, people in several])
    theirs = share_of_nouns([(people[0], people[1:]) for _, people in several])
    return {
        "nouns": sum(map(len, nouns)),
        "made_up_share": round(sum(map(len, invented)) / max(sum(map(len, nouns)), 1), 4),
        "captions_with_one": round(share(bool(words) for words in invented), 4),
        "people_made_up_share": round(theirs, 4),
        "above_people": round(ours - theirs, 4) if several else None,
        "most": Counter(word for words in invented for word in words).most_common(12),
    }


def examine(
    checkpoint: Checkpoint,
    examples: Sequence[Example],
    settings: CaptionerSettings,
    against: Checkpoint | None,
    resamples: int,
    batch_size: int,
    seed: int,
    tagger: Checkpoint | None = None,
) -> Body:
    """All figures of a captioner on test examples."""
    texts = caption_all(checkpoint, examples, batch_size)
    names = [example.id for example in examples]
    captions = dict(zip(names, texts, strict=True))
    references = {example.id: example.captions for example in examples}
    judge = open_judge()
    scores: dict[str, Any] = {
        **score_captions(captions, references),
        "rouge_l": rouge_l(captions, references),
        "meteor": meteor(captions, references, judge) if judge else None,
    }
    sides: list[Mapping[str, str]] = [captions]
    if against is not None:
        sides.append(dict(zip(names, caption_all(against, examples, batch_size), strict=True)))
    drawn = bootstrap(sides, references, resamples, seed)
    figures: dict[str, Any] = {
        "scores": {name: None if value is None else round(value, 4) for name, value in scores.items()},
        "intervals": {name: described(scores[name], values) for name, values in drawn[0].items()},
        "tokenisation": "lower case, punctuation dropped, split at spaces",
        "length": length_figures(texts),
        "notes": [],
    }
    if judge is None:
        figures["notes"].append(
            f"METEOR, inventions and tags are not measured: they need Debian's wordnet-base ({WORDNET}) and nltk"
        )
    else:
        figures["made_up"] = made_up_figures(texts, examples, judge)
    if settings.templates:
        changed = template_figures(CaptionerModel(checkpoint), examples, settings.templates, batch_size)
        if changed is not None:
            figures["templates"] = changed
    rows: list[dict[str, Any]] = [
        {"id": example.id, "caption": text, "references": list(example.captions)}
        for example, text in zip(examples, texts, strict=True)
    ]
    if tagger is not None:
        tags = tag_all(tagger, texts)
        for row, some in zip(rows, tags, strict=True):
            row["tags"] = some
        if judge is not None:
            figures["tags"] = {"tagger": tagger.name} | measure_tags(rows, tags, judge)
    if any(len(example.captions) > 1 for example in examples):
        figures["retrieval"] = retrieval(rows, seed=seed)
        if tagger is not None:  # a part of its own: the gate lets whole parts be missing
            figures["tags_add"] = figures["retrieval"]["tags_add"]
    if against is not None:
        theirs = score_captions(sides[1], references)
        comparison: dict[str, Interval | str] = {"with": against.name}
        for name in ("bleu4", "cider"):
            comparison[name] = described(scores[name] - theirs[name], drawn[0][name] - drawn[1][name])
        people = [example.captions for example in examples]
        comparison |= difference(texts, list(sides[1].values()), people, resamples, seed)
        figures["comparison"] = comparison
    figures["captions"] = rows
    figures["not_measured"] = [told for part, told in _WANTED.items() if not figures.get(part)]
    if "retrieval" in figures and tagger is None:
        figures["not_measured"].append("whether tags help to find pictures: captions are searched alone")
    shown = [
        Picture(f"{text} — people: {example.captions[0]}", decode(example.read(), ADMITTED).image)
        for example, text in list(zip(examples, texts, strict=True))[: settings.samples]
    ]
    return Body(figures, {"samples": shown})
