"""``make starter``: the starter models' trained halves, made again from raw data by the commands that everybody uses.

In: the two raw data sets, and a list of captions without photos. Out: ``deployments/starter_weights/detector`` and
``captioner`` (weights, configuration, card) and their reports under ``--work``. Preparation and training resume, or do
nothing when they are done, and reports are made again, so the same command goes on after a kill.

What is committed is written last, both halves together: the cards tell the commit that the models were trained by, and
a file of the repository that had changed by then would make it ``-dirty``. ``--only`` one of the two from a clean tree.

    python -m train.starter --labelled aivshuman-mini --captioned flickr8k-224 --texts captions.txt.gz --work ~/starter
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_ROOT = Path(__file__).parent.parent
_WEIGHTS = _ROOT / "deployments" / "starter_weights"

#: The detector: a linear head on the class tokens of CLIP's middle blocks, judged once, after the last step.
DETECTOR = """
    --model starter:detector --head new --freeze tower --epochs 60 --batch-size 64 --learning-rate 1e-3 --weight-decay 0
    --warmup 0 --penalty 0.02 --balance 0.5 --max-steps 720 --validate-every 720 --seed 20260101
    """
#: What the captioner's decoder learns before it sees a photo: to write captions.
LANGUAGE = """
    --model new --new.dropout 0.1 --epochs 1 --batch-size 32 --learning-rate 1e-3 --weight-decay 0.05 --warmup 0.1
    --seed 20260101
    """
#: Then it learns to write what photos show, by the likelihood of human captions: each photo as it is and in two
#: augmented versions, in turn.
CAPTIONER = """
    --freeze tower --variants 3 --epochs 6 --batch-size 16 --learning-rate 6e-4 --weight-decay 0.05 --warmup 0.14
    --label-smoothing 0.1 --dropout 0.15 --keep-patches 0.4 --length-penalty 0.5 --prompt= --seed 20260101
    """
#: Last, by the CIDEr of captions that it draws, less what they score against photos that are alike: without that
#: captions become alike as well. The weights' average is kept: single steps scatter (benchmarks/TRIED.md).
CIDER = """
    --objective cider --temperature 0.5 --distinct 0.25 --freeze tower --variants 3 --epochs 4 --batch-size 16
    --learning-rate 1e-4 --weight-decay 0.05 --ema 0.998 --keep-patches 0.4 --prompt= --seed 20260101
    """


class Starter(BaseModel):
    """Make the starter models again."""

    model_config = ConfigDict(extra="forbid")

    labelled: str = Field("", description="raw data set of the detector: folder with train.csv, zip or s3://")
    captioned: str = Field("", description="raw data set of the captioner: folder with captions.txt, zip or s3://")
    texts: str = Field(
        "",
        description="captions without photos that the captioner's decoder learns from: --texts of train.language",
    )
    work: Path = Field(description="where data, runs, checkpoints and reports go")
    only: str = Field("detector,captioner", description="which of the two")
    threads: int = Field(2, ge=1)
    precision: Literal["32-true", "bf16-mixed"] = Field(
        "32-true",
        description="in which the captioner's tower computes and its decoder trains; bf16-mixed takes 0.6 of the time "
        "where a CPU has units for it, and many times as long elsewhere",
    )

    @model_validator(mode="after")
    def _told_what_to_read(self) -> Self:
        needed = {"detector": ("labelled",), "captioner": ("captioned", "texts")}
        chosen = self.only.split(",")
        if missing := [f"--{name}" for model in chosen for name in needed[model] if not getattr(self, name)]:
            raise ValueError(f"{' and '.join(missing)} must be given for {' and '.join(chosen)}")
        return self

    @field_validator("only")
    @classmethod
    def _names(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",")]
        if unknown := [name for name in names if name not in ("detector", "captioner")]:
            raise ValueError(f"{unknown[0]!r} is neither detector nor captioner")
        return ",".join(names)


def steps(config: Starter) -> Iterator[list[str]]:
    """The commands, in their order."""
    work = config.work.expanduser().absolute()
    prepared, models, reports = work / "prepared", work / "models", work / "reports"
    common = ["--storage", str(work / "runs"), "--threads", str(config.threads)]
    features = ["--cache", str(work / "features")]
    chosen = config.only.split(",")
    extracts = []
    if "detector" in chosen:
        data, head = str(prepared / "aivshuman"), str(models / "detector")
        yield _prepare("aivshuman", config.labelled, prepared)
        yield ["train.detector", "--data", data, "--output", head, *shlex.split(DETECTOR), *common, *features]
        yield [
            *("train.leave_out", "--data", data, "--checkpoint", head, *features),
            *("--result", str(reports / "detector.json")),
        ]
        yield ["train.drift_reference", "--checkpoint", head, "--data", data, "--threads", str(config.threads)]
        extracts.append(_extract(head, "detector"))
    if "captioner" in chosen:
        data = str(prepared / "flickr30k")
        writer, describer, decoder = (str(models / name) for name in ("writer", "describer", "captioner"))
        own = ["--data", data, *common, "--precision", config.precision]
        tokens = [*features, "--features", "bf16" if config.precision == "bf16-mixed" else "32"]
        yield _prepare("flickr30k", config.captioned, prepared)
        yield ["train.language", "--texts", config.texts, "--output", writer, *shlex.split(LANGUAGE), *own]
        for base, made, recipe in ((writer, describer, CAPTIONER), (describer, decoder, CIDER)):
            yield [
                *("train.captioner", "--name", Path(made).name, "--model", base, "--output", made),
                *shlex.split(recipe),
                *own,
                *tokens,
            ]
        yield [
            *("train.evaluate", "captioner", "--data", data, "--checkpoint", decoder, "--against", ""),
            *("--output", str(reports / "captioner")),
        ]
        extracts.append(_extract(decoder, "captioner"))
    yield from extracts


def _prepare(name: str, raw: str, prepared: Path) -> list[str]:
    return ["data.prepare", name, "--input", raw, "--output", str(prepared), "--split", "starter"]


def _extract(checkpoint: str, name: str) -> list[str]:
    return ["train.extract", "--checkpoint", checkpoint, "--target", str(_WEIGHTS / name)]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    from pydantic_settings import CliApp

    for step in steps(CliApp.run(Starter, cli_args=arguments)):
        print(f"python -m {shlex.join(step)}", flush=True)
        ended = subprocess.run([sys.executable, "-m", *step], cwd=_ROOT, check=False)
        if ended.returncode:
            sys.exit(f"error: {step[0]} ended with {ended.returncode}; mend what it says and run this again")


if __name__ == "__main__":
    main()
