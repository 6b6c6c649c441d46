"""Detecting video files that are cut off. FFmpeg may read a cut file without an error, as a shorter video."""

from __future__ import annotations

import os
from typing import BinaryIO

_EBML = b"\x1a\x45\xdf\xa3"  # first bytes of a Matroska file
_SEGMENT = b"\x18\x53\x80\x67"  # first bytes of its segment, which holds the video
_MP4_FIRST = (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"pnot", b"styp", b"sidx")
_MP4_NEEDED = (b"moov", b"mdat", b"moof")  # boxes that hold the video and its index


def missing_bytes(file: BinaryIO) -> int:
    """Return the number of bytes that an open file's outermost elements claim beyond its end.

    These are MP4 boxes, Matroska's segment and AVI's chunk. The result is 0 where nothing is missing, and where the
    container does not state a length: other formats (MPEG-TS and raw streams have none) and live recordings of open
    size.
    """
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    if head[:4] == _EBML:
        return max(0, _matroska_end(file, size) - size)
    if head[4:8] in _MP4_FIRST:
        return _mp4_missing(file, size)
    if head[:4] == b"RIFF":
        missing = 8 + int.from_bytes(head[4:], "little") - size
        return missing if missing > 1 else 0  # many writers leave out the last padding byte
    return 0


def _mp4_missing(file: BinaryIO, size: int) -> int:
    """Return the number of bytes that the first needed box that is too long claims beyond the end of the file."""
    offset = 0
    while offset + 8 <= size:
        file.seek(offset)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length < 8:  # 0 means up to the end of the file; any other value is not a box
            return 0
        offset += length
        if offset > size and kind in _MP4_NEEDED:
            return offset - size
    return 0


def _matroska_end(file: BinaryIO, size: int) -> int:
    """Return the offset at which the first segment ends; 0 where its size is left open."""
    file.seek(4)
    header = _ebml_size(file)
    if header is None or header > size:  # the file is damaged, which the demuxer will report
        return 0
    file.seek(header, 1)
    if file.read(4) != _SEGMENT:
        return 0
    length = _ebml_size(file)
    return 0 if length is None else file.tell() + length


def _ebml_size(file: BinaryIO) -> int | None:
    """Read a variable-length integer; None where it means "unknown" (all ones) or is invalid.

    The number of leading zero bits in the first byte is the number of further bytes.
    """
    first = file.read(1)
    if not first or not first[0]:
        return None
    extra = 8 - first[0].bit_length()
    raw = bytes([first[0] & ((1 << (7 - extra)) - 1)]) + file.read(extra)
    value = int.from_bytes(raw, "big")
    return None if value == (1 << (7 * (extra + 1))) - 1 else value
