"""The engine of a tagger's replica: ray.serve.llm's, with the executor that the engine arguments name.

On a CPU ray.serve.llm always takes vLLM's ``mp`` executor, whatever the arguments say: a second process beside the
engine's own, which holds the model and is given each step by way of shared memory. Both wait for each other by looking
again and again, and tell each other by a ZeroMQ message too, which nobody fetches as long as there is something to do
once a second: 90 bytes a step stay in either process for as long as the load lasts (vLLM 0.29,
``shm_broadcast.SpinCondition``; `benchmarks/TRIED.md`). One process for both has neither.

Importing this imports vllm.
"""

from __future__ import annotations

from typing import Any

from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine


class ReplicaEngine(VLLMEngine):
    """ray.serve.llm's engine, but for who chooses the executor."""

    def _prepare_engine_config(self, callback_ctx: Any) -> Any:
        engine, frontend, config = super()._prepare_engine_config(callback_ctx)
        if wanted := self.llm_config.engine_kwargs.get("distributed_executor_backend"):
            config.parallel_config.distributed_executor_backend = wanted
        return engine, frontend, config
