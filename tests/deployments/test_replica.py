"""Batches: who is computed together, who waits at the door, and what becomes of those who go away."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deployments.checkpoints import resolve
from deployments.detector import DetectorModel
from deployments.pixels import ViewMismatch
from deployments.replica import DeadlineExceeded, Door, ModelFailed, Replica, alive
from deployments.views import ViewSpec
from tests.train.small_models import small_detector

pytestmark = pytest.mark.anyio

SPEC = ViewSpec(size_px=16)
#: As large, and shows another part of the picture.
OTHER = ViewSpec(size_px=16, views=("centre",))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def picture(value: int) -> np.ndarray:
    return np.full(SPEC.shape, value, dtype=np.uint8)


async def visit(door: Door, log: list[str], name: str, leave: asyncio.Event) -> None:
    async with door:
        log.append(name)
        await leave.wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_those_who_come_while_the_door_is_open_enter_together() -> None:
    door, log, leave = Door(size=2), [], asyncio.Event()
    visits = [asyncio.create_task(visit(door, log, name, leave)) for name in "abc"]
    await settle()
    assert log == ["a", "b"]
    leave.set()
    await asyncio.gather(*visits)
    assert log == ["a", "b", "c"]


async def test_nobody_enters_a_batch_that_has_begun_and_those_who_wait_enter_together_after_it() -> None:
    door, log, first, second = Door(size=3), [], asyncio.Event(), asyncio.Event()
    running = [asyncio.create_task(visit(door, log, "a", first))]
    await settle()
    door.shut()
    running += [asyncio.create_task(visit(door, log, name, second)) for name in "bcde"]
    await settle()
    assert log == ["a"]
    first.set()
    await settle()
    assert log == ["a", "b", "c", "d"]
    second.set()
    await asyncio.gather(*running)
    assert log[-1] == "e"


async def test_one_who_goes_away_while_waiting_leaves_the_place_to_the_next() -> None:
    door, log, first, second = Door(size=1), [], asyncio.Event(), asyncio.Event()
    running = [asyncio.create_task(visit(door, log, "a", first))]
    await settle()
    gone = asyncio.create_task(visit(door, log, "b", second))
    running.append(asyncio.create_task(visit(door, log, "c", second)))
    await settle()
    gone.cancel()
    first.set()
    await settle()
    assert log == ["a", "c"]
    second.set()
    await asyncio.gather(*running)
    assert gone.cancelled()


async def test_one_who_is_let_in_at_the_moment_of_going_away_gives_the_place_back() -> None:
    door, log, first, second = Door(size=1), [], asyncio.Event(), asyncio.Event()
    running = [asyncio.create_task(visit(door, log, "a", first))]
    await settle()
    gone = asyncio.create_task(visit(door, log, "b", second))
    await settle()
    first.set()
    await asyncio.sleep(0)  # "a" leaves in this step and lets "b" in, who is cancelled before running again
    gone.cancel()
    await settle()
    running.append(asyncio.create_task(visit(door, log, "c", second)))
    second.set()
    await asyncio.wait_for(asyncio.gather(*running), 5)
    assert log[-1] == "c"


def loaded(views: ViewSpec) -> Any:
    return SimpleNamespace(views=views, checkpoint=SimpleNamespace(revision="r1"), in_parts=False)


class Slow(Replica[Any]):
    """A replica whose model tells the sizes of its batches and takes a while for each."""

    stage = "detector"

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._model = loaded(SPEC)

    def answer(self, model: Any, views: np.ndarray) -> list[dict[str, Any]]:
        self.sizes.append(len(views))
        time.sleep(0.1)
        return [{"value": int(view.flat[0])} for view in views]


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> Slow:
    """Serve's own batching, in this process: its queue asks a replica's context for one number only."""
    from ray import serve

    context = SimpleNamespace(_deployment_config=SimpleNamespace(max_ongoing_requests=100))
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    # the queue belongs to the class and to the event loop that first used it: each test has a class of its own
    decorated = serve.batch(max_batch_size=8, batch_wait_timeout_s=0.0)(Replica._batch.__wrapped__)  # type: ignore[attr-defined]
    return type("OwnQueue", (Slow,), {"_batch": decorated})()


def hold(replica: Slow) -> tuple[asyncio.Event, threading.Event]:
    """Holds its batches up: what is set when one is being computed, and what to set for them to go on."""
    computing, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def answer(model: Any, views: np.ndarray) -> list[dict[str, Any]]:
        loop.call_soon_threadsafe(computing.set)
        assert go_on.wait(10)
        return Slow.answer(replica, model, views)

    replica.answer = answer  # type: ignore[method-assign]
    return computing, go_on


async def test_pictures_that_come_one_by_one_during_a_batch_are_computed_together_after_it(replica: Slow) -> None:
    computing, all_have_come = hold(replica)
    coming = [asyncio.create_task(replica.batched(picture(0), SPEC, time.time() + 60))]
    await asyncio.wait_for(computing.wait(), 10)
    for value in range(1, 7):
        coming.append(asyncio.create_task(replica.batched(picture(value), SPEC, time.time() + 60)))
        await settle()
    all_have_come.set()
    assert [answer["value"] for answer in await asyncio.gather(*coming)] == list(range(7))
    assert replica.sizes == [1, 6]


async def test_parts_of_a_batch_are_computed_beside_each_other_and_answered_in_order(replica: Slow) -> None:
    replica._parts, replica._most_parts = ThreadPoolExecutor(3), 3
    replica.model.in_parts = True
    together = threading.Barrier(3, timeout=10)  # broken unless three are at it at a time

    def answer(model: Any, views: np.ndarray) -> list[dict[str, Any]]:
        together.wait()
        return Slow.answer(replica, model, views)

    replica.answer = answer  # type: ignore[method-assign]
    answers = await asyncio.gather(*(replica.batched(picture(value), SPEC, time.time() + 60) for value in range(8)))
    assert [answer["value"] for answer in answers] == list(range(8))
    assert sorted(replica.sizes) == [2, 3, 3]


async def test_single_pictures_have_all_threads_though_the_first_batch_was_computed_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, seen = torch.get_num_threads(), set()

    def answer(model: Any, views: np.ndarray) -> list[dict[str, Any]]:
        seen.add((threading.current_thread().name.partition("_")[0], torch.get_num_threads()))
        return [{} for _ in views]

    try:
        torch.set_num_threads(3)
        replica = Slow()
        replica.model.in_parts = True
        monkeypatch.setattr(replica, "answer", answer)
        for pictures in (3, 1):
            await replica.compute(replica.answers, replica.model, np.stack([picture(0)] * pictures))
        assert seen == {("part", 1), ("model", 3)}
    finally:
        torch.set_num_threads(before)


async def test_a_batch_of_one_and_a_model_that_gains_nothing_are_computed_whole(replica: Slow) -> None:
    replica._parts, replica._most_parts = ThreadPoolExecutor(3), 3
    await asyncio.gather(*(replica.batched(picture(value), SPEC, time.time() + 60) for value in range(4)))
    replica.model.in_parts = True
    await replica.batched(picture(1), SPEC, time.time() + 60)
    assert replica.sizes == [4, 1]


async def test_a_batch_is_never_larger_than_the_door(replica: Slow) -> None:
    await asyncio.gather(*(replica.batched(picture(value), SPEC, time.time() + 60) for value in range(20)))
    assert replica.sizes == [8, 8, 4]


async def test_a_picture_whose_time_is_over_is_refused_and_the_others_answered(replica: Slow) -> None:
    late, good = await asyncio.gather(
        replica.batched(picture(1), SPEC, time.time() - 1),
        replica.batched(picture(2), SPEC, time.time() + 60),
        return_exceptions=True,
    )
    assert isinstance(late, DeadlineExceeded)
    assert good == {"value": 2}
    assert replica.sizes == [1]


async def test_views_of_another_shape_or_making_are_refused(replica: Slow) -> None:
    with pytest.raises(ViewMismatch):
        await replica.batched(np.zeros((1, 4, 4, 3), np.uint8), SPEC, time.time() + 60)
    with pytest.raises(ViewMismatch):
        await replica.batched(picture(1), OTHER, time.time() + 60)


async def test_views_made_for_the_revision_before_are_refused_in_the_batch(replica: Slow) -> None:
    computing, exchanged = hold(replica)
    first = asyncio.create_task(replica.batched(picture(1), SPEC, time.time() + 60))
    await asyncio.wait_for(computing.wait(), 10)
    waiting = asyncio.create_task(replica.batched(picture(2), SPEC, time.time() + 60))  # at the door
    await settle()
    replica._model = loaded(OTHER)
    exchanged.set()
    assert (await first)["value"] == 1
    with pytest.raises(ViewMismatch, match="another revision has come"):
        await waiting


async def test_what_a_model_raises_is_logged_here_and_named_there(replica: Slow, caplog: Any) -> None:
    class OfALibrary(Exception):
        """Its class could not be imported where the answer is waited for."""

    def fail(*_: Any) -> Any:
        raise OfALibrary("out of memory")

    replica.answer = fail  # type: ignore[method-assign]
    with pytest.raises(ModelFailed, match=r"^OfALibrary$") as raised:
        await replica.batched(picture(1), SPEC, time.time() + 60)
    assert raised.value.__cause__ is None and "out of memory" in caplog.text
    assert pickle.loads(pickle.dumps(raised.value)).args == ("OfALibrary",)
    del replica.answer
    assert await replica.batched(picture(2), SPEC, time.time() + 60) == {"value": 2}


async def test_positions_of_those_who_have_time_left() -> None:
    now = time.time()
    assert alive([now + 10, now - 1, now + 10]) == [0, 2]


def test_parts_that_are_computed_beside_each_other_have_the_outputs_of_the_whole(tmp_path: Path) -> None:
    small_detector(tmp_path)
    model = DetectorModel(resolve(str(tmp_path)))
    assert model.in_parts
    views = np.random.default_rng(0).integers(0, 256, (16, *model.views.shape), dtype=np.uint8)
    logits, embeddings = model.outputs(views)
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in range(10):
            parts = list(pool.map(model.outputs, np.array_split(views, 8)))
            np.testing.assert_allclose(np.concatenate([part[0] for part in parts]), logits, atol=1e-5)
            # of each part its own, and not whatever another thread gave the layer meanwhile
            np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), embeddings, atol=1e-5)  # type: ignore[arg-type]
