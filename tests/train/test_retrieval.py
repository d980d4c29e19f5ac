"""Retrieval: BM25 agrees with its formula, ties are shared out, and tags that help are seen to help."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from deployments.checkpoints import resolve
from train.retrieval import Bm25, difference, found, human_recalls, main, recalls, retrieval, terms


def test_bm25_follows_its_formula() -> None:
    documents = [["dog", "ball"], ["dog", "dog", "snow", "snow"], ["cat"]]
    scores = Bm25(documents, k1=1.2, b=0.75).scores(["dog", "unknown"])
    idf, average = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5)), 7 / 3
    expected = [
        idf * times * 2.2 / (times + 1.2 * (0.25 + 0.75 * length / average)) for times, length in ((1, 2), (2, 4))
    ]
    assert scores[:2] == pytest.approx(expected)
    assert scores[2] == 0


def test_terms_are_stems_without_stop_words() -> None:
    assert terms("The dogs are running on a beach.") == terms("dog running beach")


def test_ties_are_shared_out_and_no_common_word_is_not_found() -> None:
    assert found(np.array([2.0, 2.0, 2.0, 1.0]), 0, 1) == pytest.approx(1 / 3)
    assert found(np.array([3.0, 2.0, 2.0]), 1, 2) == pytest.approx(0.5)
    assert found(np.array([3.0, 2.0, 2.0]), 1, 10) == 1.0
    assert found(np.zeros(3), 0, 10) == 0.0


def test_own_pictures_are_found_by_their_words() -> None:
    documents = [f"a picture of thing{number}" for number in range(20)]
    queries = [[f"thing{number}", "nothing of the kind"] for number in range(20)]
    assert recalls(documents, queries) == pytest.approx(np.full((20, 2), 0.5))


def rows(helpful: bool) -> list[dict[str, object]]:
    # captions name a kind that four pictures share; tags name the picture, or nothing
    return [
        {
            "id": str(number),
            "caption": f"kind{number // 4}",
            "tags": [f"name{number}" if helpful else "thing"],
            "references": [f"kind{number // 4} name{number}", f"name{number} kind{number // 4}"],
        }
        for number in range(80)
    ]


def test_tags_that_help_are_seen_to_help_and_others_not() -> None:
    good, useless = retrieval(rows(True), 200), retrieval(rows(False), 200)
    assert good["systems"]["captions"]["recall_at_1"]["value"] == pytest.approx(0.25, abs=1e-3)
    assert good["systems"]["captions_and_tags"]["recall_at_1"]["value"] == 1.0
    assert good["tags_add"]["recall_at_1"]["low"] > 0.5
    assert useless["tags_add"]["recall_at_1"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_captions_that_find_fewer_pictures_than_others_are_seen_to() -> None:
    asked = [[f"kind{number // 16} name{number}"] for number in range(80)]
    telling, alike = [texts[0] for texts in asked], [f"kind{number // 16}" for number in range(80)]
    fewer = difference(alike, telling, asked, 200, 0)["recall_at_10"]
    assert fewer["value"] == pytest.approx(10 / 16 - 1) and fewer["high"] < -0.3
    assert difference(alike, alike, asked, 200, 0)["recall_at_1"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_human_documents_never_hold_the_query() -> None:
    # each person uses words of their own: nobody's caption is found by another's
    references = [[f"a{number}", f"b{number}", f"c{number}"] for number in range(12)]
    assert human_recalls(references, together=True).sum() == 0
    same = [[f"x{number}", f"x{number} y", f"x{number} z"] for number in range(12)]
    assert human_recalls(same, together=False) == pytest.approx(np.ones((12, 2)))


def test_everybody_asks_with_all_captions_of_a_photo_whatever_the_others_have() -> None:
    # of three captions the last is found by none that it is asked with; of two, both are found
    three = [[f"x{number}", f"x{number} y{number}", f"y{number}"] for number in range(11)]
    found_of_each = human_recalls([*three, ["z", "z w"]], together=False)
    assert found_of_each == pytest.approx(np.array([[2 / 3] * 2] * 11 + [[1.0] * 2]))


def test_a_picture_of_one_caption_is_searched_and_not_asked_for() -> None:
    alone = {"id": "alone", "caption": "kind0", "tags": ["thing"], "references": ["kind0 name0"]}
    with_it, without = retrieval([*rows(False), alone], 50), retrieval(rows(False), 50)
    assert (with_it["photos"], with_it["left_out"], with_it["queries"]) == (81, 1, 160)
    assert (without["photos"], without["left_out"], without["queries"]) == (80, 0, 160)
    # four of eighty share a kind with it
    one = with_it["systems"]["captions"]["recall_at_1"]["value"]
    assert one == pytest.approx((76 / 4 + 4 / 5) / 80, abs=1e-3)
    assert set(with_it["systems"]) == set(without["systems"])
    with pytest.raises(DataError, match="no picture has two human captions"):
        retrieval([alone])


def test_the_command_reads_rows_that_were_kept_of_the_same_and_refuses_others(tmp_path: Path) -> None:
    from tests.train.small_models import captioned_folder, small_captioner

    # what was kept is not captioned again: nobody would say these captions
    folder, data = str(small_captioner(tmp_path / "captioner")), captioned_folder(tmp_path / "photos")
    of = {"captioner": resolve(folder).name, "tagger": None, "data": "photos 24 photos, fixed split"}
    file, output = tmp_path / "rows.json", tmp_path / "result.json"
    arguments = ["--data", str(data), "--captioner", folder, "--tagger", "", "--rows", str(file)]
    arguments += ["--output", str(output), "--resamples", "50"]
    file.write_text(json.dumps(of | {"rows": rows(True)}))
    main(arguments)
    result = json.loads(output.read_text())
    assert of.items() <= result.items()
    assert result["photos"] == 80 and result["queries"] == 160
    assert result["systems"]["human_captions_together"]["recall_at_10"]["value"] == 1.0

    output.unlink()
    for kept, complaint in (
        (rows(True), "does not say of which captioner"),
        (of | {"captioner": "other#1", "rows": rows(True)}, "is of captioner other#1, not .*: name another file"),
        (of | {"tagger": "other#1", "rows": rows(True)}, "is of tagger other#1, not None"),
        (of | {"data": "photos 23 photos", "rows": rows(True)}, "is of data photos 23 photos, not photos 24"),
    ):
        file.write_text(json.dumps(kept))
        with pytest.raises(SystemExit, match=complaint):
            main(arguments)
    assert not output.exists()


def test_rows_that_are_kept_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.train.small_models import captioned_folder, small_captioner

    monkeypatch.setenv("DEEPTRUST_CACHE", str(tmp_path / "cache"))
    folder, data = str(small_captioner(tmp_path / "captioner")), captioned_folder(tmp_path / "photos")
    arguments = ["--data", str(data), "--captioner", folder, "--tagger", "", "--rows", str(tmp_path / "rows.json")]
    arguments += ["--output", str(tmp_path / "result.json"), "--resamples", "50"]
    found = []
    for _ in range(2):
        main(arguments)
        found.append(json.loads((tmp_path / "result.json").read_text()) | {"finished_at": None})
        monkeypatch.setattr("train.generate.caption_all", None)
    assert found[0] == found[1] and found[0]["captioner"] == resolve(folder).name
