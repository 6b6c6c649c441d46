"""Video-R1: the format of this trainer's own entries, which are left as they are.

The rows that OneThinker and EasyVideoR1 evaluate on are of this format, and may name an image beside the video: in
``additional_path`` where ``data_type`` is "video-image" (tulerfeng/OneThinker, Evaluation/Eval/eval_bench.py), or in
``image_path`` where the text mentions ``<image 1>`` (cyuQ1n/EasyVideoR1, eval/code). Both stand before the text, the
video first, as there.
"""

from __future__ import annotations

import re

from videor1.data.formats.parts import OF_AN_ENTRY, Entry, Row, needed

OF_THE_MEDIA = ("path", "additional_path", "image_path")
# Only these columns of Parquet are read, because others may be large.
FIELDS: tuple[str, ...] = (
    "problem_id",
    "problem",
    "data_type",
    "problem_type",
    "options",
    "solution",
    "data_source",
    "process",
)
FIELDS += ("media", "messages", *OF_AN_ENTRY, *OF_THE_MEDIA)

_MENTION = re.compile(r"<image \d+>")


def read(row: Row, problem_type: str | None = None) -> Entry:
    """Return the row itself, or with its video and its image as ``media``."""
    beside = None
    if row.get("data_type") == "video-image":
        beside = "additional_path"
    elif row.get("data_type") == "video" and row.get("image_path") is not None and _mentions_an_image(row):
        beside = "image_path"
    if beside is None or row.get("media") is not None:
        return dict(row)
    entry = {field: value for field, value in row.items() if field not in OF_THE_MEDIA}
    media = [{"path": needed(row, "path"), "kind": "video"}, {"path": needed(row, beside), "kind": "image"}]
    return entry | {"data_type": "video", "media": media}


def _mentions_an_image(row: Row) -> bool:
    options = row.get("options")
    texts = [row.get("problem"), *(options if isinstance(options, list) else [])]
    return any(isinstance(text, str) and _MENTION.search(text) is not None for text in texts)
