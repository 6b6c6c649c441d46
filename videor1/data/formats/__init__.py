"""Readers of other trainers' rows: each makes an entry of the Video-R1 format of a row, and ``data.format`` chooses.

A format is a file with a function ``read(row, problem_type)``; a line in ``detection.FORMATS`` makes it known.
"""

from __future__ import annotations

from videor1.data.formats.detection import FORMATS, Format, RowReader, field_names

__all__ = ["FORMATS", "Format", "RowReader", "field_names"]
