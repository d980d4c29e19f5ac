"""Small finished versions, written by the schema of ``data.versions`` in a moment and without Ray."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.captions import clean_caption
from data.identify import identify
from data.versions import REJECTS, SCHEMAS, SPLITS, Check, DatasetName, Manifest
from deployments.images import ImageLimits
from tests.data.made import encoded, picture

_REJECTED = [
    {"file_name": "cut.jpg", "reason": "truncated", "detail": "The file is cut off.", "id": None, "label": "ai"},
    {"file_name": "<i>gone</i>.jpg", "reason": "missing", "detail": "it is not there", "id": None, "label": None},
]


def write_version(
    folder: Path, name: DatasetName = "aivshuman", each: int = 8, leaks: bool = False, created: int = 0, seed: int = 0
) -> Path:
    """``folder/NAME/VERSION`` with ``each`` pictures a split, in pairs of a group; returns its path.

    Args:
        folder: where ``NAME`` is made.
        name: which data set.
        each: pictures a split.
        leaks: AI pictures are larger and of another JPEG quality than real ones.
        created: minute of ``created_at``: later versions are newer.
        seed: other pictures.
    """
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for place, split in enumerate(SPLITS):
        for number in range(each):
            ai = number % 4 >= 2
            size = (112, 112) if leaks and ai else (96, 72)
            # every second picture is the one before it, encoded again
            drawn = picture(seed + 1000 * place + number // 2, size)
            quality = (60 if leaks and ai else 90) - number % 2
            data = encoded(drawn, quality=quality)
            row = vars(identify(data, ImageLimits())) | {
                "image": data,
                "file_name": f"{split}/{number}.jpg",
                "source": "here" if number % 8 < 4 else "there",
                "generator": ("generator-1" if ai else "photo") if name == "aivshuman" else None,
                "split": split,
                "declared": ["exif:Make=Canon"] if number == 0 else [],
            }
            del row["pixels"]
            if name == "flickr30k":
                raw = [f"A dog, number {number}, runs {text} ." for text in ("fast", "far", "home", "away", "on")]
                row |= {"raw_captions": raw, "captions": [clean_caption(text) for text in raw]}
            else:
                row["label"] = ("ai" if ai else "human") if name == "aivshuman" else ("platform" if ai else "stock")
            rows[split].append(row)
        for first in range(0, each, 2):
            pair = rows[split][first : first + 2]
            for row in pair:
                row["group"] = min(other["id"] for other in pair)
    everything = [row for part in rows.values() for row in part]
    version = hashlib.sha256("".join(sorted(row["id"] for row in everything)).encode() + name.encode()).hexdigest()[:12]
    place_of = folder / name / version
    files = {}
    for split, part in rows.items():
        (place_of / split).mkdir(parents=True)
        files[split] = []
        # two shards of several row groups, as larger versions have
        for shard, half in enumerate((part[: each // 2], part[each // 2 :])):
            files[split].append(f"{split}/{shard:05d}.parquet")
            pq.write_table(pa.Table.from_pylist(half, SCHEMAS[name]), place_of / files[split][-1], row_group_size=3)
    (place_of / "rejects").mkdir()
    files["rejects"] = ["rejects/00000.parquet"]
    pq.write_table(pa.Table.from_pylist(_REJECTED, REJECTS), place_of / files["rejects"][0])
    labels = {split: dict(Counter(row["label"] for row in part if "label" in row)) for split, part in rows.items()}
    manifest = Manifest(
        name=name,
        version=version,
        created_at=f"2026-01-01T00:{created:02d}:00.000000+00:00",
        settings={"split": "shares", "seed": seed},
        seed=seed,
        input="/somewhere/raw & dirty",
        input_fingerprint="0" * 64,
        input_rows=len(everything) + len(_REJECTED),
        counts={split: len(part) for split, part in rows.items()},
        image_bytes={split: sum(row["bytes"] for row in part) for split, part in rows.items()},
        class_balance={} if name == "flickr30k" else labels,
        captions={split: 5 * len(part) for split, part in rows.items()} if name == "flickr30k" else {},
        sources=dict(Counter(row["source"] for row in everything)),
        generators=dict(Counter(row["generator"] or "unknown" for row in everything)),
        groups={"groups": len(everything) // 2, "larger_than_one": len(everything) // 2, "largest": 2},
        rejects=dict(Counter(row["reason"] for row in _REJECTED)),
        checks={
            "enough_pictures": Check(passed=True, detail="there are"),
            "few_rejects": Check(passed=False, detail="2"),
        },
        files=files,
    )
    (place_of / "manifest.json").write_text(manifest.model_dump_json(indent=1))
    return place_of
