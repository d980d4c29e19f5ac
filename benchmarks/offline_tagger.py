"""The tagger without Serve: vLLM's offline engine with the replica's own arguments, prompt, grammar and rules."""

from __future__ import annotations

import os

from deployments.checkpoints import Checkpoint
from deployments.tag_rules import clean_tags
from deployments.tagger import ANSWER, TaggerSettings, engine_arguments, engine_environment, load_prompt


class OfflineTagger:
    """What a served tagger is compared with."""

    def __init__(self, checkpoint: Checkpoint, settings: TaggerSettings | None = None) -> None:
        settings = settings or TaggerSettings()
        os.environ.update(engine_environment(settings))
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        self._engine = LLM(model=str(checkpoint.folder), disable_log_stats=True, **engine_arguments(settings))
        self._sampling = SamplingParams(
            temperature=0, max_tokens=settings.max_tokens, structured_outputs=StructuredOutputsParams(regex=ANSWER)
        )
        self._prompt = load_prompt()

    def answer(self, captions: list[str]) -> list[str]:
        """The model's own answers, before the rules."""
        messages = [self._prompt.messages(caption) for caption in captions]
        return [request.outputs[0].text for request in self._engine.chat(messages, self._sampling, use_tqdm=False)]

    def tag(self, captions: list[str]) -> list[list[str]]:
        """Tags of each caption."""
        return [clean_tags(raw, caption) for raw, caption in zip(self.answer(captions), captions, strict=True)]
