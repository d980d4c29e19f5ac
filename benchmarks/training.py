"""What is claimed of the training loop, on a prepared data set and a ViT of moderate size:

* ``overhead``  Ray Train against the same Lightning loop without Ray (torch's DataLoader decoding in a process
  beside), one worker, the same pictures, in alternating rounds: samples a second
* ``scaling``   one worker against two, each with one thread, as many pictures a step for each: samples a second
* ``workers``   one worker against two, DDP and FSDP, dropout and augmentation off: 50 losses of the same global batches
* ``kills``     SIGKILL of a worker and of the driver in the middle of an epoch: the run ends with as many steps, and
  its metric is that of the undisturbed run

    python -m benchmarks.training --data PREPARED/aivshuman [--parts overhead,scaling,workers,kills]
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import BaseModel, ConfigDict, Field

from benchmarks import plots
from benchmarks.load import paired
from benchmarks.report import RESULTS, provenance, write_result
from data.session import RaySettings, ray_session
from data.versions import open_version
from train.detector import DetectorTraining, prepare_job, train
from train.job import Outcome
from train.loop import fit_locally

ROOT = Path(__file__).parent.parent
#: Of the rate of the loop without Ray.
_GOAL = 0.92


class TrainingBenchmark(BaseModel):
    """Settings of a run."""

    model_config = ConfigDict(extra="forbid")

    data: str = Field(description="prepared aivshuman")
    parts: str = Field("overhead,workers,kills", description="which measurements; the others' last results are kept")
    rounds: int = Field(2, ge=1, description="alternating rounds of `overhead` and `scaling`")
    steps: int = Field(30, ge=10, description="steps of a round of either")
    compared: int = Field(50, ge=2, description="losses that `workers` compares")
    cpus: int = Field(
        4, ge=4, description="CPUs that the benchmark's own Ray believes to have: two workers and loaders fit"
    )


def random_vit(folder: Path, width: int, layers: int, size_px: int, patch_px: int = 16) -> int:
    """A ViT with random weights, without dropout, that tells human and ai apart; returns how many parameters it has."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        image_size=size_px,
        patch_size=patch_px,
        id2label={0: "human", 1: "ai"},
        label2id={"human": 0, "ai": 1},
    )
    model = ViTForImageClassification(config)
    model.save_pretrained(folder)
    size = {"height": size_px, "width": size_px}
    processor = {"do_resize": True, "size": size, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return sum(parameter.numel() for parameter in model.parameters())


def settings(config: TrainingBenchmark, model: Path, folder: Path, **changes: Any) -> DetectorTraining:
    values = {
        "data": config.data,
        "model": str(model),
        "output": str(folder / "out"),
        "storage": str(folder),
        "record": False,
        "head": "keep",
        "num_cpus": config.cpus,
        "validate_every": 10**6,
    }
    return DetectorTraining.model_validate(values | changes)


def _timed(config: TrainingBenchmark) -> dict[str, Any]:
    """Settings of a run whose speed counts: nothing but its steps. In each worker one thread computes, and a process
    beside it decodes; augmentation would make decoding the slower of the two, and then what is measured waits.
    """
    steps = {"max_steps": config.steps, "epochs": 1000, "validate_every": config.steps, "checkpoint_every": 10**6}
    return steps | {"threads": 1, "loaders": 1, "calibration_tiers": ["clean"], "augment": False}


def overhead(config: TrainingBenchmark, folder: Path) -> dict[str, Any]:
    """Samples a second with and without Ray."""
    model = folder / "vit"
    random_vit(model, 192, 6, 160)
    version = open_version(config.data)
    measured: dict[str, list[float]] = {"ray": [], "without": []}
    with ray_session(RaySettings(num_cpus=config.cpus)):
        for number in range(config.rounds):
            common = _timed(config) | {"batch_size": 16}
            for way in ("ray", "without") if number % 2 == 0 else ("without", "ray"):
                place = folder / f"{way}{number}"
                if way == "ray":
                    outcome = train(settings(config, model, place, **common))
                else:
                    place.mkdir()
                    job, _ = prepare_job(settings(config, model, place, **common), version)
                    outcome, _, _ = fit_locally(job, place)
                measured[way].append(outcome.samples_per_s)
                print(f"{way}: {outcome.samples_per_s:.1f} pictures/s", flush=True)
    return {
        "model": "ViT 192 x 6, 160 px, batch 16, one thread",
        "samples_per_s": {way: [round(value, 2) for value in values] for way, values in measured.items()},
        "ratio": round(paired(measured["ray"], measured["without"]), 4),
    }


def show(result: dict[str, Any], folder: Path = RESULTS) -> str:
    """The tables of ``overhead`` and ``scaling``, as far as they were measured, and their plots.

    Raises:
        KeyError: neither was.
    """
    told = []
    if measured := result.get("overhead", {}).get("samples_per_s"):
        rates = {"Lightning without Ray": measured["without"], "Ray Train": measured["ray"]}
        told.append(plots.compared("training", rates, "pictures/s", _GOAL, folder))
    if measured := result.get("scaling", {}).get("samples_per_s"):
        told.append(plots.compared("training_scaling", measured, "pictures/s", folder=folder))
    if not told:
        raise KeyError("overhead")
    return "\n\n".join(told)


def scaling(config: TrainingBenchmark, folder: Path) -> dict[str, Any]:
    """Samples a second of one worker and of two under DDP. Decoding has a process of its own for each worker."""
    model = folder / "scaled"
    parameters = random_vit(model, 192, 6, 160)
    names = {1: "one worker", 2: "two workers"}
    measured: dict[str, list[float]] = {name: [] for name in names.values()}
    with ray_session(RaySettings(num_cpus=config.cpus)):
        for number in range(config.rounds):
            for count in (1, 2) if number % 2 == 0 else (2, 1):
                place = folder / f"scaling-{number}-{count}"
                # the step's batch is all workers' together
                changes = {"batch_size": 16 * count, "num_workers": count, "lanes": count}
                outcome = train(settings(config, model, place, **_timed(config), **changes))
                measured[names[count]].append(round(outcome.samples_per_s, 2))
                print({name: rates[-1:] for name, rates in measured.items()}, flush=True)
    return {
        "model": "ViT 192 x 6, 160 px, 16 pictures a step and worker, one thread each",
        "parameters": parameters,
        "samples_per_s": measured,
        "ratio": round(paired(measured["two workers"], measured["one worker"]), 3),
    }


def workers(config: TrainingBenchmark, folder: Path) -> dict[str, Any]:
    """Largest relative difference of losses between one worker and two."""
    model = folder / "small"
    random_vit(model, 64, 2, 64)
    common = {
        "max_steps": config.compared,
        "epochs": 1000,
        "batch_size": 16,
        "lanes": 2,
        "augment": False,
        "learning_rate": 1e-3,
        "threads": 1,
        "validate_every": config.compared,
        "calibration_tiers": ["clean"],
    }
    curves: dict[str, list[float]] = {}
    with ray_session(RaySettings(num_cpus=config.cpus)):
        for strategy in ("ddp", "fsdp"):
            for count in (1, 2):
                name = f"{strategy}-{count}"
                place = folder / "workers"
                outcome: Outcome = train(
                    settings(config, model, place, **common, name=name, strategy=strategy, num_workers=count)
                )
                curves[name] = [loss for _, loss in outcome.losses]
                print(f"{name}: {curves[name][0]:.5f} ... {curves[name][-1]:.5f}", flush=True)

    def apart(one: str, other: str) -> float:
        return max(abs(a - b) / abs(a) for a, b in zip(curves[one], curves[other], strict=True))

    return {
        "steps": config.compared,
        "first_and_last_loss": {name: [round(curve[0], 5), round(curve[-1], 5)] for name, curve in curves.items()},
        "largest_relative_difference": {
            "ddp, 1 and 2 workers": apart("ddp-1", "ddp-2"),
            "fsdp, 1 and 2 workers": apart("fsdp-1", "fsdp-2"),
            "ddp and fsdp, 2 workers": apart("ddp-2", "fsdp-2"),
        },
    }


class Driver:
    """`python -m train.detector` as a process, its Ray with it."""

    def __init__(self, config: DetectorTraining, log: Path) -> None:
        self.log = log
        plain = config.model_dump(mode="json", exclude_unset=True)
        flags = []
        for name, value in plain.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                flags.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                flags.append(f"--{flag}={json.dumps(value) if isinstance(value, list) else value}")
        with log.open("a") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "train.detector", *flags],
                cwd=ROOT,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1", "RAY_DEDUP_LOGS": "0"},
            )

    def step(self) -> int:
        """The last step that was told of."""
        told = re.findall(r"step (\d+)/", self.log.read_text())
        return int(told[-1]) if told else 0

    def wait_for(self, step: int, timeout_s: float = 400) -> None:
        end = time.monotonic() + timeout_s
        while self.step() < step:
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the run ended at step {self.step()}:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.1)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill_worker(self) -> int:
        """SIGKILL one training worker; returns how many there are."""
        found = [one for one in self.family() if "TrainWorker" in " ".join(one.cmdline())]
        if not found:
            raise RuntimeError("there is no training worker")
        found[0].send_signal(signal.SIGKILL)
        return len(found)

    def kill(self) -> None:
        """SIGKILL the driver, and then what its Ray leaves behind: another machine would not have it either."""
        left = self.family()
        self.process.kill()
        self.process.wait()
        for one in left:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue

    def finish(self, timeout_s: float = 600) -> dict[str, Any]:
        """Wait for the end; steps and figures of its last lines."""
        code = self.process.wait(timeout_s)
        text = self.log.read_text()
        told = re.search(r"trained in (\d+) steps: (.*)", text)
        if code or told is None:
            raise RuntimeError(f"the run ended with {code}:\n{text[-3000:]}")
        auc = re.search(r"val_auc ([\d.]+)", told[2])
        resumed = [int(step) for step in re.findall(r"resuming after step (\d+)", text)]
        return {"steps": int(told[1]), "val_auc": float(auc[1]) if auc else None, "resumed_after": resumed}


def kills(config: TrainingBenchmark, folder: Path) -> dict[str, Any]:
    """An undisturbed run, one whose worker is killed and one whose driver is killed."""
    model = folder / "killed"
    random_vit(model, 64, 4, 64)
    common: dict[str, Any] = {
        "epochs": 4,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "threads": 1,
        "checkpoint_every": 10,
    }
    common |= {"num_workers": 2, "loaders": 1, "validate_every": 0, "calibration_tiers": ["clean"]}
    found: dict[str, Any] = {}
    for what in ("undisturbed", "worker", "driver"):
        run = settings(config, model, folder / "kills", **common, name=what)
        driver = Driver(run, folder / f"{what}.log")
        try:
            if what != "undisturbed":
                driver.wait_for(70)
                at = driver.step()
                if what == "worker":
                    driver.kill_worker()
                else:
                    driver.kill()
                    driver = Driver(run, folder / f"{what}.log")
                found[what] = {"killed_at_step": at, **driver.finish()}
            else:
                found[what] = driver.finish()
        finally:
            if driver.process.poll() is None:
                driver.kill()
        print(f"{what}: {found[what]}", flush=True)
    return found


def _table(part: str, measured: dict[str, Any]) -> str:
    if part == "workers":
        apart = measured["largest_relative_difference"]
        return plots.table([{"losses of": name, "largest difference": f"{value:.1e}"} for name, value in apart.items()])
    columns = ("killed_at_step", "resumed_after", "steps", "val_auc")
    rows = [{"killed": what} | {name: run.get(name, "") for name in columns} for what, run in measured.items()]
    return plots.table(rows)


def main(arguments: list[str] | None = None) -> None:
    """Measure; write ``results/training.json``, and of the first two a plot."""
    from pydantic_settings import CliApp

    config = CliApp.run(TrainingBenchmark, cli_args=arguments)
    measures = {"overhead": overhead, "scaling": scaling, "workers": workers, "kills": kills}
    file = RESULTS / "training.json"
    result: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        for part in config.parts.split(","):
            measured = measures[part](config, Path(folder))
            # written part by part: minutes lie between them
            result[part] = measured | {"commit": provenance()["commit"], "finished_at": provenance()["finished_at"]}
            write_result("training", result)
            print(show(result) if part in ("overhead", "scaling") else _table(part, measured), flush=True)
    print(f"written to {file}")


if __name__ == "__main__":
    main()
