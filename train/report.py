"""What every report is made of, whatever it judges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from PIL import Image


@dataclass
class Picture:
    """A picture that the report shows."""

    title: str
    image: Image.Image


@dataclass
class Body:
    """A report's figures and pictures."""

    figures: dict[str, Any]
    pictures: dict[str, list[Picture]] = field(default_factory=dict)
