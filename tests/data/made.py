"""Small raw data sets that tests make for themselves: pictures that a hash tells apart, in the layouts that Kaggle has,
and an S3 server to put them on.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from app.cluster import free_port

ROOT = Path(__file__).parent.parent.parent


def picture(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """Random blobs: low frequencies as a photo has them."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": quality} if kind == "JPEG" else {}))
    return buffer.getvalue()


def make_aivshuman(folder: Path, pictures: int = 40, defects: bool = True) -> Path:
    """Real pictures and AI pictures by turns, from two sources; the defects of real data among them."""
    (folder / "train_data").mkdir(parents=True)
    rows: list[tuple[str, int]] = []
    sources: list[tuple[str, str, str]] = []

    def add(name: str, data: bytes | None, label: int, source: str = "here") -> None:
        if data is not None:
            (folder / "train_data" / name).write_bytes(data)
        rows.append((f"train_data/{name}", label))
        sources.append((f"train_data/{name}", source, "generator-1" if label else "photo"))

    for number in range(pictures):
        add(f"{number:04d}.jpg", encoded(picture(number)), number % 2, "here" if number % 4 < 2 else "there")
    if defects:
        first, second = encoded(picture(0)), encoded(picture(1))
        add("again.jpg", first, 0)  # the same bytes
        add("comment.jpg", second + b"\0", 1)  # the same pixels, other bytes
        add("resized.jpg", encoded(picture(2).resize((72, 54))), 0)  # a near-duplicate
        add("gray.jpg", encoded(picture(3).convert("L")), 1)  # another
        add("png.jpg", encoded(picture(900), "PNG"), 1)  # a good picture under a wrong name
        add("cmyk.jpg", encoded(picture(901).convert("CMYK")), 0)
        add("liar.jpg", encoded(picture(902)), 0)
        rows.append(("train_data/liar.jpg", 1))  # both labels
        add("cut.jpg", first[: len(first) // 2], 0)
        add("empty.jpg", b"", 0)
        add("text.jpg", b"not a picture at all", 1)
        add("tiny.jpg", encoded(picture(903, (12, 9))), 1)
        add("gone.jpg", None, 0)
        rows.append(("train_data/0004.jpg", 7))  # no label
        (folder / "train_data" / "stray.jpg").write_bytes(encoded(picture(904)))
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "file_name", "label"])
        writer.writerows([number, *row] for number, row in enumerate(rows))
    with (folder / "sources.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "source", "generator"])
        writer.writerows(sources)
    return folder


#: What `make_aivshuman` puts in of which a row is rejected, and what it keeps besides its plain pictures.
REJECTED = {
    "train_data/again.jpg": "duplicate",
    "train_data/comment.jpg": "duplicate_pixels",
    "train_data/liar.jpg": "contradictory_labels",
    "train_data/cut.jpg": "truncated",
    "train_data/empty.jpg": "empty_body",
    "train_data/text.jpg": "not_an_image",
    "train_data/tiny.jpg": "too_small",
    "train_data/gone.jpg": "missing",
    "train_data/0004.jpg": "bad_label",
    "train_data/stray.jpg": "not_listed",
}
KEPT_BESIDES = {"train_data/resized.jpg", "train_data/gray.jpg", "train_data/png.jpg", "train_data/cmyk.jpg"}


def make_flickr(folder: Path, photos: range = range(30), secret: str = "", older: bool = False) -> Path:
    """Photos with five captions each, in the layout of `captions.txt` or of the older `results.csv`."""
    images = folder / ("flickr30k_images" if older else "Images")
    images.mkdir(parents=True)
    lines = []
    for number in photos:
        name = f"{1000 + number}{secret}.jpg"
        images.joinpath(name).write_bytes(encoded(picture(2000 + number)))
        for place in range(5):
            text = f'A dog, number {number}, "runs" for the {place}th time .'
            lines.append((name, place, text))
    if older:
        rows = "".join(f"{name}| {place}| {text}\n" for name, place, text in lines)
        folder.joinpath("results.csv").write_text("image_name| comment_number| comment\n" + rows)
    else:
        with folder.joinpath("captions.txt").open("w", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), *((name, text) for name, _, text in lines)])
    return folder


def zipped(folder: Path, target: Path, top: str = "") -> Path:
    """A zip of a folder's content, below a folder ``top`` inside it."""
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, f"{top}{path.relative_to(folder)}")
    return target


@dataclass(frozen=True)
class S3Server:
    """A real S3 server over a local folder, and the variables that lead to it."""

    folder: Path
    environment: dict[str, str]


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """`rclone serve s3` over ``folder``, whose folders are its buckets."""
    program = shutil.which("rclone", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert program, "rclone is missing: make dev"
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [program, "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}", "--auth-key", "key,secret"]
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with (folder.parent / "rclone.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--config", os.devnull, "--vfs-cache-mode", "off"], stdout=log, stderr=log
        )
    try:
        for _ in range(600):
            try:
                httpx.get(environment["AWS_ENDPOINT_URL"], timeout=5)
                break
            except httpx.HTTPError:
                assert process.poll() is None, (folder.parent / "rclone.log").read_text()
                time.sleep(0.1)
        yield S3Server(folder, environment)
    finally:
        process.terminate()
        process.wait(30)
