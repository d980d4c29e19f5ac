"""The starter models: ``starter:detector``, ``starter:captioner`` and ``starter:tagger``, built once on each machine.

In: the trained halves that are committed in ``starter_weights/`` and the towers of ``deployments.towers``. Out:
complete checkpoint folders under the cache, each published by rename when complete and locked while being built, so
that two starts at a time build it once.

    python -m deployments.starter        builds whatever is missing and prints where it lies
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from deployments.checkpoints import CheckpointError, cache_root, publish, resolve, scratch_folder

_WEIGHTS = Path(__file__).parent / "starter_weights"
_DIGESTS = ".sha256.json"
#: Raise when a builder below changes what it writes: folders of the old kind are then built anew.
_FORMAT = 1


def _build_detector(target: Path) -> None:
    from deployments.detector_model import assemble_detector

    assemble_detector(target)


def _build_captioner(target: Path) -> None:
    from deployments.captioner_model import assemble_captioner

    assemble_captioner(_WEIGHTS / "captioner", target)


def _build_tagger(target: Path) -> None:
    from deployments.towers import convert_smollm2

    convert_smollm2(target)
    shutil.copy(_WEIGHTS / "tagger" / "card.json", target / "card.json")


_BUILDERS: dict[str, Callable[[Path], None]] = {
    "detector": _build_detector,
    "captioner": _build_captioner,
    "tagger": _build_tagger,
}


def ensure_starter(name: str) -> Path:
    """The folder of a starter model, built first if this machine does not have it (5 to 30 s each).

    Raises:
        CheckpointError: no starter of that name, a committed or packaged weight file is missing, or the folder is
        damaged.
    """
    if name not in _BUILDERS:
        raise CheckpointError(f"no starter model {name!r}; there are {', '.join(_BUILDERS)}")
    source = _WEIGHTS / name
    if not (source / "card.json").is_file():
        raise CheckpointError(f"starter:{name}: {source} is missing; check the repository out again")
    target = cache_root() / "starter" / f"{name}-{_source_digest(source)}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            build = scratch_folder(target)
            try:
                _BUILDERS[name](build)
                (build / _DIGESTS).write_text(json.dumps(_digests(build)))
                publish(build, target)
            except (OSError, RuntimeError) as error:
                raise CheckpointError(f"starter:{name} could not be built: {error}") from error
            finally:
                shutil.rmtree(build, ignore_errors=True)
        else:
            _verify(name, target)
    return target


def _verify(name: str, folder: Path) -> None:
    """Compare a built folder with the digests written when it was built."""
    remedy = f"remove {folder} and start again: it is rebuilt in seconds"
    try:
        expected = json.loads((folder / _DIGESTS).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"starter:{name} is damaged ({_DIGESTS}: {error}); {remedy}") from error
    found = _digests(folder)
    if found != expected:
        damaged = sorted(file for file in expected if found.get(file) != expected[file])
        raise CheckpointError(f"starter:{name} is damaged ({', '.join(damaged) or 'unexpected files'}); {remedy}")


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != _DIGESTS:
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _source_digest(folder: Path) -> str:
    digest = hashlib.sha256(f"{_FORMAT}".encode())
    for name, value in _digests(folder).items():
        digest.update(f"{name}{value}".encode())
    return digest.hexdigest()[:12]


def main() -> None:
    """Build all three and print them."""
    for name in _BUILDERS:
        checkpoint = resolve(f"starter:{name}")
        print(f"{checkpoint.name:36} {checkpoint.folder}", flush=True)


if __name__ == "__main__":
    main()
