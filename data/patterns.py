"""How many clients ask at a time, or how many requests arrive a second: the shapes of load that the simulator has.

In: a pattern's settings. Out: for closed loops, phases of so many clients for so many seconds; for the open loop, the
moments at which requests are due, whoever is still waiting for an answer. Knows no HTTP.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Pattern = Literal["original", "constant", "ramp", "spike", "poisson"]
#: The original system's: so many concurrent clients, for a minute each.
ORIGINAL = (1, 2, 3, 5, 3, 2, 1)


@dataclass(frozen=True)
class Phase:
    """So many clients at a time, each asking again when it has its answer, for so long."""

    clients: int
    seconds: float


def phases(pattern: Pattern, clients: int, phase_s: float) -> list[Phase]:
    """The phases of a closed loop.

    Args:
        pattern: ``original`` is 1, 2, 3, 5, 3, 2, 1 whatever ``clients`` says; ``constant`` one phase; ``ramp`` one
            client more each phase; ``spike`` one client, all of them for one phase, one client.
        clients: at the highest.
        phase_s: length of a phase.
    """
    counts: dict[str, tuple[int, ...]] = {
        "original": ORIGINAL,
        "constant": (clients,),
        "ramp": tuple(range(1, clients + 1)),
        "spike": (1, clients, 1),
    }
    return [Phase(count, phase_s) for count in counts[pattern]]


def arrivals(rate: float, seconds: float, seed: int) -> Iterator[float]:
    """Moments of a Poisson process of ``rate`` a second, in seconds from its start: independent exponential gaps."""
    generator, at = random.Random(seed), 0.0
    while (at := at + generator.expovariate(rate)) < seconds:
        yield at
