"""Health checks with real replicas and models of a few kilobytes: who answers wrongly fails, who is busy does not."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deployments import health, memory
from deployments.captioner import Captioner
from deployments.checkpoints import CheckpointError
from deployments.detector import Detector
from deployments.health import Health, Unhealthy, known_picture
from deployments.replica import ModelFailed, NotFinite, Replica
from deployments.tagger import Tagger, TaggerSettings, difference
from tests.train.small_models import small_captioner, small_detector

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    small_detector(folder / "detector")
    small_detector(folder / "another", seed=1)
    small_captioner(folder / "captioner")
    return folder


@pytest.fixture(autouse=True)
def own_queue(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Serve's own batching, in this process; its queue belongs to the event loop that first used it."""
    from ray import serve

    context = SimpleNamespace(_deployment_config=SimpleNamespace(max_ongoing_requests=100), deployment="Detector")
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    decorated = serve.batch(max_batch_size=8, batch_wait_timeout_s=0.0)(Replica._batch.__wrapped__)  # type: ignore[attr-defined]
    monkeypatch.setattr(Replica, "_batch", decorated)
    yield


async def started(kind: type[Any], checkpoint: Path, always: bool = True, **settings: Any) -> Any:
    """A replica as Serve starts it.

    Args:
        always: each check computes the known picture.
    """
    replica = kind()
    await replica.reconfigure({"uri": str(checkpoint), **settings})
    if always:
        replica._health.every_s = 0.0
    return replica


async def ask(replica: Any, value: int = 100) -> dict[str, Any]:
    views = np.full(replica.model.views.shape, value, np.uint8)
    return await replica.batched(views, replica.model.views, time.time() + 60)


async def outcome(replica: Any) -> str:
    """What a check says: "" for healthy."""
    try:
        await replica.check_health()
    except Unhealthy as error:
        return str(error)
    return ""


@torch.no_grad()
def scale(replica: Any, factor: float) -> None:
    """What becomes of a model whose memory is overwritten."""
    for name, parameter in replica.model.network.named_parameters():
        if name.startswith("classifier") or "word_embeddings" in name:
            parameter.mul_(factor)


@pytest.mark.parametrize(("kind", "name"), [(Detector, "detector"), (Captioner, "captioner")])
async def test_a_replica_that_answers_otherwise_than_at_its_start_is_unhealthy(
    kind: type[Any], name: str, folder: Path
) -> None:
    replica = await started(kind, folder / name)
    for _ in range(2):
        assert await outcome(replica) == ""
    scale(replica, -1.0)
    for _ in range(3):  # so many in a row until Serve starts another
        assert "the known picture is" in await outcome(replica)
    scale(replica, -1.0)
    assert await outcome(replica) == ""


async def test_a_probability_may_move_within_the_tolerance_and_no_further(folder: Path) -> None:
    replica = await started(Detector, folder / "detector")
    model, before = replica._known
    for moved, word in ((0.019, ""), (0.021, "probability")):
        replica._known = model, before | {"ai_probability": before["ai_probability"] - moved}
        assert word in await outcome(replica) and bool(word) == bool(await outcome(replica))


async def test_batches_that_fail_one_after_another_fail_the_check_until_one_succeeds(folder: Path) -> None:
    replica = await started(Detector, folder / "detector", always=False, most_failures=2)
    sound = replica.model.network.forward

    def fail(**_: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered")

    replica.model.network.forward = fail
    for expected in ("", "the last 2 batches failed, the last of them with RuntimeError"):
        with pytest.raises(ModelFailed, match="RuntimeError"):
            await ask(replica)
        assert await outcome(replica) == expected
    assert "batches failed" in await outcome(replica)  # and again, without a batch between
    replica.model.network.forward = sound
    await ask(replica)
    assert await outcome(replica) == ""


async def test_views_that_do_not_fit_are_their_senders_fault(folder: Path) -> None:
    replica = await started(Detector, folder / "detector", always=False, most_failures=1)
    with pytest.raises(ValueError):
        await replica.batched(np.zeros((1, 4, 4, 3), np.uint8), replica.model.views, time.time() + 60)
    assert await outcome(replica) == ""


async def test_what_is_no_number_is_answered_to_nobody_and_fails_the_check(folder: Path) -> None:
    replica = await started(Detector, folder / "detector", always=False)
    scale(replica, float("nan"))
    with pytest.raises(NotFinite):
        await ask(replica)
    assert "no numbers" in await outcome(replica) or "known" in await outcome(replica)
    with pytest.raises(NotFinite):
        await replica.explain(known_picture(replica.model.views.shape), replica.model.views, time.time() + 60)
    assert "NotFinite" in await outcome(replica)


async def test_a_picture_that_overflows_costs_its_neighbours_nothing_and_the_replica_one_check(folder: Path) -> None:
    replica = await started(Detector, folder / "detector", always=False)
    sound = replica.model.outputs

    def overflows(views: np.ndarray) -> Any:
        logits, embeddings = sound(views)
        logits[views[:, 0, 0, 0, 0] == 7, 0] = np.inf
        return logits, embeddings

    replica.model.outputs = overflows
    answers: list[Any] = await asyncio.gather(ask(replica, 7), ask(replica, 8), return_exceptions=True)
    assert isinstance(answers[0], NotFinite) and np.isfinite(answers[1]["ai_probability"])
    assert "1 of 2 answers" in await outcome(replica)
    assert await outcome(replica) == ""  # the known picture is answered as ever


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that answers no number."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("damaged")
    small_detector(folder)
    file = folder / "model.safetensors"
    save_file({name: value * float("nan") for name, value in load_file(file).items()}, file, {"format": "pt"})
    return folder


async def test_a_revision_that_cannot_be_had_is_refused_and_the_one_in_service_goes_on(
    folder: Path, damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    replica, in_service, refused = await started(Detector, folder / "detector"), [], []
    replica._metrics = SimpleNamespace(
        in_service=lambda stage, revision, before=None: in_service.append(revision),
        refused=lambda *said: refused.append(said),
        batch=lambda *_: None,
    )
    before = await replica.info()
    assert before["refused"] is None
    for config, why in (
        ({"uri": str(damaged)}, "no number"),
        ({"uri": str(folder / "nowhere")}, "no such checkpoint"),
        ({"uri": str(folder / "captioner")}, "Error"),
        ({"uri": str(folder / "another"), "max_batch_size": 0}, "ValidationError"),
    ):
        caplog.clear()
        await replica.reconfigure(config)
        told = await replica.info()
        assert told | {"refused": None} == before
        assert told["refused"]["uri"] == config["uri"] and why in told["refused"]["why"]
        assert [record.levelname for record in caplog.records if "is refused" in record.message] == ["ERROR"]
        assert await outcome(replica) == "" and (await ask(replica))["ai_probability"] >= 0
    assert set(in_service) == {before["revision"]} and set(refused) == {("detector", True)}
    await replica.reconfigure({"uri": str(folder / "another")})  # as it was asked before, in sound words
    told = await replica.info()
    assert told["refused"] is None and told["revision"] != before["revision"]
    assert await outcome(replica) == "" and refused[-1] == ("detector", False)


async def test_at_the_start_and_in_a_canary_what_cannot_be_had_is_an_error(
    folder: Path, damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve

    with pytest.raises(CheckpointError, match="no number"):
        await Detector().reconfigure({"uri": str(damaged)})
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(deployment="DetectorCanary"))
    replica = await started(Detector, folder / "detector")
    with pytest.raises(CheckpointError, match="no number"):
        await replica.reconfigure({"uri": str(damaged)})


async def test_another_revision_has_a_known_answer_of_its_own(folder: Path) -> None:
    replica = await started(Detector, folder / "detector")
    scale(replica, -1.0)
    assert await outcome(replica) != ""
    before = replica._known[1]["ai_probability"]
    await replica.reconfigure({"uri": str(folder / "another")})
    replica._health.every_s = 0.0
    assert abs(replica._known[1]["ai_probability"] - before) > 0.02
    assert await outcome(replica) == ""


async def test_memory_of_a_revision_that_was_replaced_goes_back_when_nobody_has_it_any_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[bool] = []
    monkeypatch.setattr(memory, "give_back", lambda: given_back.append(True))
    replica = await started(Detector, folder / "detector", always=False)
    in_work = replica.model
    await replica.check_health()
    await replica.reconfigure({"uri": str(folder / "another")})
    await replica.check_health()
    assert not given_back, "a batch is still being computed by it"
    del in_work
    await replica.check_health()
    await replica.check_health()
    assert given_back == [True]


async def test_a_replica_that_has_just_answered_is_not_asked(folder: Path) -> None:
    replica, asked = await started(Detector, folder / "detector", always=False), []
    known = replica.known_answer

    def counted(model: Any) -> Any:
        asked.append(model)
        return known(model)

    replica.known_answer = counted
    replica._health._checked = replica._health._answered = time.monotonic() - 2 * replica._health.every_s
    await ask(replica)
    await outcome(replica)
    assert not asked
    replica._health.every_s = 0.0
    await outcome(replica)
    assert len(asked) == 1


async def test_a_long_batch_does_not_make_a_replica_look_dead_and_is_not_run_into(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_PATIENCE_S", 0.05)
    replica = await started(Detector, folder / "detector")
    sound, loop = replica.answer, asyncio.get_running_loop()
    computing, go_on = asyncio.Event(), threading.Event()

    def slow(model: Any, views: np.ndarray) -> Any:
        loop.call_soon_threadsafe(computing.set)
        assert go_on.wait(30)
        return sound(model, views)

    replica.answer = slow
    working = asyncio.create_task(ask(replica))
    await asyncio.wait_for(computing.wait(), 30)
    for _ in range(2):
        assert await outcome(replica) == ""
    assert not working.done()
    go_on.set()
    assert "ai_probability" in await working
    scale(replica, -1.0)
    while not await outcome(replica):  # what it came to is seen by a later check
        await asyncio.sleep(0.05)


async def test_a_batch_that_does_not_end_is_a_hang(folder: Path) -> None:
    replica = await started(Detector, folder / "detector")
    replica._busy_since = time.monotonic() - 1000
    with pytest.raises(RuntimeError, match="running for 1000"):
        await replica.check_health()


async def test_answers_that_keep_coming_and_are_wrong_are_found_too() -> None:
    watched, asked = Health(every_s=0.05), 0

    async def wrong() -> str:
        nonlocal asked
        asked += 1
        return "another answer"

    async def busy() -> None:
        while True:
            watched.answered()
            await watched.check(wrong)
            await asyncio.sleep(0.01)

    with pytest.raises(Unhealthy, match="another answer"):
        await asyncio.wait_for(busy(), 30)
    assert asked == 1


class Scripted(Tagger):
    """A tagger whose engine says what it is told."""

    def __init__(self, says: str) -> None:
        super().__init__(TaggerSettings())
        self.says: str | Exception = says

    async def _ask(self, caption: str) -> str:
        if isinstance(self.says, Exception):
            raise self.says
        return self.says


async def test_a_tagger_that_tags_otherwise_or_fails_is_unhealthy() -> None:
    tagger = Scripted('["dog","grass","animal"]')
    await tagger._learn()
    tagger._health.every_s = 0.0
    assert await outcome(tagger) == ""
    tagger.says = '["zz","zz q","q"]'
    assert "zz" in await outcome(tagger)
    tagger.says = '["grass","field","dog"]'
    assert await outcome(tagger) == ""
    tagger.says = RuntimeError("CUDA error")
    assert "CUDA error" in await outcome(tagger)
    tagger._health.renewed()
    tagger._health.every_s = 3600.0
    for _ in range(3):
        assert await outcome(tagger) == ""
        with pytest.raises(ModelFailed):
            await tagger.tag("a cat")
    assert "the last 3 batches failed" in await outcome(tagger)


def test_what_counts_as_another_answer_of_a_tagger() -> None:
    sound = '["dog","grass","animal"]'
    assert difference(sound, sound) == ""
    assert difference(sound, '["grass","x","y"]') == ""
    assert difference(sound, "") and difference(sound, '["x","y","z"]')
    assert difference('["x","y","z"]', '["u","v","w"]') == ""  # nothing is known of what it should say
    assert difference('["x","y","z"]', '["u"')


def test_the_known_picture_is_the_same_everywhere_and_has_edges_in_all_colours() -> None:
    made = known_picture((2, 32, 32, 3))
    assert made.dtype == np.uint8 and int(made.astype(np.int64).sum()) == int(known_picture((2, 32, 32, 3)).sum())
    assert all(made[view, ..., colour].std() > 30 for view in range(2) for colour in range(3))
    assert not np.array_equal(made[0], made[1])
