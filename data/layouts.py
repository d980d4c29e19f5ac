"""The layouts that raw data sets come in: their lists read, every row of them accounted for.

In: a ``RawInput``. Out: a ``RawList``: rows whose file is there, and rejects for the others. Columns are addressed by
name. Accepted:

* **aivshuman**, as Kaggle has it: ``train.csv`` (``file_name``, ``label`` 0 human or 1 AI, a leading column without
  name), ``train_data/``; optional ``sources.csv`` (``file_name``, ``source``, ``generator``). ``test.csv`` has no
  labels and is not read.
* **aivshuman**, as the original system kept it: ``training.csv``, ``validation.csv``, ``testing.csv``,
  ``testing_online.csv`` with bare names of files in ``Images/``. Its division is not taken over: it tore pairs apart.
* **flickr30k**: ``captions.txt`` (``image,caption``), or the older ``results.csv`` with ``|`` between the columns,
  beside ``Images/`` or ``flickr30k_images/``.

Knows no picture's content.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from data.captions import clean_caption, photo_number
from data.errors import DataError
from data.locations import FileEntry
from data.raw import RawInput, safe_name

LABELS = {"0": "human", "1": "ai"}
_OWN_LISTS = ("training.csv", "validation.csv", "testing.csv", "testing_online.csv")
_PHOTO_FOLDERS = ("Images", "flickr30k_images", "flickr30k-images", "images")
_PICTURE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"))
#: Rows of which neighbours are a real photo and its generated twin have this share of opposite labels; in any other
#: order it is about a half.
_TWIN_SHARE = 0.995
#: A row of `results.csv` that lost a separator: number and caption in one field.
_NUMBER_AND_CAPTION = re.compile(r"^\s*\d+\s+(?P<caption>\S.*)$")


@dataclass(frozen=True)
class Reject:
    """A row or file that is left out. ``reason`` is a short code, ``detail`` is for people."""

    file_name: str
    reason: str
    detail: str = ""
    id: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class RawRow:
    """A row of the raw lists whose file is there: one picture with what is said of it."""

    file_name: str
    source: str
    generator: str | None
    label: str | None = None
    captions: tuple[str, ...] = ()
    twin: str | None = None
    """Rows with the same value show a real picture and what was generated after it."""
    photo: str | None = None
    """Number of the photo on Flickr: rows with the same one are the same photo."""


@dataclass(frozen=True)
class RawList:
    """All rows of a raw data set."""

    raw: RawInput
    rows: list[RawRow]
    rejects: list[Reject]
    listed: int
    """Rows of the lists. Files that no row names are rejected beside them as ``not_listed``."""
    entries: dict[str, FileEntry] = field(repr=False)
    """The files that rows name."""
    lists_digest: str = ""
    """Hash of the lists' own content."""

    def fingerprint(self, settings: str) -> str:
        """Changes when a list, a file's size or its time of change does, or ``settings`` do."""
        digest = hashlib.sha256(f"{self.lists_digest}\n{settings}\n".encode())
        for name in sorted(self.entries):
            entry = self.entries[name]
            digest.update(f"{name}\0{entry.size}\0{entry.tag}\n".encode())
        return digest.hexdigest()


def read_aivshuman(raw: RawInput, default_source: str = "aivshuman", twins: str = "auto") -> RawList:
    """Rows of the AI-vs-Human set in either layout.

    Args:
        raw: the input.
        default_source: ``source`` of pictures that ``sources.csv`` does not name.
        twins: ``rows``: rows 2k and 2k+1 by their number show a photo and its twin; ``auto``: so if nearly all such
            neighbours have opposite labels; ``none``.

    Raises:
        DataError: no list, wrong columns, a file name that leads out of the folder, or no picture at all.
    """
    raw, files = _rooted(raw, ("train.csv", *_OWN_LISTS), "train.csv (or training.csv, testing.csv, ...)")
    present = {entry.name: entry for entry in files}
    lists = ["train.csv"] if "train.csv" in present else [name for name in _OWN_LISTS if name in present]
    digest = hashlib.sha256()
    records: list[dict[str, str]] = []
    for name in lists:
        records += _read_csv(raw, name, ("file_name", "label"), digest)
    origins: dict[str, tuple[str, str]] = {}
    if "sources.csv" in present:
        for record in _read_csv(raw, "sources.csv", ("file_name", "source", "generator"), digest):
            origins[record["file_name"]] = (record["source"], record["generator"])

    twin_of = _twins(records, twins)
    rows, rejects, named = [], [], set()
    for position, record in enumerate(records):
        if not record["file_name"]:
            rejects.append(Reject("", "bad_row", f"row {position + 1} of {', '.join(lists)} names no file"))
            continue
        listed_name = safe_name(record["file_name"], f"a row of {', '.join(lists)}")
        name = _found(listed_name, present)
        named.add(name)
        label = LABELS.get((record["label"] or "").strip().removesuffix(".0"))
        if label is None:
            rejects.append(Reject(name, "bad_label", f"label {record['label']!r} is neither 0 nor 1"))
            continue
        if name not in present:
            rejects.append(Reject(name, "missing", "the list names it, the file is not there", label=label))
            continue
        source, generator = origins.get(listed_name, (default_source, ""))
        rows.append(
            RawRow(
                name,
                source or default_source,
                generator or ("photo" if label == "human" else None),
                label,
                twin=twin_of.get(position),
            )
        )
    rejects += _not_listed(files, named, "no row of the lists names it")
    return _raw_list(raw, rows, rejects, len(records), present, digest.hexdigest())


def read_flickr30k(raw: RawInput, default_source: str = "flickr30k") -> RawList:
    """Photos with captions.

    Raises:
        DataError: no list, wrong columns, a file name that leads out of the folder, or no picture at all.
    """
    raw, files = _rooted(raw, ("captions.txt", "results.csv"), "captions.txt (or results.csv)")
    by_name = {entry.name: entry for entry in files}
    list_name = "captions.txt" if "captions.txt" in by_name else "results.csv"
    digest = hashlib.sha256()
    captions: dict[str, list[str]] = defaultdict(list)
    for record in _read_caption_list(raw, list_name, digest):
        captions[safe_name(record[0], f"a row of {list_name}")].append(record[1])

    photos = _photo_files(files)
    rows, rejects, named = [], [], set()
    for image in sorted(captions):
        path = photos.get(PurePosixPath(image).name, f"Images/{image}")
        named.add(path)
        written = [text.strip() for text in captions[image]]
        kept = tuple(text for text in written if clean_caption(text))
        if path not in by_name:
            rejects.append(Reject(path, "missing", "the list names it, the file is not there"))
        elif not kept:
            rejects.append(Reject(path, "no_captions", "all its captions are empty"))
        else:
            rows.append(RawRow(path, default_source, "photo", captions=kept, photo=photo_number(image)))
    rejects += _not_listed(files, named, f"{list_name} has no caption of it")
    return _raw_list(raw, rows, rejects, len(captions), by_name, digest.hexdigest())


# ------------------------------------------------------------------------------------------------------------- helpers


def _rooted(raw: RawInput, lists: Sequence[str], wanted: str) -> tuple[RawInput, list[FileEntry]]:
    """The input at the folder that holds the lists (the topmost one), and its files."""
    files = raw.files()
    folders = {str(PurePosixPath(e.name).parent) for e in files if PurePosixPath(e.name).name in lists}
    if not folders:
        if not files:
            raise DataError(f"{raw.location} is empty: expected {wanted} and the pictures it names")
        raise DataError(f"{raw.location} has no {wanted}: give the folder or zip file in the layout that Kaggle has")
    root = min(folders, key=lambda folder: (len(PurePosixPath(folder).parts), folder))
    raw = raw.below("" if root == "." else root)
    return raw, raw.files()


def _text(raw: RawInput, name: str, digest: hashlib._Hash) -> str:
    content = raw.read(name)
    digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} in {raw.location} is not UTF-8 text ({error}): save it as UTF-8") from error


def _read_csv(raw: RawInput, name: str, columns: Sequence[str], digest: hashlib._Hash) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(_text(raw, name, digest), newline=""))
    missing = sorted(set(columns) - set(reader.fieldnames or ()))
    if missing:
        found = ", ".join(map(repr, reader.fieldnames or ())) or "none"
        raise DataError(
            f"{name} in {raw.location} lacks {', '.join(missing)}; its columns are {found}: name them in its first row"
        )
    try:
        return list(reader)
    except csv.Error as error:
        raise DataError(f"{name} in {raw.location} is no sound CSV, near line {reader.line_num}: {error}") from error


def _read_caption_list(raw: RawInput, name: str, digest: hashlib._Hash) -> list[tuple[str, str]]:
    return parse_captions(_text(raw, name, digest), f"{name} in {raw.location}")


def parse_captions(text: str, name: str) -> list[tuple[str, str]]:
    """Photos' names and captions out of a list of either form; ``name`` is what an error calls it.

    Raises:
        DataError: wrong columns, or no sound CSV.
    """
    header = text.split("\n", 1)[0].strip()
    if "|" in header:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="|", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(io.StringIO(text, newline=""))
    columns = [column.strip() for column in next(reader, [])]
    image_at = next((columns.index(c) for c in ("image", "image_name") if c in columns), None)
    caption_at = next((columns.index(c) for c in ("caption", "comment") if c in columns), None)
    if image_at is None or caption_at is None:
        raise DataError(
            f"{name} must have the columns image,caption or image_name|comment_number|comment; "
            f"its first row is {header[:100]!r}"
        )
    records = []
    try:
        for fields in reader:
            if len(fields) <= image_at or not fields[image_at].strip():
                continue
            caption = fields[caption_at] if len(fields) > caption_at else ""
            if len(fields) <= caption_at and (joined := _NUMBER_AND_CAPTION.match(fields[-1])):
                caption = joined["caption"]
            records.append((fields[image_at].strip(), caption))
    except csv.Error as error:
        raise DataError(f"{name} is no sound CSV, near line {reader.line_num}: {error}") from error
    return records


def _found(name: str, present: dict[str, FileEntry]) -> str:
    """The file that a row means: as named, or in the folder that belongs to the layout."""
    return next((path for path in (name, f"Images/{name}", f"train_data/{name}") if path in present), name)


def _photo_files(files: Iterable[FileEntry]) -> dict[str, str]:
    """File name without folder -> path, below the folder of photos. Of copies in several folders the topmost."""
    paths = [entry.name for entry in files if _is_picture(entry.name)]
    for folder in _PHOTO_FOLDERS:
        inside = [path for path in paths if path.startswith(folder + "/")]
        if inside:
            ordered = sorted(inside, key=lambda path: (path.count("/"), path), reverse=True)
            return {PurePosixPath(path).name: path for path in ordered}
    return {PurePosixPath(path).name: path for path in paths if "/" not in path}


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in _PICTURE_SUFFIXES


def _not_listed(files: Iterable[FileEntry], named: set[str], detail: str) -> list[Reject]:
    """Pictures in the folders that rows name files of, which no row names."""
    folders = {str(PurePosixPath(name).parent) for name in named}
    strays = (e.name for e in files if e.name not in named and str(PurePosixPath(e.name).parent) in folders)
    return [Reject(name, "not_listed", detail) for name in strays if _is_picture(name)]


def _twins(records: Sequence[dict[str, str]], rule: str) -> dict[int, str]:
    """Position of a row -> name of its pair.

    A column ``pair`` decides where there is one. Else the same file name in two folders with two labels is a pair
    (``real/7.jpg``, ``fake/7.jpg``), and neighbours by row number are, as ``read_aivshuman`` says.
    """
    if rule == "none":
        return {}
    if records and "pair" in records[0]:
        return {at: f"pair:{record['pair']}" for at, record in enumerate(records) if record["pair"]}
    found: dict[int, str] = {}
    labels: dict[str, dict[str, str]] = defaultdict(dict)
    for record in records:
        labels[PurePosixPath(record["file_name"] or "").stem][record["file_name"] or ""] = record["label"] or ""
    for at, record in enumerate(records):
        stem = PurePosixPath(record["file_name"] or "").stem
        if len(labels[stem]) > 1 and len(set(labels[stem].values())) > 1:
            found[at] = f"name:{stem}"

    numbers = [(record.get("") or "").strip() for record in records]
    if rule == "auto" and (not all(n.isdecimal() for n in numbers) or len(set(numbers)) != len(numbers)):
        return found  # lists whose numbers start again each, or without numbers: neighbours mean nothing
    by_pair: dict[int, list[int]] = defaultdict(list)
    for at, number in enumerate(numbers):
        by_pair[(int(number) if number.isdecimal() else at) // 2].append(at)
    pairs = [members for members in by_pair.values() if len(members) == 2]
    opposite = [members for members in pairs if len({records[at]["label"] for at in members}) == 2]
    if rule == "rows" or (len(pairs) >= 8 and len(opposite) >= _TWIN_SHARE * len(pairs)):
        for members in opposite:
            for at in members:
                found.setdefault(at, f"row:{min(members)}")
    return found


def _raw_list(
    raw: RawInput,
    rows: list[RawRow],
    rejects: list[Reject],
    listed: int,
    present: dict[str, FileEntry],
    digest: str,
) -> RawList:
    if not rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(Counter(r.reason for r in rejects).items()))
        raise DataError(
            f"{raw.location} has no images that its list names ({reasons or 'the list is empty'}): "
            "put the pictures beside the list, in the folder that its rows say"
        )
    return RawList(raw, rows, rejects, listed, {row.file_name: present[row.file_name] for row in rows}, digest)
