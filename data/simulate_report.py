"""Report of a simulation: rate, latency, errors, and how good the answers were against what is known of the pictures.

    python -m data.simulate_report FOLDER

In: the folder of a run of ``data.simulate``, finished, stopped or killed. Out: ``report.json`` and ``report.html`` in
it. Knows no HTTP.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliPositionalArg

from data.captions import clean_caption, score_captions
from data.commands import parse
from data.errors import DataError, end
from data.leakage import roc_auc
from data.pages import Markup, bar_chart, grouped_bar_chart, histogram, line_chart, render

RECORDS, RUN, PAGE, FIGURES = "requests.jsonl", "run.json", "report.html", "report.json"
_ANSWERS = ("human", "uncertain", "ai")
#: Parts of the time axis, at most, and the shortest.
_PARTS, _LEAST_PART_S = 60, 1.0
_SHOWN = 30


class SimulationReportConfig(BaseModel):
    """Which run."""

    model_config = ConfigDict(extra="forbid")

    folder: CliPositionalArg[Path] = Field(description="folder of a run, with requests.jsonl")


def write_simulation_report(folder: Path) -> dict[str, Any]:
    """Write both files into the folder of a run and answer the figures.

    Raises:
        DataError: the folder is none of a run.
    """
    run, records = read_run(folder)
    figures = measure_run(run, records)
    (folder / FIGURES).write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")
    (folder / PAGE).write_text(_page(figures, records))
    return figures


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What ``data.simulate`` wrote; a last line that a kill cut off is left out.

    Raises:
        DataError: the folder is none of a run, or a line that is not the last is damaged.
    """
    try:
        run = json.loads((folder / RUN).read_text())
        lines = (folder / RECORDS).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is no folder of a simulation ({error}): make one with `data.simulate`") from error
    records = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{folder / RECORDS}, line {number} is damaged: remove it and run again") from error
    return run, records


def measure_run(run: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a run, ready for JSON."""
    answered = [record for record in records if record["status"] == 200 and record["answer"]]
    seconds = run.get("seconds") or max((record["done_s"] for record in records), default=0.0)
    figures: dict[str, Any] = {
        "name": run["name"],
        "version": run["version"],
        "begun_at": run["begun_at"],
        "tasks": run["tasks"],
        "config": run["config"],
        "finished": "seconds" in run and not run["stopped_early"],
        "seconds": round(seconds, 3),
        "requests": len(records),
        "answered": len(answered),
        "given_up": max(0, run.get("sent", len(records)) - len(records)),
        "dropped": run.get("dropped", 0),
        "refusals": sum(record["refused"] for record in records),
        "attempts": sum(record["attempts"] for record in records),
        "rate_per_s": _rate(len(answered), seconds),
        "statuses": _counted(str(record["status"] or "no answer") for record in records),
        "errors": _counted(record["error"].split(":")[0] for record in records if record["error"]),
        "stages_missing": _counted(
            f"{each['stage']}: {each['code']}" for record in answered for each in record["answer"]["errors"]
        ),
        "latency_ms": _latencies(answered),
        "attempt_ms": _latencies(answered, "attempt_ms"),
        "stages_ms": _stages(answered),
        "models": sorted({f"{k}: {v}" for record in answered for k, v in record["answer"]["models"].items()}),
        "phases": _phases(records),
        "over_time": _over_time(records, seconds),
    }
    if detection := _detection(answered):
        figures["detection"] = detection
    if captions := _captions(answered):
        figures["captions"] = captions
    return figures


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items(), key=lambda entry: (-entry[1], entry[0])))


def _rate(count: int, seconds: float) -> float | None:
    """A second; None where no time has passed to speak of."""
    return round(count / seconds, 3) if seconds >= 1e-3 else None


def _latencies(records: Sequence[dict[str, Any]], name: str = "latency_ms") -> dict[str, float | None]:
    values = [record[name] for record in records]
    if not values:
        return dict.fromkeys(("p50", "p95", "p99", "mean", "most"))
    p50, p95, p99 = (round(float(value), 1) for value in np.quantile(values, (0.5, 0.95, 0.99)))
    return {"p50": p50, "p95": p95, "p99": p99, "mean": round(float(np.mean(values)), 1), "most": max(values)}


def _stages(answered: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    found = defaultdict(list)
    for record in answered:
        for stage, value in record["answer"]["timings_ms"].items():
            found[stage].append(value)
    return {
        stage: {"p50": round(float(np.median(values)), 1), "p95": round(float(np.quantile(values, 0.95)), 1)}
        for stage, values in found.items()
    }


def _phases(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures of each phase. It lasts from its first request to its last answer."""
    found = []
    for number in sorted({record["phase"] for record in records}):
        own = [record for record in records if record["phase"] == number]
        answered = [record for record in own if record["status"] == 200]
        seconds = max(record["done_s"] for record in own) - min(record["due_s"] for record in own)
        found.append(
            {
                "clients": own[0]["clients"],
                "begun_s": min(record["due_s"] for record in own),
                "seconds": round(seconds, 2),
                "requests": len(own),
                "answered": len(answered),
                "refusals": sum(record["refused"] for record in own),
                "rate_per_s": _rate(len(answered), seconds),
                **_latencies(answered),
            }
        )
    return found


def time_edges(seconds: float) -> np.ndarray:
    """Edges of equal parts of the time axis, none narrower than a second unless the whole is: the last part is as wide
    as the others wherever the run ended, so no rate is divided by a sliver.
    """
    seconds = max(seconds, 1e-3)
    parts = max(1, min(_PARTS, math.floor(seconds / _LEAST_PART_S)))
    return np.linspace(0, seconds, parts + 1)


def _over_time(records: Sequence[dict[str, Any]], seconds: float) -> dict[str, list[Any]]:
    """Rate, latency and refusals by the moment at which answers came."""
    last = max((record["done_s"] for record in records), default=0.0)
    edges = time_edges(max(seconds, last))
    width = float(edges[1] - edges[0])
    parts: list[list[dict[str, Any]]] = [[] for _ in edges[1:]]
    for record in records:
        parts[min(len(parts) - 1, max(0, int(record["done_s"] / width)))].append(record)
    answered = [[r["latency_ms"] for r in part if r["status"] == 200] for part in parts]
    return {
        "seconds": [round(float(value), 3) for value in (edges[:-1] + edges[1:]) / 2],
        "answers_per_s": [round(len(part) / width, 3) for part in answered],
        "refusals_per_s": [round(sum(r["refused"] for r in part) / width, 3) for part in parts],
        "errors_per_s": [round(sum(r["status"] != 200 for r in part) / width, 3) for part in parts],
        "p50_ms": [round(float(np.median(part)), 1) if part else None for part in answered],
        "p95_ms": [round(float(np.quantile(part, 0.95)), 1) if part else None for part in answered],
    }


def _first_answers(answered: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The first answer for each picture: one that was sent twice counts once."""
    found: dict[str, dict[str, Any]] = {}
    for record in answered:
        found.setdefault(record["id"], record)
    return found


def _detection(answered: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Verdicts against labels; ``uncertain`` is no mistake, and no hit."""
    judged = [r for r in answered if r["truth"]["label"] in ("human", "ai") and r["answer"]["label"] in _ANSWERS]
    if not judged:
        return None
    first = list(_first_answers(judged).values())
    confusion = {truth: dict.fromkeys(_ANSWERS, 0) for truth in ("human", "ai")}
    by: dict[str, dict[str, Counter[str]]] = {"generator": defaultdict(Counter), "source": defaultdict(Counter)}
    for record in first:
        truth, answer = record["truth"], record["answer"]["label"]
        confusion[truth["label"]][answer] += 1
        by["generator"][truth["generator"] or "unknown"][answer] += 1
        by["source"][f"{truth['source']}, {truth['label']}"][answer] += 1
    right = sum(confusion[label][label] for label in confusion)
    decided = sum(row[answer] for row in confusion.values() for answer in ("human", "ai"))
    recalls = {label: _share(row[label], sum(row.values())) for label, row in confusion.items()}
    known = [value for value in recalls.values() if value is not None]
    truths = np.array([record["truth"]["label"] == "ai" for record in first], int)
    chances = np.array([record["answer"]["ai_probability"] for record in first], float)
    spread: dict[str, list[float]] = defaultdict(list)
    for record in judged:
        spread[record["id"]].append(record["answer"]["ai_probability"])
    return {
        "pictures": len(first),
        "confusion": confusion,
        "accuracy": _share(right, len(first)),
        "decided": _share(decided, len(first)),
        "accuracy_of_decided": _share(right, decided),
        "balanced_accuracy": round(sum(known) / 2, 4) if len(known) == 2 else None,
        "human_called_human": recalls["human"],
        "ai_called_ai": recalls["ai"],
        "roc_auc": round(roc_auc(truths, chances), 4) if 0 < truths.sum() < len(truths) else None,
        "largest_change_of_probability_when_sent_again": round(
            max((max(values) - min(values) for values in spread.values()), default=0.0), 6
        ),
        "by_generator": {name: _answers(counts) for name, counts in sorted(by["generator"].items())},
        "by_source": {name: _answers(counts) for name, counts in sorted(by["source"].items())},
    }


def _answers(counts: Counter[str]) -> dict[str, int]:
    return {answer: counts[answer] for answer in _ANSWERS}


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _captions(answered: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Captions against people's."""
    captioned = [r for r in answered if r["truth"]["captions"] and r["answer"]["caption"] is not None]
    if not captioned:
        return None
    first = _first_answers(captioned)
    said = {id_: record["answer"]["caption"] for id_, record in first.items()}
    scored = {id_: text for id_, text in said.items() if clean_caption(text)}
    references = {id_: first[id_]["truth"]["captions"] for id_ in scored}
    # CIDEr weighs words by how rare they are among the pictures: of one picture it says nothing
    scores = score_captions(scored, references) if len(scored) > 1 else {}
    return {
        "pictures": len(first),
        "empty": len(said) - len(scored),
        "scores": {name: round(value, 4) for name, value in scores.items()},
        "words_mean": round(float(np.mean([len(text.split()) for text in said.values()])), 2),
        "distinct": len(set(said.values())),
        "examples": [
            {"said": said[id_], "people": first[id_]["truth"]["captions"][0]} for id_ in sorted(said)[:_SHOWN]
        ],
    }


# --------------------------------------------------------------------------------------------------------------- page


def _page(figures: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    return render("simulation.html", figures=figures, charts=_charts(figures, records))


def _charts(figures: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Markup]:
    over = {
        name: [math.nan if value is None else value for value in values]
        for name, values in figures["over_time"].items()
    }
    at = over["seconds"]
    rates = {"answered": (at, over["answers_per_s"]), "refused": (at, over["refusals_per_s"])}
    if any(over["errors_per_s"]):
        rates["without an answer"] = (at, over["errors_per_s"])
    charts = {
        "rate": line_chart("Rate", rates, "seconds since the start", "a second"),
        "latency": line_chart(
            "Latency of answers",
            {"median": (at, over["p50_ms"]), "95th percentile": (at, over["p95_ms"])},
            "seconds since the start",
            "ms",
        ),
        "latencies": histogram(
            "Latency, distribution",
            {"": [record["latency_ms"] for record in records if record["status"] == 200]},
            "ms",
            "answers",
            log=True,
        ),
        "statuses": bar_chart("Status of requests", figures["statuses"], "requests", "status"),
    }
    closed = [phase for phase in figures["phases"] if phase["clients"]]
    if closed:
        begun = [*(phase["begun_s"] for phase in closed), figures["seconds"]]
        busy = [*(phase["clients"] for phase in closed), closed[-1]["clients"]]
        charts["clients"] = line_chart(
            "Concurrent clients", {"": (begun, busy)}, "seconds since the start", "clients", steps=True
        )
    if "detection" in figures:
        found = figures["detection"]
        charts["verdicts"] = grouped_bar_chart(
            "Verdicts by truth",
            {answer: {truth: row[answer] for truth, row in found["confusion"].items()} for answer in _ANSWERS},
            "pictures",
            "truth",
        )
        charts["generators"] = bar_chart(
            "Called AI, by generator",
            {name: 100 * row["ai"] / max(1, sum(row.values())) for name, row in found["by_generator"].items()},
            "% of its pictures",
            "generator",
        )
        charts["probabilities"] = histogram(
            "Probability of AI, by truth",
            {
                truth: [
                    record["answer"]["ai_probability"]
                    for record in records
                    if record["answer"]
                    and record["truth"]["label"] == truth
                    and record["answer"]["ai_probability"] is not None
                ]
                for truth in ("human", "ai")
            },
            "probability",
            "answers",
        )
    return charts


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report of the run that the command line names."""
    config = parse(SimulationReportConfig, arguments)
    try:
        figures = write_simulation_report(config.folder)
    except Exception as error:
        end(error)
    print(f"{figures['requests']} requests; written: {config.folder / PAGE}", flush=True)


if __name__ == "__main__":
    main()
