"""Drift: the statistic is the MMD, thresholds hold on what they were not made of, and a new kind of picture is seen."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from deployments.checkpoints import CheckpointError
from deployments.drift_statistic import (
    CHANNELS,
    STATISTICS,
    Discrepancies,
    DriftSettings,
    Projection,
    Reference,
    Watch,
    alarms,
    kernel,
    looks_of,
    make_reference,
    median_bandwidth,
    picture_statistics,
    strangeness,
    window_counts,
)
from deployments.images import decode

SETTINGS = DriftSettings(
    window=64, step=8, dimensions=8, most=300, splits=4, stream=12_000, between_alarms=4_000, seed=1
)


def pictures(count: int, seed: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings, margins and statistics of a made-up kind; ``shift`` moves its embeddings in ten directions."""
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(count, 60)) * np.linspace(3, 0.1, 60)
    embeddings[:, :10] += shift * np.linspace(3, 0.1, 60)[:10]
    return embeddings.astype(np.float32), rng.normal(size=count), rng.normal(size=(count, len(STATISTICS)))


@pytest.fixture(scope="module")
def reference() -> Reference:
    return make_reference(*pictures(600, 0), SETTINGS, {"data": {"name": "made", "version": "1"}})


def observations(reference: Reference, made: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    return reference.observations(reference.projection(made[0]), made[1], made[2])


def test_windows_of_a_pool_have_the_unbiased_mmd_of_their_pictures() -> None:
    rng = np.random.default_rng(0)
    some, pool = rng.normal(size=(40, 3)), rng.normal(0.5, 1, size=(20, 3))
    drawn, bandwidth = rng.integers(0, 20, 48), 0.3
    counts = window_counts(drawn, 20, 16, 8)
    assert counts.shape == (5, 20) and (counts.sum(1) == 16).all()
    found = Discrepancies(some, pool, bandwidth)(counts)
    for number, value in enumerate(found):
        window = pool[drawn[8 * number : 8 * number + 16]]
        own, theirs = kernel(window, window, bandwidth), kernel(some, some, bandwidth)
        expected = (own.sum() - 16) / (16 * 15) + (theirs.sum() - 40) / (40 * 39)
        assert value == pytest.approx(expected - 2 * kernel(window, some, bandwidth).mean(), abs=1e-5)


def test_the_watcher_sees_what_the_bootstrap_counted(reference: Reference) -> None:
    """Two ways to the same numbers: sums over a pool, and the window of the service."""
    pool = observations(reference, pictures(200, 5))
    drawn = np.random.default_rng(3).permutation(200)
    looks = looks_of(reference, pool, window_counts(drawn, 200, reference.window, reference.step))
    watch = Watch(reference)
    seen = [look for number in drawn if (look := watch.add(str(number), pool[number])) is not None]
    assert len(seen) == len(looks) == (200 - 64) // 8 + 1
    for place, channel in enumerate(CHANNELS):
        ratios = np.array([look.ratios[channel] for look in seen])
        assert ratios * reference.thresholds[channel] == pytest.approx(looks[:, place], abs=1e-5)


def test_fresh_undisturbed_pictures_hardly_ever_alarm(reference: Reference) -> None:
    pool, count = observations(reference, pictures(16_000, 11)), 0
    for first in range(0, len(pool), 1_000):
        part = pool[first : first + 1_000]
        looks = looks_of(reference, part, window_counts(np.arange(1_000), 1_000, reference.window, 8))
        count += alarms(np.any(looks > [reference.thresholds[channel] for channel in CHANNELS], axis=1), 8)
    assert count <= 6, "one in 4,000 was asked for"
    assert reference.facts["bootstrap"]["alarms"] <= reference.facts["bootstrap"]["pictures"] / 4_000


def fed(watch: Watch, rows: np.ndarray, name: str) -> int | None:
    """Pictures until the alarm; None: none."""
    for number, row in enumerate(rows):
        look = watch.add(f"{name}-{number}", row)
        if look is not None and look.alarm:
            return number + 1
    return None


def test_a_fifth_of_new_pictures_is_noticed_and_they_are_named_first(reference: Reference) -> None:
    usual, new = observations(reference, pictures(400, 21)), observations(reference, pictures(400, 22, shift=2.5))
    watch = Watch(reference)
    assert fed(watch, usual[:128], "usual") is None
    rng, mixed = np.random.default_rng(0), usual.copy()
    is_new = rng.random(400) < 0.2
    mixed[is_new] = new[is_new]
    seen = 0
    for number in range(400):
        look = watch.add(("new-" if is_new[number] else "usual2-") + str(number), mixed[number])
        if look is not None and look.alarm:
            seen = number + 1
            break
    assert 0 < seen <= 300
    strongest = watch.drivers("embedding", 8)
    assert sum(driver.sha256.startswith("new-") for driver in strongest) >= 6
    assert [driver.witness for driver in strongest] == sorted((d.witness for d in strongest), reverse=True)


def test_each_channel_notices_what_is_its_own(reference: Reference) -> None:
    for place, channel in enumerate(CHANNELS):
        embeddings, margins, statistics = pictures(128, 30 + place)
        if channel == "embedding":
            embeddings[:, :10] += 4
        elif channel == "output":
            margins = margins + 2
        else:
            statistics[:, 3] += 3  # compression
        watch = Watch(reference)
        assert fed(watch, observations(reference, (embeddings, margins, statistics)), channel) is not None
        ratios = watch.ratios()
        assert max(ratios, key=ratios.__getitem__) == channel
        if channel == "picture":
            assert max(watch.moved(), key=lambda name: abs(watch.moved()[name])) == "JPEG quality"


def test_an_alarm_ends_when_a_whole_window_has_been_quiet(reference: Reference) -> None:
    watch = Watch(reference)
    assert fed(watch, observations(reference, pictures(100, 40, shift=5)), "new") is not None
    looks = [
        look
        for number, row in enumerate(observations(reference, pictures(300, 41)))
        if (look := watch.add(f"usual-{number}", row)) is not None
    ]
    ended = [number for number, look in enumerate(looks) if look.changed]
    assert len(ended) == 1 and not looks[-1].alarm
    below = next(number for number, look in enumerate(looks) if max(look.ratios.values()) <= 1)
    assert ended[0] - below >= reference.window // reference.step - 1


def test_a_picture_sent_again_and_again_is_one_picture(reference: Reference) -> None:
    watch = Watch(reference)
    row = observations(reference, pictures(1, 50, shift=9))[0]
    assert [watch.add("the same", row) for _ in range(500)] == [None] * 500
    assert (watch.pictures, watch.repeated) == (1, 499)
    for number, usual in enumerate(observations(reference, pictures(64, 51))):
        watch.add(str(number), usual)
    assert watch.add("the same", row) is None and watch.pictures == 66, "it has left the window, and counts again"


def test_a_reference_is_a_file_that_says_what_it_was_made_of(reference: Reference) -> None:
    data = reference.to_bytes()
    again = Reference.from_bytes(data)
    twin = make_reference(*pictures(600, 0), SETTINGS, {"data": {"name": "made", "version": "1"}})
    assert again.to_bytes() == data == twin.to_bytes()
    assert again.facts["data"] == {"name": "made", "version": "1"} and again.facts["pictures"] == 600
    pool, ratios = observations(reference, pictures(64, 9)), []
    for one in (reference, again):
        watch = Watch(one)
        for number, row in enumerate(pool):
            watch.add(str(number), row)
        ratios.append(watch.ratios())
    assert ratios[0] == pytest.approx(ratios[1])
    for damaged in (b"", b"no file", data[:50], data[:-1]):
        with pytest.raises(CheckpointError, match=r"train\.drift_reference"):
            Reference.from_bytes(damaged)


def test_too_few_pictures_or_a_crooked_window_are_said() -> None:
    with pytest.raises(ValueError, match="too few"):
        make_reference(*pictures(20, 0), SETTINGS)
    with pytest.raises(ValueError, match="no multiple"):
        make_reference(*pictures(600, 0), SETTINGS.model_copy(update={"step": 7}))


@pytest.mark.parametrize("shape", [(50, 200), (300, 40)])
def test_components_are_weighted_by_a_power_of_their_spread(shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(0).normal(size=shape) * np.linspace(5, 0.5, shape[1]) ** 2
    for power, uneven in ((0.0, True), (1.0, False)):
        spread = Projection.fit(rows, 6, power)(rows).std(0)
        assert (spread[0] / spread[-1] > 1.1) == uneven
        if power == 1:
            assert spread == pytest.approx(np.ones(6), abs=0.05)


def test_one_picture_can_be_strange_and_usual_ones_are_not(reference: Reference) -> None:
    usual = strangeness(reference, observations(reference, pictures(200, 60)))
    assert 0.3 < usual.mean() < 0.75
    assert strangeness(reference, observations(reference, pictures(3, 61, shift=8))).min() > 0.98


def jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def test_facts_of_a_file_are_what_they_say() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 192, 3), dtype=np.uint8))
    view = np.full((32, 32, 3), 100, np.uint8)
    facts = dict(zip(STATISTICS, picture_statistics(decode(jpeg(noise, 60)), view), strict=True))
    assert facts["size (log2 of pixels)"] == pytest.approx(np.log2(96 * 192))
    assert facts["shape (log2 of width / height)"] == 1
    assert facts["JPEG quality"] == pytest.approx(60, abs=1)
    assert facts["brightness"] == pytest.approx(100, abs=0.1)
    assert facts["contrast"] == pytest.approx(0, abs=1e-3) and facts["sharpness (log2)"] == pytest.approx(0, abs=1e-3)
    small = dict(zip(STATISTICS, picture_statistics(decode(jpeg(noise, 10)), view), strict=True))
    assert small["bits a pixel (log2)"] < facts["bits a pixel (log2)"]
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    assert picture_statistics(decode(buffer.getvalue()), view)[3] == 100


def test_distances_are_measured_in_the_middle_of_them() -> None:
    rows = np.random.default_rng(0).normal(size=(200, 5))
    among = kernel(rows, rows, median_bandwidth(rows))[np.triu_indices(200, 1)]
    assert np.median(among) == pytest.approx(np.exp(-1), abs=0.01)
