"""Captions and tokens a second of the captioner as it is served, beside the library's plain ``generate()``.

Both sides read the same pictures with the same weights and settings in one run, each in a process of its own, the
served one with the allocator that replicas have: in every round each batch is captioned by the one and then by the
other, the order changing from round to round, and what counts is the ratio of such a pair.
Three tables: speed by batch and beams, whether the captions are the same, and where the time of a batch goes.

BLIP-base is measured at its full size. Where its weights cannot be fetched they are drawn at random: that changes no
time, except that such captions never end of themselves. All of them are therefore as long as ``--length`` says, about
what people write of a photo in this vocabulary. The starter captioner is measured as its card has it, ends of sentences
included.

    python -m benchmarks.captioner --config F --processor F --vocabulary F
    python -m benchmarks.captioner --quick

Out: ``results/captioner_speed.json`` and plots. Knows no Serve: what requests add, ``benchmarks.serving`` measures.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.cache_utils import EncoderDecoderCache

from benchmarks.blip_base import Architecture, random_blip
from benchmarks.plots import COLOURS, save, table
from benchmarks.processes import ALLOCATOR, Apart
from benchmarks.report import QUICK, RESULTS, write_result
from deployments.captioner import Captioner, CaptionerModel
from deployments.checkpoints import Checkpoint, resolve
from deployments.images import decode
from deployments.views import ViewSpec, render

#: Parts of a batch, in the order of the plot.
PARTS = ("image tower", "cross keys and values", "decoder layers", "output layer", "cache re-ordering", "search")
_BAR = 1.5
#: Batch sizes of which it is told where the time goes.
_PROFILED = (1, 8)


class CaptionerBenchmark(BaseModel):
    """Settings of a run."""

    model_config = ConfigDict(extra="forbid")

    config: Path | None = Field(None, description="BLIP-base's config.json; without it the starter alone is measured")
    processor: Path | None = Field(None, description="its preprocessor_config.json")
    vocabulary: Path | None = Field(None, description="vocab.txt of bert-base-uncased")
    photos: Path = Field(Path("samples"), description="folder of photos; repeated where a batch is larger")
    checkpoint: str = Field("", description="a BLIP-base to measure in place of the random one: a checkpoint URI")
    starter: str = Field("starter:captioner", description="the small captioner; empty: none")
    batches: str = Field("1,4,8,32", description="batch sizes")
    beams: str = Field("1,3", description="1 is greedy")
    rounds: int = Field(3, ge=1, description="pairs of each batch size and number of beams")
    length: int = Field(12, ge=2, description="tokens of each caption of random weights")
    threads: int = Field(2, ge=1, description="CPU threads of both sides")
    scratch: Path | None = Field(None, description="where 1 GB is free; unset: the temporary folder")
    quick: bool = Field(False, description="the starter alone, two small batches, once: shows that it works")


class Loaded:
    """A checkpoint as it is served, or as the library loads and runs it; in a process of its own."""

    def __init__(self, uri: str, served: bool, threads: int, settings: dict[str, Any]) -> None:
        torch.set_num_threads(threads)
        self._model = CaptionerModel(resolve(uri))
        self._model.generation |= settings
        self.settings = dict(self._model.generation)
        self._replica = Captioner() if served else None
        self.network: Any = self._model.network
        if not served:
            self.network = AutoModelForImageTextToText.from_pretrained(  # nosec B615 # a folder on disk
                self._model.checkpoint.folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
            )
            self.network.to(self._model.network.device, self._model.network.dtype).eval()

    def about(self) -> dict[str, Any]:
        """What is measured, and what to give it."""
        return {
            "model": self._model.checkpoint.name,
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
            "settings": self.settings,
            "views": self._model.views,
        }

    def write(self, views: np.ndarray, beams: int) -> tuple[float, list[str], int]:
        """How long a batch takes, in seconds, its captions, and how many tokens were written (of what is served, 0)."""
        self._model.generation["num_beams"] = beams
        if self._replica is None:
            return self._generated(views)
        begun = time.perf_counter()
        answers = self._replica.answers(self._model, views)
        captions = [answer["text"] for answer in answers if isinstance(answer, dict)]
        return time.perf_counter() - begun, captions, 0

    def where(self, views: np.ndarray, beams: int) -> dict[str, float]:
        """Milliseconds a picture of each part, the batch computed whole; ``search`` is what is in no other."""
        self._model.generation["num_beams"] = beams
        with timed(self.network) as spent:
            begun = time.perf_counter()
            if self._replica is None:
                self._generated(views)
            else:
                self._replica.answer(self._model, views)
            total = time.perf_counter() - begun
        spent["search"] = total - sum(spent.values())
        return {part: round(1000 * spent[part] / len(views), 1) for part in PARTS}

    @torch.inference_mode()
    def _generated(self, views: np.ndarray) -> tuple[float, list[str], int]:
        begun = time.perf_counter()
        pixels, prompt = self._model.pixels(views), self._model.prompt(len(views))
        ids = self.network.generate(
            pixel_values=pixels, **prompt, logits_processor=self._model.unsaid, **self._model.generation
        )
        captions = self._model.text(ids)
        taken, text = time.perf_counter() - begun, self.network.config.text_config
        nothing_said = torch.tensor([text.bos_token_id, text.pad_token_id], device=ids.device)
        return taken, captions, int((~torch.isin(ids, nothing_said)).sum())  # ends of sentences included


@contextlib.contextmanager
def both(checkpoint: Checkpoint, threads: int, **settings: Any) -> Iterator[dict[str, Apart]]:
    """The same checkpoint twice, each ``Loaded`` in a process: what is served has the allocator of replicas."""
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(Apart(allocator, Loaded, checkpoint.uri, name == "served", threads, settings))
            for name, allocator in (("plain", {}), ("served", ALLOCATOR))
        }


def compare(sides: dict[str, Apart], views: np.ndarray, beams: int, rounds: int) -> dict[str, Any]:
    """Both sides on one batch, in turn."""
    times: dict[str, list[float]] = {"plain": [], "served": []}
    captions: dict[str, list[str]] = {}
    tokens, same = 0, True
    for number in range(rounds):
        for side in ("plain", "served") if number % 2 == 0 else ("served", "plain"):
            taken, captions[side], written = sides[side].call("write", views, beams)
            times[side].append(taken)
            tokens = written or tokens
        same = same and captions["plain"] == captions["served"]
    ratios = sorted(plain / served for plain, served in zip(times["plain"], times["served"], strict=True))
    row: dict[str, Any] = {"batch": len(views), "beams": beams}
    for name, each in times.items():
        row[f"{name}_captions_per_s"] = round(len(views) / statistics.median(each), 3)
        row[f"{name}_tokens_per_s"] = round(tokens / statistics.median(each), 2)
    return row | {
        "ratio": round(statistics.median(ratios), 3),
        "lowest": round(ratios[0], 3),
        "highest": round(ratios[-1], 3),
        "same_captions": same,
        "tokens_per_caption": round(tokens / len(views), 1),
    }


@contextlib.contextmanager
def timed(network: Any) -> Iterator[dict[str, float]]:
    """Seconds of each part of what is computed inside; parts that are within others are taken out of them."""
    spent: dict[str, float] = defaultdict(float)
    open_parts: list[list[Any]] = []  # name, begin, seconds of the parts within

    def now() -> float:
        if network.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(name: str) -> None:
        open_parts.append([name, now(), 0.0])

    def end() -> None:
        name, begun, within = open_parts.pop()
        taken = now() - begun
        spent[name] += taken - within
        if open_parts:
            open_parts[-1][2] += taken

    def watch(module: nn.Module, name: str) -> None:
        handles.append(module.register_forward_pre_hook(lambda *_: begin(name)))
        handles.append(module.register_forward_hook(lambda *_: end()))

    handles: list[Any] = []
    decoder = network.text_decoder
    watch(network.vision_model, "image tower")
    watch(decoder.bert, "decoder layers")
    watch(decoder.cls, "output layer")
    for layer in decoder.bert.encoder.layer:
        watch(layer.crossattention.self.key, "cross keys and values")
        watch(layer.crossattention.self.value, "cross keys and values")
    reorder = EncoderDecoderCache.reorder_cache

    def reordered(cache: EncoderDecoderCache, beam_idx: torch.LongTensor) -> None:
        begin("cache re-ordering")
        reorder(cache, beam_idx)
        end()

    EncoderDecoderCache.reorder_cache = reordered  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        EncoderDecoderCache.reorder_cache = reorder  # type: ignore[method-assign]
        for handle in handles:
            handle.remove()


def blip_base(config: CaptionerBenchmark, folder: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """BLIP-base, the checkpoint that is named or random weights, and how its captions are to be written."""
    if config.checkpoint:
        return resolve(config.checkpoint), {}
    if not (config.config and config.processor and config.vocabulary):
        raise SystemExit("error: random weights want all of --config, --processor and --vocabulary")
    described = Architecture(config=config.config, processor=config.processor, vocabulary=config.vocabulary)
    random_blip(described, folder, spread=0.05)
    return resolve(str(folder)), {"max_new_tokens": config.length, "min_new_tokens": config.length}


def measured(sides: dict[str, Apart], config: CaptionerBenchmark, name: str = "") -> dict[str, Any]:
    """All batches of a model, and where their time goes."""
    about = sides["plain"].call("about")
    views = views_of(about["views"], config)
    sizes = [int(size) for size in config.batches.split(",")]
    beams = [int(number) for number in config.beams.split(",")]
    for side in sides.values():
        side.call("write", views[:1], beams[-1])
    rows, parts = [], []
    for size in sizes:
        for number in beams:
            rows.append(compare(sides, views[:size], number, config.rounds))
            print(rows[-1], flush=True)
            if size in _PROFILED:
                spent = {which: side.call("where", views[:size], number) for which, side in sides.items()}
                parts.append({"batch": size, "beams": number} | spent)
    return {
        "model": name or about["model"],
        "parameters": about["parameters"],
        "settings": about["settings"],
        "speed": rows,
        "milliseconds_per_picture": parts,
        "batches_at_the_bar": {
            str(number): [row["batch"] for row in rows if row["beams"] == number and row["ratio"] >= _BAR]
            for number in beams
        },
    }


def views_of(spec: ViewSpec, config: CaptionerBenchmark) -> np.ndarray:
    """As many views as the largest batch has."""
    largest = max(int(size) for size in config.batches.split(","))
    photos = sorted(config.photos.rglob("*.jpg"))[:largest]
    if not photos:
        raise SystemExit(f"error: {config.photos} holds no .jpg; name another folder with --photos")
    found = [render(decode(photo.read_bytes()).image, spec) for photo in photos]
    return np.stack([found[number % len(found)] for number in range(largest)])


def draw(result: dict[str, Any], name: str, folder: Path) -> Path:
    """Captions a second by batch, and where the time of a picture goes."""

    def panels(axes: Any) -> None:
        speed, parts = axes
        for number, beams in enumerate(sorted({row["beams"] for row in result["speed"]})):
            rows = [row for row in result["speed"] if row["beams"] == beams]
            label = "greedy" if beams == 1 else f"{beams} beams"
            for side, style in (("plain", "--"), ("served", "-")):
                rates = [row[f"{side}_captions_per_s"] for row in rows]
                title = f"{label}, {'plain generate()' if side == 'plain' else 'as served'}"
                batches = [row["batch"] for row in rows]
                speed.plot(batches, rates, style, marker="o", color=COLOURS[number], label=title)
        speed.set_xscale("log", base=2)
        speed.set_ylim(bottom=0)
        speed.set_xlabel("pictures in a batch")
        speed.set_ylabel("captions/s")
        speed.legend()
        bars = [
            (f"{entry['batch']}, {entry['beams']}\n{side}", entry[side])
            for entry in result["milliseconds_per_picture"]
            for side in ("plain", "served")
        ]
        below = np.zeros(len(bars))
        for number, part in enumerate(PARTS):
            heights = np.array([values[part] for _, values in bars])
            parts.bar([label for label, _ in bars], heights, bottom=below, color=COLOURS[number], label=part)
            below += heights
        parts.set_ylabel("ms a picture")
        parts.set_xlabel("batch, beams")
        parts.tick_params(axis="x", labelsize=7)
        parts.legend(fontsize=7)

    return save(name, panels, panels=2, height=3.8, folder=folder)


def main(arguments: list[str] | None = None) -> None:
    """Measure; write JSON and plots."""
    from pydantic_settings import CliApp

    config = CliApp.run(CaptionerBenchmark, cli_args=arguments)
    folder = RESULTS
    if config.quick:
        config = config.model_copy(update={"batches": "1,2", "rounds": 1})
        folder = QUICK
    result: dict[str, Any] = {"threads": config.threads, "rounds": config.rounds, "bar": _BAR}
    begun = time.monotonic()
    if config.starter:
        with both(resolve(config.starter), config.threads) as sides:
            result["starter"] = measured(sides, config)
    if not config.quick and (config.checkpoint or config.config):
        with tempfile.TemporaryDirectory(prefix="blip-", dir=config.scratch) as name:
            checkpoint, settings = blip_base(config, Path(name) / "blip-base")
            with both(checkpoint, config.threads, **settings) as sides:
                result["blip_base"] = measured(sides, config, config.checkpoint or "random weights")
    result["minutes"] = round((time.monotonic() - begun) / 60, 1)
    for model in ("starter", "blip_base"):
        if model in result:
            print(f"\n{model}", table(result[model]["speed"]), sep="\n")
            print(draw(result[model], f"captioner_speed_{model}", folder))
    print(write_result("captioner_speed", result, folder))


if __name__ == "__main__":
    main()
