"""What is kept of answers, where, and for how long. Knows no database."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Keep = Literal["off", "all", "sampled", "flagged"]

#: The ids of rows tell times of the years 1831 to 2109 (``app.store.models``): what is further away has none.
_MOST_DAYS, _MOST_HOURS = 100 * 365.25, 50 * 365.25 * 24


class StoreSettings(BaseModel):
    """``args.store``. Where several ingress replicas run on several nodes, the database is PostgreSQL: a SQLite file is
    shared by the processes of one node only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep: Keep = Field(
        "all",
        description="which answers are kept: `all`; `sampled`: a share of the pictures, and whatever gets feedback; "
        "`flagged`: only what gets feedback; `off`: nothing, and there is no feedback and no search",
    )
    sample_share: float = Field(0.01, ge=0, le=1, description="share of the pictures, by hash, that `sampled` keeps")
    feedback_window_h: float = Field(
        24.0,
        gt=0,
        le=_MOST_HOURS,
        description="hours for which feedback finds an answer that `sampled` or `flagged` will not keep",
    )
    url: str | None = Field(
        None,
        description="postgresql://USER@HOST/DATABASE or sqlite:////FILE; null: `DEEPTRUST_STORE_URL`, else a SQLite "
        "file in ~/.local/share/deeptrust/store",
    )
    keep_days: float | None = Field(
        90.0,
        gt=0,
        le=_MOST_DAYS,
        description="older answers are removed with their feedback and pictures; null: never",
    )
    keep_count: int | None = Field(
        1_000_000, ge=1, description="beyond it the oldest answers that have no feedback are removed; null: never"
    )
    pictures: Literal["none", "flagged", "all"] = Field(
        "flagged", description="`flagged`: who gives feedback is asked for the picture; `all`: every picture is kept"
    )
    pictures_url: str | None = Field(
        None,
        description="folder or s3://BUCKET/PREFIX; null: beside the SQLite file, and with PostgreSQL none are kept",
    )
    max_queue: int = Field(4096, ge=1, description="answers that wait to be written; beyond it they are not kept")
    max_picture_queue_bytes: int = Field(64 * 2**20, ge=0, description="pictures that wait to be written")
    timeout_s: float = Field(5.0, gt=0, le=60, description="longest wait for the database; then feedback gets 503")
    max_deferred: int = Field(
        100_000, ge=0, description="pictures that wait because their senders can (`Prefer: respond-async`), at most"
    )
    max_deferred_bytes: int = Field(16 * 2**30, ge=0, description="size of those")
    deferred_in_work: int = Field(8, ge=1, le=1024, description="of those that an ingress replica works on at a time")
    results_hours: float = Field(
        24.0, gt=0, le=_MOST_HOURS, description="hours for which their answers can be fetched, once they are all there"
    )
    search_timeout_s: float = Field(2.0, gt=0, le=60, description="longest time of a search; then it gets 503")

    @field_validator("keep", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as false

    @property
    def database_url(self) -> str:
        """A URL as SQLAlchemy takes it."""
        url = self.url or os.environ.get("DEEPTRUST_STORE_URL")
        if not url:
            return f"sqlite:///{Path('~/.local/share/deeptrust/store/store.db').expanduser()}"
        for scheme in ("postgresql://", "postgres://"):
            if url.startswith(scheme):
                return f"postgresql+psycopg://{url.removeprefix(scheme)}"
        return url

    @property
    def pictures_place(self) -> str | None:
        """Where pictures are kept; None: nowhere."""
        if self.pictures == "none" or self.keep == "off":
            return None
        if self.pictures_url is None and self.database_url.startswith("sqlite:///"):
            return str(Path(self.database_url.removeprefix("sqlite:///")).absolute().parent / "pictures")
        return self.pictures_url
