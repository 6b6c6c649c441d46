"""Is a video file cut off? FFmpeg may end a cut file without an error, and the clip would be silently shorter."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"
_MP4_FIRST = (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"pnot", b"styp", b"sidx")
_MP4_NEEDED = (b"moov", b"mdat", b"moof")


def missing_bytes(path: Path) -> int:
    """Bytes that a file's outermost element (MP4 box, Matroska segment, AVI chunk) claims beyond the file's end.

    0 where nothing is missing, or where the container does not say: other formats (MPEG-TS and raw streams have no
    length at all), live recordings of open size.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if head[:4] == _EBML:
            return max(0, _matroska_end(file, size) - size)
        if head[4:8] in _MP4_FIRST:
            return _mp4_missing(file, size)
    if head[:4] == b"RIFF":
        missing = 8 + int.from_bytes(head[4:], "little") - size
        return missing if missing > 1 else 0  # the last pad byte is often left out
    return 0


def _mp4_missing(file: BinaryIO, size: int) -> int:
    offset = 0
    while offset + 8 <= size:
        file.seek(offset)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length < 8:  # 0: up to the end of the file; else no box
            return 0
        offset += length
        if offset > size and kind in _MP4_NEEDED:
            return offset - size
    return 0


def _matroska_end(file: BinaryIO, size: int) -> int:
    """Offset where the (first) segment ends; 0 where its size is left open."""
    file.seek(4)
    header = _ebml_size(file)
    if header is None or header > size:  # damaged: the demuxer will say so
        return 0
    file.seek(header, 1)
    if file.read(4) != _SEGMENT:
        return 0
    length = _ebml_size(file)
    return 0 if length is None else file.tell() + length


def _ebml_size(file: BinaryIO) -> int | None:
    """A variable-length integer: leading zero bits count the further bytes; all ones means unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    extra = 8 - first[0].bit_length()
    raw = bytes([first[0] & ((1 << (7 - extra)) - 1)]) + file.read(extra)
    value = int.from_bytes(raw, "big")
    return None if value == (1 << (7 * (extra + 1))) - 1 else value
