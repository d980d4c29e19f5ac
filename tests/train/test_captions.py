"""Caption data: text rules, the split, the scores."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.captions import clean_caption, score_captions
from train.captions import CaptionedPhoto, read_captions, split_photos


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("A black-and-white Dog jumps .", "a black and white dog jumps"),
        ("The dog's  ball; it's red!", "the dog's ball it's red"),
        ("  ", ""),
        ("'quoted' words", "quoted words"),
        (" ".join(["word"] * 40), " ".join(["word"] * 30)),
    ],
)
def test_captions_are_normalised(raw: str, expected: str) -> None:
    assert clean_caption(raw) == expected


def test_only_photos_with_a_file_and_a_caption_are_read(tmp_path: Path) -> None:
    (tmp_path / "Images").mkdir()
    (tmp_path / "Images" / "1_a.jpg").write_bytes(b"x")
    (tmp_path / "Images" / "2_b.jpg").write_bytes(b"x")
    (tmp_path / "captions.txt").write_text('image,caption\n1_a.jpg,"A dog, running ."\n2_b.jpg,.\n3_c.jpg,A cat .\n')
    assert read_captions(tmp_path) == [CaptionedPhoto("1_a.jpg", ("A dog, running .",))]


def test_a_wrong_layout_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"captions\.txt"):
        read_captions(tmp_path)
    (tmp_path / "Images").mkdir()
    (tmp_path / "captions.txt").write_text("image_name| comment\n")
    with pytest.raises(ValueError, match="image,caption"):
        read_captions(tmp_path)


def test_the_split_is_by_photo_and_blind_to_order_and_secret() -> None:
    photos = [CaptionedPhoto(f"{number}_{number * 7:x}.jpg", ("a dog",)) for number in range(100)]
    renamed = [CaptionedPhoto(f"{number}.jpg", ("a dog",)) for number in reversed(range(100))]
    first, second = split_photos(photos, 20, 10), split_photos(renamed, 20, 10)
    for part, size in (("test", 20), ("val", 10), ("train", 70)):
        assert len(first[part]) == size
        assert [p.name.split("_")[0] for p in first[part]] == [p.name.split(".")[0] for p in second[part]]


def test_scores_know_a_perfect_caption_from_a_wrong_one() -> None:
    references = {
        "1": ["A dog runs over the green grass .", "A dog is running"],
        "2": ["Two men play football on a field .", "men play football"],
        "3": ["A child in a red coat stands in snow .", "a child in snow"],
    }
    perfect = score_captions({name: texts[0] for name, texts in references.items()}, references)
    wrong = score_captions({"1": "a plane", "2": "a house by the sea", "3": "cars on a road"}, references)
    assert perfect["bleu4"] == pytest.approx(1, abs=1e-6)
    assert perfect["cider"] > 3 > 0.5 > wrong["cider"]
    with pytest.raises(ValueError, match="different photos"):
        score_captions({"1": "a dog"}, references)
