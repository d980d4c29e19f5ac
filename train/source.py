"""Which code this is, where it came without its repository: in an image, or as a Ray job's working directory (Ray
leaves ``.git`` behind).

In: the folders of the packages that training runs through. Out: the first digits of the git tree that each of them is.
Nobody has to pass anything on, and the commit is found again in the repository:

    git log --all --format=%H | while read c; do echo $c $(git rev-parse $c:train); done | grep DIGITS

Knows no MLflow.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_ROOT = Path(__file__).parent.parent
#: What a trained model depends on.
PACKAGES = ("train", "data", "deployments")


def tree_of(folder: Path) -> str:
    """Git's name of a folder, as ``git rev-parse COMMIT:FOLDER`` says it; compiled Python does not count, and no file
    is taken for a program: unpacking an archive may lose that, and these packages have none."""
    entries: list[tuple[bytes, bytes]] = []
    for path in folder.iterdir():
        if path.name == "__pycache__":
            continue
        name = path.name.encode()
        if path.is_dir():
            entries.append((name + b"/", b"40000 " + name + b"\0" + bytes.fromhex(tree_of(path))))
        else:
            entries.append((name, b"100644 " + name + b"\0" + _object(b"blob", path.read_bytes())))
    return _object(b"tree", b"".join(entry for _, entry in sorted(entries))).hex()


def describe_trees(root: Path = _ROOT) -> str:
    """``trees train 1a2b3c…, data …, deployments …``."""
    return "trees " + ", ".join(f"{name} {tree_of(root / name)[:12]}" for name in PACKAGES)


def _object(kind: bytes, content: bytes) -> bytes:
    return hashlib.sha1(kind + b" %d\0" % len(content) + content, usedforsecurity=False).digest()
