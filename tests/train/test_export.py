"""Exported engines: admitted by parity and speed alone, used where the card says so, and answering as PyTorch does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from deployments import engines
from deployments.checkpoints import CheckpointError, resolve
from deployments.detector import DetectorModel
from deployments.engines import EngineEntry, usable
from deployments.views import render
from tests.train.small_models import noise, small_detector
from train.export import Candidate, ExportConfig, export, export_here, main, table

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    small_detector(folder / "detector")
    (folder / "photos").mkdir()
    for number in range(20):
        noise(number).save(folder / "photos" / f"{number:02d}.png")
    (folder / "photos" / "broken.jpg").write_bytes(b"no picture")
    return folder


def settings(folder: Path, output: str, **changes: object) -> ExportConfig:
    values = {
        "checkpoint": str(folder / "detector"),
        "photos": folder / "photos",
        "output": folder / output,
        "engines": ["onnxruntime-float32", "onnxruntime-int8"],
        "rounds": 1,
        "least_speed": 0,
        "threads": 1,
        **changes,
    }
    return ExportConfig.model_validate(values)


def entries(folder: Path) -> list[EngineEntry]:
    """What a checkpoint's card admits."""
    return [EngineEntry.model_validate(each) for each in json.loads((folder / "card.json").read_text())["engines"]]


def only(folder: Path, one: EngineEntry) -> None:
    """Have a checkpoint's card admit nothing else."""
    card = json.loads((folder / "card.json").read_text()) | {"engines": [one.model_dump()]}
    (folder / "card.json").write_text(json.dumps(card))


def views(model: DetectorModel) -> np.ndarray:
    return np.stack([render(noise(100 + number), model.views) for number in range(6)])


def test_an_admitted_engine_serves_and_answers_as_pytorch_does(folder: Path) -> None:
    measured = export_here(settings(folder, "exported", engines=["onnxruntime-float32"]))
    assert measured["onnxruntime-float32"]["admitted"] and measured["pytorch-float32"]["max_difference"] == 0
    exported = resolve(str(folder / "exported"))
    model, plain = DetectorModel(exported), DetectorModel(exported, engine=False)
    assert model.engine is not None and model.engine[0].engine == "onnxruntime"
    assert plain.engine is None
    assert np.abs(model.logits(views(plain)) - plain.logits(views(plain))).max() <= 1e-4
    assert np.ptp(model.detect(views(plain))) > 0
    read, by_pytorch = model.outputs(views(plain))[1], plain.outputs(views(plain))[1]
    assert read is not None and by_pytorch is not None and np.abs(read - by_pytorch).max() <= 1e-3
    assert model.explain(views(plain)[0]).max() == pytest.approx(1.0)  # heat maps need PyTorch
    assert exported.revision != resolve(str(folder / "detector")).revision
    assert "onnxruntime-float32" in table(measured)


def test_what_differs_too_much_or_is_no_faster_is_left_out(folder: Path) -> None:
    measured = export_here(settings(folder, "strict", most_difference=1e-9))
    assert not measured["onnxruntime-int8"]["admitted"]
    assert measured["onnxruntime-int8"]["why"] == "differs too much"
    assert not (folder / "strict" / "detector.int8.onnx").exists()
    slow = export_here(settings(folder, "slow", least_speed=1e9, engines=["onnxruntime-float32"]))
    assert slow["onnxruntime-float32"]["why"] == "not faster than PyTorch"
    assert not list((folder / "slow").glob("*.onnx"))
    assert DetectorModel(resolve(str(folder / "slow"))).engine is None


def test_engines_compute_under_the_allocator_of_replicas(folder: Path) -> None:
    pytest.importorskip("openvino")
    tried: list[Candidate] = ["openvino-float32", "onnxruntime-float32"]
    measured = export(settings(folder, "as-replicas", engines=tried))
    assert set(measured) == {"pytorch-float32", *tried}
    assert all(measured[name]["max_difference"] <= 1e-4 for name in tried)


def test_openvino_reads_the_same_file(folder: Path) -> None:
    pytest.importorskip("openvino")
    measured = export_here(settings(folder, "openvino", engines=["openvino-float32"]))
    assert measured["openvino-float32"]["max_difference"] <= 1e-4
    model = DetectorModel(resolve(str(folder / "openvino")))
    assert model.engine is not None and model.engine[0].engine == "openvino"
    plain = DetectorModel(resolve(str(folder / "detector")))
    assert np.abs(model.detect(views(plain)) - plain.detect(views(plain))).max() <= 0.02


def entry(**changes: object) -> dict[str, object]:
    plain = {"engine": "onnxruntime", "precision": "float32", "file": "a.onnx", "pictures": 9, "max_difference": 0.0}
    return {**plain, "speed": 2.0, **changes}


def test_the_fastest_that_fits_this_machine_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [
        entry(file="slow.onnx", speed=1.2),
        entry(file="fast.onnx", speed=3.0),
        entry(file="elsewhere.onnx", speed=9.0, needs=["an-instruction-set-of-tomorrow"]),
    ]
    folder = small_detector(tmp_path / "many", engines=listed)
    for each in listed:
        (folder / str(each["file"])).write_bytes(b"")
    found = resolve(str(folder))
    assert [each.file for each in usable(found, "cpu")] == ["fast.onnx", "slow.onnx"]
    assert usable(found, "cuda") == []
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    assert usable(found, "cpu") == []  # not installed


def test_an_engine_that_cannot_be_loaded_leaves_pytorch(tmp_path: Path) -> None:
    folder = small_detector(tmp_path / "damaged", engines=[entry()])
    (folder / "a.onnx").write_bytes(b"this is no network")
    assert DetectorModel(resolve(str(folder))).engine is None


@pytest.mark.parametrize(
    ("listed", "complaint"),
    [
        ([entry()], "a.onnx, which is not there"),
        ([entry(file="../../a.onnx")], "engines that are none"),
        ([{}], "none"),
        ([entry(engine="pytorch")], "have a file, and pytorch has none"),
        ([entry(device="cuda")], "a file is for CPUs"),
        ([entry(compiled=True)], "a file is for CPUs"),
        ([entry(engine="pytorch", file="", precision="int8")], "float32 or bfloat16"),
    ],
)
def test_a_card_that_lies_is_refused(tmp_path: Path, listed: list[dict[str, object]], complaint: str) -> None:
    folder = small_detector(tmp_path / "lies", engines=listed)
    with pytest.raises(CheckpointError, match=complaint):
        usable(resolve(str(folder)), "cpu")


def test_errors_say_what_to_do(folder: Path, tmp_path: Path) -> None:
    for arguments, complaint in (
        (["--photos", str(tmp_path), "--output", str(tmp_path / "x")], "fewer than two"),
        (["--photos", str(folder / "photos"), "--output", str(folder / "photos")], "there already"),
    ):
        with pytest.raises(SystemExit, match=complaint):
            main(["--checkpoint", str(folder / "detector"), *arguments])
    assert json.loads((folder / "detector" / "card.json").read_text())["task"] == "detection"


def test_pytorch_in_another_format_and_compiled_serves_batches_of_any_size(folder: Path) -> None:
    tried: list[Candidate] = ["pytorch-bfloat16", "pytorch-float32-compiled"]
    measured = export_here(settings(folder, "compiled", engines=tried, most_difference=1.0))
    assert measured["pytorch-float32-compiled"]["max_difference"] <= 1e-4
    assert 0 < measured["pytorch-bfloat16"]["max_difference"] < 0.05
    listed = {each.name: each for each in entries(folder / "compiled")}
    assert set(listed) == set(tried) and not list((folder / "compiled").glob("*.onnx"))
    assert not listed["pytorch-float32-compiled"].needs and "avx512_bf16" in listed["pytorch-bfloat16"].needs

    only(folder / "compiled", listed["pytorch-float32-compiled"])
    exported = resolve(str(folder / "compiled"))
    model, plain = DetectorModel(exported), DetectorModel(exported, engine=False)
    assert model.engine is not None and model.engine[0].compiled and not model.in_parts
    for size in (1, 2, 5, 6):
        given = views(plain)[:size]
        logits, read = model.outputs(given)
        expected, by_pytorch = plain.outputs(given)
        assert np.abs(logits - expected).max() <= 1e-4
        assert read is not None and by_pytorch is not None and np.abs(read - by_pytorch).max() <= 1e-3
    assert model.explain(given[0]).max() == pytest.approx(1.0)


def test_an_engine_in_two_bytes_leaves_the_weights_of_heat_maps_and_other_engines_alone(folder: Path) -> None:
    model = DetectorModel(resolve(str(folder / "detector")))
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    model.by_pytorch("bfloat16", compiled=False)(model.normalised(views(model)))
    assert all(value.equal(before[name]) for name, value in model.network.state_dict().items())


def test_an_export_keeps_what_is_admitted_for_the_other_device(folder: Path, tmp_path: Path) -> None:
    cuda = {"engine": "pytorch", "file": "", "precision": "bfloat16", "device": "cuda", "compiled": True}
    listed = [entry(**cuda), entry(**cuda | {"precision": "float32", "speed": 9.0}), entry(file="old.onnx")]
    both = small_detector(tmp_path / "both", engines=listed)
    (both / "old.onnx").write_bytes(b"of an export before")
    found = resolve(str(both))
    assert [each.name for each in usable(found, "cuda")] == ["pytorch-float32-compiled", "pytorch-bfloat16-compiled"]
    again = settings(folder, "again", engines=["onnxruntime-float32"]).model_copy(
        update={"checkpoint": str(both), "output": tmp_path / "again"}
    )
    export_here(again)
    assert [each.device for each in entries(tmp_path / "again")] == ["cuda", "cuda", "cpu"]
    assert [file.name for file in (tmp_path / "again").glob("*.onnx")] == ["detector.onnx"]


def test_an_engine_that_is_not_compiled_here_leaves_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(engines.torch, "compile", no_compiler)
    listed = [entry(engine="pytorch", file="", compiled=True)]
    assert DetectorModel(resolve(str(small_detector(tmp_path / "compiled", engines=listed)))).engine is None
