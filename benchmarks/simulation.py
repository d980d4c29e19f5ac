"""Discrete events, and what a served graph is made of: processors that are shared, replicas, queues, autoscaling.

What is modelled is what the code does: the door and the batches of ``deployments.replica``, bounded queues, the choice
of the emptier of two replicas, the continuous batches of vLLM, and Serve's autoscaling (look-back, delays, one replica
for each target of requests in work, the time a replica needs to start). Parts that share a processor share its time.
The graph itself is ``benchmarks.graph_simulation``.

Written on ``heapq`` and not on simpy: a spike at 3,000 pictures a second is millions of pictures, each a handful of
callbacks here, where a simulation of generators and event objects costs several times as much; and it spares users a
dependency. Knows no Ray, no model and no figure: ``benchmarks.scale`` brings those.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

#: Serve's: how often the controller looks, and how far back it averages (``look_back_period_s``).
_CONTROL_S, _LOOK_BACK_S = 1.0, 30.0


class Clock:
    """Simulated time, and what is to be done when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = itertools.count()

    def after(self, delay_s: float, do: Callable[..., None], *arguments: Any) -> None:
        """Call ``do`` in ``delay_s`` seconds; of two at one moment the one that was asked for first comes first."""
        heapq.heappush(self._heap, (self.now + delay_s, next(self._number), do, arguments))

    def run(self, until_s: float) -> None:
        """Let time pass."""
        heap = self._heap
        while heap and heap[0][0] <= until_s:
            self.now, _, do, arguments = heapq.heappop(heap)
            do(*arguments)
        self.now = max(self.now, until_s)


# ---------------------------------------------------------------------------------------------------------- processors


class Processor:
    """Cores, or a GPU, that works share: while more is wanted than there is, everything slows down alike.

    ``width`` is what a piece of work uses of it when it is alone (threads of a core, or 1 for a GPU). Equal slowing is
    what a fair scheduler gives to threads, and time slices to processes on one GPU.
    """

    def __init__(self, clock: Clock, capacity: float = 1.0) -> None:
        self.clock, self.capacity, self.busy = clock, capacity, 0.0
        self._users: dict[Any, float] = {}
        self._wanted = 0.0
        self._since = 0.0

    @property
    def speed(self) -> float:
        """Of everything that runs: 1 when nothing waits for a core."""
        return 1.0 if self._wanted <= self.capacity else self.capacity / self._wanted

    def join(self, user: Any, width: float) -> None:
        """``user.speed_changed`` is called before and after every change of the speed."""
        self._change(user, width)

    def leave(self, user: Any) -> None:
        self._change(user, None)

    def _change(self, user: Any, width: float | None) -> None:
        now = self.clock.now
        self.busy += min(self._wanted, self.capacity) * (now - self._since)
        self._since, before = now, self.speed
        if width is None:
            self._wanted -= self._users.pop(user)
            if not self._users:
                self._wanted = 0.0  # what rounding has left
        else:
            self._users[user] = width
            self._wanted += width
        after = self.speed
        if after != before:
            for other in list(self._users):
                if other is not user:
                    other.speed_changed(before, after)


class Job:
    """A piece of work on a processor: ``seconds`` when it is alone."""

    __slots__ = ("_done", "_left", "_processor", "_since", "_turn")

    def __init__(self, processor: Processor, seconds: float, width: float, done: Callable[[], None]) -> None:
        self._processor, self._left, self._done, self._turn = processor, seconds, done, 0
        self._since = processor.clock.now
        processor.join(self, width)
        self._plan(processor.speed)

    def speed_changed(self, before: float, after: float) -> None:
        now = self._processor.clock.now
        self._left -= (now - self._since) * before
        self._since = now
        self._plan(after)

    def _plan(self, speed: float) -> None:
        self._turn += 1
        self._processor.clock.after(max(0.0, self._left) / speed, self._end, self._turn)

    def _end(self, turn: int) -> None:
        if turn == self._turn:
            self._processor.leave(self)
            self._done()


def work(clock: Clock, processor: Processor | None, seconds: float, width: float, done: Callable[[], None]) -> None:
    """Do ``done`` when that much work is finished; without a processor nothing slows it down."""
    if processor is None:
        clock.after(seconds, done)
    else:
        Job(processor, seconds, width, done)


# ------------------------------------------------------------------------------------------------------------ replicas


@dataclass(frozen=True)
class BatchTimes:
    """Seconds for a batch of a size: measured at some sizes, linear between and beyond them."""

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __call__(self, size: int) -> float:
        if len(self.sizes) == 1:
            return self.seconds[0] * size / self.sizes[0]
        position = min(max(1, sum(known < size for known in self.sizes)), len(self.sizes) - 1)
        left, right = self.sizes[position - 1], self.sizes[position]
        low, high = self.seconds[position - 1], self.seconds[position]
        return low + (high - low) * (size - left) / (right - left)


class Replica(Protocol):
    """Takes requests and answers them."""

    ongoing: int
    busy: float

    def take(self, answered: Callable[[], None], what: Any = None) -> None: ...


class BatchReplica:
    """``deployments.replica``: a door that lets up to ``size`` in while no batch is computed, and a batch that begins
    when it is full or the first in it has waited ``wait_s``.
    """

    def __init__(
        self,
        clock: Clock,
        times: Callable[[int], float],
        size: int,
        wait_s: float,
        processor: Processor | None = None,
        width: float = 1.0,
    ) -> None:
        self.clock, self.times, self.size, self.wait_s = clock, times, size, wait_s
        # who only waits is not slowed down
        self.processor, self.width = processor if width else None, width
        self.ongoing, self.busy, self.batches, self.pictures = 0, 0.0, 0, 0
        self._inside: list[Callable[[], None]] = []
        self._outside: deque[Callable[[], None]] = deque()
        self._computing = False
        self._turn = 0

    def take(self, answered: Callable[[], None], what: Any = None) -> None:
        self.ongoing += 1
        if self._computing or self._outside or len(self._inside) >= self.size:
            self._outside.append(answered)
        else:
            self._enter(answered)

    def _enter(self, answered: Callable[[], None]) -> None:
        self._inside.append(answered)
        if len(self._inside) == self.size:
            self._compute()
        elif len(self._inside) == 1:
            self._turn += 1
            self.clock.after(self.wait_s, self._waited, self._turn)

    def _waited(self, turn: int) -> None:
        if turn == self._turn and not self._computing and self._inside:
            self._compute()

    def _compute(self) -> None:
        self._computing = True
        batch, self._inside = self._inside, []
        self.batches += 1
        self.pictures += len(batch)
        started = self.clock.now

        def done() -> None:
            self.busy += self.clock.now - started
            self._computing = False
            self.ongoing -= len(batch)
            for answered in batch:
                answered()
            while self._outside and not self._computing and len(self._inside) < self.size:
                self._enter(self._outside.popleft())

        work(self.clock, self.processor, self.times(len(batch)), self.width, done)


class EngineReplica:
    """vLLM: up to ``size`` requests advance together, a token of each in a step of ``step_s(requests)`` seconds."""

    def __init__(
        self,
        clock: Clock,
        step_s: Callable[[int], float],
        tokens: Callable[[], float],
        size: int,
        processor: Processor | None = None,
        width: float = 1.0,
    ) -> None:
        self.clock, self.step_s, self.tokens, self.size = clock, step_s, tokens, size
        # who only waits is not slowed down
        self.processor, self.width = processor if width else None, width
        self.ongoing, self.busy, self.pictures = 0, 0.0, 0
        self._speed = 1.0
        self._tokens_done = 0.0  # by a request that has been in from the beginning
        self._since = 0.0
        self._running: list[tuple[float, int, Callable[[], None]]] = []
        self._outside: deque[Callable[[], None]] = deque()
        self._number = itertools.count()
        self._turn = 0

    def take(self, answered: Callable[[], None], what: Any = None) -> None:
        self.ongoing += 1
        self._advance()
        if len(self._running) >= self.size:
            self._outside.append(answered)
            return
        self._enter(answered)
        self._plan()

    def _enter(self, answered: Callable[[], None]) -> None:
        if not self._running and self.processor is not None:
            self.processor.join(self, self.width)
            self._speed = self.processor.speed
        heapq.heappush(self._running, (self._tokens_done + self.tokens(), next(self._number), answered))

    def speed_changed(self, before: float, after: float) -> None:
        self._advance()
        self._speed = after
        self._plan()

    def _advance(self) -> None:
        now, running = self.clock.now, len(self._running)
        if running:
            self._tokens_done += (now - self._since) * self._speed / self.step_s(running)
            self.busy += now - self._since
        self._since = now

    def _plan(self) -> None:
        self._turn += 1
        if self._running:
            left = max(0.0, self._running[0][0] - self._tokens_done)
            self.clock.after(left * self.step_s(len(self._running)) / self._speed, self._end, self._turn)

    def _end(self, turn: int) -> None:
        if turn != self._turn:
            return
        self._advance()
        finished = []
        while self._running and self._running[0][0] <= self._tokens_done + 1e-9:
            finished.append(heapq.heappop(self._running)[2])
        if not self._running and self.processor is not None:
            self.processor.leave(self)
        while self._outside and len(self._running) < self.size:
            self._enter(self._outside.popleft())
        self.ongoing -= len(finished)
        self.pictures += len(finished)
        self._plan()
        for answered in finished:
            answered()


# --------------------------------------------------------------------------------------------------------- deployments


@dataclass(frozen=True)
class Scaling:
    """A deployment's part of a Serve configuration."""

    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing: float = 16.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    max_ongoing: int = 100
    max_queued: int = -1
    """Requests that wait at each caller; -1: any number."""
    start_s: float = 0.0
    """From the decision to a replica that answers."""
    gpu_share: float = 0.0


class Gpus:
    """GPUs that replicas are placed on by shares. Replicas that share one share its time."""

    def __init__(self, clock: Clock, count: int) -> None:
        self.processors = [Processor(clock) for _ in range(count)]
        self._free = [1.0] * count

    def place(self, share: float) -> int | None:
        """Index of the fullest GPU that has room: what Ray packs together stays together."""
        fitting = [index for index, free in enumerate(self._free) if free >= share - 1e-9]
        if not fitting:
            return None
        chosen = min(fitting, key=lambda index: self._free[index])
        self._free[chosen] -= share
        return chosen

    def give_back(self, index: int, share: float) -> None:
        self._free[index] += share

    @property
    def used(self) -> float:
        """GPUs taken, in whole ones and parts."""
        return len(self._free) - sum(self._free)


class Deployment:
    """Replicas behind a router and an autoscaler.

    Args:
        make: a new replica on the processor that it was given.
        gpus: where replicas are placed; without, each has whatever ``make`` gives it.
    """

    def __init__(
        self,
        clock: Clock,
        name: str,
        make: Callable[[Processor | None], Any],
        scaling: Scaling,
        chance: random.Random,
        gpus: Gpus | None = None,
        callers: Callable[[], int] = lambda: 1,
    ) -> None:
        self.clock, self.name, self.make, self.scaling = clock, name, make, scaling
        self.gpus, self.chance, self.callers = gpus, chance, callers
        self.replicas: list[Any] = []
        self.starting = 0
        self.refused = 0
        self.pending: deque[tuple[Callable[[], None], Any]] = deque()
        self.replica_seconds, self.gpu_seconds = 0.0, 0.0
        self._draining: list[Any] = []
        self._place: dict[int, int] = {}
        self._seen: deque[float] = deque(maxlen=max(1, round(_LOOK_BACK_S / _CONTROL_S)))
        self._wanted_since: tuple[int, float] | None = None
        self.target = scaling.min_replicas
        for _ in range(scaling.min_replicas):
            self._begin(0.0)
        clock.after(_CONTROL_S, self._control)

    # ---- requests -----------------------------------------------------------------------------------------------

    def ask(self, answered: Callable[[], None], refused: Callable[[], None], what: Any = None) -> None:
        """One request, which is about ``what``; ``refused`` when the callers' queues are full."""
        replica = self._choose()
        if replica is not None:
            self._send(replica, answered, what)
        elif self.scaling.max_queued >= 0 and len(self.pending) >= self.scaling.max_queued * max(1, self.callers()):
            self.refused += 1
            refused()
        else:
            self.pending.append((answered, what))

    def _choose(self) -> Any:
        """The emptier of two at random, as Serve's router does; any that has room when neither has."""
        there, most = self.replicas, self.scaling.max_ongoing
        if not there:
            return None
        if len(there) == 1:
            return there[0] if there[0].ongoing < most else None
        number, chance = len(there), self.chance.random
        first, second = there[int(chance() * number)], there[int(chance() * number)]
        best = first if first.ongoing <= second.ongoing else second
        if best.ongoing < most:
            return best
        return next((replica for replica in there if replica.ongoing < most), None)

    def _send(self, replica: Any, answered: Callable[[], None], what: Any) -> None:
        def done() -> None:
            answered()
            if self.pending and replica in self.replicas and replica.ongoing < self.scaling.max_ongoing:
                self._send(replica, *self.pending.popleft())
            elif self._draining and replica in self._draining and replica.ongoing == 0:
                self._end(replica)

        replica.take(done, what)

    @property
    def ongoing(self) -> int:
        """Requests in replicas and before them."""
        return sum(replica.ongoing for replica in self.replicas) + len(self.pending)

    # ---- scaling ------------------------------------------------------------------------------------------------

    def _begin(self, delay_s: float) -> bool:
        place = None
        if self.gpus is not None and self.scaling.gpu_share:
            place = self.gpus.place(self.scaling.gpu_share)
            if place is None:
                return False
        self.starting += 1
        if delay_s:
            self.clock.after(delay_s, self._ready, place)
        else:
            self._ready(place)
        return True

    def _ready(self, place: int | None) -> None:
        self.starting -= 1
        processor = self.gpus.processors[place] if self.gpus is not None and place is not None else None
        replica = self.make(processor)
        if place is not None:
            self._place[id(replica)] = place
        self.replicas.append(replica)
        while self.pending and replica.ongoing < self.scaling.max_ongoing:
            self._send(replica, *self.pending.popleft())

    def _end(self, replica: Any) -> None:
        self._draining.remove(replica)
        place = self._place.pop(id(replica), None)
        if place is not None and self.gpus is not None:
            self.gpus.give_back(place, self.scaling.gpu_share)

    def _control(self) -> None:
        """``replica_queue_length_autoscaling_policy`` with Serve's delays."""
        scaling, now = self.scaling, self.clock.now
        have = len(self.replicas) + self.starting
        self.replica_seconds += have * _CONTROL_S
        self.gpu_seconds += (have + len(self._draining)) * scaling.gpu_share * _CONTROL_S
        self._seen.append(self.ongoing)
        wanted = math.ceil(sum(self._seen) / len(self._seen) / scaling.target_ongoing)
        wanted = min(max(wanted, scaling.min_replicas), scaling.max_replicas)
        direction = (wanted > self.target) - (wanted < self.target)
        if direction == 0:
            self._wanted_since = None
        elif self._wanted_since is None or self._wanted_since[0] != direction:
            self._wanted_since = (direction, now)
        if direction and self._wanted_since is not None:
            delay = scaling.upscale_delay_s if direction > 0 else scaling.downscale_delay_s
            if now - self._wanted_since[1] >= delay - 1e-6:
                self.target, self._wanted_since = wanted, None
        while have < self.target and self._begin(scaling.start_s):
            have += 1
        while len(self.replicas) > max(1, self.target):
            replica = min(self.replicas, key=lambda each: each.ongoing)
            self.replicas.remove(replica)
            replica.closed = True  # it begins nothing of its own accord
            self._draining.append(replica)
            if replica.ongoing == 0:
                self._end(replica)
        self.clock.after(_CONTROL_S, self._control)
