"""Features of a frozen image tower, computed once and kept on disk, so that an epoch of a head or decoder is cheap.

In: an encoder (a function from pictures to an array), the pictures' ids and bytes. Out: ``NAME/features.npy``
(float16, one row a picture) and ``NAME/ids.json``, published by rename when complete; a killed run continues where it
was.

Knows no model and no task.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

Encoder = Callable[[list[bytes]], np.ndarray]


def cached_features(
    folder: Path,
    ids: Sequence[str],
    read: Callable[[str], bytes],
    encode: Encoder,
    shape: tuple[int, ...],
    batch_size: int = 8,
) -> np.ndarray:
    """Features of ``ids`` in their order, shape ``(len(ids), *shape)``, float16, memory-mapped from ``folder``.

    Args:
        folder: where the cache lives; its name must change whenever the encoder or its input does.
        ids: names of the pictures; a cache that holds exactly these is reused as it is.
        read: the encoded bytes of one picture.
        encode: bytes of up to ``batch_size`` pictures -> array ``(n, *shape)``.

    Raises:
        ValueError: the folder holds the features of other pictures.
    """
    features, listing = folder / "features.npy", folder / "ids.json"
    if listing.is_file():
        if json.loads(listing.read_text()) != list(ids):
            raise ValueError(f"{folder} holds features of other pictures; remove it or name another folder")
        return np.load(features, mmap_mode="r")

    folder.mkdir(parents=True, exist_ok=True)
    partial, done_file = folder / "features.partial.npy", folder / "done.txt"
    done = int(done_file.read_text()) if done_file.is_file() and partial.is_file() else 0
    rows = (
        np.lib.format.open_memmap(partial, mode="r+")
        if done
        else np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=(len(ids), *shape))
    )
    started, first = time.monotonic(), done
    while done < len(ids):
        names = ids[done : done + batch_size]
        rows[done : done + len(names)] = encode([read(name) for name in names])
        done += len(names)
        if done % (batch_size * 40) < batch_size or done == len(ids):
            rows.flush()
            done_file.write_text(str(done))
            rate = (done - first) / (time.monotonic() - started)
            print(
                f"features: {done}/{len(ids)}, {rate:.1f}/s, {(len(ids) - done) / rate / 60:.1f} min left", flush=True
            )
    rows.flush()
    del rows
    partial.replace(features)
    listing.write_text(json.dumps(list(ids)))
    done_file.unlink(missing_ok=True)
    return np.load(features, mmap_mode="r")
