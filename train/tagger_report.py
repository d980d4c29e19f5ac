"""How good a tagger is: whether its answers follow the rules, are supported, and help to find pictures.

In: a tagger's checkpoint, run offline by its own engine settings, and captioned test examples. Out: the JSON-ready body
of a report. What is tagged is one human caption of each photo, with the other people's as references, or a captioner's
captions.

* ``tags``: validity, support by the caption, recall of the references' nouns (``train.tag_quality``).
* ``retrieval``: whether captions with tags find more than captions alone (``train.retrieval``).
* ``not_measured``: what is missing from the above, and how to have it.

Knows no MLflow and no HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from deployments.checkpoints import Checkpoint
from train.examples import Example
from train.generate import caption_all, tag_all
from train.report import Body
from train.retrieval import retrieval
from train.tag_quality import WORDNET, Judge, measure_tags, open_judge


class TaggerSettings(BaseModel):
    """What is tagged."""

    model_config = ConfigDict(extra="forbid")

    captions_by: str = Field(
        "", description="checkpoint of a captioner whose captions are tagged; empty: one human caption of each photo"
    )


def tagger_figures(rows: Sequence[Mapping[str, Any]], judge: Judge | None, resamples: int, seed: int) -> dict[str, Any]:
    """All figures of rows with ``caption``, ``tags`` and ``references``."""
    figures: dict[str, Any] = {"not_measured": []}
    if judge is None:
        figures["not_measured"].append(f"the tags: Debian's wordnet-base ({WORDNET}) and nltk are needed")
    else:
        figures["tags"] = measure_tags(rows, [row["tags"] for row in rows], judge)
    if any(len(row["references"]) > 1 for row in rows):
        figures["retrieval"] = retrieval(rows, resamples, seed)
        figures["tags_add"] = figures["retrieval"]["tags_add"]
    else:
        figures["not_measured"].append("whether pictures are found: no photo has two human captions as queries")
    return figures | {"captions": list(rows)}


def examine(
    checkpoint: Checkpoint,
    examples: Sequence[Example],
    captioner: Checkpoint | None,
    resamples: int,
    batch_size: int,
    seed: int,
) -> Body:
    """All figures of a tagger on test examples."""
    if captioner is not None:
        captions = caption_all(captioner, examples, batch_size)
        references = [list(example.captions) for example in examples]
    else:
        captions = [example.captions[0] for example in examples]
        # a photo that one person described has nothing else to be held against
        references = [list(example.captions[1:] or example.captions) for example in examples]
    tags = tag_all(checkpoint, captions)
    rows = [
        {"id": example.id, "caption": caption, "tags": some, "references": texts}
        for example, caption, some, texts in zip(examples, captions, tags, references, strict=True)
    ]
    figures = tagger_figures(rows, open_judge(), resamples, seed)
    figures["captions_by"] = captioner.name if captioner is not None else "people: one of each photo"
    return Body(figures)
