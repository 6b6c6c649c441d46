"""Videos and images as other trainers' rows name them, and where in the text they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from videor1.data.shown import json_type, shown
from videor1.types import SampleError

Item = dict[str, Any]  # an element of an entry's field ``media``

# What qwen-vl-utils reads of a video beside its path, by the name that it has in an entry.
_OF_A_VIDEO = {"fps": "fps", "max_frames": "max_frames", "max_pixels": "max_pixels", "start": "start", "end": "end"}
_OF_A_VIDEO |= {"video_start": "start", "video_end": "end"}
_OF_FRAMES = {name: _OF_A_VIDEO[name] for name in ("max_frames", "max_pixels", "start", "end")}
_OF_FRAMES |= {"sample_fps": "frames_per_second", "timestamps": "timestamps"}
_OF_AN_IMAGE = {"max_pixels": "max_pixels"}


def media_of(row: Mapping[str, Any], kind: str) -> list[Item]:
    """Return the videos or images of a row's field ``videos`` or ``images``, or of ``video`` or ``image``.

    Raises:
        SampleError: ``ambiguous`` where a row has both fields; and as :func:`read_item`.
    """
    one, many = row.get(kind), row.get(f"{kind}s")
    if one is not None and many:
        raise SampleError("ambiguous", f"expected {kind} or {kind}s, got both")
    if one is not None:
        return [read_item(kind, kind, one)]
    if many is None:
        return []
    if not isinstance(many, list):
        raise SampleError("wrong_type", f"{kind}s: expected a list, got {json_type(many)}")
    return [read_item(kind, f"{kind}s[{number}]", value) for number, value in enumerate(many)]


def read_item(kind: str, name: str, value: Any) -> Item:
    """Return a video or an image as an entry's field ``media`` has it.

    Args:
        kind: "video" or "image".
        name: the field, for error messages.
        value: a path; a video's frames as a list of paths; an object of ``datasets`` (path, bytes) or of qwen-vl-utils
            (video or image, and settings).

    Raises:
        SampleError: ``embedded`` for media inside of the row, ``bad_path`` for a URL, ``media`` for a setting that one
            medium cannot have here, ``wrong_type``, ``empty_field``, ``ambiguous``.
    """
    if not isinstance(value, dict):
        return _source(kind, name, value) | {"kind": kind}
    given = {field: one for field, one in value.items() if one is not None}
    if given.pop("type", kind) != kind:
        raise SampleError("media", f"{name}.type: expected {kind!r}, got {shown(value['type'])}")
    if "bytes" in given:
        raise _embedded(name)
    sources = [field for field in ("path", kind) if field in given]
    if len(sources) != 1:
        got = "both" if sources else f"the fields {shown(sorted(map(str, given)))}"
        raise SampleError("media", f"{name}: expected a path, in path or {kind}, got {got}")
    item = _source(kind, f"{name}.{sources[0]}", given.pop(sources[0])) | {"kind": kind}
    known = _OF_AN_IMAGE if kind == "image" else _OF_FRAMES if "frames" in item else _OF_A_VIDEO
    for field, one in given.items():
        if field not in known:
            what = "a list of frames" if "frames" in item else f"one {kind}"
            raise SampleError(
                "media",
                f"{name}.{field}: {what} has no such setting here, known are {list(known)}; take it out of the data "
                "(video.* are the settings of the whole run)",
            )
        if known[field] in item:
            raise SampleError("ambiguous", f"{name}: {field} is there by two names")
        item[known[field]] = one
    return item


def _source(kind: str, name: str, value: Any) -> Item:
    if kind == "video" and isinstance(value, list):
        return {"frames": [_path(f"{name}[{number}]", one) for number, one in enumerate(value)]}
    return {"path": _path(name, value)}


def _path(name: str, value: Any) -> str:
    if isinstance(value, bytes | bytearray):
        raise _embedded(name)
    if not isinstance(value, str):
        raise SampleError("wrong_type", f"{name}: expected a path, got {json_type(value)}")
    if value.startswith("data:"):
        raise _embedded(name)
    path = value.removeprefix("file://")
    if "://" in path:
        raise SampleError("bad_path", f"{name}: expected a file, got the URL {shown(value)}; download it")
    if not path.strip():
        raise SampleError("empty_field", f"{name}: expected a path, got {shown(value)}")
    return path


def _embedded(name: str) -> SampleError:
    return SampleError(
        "embedded", f"{name}: holds the medium itself; write it to a file under data.root and name its path"
    )


def placed(inline: Sequence[tuple[str, Item | None]], videos: Sequence[Item], images: Sequence[Item]) -> list[Item]:
    """Return the media of a row in the order in which they stand in its text.

    Args:
        inline: for each placeholder in order, its kind, and its medium where the text itself names it.
        videos: the other videos, in order.
        images: the other images, in order.

    Raises:
        SampleError: ``placeholders`` where there are more or fewer placeholders than media; ``ambiguous`` where there
            are videos and images and no placeholder says which come first.
    """
    if not inline and videos and images:
        raise SampleError(
            "ambiguous", "videos and images, but no <video> or <image> in the text says in which order they stand"
        )
    left = {"video": list(videos), "image": list(images)}
    if not inline:
        return [*videos, *images]
    for kind, items in left.items():
        wanted = sum(found == kind and item is None for found, item in inline)
        if wanted != len(items):
            raise SampleError(
                "placeholders", f"expected a <{kind}> in the text for each of {len(items)} {kind}s, got {wanted}"
            )
    return [item if item is not None else left[kind].pop(0) for kind, item in inline]
