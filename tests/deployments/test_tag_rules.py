"""The rules that make a model's answer into tags, and the lexicon they imply words from."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from deployments.annotation import Tag
from deployments.tag_lexicon import LEXICON_FILE
from deployments.tag_rules import clean_tags, proposed
from deployments.words import lemma, stem


@given(st.text(max_size=200), st.text(max_size=200))
def test_any_answer_and_any_caption_give_tags_that_a_record_accepts(raw: str, caption: str) -> None:
    tags = clean_tags(raw, caption)
    TypeAdapter(list[Tag]).validate_python(tags)
    assert 3 <= len(tags) <= 10
    assert len(set(tags)) == len(tags)
    assert all(len(tag.split()) <= 3 for tag in tags)


def test_what_the_caption_neither_says_nor_implies_is_dropped() -> None:
    tags = clean_tags('["dog","taxi","restaurant","animal"]', "a dog sleeps on a sofa")
    assert "taxi" not in tags
    assert "restaurant" not in tags
    assert {"dog", "animal", "sofa", "furniture"} <= set(tags)


def test_forms_of_one_word_are_one_tag() -> None:
    tags = clean_tags('["dogs","dog","running","run"]', "two dogs are running on the beach")
    assert [tag for tag in tags if tag.startswith("dog")] == ["dog"]
    assert [tag for tag in tags if tag.startswith("run")] == ["running"]


def test_a_phrase_of_the_caption_stays_and_a_sentence_falls_apart() -> None:
    tags = proposed('["brown dog","dog is running on the grass"]', "a brown dog is running on the grass")
    assert tags[0] == "brown dog"
    assert {"dog", "running", "grass"} <= set(tags)
    assert all(len(tag.split()) <= 3 for tag in tags)


def test_an_answer_that_was_cut_off_is_still_read() -> None:
    assert proposed('["dog","beach","wa', "a dog on a beach") == ["dog", "beach"]


def test_an_empty_answer_is_filled_from_the_caption() -> None:
    assert clean_tags("", "a puppy on a beach")[:3] == ["puppy", "beach", "dog"]


@pytest.mark.parametrize(
    ("word", "singular"),
    [("children", "child"), ("gates", "gate"), ("dogs", "dog"), ("glass", "glass"), ("men", "man")],
)
def test_nouns_are_brought_to_their_singular(word: str, singular: str) -> None:
    assert lemma(word) == singular


@pytest.mark.parametrize(
    ("one", "other"), [("runs", "running"), ("rides", "riding"), ("women", "woman"), ("jumps", "jumping")]
)
def test_forms_share_a_stem(one: str, other: str) -> None:
    assert stem(one) == stem(other)


def test_a_colour_does_not_imply_a_fruit() -> None:
    assert "fruit" not in clean_tags("", "a man in an orange shirt")


@pytest.mark.parametrize(
    ("raw", "caption", "tags"),
    [
        (
            '["man", "dark skinned", "red carpet"]',
            "a dark skinned man is sitting on a red carpet",
            ["man", "red carpet", "carpet", "person"],
        ),
        ('["asian girl", "store"]', "two asian girls stand in front of a store", ["store", "girl", "person"]),
        ('["black people", "white coat"]', "black people in white coats", ["white coat", "people", "coat", "clothing"]),
        ('["black", "man"]', "a black man", ["man", "person", "photo"]),
        ('["family", "indian"]', "an indian family with a dog", ["family", "dog", "animal"]),
        ('["dark haired girl"]', "a dark haired girl is smiling", ["dark haired girl", "girl", "person"]),
        ('["black dog"]', "a black dog and a white swan", ["black dog", "dog", "swan", "animal", "bird"]),
    ],
)
def test_nobody_is_to_be_found_by_where_they_come_from_or_their_skin(raw: str, caption: str, tags: list[str]) -> None:
    assert clean_tags(raw, caption) == tags


def test_the_lexicon_is_small_and_states_its_licence() -> None:
    assert LEXICON_FILE.stat().st_size < 300_000
    assert "Princeton University" in json.loads(LEXICON_FILE.read_text())["licence"]
