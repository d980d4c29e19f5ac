"""The bounds: the engine alone on views that are ready, with decoding, and the matrix product that it is made of.

Prints one line of JSON. Started by ``benchmarks.peers`` in a process of its own, in every round.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.peers.model import Detector


def rate(run: Callable[[], int], seconds: float) -> tuple[float, float]:
    """(pictures a second, seconds of a core for a picture) over at least so long."""
    run()
    done, begun, worked = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - begun < seconds:
        done += run()
    return done / (time.perf_counter() - begun), (time.process_time() - worked) / done


def product(device: str, dtype: torch.dtype, seconds: float, side: int = 2048) -> float:
    """Operations a second of a matrix product."""
    left, right = (torch.rand(side, side, dtype=torch.float32).to(device, dtype) for _ in range(2))
    per_s, _ = rate(lambda: int((left @ right).float()[0, 0].item() > -1), seconds)
    return per_s * 2 * side**3


def operations(detector: Detector, views: np.ndarray) -> float:
    """Of one picture's forward pass, by PyTorch's own count."""
    from torch.utils.flop_counter import FlopCounterMode

    engine, detector.engine = detector.engine, None
    with FlopCounterMode(display=False) as counter:
        detector.probabilities(views[:1])
    detector.engine = engine
    return float(counter.get_total_flops())


def main(folder: str, batch: str, seconds: str) -> None:
    """Measure on a folder's photos."""
    detector = Detector()
    files = sorted(path for path in Path(folder).iterdir() if path.suffix == ".jpg")
    data = [file.read_bytes() for file in files[: int(batch)]]
    views = np.stack([detector.view(each) for each in data])

    def decoded() -> int:
        return len(detector.probabilities(np.stack([detector.view(each) for each in data])))

    engine_per_s, engine_cpu_s = rate(lambda: len(detector.probabilities(views)), float(seconds))
    decoded_per_s, decoded_cpu_s = rate(decoded, float(seconds))
    flops = product(detector.device, detector.dtype, float(seconds) / 3)
    each = operations(detector, views)
    print(
        json.dumps(
            {
                "engine": detector.engine[0].name if detector.engine else f"pytorch {detector.dtype}",
                "engine_per_s": engine_per_s,
                "engine_cpu_s_each": engine_cpu_s,
                "with_decoding_per_s": decoded_per_s,
                "with_decoding_cpu_s_each": decoded_cpu_s,
                "matrix_product_gflops": flops / 1e9,
                "picture_gflop": each / 1e9,
                "roofline_per_s": flops / each,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
