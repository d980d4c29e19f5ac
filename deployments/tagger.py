"""The tagger: a caption in, 3 to 10 search tags out, by a chat model on vLLM through ``ray.serve.llm``.

The same code runs SmolLM2-135M-Instruct on a CPU and Mistral-7B-Instruct-v0.2 on a GPU: the prompt goes through the
model's own chat template, the engine's grammar enforces the answer's shape, ``tag_rules`` makes it hold.

``build_tagger`` makes the Serve application, whose replica keeps an ``LLMServer`` of ray.serve.llm inside itself and
does not inherit from it: importing ``ray.serve.llm`` imports vllm and torch (tens of seconds), which neither the
builder nor the ingress needs. The checkpoint is named by ``user_config`` (``{"uri": ...}``): another revision of the
same architecture is loaded into the running engine.

Knows no HTTP and no pictures.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import yaml
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from deployments import telemetry
from deployments.checkpoints import Checkpoint, resolve
from deployments.health import Health
from deployments.metrics import Metrics
from deployments.processor import processor_flags, step_back
from deployments.replica import ModelInfo, Refusal, ReplicaConfig, failed, refusal
from deployments.tag_rules import MAX_TAGS, MIN_TAGS, clean_tags, proposed

PROMPT_FILE = Path(__file__).with_name("tag_prompt.yaml")
_LOGGING_FILE = Path(__file__).with_name("vllm_logging.json")

#: The name under which the engine knows its model, whichever checkpoint it runs.
_MODEL_ID = "tagger"
#: One or two words of at most 15 characters: 31 with the separator, within the 32 of a record, and never a sentence.
_TAG = '"[a-z0-9]{1,15}([ -][a-z0-9]{1,15})?"'
#: What the engine may write: a JSON array without white space, which would double the tokens.
ANSWER = rf"\[{_TAG}(,{_TAG}){{{MIN_TAGS - 1},{MAX_TAGS - 1}}}\]"

#: Longer captions are cut here: a record's caption has at most 512 characters.
_MAX_CAPTION_LETTERS = 512
#: What every revision is asked to see whether it answers as before.
_KNOWN_CAPTION = "a dog runs on the grass"
#: An engine that has answered nothing for so long while requests waited is taken for hung.
_STUCK_AFTER_S = 120.0


class TaggerError(RuntimeError):
    """The engine refused a request, or a checkpoint does not fit the running engine."""


class TagExample(BaseModel):
    """One worked example of the prompt."""

    model_config = ConfigDict(extra="forbid")

    caption: str
    tags: list[str] = Field(min_length=MIN_TAGS, max_length=MAX_TAGS)


class TagPrompt(BaseModel):
    """The prompt file: one version, recorded in every answer."""

    model_config = ConfigDict(extra="forbid")

    version: str = Field(pattern=r"^[\w.-]+$")
    instruction: str
    question: str = Field(pattern=r"\{caption\}")
    examples: list[TagExample]

    def messages(self, caption: str) -> list[dict[str, str]]:
        """Chat messages, user and assistant in turn; no system role, which Mistral's template refuses."""
        turns: list[dict[str, str]] = []
        for example in self.examples:
            turns.append({"role": "user", "content": self.question.format(caption=example.caption)})
            turns.append({"role": "assistant", "content": json.dumps(example.tags, separators=(",", ":"))})
        turns.append({"role": "user", "content": self.question.format(caption=caption[:_MAX_CAPTION_LETTERS])})
        turns[0]["content"] = f"{self.instruction}\n\n{turns[0]['content']}"
        return turns


@lru_cache(maxsize=1)
def load_prompt() -> TagPrompt:
    """The one prompt in use."""
    return TagPrompt.model_validate(yaml.safe_load(PROMPT_FILE.read_text()))


class TaggerSettings(BaseModel):
    """``args`` of the tagger: the engine and what it may use. Changing them restarts its replicas."""

    model_config = ConfigDict(extra="forbid")

    uri: str = Field(
        default="starter:tagger", description="checkpoint unless the deployment's `user_config: {uri}` says other"
    )
    device: str = Field(default="cpu", pattern="^(cpu|gpu)$")
    num_cpus: float = Field(default=1.0, gt=0, description="CPUs that a replica takes of the cluster")
    num_gpus: float = Field(
        default=1.0, gt=0, description="GPUs, or the fraction of one, of each engine worker; on a GPU only"
    )
    tensor_parallel: int = Field(default=1, ge=1, le=8, description="GPUs that share one replica's model")
    threads: int = Field(
        default=0, ge=0, le=256, description="OpenMP threads of the engine on a CPU; 0: half the cores, at most 8"
    )
    dtype: str = Field(default="auto", pattern="^(auto|float32|bfloat16|float16)$", description="auto: `fast_dtype`")
    max_num_seqs: int = Field(default=32, ge=1, le=1024, description="requests that the engine works on together")
    max_model_len: int = Field(default=1024, ge=256, description="tokens of prompt and answer")
    max_tokens: int = Field(
        default=72, ge=16, le=512, description="tokens of an answer; one cut off there is still read"
    )
    kv_cache_bytes: int = Field(
        default=512 * 2**20, ge=2**24, description="key-value cache on a CPU, instead of a share of all memory"
    )
    gpu_memory_utilization: float = Field(default=0.85, gt=0, le=1, description="share of a GPU's memory to take")
    request_timeout_s: float = Field(
        default=60.0, gt=0, le=600, description="after this a request is given up and aborted in the engine"
    )
    min_replicas: int = Field(default=1, ge=0)
    initial_replicas: int | None = Field(default=None, ge=0, description="null: min_replicas")
    max_replicas: int = Field(default=1, ge=1)
    target_ongoing_requests: float = Field(default=16.0, gt=0, description="requests a replica should have in hand")
    max_ongoing_requests: int = Field(default=48, ge=1, description="requests in one replica, running and waiting")
    max_queued_requests: int = Field(
        default=64, ge=-1, description="waiting in one caller; beyond it BackPressureError"
    )

    def canary(self) -> TaggerSettings:
        """The same for a canary: no replica until it is given traffic."""
        return self.model_copy(update={"min_replicas": 0, "initial_replicas": 0, "max_replicas": 1})


def fast_dtype(device: str, flags: frozenset[str] | None = None) -> str:
    """The number format that the hardware multiplies fast, as vLLM names it.

    A CPU without bfloat16 instructions (AVX512-BF16, AMX-BF16, ARM's bf16) emulates them, about three times slower than
    float32. On a GPU, vLLM's own ``auto``: what the checkpoint was saved in.
    """
    if device == "gpu":
        return "auto"
    if flags is None:
        flags = processor_flags()
    return "bfloat16" if flags & {"avx512_bf16", "amx_bf16", "bf16"} else "float32"


def engine_arguments(settings: TaggerSettings) -> dict[str, Any]:
    """vLLM's engine arguments; the benchmark's offline engine takes the very same."""
    arguments: dict[str, Any] = {
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "dtype": fast_dtype(settings.device) if settings.dtype == "auto" else settings.dtype,
        "enable_prefix_caching": True,
        "seed": 0,
        "trust_remote_code": False,
    }
    if settings.device == "cpu":
        # compiling for a 135 M model costs more start-up time than it ever gives back on two cores
        # prefixes are shared in whole blocks: of the 128 tokens that are vLLM's default on a CPU, most of the prompt's
        # last block would be computed again for every caption
        arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": settings.kv_cache_bytes, "block_size": 32}
        # the model in the engine's process (see `tagger_engine`); "uni" would be made "mp" for the sake of pinned
        # threads, which `engine_environment` does without
        arguments["distributed_executor_backend"] = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
    else:
        arguments |= {
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "tensor_parallel_size": settings.tensor_parallel,
        }
    return arguments


def engine_environment(settings: TaggerSettings) -> dict[str, str]:
    """Environment of the replica and the engine's processes: no network, no usage report, bounded threads.

    What the engine is to run has been fetched before it starts, by a process that is not offline (``resolve``).
    """
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if settings.device == "cpu":
        threads = str(settings.threads or min(max((os.cpu_count() or 1) // 2, 1), 8))
        # OpenMP threads wait for each other by spinning: as many as cores, beside other replicas, and all crawl;
        # without `nobind` vLLM pins its threads to cores that the other replicas use too
        environment |= {"OMP_NUM_THREADS": threads, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return environment


def tag_answer(raw: str, caption: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the tagger answers about a caption, from what the model wrote: see ``Tagger.tag``."""
    return {
        "tags": clean_tags(raw, caption),
        "revision": checkpoint.revision,
        "model": checkpoint.name,
        "prompt": load_prompt().version,
        "proposed": len(proposed(raw, caption)),
    }


def difference(before: str, now: str) -> str:
    """What is wrong with the model's answer to the known caption, which was another ``before``; "": nothing.

    Requests are computed together with others, and the last digits follow the company: where two words are about as
    likely, an answer may become another. A sound one still has one of its tags at least. That of a model which never
    had a tag of the caption has nothing to be measured by but its form.
    """
    if now == before:
        return ""
    had, has = proposed(before, _KNOWN_CAPTION), proposed(now, _KNOWN_CAPTION)
    if set(had) & set(has) or (not had and re.fullmatch(ANSWER, now)):
        return ""
    return f"the known caption is answered with {now[:200]!r}, and was with {before[:200]!r}"


@dataclass
class _Load:
    """Requests in the engine, for the health check."""

    running: int = 0
    progress: float = field(default_factory=time.monotonic)


class Tagger:
    """The replica: one vLLM engine inside ray.serve.llm's ``LLMServer``."""

    def __init__(self, settings: TaggerSettings) -> None:
        """Start nothing yet: Serve calls ``reconfigure`` with the ``user_config`` before the first request."""
        self._settings = settings
        self._prompt = load_prompt()
        self._checkpoint: Checkpoint | None = None
        self._server: Any = None
        self._load = _Load()
        self._swap = asyncio.Lock()
        self._metrics = Metrics()
        self._health = Health()
        self._known: str | None = None
        self._refused: Refusal | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve the checkpoint that ``user_config["uri"]`` names.

        The first call starts the engine. Later ones load other weights of the same architecture into it, between two
        requests; the prefix cache is emptied because it was computed with the old ones. A checkpoint that cannot be
        had, or that has another architecture or tokenizer, is refused (``refusal``).

        Raises:
            CheckpointError: the URI names no sound checkpoint, and nothing is in service.
            Exception: vLLM's own; where weights were being exchanged, the engine may hold some of both.
        """
        current, wanted = self._checkpoint, {"uri": self._settings.uri, **(user_config or {})}
        try:
            config = ReplicaConfig.model_validate(wanted)
            self._health.every_s, self._health.most_failures = config.health_every_s, config.most_failures
            checkpoint = await asyncio.to_thread(resolve, config.uri)
            if current is not None and current.revision != checkpoint.revision:
                check_fits(current, checkpoint)
        except Exception as error:
            if current is None:
                raise
            self._refused = refusal("tagger", current, str(wanted["uri"]), error)
            return
        self._refused = None
        async with self._swap:
            if current is None:
                await self._start(checkpoint)
            elif current.revision != checkpoint.revision:
                await self._exchange(checkpoint)
            self._checkpoint = checkpoint  # at once: from here on it is these weights that answer
            if current is None or current.revision != checkpoint.revision:
                await self._learn()
            before = None if current is None else current.revision
            self._metrics.in_service("tagger", checkpoint.revision, before)

    async def _start(self, checkpoint: Checkpoint) -> None:
        # vLLM sets logging up when it is imported, and by that closes the log file that Serve has opened for this
        # replica; told to change nothing but its own level, it leaves it open
        os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(_LOGGING_FILE)
        from ray.serve.llm import LLMConfig, LLMServer

        from deployments.tagger_engine import ReplicaEngine

        config = llm_config(self._settings, checkpoint.folder, LLMConfig)
        server = LLMServer.sync_init(config, engine_cls=ReplicaEngine)
        await server.start()
        if self._settings.device == "cpu":
            for process in psutil.Process().children(recursive=True):  # the engine, which takes no niceness of its own
                step_back(thread.id for thread in process.threads())
        self._server = server

    async def _learn(self) -> None:
        """Ask the revision in the engine for its known answer."""
        # the first request compiles the grammar and fills the prefix cache: do it before anyone waits for it
        await self._ask(_KNOWN_CAPTION)
        self._known = await self._ask(_KNOWN_CAPTION)  # as every later one is computed, with the prefix in the cache
        self._health.renewed()

    async def _exchange(self, new: Checkpoint) -> None:
        await self._server.pause(mode="wait", clear_cache=True)
        try:
            await self._server.collective_rpc("reload_weights", kwargs={"weights_path": str(new.folder)})
            await self._server.reset_prefix_cache()
        finally:
            await self._server.resume()

    async def tag(self, caption: str) -> dict[str, Any]:
        """Tags of a caption.

        Returns:
            ``{"tags", "revision", "model": "URI#revision", "prompt": its version, "proposed"}``; ``proposed`` is
            how many tags held of those that the model itself gave.

        Raises:
            TaggerError: the engine refused the request.
            ModelFailed: the engine failed.
            TimeoutError: no answer within ``request_timeout_s``.
        """
        started, code = time.perf_counter(), "cancelled"
        try:
            with telemetry.span("generate"):
                async with asyncio.timeout(self._settings.request_timeout_s):
                    raw = await self._ask(caption)
            code = "ok"
            self._health.answered()
        except (TaggerError, TimeoutError) as error:
            code = "refused" if isinstance(error, TaggerError) else "deadline"
            raise
        except Exception as error:
            code = "failed"
            self._health.failed(type(error).__name__)
            raise failed(error) from None
        finally:
            telemetry.note(
                "stage",
                stage="tagger",
                revision=self._checkpoint.revision if self._checkpoint else "",
                code=code,
                computed_ms=telemetry.milliseconds(time.perf_counter() - started),
            )
        # read after the answer: a request that waited while weights were exchanged was answered by the new ones
        answer = tag_answer(raw, caption, self.checkpoint)
        self._metrics.tagged(answer["revision"], len(answer["tags"]), answer["proposed"])
        return answer

    async def _ask(self, caption: str) -> str:
        """The model's answer. Cancelling this coroutine aborts the request in the engine."""
        from ray.serve.llm.openai_api_models import ChatCompletionRequest

        if not self._load.running:
            self._load.progress = time.monotonic()
        self._load.running += 1
        try:
            request = ChatCompletionRequest(
                model=_MODEL_ID,
                messages=self._prompt.messages(caption),
                temperature=0.0,
                max_tokens=self._settings.max_tokens,
                structured_outputs={"regex": ANSWER},
                stream=False,
            )
            # the engine's generator, not the server's `chat`: nothing of Serve's streaming is needed inside the replica
            async for answer in self._server.engine.chat(request):
                if (error := getattr(answer, "error", None)) is not None:
                    raise TaggerError(f"vLLM refused the request: {error.message}")
                self._load.progress = time.monotonic()
                return answer.choices[0].message.content or ""
            raise TaggerError("vLLM gave no answer")
        finally:
            self._load.running -= 1

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint in service."""
        if self._checkpoint is None:
            raise TaggerError("no model is loaded: the deployment has no user_config")
        return self._checkpoint

    async def info(self) -> dict[str, Any]:
        """``ModelInfo`` of the model in service, the prompt's version on its card."""
        checkpoint = self.checkpoint
        card = checkpoint.card.model_dump() | {"prompt": self._prompt.version}
        return ModelInfo(
            uri=checkpoint.uri, revision=checkpoint.revision, card=card, views=None, refused=self._refused
        ).model_dump()

    async def check_health(self) -> None:
        """Serve's health check, and the occasion to say again what is in service and refused, as ``Replica`` does.

        Raises:
            RuntimeError: requests wait and none has been answered for two minutes.
            Unhealthy: see ``Health.check``.
            Exception: vLLM's own, when its engine process has died.
        """
        if self._checkpoint is not None:
            self._metrics.in_service("tagger", self._checkpoint.revision)
            self._metrics.refused("tagger", self._refused is not None)
        idle = time.monotonic() - self._load.progress
        if self._load.running and idle > _STUCK_AFTER_S:
            raise RuntimeError(f"{self._load.running} requests in the engine, none answered for {idle:.0f} s")
        if self._server is not None:
            await self._server.check_health()
        await self._health.check(self._repeat_known)

    async def _repeat_known(self) -> str | None:
        """Ask for the known answer again; see ``Health.check``."""
        async with self._swap:  # never while weights are exchanged
            if self._known is None:
                return None
            try:
                async with asyncio.timeout(self._settings.request_timeout_s):
                    now = await self._ask(_KNOWN_CAPTION)
            except TimeoutError:
                if self._load.running:
                    return None  # there is work before it; an engine that hangs is found by its silence
                return f"the known caption has had no answer for {self._settings.request_timeout_s:.0f} s"
            return difference(self._known, now)

    def __del__(self) -> None:
        """Serve calls this when the replica stops: the engine's processes must not outlive it."""
        server = getattr(self, "_server", None)
        if (client := getattr(getattr(server, "engine", None), "_engine_client", None)) is not None:
            client.shutdown()


def check_fits(old: Checkpoint, new: Checkpoint) -> None:
    """Raise ``TaggerError`` unless an engine that runs the one can be given the other's weights."""
    for name in ("config.json", "tokenizer.json"):
        if _content(old.folder / name) != _content(new.folder / name):
            raise TaggerError(
                f"{new.uri} differs from the running {old.uri} in {name}: "
                "deploy it as the canary, or restart the deployment with it"
            )


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def llm_config(settings: TaggerSettings, folder: Path, kind: Any) -> Any:
    """ray.serve.llm's ``LLMConfig`` (passed as ``kind``: importing it imports vllm) for a checkpoint folder."""
    return kind(
        model_loading_config={"model_id": _MODEL_ID, "model_source": str(folder)},
        engine_kwargs=engine_arguments(settings),
        runtime_env={"env_vars": engine_environment(settings)},
        accelerator_config={"kind": "cpu"} if settings.device == "cpu" else None,
        placement_group_config={"bundles": _bundles(settings)},
        # on two cores the statistics of every engine step cost as much as they tell
        log_engine_metrics=settings.device == "gpu",
    )


def _bundles(settings: TaggerSettings) -> list[dict[str, float]]:
    if settings.device == "cpu":
        return [{"CPU": settings.num_cpus}]
    others = [{"GPU": settings.num_gpus}] * (settings.tensor_parallel - 1)
    return [{"CPU": settings.num_cpus, "GPU": settings.num_gpus}, *others]


def build_tagger(settings: TaggerSettings, name: str = "Tagger", **options: Any) -> Application:
    """The tagger's deployment, ready to be bound into a graph; cheap: nothing of vllm is imported.

    The engine's workers live in the replica's placement group, as ray.serve.llm arranges it, and the replica itself
    takes nothing beside it: its resources are set by ``settings`` and not by ``ray_actor_options``.

    Args:
        options: of the deployment, beyond those.
    """
    # where it is given, Serve goes back to this number whenever `user_config` changes; a canary must not start with one
    initial = 0 if settings.initial_replicas is None and settings.min_replicas == 0 else settings.initial_replicas
    deployment = serve.deployment(
        Tagger,
        name=name,
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            **({} if initial is None else {"initial_replicas": initial}),
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.target_ongoing_requests,
        },
        user_config={"uri": settings.uri},
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": engine_environment(settings)}},
        placement_group_bundles=_bundles(settings),
        placement_group_strategy="PACK",
        health_check_period_s=10,
        health_check_timeout_s=30,
        **options,
    )
    return deployment.bind(settings)
