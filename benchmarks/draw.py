"""Plots and tables of results that are there, without measuring again.

    python -m benchmarks.draw [benchmarks/results/serving_ratio.json ...]

Each plot is written beside its result. Without names, of all committed results that a table here names.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import COMMITTED

#: By the name of the result: the program that draws it, and what of it does.
PROGRAMS = {
    "annotate_growth": ("annotate", "show_growth"),
    "annotate_throughput": ("annotate", "show"),
    "gateway": ("gateway", "show"),
    "prepare_growth": ("prepare", "show_growth"),
    "prepare_throughput": ("prepare", "show"),
    "serving_ratio": ("serving", "show"),
    "tagger_options": ("tagger_options", "show"),
    "tagger_serving": ("tagger_serving", "show"),
    "training": ("training", "show"),
}


def draw(result: Path) -> str:
    """Draw a result, by the name of its file; returns its table.

    Raises:
        KeyError: nothing here draws it, or it lacks what is drawn.
    """
    program, shows = PROGRAMS[result.stem]
    show = getattr(importlib.import_module(f"benchmarks.{program}"), shows)
    return str(show(json.loads(result.read_text()), result.parent))


def main(arguments: Sequence[str]) -> None:
    """Draw those that are named."""
    for result in map(Path, arguments) if arguments else (COMMITTED / f"{name}.json" for name in PROGRAMS):
        try:
            print(result.stem, draw(result), sep="\n", flush=True)
        except KeyError as missing:
            raise SystemExit(f"error: {result}: no {missing}; there are {', '.join(PROGRAMS)}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
