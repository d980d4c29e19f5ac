"""What the prefix cache and the grammar of the tagger's engine are worth: vLLM offline with and without either, over
the same captions, in turns.

Two engines are up at the same time, one with a prefix cache and one without; the grammar is a request's. Beside speed,
what comes of it: answers of the form that is asked for, and tags of the model's own that hold of the caption.

    python -m benchmarks.tagger_options --flickr FOLDER

In: a checkpoint and a folder with ``captions.txt``. Out: ``results/tagger_options.json`` and a plot.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from benchmarks import plots
from benchmarks.load import paired
from benchmarks.report import RESULTS, write_result
from benchmarks.tagger_quality import read_flickr
from deployments.checkpoints import resolve
from deployments.offline_tagger import OfflineTagger
from deployments.tag_rules import proposed
from deployments.tagger import ANSWER, TaggerSettings, engine_arguments

#: Prefix cache and grammar of each way, the served one last.
_WAYS = {
    "neither": (False, False),
    "grammar": (False, True),
    "prefix cache": (True, False),
    "both, as served": (True, True),
}


class TaggerOptions(BaseModel):
    """Settings of a run."""

    model_config = ConfigDict(extra="forbid")

    flickr: Path = Field(description="folder with captions.txt")
    uri: str = Field("starter:tagger", description="checkpoint")
    device: str = Field("cpu", description="cpu or gpu")
    captions: int = Field(64, ge=8, description="of each round")
    rounds: int = Field(3, ge=1)


def measure(config: TaggerOptions) -> dict[str, Any]:
    """Captions a second of each way in each round, and what the answers are like."""
    settings = TaggerSettings(uri=config.uri, device=config.device, threads=os.cpu_count() or 1)
    checkpoint = resolve(config.uri)
    engines = {
        cached: OfflineTagger(checkpoint, settings, other={"enable_prefix_caching": cached}) for cached in (False, True)
    }
    captions = [row["caption"] for row in read_flickr(config.flickr, config.captions * config.rounds + 8, seed=2)]
    for cached, grammar in _WAYS.values():
        engines[cached].answer(captions[:8], grammar)
    rates: dict[str, list[float]] = {way: [] for way in _WAYS}
    answers: dict[str, list[str]] = {way: [] for way in _WAYS}
    asked = captions[8:]
    for number in range(config.rounds):
        part = asked[number * config.captions : (number + 1) * config.captions]
        for way in _WAYS if number % 2 == 0 else reversed(_WAYS):
            cached, grammar = _WAYS[way]
            started = time.perf_counter()
            answers[way] += engines[cached].answer(part, grammar)
            rates[way].append(round(len(part) / (time.perf_counter() - started), 3))
        print({way: found[-1] for way, found in rates.items()}, flush=True)
    return {
        "per_s": rates,
        "served_to": {way: round(paired(rates["both, as served"], found), 3) for way, found in rates.items()},
        "answers": {
            way: {
                "of_the_form": round(statistics.mean(bool(re.fullmatch(ANSWER, text)) for text in found), 4),
                "own_tags_that_hold": round(
                    statistics.mean(len(proposed(*each)) for each in zip(found, asked, strict=True)), 3
                ),
                "characters": round(statistics.mean(map(len, found)), 1),
            }
            for way, found in answers.items()
        },
        "captions_a_round": config.captions,
        "threads": settings.threads,
        "dtype": engine_arguments(settings)["dtype"],
    }


def show(result: dict[str, Any], folder: Path = RESULTS) -> str:
    """Both tables, and the plot."""
    rows = [{"way": way} | answers for way, answers in result["answers"].items()]
    return plots.compared("tagger_options", result["per_s"], "captions/s", folder=folder) + "\n\n" + plots.table(rows)


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    from pydantic_settings import CliApp

    result = measure(CliApp.run(TaggerOptions, cli_args=arguments))
    print(show(result), write_result("tagger_options", result), sep="\n")


if __name__ == "__main__":
    main()
