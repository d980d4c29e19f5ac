"""Raw data as they come: a folder or a zip file, local or on S3, with the same calls for both.

In: a location. Out: a ``RawInput`` that lists files and reads one by its name. Names are relative to the folder that
holds the lists, with ``/``, so that a folder and a zip of it have the same ones. Nothing is unpacked, so there is
nowhere for a zip to slip to; one that tries is refused all the same.

Knows no layout and no picture.
"""

from __future__ import annotations

import stat
import threading
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import PurePosixPath
from typing import IO, Any

from data.errors import DataError, explained
from data.locations import FileEntry, Location

#: Files fetched from S3 at once by one process: a request takes tens of milliseconds, decoding takes a few.
_S3_READS_AHEAD = 16


@dataclass(frozen=True)
class RawInput:
    """A folder, or a zip file with one in it. ``root`` is where the lists lie inside (empty: at the top)."""

    location: Location
    is_zip: bool
    root: str = ""

    @classmethod
    def of(cls, place: str) -> RawInput:
        """The input at a place.

        Raises:
            DataError: nothing is there, or it is neither a folder nor a zip file.
        """
        location = Location.of(place)
        if location.is_file():
            if not location.name.lower().endswith(".zip"):
                raise DataError(f"{location} is neither a folder nor a .zip file: give one of these as --input")
            return cls(location, is_zip=True)
        if not location.is_dir():
            # listing says more than "not there": a bucket that is missing or refuses
            if not location.is_local:
                location.files()
            raise DataError(f"{location} does not exist: give the folder or .zip of the raw data as --input")
        return cls(location, is_zip=False)

    def below(self, root: str) -> RawInput:
        """The same input with another ``root``."""
        return replace(self, root=root)

    def files(self) -> list[FileEntry]:
        """Every file below ``root``, sorted by name; a zip's tag is its checksum.

        Raises:
            DataError: it cannot be listed, the zip is damaged, or a name in it leads out of it.
        """
        entries = self._zip_files() if self.is_zip else self.location.files()
        if not self.root:
            return entries
        prefix = self.root + "/"
        return [replace(e, name=e.name.removeprefix(prefix)) for e in entries if e.name.startswith(prefix)]

    def _zip_files(self) -> list[FileEntry]:
        entries = []
        for info in _open_zip(self.location, threading.get_ident()).infolist():
            safe_name(info.filename.rstrip("/"), f"the zip file {self.location}")
            if stat.S_ISLNK(info.external_attr >> 16):
                raise DataError(f"{self.location} holds a link, {info.filename!r}: pack the files themselves")
            if not info.is_dir():
                entries.append(FileEntry(info.filename, info.file_size, f"{info.CRC:08x}"))
        return sorted(entries, key=lambda entry: entry.name)

    def read(self, name: str) -> bytes:
        """The bytes of one file.

        Raises:
            FileNotFoundError: there is none.
            DataError: it cannot be read.
        """
        full = f"{self.root}/{name}" if self.root else name
        if not self.is_zip:
            return (self.location / full).read_bytes()
        archive = _open_zip(self.location, threading.get_ident())
        try:
            with explained(f"{self.location}:{full}"):
                return archive.read(full)
        except KeyError as error:
            raise FileNotFoundError(f"{full} is not in {self.location}") from error
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
            raise DataError(
                f"{full} in {self.location} cannot be unpacked ({error}): fetch or pack the zip file again"
            ) from error

    def read_all(self, names: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
        """Name and bytes of each file in order, None for those that are not there. On S3 the next are fetched while
        the caller works on one.
        """
        if self.location.is_local:
            for name in names:
                yield name, self._read_or_none(name)
            return
        waiting = iter(names)
        with ThreadPoolExecutor(_S3_READS_AHEAD) as pool:
            ahead = [(name, pool.submit(self._read_or_none, name)) for name in islice(waiting, _S3_READS_AHEAD)]
            while ahead:
                name, future = ahead.pop(0)
                yield name, future.result()
                ahead += [(next_, pool.submit(self._read_or_none, next_)) for next_ in islice(waiting, 1)]

    def _read_or_none(self, name: str) -> bytes | None:
        try:
            return self.read(name)
        except FileNotFoundError:
            return None


def safe_name(name: str, where: str) -> str:
    """The name itself, if it stays inside the folder it is relative to.

    Raises:
        DataError: it is absolute, climbs out with ``..``, or is written for another system.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or ":" in parts[0]:
        raise DataError(f"{where} names {name!r}, which leads out of its folder: correct it, nothing was read")
    return name


@lru_cache(maxsize=64)
def _open_zip(location: Location, _thread: int) -> zipfile.ZipFile:
    """An open archive for each thread: reading members moves one file position."""
    try:
        with explained(str(location)):
            file: IO[Any] = location.open("rb")
            return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise DataError(f"{location} is no zip file or a damaged one ({error}): fetch or pack it again") from error
