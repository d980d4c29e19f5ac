"""The served graph as a discrete-event model: where pictures wait, and for how long.

    client -> Ingress (admission, decoding) -> Detector ------------------> answer
                                            \\-> Captioner -> Tagger -----/

In: how long each part works (``Service``), how many of each there are and how they may grow (``Scaling``), and when
pictures arrive. Out: when each was answered or refused, how busy each part was, and how long the queues were.

Modelled as the code does it: the admission's bounded queue, the bounded number of pictures whose senders can wait,
decoding threads, the order of the stages. How many may be in work, and how many of those whose senders can wait,
``app.admission`` itself says. What replicas and processors are is ``benchmarks.simulation``; figures come from
``benchmarks.scale``.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from app.admission import limits
from benchmarks.simulation import BatchReplica, Clock, Deployment, EngineReplica, Gpus, Processor, Scaling, work

#: ``app.deferred``: how often an ingress looks for pictures that wait, and how often one that has found none.
DEFERRED_LOOK_S, _DEFERRED_IDLE_S = 0.2, 1.0


# ------------------------------------------------------------------------------------------------------------- ingress


@dataclass(frozen=True)
class IngressTimes:
    """What an ingress replica and the proxy before it work for one picture, seconds of a core."""

    proxy_s: float
    loop_s: float
    """On the event loop: one thread."""
    decode_s: float
    """On the decoding threads."""
    decode_spread: float = 0.0
    """Standard deviation of the logarithm: pictures differ in size."""
    decode_threads: int = 2
    beside_s: float = 0.0
    """In other processes: what replicas work beside their models, and clients on the same machine."""
    hops_s: tuple[float, ...] = (0.0,)
    """Time that passes without work on the way from process to process: one of these for each picture, half of it
    before the models and half after. Unequal ones tear batches apart, as they do in life."""


@dataclass(frozen=True)
class Admitted:
    """``app.config.Limits``, and what ``app.store.settings`` says of those who can wait."""

    max_in_flight: int = 32
    max_waiting: int = 64
    max_wait_s: float = 4.0
    target_s: float = 30.0
    deferred_in_work: int = 8
    max_deferred: int = 100_000


@dataclass
class Picture:
    """One picture on its way."""

    arrived: float
    deferred: bool = False
    deadline: float = math.inf
    answered: Callable[[Picture, str], None] | None = None
    failed: bool = False
    """A stage gave no answer."""


class Station:
    """A number of workers with a queue before them, on a processor that they share with others or on one of their
    own.
    """

    def __init__(self, clock: Clock, workers: int, processor: Processor | None) -> None:
        self.clock, self.workers, self.processor = clock, workers, processor
        self.active, self.busy = 0, 0.0
        self._queue: deque[tuple[float, Callable[[], None]]] = deque()

    def do(self, seconds: float, done: Callable[[], None]) -> None:
        if self.active < self.workers:
            self._start(seconds, done)
        else:
            self._queue.append((seconds, done))

    def _start(self, seconds: float, done: Callable[[], None]) -> None:
        self.active += 1
        self.busy += seconds

        def end() -> None:
            self.active -= 1
            if self._queue:
                self._start(*self._queue.popleft())
            done()

        work(self.clock, self.processor, seconds, 1.0, end)


class IngressReplica:
    """Admission as ``app.admission`` has it, an event loop, decoding threads, and the graph behind them."""

    def __init__(self, graph: Graph, processor: Processor | None) -> None:
        self.graph, self.clock = graph, graph.clock
        self.limits, self.times = graph.admitted, graph.ingress_times
        self.loop = Station(self.clock, 1, processor)
        self.threads = Station(self.clock, self.times.decode_threads, processor)
        self.ongoing, self.busy, self.closed = 0, 0.0, False
        self.place_s = {False: 0.0, True: 0.0}
        """Seconds for which places were taken so far, by whether their senders can wait."""
        self.in_work, self.waiting, self.working = 0, deque[tuple[Picture, Callable[[], None]]](), 0
        self.all, self.slipping = limits(self.limits.max_in_flight, self.limits.target_s)
        self.clock.after(DEFERRED_LOOK_S, self._look)

    def take(self, answered: Callable[[], None], what: Any = None) -> None:
        """A request: a picture whose sender waits for the answer, or one that is only to be taken in."""
        picture: Picture = what
        self.ongoing += 1

        def left() -> None:
            self.ongoing -= 1
            answered()

        def taken_in() -> None:
            if self.graph.kept >= self.limits.max_deferred:
                self._refuse(picture, left)
                return
            self.graph.kept += 1
            self.graph.deferred.append(picture)  # on disk: whoever has room works on it
            left()

        if picture.deferred:
            self.loop.do(self.times.loop_s, taken_in)
            return

        if self.in_work < self.all.places and not self.waiting:
            self._work(picture, left)
        elif len(self.waiting) >= self.limits.max_waiting:
            self._refuse(picture, left)
        else:
            self.waiting.append((picture, left))
            self.clock.after(self.limits.max_wait_s, self._give_up, picture, left)

    def _give_up(self, picture: Picture, left: Callable[[], None]) -> None:
        if any(waiting is picture for waiting, _ in self.waiting):
            self.waiting.remove((picture, left))
            self._refuse(picture, left)

    def _refuse(self, picture: Picture, left: Callable[[], None]) -> None:
        self.graph.end(picture, "refused")
        left()

    def _look(self) -> None:
        """``app.deferred``: pictures that wait, into places that nobody waits for."""
        if self.closed:
            return
        queue = self.graph.deferred
        most = min(self.limits.deferred_in_work, self.slipping.places) - self.working
        places = 0 if self.waiting else max(0, min(most, self.all.places - self.in_work))
        taken = min(places, len(queue))
        for _ in range(taken):
            self.working += 1
            self._work(queue.popleft(), self._worked)
        self.clock.after(_DEFERRED_IDLE_S if places and not taken else DEFERRED_LOOK_S, self._look)

    def _worked(self) -> None:
        self.working -= 1

    def _work(self, picture: Picture, left: Callable[[], None]) -> None:
        self.in_work += 1
        began, times = self.clock.now, self.times
        hops_s = self.graph.chance.choice(times.hops_s) if len(times.hops_s) > 1 else times.hops_s[0]

        def decode() -> None:
            self.threads.do(self.graph.decode_seconds(), beside if times.beside_s else ask)

        def beside() -> None:
            work(self.clock, self.loop.processor, times.beside_s, 1.0, ask)

        def ask() -> None:
            self.clock.after(hops_s / 2, self.graph.analyse, picture, join)

        def join() -> None:
            seconds, now = self.clock.now - began, self.clock.now
            self.all.observe(seconds, self.in_work, now)
            self.slipping.observe(seconds, self.working, now)
            self.place_s[picture.deferred] += seconds
            self.in_work -= 1
            while self.waiting and self.in_work < self.all.places:
                self._work(*self.waiting.popleft())
            self.clock.after(hops_s / 2, self.graph.end, picture, "answered")
            left()

        self.loop.do(times.loop_s, decode)


# --------------------------------------------------------------------------------------------------------------- graph


@dataclass(frozen=True)
class Batching:
    """How a picture model's replica batches, and what a batch costs."""

    times: Callable[[int], float]
    size: int
    wait_s: float
    width: float = 1.0


@dataclass(frozen=True)
class Generating:
    """How the tagger's engine works: seconds of a step by the number of requests in it, tokens of an answer."""

    step_s: Callable[[int], float]
    size: int
    tokens: float
    tokens_spread: float = 0.0
    width: float = 1.0


@dataclass(frozen=True)
class Service:
    """A whole deployment of the graph."""

    ingress_times: IngressTimes
    admitted: Admitted
    detector: Batching
    captioner: Batching
    tagger: Generating
    scaling: dict[str, Scaling]
    """Of ``ingress``, ``detector``, ``captioner``, ``tagger``."""
    gpus: int = 0
    """0: every replica has a processor of its own, unless ``cores`` says that all share some."""
    cores: float = 0.0
    """Above 0: one machine's, shared by everything."""
    proxies: int = 1
    request_timeout_s: float = 60.0


class Graph:
    """The service at work in simulated time."""

    def __init__(self, service: Service, seed: int = 0) -> None:
        self.service, self.clock, self.chance = service, Clock(), random.Random(seed)
        self.ingress_times, self.admitted = service.ingress_times, service.admitted
        shared = Processor(self.clock, service.cores) if service.cores else None
        self.processor = shared
        gpus = Gpus(self.clock, service.gpus) if service.gpus else None
        self.gpus = gpus
        self.arrived = 0
        self.deferred: deque[Picture] = deque()
        self.kept = 0
        """Pictures on disk: those that wait and those in work, which keep their places until they are answered."""
        self.outcomes: list[tuple[float, float, bool, str]] = []
        """(arrived, ended, deferred, how)."""
        self.samples: list[dict[str, float]] = []
        chance, clock = self.chance, self.clock

        def batching(kind: Batching) -> Callable[[Processor | None], Any]:
            return lambda processor: BatchReplica(
                clock, kind.times, kind.size, kind.wait_s, shared or processor, kind.width
            )

        def engine(processor: Processor | None) -> Any:
            kind = service.tagger
            spread = kind.tokens_spread
            tokens = (lambda: max(4.0, chance.gauss(kind.tokens, spread))) if spread else (lambda: kind.tokens)
            return EngineReplica(clock, kind.step_s, tokens, kind.size, shared or processor, kind.width)

        def deploy(name: str, make: Callable[[Processor | None], Any], on: Gpus | None) -> Deployment:
            return Deployment(clock, name, make, service.scaling[name], chance, on, lambda: len(self.ingress.replicas))

        self.ingress: Deployment
        self.ingress = Deployment(
            clock,
            "ingress",
            lambda _: IngressReplica(self, shared),
            service.scaling["ingress"],
            chance,
            callers=lambda: service.proxies,
        )
        self.detector = deploy("detector", batching(service.detector), gpus)
        self.captioner = deploy("captioner", batching(service.captioner), gpus)
        self.tagger = deploy("tagger", engine, gpus)
        self.proxies = [Station(clock, 1, shared) for _ in range(service.proxies)]
        # a lognormal with the mean that was measured
        spread = self.ingress_times.decode_spread
        self._decode_mu = math.log(max(1e-9, self.ingress_times.decode_s)) - spread**2 / 2

    def decode_seconds(self) -> float:
        """Of the next picture."""
        times = self.ingress_times
        if not times.decode_spread:
            return times.decode_s
        return self.chance.lognormvariate(self._decode_mu, times.decode_spread)

    @property
    def deployments(self) -> dict[str, Deployment]:
        return {one.name: one for one in (self.ingress, self.detector, self.captioner, self.tagger)}

    def arrive(self, deferred: bool = False, answered: Callable[[Picture, str], None] | None = None) -> None:
        """A picture comes in now."""
        self.arrived += 1
        deferred = deferred and self.admitted.max_deferred > 0  # without a queue everybody is answered at once
        picture = Picture(self.clock.now, deferred, self.clock.now + self.service.request_timeout_s, answered)
        proxy = self.proxies[0] if len(self.proxies) == 1 else self.chance.choice(self.proxies)
        proxy.do(self.ingress_times.proxy_s, lambda: self._route(picture))

    def _route(self, picture: Picture) -> None:
        self.ingress.ask(lambda: None, lambda: self.end(picture, "refused"), picture)

    def analyse(self, picture: Picture, done: Callable[[], None]) -> None:
        """Detector and captioner side by side, then the tagger."""
        parts = [2]

        def part() -> None:
            parts[0] -= 1
            if parts[0] == 0:
                done()

        def failed() -> None:
            picture.failed = True
            part()

        self.detector.ask(part, failed)
        self.captioner.ask(lambda: self.tagger.ask(part, failed), failed)

    def end(self, picture: Picture, how: str) -> None:
        """A picture has left the service."""
        if how == "answered" and picture.failed:
            if picture.deferred:  # it is tried again
                picture.failed = False
                self.clock.after(2.0, self.deferred.append, picture)
                return
            how = "partial"
        if how == "answered" and picture.deferred:
            self.kept -= 1
        if how == "answered" and not picture.deferred and self.clock.now > picture.deadline:
            how = "late"
        self.outcomes.append((picture.arrived, self.clock.now, picture.deferred, how))
        if picture.answered is not None:
            picture.answered(picture, how)

    @property
    def inside(self) -> int:
        """Pictures that have come and have not left."""
        return self.arrived - len(self.outcomes)

    # ---- what is seen -------------------------------------------------------------------------------------------

    def sample(self, every_s: float) -> None:
        """Note queues and replicas every so often, from now on."""
        row: dict[str, float] = {"t": self.clock.now, "deferred": float(len(self.deferred))}
        for name, deployment in self.deployments.items():
            row[name] = float(deployment.ongoing)
            row[f"{name}_replicas"] = float(len(deployment.replicas))
        self.samples.append(row)
        self.clock.after(every_s, self.sample, every_s)

    def busy(self, name: str) -> float:
        """Seconds that the replicas of a model have computed so far, all together."""
        return sum(replica.busy for replica in self.deployments[name].replicas)


def poisson(chance: random.Random, rate: Callable[[float], float], until_s: float) -> Iterator[float]:
    """Moments of arrival at a rate that may change (thinning by steps: the rate is taken as constant over a gap)."""
    now = 0.0
    while True:
        now += chance.expovariate(rate(now))
        if now >= until_s:
            return
        yield now


def feed(graph: Graph, moments: Iterator[float], deferred_share: float = 0.0) -> None:
    """Let pictures arrive at these moments, one scheduled by the one before."""

    def next_one(_: float = 0.0) -> None:
        graph.arrive(graph.chance.random() < deferred_share)
        plan()

    def plan() -> None:
        moment = next(moments, None)
        if moment is not None:
            graph.clock.after(max(0.0, moment - graph.clock.now), next_one)

    plan()


def feed_clients(graph: Graph, clients: int) -> None:
    """Clients that send the next picture as soon as they have an answer, from now on."""

    def send(_: Any = None, __: str = "") -> None:
        graph.arrive(answered=send)

    for _ in range(clients):
        send()
