"""The annotation: one record of what DeepTrust says about one picture.

What ``POST /v1/analyze`` answers, what bulk annotation writes to parquet, what the store keeps and what reviewers
correct are this model and no other. Knows no HTTP, no model and no storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Stage = Literal["decode", "detector", "captioner", "tagger"]
Task = Literal["detect", "caption", "tag"]

#: A tag as it may appear in a record: lower case, no control characters, at most 32 characters.
Tag = Annotated[str, StringConstraints(min_length=1, max_length=32, pattern=r"^[^\x00-\x1f\x7fA-Z]+$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Signal(_Record):
    """One trace of a picture's origin found in its file, as it stands there."""

    kind: Literal["c2pa", "iptc", "xmp", "png_text", "exif"] = Field(description="where the trace was found")
    name: str = Field(max_length=128, description="the field, e.g. `DigitalSourceType` or `Software`")
    value: str = Field(max_length=512, description="its value, shortened to 512 characters")
    declares_ai: bool | None = Field(None, description="true: says AI-made; false: says captured; null: says neither")


class Provenance(_Record):
    """What the file itself declares. Absence proves nothing: most services strip metadata."""

    c2pa: Literal["valid", "invalid", "absent"] = Field(description="state of a C2PA manifest, checked without network")
    declared_ai: bool | None = Field(description="the file says that AI made it (true) or that a camera did (false)")
    signals: list[Signal] = Field(default_factory=list, max_length=32)


class HeatMap(_Record):
    """What moved the detector towards `ai`, over the whole picture, 0 (nothing) to 1 (most)."""

    method: str = Field(description="how it was computed, e.g. `grad-cam`")
    grid: list[list[float]] | None = Field(None, description="rows from top to bottom, values from left to right")
    png: str | None = Field(None, description="the same as a transparent PNG overlay, base64")


class Detection(_Record):
    """The detector's verdict. A probability, never proof: not to be the sole basis for taking a picture down."""

    label: Literal["ai", "human", "uncertain"]
    ai_probability: float = Field(ge=0, le=1, description="calibrated on validation data")
    provenance: Provenance
    heat_map: HeatMap | None = Field(None, description="only when asked for with `explain`")


class Caption(_Record):
    """One sentence that describes the picture."""

    text: str = Field(max_length=512)


class StageError(_Record):
    """A stage that gave no answer for this picture while others did."""

    stage: Stage
    code: str = Field(description="machine-readable: `timeout`, `overloaded`, `unavailable`, `failed`, `skipped`")
    detail: str = Field(description="for people")


class Annotation(_Record):
    """Everything DeepTrust says about one picture."""

    id: str = Field(description="the caller's own id, or a new one")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the bytes as they were uploaded")
    detection: Detection | None = None
    caption: Caption | None = None
    tags: list[Tag] | None = Field(None, max_length=10)
    models: dict[str, str] = Field(
        default_factory=dict,
        description="stage -> `URI#revision` of the checkpoint that answered, `prompt` -> version of the tag prompt",
    )
    timings_ms: dict[str, float] = Field(default_factory=dict, description="wall time by stage, and `total`")
    errors: list[StageError] = Field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """No stage failed. What is not whole is worth another attempt, whatever the code: of an engine that died under
        the picture `failed` is said too.
        """
        return not self.errors

    def completed(self, earlier: Annotation) -> Annotation:
        """This answer, with what an earlier one about the same picture has and it lacks."""
        record = self.model_copy(
            update={
                "models": earlier.models | self.models,
                "timings_ms": earlier.timings_ms | self.timings_ms,
                "detection": self.detection or earlier.detection,
                "caption": self.caption or earlier.caption,
                "tags": earlier.tags if self.tags is None else self.tags,
            }
        )
        parts = {"detector": record.detection, "captioner": record.caption, "tagger": record.tags}
        # of the tagger, `skipped` is said for want of a caption
        said = [error for error in self.errors if error.code != "skipped" or record.caption is None]
        last = {error.stage: error for error in (*earlier.errors, *said)}
        record.errors = [error for stage, error in last.items() if parts.get(stage) is None]
        return record

    def detected(self, answer: Mapping[str, Any], provenance: Provenance, heat_map: HeatMap | None = None) -> None:
        """Enter what the detector answered: ``{"label", "ai_probability", "model"}``."""
        self.models["detector"] = answer["model"]
        self.detection = Detection(
            label=answer["label"], ai_probability=answer["ai_probability"], provenance=provenance, heat_map=heat_map
        )

    def captioned(self, answer: Mapping[str, Any]) -> None:
        """Enter what the captioner answered: ``{"text", "model"}``."""
        self.models["captioner"] = answer["model"]
        self.caption = Caption(text=answer["text"])

    def tagged(self, answer: Mapping[str, Any]) -> None:
        """Enter what the tagger answered: ``{"tags", "model", "prompt"}``."""
        self.models |= {"tagger": answer["model"], "prompt": answer["prompt"]}
        self.tags = answer["tags"]

    def failed(self, stage: Stage, code: str, detail: str) -> None:
        """Enter that a stage gave no answer."""
        self.errors.append(StageError(stage=stage, code=code, detail=detail))
