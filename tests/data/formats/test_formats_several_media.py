"""Rows of several videos and images, and conversations: in every format the samples of the same rows in its own."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videor1.data import load_samples
from videor1.data.formats import RowReader
from videor1.types import Sample, SampleError

Row = dict[str, Any]
TEXT = "<video> and <image> and <video>: which?"
CHOICE = {"problem_type": "multiple choice", "problem_id": 1}
OPTIONS = ["A. one", "B. two"]
VIDEOS = [{"video": "a.mp4", "video_start": 1, "video_end": 2.5}, {"video": "b.mp4", "max_frames": 4, "fps": 0.5}]
OWN: dict[str, Row] = {
    "placeholders": {
        **CHOICE,
        "problem": TEXT,
        "options": OPTIONS,
        "solution": "<answer>B</answer>",
        "media": [
            {"path": "a.mp4", "kind": "video", "start": 1, "end": 2.5},
            {"path": "i.png", "kind": "image"},
            {"path": "b.mp4", "kind": "video", "max_frames": 4, "fps": 0.5},
        ],
    },
    "options": {
        **CHOICE,
        "problem": "<video>Which?",
        "options": ["A. <image>", "B. <image>"],
        "solution": "<answer>A</answer>",
        "media": [{"path": "a.mp4", "kind": "video"}, *({"path": f"{n}.png", "kind": "image"} for n in "12")],
    },
    "conversation": {
        "problem_type": "free-form",
        "problem_id": 1,
        "system": "Be brief.",
        "messages": [
            {"role": "user", "content": "<video>"},
            {"role": "assistant", "content": "I see."},
            {"role": "user", "content": "And <video>?"},
        ],
        "solution": "<answer>red</answer>",
        "process": "<think>so</think>",
        "chat_template_kwargs": {"enable_thinking": False},
        "media": [{"path": "a.mp4", "kind": "video"}, {"path": "b.mp4", "kind": "video"}],
    },
    "in front": {
        **CHOICE,
        "problem": "Which?",
        "options": OPTIONS,
        "solution": "<answer>A</answer>",
        "media": [{"path": "1.png", "kind": "image"}, {"path": "2.png", "kind": "image"}],
    },
}
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [SYSTEM, *OWN["conversation"]["messages"]]
TRACE = {"role": "assistant", "content": "<think>so</think><answer>red</answer>"}
TALK = {"problem_type": "free-form", "problem_id": 1, "chat_template_kwargs": {"enable_thinking": False}}
BOTH = {"videos": ["a.mp4", "b.mp4"]}
STILLS = {"images": ["1.png", "2.png"]}
IN_TEXT = f"{TEXT}\nA. one\nB. two"


def user(content: Any) -> list[Row]:
    return [{"role": "user", "content": content}]


def parts() -> list[Row]:
    """TEXT as TRL has it, with the media in their parts."""
    video, other = ({"type": "video"} | one for one in VIDEOS)
    texts = ({"type": "text", "text": text} for text in (" and ", " and ", ": which?"))
    still = {"type": "image", "image": "i.png"}
    return [video, next(texts), still, next(texts), other, next(texts)]


PEERS: dict[str, dict[str, Row]] = {
    "easyr1": {
        "placeholders": CHOICE | {"problem": IN_TEXT, "answer": "B", "videos": VIDEOS, "images": ["i.png"]},
        "options": CHOICE
        | {"problem": "<video>Which?", "options": ["A. <image>", "B. <image>"], "answer": "A", "videos": ["a.mp4"]}
        | STILLS,
        "in front": CHOICE | {"problem": "<image><image>Which?", "options": OPTIONS, "answer": "A"} | STILLS,
    },
    "onethinker": {
        "placeholders": CHOICE
        | {"problem": TEXT, "options": OPTIONS, "answer": "B", "data_type": "video", "videos": VIDEOS}
        | {"images": ["i.png"], "data_source": None}
    },
    "verl": {
        "placeholders": {"prompt": user(IN_TEXT), "reward_model": {"ground_truth": "B"}, "extra_info": CHOICE}
        | {"videos": VIDEOS, "images": [{"image": "i.png"}]},
        "conversation": TALK | {"prompt": TURNS, "reward_model": {"ground_truth": TRACE["content"]}} | BOTH,
        "options": {"prompt": user("<video>Which?\nA. <image>\nB. <image>"), "reward_model": {"ground_truth": "A"}}
        | {"extra_info": CHOICE, "videos": ["a.mp4"]}
        | STILLS,
    },
    "swift": {
        "placeholders": CHOICE | {"messages": user(IN_TEXT), "solution": "B", "videos": VIDEOS, "images": ["i.png"]},
        "conversation": TALK | {"messages": [*TURNS, TRACE]} | BOTH,
        "options": CHOICE
        | {"messages": user("<video>Which?\nA. <image>\nB. <image>"), "solution": "A", "videos": ["a.mp4"]}
        | STILLS,
    },
    "trl": {
        "placeholders": CHOICE | {"prompt": user(parts()), "answer": "B", "options": OPTIONS},
        "conversation": TALK | {"prompt": TURNS, "completion": [TRACE]} | BOTH,
        "in front": CHOICE
        | {"prompt": user([{"type": "image"}] * 2 + [{"type": "text", "text": "Which?"}]), "options": OPTIONS}
        | {"solution": "A"}
        | STILLS,
    },
}
CASES = [(name, case) for name, rows in PEERS.items() for case in rows]


def read(folder: Path, row: Row, **options: Any) -> Sample:
    path = folder / "data.json"
    path.write_text(json.dumps([row]), encoding="utf-8")
    (sample,) = load_samples(path, **options).samples
    return sample


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_peers_row_is_the_sample_of_the_own_row(name: str, case: str, tmp_path: Path) -> None:
    expected = read(tmp_path, OWN[case])
    if case == "in front":  # the same prompt, with its placeholders as these formats need them
        expected = read(tmp_path, OWN[case] | {"problem": "<image><image>Which?"})
    assert len(expected.items) > 1
    for options in ({}, {"format": name}):
        assert read(tmp_path, PEERS[name][case], **options) == expected


@settings(max_examples=200, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["video", "image"]), min_size=2, max_size=5),
    texts=st.lists(st.text("ab \n", max_size=4), min_size=6, max_size=6),
)
def test_any_order_of_media(kinds: list[str], texts: list[str]) -> None:
    text = "".join(f"{before}<{kind}>" for before, kind in zip(texts, kinds, strict=False)) + f"{texts[-1]}?"
    names = [f"{place}.{kind}" for place, kind in enumerate(kinds)]
    media = [{"path": name, "kind": kind} for name, kind in zip(names, kinds, strict=True)]
    by_kind = {f"{kind}s": [one["path"] for one in media if one["kind"] == kind] for kind in ("video", "image")}
    told = {"problem_type": "free-form", "solution": "red"} | by_kind
    rows = [{"problem": text, "answer": "red"} | told, {"messages": user(text)} | told, {"prompt": user(text)} | told]
    rows[0].pop("solution")
    for row in rows:
        entry = RowReader()("row 0", row, "data.json")
        assert (entry["problem"], entry["media"]) == (text, media)
        for kind in set(kinds):
            with pytest.raises(SampleError, match="expected a <"):
                RowReader()("row 0", row | {f"{kind}s": [*by_kind[f"{kind}s"], "more"]}, "data.json")


def test_rows_with_media_of_their_own_are_of_the_own_format(tmp_path: Path) -> None:
    for case, row in OWN.items():
        expected = read(tmp_path, row)
        reader = RowReader()
        assert reader("row 0", row | {"answer": "other", "images": ["x.png"]}, "data.json")["media"] == row["media"]
        assert dict(reader.took) == {"video-r1": 1}, case
        assert read(tmp_path, row | {"answer": "other"}) == expected
