"""A round of review: pictures to Label Studio, and what was submitted into the store.

In: the store, a server, what is wanted. Out: tasks that were not there, labels that were not known, counts of both.

Which pictures are before reviewers already only Label Studio knows, and it is asked each time: a picture has one task,
by its sha256, however often this runs and wherever it broke off. A task or project that somebody deleted there is made
again while its picture is still wanted; labels that were fetched stay. A picture that is not kept here any more, since
somebody wanted it deleted or it grew too old, is removed there too.
"""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass, field

from PIL import Image
from sqlalchemy import select

from app.review.choose import Pick, Wanted, choose, not_kept
from app.review.form import FORM, label_of, prediction
from app.review.label_studio import Gone, LabelStudio, ReviewError, Task
from app.store import reviews
from app.store.database import Database
from app.store.models import Deletion, Picture
from app.store.pictures import PictureFiles
from app.store.reviews import Label
from deployments.containers import sniff
from deployments.images import ImageError, decode

_DESCRIPTION = "Filled by `python -m app.review push`. What is submitted here becomes training data."
#: What every browser shows; anything else is shown as a JPEG of it.
_SHOWN = {"JPEG": ("jpg", "image/jpeg"), "PNG": ("png", "image/png"), "WEBP": ("webp", "image/webp")}
_BATCH = 500
#: So many tasks may be removed at a time whatever their share.
_FEW = 10


@dataclass
class Pushed:
    """What a push did."""

    project: int
    made: Counter[str] = field(default_factory=Counter)
    there: int = 0
    removed: int = 0
    not_kept: int = 0
    unreadable: int = 0
    forgotten: frozenset[str] = frozenset()
    """Pictures of which no copy is to be left."""


@dataclass
class Pulled:
    """What a pull brought."""

    counts: dict[str, int]
    foreign: int = 0
    """Submissions that are none of this program's."""
    forgotten: frozenset[str] = frozenset()


def push(
    database: Database,
    files: PictureFiles,
    studio: LabelStudio,
    title: str,
    wanted: Wanted,
    reviewers: int,
    remove_most: bool = False,
) -> Pushed:
    """Put new pictures before reviewers.

    Raises:
        ReviewError: Label Studio cannot be used. What was made until then stays and is not made again.
        StoreUnavailable, PicturesUnavailable: the store cannot be used.
    """
    project = studio.project(title)
    if project is None:
        project = studio.make_project(title, _DESCRIPTION, FORM, reviewers)
    else:
        studio.update_project(project, FORM, reviewers)
    there, gone = _tidied(database, studio, project, remove_most)
    done = Pushed(project, there=len(there), removed=len(gone), forgotten=gone | _deleted(database))
    with database.reading() as connection:
        done.not_kept = not_kept(connection)
        picks = choose(connection, wanted, reviews.counts(connection), reviewers, there)
    for pick in picks:
        data = files.read(pick.sha256)
        shown = None if data is None else _shown(data)
        if shown is None:
            done.unreadable += 1
            continue
        try:
            _make(studio, project, pick, *shown)
        except Gone:
            raise ReviewError(
                f"the project {title!r} was deleted meanwhile: run push again, it makes a new one"
            ) from None
        done.made[pick.reason] += 1
    return done


def _make(studio: LabelStudio, project: int, pick: Pick, content: bytes, suffix: str, media_type: str) -> None:
    number, address = studio.upload(project, f"{pick.sha256}.{suffix}", content, media_type)
    detection = pick.annotation.detection
    data = {
        "image": address,
        "sha256": pick.sha256,
        "upload": number,
        "reason": pick.reason,
        "feedback": "; ".join(pick.said),
        "ai_probability": None if detection is None else round(detection.ai_probability, 4),
        "declared_ai": None if detection is None else detection.provenance.declared_ai,
    }
    studio.add_task(project, data, prediction(pick.annotation))


def pull(database: Database, studio: LabelStudio, title: str, remove_most: bool = False) -> Pulled:
    """Fetch what was submitted.

    Raises:
        ReviewError: Label Studio cannot be used, or the project is not there.
        StoreUnavailable: the store cannot be used; nothing of what was fetched last was kept, and it is there still.
    """
    project = studio.project(title)
    if project is None:
        raise ReviewError(
            f"there is no project {title!r} at {studio.url}: `python -m app.review push` makes it. Labels that were "
            "fetched before are kept"
        )
    users = studio.users()
    total: Counter[str] = Counter(dict.fromkeys(("new", "changed", "known", "gone"), 0))
    done = Pulled({})
    waiting: list[Label] = []

    def keep() -> None:
        with database.writing() as connection:
            total.update(reviews.add(connection, waiting))
        waiting.clear()

    for task in studio.tasks(project):
        labels, foreign = labels_of(task, users)
        done.foreign += foreign
        waiting += labels
        if len(waiting) >= _BATCH:
            keep()
    keep()
    done.counts = dict(total)
    _, gone = _tidied(database, studio, project, remove_most)
    done.forgotten = gone | _deleted(database)
    return done


def labels_of(task: Task, users: dict[int, str]) -> tuple[list[Label], int]:
    """What reviewers submitted in a task, and how many submissions are none of this program's."""
    labels: list[Label] = []
    foreign = 0
    for annotation in task.annotations:
        by = annotation.get("completed_by")
        number = by.get("id") if isinstance(by, dict) else by
        reviewer = users.get(number, f"user {number}") if isinstance(number, int) else "unknown"
        try:
            label = None if task.sha256 is None else label_of(task.sha256, annotation, reviewer)
        except (KeyError, TypeError, ValueError, IndexError):
            foreign += 1
            continue
        foreign += task.sha256 is None
        if label is not None:
            labels.append(label)
    # of two submissions of one reviewer the last one counts
    return sorted(labels, key=lambda label: label.at), foreign


def _tidied(
    database: Database, studio: LabelStudio, project: int, remove_most: bool
) -> tuple[set[str], frozenset[str]]:
    """Pictures with a task, after those that are not kept any more were removed; and these.

    Raises:
        ReviewError: these are most of them, which looks like another application's project.
    """
    tasks = [task for task in studio.tasks(project) if task.sha256 is not None]
    hashes = {task.sha256 for task in tasks if task.sha256 is not None}
    with database.reading() as connection:
        kept = select(Picture.sha256).where(Picture.stored.is_(True))
        gone = hashes - set(connection.execute(kept).scalars())
    if len(gone) > max(_FEW, len(hashes) / 2) and not remove_most:
        raise ReviewError(
            f"{len(gone)} of {len(hashes)} tasks are of pictures that this store does not keep: is it the store whose "
            "pictures were pushed? If it is, --remove-most removes them"
        )
    for task in tasks:
        if task.sha256 in gone:
            studio.remove_task(task)
    return hashes - gone, frozenset(gone)


def _deleted(database: Database) -> frozenset[str]:
    """Pictures that somebody wanted deleted in the last day and that did not come again: with a task or without."""
    again = select(Picture.sha256).where(Picture.sha256 == Deletion.sha256, Picture.stored.is_(True)).exists()
    with database.reading() as connection:
        return frozenset(connection.execute(select(Deletion.sha256).where(~again)).scalars())


def _shown(data: bytes) -> tuple[bytes, str, str] | None:
    """A picture as a browser shows it, with suffix and media type; None: it cannot be decoded."""
    kind = sniff(data)
    if kind in _SHOWN:
        return data, *_SHOWN[kind]
    try:
        picture: Image.Image = decode(data).image
    except ImageError:
        return None
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue(), *_SHOWN["JPEG"]
