"""How long searches take over a full store: ``python -m benchmarks.store --url sqlite:////FILE --url postgresql://…``.

Fills each database, unless an earlier run did, with answers whose words and tags are as unevenly frequent as those of
real captions (Zipf), through the store's own writing code; then asks what the page and the API ask, each with many
different words, and takes the time until the page of results would be sent. Prints a table; writes JSON.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliApp
from sqlalchemy import func, select, text

from app.feedback import SearchItem, SearchPage
from app.store import events
from app.store.events import Event
from app.store.models import Prediction, first_id, row_of
from app.store.search import Place, Query
from app.store.settings import StoreSettings
from app.store.store import Store
from benchmarks.load import quantile
from benchmarks.report import write_result
from deployments.annotation import Annotation, Caption, Detection, Provenance

_WORDS = 4000
_BATCH = 2000
_DAY_S = 86400.0
_COPIES = 20
_COPY = """
    INSERT INTO predictions (id, answer_id, sha256, verdict, ai_probability, declared_ai, flagged, expires_id, record,
                             caption_words, tags_words, facets)
    SELECT id - :shift, substr(answer_id, 1, 28) || :suffix, substr(sha256, 1, 60) || :suffix, verdict, ai_probability,
           declared_ai, flagged, expires_id, record, caption_words, tags_words, facets
    FROM predictions WHERE id >= :newest
"""
GOAL_MS = 50.0


class StoreBenchmark(BaseModel):
    """Command line of ``python -m benchmarks.store``."""

    model_config = ConfigDict(extra="forbid")

    url: list[str] = Field(description="databases to fill and to ask; repeat the flag")
    rows: int = Field(1_000_000, ge=1000)
    repeats: int = Field(40, ge=5, description="how often each kind of search is made, with other words each time")


class Language:
    """Words whose frequency falls with their rank, as in captions."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        syllables = ("ba", "de", "fi", "go", "hu", "ka", "lo", "mi", "ne", "po", "ra", "su", "ti", "vo", "wu", "za")
        self.words = ["".join(self.random.choices(syllables, k=3)) + str(rank) for rank in range(_WORDS)]
        self._weights = list(accumulate(1 / (rank + 3) for rank in range(_WORDS)))

    def draw(self, count: int) -> list[str]:
        return self.random.choices(self.words, cum_weights=self._weights, k=count)

    def answer(self, number: int) -> Annotation:
        caption = self.draw(9)
        tags = list(dict.fromkeys(caption[:4] + self.draw(1)))
        probability = self.random.random()
        label = "ai" if probability > 0.9 else "uncertain" if probability > 0.8 else "human"
        provenance = Provenance(c2pa="absent", declared_ai=None)
        return Annotation(
            id=f"{number:032x}",
            sha256=hashlib.sha256(str(number).encode()).hexdigest(),
            detection=Detection(label=label, ai_probability=probability, provenance=provenance),
            caption=Caption(text=" ".join(caption)),
            tags=tags,
            models={"detector": "starter:detector#1a2b3c4d5e6f", "captioner": "starter:captioner#1a2b3c4d5e6f"},
            timings_ms={"decode": 4.0, "detector": 80.0, "captioner": 310.0, "tagger": 95.0, "total": 420.0},
        )


def fill(store: Store, language: Language, rows: int) -> float:
    """Write answers spread over the last thirty days; the seconds it took. A twentieth of them, the newest, is written
    by the store's own code; the others are copies of these with other ids and times.
    """
    database = store._database
    assert database is not None
    started, now = time.perf_counter(), time.time()
    written, period_s = rows // _COPIES, 30 * _DAY_S / _COPIES
    for start in range(0, written, _BATCH):
        batch = [
            row_of(language.answer(number), now - period_s * (1 - number / written), None)
            for number in range(start, min(start + _BATCH, written))
        ]
        with database.writing() as connection:
            events.write_predictions(connection, batch)
    print(f"  {written} rows written, {time.perf_counter() - started:.0f} s", flush=True)
    with database.reading() as connection:
        newest = connection.execute(select(func.min(Prediction.id))).scalar_one()
    for copy in range(1, _COPIES):
        with database.writing() as connection:
            if database.dialect == "postgresql":
                connection.execute(text("SET LOCAL statement_timeout = 0"))
            values = {"shift": first_id(period_s * copy), "suffix": f"{copy:04x}", "newest": newest}
            connection.execute(text(_COPY), values)
        print(f"  {written * (copy + 1)} rows, {time.perf_counter() - started:.0f} s", flush=True)
    took = time.perf_counter() - started
    if database.dialect == "postgresql":
        # as it does by itself in the minutes after so many rows: the first to read a page pays for it otherwise
        with database._writer.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("SET statement_timeout = 0"))
            connection.execute(text("VACUUM (ANALYZE)"))
    else:
        with database.writing() as connection:
            connection.execute(text("ANALYZE"))
    return took


def searches(language: Language) -> dict[str, Callable[[int], Query]]:
    """What is asked, by name; each takes the number of the repetition."""
    now = time.time()

    def common(i: int) -> str:
        return language.words[i % 10]

    def rare(i: int) -> str:
        return language.words[_WORDS // 2 + i]

    return {
        "newest": lambda i: Query(),
        "newest, page 1,000 on": lambda i: Query(place=Place(0, first_id(now - (3 + i / 10) * _DAY_S))),
        "verdict": lambda i: Query(verdict=("ai", "human", "uncertain")[i % 3]),
        "one day of last week": lambda i: Query(
            from_id=first_id(now - 8 * _DAY_S), until_id=first_id(now - 7 * _DAY_S)
        ),
        "common word": lambda i: Query(words=common(i)),
        "common word, late page": lambda i: Query(words=common(i), place=Place(1, first_id(now - 20 * _DAY_S))),
        "rare word": lambda i: Query(words=rare(i)),
        "two common words": lambda i: Query(words=f"{common(i)} {common(i + 3)}"),
        "common and rare word": lambda i: Query(words=f"{common(i)} {rare(i)}"),
        "two rare words": lambda i: Query(words=f"{rare(i)} {rare(i + 50)}"),
        "three words between": lambda i: Query(words=" ".join(language.words[40 + i + k * 20] for k in range(3))),
        "word that is not there": lambda i: Query(words=f"nothing{i}"),
        "common tag": lambda i: Query(tags=(common(i),)),
        "rare tag": lambda i: Query(tags=(rare(i),)),
        "common word, one day": lambda i: Query(
            words=common(i), from_id=first_id(now - (9 + i / 4) * _DAY_S), until_id=first_id(now - (8 + i / 4) * _DAY_S)
        ),
        "common word, half an hour": lambda i: Query(
            words=common(i),
            from_id=first_id(now - (8 + i / 4) * _DAY_S - 1800),
            until_id=first_id(now - (8 + i / 4) * _DAY_S),
        ),
        "common word, verdict, two weeks": lambda i: Query(
            words=common(i), verdict="ai", from_id=first_id(now - 21 * _DAY_S), until_id=first_id(now - 7 * _DAY_S)
        ),
        "word, tag and verdict": lambda i: Query(words=common(i), tags=(language.words[100 + i],), verdict="uncertain"),
    }


async def measure(url: str, settings: StoreBenchmark) -> dict[str, Any]:
    """Fill one database and ask it everything."""
    language = Language(1)
    store = Store(
        StoreSettings(url=url, keep_count=None, keep_days=None, pictures="none", timeout_s=60, search_timeout_s=60)
    )
    database = store._database
    assert database is not None
    database.open()
    with database.reading() as connection:
        there = connection.execute(select(func.count()).select_from(Prediction)).scalar_one()
    if there and not 0.99 * settings.rows <= there <= settings.rows:  # a run deletes a picture in the end
        raise SystemExit(f"error: {url} has {there:,} answers and not {settings.rows:,}: give an empty database")
    fill_s = None if there else round(fill(store, language, settings.rows), 1)
    store.start()
    while store.status()["state"] != "ready":
        await asyncio.sleep(0.05)
    result: dict[str, Any] = {"database": database.dialect, "fill_s": fill_s, "searches_ms": {}}
    for name, query_of in searches(language).items():
        times, found = [], []
        for i in range(settings.repeats):
            started = time.perf_counter()
            items, following = await store.search(query_of(i))
            page = SearchPage(
                items=[
                    SearchItem(at=item.at, annotation=item.annotation, picture=item.has_picture, feedback=[])
                    for item in items
                ],
                next=None if following is None else str(following),
            )
            page.model_dump_json()
            times.append((time.perf_counter() - started) * 1000)
            found.append(len(items))
        result["searches_ms"][name] = {
            "p50": round(quantile(times, 0.5), 1),
            "p95": round(quantile(times, 0.95), 1),
            "max": round(max(times), 1),
            "found_mean": round(sum(found) / len(found), 1),
        }
        print(f"  {database.dialect:10} {name:32} {json.dumps(result['searches_ms'][name])}", flush=True)
    times = []
    for _ in range(settings.repeats):
        answer = f"{language.random.randrange(settings.rows // _COPIES):032x}"
        event = Event(answer, "verdict", False, "human", key=uuid4().hex)
        started = time.perf_counter()
        await store.feedback(event)
        times.append((time.perf_counter() - started) * 1000)
    result["feedback_ms"] = {"p50": round(quantile(times, 0.5), 1), "p95": round(quantile(times, 0.95), 1)}
    started = time.perf_counter()
    await store.delete_picture(hashlib.sha256(b"7").hexdigest())
    result["delete_picture_ms"] = round((time.perf_counter() - started) * 1000, 1)
    result["p95_within_goal"] = all(each["p95"] <= GOAL_MS for each in result["searches_ms"].values())
    if database.file is not None:
        result["file_bytes"] = database.file.stat().st_size
    else:
        with database.reading() as connection:
            result["file_bytes"] = connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one()
    store.close()
    return result


def main() -> None:
    """Measure, print, write."""
    settings, load = CliApp.run(StoreBenchmark), os.getloadavg()[0]
    result: dict[str, Any] = {
        "rows": settings.rows,
        "repeats": settings.repeats,
        "goal_ms": GOAL_MS,
        "load_before": round(load, 1),
        "databases": [],
    }
    for url in settings.url:
        result["databases"].append(asyncio.run(measure(url, settings)))
        print(write_result("store", result), flush=True)


if __name__ == "__main__":
    main()
