"""Are pictures found? That is what captions and tags are for.

A picture's generated caption (with or without its tags) is a document, people's captions of the picture are queries,
BM25 ranks. Out: recall at 1 and 10 (the share of queries whose own picture is the first, among the first ten) with
95 % bootstrap intervals over photos, for captions alone, captions with tags, and human captions as documents (one
other person's sentence, and all the others together: what perfect captioning would reach). The paired difference says
whether tags help; ``of_one_person`` is the captions' recall over that of one person's sentence.

A picture that one person described is searched like all others, but not asked for (``left_out``): it has no other
person's sentence to be found by.

In: ``[{"id", "caption", "tags", "references": [...]}]``, or a data set and checkpoints; ``--rows`` keeps the former
with the names of the latter. Knows no HTTP and no store.

    python -m train.retrieval --data flickr8k-224 --output benchmarks/results/retrieval.json
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from data.errors import DataError
from deployments.words import STOP_WORDS, stem, words_of
from train.statistics import Interval, described

#: The cut-offs of recall.
CUTS = (1, 10)


class Bm25:
    """Okapi BM25 over a fixed collection (Robertson & Zaragoza 2009), with Lucene's idf, which is never negative."""

    def __init__(self, documents: Sequence[Sequence[str]], k1: float = 1.2, b: float = 0.75) -> None:
        counts = [Counter(document) for document in documents]
        lengths = np.array([sum(count.values()) for count in counts], dtype=float)
        norm = k1 * (1 - b + b * lengths / max(float(lengths.mean()), 1e-9))
        holding = Counter(word for count in counts for word in count)
        self._size = len(counts)
        postings: dict[str, list[tuple[int, int]]] = {}
        for place, count in enumerate(counts):
            for word, number in count.items():
                postings.setdefault(word, []).append((place, number))
        self._weights: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for word, entries in postings.items():
            places = np.array([place for place, _ in entries])
            times = np.array([number for _, number in entries], dtype=float)
            idf = math.log(1 + (self._size - holding[word] + 0.5) / (holding[word] + 0.5))
            self._weights[word] = places, idf * times * (k1 + 1) / (times + norm[places])

    def scores(self, query: Sequence[str]) -> np.ndarray:
        """A score for each document, float64 ``(documents,)``."""
        total = np.zeros(self._size)
        for word in query:
            if word in self._weights:
                places, weights = self._weights[word]
                total[places] += weights
        return total


def terms(text: str) -> list[str]:
    """What is indexed and asked for: stems without stop words."""
    return [stem(word) for word in words_of(text) if word not in STOP_WORDS]


def found(scores: np.ndarray, own: int, cut: int) -> float:
    """The chance that document ``own`` is among the first ``cut`` when ties are broken at random; a document that
    shares no word with the query is not found."""
    if scores[own] <= 0:
        return 0.0
    above = int((scores > scores[own]).sum())
    tied = int((scores == scores[own]).sum())
    return min(max(cut - above, 0) / tied, 1.0)


def recalls(documents: Sequence[str], queries: Sequence[Sequence[str]]) -> np.ndarray:
    """Mean recall of each photo's queries at each cut, float64 ``(photos, cuts)``; 0 of a photo without any."""
    index = Bm25([terms(document) for document in documents])
    result = np.zeros((len(documents), len(CUTS)))
    for own, asked in enumerate(queries):
        for query in asked:
            scores = index.scores(terms(query))
            result[own] += [found(scores, own, cut) for cut in CUTS]
        result[own] /= max(len(asked), 1)
    return result


def human_recalls(references: Sequence[Sequence[str]], together: bool) -> np.ndarray:
    """The same with people's captions as documents: for each query one other caption, or all others together. Photos of
    one caption are not asked for."""
    counts = np.array([len(texts) for texts in references])
    result = np.zeros((len(references), len(CUTS)))
    for asked in range(counts.max()):
        documents = [
            " ".join(text for place, text in enumerate(texts) if place != asked % len(texts)) or texts[0]
            if together
            else texts[(asked + 1) % len(texts)]
            for texts in references
        ]
        result += recalls(documents, [texts[asked : asked + 1] if len(texts) > 1 else () for texts in references])
    return result / counts[:, None]


def retrieval(rows: Sequence[Mapping[str, Any]], resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """All figures of pictures with ``caption``, ``references`` and, if they have them, ``tags``; those with two
    references or more are asked for.

    Raises:
        DataError: no picture has two.
    """
    references = [list(row["references"]) for row in rows]
    queries = [texts if len(texts) > 1 else [] for texts in references]
    asked = np.flatnonzero([len(texts) for texts in queries])
    if not len(asked):
        raise DataError("no picture has two human captions: one asks for it, and another is what it is compared with")
    systems = {"captions": recalls([row["caption"] for row in rows], queries)[asked]}
    if all(row.get("tags") is not None for row in rows):
        with_tags = [" ".join([row["caption"], *row["tags"]]) for row in rows]
        systems["captions_and_tags"] = recalls(with_tags, queries)[asked]
        systems["tags"] = recalls([" ".join(row["tags"]) for row in rows], queries)[asked]
    systems["human_caption"] = human_recalls(references, together=False)[asked]
    systems["human_captions_together"] = human_recalls(references, together=True)[asked]
    drawn = np.random.default_rng(seed).integers(len(asked), size=(resamples, len(asked)))
    result: dict[str, Any] = {
        "photos": len(rows),
        "left_out": len(rows) - len(asked),
        "queries": sum(map(len, queries)),
        "systems": {name: _figures(values, drawn) for name, values in systems.items()},
    }
    one = systems["human_caption"].mean(0)
    result["of_one_person"] = {  # says the same of a hundred photos as of a thousand, as recall itself does not
        f"recall_at_{cut}": round(float(systems["captions"][:, place].mean() / max(one[place], 1e-9)), 4)
        for place, cut in enumerate(CUTS)
    }
    if "captions_and_tags" in systems:
        result["tags_add"] = _figures(systems["captions_and_tags"] - systems["captions"], drawn)
    return result


def difference(
    captions: Sequence[str], others: Sequence[str], references: Sequence[Sequence[str]], resamples: int, seed: int
) -> dict[str, Interval]:
    """How much more is found by ``captions`` than by ``others``, of the same photos (paired bootstrap)."""
    drawn = np.random.default_rng(seed).integers(len(references), size=(resamples, len(references)))
    return _figures(recalls(captions, references) - recalls(others, references), drawn)


def _figures(values: np.ndarray, drawn: np.ndarray) -> dict[str, Interval]:
    return {
        f"recall_at_{cut}": described(float(values[:, place].mean()), values[drawn, place].mean(1))
        for place, cut in enumerate(CUTS)
    }


class RetrievalConfig(BaseModel):
    """Settings of a run."""

    model_config = ConfigDict(extra="forbid")

    data: str = Field(description="captioned pictures: NAME/VERSION of data.prepare, or a folder with captions.txt")
    captioner: str = Field("starter:captioner", description="checkpoint whose captions are searched")
    tagger: str = Field("starter:tagger", description="checkpoint whose tags are searched; empty: captions alone")
    photos: int = Field(1000, ge=10, description="test photos")
    batch_size: int = Field(16, ge=1)
    resamples: int = Field(2000, ge=10, description="bootstrap resamples of photos")
    rows: Path | None = Field(
        None, description="JSON with captions, tags, references and what they are of: read if it exists, else written"
    )
    output: Path = Field(description="JSON file for the result")
    seed: int = 0


def kept_rows(file: Path, made_of: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows that a run of the same captioner, tagger and data kept.

    Raises:
        DataError: the file holds others, or does not say what its rows are of.
    """
    kept = json.loads(file.read_text())
    if not isinstance(kept, dict) or not {*made_of, "rows"} <= kept.keys():
        raise DataError(f"--rows {file} does not say of which captioner, tagger and data it is: name another file")
    if other := [f"{key} {kept[key]}, not {value}" for key, value in made_of.items() if kept[key] != value]:
        raise DataError(f"--rows {file} is of {'; of '.join(other)}: name another file")
    return kept["rows"]


def search(config: RetrievalConfig) -> dict[str, Any]:
    """Caption, tag, search.

    Raises:
        DataError, CheckpointError: something that is named is not there, or kept rows are of something else.
    """
    from deployments.checkpoints import resolve
    from train.examples import read_examples
    from train.generate import caption_all, tag_all
    from train.tracking import code_commit

    examples = read_examples(config.data, "captioner", config.photos)
    captioner, tagger = resolve(config.captioner), resolve(config.tagger) if config.tagger else None
    made_of = {
        "captioner": captioner.name,
        "tagger": tagger.name if tagger else None,
        "data": f"{examples.name} {examples.version}",
    }
    if config.rows and config.rows.is_file():
        rows = kept_rows(config.rows, made_of)
    else:
        captions = caption_all(captioner, examples.examples, config.batch_size)
        tags = tag_all(tagger, captions) if tagger else [None] * len(captions)
        rows = [
            {"id": example.id, "caption": caption, "tags": some, "references": list(example.captions)}
            for example, caption, some in zip(examples.examples, captions, tags, strict=True)
        ]
        if config.rows:
            config.rows.write_text(json.dumps(made_of | {"rows": rows}, indent=0))
    told = {"code_commit": code_commit(), "finished_at": datetime.now(UTC).isoformat(timespec="seconds")}
    return made_of | told | retrieval(rows, config.resamples, config.seed)


def main(arguments: list[str] | None = None) -> None:
    """Search, and write the result."""
    from pydantic_settings import CliApp

    from deployments.checkpoints import CheckpointError

    config = CliApp.run(RetrievalConfig, cli_args=arguments)
    try:
        result = search(config)
    except (DataError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
