"""Bulk annotation beside the bare models, by the number of pictures, and under kills.

* ``throughput``  steady state of ``python -m data.annotate`` beside a plain loop over the same three checkpoints
  (decoding included) with all cores' threads: the difference of a long and a short run, in which start-up and the
  pipeline's filling and emptying cancel out, in alternating rounds; beside as many such loops as there are cores, each
  in a process of its own with one thread, where ``--steps`` names ``processes``
* ``growth``      what a thousand pictures cost, by how many there are, where hardly any of it is a model's: detection
  alone, by a ViT of two layers
* ``kills``       the same photos annotated twice, once undisturbed and once with SIGKILLs to the driver and to workers
  of every stage: same ids, each once, and nearly the same answers
* ``llm``         the tagger's stage alone beside ``ray.data.llm`` with the same engine arguments, prompt and grammar,
  over the captions of an annotation (``--captions``), in alternating rounds, as a difference of two runs too

    python -m benchmarks.annotate --photos DIR [--parts throughput,kills]

Each run is a process of its own with a Ray of its own. ``--steps bare,short`` and ``--steps bare,long`` with
``--append`` split a round of ``throughput`` for a machine that is quiet only for minutes; ``--one-step --work DIR``,
again and again, does ``kills`` in pieces. Out: ``results/annotate_PART.json``, and of the first two a
plot.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from benchmarks import plots
from benchmarks.load import paired
from benchmarks.processes import Apart
from benchmarks.report import RESULTS, write_result
from data.annotations import FOLDER, read_annotations
from deployments.annotation import Annotation

_ROOT = Path(__file__).parent.parent
#: Of the bare models' rate.
_BAR = 0.9


class AnnotateBenchmark(BaseModel):
    """Settings of a run."""

    model_config = ConfigDict(extra="forbid")

    photos: Path = Field(description="folder of photos (JPEG, PNG), searched recursively")
    parts: str = Field("throughput,kills", description="which measurements")
    count: int = Field(1000, ge=32, description="photos of `kills`")
    long: int = Field(320, description="photos of the long run of `throughput`")
    short: int = Field(64, description="photos of the short one")
    bare: int = Field(64, description="photos of the bare loop")
    rounds: int = Field(3, ge=1)
    sizes: list[int] = Field([1_000, 5_000, 20_000, 50_000], min_length=2, description="photos of `growth`")
    steps: str = Field("bare,short,bare,long", description="what a round of `throughput` does, in this order")
    append: bool = Field(False, description="add to the measurements in the result file")
    one_step: bool = Field(False, description="of `kills`, do only the next step: until the driver is killed again")
    shard_pictures: int = Field(16, ge=1)
    captions: Path | None = Field(None, description="folder of an annotation, for `llm`")
    work: Path | None = Field(None, description="folder for photos and records; a temporary one if not given")
    options: str = Field("", description="more options for data.annotate")


def command(config: AnnotateBenchmark, photos: Path, output: Path) -> list[str]:
    """The program under test."""
    return [
        *(sys.executable, "-m", "data.annotate", "--input", str(photos), "--output", str(output)),
        *("--shard-pictures", str(config.shard_pictures), *config.options.split()),
    ]


def environment() -> dict[str, str]:
    """Of a run that starts its own Ray."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return kept | {"PYTHONPATH": str(_ROOT)}


def link(photos: list[Path], folder: Path) -> Path:
    """A folder with just these photos."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for photo in photos:
        if (folder / photo.name).exists():
            raise SystemExit(f"error: two photos are called {photo.name}, and records go by the name: rename one")
        shutil.copy(photo, folder / photo.name)
    return folder


def enough(photos: list[Path], count: int, folder: Path) -> list[Path]:
    """At least so many photos: where there are fewer, each again under other names."""
    if not photos:
        raise SystemExit("error: no photo: name another folder with --photos")
    if len(photos) >= count:
        return photos
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    copies = [folder / f"{number}{photos[number % len(photos)].suffix}" for number in range(count)]
    for number, copy in enumerate(copies):
        shutil.copy(photos[number % len(photos)], copy)
    return copies


# -------------------------------------------------------------------------------------------------------- throughput


def throughput(config: AnnotateBenchmark, photos: list[Path], work: Path) -> dict[str, Any]:
    """Alternating measurements of the loop, and of a short and a long run."""
    from benchmarks.back_to_back import BackToBack

    result_file = RESULTS / "annotate_throughput.json"
    before = json.loads(result_file.read_text()) if config.append and result_file.is_file() else {}
    of = config.model_dump(mode="json", include={"short", "long", "bare", "shard_pictures", "options"})
    if before and before.get("of") != of:
        raise SystemExit(f"error: {result_file} is of other settings ({before.get('of')}): leave --append away")
    measured: list[dict[str, Any]] = before.get("measurements", [])
    photos = enough(photos, max(config.long, config.short + config.bare), work / "repeated")
    cores = os.cpu_count() or 1
    with contextlib.ExitStack() as stack:
        loops = {
            step: [stack.enter_context(Apart({}, BackToBack, None, threads)) for _ in range(count)]
            for step, count, threads in (("bare", 1, cores), ("processes", cores, 1))
            if step in config.steps.split(",")
        }
        for side in loops.values():
            _loop(side, photos[:8])
        _turns(config, photos, work, loops, measured)
    names = ("bare", "short", "long", "processes")
    by_step = {step: [entry for entry in measured if entry["step"] == step] for step in names}
    result: dict[str, Any] = {"of": of, "measurements": measured}
    if not all(by_step[step] for step in ("bare", "short", "long")):
        return result
    bare = [entry["photos"] / entry["seconds"] for entry in by_step["bare"]]
    rates = [
        (long["photos"] - short["photos"]) / (long["seconds"] - short["seconds"])
        for long, short in zip(by_step["long"], by_step["short"], strict=False)
    ]
    ratio = paired(rates, _loops(bare, len(rates)))
    if by_step["processes"]:
        several = [entry["photos"] / entry["seconds"] for entry in by_step["processes"]]
        result["processes_per_s_by_round"] = [round(rate, 3) for rate in several]
        result["ratio_to_processes"] = round(paired(rates, _loops(several, len(rates))), 3)
    return result | {
        "bare_per_s_by_round": [round(rate, 3) for rate in bare],
        "annotate_per_s_by_round": [round(rate, 3) for rate in rates],
        "ratio": round(ratio, 3),
        "bars": {f"annotate >= {_BAR} bare": ratio >= _BAR},
    }


def _loops(bare: list[float], rounds: int) -> list[float]:
    """The loop's rate in each round, which may have several of them around its runs."""
    each = max(1, len(bare) // rounds)
    return [statistics.mean(bare[each * number : each * (number + 1)]) for number in range(rounds)]


def show(result: dict[str, Any], folder: Path = RESULTS) -> str:
    """The table of ``throughput``, and its plot."""
    ours = result["annotate_per_s_by_round"]
    bare = result.get("bare_per_s_by_round") or [result["bare_per_s"]]
    rates = {"bare models": _loops(bare, len(ours))}
    if several := result.get("processes_per_s_by_round"):
        rates["bare models, a process a core"] = _loops(several, len(ours))
    return plots.compared("annotate_throughput", rates | {"annotate": ours}, "photos/s", _BAR, folder)


def _loop(side: list[Apart], photos: list[Path]) -> float:
    """Seconds until each of these processes has done its share of the photos."""
    started = time.perf_counter()
    with ThreadPoolExecutor(len(side)) as threads:
        list(threads.map(lambda number: side[number].call("run", photos[number :: len(side)]), range(len(side))))
    return time.perf_counter() - started


def _turns(
    config: AnnotateBenchmark,
    photos: list[Path],
    work: Path,
    loops: dict[str, list[Apart]],
    measured: list[dict[str, Any]],
) -> None:
    """All rounds, added to what has been measured."""
    for _ in range(config.rounds):
        for step in config.steps.split(","):
            if step in loops:
                # of those by which the long run is longer than the short one
                chosen = photos[config.short :][: config.bare]
                seconds = _loop(loops[step], chosen)
            else:
                chosen = photos[: config.long if step == "long" else config.short]
                seconds = _annotate(config, chosen, work / step)
            measured.append({"step": step, "photos": len(chosen), "seconds": round(seconds, 2)})
            print(measured[-1], flush=True)


def _annotate(config: AnnotateBenchmark, photos: list[Path], folder: Path, *options: str) -> float:
    """Seconds of the program, from its start to its end, on just these photos."""
    link(photos, folder)
    output = folder.with_name(f"{folder.name}-records")
    shutil.rmtree(output, ignore_errors=True)
    os.sync()  # what was written before is not this one's to wait for
    started = time.perf_counter()
    subprocess.run([*command(config, folder, output), *options], env=environment(), cwd=_ROOT, check=True)
    return time.perf_counter() - started


# ------------------------------------------------------------------------------------------------------------ growth


def growth(config: AnnotateBenchmark, photos: list[Path], work: Path) -> dict[str, Any]:
    """Seconds for every size beyond those of `short` photos, start-up among them, in rounds that go up and down."""
    from benchmarks.training import random_vit

    random_vit(work / "vit", 64, 2, 64)
    options = ("--tasks", "detect", "--detector.uri", str(work / "vit"))
    sizes = [config.short, *sorted(config.sizes)]
    photos = enough(photos, sizes[-1], work / "repeated")
    rows = []
    for number in range(config.rounds):
        for count in sizes if number % 2 == 0 else sizes[::-1]:
            seconds = _annotate(config, photos[:count], work / "some", *options)
            rows.append({"photos": count, "seconds": round(seconds, 2)})
            print(rows[-1], flush=True)
    taken = {count: statistics.median(row["seconds"] for row in rows if row["photos"] == count) for count in sizes}
    thousand = {
        str(count): round((taken[count] - taken[config.short]) * 1000 / (count - config.short), 3)
        for count in sizes[1:]
    }
    return {
        "rows": rows,
        "shard_pictures": config.shard_pictures,
        "short": config.short,
        "seconds_per_thousand": thousand,
        "largest_to_smallest": round(thousand[str(sizes[-1])] / thousand[str(sizes[1])], 3),
    }


def show_growth(result: dict[str, Any], folder: Path = RESULTS) -> str:
    """The table of ``growth``, and its plot."""
    costs = {int(count): {"detect": seconds} for count, seconds in result["seconds_per_thousand"].items()}
    return plots.growth("annotate_growth", costs, {"detect": "annotate, detection by a ViT of two layers"}, folder)


# ------------------------------------------------------------------------------------------------------------- kills

#: What is killed at which share of the shards. Whatever the driver's Ray had in work dies with the driver.
_KILLS = (
    *((0.1, "driver"), (0.25, "CaptionerStage")),
    *((0.4, "driver"), (0.55, "TaggerStage")),
    *((0.7, "driver"), (0.85, "DetectorStage")),
)
#: The undisturbed run is made in so many pieces, each of whole shards: for a machine that is only lent for minutes.
_PIECES = 4


def _published(output: Path) -> int:
    return len(list((output / FOLDER).glob("*.parquet"))) if (output / FOLDER).is_dir() else 0


def _worker(driver: subprocess.Popen[bytes], stage: str) -> psutil.Process | None:
    """A worker of this driver's own Ray that runs a stage."""
    for process in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if stage in " ".join(process.cmdline()):
                return process
    return None


def undisturbed(config: AnnotateBenchmark, photos: list[Path], work: Path) -> Iterator[float]:
    """Runs that nothing happens to, over the same shards; yields the seconds of each that was not done before."""
    shards = -(-len(photos) // config.shard_pictures)
    size = -(-shards // _PIECES) * config.shard_pictures
    for piece, first in enumerate(range(0, len(photos), size)):
        output = work / f"undisturbed-{piece}"
        if (output / "manifest.json").is_file():
            continue
        shutil.rmtree(output, ignore_errors=True)
        folder = link(photos[first : first + size], work / f"photos-{piece}")
        started = time.monotonic()
        subprocess.run(command(config, folder, output), env=environment(), cwd=_ROOT, check=True)
        yield time.monotonic() - started


def disturbed(config: AnnotateBenchmark, folder: Path, output: Path, shards: int) -> Iterator[dict[str, Any]]:
    """One run with SIGKILLs in it; yields after each kill of the driver, and at the end, with what was killed."""
    killed = json.loads(_journal(output).read_text()) if _journal(output).is_file() else []
    while not (output / "manifest.json").is_file():
        driver = subprocess.Popen(command(config, folder, output), env=environment(), cwd=_ROOT)
        while driver.poll() is None:
            share, what = _KILLS[len(killed)] if len(killed) < len(_KILLS) else (2.0, "")
            done = _published(output)
            process = None
            if done >= share * shards:
                process = psutil.Process(driver.pid) if what == "driver" else _worker(driver, what)
            if process is not None:
                process.kill()
                killed.append({"what": what, "pid": process.pid, "shards_done": done})
                _journal(output).write_text(json.dumps(killed))
                print(killed[-1], flush=True)
            time.sleep(1)
        if driver.returncode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the run ended with {driver.returncode}")
        yield {"kills": killed}


def _journal(output: Path) -> Path:
    return output.with_suffix(".kills.json")


def compare(wanted: list[str], plain: list[Annotation], killed: list[Annotation]) -> dict[str, Any]:
    """How far the records of two runs agree."""
    ids = [record.id for record in killed]
    other = {record.id: record for record in plain}
    both = [(other[record.id], record) for record in killed if record.id in other]
    difference = [
        abs(a.detection.ai_probability - b.detection.ai_probability) for a, b in both if a.detection and b.detection
    ]
    captions = [a.caption == b.caption for a, b in both]
    tags = [a.tags == b.tags for a, b in both]
    same = {"captions": sum(captions) / len(both), "tags": sum(tags) / len(both)}
    return {
        "records": len(killed),
        "duplicates": len(ids) - len(set(ids)),
        "lost": len(set(wanted) - set(ids)),
        "errors": sum(bool(record.errors) for record in killed),
        "largest_difference_of_probability": max(difference),
        "same": same,
        "bars": {
            "exact ids, each once": sorted(ids) == sorted(wanted),
            "probabilities within 0.02": max(difference) <= 0.02 and len(difference) == len(wanted),
            "captions >= 98 % the same": same["captions"] >= 0.98,
            "tags >= 98 % the same": same["tags"] >= 0.98,
        },
    }


def kills(config: AnnotateBenchmark, photos: list[Path], work: Path) -> dict[str, Any] | None:
    """Annotate twice, once with kills, and compare; None while steps are left to do."""
    chosen = photos[: config.count]
    folder, output = work / "photos", work / "killed"
    if not folder.is_dir():
        link(chosen, folder)
    for _ in disturbed(config, folder, output, -(-len(chosen) // config.shard_pictures)):
        if config.one_step:
            return None
    for seconds in undisturbed(config, chosen, work):
        print(f"a piece without kills took {seconds:.0f} s", flush=True)
        if config.one_step:
            return None
    plain = [record for place in sorted(work.glob("undisturbed-*")) for record in read_annotations(str(place))]
    compared = compare([photo.name for photo in chosen], plain, list(read_annotations(str(output))))
    return {"kills": json.loads(_journal(output).read_text())} | compared


# --------------------------------------------------------------------------------------------------------------- llm


def _own_stage(captions: list[str], shard: int) -> list[list[str]]:
    """Tags by the stage of bulk annotation."""
    import numpy as np
    import ray
    from ray.data import ActorPoolStrategy

    from data.annotate_stages import ModelName, TaggerStage
    from deployments.annotation import Caption
    from deployments.checkpoints import resolve
    from deployments.tagger import TaggerSettings

    checkpoint = resolve("starter:tagger")
    records = [
        Annotation(id=f"{index:06}", sha256="0" * 64, caption=Caption(text=text)).model_dump_json()
        for index, text in enumerate(captions)
    ]
    blocks = [pa.table({"record": records[first : first + shard]}) for first in range(0, len(records), shard)]
    stream = ray.data.from_blocks(blocks).map_batches(
        TaggerStage,
        fn_constructor_args=(
            ModelName(checkpoint.uri, checkpoint.revision),
            TaggerSettings(threads=os.cpu_count() or 1),
        ),
        compute=ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=2),
        batch_size=None,
        batch_format="numpy",
        num_cpus=0.5,
    )
    tagged = [
        Annotation.model_validate_json(text)
        for batch in stream.iter_batches(batch_size=None)
        for text in np.asarray(batch["record"])
    ]
    return [record.tags or [] for record in sorted(tagged, key=lambda record: record.id)]


def _ray_data_llm(captions: list[str], batch: int) -> list[list[str]]:
    """Tags by ``ray.data.llm``."""
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    from deployments.checkpoints import resolve
    from deployments.tag_rules import clean_tags
    from deployments.tagger import ANSWER, TaggerSettings, engine_arguments, engine_environment, load_prompt

    settings = TaggerSettings(threads=os.cpu_count() or 1)
    prompt = load_prompt()
    share = {"num_cpus": 0.1}
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=str(resolve("starter:tagger").folder),
            engine_kwargs=engine_arguments(settings) | {"distributed_executor_backend": "mp"},
            runtime_env={"env_vars": engine_environment(settings)},
            placement_group_config={"bundle_per_worker": {"CPU": 0.5}},
            batch_size=batch,
            concurrency=1,
            log_engine_metrics=False,
            chat_template_stage={"enabled": True, **share},
            tokenize_stage={"enabled": True, **share},
            detokenize_stage={"enabled": True, **share},
        ),
        preprocess=lambda row: {
            "messages": prompt.messages(row["caption"]),
            "sampling_params": {
                "temperature": 0,
                "max_tokens": settings.max_tokens,
                "structured_outputs": {"regex": ANSWER},
            },
        },
        postprocess=lambda row: {"index": row["index"], "tags": clean_tags(row["generated_text"], row["caption"])},
        preprocess_map_kwargs=share,
        postprocess_map_kwargs=share,
    )
    rows = [{"index": index, "caption": text} for index, text in enumerate(captions)]
    blocks = [pa.Table.from_pylist(rows[first : first + batch]) for first in range(0, len(rows), batch)]
    tagged = processor(ray.data.from_blocks(blocks)).take_all()
    return [list(row["tags"]) for row in sorted(tagged, key=lambda row: row["index"])]


def llm(config: AnnotateBenchmark, photos: list[Path], work: Path) -> dict[str, Any]:
    """Both ways over the same captions, in alternating rounds."""
    from data.session import RaySettings, ray_session

    assert config.captions, "--captions names the folder of an annotation"
    captions = [record.caption.text for record in read_annotations(str(config.captions)) if record.caption]
    ways = {"stage": _own_stage, "ray_data_llm": _ray_data_llm}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    tags: dict[str, list[list[str]]] = {}
    with ray_session(RaySettings()):
        for _ in range(config.rounds):
            for name, way in ways.items():
                seconds = []
                for count in (config.short, config.long):
                    started = time.perf_counter()
                    tags[name] = way(captions[:count], 64)
                    seconds.append(time.perf_counter() - started)
                rates[name].append((config.long - config.short) / (seconds[1] - seconds[0]))
                print(name, [round(value, 1) for value in seconds], f"{rates[name][-1]:.2f}/s", flush=True)
    same = sum(a == b for a, b in zip(*tags.values(), strict=True)) / config.long
    medians = {name: round(statistics.median(values), 2) for name, values in rates.items()}
    return {"per_s": medians, "by_round": rates, "same_tags": same, "captions": [config.short, config.long]}


def main(arguments: list[str] | None = None) -> None:
    """Run the chosen parts and write ``results/annotate_PART.json``."""
    from pydantic_settings import CliApp

    config = CliApp.run(AnnotateBenchmark, cli_args=arguments)
    photos = sorted(path for path in config.photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    with tempfile.TemporaryDirectory() as temporary:
        work = config.work or Path(temporary)
        for part, measure in (("throughput", throughput), ("growth", growth), ("kills", kills), ("llm", llm)):
            if part in config.parts.split(","):
                result = measure(config, photos, work)
                if result is not None:
                    print(_told(part, result), write_result(f"annotate_{part}", result), sep="\n", flush=True)


def _told(part: str, result: dict[str, Any]) -> str:
    if part == "growth":
        return show_growth(result)
    return show(result) if part == "throughput" and "ratio" in result else json.dumps(result, indent=1)


if __name__ == "__main__":
    main()
