"""Memory of a replica's process, in one of its own that runs with the allocator that replicas have."""

from __future__ import annotations

import os
import subprocess
import sys

from app import cluster
from benchmarks.processes import ALLOCATOR

#: What a network does: blocks of 24 MB, taken and let go of one after the other. The lines: page faults of the last
#: rounds, resident MB then, and after what is free has been handed back.
_LAYERS = """
import resource, sys
import numpy as np
from pathlib import Path
from deployments.memory import give_back, keep_freed

if sys.argv[1] == "keep":
    keep_freed()
def batch():
    layer = np.ones(3_000_000)
    for _ in range(4):
        layer = layer + 1
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 2**20
batch()
before = faults()
for _ in range(10):
    batch()
print(faults() - before)
print(resident_mb())
give_back()
print(resident_mb())
"""


def layers(way: str, allocator: bool = True) -> list[int]:
    own = {"MALLOC_CONF": cluster.environment(8000)["MALLOC_CONF"]}
    if allocator:
        own["LD_PRELOAD"] = ALLOCATOR["LD_PRELOAD"]
    ran = subprocess.run(
        [sys.executable, "-c", _LAYERS, way], env=os.environ | own, capture_output=True, text=True, check=True
    )
    return [int(line) for line in ran.stdout.split()]


def test_what_a_batch_has_let_go_of_is_kept_for_the_next_and_handed_back_when_told() -> None:
    faults, resident_mb, handed_back_mb = layers("keep")
    assert faults < 200
    assert resident_mb - handed_back_mb >= 24
    faults, *_ = layers("leave")
    assert faults > 10_000, "the allocator keeps it by itself: deployments/memory.py has no use any more"


def test_another_allocator_is_left_as_it_is() -> None:
    assert len(layers("keep", allocator=False)) == 3
