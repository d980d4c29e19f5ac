"""What the readers of all picture containers hand back: the metadata of a file, or that it is broken.

Knows no format.
"""

from __future__ import annotations

from dataclasses import dataclass, field

#: Of one metadata block, as much as this is kept.
MAX_BLOCK_BYTES = 1 << 20


class ContainerError(ValueError):
    """The container itself is broken or hostile: no decoder should be asked."""


@dataclass(frozen=True)
class Metadata:
    """What a file carries beside its pixels. Values are as they stand in the file, at most 1 MiB each."""

    exif: bytes | None = None
    """A TIFF structure, without the `Exif` prefix."""
    xmp: bytes | None = None
    texts: tuple[tuple[str, str], ...] = field(default=())
    """(keyword, value) of PNG text chunks and GIF comments, at most 64."""
    c2pa: bool = False
    """There is a C2PA block; whether it is sound is another question."""
