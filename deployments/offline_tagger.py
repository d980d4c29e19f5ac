"""The tagger without Serve: vLLM's offline engine with the replica's own arguments, prompt, grammar and rules.

In: captions. Out: for each what ``deployments.tagger.Tagger.tag`` answers. For bulk annotation, and what the served
tagger is compared with. The whole list is given to the engine at once, so the same list gives the same batches.

Knows no Serve, no Ray and no pictures.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from deployments.checkpoints import Checkpoint
from deployments.tagger import ANSWER, TaggerSettings, engine_arguments, engine_environment, load_prompt, tag_answer


class OfflineTagger:
    """A tagger loaded for inference."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: TaggerSettings | None = None,
        own_process: bool = True,
        other: Mapping[str, Any] | None = None,
    ) -> None:
        """Load it, which takes half a minute.

        Args:
            own_process: vLLM puts its engine into a process of its own. Without it the engine lives, and whatever ends
                this process is sure to end it, in this one.
            other: arguments of the engine that are not the replica's, to see what those are worth.
        """
        settings = settings or TaggerSettings()
        os.environ.update(engine_environment(settings))
        if not own_process:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        self.checkpoint = checkpoint
        arguments = engine_arguments(settings) | dict(other or {})
        self._engine = LLM(model=str(checkpoint.folder), disable_log_stats=True, **arguments)
        self._free = SamplingParams(temperature=0, max_tokens=settings.max_tokens)
        self._bound = self._free.clone()
        self._bound.structured_outputs = StructuredOutputsParams(regex=ANSWER)
        self._prompt = load_prompt()

    def answer(self, captions: list[str], grammar: bool = True) -> list[str]:
        """The model's own answers, before the rules; ``grammar``: only what ``tagger.ANSWER`` admits."""
        messages = [self._prompt.messages(caption) for caption in captions]
        sampling = self._bound if grammar else self._free
        return [request.outputs[0].text for request in self._engine.chat(messages, sampling, use_tqdm=False)]

    def tag(self, captions: list[str]) -> list[dict[str, Any]]:
        """Tags of each caption, ``{"tags", "revision", "model", "prompt", "proposed"}``."""
        return [
            tag_answer(raw, caption, self.checkpoint)
            for raw, caption in zip(self.answer(captions), captions, strict=True)
        ]
