"""Quality of the tags, measured against the captions they come from and against people's captions of the same photos.

In: captions with references, ``[{"id", "caption", "references": [...]}]`` (``--captions FILE``), or the folder of a
Flickr data set (``--flickr DIR``: one human caption of each photo is the input, the others are the references). The
tagger's own prompt, engine arguments, grammar and rules are used; vLLM runs offline. Out:
``results/tagger_quality.json``.

Definitions: ``train.tag_quality``. ``rules_only`` is the same with an empty answer of the model: what the language
model adds is the difference.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import time
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, write_result
from deployments.checkpoints import Checkpoint, resolve
from deployments.offline_tagger import OfflineTagger
from deployments.tag_lexicon import WordNet
from deployments.tag_rules import clean_tags, proposed
from deployments.tagger import load_prompt
from train.tag_quality import Judge, measure_tags

RESULT = RESULTS / "tagger_quality.json"


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
    }
    if options.answers and options.answers.exists():
        kept = json.loads(options.answers.read_text())
        if kept.get("of") != [options.uri, result["prompt"]]:
            parser.error(f"{options.answers} is not of {options.uri} with this prompt: name another file")
        if unknown := [caption for caption in captions if caption not in kept["answers"]]:
            parser.error(f"{options.answers} has no answer to {unknown[0]!r}: name another file")
        raw = [kept["answers"][caption] for caption in captions]
    else:
        raw, result["offline"] = ask_offline(captions, resolve(options.uri))
        if options.answers:
            kept = {"of": [options.uri, result["prompt"]], "answers": dict(zip(captions, raw, strict=True))}
            options.answers.write_text(json.dumps(kept, indent=0))
    judge = Judge(WordNet(options.wordnet))
    tags = [clean_tags(answer, caption) for answer, caption in zip(raw, captions, strict=True)]
    own = [proposed(answer, caption) for answer, caption in zip(raw, captions, strict=True)]
    result["tags"] = measure_tags(rows, tags, judge)
    result["model_share_of_tags"] = sum(map(len, own)) / sum(map(len, tags))
    result["rules_only"] = measure_tags(rows, [clean_tags("", caption) for caption in captions], judge)
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
    print(json.dumps({key: value for key, value in result.items() if key != "examples"}, indent=1))
    print(write_result(options.output.stem, result, options.output.parent))


if __name__ == "__main__":
    main()
