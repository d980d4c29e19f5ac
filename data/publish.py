"""From curated pictures to a finished version: rules, version hash, shards, rejects, manifest, and it appears at once.

In: pictures with group and split, rejects, settings. Out: ``NAME/VERSION/``. Locally it is put together beside its
place and renamed; on S3, which cannot rename, the manifest is written last, and readers take nothing without it. Knows
no layout of raw data.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from data.captions import clean_caption
from data.curate import Curated
from data.errors import DataError
from data.layouts import Reject
from data.locations import Location
from data.passes import Pictures, Timing, plan_shards, write_parquet, write_shards
from data.rules import RuleSettings, enforce, run_rules
from data.versions import (
    LAYOUT,
    MANIFEST,
    REJECTS,
    SCHEMAS,
    SPLITS,
    Check,
    DatasetName,
    DataVersion,
    Manifest,
    Split,
    open_version,
)

#: Goes up when the same input and settings give another result than before.
_REVISION = 2
_REJECTS_FILE = "rejects/00000.parquet"


def made_by() -> str:
    """What a version depends on besides input and settings: layout and revision of this program."""
    return f"layout {LAYOUT}, revision {_REVISION}"


def digest(value: Any) -> str:
    """sha256 of a value's JSON, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Content:
    """What a version is to consist of."""

    name: DatasetName
    pictures: list[Curated]
    rejects: list[Reject]
    listed: int
    """Rows of the raw lists, and verified items."""
    settings: dict[str, Any]
    seed: int
    wanted: tuple[Split, ...]
    """Splits that must not be empty."""
    place: str
    """Where the raw data lie; the version does not depend on it."""
    fingerprint: str
    """Hash of the raw data's listing, the settings and ``made_by``, by which a later run knows that there is nothing to
    do."""

    def version(self) -> str:
        """12 hexadecimal digits over content and settings."""
        total = hashlib.sha256(f"{made_by()}, {digest(self.settings)}\n".encode())
        for picture in sorted(self.pictures, key=lambda p: p.particulars.id):
            row = [picture.particulars.id, picture.group, picture.split, *astuple(picture.row)]
            total.update(json.dumps(row).encode() + b"\n")
        for reject in sorted((r.file_name, r.reason, r.label or "") for r in self.rejects):
            total.update(json.dumps(reject).encode() + b"\n")
        return total.hexdigest()[:12]

    def of(self, split: Split) -> list[Curated]:
        """Pictures of a split in the order of their ids, which is as good as shuffled."""
        return sorted((p for p in self.pictures if p.split == split), key=lambda p: p.particulars.id)


def publish(
    content: Content,
    rules: RuleSettings,
    folder: Location,
    pictures: Pictures,
    workers: int,
    names: Mapping[str, str] | None = None,
    say: Callable[[str], None] = print,
) -> tuple[DataVersion, bool, Timing]:
    """Write a version, unless it is there.

    Args:
        content: what it consists of.
        rules: what must hold.
        folder: of the data set; the version appears in it.
        pictures: the reader of the original bytes.
        workers: processes that write.
        names: id -> what ``pictures`` calls it, where that is not its file name.
        say: told about progress.

    Returns:
        the version, whether this call made it, and how long shards took.

    Raises:
        DataError: a rule failed, or the place cannot be written.
    """
    checks = run_rules(content.pictures, content.rejects, content.listed, content.wanted, rules)
    for name in enforce(checks, rules):
        say(f"warning: rule {name} failed and was allowed to: {checks[name].detail}")
    target = folder / content.version()
    if (target / MANIFEST).exists():
        return open_version(target), False, Timing()

    staging = folder / ".work" / f"version-{target.name}" if target.is_local else target
    schema = SCHEMAS[content.name]
    shards = []
    for split in SPLITS:
        rows = content.of(split)
        ids = [row.particulars.id for row in rows]
        named = [names[id_] for id_ in ids] if names is not None else [row.row.file_name for row in rows]
        shards += plan_shards(split, named, [_row(row, content.name) for row in rows])
    timing = write_shards(pictures, shards, schema, staging, workers, say)
    rejects = [
        asdict(reject) for reject in sorted(content.rejects, key=lambda r: (r.file_name, r.reason, r.label or ""))
    ]
    files = {split: [shard.path for shard in shards if shard.path.startswith(f"{split}/")] for split in SPLITS}
    with (staging / _REJECTS_FILE).writing() as file:
        write_parquet(pa.Table.from_pylist(rejects, REJECTS), file)
    manifest = _manifest(content, target.name, checks, files | {"rejects": [_REJECTS_FILE]})
    listed = {path for paths in manifest.files.values() for path in paths}
    for entry in staging.files():  # halves that a killed run left
        if entry.name not in listed:
            (staging / entry.name).remove()
    (staging / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")
    if staging != target:
        try:
            staging.publish(target)
        except DataError:
            if not (target / MANIFEST).exists():
                raise
            return open_version(target), False, timing  # another run was as fast
    return open_version(target), True, timing


def _row(picture: Curated, name: DatasetName) -> dict[str, Any]:
    """A row of the version without the picture's bytes."""
    what, row = asdict(picture.particulars), picture.row
    del what["pixels"]
    what |= {"file_name": row.file_name, "source": row.source, "generator": row.generator}
    what |= {"group": picture.group, "split": picture.split}
    if name == "flickr30k":
        return what | {"captions": [clean_caption(text) for text in row.captions], "raw_captions": list(row.captions)}
    return what | {"label": row.label}


def _manifest(content: Content, version: str, checks: dict[str, Check], files: dict[str, list[str]]) -> Manifest:
    by_split = {split: content.of(split) for split in SPLITS}
    sizes = Counter(picture.group for picture in content.pictures)
    captioned = content.name == "flickr30k"
    labels = {split: Counter(p.row.label for p in rows if p.row.label) for split, rows in by_split.items()}
    return Manifest(
        name=content.name,
        version=version,
        created_at=datetime.now(UTC).isoformat(timespec="microseconds"),
        settings=content.settings,
        seed=content.seed,
        input=content.place,
        input_fingerprint=content.fingerprint,
        input_rows=content.listed,
        counts={split: len(rows) for split, rows in by_split.items()},
        image_bytes={split: sum(p.particulars.bytes for p in rows) for split, rows in by_split.items()},
        class_balance={} if captioned else {split: _sorted(counter) for split, counter in labels.items()},
        captions={split: sum(len(p.row.captions) for p in rows) for split, rows in by_split.items()}
        if captioned
        else {},
        sources=_sorted(Counter(p.row.source for p in content.pictures)),
        verified={split: sum(p.verified for p in rows) for split, rows in by_split.items()}
        if "feedback" in content.settings
        else {},
        generators=_sorted(Counter(p.row.generator or "unknown" for p in content.pictures)),
        groups={
            "groups": len(sizes),
            "larger_than_one": sum(size > 1 for size in sizes.values()),
            "largest": max(sizes.values(), default=0),
        },
        rejects=_sorted(Counter(reject.reason for reject in content.rejects)),
        checks=checks,
        files=files,
    )


def _sorted(counter: Counter[Any]) -> dict[str, int]:
    return {str(key): counter[key] for key in sorted(counter, key=str)}
