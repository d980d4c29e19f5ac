"""Search in the store: words, dates, pages, and how it is done with many rows."""

from __future__ import annotations

from typing import Any

import pytest

from app.store import search
from app.store.models import first_id
from app.store.search import BadCursor, Place, Query
from app.store.store import Store
from tests.app.stores import Stores, annotation, hits, keep, names, run


@pytest.fixture
def filled(stores: Stores) -> Store:
    store = stores()
    keep(
        store,
        annotation("caption", "human", "Two dogs running on the beach", "animal", "outdoors"),
        annotation("tag", "ai", "an animal at the sea", "dog", "beach"),
        annotation("one word", "ai", "a dog sleeps", "sofa"),
        annotation("accent", "uncertain", "a café in the rain", "street scene"),
        annotation("nothing", None),
    )
    return store


def test_words_are_found_by_their_stem_in_caption_and_tags_tags_first(filled: Store) -> None:
    assert hits(filled, words="dog") == ["tag", "one word", "caption"]
    assert hits(filled, words="the dogs at the beach") == ["tag", "caption"]
    assert hits(filled, words="RUN") == ["caption"]
    assert hits(filled, words="cafe") == hits(filled, words="Caf\N{LATIN SMALL LETTER E WITH ACUTE}") == ["accent"]
    assert hits(filled, words="elephant") == hits(filled, words="the") == hits(filled, words="!?") == []


def test_everything_that_is_asked_for_must_hold(filled: Store) -> None:
    assert hits(filled) == ["nothing", "accent", "one word", "tag", "caption"]
    assert hits(filled, verdict="ai") == ["one word", "tag"]
    assert hits(filled, words="dog", verdict="human") == ["caption"]
    assert hits(filled, tags=("street scene",)) == ["accent"]
    assert hits(filled, tags=("street",)) == hits(filled, tags=("dog", "sofa")) == []
    assert hits(filled, tags=("dog", "beach"), verdict="ai", words="sea") == ["tag"]


def test_a_query_is_words_and_nothing_else(filled: Store) -> None:
    of_a_dog = ("dog*", "' | 'dog", "dog & !dog", '" OR "dog', "-dog")
    of_nothing = (
        *("dog OR 1", "dog OR elephant", "tags_words : dog", "NEAR(dog beach)", "do*"),
        *('"', "\\", "%", "\0", "a" * 5000),
    )
    for hostile in of_a_dog + of_nothing:
        expected = ["tag", "one word", "caption"] if hostile in of_a_dog else []
        assert hits(filled, words=hostile) == expected, hostile[:20]
        assert hits(filled, tags=(hostile,)) == hits(filled, verdict=hostile.replace("\0", "")) == []


def test_dates_bound_a_search(filled: Store) -> None:
    rows, _ = run(filled.search(Query()))
    middle = first_id(rows[2].at.timestamp())
    assert hits(filled, from_id=middle) == ["nothing", "accent", "one word"]
    assert hits(filled, until_id=middle) == ["tag", "caption"]
    assert hits(filled, words="dog", from_id=middle) == ["one word"]
    assert hits(filled, tags=("dog",), until_id=middle) == ["tag"]


@pytest.mark.parametrize("query", [{}, {"words": "dog"}, {"tags": ("dog",)}, {"verdict": "ai"}])
def test_pages_give_everything_once_while_more_is_written(stores: Stores, query: dict[str, Any]) -> None:
    store = stores()
    captions = [("a dog", "dog"), ("a dog", "cat"), ("a cat", "dog")]
    keep(store, *(annotation(str(i), "ai", *captions[i % 3]) for i in range(30)))
    everything = hits(store, limit=100, **query)
    seen: list[str] = []
    place: Place | None = Place()
    while place is not None:
        rows, place = run(store.search(Query(limit=7, place=place, **query)))
        assert len(rows) == 7 or place is None
        seen += names(rows)
        keep(store, annotation(f"later {len(seen)}", "ai", "a dog", "dog"))
        place = None if place is None else Place.parse(str(place))
    in_order = [name for name in seen if not name.startswith("later")]
    assert in_order == everything and len(set(seen)) == len(seen) and len(everything) >= 20


def test_many_rows_are_found_by_the_index_and_by_looking_through_the_newest(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores()
    keep(store, *(annotation(str(i), "ai", "a rare thing" if i % 5 == 0 else "a common thing", "x") for i in range(40)))
    expected = hits(store, words="rare", limit=50)
    monkeypatch.setattr(search, "_NEWEST_ROWS", 10)
    assert hits(store, words="rare", limit=50) == expected == [str(i) for i in range(35, -1, -5)]
    assert hits(store, words="rare", limit=2) == ["35", "30"]
    assert hits(store, words="rare", limit=4) == ["35", "30", "25", "20"], "there are enough a little further back"
    begins = {found.annotation.id: first_id(found.at.timestamp()) for found in run(store.search(Query(limit=50)))[0]}
    assert hits(store, words="rare", from_id=begins["10"], until_id=begins["17"]) == ["15", "10"]
    assert hits(store, words="rare", from_id=begins["4"], until_id=begins["33"]) == ["30", "25", "20", "15", "10", "5"]


@pytest.mark.parametrize(
    "cursor", ["", "x", "!!!!", str(Place(1, 5)) + "A", "Mi41", "MC4tMQ", "MC45MjIzMzcyMDM2ODU0Nzc1ODA4"]
)
def test_a_cursor_that_no_page_gave_is_refused(cursor: str) -> None:
    with pytest.raises(BadCursor):
        Place.parse(cursor)
