"""``python -m app.review push|pull|export|start``: pictures to reviewers in Label Studio, and what they say back.

    python -m app.review push                           new pictures into the project, which is made if there is none
    python -m app.review pull                           what reviewers submitted, into the store
    python -m app.review export --output FILE.parquet   verified items, for `python -m data.prepare --feedback`
    python -m app.review start                          Label Studio itself (`make review`)

The store is the running application's; no more than its pictures that are kept can be shown. Any command may be run at
any time and again: nothing is made twice. Exit status 2 with the reason and the remedy when it cannot be done.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliApp, CliSubCommand, get_subcommand

from app.review import choose, server
from app.review.exporting import export
from app.review.label_studio import LabelStudio, ReviewError
from app.review.round import pull, push
from app.store import reviews
from app.store.database import Database, StoreUnavailable
from app.store.pictures import PictureFiles, PicturesUnavailable
from app.store.settings import StoreSettings

#: A review goes through the whole store, which searches do not.
_PATIENCE_S = 60.0


class _WithStore(BaseModel):
    model_config = ConfigDict(extra="forbid")

    store_url: str | None = Field(
        None, description="`args.store.url` of the application; unset: as it has it by default"
    )
    pictures_url: str | None = Field(None, description="`args.store.pictures_url` of the application")

    def opened(self) -> tuple[Database, PictureFiles]:
        """
        Raises:
            StoreUnavailable, PicturesUnavailable, ReviewError: there is nothing to review.
        """
        settings = StoreSettings(url=self.store_url, pictures_url=self.pictures_url)
        if settings.pictures_place is None:
            raise ReviewError("no pictures are kept: set args.store.pictures_url, and give the same as --pictures-url")
        database = Database(settings.database_url, _PATIENCE_S, _PATIENCE_S)
        if database.file is not None and not database.file.exists():
            raise ReviewError(f"{database.file} does not exist: give the application's database as --store-url")
        database.open()
        return database, PictureFiles(settings.pictures_place)


class _WithServer(_WithStore):
    url: str = Field(
        default_factory=lambda: os.environ.get("LABEL_STUDIO_URL", server.URL), description="address of Label Studio"
    )
    project: str = Field("DeepTrust review", min_length=3, max_length=50, description="title of the project")
    remove_most: bool = Field(
        False, description="remove tasks of pictures that are not kept here any more even if these are most of them"
    )

    data: Path = Field(server.FOLDER, description="folder of the Label Studio that `make review` started here")

    def server(self) -> LabelStudio:
        """
        Raises:
            ReviewError: there is no token.
        """
        return LabelStudio(self.url, os.environ.get("LABEL_STUDIO_API_KEY") or server.own_token(self.data))


class Push(_WithServer, choose.Wanted):
    """Put new pictures before reviewers, with what the models said of them."""

    reviewers: int = Field(1, ge=1, le=20, description="how many look at each picture")


class Pull(_WithServer):
    """Fetch what reviewers submitted."""


class Export(_WithStore):
    """Write verified items as parquet."""

    output: Path = Field(description="the file; one that is there is replaced when the new one is complete")
    reviewers: int = Field(1, ge=1, description="how many must have looked at a picture, and agree")
    source: str | None = Field(None, min_length=1, description="what all of them are called in a data set")
    generator: str | None = Field(None, min_length=1, description="what made those that are AI, where that is known")


class Start(server.ServerSettings):
    """Start Label Studio on this machine, in the foreground."""


class Review(BaseModel):
    """Review pictures in Label Studio."""

    push: CliSubCommand[Push]
    pull: CliSubCommand[Pull]
    export: CliSubCommand[Export]
    start: CliSubCommand[Start]


def _push(command: Push) -> None:
    (database, files), studio = command.opened(), command.server()
    wanted = choose.Wanted.model_validate(command.model_dump(include=set(choose.Wanted.model_fields)))
    done = push(database, files, studio, command.project, wanted, command.reviewers, command.remove_most)
    server.remove_copies(command.data, done.forgotten)
    counts = ", ".join(f"{count} {reason}" for reason, count in done.made.items()) or "none"
    print(f"new tasks: {counts}; already there: {done.there}; removed: {done.removed}")
    if done.not_kept:
        print(
            f"{done.not_kept} pictures with feedback cannot be shown, because their bytes are not kept: senders are "
            "asked for them after feedback; args.store.pictures says which are kept"
        )
    if done.unreadable:
        print(f"{done.unreadable} pictures are not where they should be, or cannot be shown in a browser")
    print(f"{studio.url}/projects/{done.project}/data")


def _pull(command: Pull) -> None:
    (database, _), studio = command.opened(), command.server()
    done = pull(database, studio, command.project, command.remove_most)
    server.remove_copies(command.data, done.forgotten)
    print(", ".join(f"{count} {what}" for what, count in done.counts.items()))
    if done.foreign:
        print(f"{done.foreign} submissions are none of this program's tasks or forms and were left alone")


def _export(command: Export) -> None:
    database, files = command.opened()
    with database.reading() as connection:
        items, left_out = reviews.verified(connection, command.reviewers)
    written, missing = export(items, files.read, command.output, command.source, command.generator)
    reasons = dict(left_out) | ({"picture missing": missing} if missing else {})
    print(f"{written} verified items in {command.output}")
    if reasons:
        print("left out: " + ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())))


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    command = get_subcommand(CliApp.run(Review, cli_args=None if arguments is None else [*arguments]))
    try:
        match command:
            case Push():
                _push(command)
            case Pull():
                _pull(command)
            case Export():
                _export(command)
            case Start():
                server.start(command)
    except (ReviewError, StoreUnavailable, PicturesUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
