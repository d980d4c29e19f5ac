"""A trained checkpoint in its place: a folder or ``s3://``, where nothing but a checkpoint is ever replaced.

Knows no run and no registry.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from data.locations import Location
from train.module import TrainingError

#: What the names of a checkpoint's files end with: nothing else is replaced.
_CHECKPOINT = (".json", ".safetensors", ".txt", ".model", ".jinja", ".onnx")


def check_output(target: Location) -> set[str]:
    """Refuse a place in whose stead no checkpoint may be put: what is there is lost. Returns the names of its files.

    Raises:
        TrainingError: it is a link or a file, or holds something else than one checkpoint that was published there.
    """
    if target.is_local:
        path = target.local_path
        if path.is_symlink():
            raise TrainingError(f"--output {path} is a link to {path.readlink()}: name that folder, or another")
        if path.exists() and (not path.is_dir() or path.is_mount()):
            what = "the root of a file system" if path.is_dir() else "a file"
            raise TrainingError(f"--output {path} is {what}: name a folder, in one that exists or is made")
    there = target.entries()
    needed = {"config.json", "card.json"} if target.is_local else {"config.json"}  # a killed publication has no card
    strange = sorted(name for name, plain in there.items() if not plain or not name.endswith(_CHECKPOINT))
    if strange or (there and not needed <= set(there)):
        what = f"it holds {', '.join(strange[:5])}" if strange else f"it has no {' and '.join(needed - set(there))}"
        raise TrainingError(
            f"--output {target} would be replaced and is no checkpoint of a training ({what}): name a folder of its "
            f"own, as {target / 'NAME'}, or empty this one"
        )
    return set(there)


def publish(folder: Path, target: Location) -> None:
    """Put a finished checkpoint folder in its place, in the stead of an older one; on S3 nothing of that stays, and the
    card comes last.

    Raises:
        TrainingError: what is there is no checkpoint.
    """
    there = check_output(target)
    if target.is_local:
        target.parent.make_dir()
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.local_path.parent))
        for file in folder.iterdir():
            shutil.copyfile(file, partial / file.name)
        partial.chmod(0o755)
        target.remove()
        partial.rename(target.local_path)
        return
    files = {file.name: file for file in folder.iterdir()}
    # without its card it is no finished checkpoint, by its configuration it is one that may be replaced
    (target / "card.json").remove()
    for name in there - set(files):
        (target / name).remove()
    for name in sorted(files, key=lambda name: (name == "card.json", name != "config.json")):
        target.filesystem.put_file(str(files[name]), (target / name).path)


def is_published(export: Location, target: Location) -> bool:
    """Whether a run's checkpoint is in its place already: the weights, and a card of the same moment. What was added
    there since (a reference for drift) is no other checkpoint."""
    there = {entry.name: entry.size for entry in target.files()} if target.exists() else {}
    weights = [entry for entry in export.files() if entry.name.endswith(".safetensors")]
    if "card.json" not in there or any(there.get(entry.name) != entry.size for entry in weights):
        return False
    made = [json.loads((folder / "card.json").read_text()).get("created_at") for folder in (export, target)]
    names = [entry.name for entry in weights]
    return made[0] == made[1] and all(digest_of(export / name) == digest_of(target / name) for name in names)


def digest_of(file: Location) -> str:
    digest = hashlib.sha256()
    with file.open() as opened:
        while block := opened.read(2**22):
            digest.update(block)
    return digest.hexdigest()
