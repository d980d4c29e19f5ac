"""The whole loop on real pictures: a generator that production has never seen comes back as verified labels.

    python -m benchmarks.loop --raw aivshuman-mini --work DIR [--generator unstated-2025]

Takes one generator out of the raw data, prepares what is left, trains a detector as the starter detector is trained,
registers it and puts it into production. Then serves it, gives the generator's pictures to ``train.retrain`` as
verified labels, and lets that go on by itself: next version of the data, training, gate, staging, canary, promotion,
while held-out pictures are replayed against the application.

Out: ``results/loop.json``: what the retrained detector gained on the new generator and on everything else, with
intervals, and what the way took. Every step is done once: the same command goes on after a kill.

The labels are the data set's own, written as reviewers' answers are exported; reviewing itself is
``tests/app/test_review_round.py``. The rules of staging and canary are the application's own but for how long they
look and how many answers they want, which are in the settings: this machine answers two pictures a second.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import BaseModel, ConfigDict, Field

from app import cluster
from app.serve import ServeSettings, serving, wait_until_ready
from benchmarks.report import write_result
from data.versions import open_version
from deployments.verified import GROUP_ROWS, SCHEMA
from train.starter import DETECTOR
from train.tracking import TrackingConfig, connect

ROOT = Path(__file__).parents[1]


class LoopConfig(BaseModel):
    """Settings of a run."""

    model_config = ConfigDict(extra="forbid")

    raw: Path = Field(description="raw data set with sources.csv, as data.prepare takes it")
    work: Path = Field(description="where everything is made; the same folder goes on")
    generator: str = Field("unstated-2025", description="what production has never seen")
    threads: int = Field(2, ge=1)
    window_s: float = Field(60.0, gt=0, description="of staging and canary")
    fewest: int = Field(60, ge=1, description="answers of the candidate before it is promoted")
    clients: int = Field(4, ge=1, description="replaying clients")
    test_share: float = Field(0.3, gt=0, lt=1, description="large, because a new generator has few pictures")

    @property
    def tracking(self) -> str:
        """Where runs and models are kept."""
        return f"sqlite:///{self.work}/mlflow.db"


def split_off(config: LoopConfig) -> tuple[Path, Path]:
    """The raw data without the generator, and a file of its pictures as verified items."""
    without, verified = config.work / "raw", config.work / "verified.parquet"
    rows = {name: _rows(config.raw / f"{name}.csv") for name in ("train", "sources")}
    new = {row["file_name"] for row in rows["sources"] if row["generator"] == config.generator}
    if not new:
        known = ", ".join(sorted({row["generator"] for row in rows["sources"]}))
        raise SystemExit(f"error: no picture of {config.generator!r}; there are {known}")
    for row in rows["train"]:
        source, target = config.raw / row["file_name"], without / row["file_name"]
        # a list may name what is not there: data.prepare rejects the row and says why
        if row["file_name"] not in new and source.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    for name, listed in rows.items():
        with (without / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(listed[0]))
            writer.writeheader()
            writer.writerows(row for row in listed if row["file_name"] not in new)
    sources = {row["file_name"]: row["source"] for row in rows["sources"]}
    items: dict[str, dict[str, Any]] = {}
    for name in sorted(new):
        data = (config.raw / name).read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        items[sha256] = {
            "sha256": sha256,
            "image": data,
            "label": "ai",
            "captions": [],
            "tags": None,
            "reviewers": ["the data set"],
            "verified_at": datetime(2026, 1, 1, tzinfo=UTC),
            "source": sources[name],
            "generator": config.generator,
        }
    pq.write_table(
        pa.Table.from_pylist([items[key] for key in sorted(items)], SCHEMA), verified, row_group_size=GROUP_ROWS
    )
    return without, verified


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(config: LoopConfig, *arguments: str, **variables: str) -> None:
    """A command of this project, as a user types it."""
    print(f"python -m {shlex.join(arguments)}", flush=True)
    environment = os.environ | {"MLFLOW_TRACKING_URI": config.tracking} | variables
    ended = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, check=False)
    if ended.returncode:
        raise SystemExit(f"error: {arguments[0]} ended with {ended.returncode}; the same command goes on")


def put_into_production(config: LoopConfig, raw: Path) -> None:
    """Prepare, train, register, evaluate and promote a detector that does not know the generator."""
    work = config.work
    if (work / "in-production").exists():
        return
    shares = ["--test-share", str(config.test_share)]
    run(config, "data.prepare", "aivshuman", "--input", str(raw), "--output", str(work / "prepared"), *shares)
    version = str(open_version(str(work / "prepared/aivshuman")).location)
    common = ["--storage", str(work / "runs"), "--cache", str(work / "features"), "--threads", str(config.threads)]
    first = str(work / "first")
    run(config, "train.detector", "--data", version, "--output", first, *shlex.split(DETECTOR), *common)
    run(config, "train.registry", "register", "detector", "--checkpoint", first)
    quick = ["--no-damages", "--people-by=", "--heat-maps", "0", "--against", ""]
    run(config, "train.evaluate", "detector", "--data", version, *quick)
    run(config, "train.registry", "promote", "detector", "--to", "production")
    (work / "in-production").touch()


#: What differs from the starter detector's recipe, chosen by folds of the training pictures and by validation pictures
#: (``benchmarks/TRIED.md``): with one damaged version of each picture, a new generator that weighs more than its share
#: and nothing of production's head left, what is gained on the new is lost on the old.
RETRAINING = {
    "variants": 4,
    "balance": 1.0,
    "head": "keep",
    "blend": 0.25,
    "epochs": 160,
    "max_steps": 1440,
    "validate_every": 1440,
}


def training_settings(config: LoopConfig) -> dict[str, Any]:
    """The recipe as ``train.retrain`` takes it, from production on."""
    flags = iter(shlex.split(DETECTOR))
    recipe = {flag.removeprefix("--").replace("-", "_"): value for flag, value in zip(flags, flags, strict=True)}
    recipe.pop("model")
    return recipe | RETRAINING | {"cache": str(config.work / "features"), "threads": config.threads}


def retrain(config: LoopConfig, raw: Path, verified: Path) -> None:
    """Serve what is in production, and let the retraining go its way."""
    content = yaml.safe_load((ROOT / "serve_config.cpu.yaml").read_text())
    content["http_options"]["port"] = cluster.free_port(8141)
    (application,) = content["applications"]
    application["args"]["store"] = {"url": f"sqlite:///{config.work}/store.db"}
    for deployment in application["deployments"]:
        if deployment["name"] in ("Detector", "DetectorCanary"):
            deployment["user_config"]["uri"] = "models:/detector/1"
    path = config.work / "serve_config.yaml"
    path.write_text(yaml.safe_dump(content))
    rules = config.work / "rules.yaml"
    rules.write_text(yaml.safe_dump({"detector": {"window_s": config.window_s, "fewest": config.fewest}}))
    os.environ["MLFLOW_TRACKING_URI"] = config.tracking
    with serving(ServeSettings(config=path)) as instance:
        wait_until_ready(instance, 900)
        flags = {
            "input": raw,
            "prepared": config.work / "prepared",
            "work": config.work / "retraining",
            "feedback": verified,
            "prepare": json.dumps({"test_share": config.test_share}),
            "train": json.dumps(training_settings(config)),
            "evaluation": json.dumps({"heat_maps": 0}),
            "url": instance.url,
            "replay-clients": config.clients,
            "staging-share": 1.0,
            "canary-share": 0.5,
            "interval-s": 5,
            "staging-rules": rules,
            "canary-rules": rules,
        }
        arguments = [f"--{name}={value}" for name, value in flags.items()]
        run(config, "train.retrain", *arguments, "--no-export", PORT=str(instance.port))


def outcome(config: LoopConfig) -> dict[str, Any]:
    """What the run of the retraining says."""
    from train.registry import aliases_of
    from train.retrain import OUTCOME_TAG, STEP_TAG, STEPS, runs

    client = connect(TrackingConfig(uri=config.tracking))
    tags = runs(client)[0].data.tags
    steps = {name: json.loads(tags[f"{STEP_TAG}.{name}"]) for name in STEPS if f"{STEP_TAG}.{name}" in tags}
    return {
        "generator": config.generator,
        "outcome": tags.get(OUTCOME_TAG),
        "shown": steps["judge"]["shown"],
        "gate_failures": steps["judge"]["failures"],
        "aliases": aliases_of(client, "detector"),
        "data": steps["data"]["told"],
        "seconds": {name: step["seconds"] for name, step in steps.items()},
        "staging": steps.get("staging", {}).get("told"),
        "canary": steps.get("canary", {}).get("told"),
        "training": RETRAINING,
        "settings": config.model_dump(mode="json", exclude={"raw", "work"}),
    }


def main(arguments: list[str] | None = None) -> None:
    """Go the whole way and write the result."""
    from pydantic_settings import CliApp

    config = CliApp.run(LoopConfig, cli_args=arguments)
    config = config.model_copy(update={"raw": config.raw.absolute(), "work": config.work.expanduser().absolute()})
    config.work.mkdir(parents=True, exist_ok=True)
    raw, verified = split_off(config)
    put_into_production(config, raw)
    retrain(config, raw, verified)
    result = outcome(config)
    print(json.dumps(result, indent=1), write_result("loop", result), sep="\n", flush=True)


if __name__ == "__main__":
    main()
