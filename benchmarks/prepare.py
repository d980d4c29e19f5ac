"""How fast data are prepared, what that takes of memory, and whether the same data give the same version.

* ``throughput``  ``data.prepare`` against a plain loop in two processes that does the same work (decode fully,
  perceptual hash, sha256, JPEG quality, parquet), interleaved rounds, start-up excluded on both sides
* ``growth``      what a thousand pictures cost, by how many there are
* ``memory``      peak of the sum of PSS over all processes of a run, for two sizes of a set of small pictures
* ``versions``    the version hash on 1 and on 2 CPUs, of a run that was killed half-way, and from a real S3 server

    python -m benchmarks.prepare --photos FOLDER [--parts throughput,growth,memory,versions]
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain, repeat
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from benchmarks import plots
from benchmarks.processes import pss, sampled
from benchmarks.report import RESULTS, write_result
from data.identify import jpeg_quality, read_jpeg_header
from data.prepare import Flickr30kConfig, prepare
from data.session import RaySettings, ray_session
from data.splits import perceptual_hash
from data.versions import open_version

_ROOT = Path(__file__).parent.parent
_PORT = 18_432
#: What prepare does one after the other, as results name it and as people read it.
_STEPS = {"identify_s": "identify", "decide_s": "decide", "write_s": "write"}


class PrepareBenchmarkConfig(BaseModel):
    """Settings of a run."""

    model_config = ConfigDict(extra="forbid")

    photos: Path = Field(description="folder of JPEG photos, searched recursively; repeated until there are enough")
    parts: str = Field("throughput,memory,versions", description="which measurements")
    work: Path | None = Field(None, description="where raw data and versions are put; a temporary folder if not given")
    pictures: int = Field(10_000, ge=512, description="pictures of `throughput`")
    rounds: int = Field(
        3, ge=1, description="interleaved rounds of `throughput`, with those that --work holds, and rounds of `growth`"
    )
    processes: int = Field(2, ge=1, description="of the plain loop and of prepare")
    sizes: list[int] = Field([1_000, 5_000, 20_000, 50_000], min_length=2, description="pictures of `growth`")
    small: int = Field(5_000, ge=512, description="pictures of `memory`, and the larger number")
    large: int = Field(50_000, ge=512)
    object_store_bytes: int = Field(256 * 2**20, description="shared memory of Ray in all parts")


def main(arguments: list[str] | None = None) -> None:
    """Run the chosen parts and write ``results/prepare_PART.json``, of the first two a plot as well."""
    from pydantic_settings import CliApp

    config = CliApp.run(PrepareBenchmarkConfig, cli_args=arguments)
    measure = {"throughput": throughput, "growth": growth, "memory": memory, "versions": version_hashes}
    tell = {"throughput": show, "growth": show_growth, "memory": _peaks, "versions": _hashes}
    with tempfile.TemporaryDirectory() as temporary:
        work = config.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for part in config.parts.split(","):
            result = measure[part](config, work)
            print(tell[part](result), write_result(f"prepare_{part}", result), sep="\n", flush=True)


# ---------------------------------------------------------------------------------------------------------- throughput


def throughput(config: PrepareBenchmarkConfig, work: Path) -> dict[str, Any]:
    """Pictures a second of both in each round, and prepare's share of the plain loop's."""
    raw = make_photos(config.photos, work / "photos", config.pictures)
    size = sum(path.stat().st_size for path in (raw / "Images").iterdir())
    kept = work / "rounds.json"  # a machine that is quiet for minutes only does a round at a time
    of = config.model_dump(mode="json", include={"photos", "pictures", "processes", "object_store_bytes"})
    before = json.loads(kept.read_text()) if kept.is_file() else {}
    rounds: list[dict[str, float]] = before["rounds"] if before.get("of") == of else []
    with _ray_at_work(config):
        for number in range(len(rounds), config.rounds):
            shutil.rmtree(work / "plain", ignore_errors=True)
            os.sync()  # what the last one wrote is not this one's to wait for
            plain = plain_loop(raw, work / "plain", config.processes)
            steps = _prepared(raw, work / "out", number)
            ours = sum(steps.values())
            rounds.append(
                {
                    "plain_per_s": round(config.pictures / plain, 1),
                    "prepare_per_s": round(config.pictures / ours, 1),
                    **{step: round(seconds, 2) for step, seconds in steps.items()},
                    "share": round(plain / ours, 3),
                }
            )
            kept.write_text(json.dumps({"of": of, "rounds": rounds}))
            print(rounds[-1], flush=True)
    return {
        "rounds": rounds,
        "share_median": statistics.median(entry["share"] for entry in rounds),
        "pictures": config.pictures,
        "processes": config.processes,
        "mean_bytes": size // config.pictures,
    }


@contextmanager
def _ray_at_work(config: PrepareBenchmarkConfig) -> Iterator[None]:
    """A Ray whose workers are all there, with Ray Data's own actors."""
    with ray_session(RaySettings(num_cpus=config.processes, object_store_bytes=config.object_store_bytes)):
        import ray.data  # not before the session has said on which address Ray listens

        ray.data.DataContext.get_current().wait_for_min_actors_s = 300
        ray.data.range(config.processes).map_batches(lambda batch: batch).materialize()
        yield


def _prepared(raw: Path, output: Path, seed: int) -> dict[str, float]:
    """Seconds of each step from the first picture to the last shard, without the start of either pass's workers."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()  # what the last one wrote is not this one's to wait for
    prepared = prepare(Flickr30kConfig(input=str(raw), output=str(output), allow_failed=["no_giant_group"], seed=seed))
    return {
        "identify_s": prepared.identified.seconds,
        "decide_s": prepared.decided_s,
        "write_s": prepared.written.seconds,
    }


def show(result: dict[str, Any], folder: Path = RESULTS) -> str:
    """The table, and its plot."""
    rates = {
        f"plain loop, {result['processes']} processes": [entry["plain_per_s"] for entry in result["rounds"]],
        "data.prepare": [entry["prepare_per_s"] for entry in result["rounds"]],
    }
    return plots.compared("prepare_throughput", rates, "pictures/s", folder=folder)


def make_photos(photos: Path, folder: Path, count: int) -> Path:
    """A raw set of ``count`` photos in the layout of Flickr30k: those that there are and decode, then the same mirrored
    and turned, which no hash takes for the originals.
    """
    images = folder / "Images"
    if images.is_dir() and sum(1 for _ in images.iterdir()) == count:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    images.mkdir(parents=True)
    sources = [
        path for path in sorted(photos.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg") and _decodes(path)
    ]
    if not sources:
        raise SystemExit(f"{photos} has no JPEG photos")
    numbered = chain.from_iterable(
        zip(repeat(turn), sources, strict=False) for turn in range(count // len(sources) + 1)
    )
    for number, (turn, source) in zip(range(count), numbered, strict=False):
        target = images / f"{number}.jpg"
        if turn == 0:
            target.write_bytes(source.read_bytes())
            continue
        with Image.open(source) as image:
            turned = image.convert("RGB").transpose(Image.Transpose(turn % 7))
            # at another quality each time, and in the end with a little less of it: the same pixels would be left out
            narrower = turned.crop((min(turn // 112, turned.width - 16), 0, turned.width, turned.height))
            narrower.save(target, "JPEG", quality=95 - 3 * (turn // 7 % 16))
    write_captions(folder)
    return folder


def _decodes(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
            return image.format == "JPEG" and min(image.size) >= 16
    except (OSError, SyntaxError):
        return False


def write_captions(folder: Path) -> None:
    with (folder / "captions.txt").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "caption"))
        for path in sorted((folder / "Images").iterdir()):
            writer.writerows((path.name, f"photo {path.stem} seen by person {person}") for person in range(5))


def plain_loop(raw: Path, target: Path, processes: int) -> float:
    """Seconds from when every process is ready to when the last has written its last file."""
    target.mkdir(parents=True)
    paths = sorted((raw / "Images").iterdir())
    context = get_context("spawn")
    ready = context.Barrier(processes + 1)
    workers = [
        context.Process(target=_plain_worker, args=(paths[number::processes], target / str(number), ready))
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    ready.wait()
    started = time.perf_counter()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise SystemExit("the plain loop failed")
    return time.perf_counter() - started


def _plain_worker(paths: list[Path], target: Path, ready: Barrier) -> None:
    """The work of prepare as one would write it down: nothing is distributed, checked, grouped or split."""
    import hashlib

    import pyarrow as pa
    import pyarrow.parquet as pq

    target.mkdir()
    ready.wait()
    for start in range(0, len(paths), 256):
        rows = []
        for path in paths[start : start + 256]:
            data = path.read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                rgb = image.convert("RGB")
                kind, mode = image.format, image.mode
            tables, _ = read_jpeg_header(data)
            rows.append(
                {
                    "id": hashlib.sha256(data).hexdigest(),
                    "image": data,
                    "file_name": path.name,
                    "width": rgb.width,
                    "height": rgb.height,
                    "format": kind,
                    "mode": mode,
                    "bytes": len(data),
                    "jpeg_quality": jpeg_quality(tables[0]),
                    "phash": f"{perceptual_hash(rgb):016x}",
                }
            )
        file = target / f"{start:06d}.parquet"
        # as cheap as it gets: nothing is compressed, no dictionary of pictures is tried
        pq.write_table(
            pa.Table.from_pylist(rows), file, compression="NONE", use_dictionary=False, write_statistics=False
        )


# -------------------------------------------------------------------------------------------------------------- growth


def growth(config: PrepareBenchmarkConfig, work: Path) -> dict[str, Any]:
    """Seconds of each step for every size, in rounds that go up and down again."""
    sizes = sorted(config.sizes)
    whole = make_photos(config.photos, work / f"photos-{sizes[-1]}", sizes[-1])
    rows: list[dict[str, Any]] = []
    with _ray_at_work(config):
        for number in range(config.rounds):
            for count in sizes if number % 2 == 0 else sizes[::-1]:
                steps = _prepared(_some_of(whole, work / "some", count), work / "out", number)
                rows.append({"pictures": count} | {step: round(seconds, 2) for step, seconds in steps.items()})
                print(rows[-1], flush=True)
    thousand = {
        str(count): {
            step: statistics.median(row[step] * 1000 / count for row in rows if row["pictures"] == count)
            for step in _STEPS
        }
        for count in sizes
    }
    whole_s = {count: sum(steps.values()) for count, steps in thousand.items()}
    return {
        "rows": rows,
        "seconds_per_thousand": {
            count: {step: round(seconds, 3) for step, seconds in steps.items()} for count, steps in thousand.items()
        },
        "largest_to_smallest": round(whole_s[str(sizes[-1])] / whole_s[str(sizes[0])], 3),
        "processes": config.processes,
    }


def _some_of(raw: Path, folder: Path, count: int) -> Path:
    """The first so many of a raw set's photos, by number."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "Images").mkdir(parents=True)
    for number in range(count):
        os.link(raw / "Images" / f"{number}.jpg", folder / "Images" / f"{number}.jpg")
    write_captions(folder)
    return folder


def show_growth(result: dict[str, Any], folder: Path = RESULTS) -> str:
    """The table of ``growth``, and its plot."""
    return plots.growth(
        "prepare_growth",
        {int(count): steps for count, steps in result["seconds_per_thousand"].items()},
        _STEPS,
        folder,
    )


# -------------------------------------------------------------------------------------------------------------- memory


def memory(config: PrepareBenchmarkConfig, work: Path) -> dict[str, Any]:
    """Peak PSS of a whole run, all processes, for each size."""
    peaks = {}
    for count in (config.small, config.large):
        raw = make_small_pictures(work / f"small-{count}", count)
        shutil.rmtree(work / "out", ignore_errors=True)
        process = subprocess.Popen(_command(config, raw, work / "out", config.processes), cwd=_ROOT)
        with sampled(Family(process.pid).pss, 0.5) as peak:
            if process.wait():
                raise SystemExit("prepare failed")
        peaks[count] = max(peak)
        print(count, "pictures:", round(peaks[count] / 2**20), "MiB", flush=True)
        shutil.rmtree(raw)
    return {
        "peak_mib": {str(count): round(peak / 2**20) for count, peak in peaks.items()},
        "ratio": round(peaks[config.large] / peaks[config.small], 3),
        "object_store_mib": config.object_store_bytes // 2**20,
    }


def _peaks(result: dict[str, Any]) -> str:
    return plots.table([{"pictures": count, "peak MiB": mib} for count, mib in result["peak_mib"].items()])


def make_small_pictures(folder: Path, count: int) -> Path:
    """Random pictures of 64 x 48, which no hash takes for one another."""
    images = folder / "Images"
    shutil.rmtree(folder, ignore_errors=True)
    images.mkdir(parents=True)
    generator = np.random.default_rng(7)
    for number in range(count):
        noise = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC).save(images / f"{number}.jpg", quality=85)
    write_captions(folder)
    return folder


class Family:
    """A process and all that were ever seen below it: Ray's daemons are children of the driver, workers of those, and
    may outlive whose children they are.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._known: dict[int, psutil.Process] = {}

    def pss(self) -> int:
        """Of those that are there, in bytes."""
        with suppress(psutil.Error):
            driver = psutil.Process(self._pid)
            for process in (driver, *driver.children(recursive=True)):
                self._known.setdefault(process.pid, process)
        return pss(self._known.values())


# ------------------------------------------------------------------------------------------------------------ versions


def version_hashes(config: PrepareBenchmarkConfig, work: Path) -> dict[str, Any]:
    """The version that each kind of run gives of the same photos."""
    raw = make_photos(config.photos, work / "versions", 2048)
    found = {}
    for name, cpus in (("two_cpus", 2), ("one_cpu", 1)):
        _run(_command(config, raw, work / name, cpus))
        found[name] = _version(work / name)
    found["killed_half_way"] = _killed(config, raw, work / "killed")
    found["s3"] = _on_s3(config, raw, work / "s3")
    return {"versions": found, "all_the_same": len(set(found.values())) == 1, "pictures": 2048}


def _hashes(result: dict[str, Any]) -> str:
    return plots.table([{"run": run, "version": version} for run, version in result["versions"].items()])


def _version(output: Path) -> str:
    return open_version(output / "flickr30k").manifest.version


def _killed(config: PrepareBenchmarkConfig, raw: Path, output: Path) -> str:
    """SIGKILL to the driver when half of the blocks are identified, and again while shards are written."""
    shutil.rmtree(output, ignore_errors=True)
    work = output / "flickr30k/.work"
    for pattern, count in (("particulars-*/*.parquet", 4), ("version-*/*/*.parquet", 2)):
        process = subprocess.Popen(_command(config, raw, output, 2), cwd=_ROOT, start_new_session=True)
        while len(list(work.glob(pattern))) < count and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    _run(_command(config, raw, output, 2))
    return _version(output)


def _on_s3(config: PrepareBenchmarkConfig, raw: Path, folder: Path) -> str:
    """The raw data on a server of `rclone serve s3`, and the version too."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(raw, folder / "bucket/raw")
    program = shutil.which("rclone", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        raise SystemExit("rclone is missing: make dev")
    keys = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{_PORT}", "AWS_DEFAULT_REGION": "us-east-1"}
    keys |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}  # nosec B105 # of a server that the benchmark starts
    serve = [program, "serve", "s3", str(folder), "--addr", f"127.0.0.1:{_PORT}", "--auth-key", "key,secret"]
    with subprocess.Popen([*serve, "--config", os.devnull], stderr=subprocess.DEVNULL) as server:
        try:
            time.sleep(2)
            _run(_command(config, "s3://bucket/raw", "s3://bucket/out", 2), keys)
        finally:
            server.terminate()
    return _version(folder / "bucket/out")


def _command(config: PrepareBenchmarkConfig, raw: Path | str, output: Path | str, cpus: int) -> list[str]:
    return [
        *(sys.executable, "-m", "data.prepare", "flickr30k", "--input", str(raw), "--output", str(output)),
        *("--num-cpus", str(cpus), "--object-store-bytes", str(config.object_store_bytes)),
        *("--allow-failed", "no_giant_group"),
    ]


def _run(command: list[str], environment: Mapping[str, str] | None = None) -> None:
    subprocess.run(command, cwd=_ROOT, env=os.environ | dict(environment or {}), check=True)


if __name__ == "__main__":
    main()
