"""Raw data sets in, prepared versions out: ``NAME/VERSION/`` with parquet shards, rejects and a manifest.

    python -m data.prepare aivshuman --input FOLDER|ZIP|s3://... --output FOLDER|s3://...
    python -m data.prepare flickr30k --input ... --output ... [--split published --lists FOLDER]
    python -m data.prepare source --aivshuman VERSION --flickr30k VERSION --output ...

or as a job: ``ray job submit --working-dir . -- python -m data.prepare ...``. Layouts of the input: ``data.layouts``;
what is kept and how it is split: ``data.curate``; what must hold: ``data.rules``; the layout of a version:
``data.versions``.

``--feedback FILE`` adds verified items of reviewers; ``data.feedback`` says on which side they fall.

A version is named by a hash of its content and settings: the same input and settings give the same name on any
machine, with any number of CPUs, from a folder, a zip or S3. It appears at once when it is complete. A run that is
killed goes on where it was when it is started again; one that finds its version there does nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import CliSubCommand

from data.captions import photo_number
from data.curate import (
    Candidate,
    Known,
    SplitSettings,
    divide,
    photo_link,
    remove_duplicates,
    starter_captioner_splits,
    starter_detector_splits,
)
from data.download import download
from data.errors import DataError, as_settings_error, end
from data.feedback import WithFeedback, read_feedback
from data.identify import Particulars
from data.layouts import RawRow, Reject, read_aivshuman, read_flickr30k
from data.locations import Location
from data.merge import VersionPictures, balanced, merge
from data.passes import Pictures, Refused, Timing, take_particulars
from data.publish import Content, digest, made_by, publish
from data.raw import RawInput
from data.report import write_report
from data.rules import RuleSettings
from data.session import RaySettings, ray_session
from data.versions import SPLITS, DatasetName, DataVersion, Split, open_version, versions
from deployments.images import ImageLimits


class _Common(SplitSettings, RuleSettings, RaySettings):
    """Settings of every data set."""

    model_config = ConfigDict(extra="forbid")

    output: str = Field(description="folder or s3://bucket/prefix; the version becomes OUTPUT/NAME/VERSION")
    workers: int | None = Field(None, ge=1, description="processes that decode; one for each CPU if not given")
    report: bool = Field(True, description="write the quality report (report.html, report.json) beside the manifest")


class _FromRaw(_Common):
    """Settings of the data sets that are made of raw data."""

    input: str | None = Field(None, description="folder or .zip of the raw data, local or s3://")
    download: bool = Field(False, description="fetch the raw data from Kaggle (needs credentials) instead of --input")
    min_side_px: int = Field(16, gt=0, description="smallest width and height of a picture")
    max_pixels: int = Field(50_000_000, gt=0, description="largest width times height")
    max_bytes: int = Field(20 * 2**20, gt=0, description="largest file")
    with_version: list[str] = Field(
        [], description="a prepared version whose photos must fall on the same side here as there; may be repeated"
    )
    feedback: list[str] = Field(
        [],
        description="verified items, a file of `python -m app.review export`; may be repeated. Every group stays on "
        "the side that it has in the newest version made without them",
    )


class AivshumanConfig(_FromRaw):
    """AI-generated pictures against photographs."""

    source_name: str = Field("aivshuman", min_length=1, description="source of pictures that sources.csv does not name")
    twins: Literal["auto", "rows", "none"] = Field(
        "auto", description="whether rows 2k and 2k+1 are a photo and its generated twin; auto: if nearly all look so"
    )


class Flickr30kConfig(_FromRaw):
    """Photos with captions."""

    source_name: str = Field("flickr30k", min_length=1, description="what the photos' source is called")
    lists: str | None = Field(
        None, description="folder with the published lists, *train*.txt, *val*.txt, *test*.txt, for --split published"
    )


class SourceConfig(_Common):
    """Photos of the platform against stock photos, out of the other two data sets; splits are as they are there."""

    aivshuman: str = Field(description="prepared version of aivshuman: its human pictures are the stock photos")
    flickr30k: str = Field(description="prepared version of flickr30k: the platform's photos")
    balance: bool = Field(True, description="as many of the one as of the other in each split")


class Prepare(BaseModel):
    """Prepare a data set."""

    aivshuman: CliSubCommand[AivshumanConfig]
    flickr30k: CliSubCommand[Flickr30kConfig]
    source: CliSubCommand[SourceConfig]


@dataclass(frozen=True)
class Prepared:
    """A version, and what it took."""

    version: DataVersion
    fresh: bool
    """Whether this run made it; false: it was there already."""
    identified: Timing = field(default_factory=Timing)
    written: Timing = field(default_factory=Timing)
    decided_s: float = 0.0
    """Seconds between the passes: duplicates, groups, splits."""


def prepare(config: AivshumanConfig | Flickr30kConfig | SourceConfig) -> Prepared:
    """Prepare one version, or find it prepared.

    Raises:
        DataError: input, output or settings are at fault; nothing is published then.
    """
    return _from_versions(config) if isinstance(config, SourceConfig) else _from_raw(config)


def _from_raw(config: AivshumanConfig | Flickr30kConfig) -> Prepared:
    name: DatasetName = "aivshuman" if isinstance(config, AivshumanConfig) else "flickr30k"
    folder = Location.of(config.output) / name
    if config.download == (config.input is not None):
        raise DataError("give either --input with the raw data or --download")
    raw = RawInput.of(config.input or str(download(name)))
    published: dict[str, Split] = {}
    if isinstance(config, AivshumanConfig):
        if config.split == "published":
            raise DataError("there are no published lists of aivshuman: use --split shares or starter")
        listed = read_aivshuman(raw, config.source_name, config.twins)
    else:
        published = _published_lists(config)
        listed = read_flickr30k(raw, config.source_name)
    others = [open_version(place) for place in config.with_version]
    feedback = read_feedback(config.feedback, "label" if name == "aivshuman" else "captions")
    settings = _version_settings(config)
    if config.feedback:
        settings["feedback"] = feedback.digest
        older = [v for v in versions(folder) if v.manifest.settings.get("feedback") != feedback.digest]
        others += [v for v in older[-1:] if _named(v) not in map(_named, others)]
        _say(f"{len(feedback.rows)} of {feedback.items} verified items say something that {name} learns")
    settings["with_version"] = sorted(map(_named, others))
    if published:
        settings["lists"] = digest(published)[:16]
    fingerprint = listed.fingerprint(digest([made_by(), settings]))
    folder.ready()
    if found := _made_before(folder, fingerprint):
        return Prepared(found, fresh=False)

    limits = ImageLimits(max_bytes=config.max_bytes, max_pixels=config.max_pixels, min_side_px=config.min_side_px)
    looked_at = digest([made_by(), limits.model_dump(), *([feedback.digest] if feedback.rows else [])])
    work = folder / ".work" / f"particulars-{listed.fingerprint(looked_at)[:16]}"
    pictures_in: Pictures = WithFeedback(listed.raw, feedback.places) if feedback.rows else listed.raw
    with ray_session(config) as cpus:
        workers = config.workers or cpus
        names = sorted(listed.entries) + [row.file_name for row in feedback.rows]
        particulars, identified = take_particulars(pictures_in, names, limits, work, workers, _say)
        decided = time.perf_counter()
        candidates, rejects = _joined(listed.rows, particulars)
        verified, refused = _joined(feedback.rows, particulars, verified=True)
        _check_hashes(verified)
        kept, repeated = remove_duplicates(candidates + verified)
        pins: dict[str, Split] = {}
        if config.split == "starter" and name == "aivshuman":
            pins = starter_detector_splits(candidates)
        elif config.split != "shares":
            numbers = published or starter_captioner_splits(listed.rows)
            pins = {c.particulars.id: numbers[c.row.photo] for c in kept if c.row.photo and c.row.photo in numbers}
        pictures, torn = divide(kept, config, pins, [known for version in others for known in _known(version)])
        decided_s = time.perf_counter() - decided
        content = Content(
            name=name,
            pictures=pictures,
            rejects=[*listed.rejects, *rejects, *refused, *repeated, *torn],
            listed=listed.listed + len(feedback.rows),
            settings=settings,
            seed=config.seed,
            wanted=_wanted(config),
            place=str(raw.location),
            fingerprint=fingerprint,
        )
        version, fresh, written = publish(content, config, folder, pictures_in, workers, say=_say)
    work.remove()
    if not work.parent.folders():
        work.parent.remove()
    return Prepared(version, fresh, identified, written, decided_s)


def _from_versions(config: SourceConfig) -> Prepared:
    folder = Location.of(config.output) / "source"
    stock, platform = open_version(config.aivshuman), open_version(config.flickr30k)
    for version, wanted in ((stock, "aivshuman"), (platform, "flickr30k")):
        if version.manifest.name != wanted:
            raise DataError(f"{version.location} is a version of {version.manifest.name}: give one of {wanted}")
    if stock.location.scheme != platform.location.scheme:
        raise DataError(f"{stock.location} and {platform.location} must both be local or both on S3: copy one of them")
    settings = _version_settings(config) | {"of": [_named(stock), _named(platform)]}
    fingerprint = digest([made_by(), settings])
    folder.ready()
    if found := _made_before(folder, fingerprint):
        return Prepared(found, fresh=False)

    merged = merge(stock, platform)
    kept, rejects = remove_duplicates(merged.candidates)
    # each picture's split is given; of a group that lies in several, the held-out side stays, as with published lists
    pictures, torn = divide(
        kept, config.model_copy(update={"split": "published", "production_share": 0.0}), merged.pins
    )
    rejects += torn
    if config.balance:
        pictures, surplus = balanced(pictures, config.seed)
        rejects += surplus
    content = Content(
        name="source",
        pictures=pictures,
        rejects=rejects,
        listed=len(merged.candidates),
        settings=settings,
        seed=config.seed,
        wanted=("train", "val", "test"),
        place=f"{stock.location}, {platform.location}",
        fingerprint=fingerprint,
    )
    # what balance takes away is no defect
    rules = config.model_copy(update={"max_rejected_share": 1.0}) if config.balance else config
    with ray_session(config) as cpus:
        reader = VersionPictures(stock.location)
        made = publish(content, rules, folder, reader, config.workers or cpus, merged.names, _say)
    version, fresh, written = made
    return Prepared(version, fresh, written=written)


def _joined(
    rows: Sequence[RawRow], found: Mapping[str, Particulars | Refused], verified: bool = False
) -> tuple[list[Candidate], list[Reject]]:
    """Rows with their particulars, and those whose picture is not valid."""
    candidates: list[Candidate] = []
    rejects: list[Reject] = []
    for row in rows:
        what = found[row.file_name]
        if isinstance(what, Refused):
            rejects.append(Reject(row.file_name, what.reason, what.detail, label=row.label))
        else:
            candidates.append(Candidate(row, what, verified=verified))
    return candidates, rejects


def _check_hashes(verified: Sequence[Candidate]) -> None:
    """Verified items are named by the hash of their bytes.

    Raises:
        DataError: one holds another picture than it says.
    """
    for candidate in verified:
        if not candidate.row.file_name.endswith(candidate.particulars.id):
            raise DataError(
                f"{candidate.row.file_name} holds a picture with another hash: export the verified items again"
            )


def _made_before(folder: Location, fingerprint: str) -> DataVersion | None:
    return next((v for v in versions(folder) if v.manifest.input_fingerprint == fingerprint), None)


def _version_settings(config: _Common) -> dict[str, Any]:
    """What a version depends on besides content: not where things lie, what works on them, or what may fail."""
    places = {"output", "input", "download", "lists", "with_version", "feedback", "aivshuman", "flickr30k"}
    others = {"workers", "report", *RaySettings.model_fields, *RuleSettings.model_fields}
    return config.model_dump(mode="json", exclude=places | others) | {"production_share": config.production}


def _named(version: DataVersion) -> str:
    return f"{version.manifest.name}/{version.manifest.version}"


def _wanted(config: SplitSettings) -> tuple[Split, ...]:
    """Splits that must not be empty."""
    if config.split != "shares":
        return ("train", "val", "test", "production") if config.production else ("train", "val", "test")
    return tuple(split for split in SPLITS if config.shares()[split] > 0)


def _published_lists(config: Flickr30kConfig) -> dict[str, Split]:
    """Photo number -> split of the published lists; empty if none are given.

    Raises:
        DataError: a list is missing, or two disagree.
    """
    if (config.split == "published") != (config.lists is not None):
        raise DataError("--split published and --lists FOLDER belong together: give both or neither")
    if config.lists is None:
        return {}
    folder = Location.of(config.lists)
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist: give the folder with the published lists as --lists")
    names = [entry.name for entry in folder.files() if entry.name.endswith(".txt") and "/" not in entry.name]
    found: dict[str, Split] = {}
    splits: tuple[Split, ...] = ("train", "val", "test")
    for split in splits:
        matching = [name for name in names if split in name.lower()]
        if len(matching) != 1:
            raise DataError(
                f"{folder} must have one list of {split} photos, *{split}*.txt with a file name a line; "
                f"it has {', '.join(matching) or 'none'}"
            )
        for line in (folder / matching[0]).read_text().split():
            if found.setdefault(photo_number(line), split) != split:
                raise DataError(f"lists in {folder} disagree: {line} is in {found[photo_number(line)]} and in {split}")
    return found


def _known(version: DataVersion) -> list[Known]:
    """Every picture of another version, as this split has to respect it."""
    found = []
    numbered = version.manifest.name == "flickr30k"
    for split in SPLITS:
        for row in version.table(split, ["id", "phash", "file_name"]).to_pylist():
            links = [photo_link(photo_number(row["file_name"]))] if numbered else []
            found.append(Known(row["id"], row["phash"], frozenset(links), split))
    return found


def _say(text: str) -> None:
    print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare the data set that the command line names, and say where it lies."""
    from pydantic_settings import CliApp, get_subcommand

    try:
        command = CliApp.run(Prepare, cli_args=None if arguments is None else [*arguments])
    except ValidationError as error:
        end(as_settings_error(error))
    config = get_subcommand(command)
    assert isinstance(config, AivshumanConfig | Flickr30kConfig | SourceConfig)
    try:
        prepared = prepare(config)
        if config.report and not (prepared.version.location / "report.html").exists():
            write_report(prepared.version)
    except Exception as error:
        end(error)
    manifest = prepared.version.manifest
    counts = ", ".join(f"{count} {split}" for split, count in manifest.counts.items())
    rejects = ", ".join(f"{count} {reason}" for reason, count in manifest.rejects.items()) or "none"
    _say(f"{_named(prepared.version)}: {counts}; rejected: {rejects}")
    _say(f"{'written to' if prepared.fresh else 'there already:'} {prepared.version.location}")


if __name__ == "__main__":
    main()
