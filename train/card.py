"""A trained checkpoint's folder and its card: what it is, how it looks at pictures, and where it comes from.

In: the trained model, the run that it is of, and what its task has to tell. Out: a folder that ``deployments`` serves:
weights as safetensors, the configuration, the processor of what training started from, and ``card.json``
(``deployments.checkpoints.Card``).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from data.versions import DataVersion
from deployments.checkpoints import Checkpoint, resolve
from deployments.views import ViewSpec
from train.settings import TrainCommand
from train.tracking import code_commit

#: Of weights whose base does not state one.
_LICENCE = "that of the training pictures applies to these weights; see the data set's terms"
#: Settings that a card does not tell: places, and what the run was called. The model it tells by its revision.
_UNTOLD = {
    *("data", "output", "storage", "cache", "tracking", "record", "num_cpus", "object_store_bytes", "name", "model"),
    "texts",
}


class Origin(Protocol):
    """Where a checkpoint comes from; a job is one."""

    @property
    def config(self) -> TrainCommand: ...

    @property
    def version(self) -> DataVersion: ...

    @property
    def checkpoint(self) -> str: ...

    @property
    def views(self) -> ViewSpec: ...


def write_checkpoint(
    folder: Path,
    model: Any,
    origin: Origin,
    task: str,
    figures: Mapping[str, float],
    told: Mapping[str, Any],
    dataset: Mapping[str, Any],
    tokenizer: Any = None,
    new_head: bool = False,
) -> None:
    """Write a checkpoint folder with its card.

    Args:
        folder: is made.
        figures: of validation.
        told: what the card says of a model of this task beyond what it says of every one.
        dataset: what it says of the data beyond name and version.
        new_head: training began with another head than the checkpoint's.
    """
    base, manifest = resolve(origin.checkpoint), origin.version.manifest
    folder.mkdir(parents=True)
    model.save_pretrained(folder, safe_serialization=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, folder / name)
    card = {
        "task": task,
        "architecture": type(model).__name__,
        **told,
        "preprocessing": origin.views.model_dump(mode="json"),
        "dataset": {
            "name": manifest.name,
            "version": manifest.version,
            "before": data_before(base, new_head),
            **dataset,
        },
        "training": {"model": base.name, **origin.config.model_dump(mode="json", exclude=_UNTOLD)},
        "metrics": {name: round(value, 4) for name, value in figures.items()},
        "code_commit": code_commit(),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "licence": base.card.licence or _LICENCE,
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def data_before(checkpoint: Checkpoint, new_head: bool = False) -> list[dict[str, str]]:
    """Names and versions of the data that a checkpoint's weights have seen, for the card of what is trained from it: by
    its own card the last that it was trained on, and those before.

    Under a new head the tower stays, and with it what it has seen; a starter model's tower was taught nothing.
    """
    if new_head and checkpoint.uri.startswith("starter:"):
        return []
    dataset = checkpoint.card.dataset
    seen = [dataset, *dataset.get("before", [])]
    named = [{name: str(each.get(name)) for name in ("name", "version")} for each in seen if each.get("version")]
    return [each for place, each in enumerate(named) if each not in named[:place]]
