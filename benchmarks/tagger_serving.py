"""Speed of the served tagger beside vLLM offline, same captions, same prompt, same engine arguments, one run.

The two engines are up at the same time and take turns, ``--repeats`` times each, so that whatever else the machine does
hits both alike; the median of the repeats' ratios is the figure. In: a checkpoint URI and a folder with
``captions.txt``. Out: ``results/tagger_serving.json`` and a plot. Starts a Ray of its own unless ``RAY_ADDRESS`` names
one, and stops what it started.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.load import paired
from benchmarks.report import RESULTS, write_result
from benchmarks.tagger_quality import read_flickr
from deployments.checkpoints import resolve
from deployments.offline_tagger import OfflineTagger
from deployments.tagger import (
    TaggerSettings,
    build_tagger,
    engine_arguments,
    engine_environment,
)

RESULT = RESULTS / "tagger_serving.json"
#: Of the offline engine's rate.
_BAR = 0.75


async def _served(handle: Any, captions: list[str], clients: int) -> float:
    """Seconds that ``clients`` clients without think time take for all captions through the Serve handle."""
    waiting = iter(captions)

    async def client() -> None:
        for caption in waiting:
            await handle.tag.remote(caption)

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - started


def show(result: dict[str, Any], folder: Path = RESULTS, name: str = RESULT.stem) -> str:
    """The table, and its plot."""
    rates = {"vLLM offline": result["offline_per_s"], "served": result["served_per_s"]}
    return plots.compared(name, rates, "captions/s", _BAR, folder)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description="served tagger against vLLM offline")
    parser.add_argument("--flickr", type=Path, required=True, help="folder with captions.txt")
    parser.add_argument("--uri", default="starter:tagger")
    parser.add_argument("--requests", type=int, default=64, help="in each repeat")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    # the offline engine gets as many requests at a time as there are clients: the same batch on both sides
    settings = TaggerSettings(
        uri=options.uri, threads=options.threads, dtype=options.dtype, max_num_seqs=options.clients
    )
    os.environ.update(engine_environment(settings))
    captions = [row["caption"] for row in read_flickr(options.flickr, options.requests * options.repeats, seed=1)]

    import ray
    from ray import serve

    ray.init(num_cpus=4, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    try:
        started = time.perf_counter()
        handle = serve.run(build_tagger(settings, "Tagger"), name="tagger", route_prefix=None)
        ready_s = time.perf_counter() - started

        engine = OfflineTagger(resolve(options.uri), settings)
        asyncio.run(_served(handle, captions[:2], 2))
        engine.answer(captions[:2])
        served, offline = [], []
        for repeat in range(options.repeats):
            part = captions[repeat * options.requests : (repeat + 1) * options.requests]
            for way in ("offline", "served") if repeat % 2 == 0 else ("served", "offline"):
                if way == "served":
                    served.append(len(part) / asyncio.run(_served(handle, part, options.clients)))
                else:
                    begun = time.perf_counter()
                    engine.answer(part)
                    offline.append(len(part) / (time.perf_counter() - begun))
            print(f"repeat {repeat}: offline {offline[-1]:.2f}/s, served {served[-1]:.2f}/s", flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()
    ratio = paired(served, offline)
    result = {
        "threads": engine_environment(settings).get("OMP_NUM_THREADS"),
        "dtype": engine_arguments(settings)["dtype"],
        "clients": options.clients,
        "requests_per_repeat": options.requests,
        "served_per_s": served,
        "offline_per_s": offline,
        "served_to_offline": ratio,
        "replica_ready_s": ready_s,
        "load_average": os.getloadavg(),
        "bars": {f"served >= {_BAR} offline": ratio >= _BAR},
    }
    folder, name = options.output.parent, options.output.stem
    print(show(result, folder, name), write_result(name, result, folder), sep="\n")


if __name__ == "__main__":
    main()
