"""What became of the trials of a sweep, and its page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from data import pages
from train.sweep_settings import AnySweep, kind_of

_TEMPLATES = Path(__file__).parent / "pages"


class TrialOutcome(BaseModel):
    """What became of one trial."""

    id: str
    parameters: dict[str, Any]
    status: str = Field(description="`finished`, `stopped early`, `failed` or `unfinished`")
    best: float | None
    curve: list[tuple[int, float]] = Field(description="(step, best value so far)")
    reason: str = ""


def counts_of(trials: list[TrialOutcome]) -> dict[str, int]:
    """How many trials ended in which way."""
    counts = dict.fromkeys(("finished", "stopped early", "failed", "unfinished"), 0)
    for trial in trials:
        counts[trial.status] += 1
    return counts


def render_page(config: AnySweep, trials: list[TrialOutcome]) -> str:
    """Every trial: its curve, its settings, what became of it."""
    ranked = sorted(trials, key=lambda trial: (trial.status != "finished", -(trial.best or -math.inf)))
    curves = {
        f"{rank}": ([step for step, _ in trial.curve], [value for _, value in trial.curve])
        for rank, trial in enumerate(ranked, 1)
        if trial.curve
    }
    varied = list(dict.fromkeys(name for trial in ranked for name in trial.parameters))

    def against(name: str) -> Any:
        points = [(trial.parameters[name], trial.best, trial.status) for trial in ranked if trial.best is not None]

        def draw(axes: Any) -> None:
            for rank, status in enumerate(("finished", "stopped early", "failed")):
                chosen = [(value, best) for value, best, each in points if each == status]
                if chosen:
                    axes.scatter(
                        [value for value, _ in chosen],
                        [best for _, best in chosen],
                        color=pages.SERIES[rank],
                        label=status,
                        s=22,
                    )
            numbers = [value for value, *_ in points if isinstance(value, (int, float)) and value > 0]
            if len(numbers) == len(points) and numbers and max(numbers) > 30 * min(numbers):
                axes.set_xscale("log")
            axes.set(xlabel=name, ylabel="best validation figure")
            axes.legend(fontsize=8)

        return pages.chart(name, draw, f"Best validation figure by {name}", 4.6, 3.0) if points else pages.nothing(name)

    return pages.render(
        "sweep.html",
        folder=_TEMPLATES,
        name=config.name,
        kind=kind_of(config),
        trials=ranked,
        counts=counts_of(trials),
        varied=varied,
        curves=pages.line_chart(
            "Best validation figure so far, by trial (numbers: rank below)",
            curves,
            "optimiser step",
            "best so far",
            from_zero=False,
            width=9.0,
            height=3.8,
        ),
        charts=[against(name) for name in varied],
    )
