"""Pictures by the hash of their bytes, in a folder or on S3, through fsspec.

In and out: bytes. Knows no database and no picture format. Keys of S3 come from the usual variables
(``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_ENDPOINT_URL``). A bucket that keeps old versions keeps them of
deleted pictures, too: leave versioning off, or let a lifecycle rule end them.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import fsspec


class PicturesUnavailable(RuntimeError):
    """The place of the pictures does not answer; the message is for operators."""


class PictureFiles:
    """A place for pictures. Opened at its first use; safe to call from several threads."""

    def __init__(self, place: str) -> None:
        self._is_s3 = place.startswith("s3://")
        if "://" in place and not self._is_s3 and not place.startswith("file://"):
            raise PicturesUnavailable(f"pictures_url {place!r}: only folders and s3:// are supported")
        self._root = place.removeprefix("s3://").removeprefix("file://").rstrip("/")
        if not self._is_s3:
            self._root = str(Path(self._root).expanduser().absolute())
        self._system: Any = None

    def _files(self) -> Any:
        if self._system is None:
            options: dict[str, Any] = {}
            if self._is_s3:
                config: dict[str, Any] = {"connect_timeout": 3, "read_timeout": 10, "retries": {"max_attempts": 2}}
                # only AWS answers a part of an object without the checksum of the whole
                config |= {
                    "request_checksum_calculation": "when_required",
                    "response_checksum_validation": "when_required",
                }
                options = {"use_listings_cache": False, "config_kwargs": config}
                if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
                    options["endpoint_url"] = endpoint
            self._system = fsspec.filesystem("s3" if self._is_s3 else "file", **options)
        return self._system

    def _path(self, sha256: str) -> str:
        return f"{self._root}/{sha256[:2]}/{sha256}"

    def write(self, sha256: str, data: bytes) -> None:
        """Keep a picture: whole on disk, or not at all.

        Raises:
            PicturesUnavailable: it could not be written.
        """
        path = self._path(sha256)
        try:
            files = self._files()
            if self._is_s3:
                files.pipe_file(path, data)  # S3 shows an object when it is whole
                return
            Path(path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            part = f"{path}.{secrets.token_hex(4)}.part"
            try:
                with files.open(part, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                files.mv(part, path)
            finally:  # of a full disk nothing may stay that nobody knows of
                Path(part).unlink(missing_ok=True)
        except Exception as error:
            raise PicturesUnavailable(f"cannot write a picture below {self._root}: {error}") from error

    def read(self, sha256: str) -> bytes | None:
        """A picture's bytes; None when it is not there.

        Raises:
            PicturesUnavailable: the place does not answer.
        """
        try:
            return bytes(self._files().cat_file(self._path(sha256)))
        except Exception as error:
            if _is_no_picture(error):
                return None
            raise PicturesUnavailable(f"cannot read a picture below {self._root}: {error}") from error

    def remove(self, sha256: str) -> None:
        """Remove a picture; nothing happens when there is none.

        Raises:
            PicturesUnavailable: the place does not answer.
        """
        try:
            self._files().rm_file(self._path(sha256))
        except Exception as error:
            if _is_no_picture(error):
                return
            raise PicturesUnavailable(f"cannot remove a picture below {self._root}: {error}") from error


def _is_no_picture(error: Exception) -> bool:
    """Whether a picture is not there, and its place is: s3fs calls a bucket that does not exist a file not found, too,
    and the cause is what S3 itself said.
    """
    said = getattr(error.__cause__, "response", None) or {}
    return isinstance(error, FileNotFoundError) and said.get("Error", {}).get("Code") != "NoSuchBucket"
