"""Video-R1: the format of this trainer's own entries, which are left as they are."""

from __future__ import annotations

from videor1.data.formats.parts import Entry, Row

# Only these columns of Parquet are read, because others may be large.
FIELDS: tuple[str, ...] = (
    "problem_id",
    "problem",
    "data_type",
    "problem_type",
    "options",
    "solution",
    "path",
    "data_source",
    "process",
)
FIELDS += ("media", "messages", "system", "chat_template_kwargs")


def read(row: Row, problem_type: str | None = None) -> Entry:
    """Return the row itself."""
    return dict(row)
