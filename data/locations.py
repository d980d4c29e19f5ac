"""Places where data lie: a local path or ``s3://bucket/prefix``, with the same calls for both.

In: a path or URI as people write it. Out: a ``Location`` that lists, reads, writes and publishes. S3 goes through s3fs;
keys and endpoint come from the usual variables (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_ENDPOINT_URL``,
``AWS_PROFILE``) of the process that uses it, so that no secret travels in a job's arguments. A ``Location`` is small
and can be sent to Ray workers.

Knows no data set.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.fs

from data.errors import DataError, explained

#: What a file system answers that has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
#: Set by Ray for the driver of a submitted job.
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


@lru_cache(maxsize=8)
def _filesystem(scheme: str, process: int, endpoint: str | None) -> fsspec.AbstractFileSystem:
    """One file system a process and server: s3fs keeps an event loop thread, which does not survive a fork."""
    if scheme == "file":
        return fsspec.filesystem("file", use_listings_cache=False)
    # only AWS answers a part of an object without the checksum of the whole; what is read is checked by its own hash
    checksums = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True, "config_kwargs": checksums}
    if endpoint:
        options["endpoint_url"] = endpoint
    return fsspec.filesystem("s3", **options)


@dataclass(frozen=True)
class FileEntry:
    """One file of a listing: its path relative to the place that was listed, size, and a tag that changes with the
    content (time of last change, or S3's ETag).
    """

    name: str
    size: int
    tag: str


@dataclass(frozen=True)
class Location:
    """A folder or file, local or on S3. ``path`` is absolute, or ``bucket/key``."""

    scheme: Literal["file", "s3"]
    path: str

    @classmethod
    def of(cls, place: str | Path | Location) -> Location:
        """The location that a path or URI names.

        Raises:
            DataError: another scheme, a bucket without a name, or a relative path inside a Ray job, where it would lie
                in the job's own unpacked working directory.
        """
        if isinstance(place, Location):
            return place
        text = str(place)
        if text.startswith("s3://"):
            path = text.removeprefix("s3://").strip("/")
            if not path:
                raise DataError(f"{text!r} names no bucket: write s3://bucket/prefix")
            return cls("s3", path)
        if text.startswith("file://"):
            text = text.removeprefix("file://")
        elif "://" in text:
            raise DataError(f"{text!r}: only local paths and s3:// are supported")
        if not text:
            raise DataError("an empty path: name a folder, a file or s3://bucket/prefix")
        local = Path(text).expanduser()
        if not local.is_absolute() and in_job():
            raise DataError(
                f"{text!r} is a relative path: inside a Ray job it would lie in the job's working directory, which is "
                "deleted; give an absolute path on storage that all nodes share, or s3://bucket/prefix"
            )
        return cls("file", os.path.abspath(local))  # noqa: PTH100  (Path.resolve would follow links)

    @property
    def filesystem(self) -> fsspec.AbstractFileSystem:
        """The fsspec file system, opened in this process on first use."""
        return _filesystem(self.scheme, os.getpid(), _endpoint())

    @property
    def arrow_filesystem(self) -> pyarrow.fs.FileSystem:
        """The same for pyarrow and ``ray.data.read_parquet``."""
        if self.scheme == "file":
            return pyarrow.fs.LocalFileSystem()
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(self.filesystem))

    @property
    def is_local(self) -> bool:
        return self.scheme == "file"

    @property
    def local_path(self) -> Path:
        """The path of a local location.

        Raises:
            DataError: it is on S3.
        """
        if not self.is_local:
            raise DataError(f"{self} must be a local path")
        return Path(self.path)

    @property
    def name(self) -> str:
        """The last part."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def parent(self) -> Location:
        return Location(self.scheme, self.path.rstrip("/").rsplit("/", 1)[0] or "/")

    def __truediv__(self, name: str) -> Location:
        return Location(self.scheme, f"{self.path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return f"s3://{self.path}" if self.scheme == "s3" else self.path

    # ------------------------------------------------------------------------------------------------------- reading

    def exists(self) -> bool:
        with explained(str(self)):
            return bool(self.filesystem.exists(self.path))

    def is_dir(self) -> bool:
        with explained(str(self)):
            return bool(self.filesystem.isdir(self.path))

    def is_file(self) -> bool:
        with explained(str(self)):
            return bool(self.filesystem.isfile(self.path))

    def read_bytes(self) -> bytes:
        """Raises FileNotFoundError or DataError."""
        if self.is_local:
            with explained(str(self)):
                return Path(self.path).read_bytes()
        with explained(str(self)):
            return self.filesystem.cat_file(self.path)

    def read_text(self) -> str:
        return self.read_bytes().decode("utf-8-sig")

    def open(self, mode: str = "rb") -> IO[Any]:
        """An open file; on S3 it appears when it is closed."""
        with explained(str(self)):
            return self.filesystem.open(self.path, mode)

    def folders(self) -> list[str]:
        """Names of the folders directly below, sorted; none when it does not exist."""
        with explained(str(self)), suppress(FileNotFoundError):
            listed = self.filesystem.ls(self.path, detail=True)
            return sorted(e["name"].rstrip("/").rsplit("/", 1)[-1] for e in listed if e["type"] == "directory")
        return []

    def entries(self) -> dict[str, bool]:
        """What lies directly in this folder, by name: whether it is a file (and no link); nothing when it does not
        exist."""
        with explained(str(self)), suppress(FileNotFoundError):
            listed = self.filesystem.ls(self.path, detail=True)
            plain = {e["name"].rstrip("/"): e["type"] == "file" and not e.get("islink") for e in listed}
            return {path.rsplit("/", 1)[-1]: plain[path] for path in sorted(plain) if path != self.path}
        return {}

    def files(self) -> list[FileEntry]:
        """Every file below, sorted by name.

        Raises:
            DataError: a link points out of the folder, or the place cannot be listed.
        """
        with explained(str(self)):
            entries = self._local_files() if self.is_local else self._s3_files()
            return sorted(entries, key=lambda entry: entry.name)

    def _local_files(self) -> Iterator[FileEntry]:
        root = Path(self.path)
        inside = root.resolve()
        waiting = [root]
        while waiting:
            with os.scandir(waiting.pop()) as listed:
                for entry in listed:
                    if entry.is_symlink() and inside not in Path(entry.path).resolve().parents:
                        raise DataError(
                            f"{entry.path} is a link that leads out of {root}: remove it or copy the file in"
                        )
                    if entry.is_dir():
                        if not entry.is_symlink():  # what a link inside leads to is listed anyway
                            waiting.append(Path(entry.path))
                    elif entry.is_file():
                        status = entry.stat()
                        name = os.path.relpath(entry.path, root).replace(os.sep, "/")
                        yield FileEntry(name, status.st_size, str(status.st_mtime_ns))

    def _s3_files(self) -> Iterator[FileEntry]:
        # `find` answers an empty listing for a bucket that is not there; `ls` of the bucket says so
        self.filesystem.ls(self.path.split("/", 1)[0], detail=False)
        prefix = self.path.rstrip("/") + "/"
        for path, entry in self.filesystem.find(self.path, detail=True).items():
            if path.startswith(prefix) and entry.get("type") == "file":
                yield FileEntry(path.removeprefix(prefix), int(entry["size"]), str(entry.get("ETag", "")).strip('"'))

    # ------------------------------------------------------------------------------------------------------- writing

    def make_dir(self) -> None:
        """Create the folder and its parents; S3 has none."""
        if self.is_local:
            with explained(str(self)):
                try:
                    Path(self.path).mkdir(parents=True, exist_ok=True)
                except (FileExistsError, NotADirectoryError) as error:
                    raise DataError(f"{self} cannot be a folder, a file is in the way: choose another place") from error

    def ready(self) -> None:
        """Create the folder, or make sure that its bucket is there, before work is put into what goes there.

        Raises:
            DataError: it cannot be written to.
        """
        self.make_dir()
        if not self.is_local:
            with explained(str(self)):
                self.filesystem.ls(self.path.split("/", 1)[0], detail=False)

    @contextmanager
    def alone(self, refusal: Exception) -> Iterator[None]:
        """No other process has this folder for the length of the block. The kernel gives it back however a process
        ends; programs that the process starts do not keep it (Python opens files with ``O_CLOEXEC``). S3 and file
        systems without locks give it to everybody.

        Raises:
            Exception: ``refusal``, when another process has it.
        """
        if not self.is_local:
            yield
            return
        self.make_dir()
        with (self.local_path / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise refusal from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            yield

    def write_bytes(self, data: bytes | memoryview) -> None:
        """Write the whole file or nothing: a reader never sees half of it, whatever kills the writer."""
        with self.writing() as file:
            file.write(data)

    @contextmanager
    def writing(self) -> Iterator[pa.NativeFile]:
        """A file to write to, which appears whole when the block ends, or not at all."""
        with explained(str(self)):
            if not self.is_local:
                buffer = pa.BufferOutputStream()
                yield buffer
                self.filesystem.pipe_file(
                    self.path, buffer.getvalue().to_pybytes()
                )  # S3 shows an object when it is complete
                return
            self.parent.make_dir()
            partial = Path(f"{self.path}.{secrets.token_hex(4)}.part")
            try:
                with pa.OSFile(str(partial), "wb") as file:
                    yield file
                partial.replace(self.path)
            finally:
                partial.unlink(missing_ok=True)

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def remove(self) -> None:
        """Remove the file, or the folder with all that is in it; nothing happens if it is not there."""
        with explained(str(self)), suppress(FileNotFoundError):
            if self.is_local and Path(self.path).is_dir():
                shutil.rmtree(self.path)
            else:
                self.filesystem.rm(self.path, recursive=True)

    def publish(self, target: Location, last: str = "manifest.json") -> None:
        """Make this finished folder appear as ``target``, at once.

        Locally a rename. S3 cannot rename: objects are copied, the one named ``last`` at the very end, so readers must
        take a folder without it for unfinished.

        Raises:
            DataError: the target is there already, or cannot be written.
        """
        with explained(str(target)):
            if (target / last).exists():
                raise DataError(f"{target} is finished already")
            target.remove()  # what a killed publication left
            if self.is_local:
                target.parent.make_dir()
                Path(self.path).rename(target.path)
                return
            for entry in sorted(self.files(), key=lambda entry: entry.name == last):
                self.filesystem.cp_file((self / entry.name).path, (target / entry.name).path)
            self.remove()


def in_job() -> bool:
    """Whether this process is the driver of a submitted Ray job."""
    return _JOB_VARIABLE in os.environ
