"""The simulator against queueing theory, and against what the code that it models promises."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.graph_simulation import (
    Admitted,
    Batching,
    Generating,
    Graph,
    IngressTimes,
    Service,
    Station,
    feed,
    feed_clients,
    poisson,
)
from benchmarks.load import quantile
from benchmarks.simulation import (
    BatchReplica,
    BatchTimes,
    Clock,
    Deployment,
    EngineReplica,
    Gpus,
    Job,
    Processor,
    Scaling,
)


def sojourn(
    start: Callable[[Clock, float, Callable[[], None]], None], rate: float, service: Callable[[], float]
) -> float:
    """Mean time in a system to which 60,000 customers come by chance."""
    clock, chance = Clock(), random.Random(1)
    spent: list[float] = []
    arrivals = poisson(chance, lambda _: rate, 60_000 / rate)

    def come() -> None:
        begun = clock.now
        start(clock, service(), lambda: spent.append(clock.now - begun))
        plan()

    def plan() -> None:
        if (moment := next(arrivals, None)) is not None:
            clock.after(moment - clock.now, come)

    plan()
    clock.run(math.inf)
    assert len(spent) > 59_000
    return sum(spent) / len(spent)


def station(workers: int) -> Callable[[Clock, float, Callable[[], None]], None]:
    made: list[Station] = []

    def start(clock: Clock, seconds: float, done: Callable[[], None]) -> None:
        if not made:
            made.append(Station(clock, workers, None))
        made[0].do(seconds, done)

    return start


def test_one_worker_is_m_m_1() -> None:
    chance = random.Random(2)
    measured = sojourn(station(1), 0.7, lambda: chance.expovariate(1.0))
    assert measured == pytest.approx(1 / (1 - 0.7), rel=0.05)


def test_one_worker_with_even_work_is_m_d_1() -> None:
    # Pollaczek and Khinchine: the wait is half of M/M/1's
    assert sojourn(station(1), 0.8, lambda: 1.0) == pytest.approx(1 + 0.8 / (2 * 0.2), rel=0.05)


def test_four_workers_with_even_work_are_m_d_4() -> None:
    load, workers = 3.4, 4
    chance_all_busy = (load**workers / math.factorial(workers)) / (
        (1 - load / workers) * sum(load**n / math.factorial(n) for n in range(workers)) + load**workers / 24
    )
    m_m_4 = chance_all_busy / (workers - load)
    # Cosmetatos' approximation of M/D/c, good to a few per cent
    use = load / workers
    m_d_4 = m_m_4 / 2 * (1 + (1 - use) * (workers - 1) * (math.sqrt(4 + 5 * workers) - 2) / (16 * use * workers))
    assert sojourn(station(4), load, lambda: 1.0) - 1 == pytest.approx(m_d_4, rel=0.08)


def test_a_shared_processor_is_processor_sharing() -> None:
    chance, made = random.Random(3), dict[str, Processor]()

    def start(clock: Clock, seconds: float, done: Callable[[], None]) -> None:
        Job(made.setdefault("one", Processor(clock)), seconds, 1.0, done)

    # M/G/1-PS: only the mean of the work matters, here of a skewed one
    measured = sojourn(start, 0.6, lambda: 0.5 if chance.random() < 0.9 else 5.5)
    assert measured == pytest.approx(1 / (1 - 0.6), rel=0.05)


def test_two_threads_each_on_two_cores_do_not_slow_each_other() -> None:
    clock, ends = Clock(), list[float]()
    cores = Processor(clock, 2.0)
    for width, seconds in ((1.0, 1.0), (1.0, 2.0)):
        Job(cores, seconds, width, lambda: ends.append(clock.now))
    clock.run(10.0)
    assert ends == pytest.approx([1.0, 2.0])
    Job(cores, 1.0, 2.0, lambda: ends.append(clock.now))
    Job(cores, 1.0, 2.0, lambda: ends.append(clock.now))
    clock.run(20.0)
    assert ends[2:] == pytest.approx([12.0, 12.0])
    assert cores.busy == pytest.approx(1 + 2 + 4)


def test_a_batch_waits_for_company_and_for_the_model() -> None:
    clock = Clock()
    replica = BatchReplica(clock, lambda size: 1.0 + size, size=4, wait_s=0.5)
    ends: dict[int, float] = {}

    def send(number: int) -> None:
        replica.take(lambda: ends.setdefault(number, clock.now))

    send(0)
    clock.after(0.4, send, 1)  # in time
    for number in range(2, 8):
        clock.after(0.6, send, number)  # the model computes: six wait, of whom four go together
    clock.run(100.0)
    assert ends[0] == ends[1] == pytest.approx(0.5 + 3.0)
    assert [ends[number] for number in range(2, 6)] == pytest.approx([3.5 + 5.0] * 4)  # full: nobody waits
    assert [ends[6], ends[7]] == pytest.approx([8.5 + 0.5 + 3.0] * 2)
    assert (replica.batches, replica.pictures, replica.ongoing) == (3, 8, 0)
    assert replica.busy == pytest.approx(3.0 + 5.0 + 3.0)


def test_batches_are_never_larger_than_may_be_and_nobody_is_lost() -> None:
    clock, chance, sizes = Clock(), random.Random(4), list[int]()

    def times(size: int) -> float:
        sizes.append(size)
        return 0.2 + 0.01 * size

    replica = BatchReplica(clock, times, size=8, wait_s=0.005)
    order: list[int] = []
    for number, moment in enumerate(poisson(chance, lambda _: 25.0, 40.0)):
        clock.after(moment, replica.take, lambda number=number: order.append(number))
    clock.run(1000.0)
    assert order == sorted(order) and len(order) == sum(sizes) == replica.pictures
    assert max(sizes) == 8
    assert replica.ongoing == 0


def test_requests_of_an_engine_advance_together() -> None:
    clock, ends = Clock(), list[float]()
    engine = EngineReplica(clock, lambda running: 0.01 + 0.01 * running, lambda: 10.0, size=2)
    for _ in range(3):
        engine.take(lambda: ends.append(clock.now))
    clock.run(10.0)
    assert ends == pytest.approx([0.3, 0.3, 0.3 + 0.2])  # the third waits for a place, and is then alone


def test_an_engine_whose_requests_all_end_at_once_is_one_user_of_its_processor() -> None:
    clock, ends = Clock(), list[float]()
    engine = EngineReplica(clock, lambda _: 0.1, lambda: 10.0, size=1, processor=Processor(clock))
    for _ in range(2):
        engine.take(lambda: ends.append(clock.now))
    clock.run(10.0)
    assert ends == pytest.approx([1.0, 2.0])


def test_an_engine_on_a_busy_processor_is_as_much_slower() -> None:
    clock, ends = Clock(), list[float]()
    gpu = Processor(clock)
    engine = EngineReplica(clock, lambda _: 0.1, lambda: 10.0, size=4, processor=gpu)
    engine.take(lambda: ends.append(clock.now))
    clock.after(0.5, lambda: Job(gpu, 0.25, 1.0, lambda: ends.append(clock.now)))
    clock.run(10.0)
    assert ends == pytest.approx([1.0, 1.25])  # half speed from 0.5 to 1.0


def test_times_between_measured_sizes_are_on_the_line() -> None:
    times = BatchTimes((1, 4, 8), (1.0, 2.5, 4.1))
    assert [times(size) for size in (1, 2, 4, 6, 8, 10)] == pytest.approx([1.0, 1.5, 2.5, 3.3, 4.1, 4.9])


def deployment(clock: Clock, **settings: Any) -> Deployment:
    scaling = Scaling(**{"target_ongoing": 2.0, "max_ongoing": 4} | settings)
    return Deployment(clock, "model", lambda _: BatchReplica(clock, lambda _: 1.0, 1, 0.0), scaling, random.Random(5))


def test_a_bounded_queue_refuses_and_answers_the_rest() -> None:
    clock = Clock()
    model, answered, refused = deployment(clock, max_queued=3), list[int](), list[int]()
    for number in range(10):
        model.ask(lambda number=number: answered.append(number), lambda number=number: refused.append(number))
    assert refused == [7, 8, 9]
    clock.run(60.0)
    assert answered == list(range(7))


def test_replicas_come_after_the_delay_and_the_start_and_go_again() -> None:
    clock = Clock()
    model = deployment(clock, max_replicas=3, upscale_delay_s=10.0, downscale_delay_s=20.0, start_s=5.0)
    for _ in range(60):
        model.ask(lambda: None, lambda: None)
    clock.run(10.5)
    assert (len(model.replicas), model.starting) == (1, 0)
    clock.run(15.5)
    assert (len(model.replicas), model.starting) == (1, 2)
    clock.run(17.0)
    assert len(model.replicas) == 3
    clock.run(200.0)
    assert (len(model.replicas), model.ongoing) == (1, 0)


def test_a_replica_needs_room_on_a_gpu() -> None:
    clock = Clock()
    gpus = Gpus(clock, 1)
    scaling = Scaling(min_replicas=3, max_replicas=3, gpu_share=0.5)
    made: list[Processor | None] = []

    def make(processor: Processor | None) -> BatchReplica:
        made.append(processor)
        return BatchReplica(clock, lambda _: 1.0, 1, 0.0, processor)

    model = Deployment(clock, "model", make, scaling, random.Random(6), gpus)
    clock.run(5.0)
    assert len(model.replicas) == 2 and made == [gpus.processors[0]] * 2
    assert gpus.used == pytest.approx(1.0)


def small_service(**settings: Any) -> Service:
    alone = Scaling(max_ongoing=64, max_queued=64)
    return Service(
        **{
            "ingress_times": IngressTimes(proxy_s=0.001, loop_s=0.002, decode_s=0.01),
            "admitted": Admitted(),
            "detector": Batching(BatchTimes((1, 8), (0.05, 0.2)), 8, 0.005),
            "captioner": Batching(BatchTimes((1, 8), (0.1, 0.4)), 8, 0.005),
            "tagger": Generating(lambda running: 0.004 + 0.0005 * running, 16, 20.0),
            "scaling": dict.fromkeys(("ingress", "detector", "captioner", "tagger"), alone),
        }
        | settings
    )


def test_one_client_sees_the_sum_of_the_parts() -> None:
    graph = Graph(small_service())
    feed_clients(graph, 1)
    graph.clock.run(30.0)
    spent = [ended - arrived for arrived, ended, _, how in graph.outcomes if how == "answered"]
    alone = 0.001 + 0.002 + 0.01 + (0.005 + 0.1) + 20 * 0.0045
    assert spent == pytest.approx([alone] * len(spent)) and len(spent) == int(30 / alone)


def test_clients_and_answers_obey_littles_law_and_the_slowest_part_is_the_bound() -> None:
    graph = Graph(small_service())
    feed_clients(graph, 16)
    graph.clock.run(120.0)
    spent = [ended - arrived for arrived, ended, *_ in graph.outcomes]
    rate = len(spent) / 120
    assert rate * sum(spent) / len(spent) == pytest.approx(16, rel=0.02)
    assert 0.9 * 8 / 0.4 <= rate <= 8 / 0.4  # the captioner's full batches
    assert graph.busy("captioner") / 120 > 0.95


def test_on_two_shared_cores_the_work_is_the_bound() -> None:
    shared = small_service(cores=1.0)
    graph = Graph(shared)
    feed_clients(graph, 16)
    graph.clock.run(120.0)
    assert graph.processor is not None
    assert graph.processor.busy == pytest.approx(120.0, rel=0.01)
    assert len(graph.outcomes) / 120 < 8 / 0.4 / 1.5


def test_senders_who_wait_are_refused_and_those_who_can_wait_are_not() -> None:
    graph = Graph(small_service(admitted=Admitted(max_in_flight=16, max_waiting=8, max_wait_s=1.0)))
    feed(graph, poisson(random.Random(7), lambda now: 60.0 if now < 20 else 1.0, 60.0), deferred_share=0.5)
    graph.clock.run(600.0)
    how: dict[tuple[bool, str], int] = {}
    for _, _, deferred, outcome in graph.outcomes:
        how[deferred, outcome] = how.get((deferred, outcome), 0) + 1
    assert how[False, "refused"] > 100
    assert (True, "refused") not in how
    assert how[True, "answered"] > 500 and not graph.deferred
    late = max(ended - arrived for arrived, ended, deferred, _ in graph.outcomes if deferred)
    assert late > 10  # they wait for room


def test_beyond_the_room_on_disk_those_who_can_wait_are_refused_and_no_further() -> None:
    def spike(max_deferred: int) -> tuple[Graph, list[str], int]:
        graph, most = Graph(small_service(admitted=Admitted(max_deferred=max_deferred))), [0]
        feed(graph, poisson(random.Random(7), lambda now: 60.0 if now < 20 else 1.0, 60.0), deferred_share=1.0)

        def look() -> None:
            working = sum(replica.working for replica in graph.ingress.replicas)
            most[0] = max(most[0], len(graph.deferred) + working)
            assert graph.kept >= len(graph.deferred) + working
            graph.clock.after(0.1, look)

        look()
        graph.clock.run(300.0)
        return graph, [how for *_, how in graph.outcomes], most[0]

    graph, how, most = spike(100)
    assert most == 100 and how.count("refused") > 100
    assert how.count("answered") == graph.arrived - how.count("refused") and graph.kept == 0
    graph, how, most = spike(100_000)
    assert most > 100 and set(how) == {"answered"}
    # without a queue everybody waits for an answer
    graph, how, most = spike(0)
    assert most == 0 and {deferred for *_, deferred, _ in graph.outcomes} == {False} and how.count("answered") > 100


def test_those_who_can_wait_fill_the_service_when_nobody_else_asks_and_no_further() -> None:
    def most(deferred_in_work: int) -> int:
        admitted = Admitted(max_in_flight=64, target_s=30.0, deferred_in_work=deferred_in_work)
        graph = Graph(small_service(admitted=admitted))
        feed(graph, poisson(random.Random(7), lambda _: 50.0, 60.0), deferred_share=1.0)
        graph.clock.run(60.0)
        return max(replica.working for replica in graph.ingress.replicas)

    assert most(8) == 8
    assert 20 < most(40) <= 40


def test_the_same_seed_is_the_same_run() -> None:
    def run(seed: int) -> list[tuple[float, float, bool, str]]:
        graph = Graph(small_service(), seed)
        feed(graph, poisson(random.Random(seed), lambda _: 10.0, 20.0), 0.3)
        graph.clock.run(60.0)
        return graph.outcomes

    assert run(1) == run(1) != run(2)


def test_quantiles_are_values() -> None:
    assert [quantile([3.0, 1.0, 2.0, 4.0], share) for share in (0.0, 0.25, 0.5, 0.99)] == [1.0, 1.0, 2.0, 4.0]
    assert math.isnan(quantile([], 0.5))
