"""Quality reports and leakage probes: figures agree with the version, the page stands alone, edges hold."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data.browse import pictures, rows
from data.errors import DataError
from data.leakage import ProbeSettings, probe, roc_auc, verdict
from data.pages import bar_chart, bin_edges, contact_sheet, grouped_bar_chart, histogram, line_chart, render
from data.report import main, write_report
from data.versions import SPLITS, open_version
from tests.app.browser import chromium, find_chromium
from tests.data.made import encoded, picture
from tests.data.small_version import write_version


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_version(tmp_path_factory.mktemp("versions"), each=16, leaks=True)
    write_report(made, FEW)
    return made


#: Enough trees to tell what is meant here.
FEW = ProbeSettings(probe_trees=12)

# ------------------------------------------------------------------------------------------------------------ report


def test_figures_agree_with_the_version(version: Path) -> None:
    figures = json.loads((version / "report.json").read_text())
    frame = rows(open_version(version))
    assert figures["pictures"] == len(frame) == 64
    assert figures["sources"] == {
        "here": {"all": 32, "ai": 16, "human": 16},
        "there": {"all": 32, "ai": 16, "human": 16},
    }
    assert figures["splits"]["production"]["labels"] == {"human": 8, "ai": 8}
    assert figures["sizes"]["width"]["ai"]["median"] == 112 and figures["sizes"]["width"]["human"]["most"] == 96
    assert figures["sizes"]["jpeg_quality"]["ai"]["most"] == 60
    assert figures["declared"] == {"exif:Make": 4}  # where it says so, not what
    assert figures["rejects"] == {"truncated": 1, "missing": 1}
    assert figures["leakage"]["class"]["verdict"] == "confounded"
    assert open_version(version).manifest.version == version.name  # still a version


def test_the_same_version_has_the_same_report(version: Path) -> None:
    first = [(version / name).read_bytes() for name in ("report.html", "report.json")]
    assert write_report(str(version), FEW) == json.loads(first[1])
    assert first == [(version / name).read_bytes() for name in ("report.html", "report.json")]


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium: apt-get install chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_stands_alone_and_is_readable(version: Path, scheme: str) -> None:
    asked: list[str] = []
    with chromium() as browser:
        page = browser.new_page(color_scheme=scheme, viewport={"width": 420, "height": 800})  # type: ignore[arg-type]
        page.on("request", lambda request: asked.append(request.url))
        page.goto((version / "report.html").as_uri())
        assert [url for url in asked if not url.startswith("data:")] == [(version / "report.html").as_uri()]
        assert page.evaluate("() => [...document.images].every(image => image.naturalWidth > 0)")
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
        assert page.locator("svg[role=img][aria-label]").count() == page.locator("svg").count() > 8
        assert page.locator("svg text").first.evaluate("e => getComputedStyle(e).fill") == (
            "rgb(23, 26, 35)" if scheme == "light" else "rgb(236, 238, 244)"
        )
        assert page.get_by_text("<i>gone</i>.jpg").count() == 1  # escaped
        ids = page.evaluate("() => [...document.querySelectorAll('[id]')].map(e => e.id)")
        assert not [name for name in ids if re.fullmatch(r"(figure|axes|text|patch)_\d+", name)]


def test_captions_are_counted(tmp_path: Path) -> None:
    captions = write_report(write_version(tmp_path, "flickr30k"))["captions"]
    assert captions["captions"] == 160 and captions["a_picture"] == {"5": 32}
    assert captions["lengths"] == {"6": 160}
    assert captions["vocabulary"] == 4 + 5 + 8  # a dog number runs; five ways; eight numbers
    assert captions["not_in_train"]["test"] == {"words": 0, "share_of_text": 0.0}
    assert captions["changed_by_cleaning"] == 160


def test_a_version_of_hardly_anything(tmp_path: Path) -> None:
    figures = write_report(write_version(tmp_path, each=2))  # one group and one label a split
    assert figures["leakage"]["class"]["verdict"] == "not measurable"
    assert figures["leakage"]["sources"]["auc"] is None


def test_the_command_line(version: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(version), "--probe-trees", "5"])
    said = capsys.readouterr().out
    assert "confounded" in said and "report.html" in said
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 2
    with pytest.raises(DataError, match="is no prepared data set"):
        write_report(tmp_path)


def test_pictures_are_found_by_id(version: Path) -> None:
    opened = open_version(version)
    table = pd.concat([opened.table(split, ["id", "image"]).to_pandas() for split in SPLITS]).set_index("id")
    wanted = list(table.index[::5])
    assert pictures(opened, [*wanted, "0" * 64]) == {id_: table.loc[id_, "image"] for id_ in wanted}


# ------------------------------------------------------------------------------------------------------------ leakage


def files(count: int, seed: int = 0) -> pd.DataFrame:
    """Rows of files that say nothing about their label."""
    generator = np.random.default_rng(seed)
    width, height = generator.integers(200, 900, (2, count))
    return pd.DataFrame(
        {
            "id": [f"{number:064x}" for number in generator.permutation(count)],
            "format": "JPEG",
            "mode": "RGB",
            "width": width,
            "height": height,
            "bytes": generator.integers(10_000, 90_000, count),
            "jpeg_quality": generator.integers(60, 96, count),
            "quantisation": [f"t{number}" for number in generator.integers(0, 20, count)],
            "label": np.where(np.arange(count) % 2, "ai", "human"),
            "source": np.where(generator.random(count) < 0.5, "here", "there"),
            "group": [f"g{number}" for number in range(count)],
        }
    )


def test_files_that_say_nothing_are_clean() -> None:
    result = probe(files(400), FEW)
    assert result["class"]["verdict"] == "clean" and result["sources"]["verdict"] == "clean"
    whole = result["class"]["views"]["all"]
    assert whole["low"] <= whole["auc"] <= whole["high"] and whole["high"] - whole["low"] < 0.15


@pytest.mark.parametrize(
    ("column", "value", "view"),
    [
        ("width", 512, "size"),
        ("bytes", 5000, "length"),
        ("quantisation", "one", "quantisation"),
        ("mode", "L", "format"),
    ],
)
def test_each_trait_is_seen_by_its_view(column: str, value: object, view: str) -> None:
    frame = files(200)
    frame.loc[frame["label"] == "ai", column] = value
    views = probe(frame, FEW)["class"]["views"]
    assert views[view]["auc"] > 0.95 and views["all"]["auc"] > 0.9
    assert all(views[other]["auc"] < 0.7 for other in {"format", "size", "length", "quantisation"} - {view, "length"})


def test_a_group_is_not_seen_in_training() -> None:
    """Ten copies of each file: a classifier that has seen the others of a group would be perfect."""
    frame = pd.concat([files(24)] * 10, ignore_index=True)
    frame["id"] = [f"{number:064x}" for number in range(len(frame))]
    assert probe(frame, FEW)["class"]["views"]["all"]["auc"] < 0.9
    torn = frame.assign(group=frame["id"])
    assert probe(torn, FEW)["class"]["views"]["all"]["auc"] > 0.99


def test_sources_are_told_apart_and_missing_values_are_no_obstacle() -> None:
    frame = files(400)
    frame.loc[frame["source"] == "there", ["format", "jpeg_quality", "quantisation"]] = ["PNG", None, None]
    result = probe(frame, ProbeSettings(probe_pictures=300, probe_trees=12))
    assert result["sources"]["verdict"] == "confounded" and result["class"]["verdict"] != "confounded"
    assert result["class"]["pictures"] == 300
    assert set(result["class"]["by_source"]) == {"here", "there"}


def test_roc_auc_is_that_of_counting_pairs() -> None:
    generator = np.random.default_rng(0)
    labels, chances = generator.integers(0, 2, 60), generator.integers(0, 9, 60) / 8
    ones, zeros = chances[labels == 1], chances[labels == 0]
    pairs = [(one > zero) + 0.5 * (one == zero) for one in ones for zero in zeros]
    assert roc_auc(labels, chances) == pytest.approx(np.mean(pairs))
    assert [verdict(value) for value in (None, 0.5, 0.7, 0.9)] == ["not measurable", "clean", "traces", "confounded"]


# -------------------------------------------------------------------------------------------------------------- pages

AWKWARD: list[list[float]] = [
    [],
    [0.0],
    [0.1, 0.1],
    [math.nan, math.inf],
    [1.0, math.nan],
    [0.1, 0.1 + 1e-17],
    [1e-300, 2e-300],
    [-5.0, 5e15],
    [1.0, 1.0 + 2e-16],
    [3.0] * 50,
    list(range(400)),
]


@pytest.mark.parametrize("values", AWKWARD)
@pytest.mark.parametrize("log", [False, True])
def test_charts_take_what_measurements_give(values: list[float], log: bool) -> None:
    named = {f"name $x$ <b> {place}": value for place, value in enumerate(values[:50])}
    charts = [
        histogram("title & more", {"a": values, "b": []}, "x", "y", log=log),
        line_chart("title & more", {"a": (values, values), "b": ([0], [math.nan])}, "x", "y", log=log),
        bar_chart("title & more", named, "x", "y", order=log),
        grouped_bar_chart("title & more", {"human": named, "ai": {}}, "x", "y"),
    ]
    for text in charts:
        assert "title &amp; more" in text and "<b>" not in text
        assert ("<svg" in text) != ("no values" in text)


@pytest.mark.parametrize("values", [v for v in AWKWARD if v and np.isfinite(v).all()])
def test_bins_have_a_width(values: list[float]) -> None:
    edges = bin_edges(values, 30)
    assert (np.diff(edges) > 0).all() and len(edges) <= 31
    assert np.histogram(values, edges)[0].sum() == len(values)


def test_pictures_that_do_not_decode_leave_an_empty_place() -> None:
    sheet = contact_sheet([(encoded(picture(1)), "a <b>"), (b"no picture", "b"), (picture(2), "c")])
    assert sheet.count("<img") == 2 and sheet.count("not readable") == 1 and "<b>" not in sheet


def test_a_template_must_be_given_what_it_shows(tmp_path: Path) -> None:
    (tmp_path / "own.html").write_text(
        "{% extends 'base.html' %}{% block title %}{{ what }}{% endblock %}{% block content %}{{ what }}{% endblock %}"
    )
    assert "&lt;b&gt;" in render("own.html", folder=tmp_path, what="<b>")
    with pytest.raises(Exception, match="'what' is undefined"):
        render("own.html", folder=tmp_path)
