"""The placeholders ``<video>`` and ``<image>``, by which a text says where its media stand."""

from __future__ import annotations

import re
from typing import Literal, cast

MediaKind = Literal["video", "image"]

_PLACEHOLDER = re.compile("<(video|image)>")


def placeholders(text: str) -> list[MediaKind]:
    """Return the kinds of media that a text has placeholders for, in their order."""
    return cast(list[MediaKind], _PLACEHOLDER.findall(text))


def divided(text: str) -> list[tuple[Literal["text", "video", "image"], str]]:
    """Divide a text at its placeholders: ("text", a text that is not empty) or (the kind of a placeholder, "")."""
    pieces = _PLACEHOLDER.split(text)  # text, kind, text, kind, ..., text
    parts: list[tuple[Literal["text", "video", "image"], str]] = []
    for place, piece in enumerate(pieces):
        if place % 2:
            parts.append((cast(MediaKind, piece), ""))
        elif piece:
            parts.append(("text", piece))
    return parts
