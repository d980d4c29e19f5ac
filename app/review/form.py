"""The reviewers' form: how a picture and the models' answer become a Label Studio task, and what comes back a label.

In: an annotation, a task's annotations as Label Studio gives them. Out: the form's description, pre-annotations,
labels. What reviewers type is cleaned to what a record takes, and nothing of it is executed. Knows no HTTP and no
database.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from app.store.reviews import Label, Verdict
from deployments.annotation import Annotation

#: Changes when the form does: a project made with another one is brought up to date.
FORM = """<View>
  <Image name="image" value="$image" zoomControl="true"/>
  <Header value="Who made this picture?"/>
  <Choices name="verdict" toName="image" choice="single" required="true" showInLine="true">
    <Choice value="Human" hotkey="h"/>
    <Choice value="AI" hotkey="a"/>
    <Choice value="Can't tell" hotkey="c"/>
  </Choices>
  <Header value="What does it show?"/>
  <TextArea name="caption" toName="image" maxSubmissions="1" editable="true" rows="2"/>
  <Header value="Tags, one at a time"/>
  <TextArea name="tags" toName="image" editable="true"/>
</View>
"""
_CHOICES: dict[Verdict, str] = {"human": "Human", "ai": "AI", "unclear": "Can't tell"}
_VERDICTS = {choice: verdict for verdict, choice in _CHOICES.items()}
_CONTROLS = re.compile(r"[\x00-\x1f\x7f]+")
_MAX_CAPTION, _MAX_TAG, _MAX_TAGS, _MAX_REVIEWER = 512, 32, 32, 256


def prediction(annotation: Annotation) -> dict[str, Any]:
    """What the models said, as a pre-annotation; an uncertain verdict chooses nothing."""
    result = []
    detection = annotation.detection
    if detection is not None and detection.label != "uncertain":
        result.append(_part("verdict", "choices", {"choices": [_CHOICES[detection.label]]}))
    if annotation.caption is not None and annotation.caption.text:
        result.append(_part("caption", "textarea", {"text": [annotation.caption.text]}))
    if annotation.tags:
        result.append(_part("tags", "textarea", {"text": list(annotation.tags)}))
    certainty = 0.0 if detection is None else max(detection.ai_probability, 1 - detection.ai_probability)
    models = ", ".join(f"{stage} {model}" for stage, model in sorted(annotation.models.items()))
    return {"model_version": models[:250] or "unknown", "score": certainty, "result": result}


def _part(name: str, kind: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "from_name": name, "to_name": "image", "type": kind, "value": value}


def label_of(sha256: str, annotation: Mapping[str, Any], reviewer: str) -> Label | None:
    """What a reviewer submitted; None: it was skipped, or says nothing.

    Raises:
        KeyError, TypeError, ValueError: it is none of this form's.
    """
    if annotation.get("was_cancelled"):
        return None
    answers = {part["from_name"]: part["value"] for part in annotation["result"] if "from_name" in part}
    verdict = _VERDICTS[answers["verdict"]["choices"][0]] if "verdict" in answers else None
    caption = _clean(" ".join(_texts(answers["caption"])))[:_MAX_CAPTION] if "caption" in answers else None
    tags = None
    if "tags" in answers:
        typed = [tag for text in _texts(answers["tags"]) for tag in text.split(",")]
        tags = tuple(dict.fromkeys(tag for tag in (_clean(t).lower()[:_MAX_TAG].strip() for t in typed) if tag))[
            :_MAX_TAGS
        ]
    if verdict is None and not caption and not tags:
        return None
    at = datetime.fromisoformat(str(annotation["updated_at"]).replace("Z", "+00:00"))
    return Label(sha256, reviewer[:_MAX_REVIEWER], at.astimezone(UTC), verdict, caption or None, tags or None)


def _texts(value: Mapping[str, Any]) -> list[str]:
    text = value["text"]
    return [str(each) for each in text] if isinstance(text, list) else [str(text)]


def _clean(text: str) -> str:
    return _CONTROLS.sub(" ", text).strip()
