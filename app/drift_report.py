"""What has drifted: one HTML file with the statistics over time, what moved, and the pictures that drove it.

    python -m app.drift_report [--days 7] [--output drift.html] [--store-url URL] [--pictures-url PLACE]

In: the store of the application, where the watcher's looks are kept (``app.store.drift``). Pictures are shown as far
as they are kept (``args.store.pictures``); of the others there is the hash and what was answered. Out: a page that
needs nothing beside it. Knows no statistic and starts nothing.
"""

from __future__ import annotations

import base64
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection, select

from app.store import drift
from app.store.database import Database, StoreUnavailable
from app.store.drift import Look
from app.store.models import Picture, Prediction
from app.store.pictures import PictureFiles, PicturesUnavailable
from app.store.settings import StoreSettings
from deployments.drift_statistic import CHANNELS
from deployments.images import ImageError, small_jpeg

_PATIENCE_S = 60.0
_SIDE_PX = 256
#: Alarms that are shown with their pictures, the latest first.
_ALARMS = 5
_POINTS = 600
_WIDTH, _HEIGHT, _LEFT, _FOOT = 860, 240, 44, 24
_COLOURS = dict(zip(CHANNELS, ("#14877a", "#9c3aa8", "#b56a00"), strict=True))


class DriftReportSettings(BaseModel):
    """Report what the watcher for drift saw."""

    model_config = ConfigDict(extra="forbid")

    days: float = Field(7.0, gt=0, description="how far back")
    output: Path = Field(Path("drift.html"), description="file that is written")
    store_url: str | None = Field(
        None, description="`args.store.url` of the application; unset: as it has it by default"
    )
    pictures_url: str | None = Field(None, description="`args.store.pictures_url` of the application")


@dataclass(frozen=True)
class Driver:
    """A picture that drove a look."""

    sha256: str
    witness: float
    answered: str
    picture: str
    """data: URL; empty: it is not kept."""


class ReportError(RuntimeError):
    """There is nothing to report; the message says why, and what to do."""


def chart(looks: Sequence[Look]) -> str:
    """Each channel's statistic in units of its threshold, over time: SVG of numbers and times alone."""
    if not looks:
        return ""
    step = -(-len(looks) // _POINTS)
    shown = list(looks)[::step]
    first, last = shown[0].at.timestamp(), shown[-1].at.timestamp()
    span = max(last - first, 1.0)
    top = max(1.25, *(max(look.told["ratios"].values()) for look in shown)) * 1.05

    def place(at: datetime, ratio: float) -> tuple[float, float]:
        across = _LEFT + (at.timestamp() - first) / span * (_WIDTH - _LEFT - 8)
        return round(across, 1), round(8 + (1 - max(0.0, ratio) / top) * (_HEIGHT - _FOOT - 8), 1)

    _, one = place(shown[0].at, 1.0)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Statistic over threshold, '
        f'{len(looks)} looks, largest {top / 1.05:.2f}">',
        f'<line x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{one}" y2="{one}" class="limit"/>',
        f'<text x="4" y="{one + 4}">alarm</text>',
    ]
    for channel, colour in _COLOURS.items():
        points = " ".join(",".join(map(str, place(look.at, look.told["ratios"].get(channel, 0.0)))) for look in shown)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 6}">{shown[0].at:%Y-%m-%d %H:%M}</text>')
    parts.append(f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 6}" text-anchor="end">{shown[-1].at:%Y-%m-%d %H:%M} UTC</text>')
    return "".join([*parts, "</svg>"])


def drivers(connection: Connection, files: PictureFiles | None, look: Look) -> list[Driver]:
    """The pictures that drove a look, as far as they are known."""
    hashes = [sha256 for sha256, _ in look.pictures]
    said: dict[str, str] = {}
    answers = select(Prediction.sha256, Prediction.verdict, Prediction.ai_probability)
    for row in connection.execute(answers.where(Prediction.sha256.in_(hashes)).order_by(Prediction.id)):
        said[row.sha256] = f"{row.verdict or 'no verdict'}, {row.ai_probability or 0:.2f}"
    stored = select(Picture.sha256).where(Picture.sha256.in_(hashes), Picture.stored.is_(True))
    there = set(connection.execute(stored).scalars())
    return [
        Driver(
            sha256,
            witness,
            said.get(sha256, "its answer is not kept"),
            _shown(files, sha256) if files is not None and sha256 in there else "",
        )
        for sha256, witness in look.pictures
    ]


def _shown(files: PictureFiles, sha256: str) -> str:
    try:
        data = files.read(sha256)
        if data is None:
            return ""
        small = small_jpeg(data, _SIDE_PX)
    except (PicturesUnavailable, ImageError):
        return ""
    return f"data:image/jpeg;base64,{base64.b64encode(small).decode()}"


def render(looks: Sequence[Look], alarms: Sequence[tuple[Look, Sequence[Driver]]], days: float) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    last = looks[-1] if looks else None
    moved: list[tuple[str, float]] = []
    if last is not None:
        moved = sorted(last.told["moved"].items(), key=lambda item: -abs(item[1]))
    return environment.get_template("drift_report.html").render(
        now=datetime.now(UTC),
        days=days,
        looks=looks,
        last=last,
        moved=moved,
        chart=chart([look for look in looks if last is not None and look.revision == last.revision]),
        colours=_COLOURS,
        changes=[look for look in looks if look.changed],
        alarms=alarms,
    )


def report(settings: DriftReportSettings) -> Path:
    """Write the page.

    Raises:
        ReportError, StoreUnavailable: there is no store, or nothing in it.
    """
    store = StoreSettings(url=settings.store_url, pictures_url=settings.pictures_url)
    database = Database(store.database_url, _PATIENCE_S, _PATIENCE_S)
    if database.file is not None and not database.file.exists():
        raise ReportError(f"{database.file} does not exist: give the application's database as --store-url")
    database.open()
    files = PictureFiles(store.pictures_place) if store.pictures_place else None
    try:
        with database.reading() as connection:
            looks = drift.read(connection, time.time() - settings.days * 86400)
            if not looks:
                raise ReportError(
                    f"the watcher for drift has kept nothing in {settings.days:g} days: it looks when a window is "
                    "full, and not at a detector without a reference (GET /v1/models says so under `drift`)"
                )
            with_pictures = [look for look in looks if look.pictures]
            chosen = [look for look in with_pictures if look.alarm and look.changed][-_ALARMS:] or with_pictures[-1:]
            alarms = [(look, drivers(connection, files, look)) for look in reversed(chosen)]
    finally:
        database.close()
    settings.output.write_text(render(looks, alarms, settings.days))
    return settings.output


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    from pydantic_settings import CliApp

    settings: Any = CliApp.run(DriftReportSettings, cli_args=arguments)
    try:
        print(report(settings))
    except (ReportError, StoreUnavailable, PicturesUnavailable) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
