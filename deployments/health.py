"""Whether a model still answers as it did: what a replica's health check goes by.

In: a known answer, computed when a model comes into service, and how it comes out when it is computed again; which
batches of real work failed and which answers were no numbers. Out: an error for Serve, which starts a replica anew
when three checks in a row have raised one.

A known input is computed again when the model has answered nothing for a while, so that a busy replica does no more
than its work, and now and then beside the work, for answers that are wrong and look like answers. A check never waits
long: one that is not over is looked at by the next, so that work in hand does not make a replica look dead.

Belongs to one event loop. Knows no model and no Ray.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import numpy as np

#: A model that answers all the time is given its known input once in so many intervals.
_BUSY_INTERVALS = 10
#: For so long a check waits for an answer, well within the time that Serve gives it (`health_check_timeout_s`, 30 s).
_PATIENCE_S = 10.0


class Unhealthy(RuntimeError):
    """A model does not answer as it should; the message says what was seen."""


def known_picture(shape: tuple[int, ...]) -> np.ndarray:
    """The picture that every model is given to see whether it answers as before: uint8 views of ``(V, S, S, 3)``.

    Edges and slopes in all colours, another detail in each view, so that no part of a network is given a constant.
    """
    views, rows, columns, colours = np.indices(shape)
    slopes = rows * (3 + colours) + columns * (5 - colours) + 31 * views
    squares = (rows // 8 + columns // 8) % 2 * 96
    return ((slopes + squares) % 256).astype(np.uint8)


class Health:
    """What a replica has seen of its model.

    ``every_s`` and ``most_failures`` may be changed at any time.
    """

    def __init__(self, every_s: float = 60.0, most_failures: int = 3) -> None:
        self.every_s, self.most_failures = every_s, most_failures
        self._running: asyncio.Task[None] | None = None
        self.renewed()

    def renewed(self) -> None:
        """Another model is in service, and has just answered its known input: what the last one did is forgotten."""
        self._model = object()
        self._wrong = self._suspicion = self._failed_with = ""
        self._failures = 0
        self._checked = self._answered = time.monotonic()

    def answered(self) -> None:
        """A batch of real work has its answers."""
        self._answered, self._failures = time.monotonic(), 0

    def failed(self, error: str) -> None:
        """A batch has none, for no fault of its senders."""
        self._failures += 1
        self._failed_with = error

    def spoilt(self, what: str) -> None:
        """An answer was no number."""
        self._suspicion = what

    async def check(self, repeat: Callable[[], Awaitable[str | None]]) -> None:
        """Serve's health check.

        Args:
            repeat: computes the known input again, and says what is wrong with the answer, ``""`` where nothing is,
                and None where it came to no answer that says anything.

        Raises:
            Unhealthy: the last answer to the known input was wrong; the last ``most_failures`` batches failed; or an
                answer since the last check was no number. After the last of these the known input decides.
        """
        if self._running is None and self._is_due(time.monotonic()):
            self._running = asyncio.get_running_loop().create_task(self._repeat(repeat))
        if self._running is not None:
            await asyncio.wait({self._running}, timeout=_PATIENCE_S)
        suspicion, self._suspicion = self._suspicion, ""
        if self._wrong:
            raise Unhealthy(self._wrong)
        if self._failures >= self.most_failures:
            raise Unhealthy(f"the last {self._failures} batches failed, the last of them with {self._failed_with}")
        if suspicion:
            raise Unhealthy(suspicion)

    def _is_due(self, now: float) -> bool:
        if self._wrong or self._suspicion:
            return True
        silent = now - max(self._checked, self._answered)
        return silent >= self.every_s or now - self._checked >= _BUSY_INTERVALS * self.every_s

    async def _repeat(self, repeat: Callable[[], Awaitable[str | None]]) -> None:
        model = self._model
        try:
            wrong = await repeat()
        except Exception as error:
            wrong = f"the known input cannot be computed: {type(error).__name__}: {error}"
        finally:
            self._running = None
        if wrong is not None and model is self._model:
            self._wrong, self._checked = wrong, time.monotonic()
