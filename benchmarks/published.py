"""What others have measured on a GPU, with where it stands: the simulator's figures where there is no GPU.

One GPU, an RTX 4090 (24 GB), because all three models have figures of it or of parts of them. Each was read in the
source named. What is not published is derived here, and says so; measured figures take the place of all of it on a
machine that has a GPU (``python -m benchmarks.scale --parts calibrate,size --figures measured``).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.graph_simulation import Batching, Generating
from benchmarks.simulation import BatchTimes

GPU = "NVIDIA GeForce RTX 4090, 24 GB"


@dataclass(frozen=True)
class Figure:
    """A published figure."""

    value: float
    unit: str
    what: str
    source: str
    url: str


_TIMM = (
    "pytorch-image-models, results/benchmark-infer-amp-nchw-pt240-cu124-rtx4090.csv",
    "https://github.com/huggingface/pytorch-image-models/blob/main/results/"
    "benchmark-infer-amp-nchw-pt240-cu124-rtx4090.csv",
)
_VLLM = (
    "Benchmarking Mistral-7B on RTX 4090: vLLM Concurrency, Latency, and Capacity Planning",
    "https://mushfiqrahman.dev/benchmarking-mistral-7b-on-rtx-4090-vllm-concurrency-latency-and-capacity-planning/",
)

VIT_224 = Figure(2787.15, "pictures/s", "vit_base_patch16_224, mixed precision, batches of 1,024", *_TIMM)
VIT_384 = Figure(915.77, "pictures/s", "vit_base_patch16_384, mixed precision, batches of 1,024", *_TIMM)
#: Mistral-7B-Instruct-v0.3, 256 tokens in and 128 asked for: requests a second at so many at a time.
MISTRAL = {
    4: Figure(2.09, "requests/s", "4 at a time, 210 tokens/s", *_VLLM),
    8: Figure(3.78, "requests/s", "8 at a time, 377 tokens/s", *_VLLM),
    16: Figure(6.44, "requests/s", "16 at a time, 644 tokens/s", *_VLLM),
    32: Figure(9.73, "requests/s", "32 at a time, 975 tokens/s", *_VLLM),
    48: Figure(11.87, "requests/s", "48 at a time, 1,190 tokens/s", *_VLLM),
}
#: By its own figures an answer there had about 100 tokens: tokens a second over requests a second.
_MISTRAL_TOKENS = 100.0
BANDWIDTH = Figure(
    1008.0,
    "GB/s",
    "memory bandwidth",
    "RTX 4090 vs H100: Specs, Benchmarks & Cloud Pricing Compared",
    "https://deploybase.ai/articles/rtx-4090-vs-h100",
)
PRICE = Figure(
    0.00021 * 3600,
    "USD/h",
    "4090 PRO, active worker, 0.00021 USD a second",
    "Runpod documentation: Serverless pricing",
    "https://docs.runpod.io/serverless/pricing",
)

#: The original system's BLIP on a GPU that it does not name, by its own README: one caption at a time, 236 ms at the
#: median, 3 beams, at most 20 tokens. Not checked by anybody else.
ORIGINAL_BLIP_S, BLIP_STEPS, BEAMS = 0.236, 20, 3
#: Launching a forward pass of a dozen layers, eager: an assumption; it matters for small batches only.
LAUNCH_S = 0.005
#: Keys and values of 577 patches that each beam reads in each of 12 layers and step: two of 768 numbers, 16 bits.
_CROSS_BYTES = 577 * 768 * 2 * 2 * 12
#: Words of an answer of the tagger: 215 tokens/s at 9.4 requests/s, measured with its prompt and grammar.
TAG_TOKENS = 215 / 9.4


def detector(size: int, wait_s: float) -> Batching:
    """A ViT-B/16 at 224 px: the published rate, and a launch for each batch."""
    return Batching(_linear(LAUNCH_S, 1 / VIT_224.value, size), size, wait_s)


def captioner(size: int, wait_s: float, step_s: float | None = None) -> Batching:
    """BLIP-base at 384 px, 3 beams: its encoder is the published ViT, its decoder is *derived*.

    No throughput of BLIP's decoder on this GPU was found. A step is taken to last what the original system's one
    caption at a time leaves for it (launching dominates: it grows little with the batch), and with every beam the time
    to read that beam's keys and values. ``size`` says how much of the answer hangs on it.
    """
    step_s = step_s if step_s is not None else (ORIGINAL_BLIP_S - LAUNCH_S - 1 / VIT_384.value) / BLIP_STEPS
    reading_s = BEAMS * _CROSS_BYTES / (BANDWIDTH.value * 1e9)
    each_s = 1 / VIT_384.value + BLIP_STEPS * reading_s
    return Batching(_linear(LAUNCH_S + BLIP_STEPS * step_s, each_s, size), size, wait_s)


def tagger(size: int) -> Generating:
    """Mistral-7B on vLLM: seconds of a step, fitted to the published rates (a request's time is linear in how many
    there are, within 3 %). ``size`` beyond the most that was published is taken for that: nobody has shown that the
    line goes on.

    A step's time is that of a whole answer there, prompt of 256 tokens included, over its tokens. So each of our
    shorter answers is charged with a prompt in proportion; its own is longer, and shared but for a caption.
    """
    numbers = sorted(MISTRAL)
    size = min(size, numbers[-1])
    steps = [number / MISTRAL[number].value / _MISTRAL_TOKENS for number in numbers]
    mean_n, mean_s = sum(numbers) / len(numbers), sum(steps) / len(steps)
    slope = sum((n - mean_n) * (s - mean_s) for n, s in zip(numbers, steps, strict=True)) / sum(
        (n - mean_n) ** 2 for n in numbers
    )
    return Generating(Step(mean_s - slope * mean_n, slope), size, TAG_TOKENS, 0.3 * TAG_TOKENS)


@dataclass(frozen=True)
class Step:
    """Seconds of an engine's step: a part of its own and one for each request."""

    base_s: float
    each_s: float

    def __call__(self, running: int) -> float:
        return self.base_s + self.each_s * running


def _linear(base_s: float, each_s: float, size: int) -> BatchTimes:
    return BatchTimes((1, max(2, size)), (base_s + each_s, base_s + each_s * max(2, size)))


def sources() -> dict[str, Any]:
    """All of it, for the result file."""
    return {
        "gpu": GPU,
        "detector": asdict(VIT_224),
        "captioner_encoder": asdict(VIT_384),
        "captioner_decoder": {
            "derived": True,
            "step_s": (ORIGINAL_BLIP_S - LAUNCH_S - 1 / VIT_384.value) / BLIP_STEPS,
            "what": "from one caption in 236 ms, 3 beams, by the original system's README; which GPU it does not say",
            "bandwidth": asdict(BANDWIDTH),
        },
        "tagger": {str(number): asdict(figure) for number, figure in MISTRAL.items()}
        | {"most_at_a_time": max(MISTRAL)},
        "tagger_tokens": {
            "value": round(TAG_TOKENS, 1),
            "what": "measured: SmolLM2-135M, this prompt and grammar",
        },
        "launch_s": {"value": LAUNCH_S, "what": "assumed"},
        "price": asdict(PRICE),
    }
