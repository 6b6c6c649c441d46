"""Entries that list media or hold a conversation: what is read, and what each bad one is told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videor1.config import DataConfig
from videor1.data import load_samples
from videor1.data.samples import EntryChecker, samples_digest
from videor1.data.stream import RowStream
from videor1.errors import DataError
from videor1.types import MediaItem, Message, Sample, SampleError

BASE = {"problem_id": 1, "problem_type": "free-form", "solution": "<answer>red</answer>"}
VIDEO, IMAGE = {"path": "a.mp4", "kind": "video"}, {"path": "b.png", "kind": "image"}
FRAMES = {"frames": ["f/1.png", "f/2.png", "f/3.png"], "timestamps": [0, 0.5, 2]}


def checker(folder: Path) -> EntryChecker:
    return EntryChecker(folder / "data.json", folder.resolve(), False)


def read(folder: Path, **entry: Any) -> Sample:
    return checker(folder)(0, "entry 0", BASE | entry)


def refused(folder: Path, **entry: Any) -> SampleError:
    with pytest.raises(SampleError) as raised:
        read(folder, **entry)
    assert raised.value.path == str(folder / "data.json")
    assert raised.value.message.startswith("entry 0: ")
    return raised.value


def test_media_are_read_as_they_are_listed(tmp_path: Path) -> None:
    root = tmp_path.resolve()
    part = VIDEO | {"start": 1, "end": 2.5, "fps": 4, "max_frames": 8, "max_pixels": 5000, "timestamps": None}
    folder = {"path": "f", "kind": "video", "frames_per_second": 3}
    sample = read(tmp_path, problem="<video><image> <video><video>?", media=[part, IMAGE, FRAMES, folder])
    assert (
        sample.items
        == sample.media
        == (
            MediaItem("video", root / "a.mp4", root, start=1.0, end=2.5, fps=4.0, max_frames=8, max_pixels=5000),
            MediaItem("image", root / "b.png", root),
            MediaItem("video", None, root, tuple(root / f"f/{i}.png" for i in (1, 2, 3)), (0.0, 0.5, 2.0)),
            MediaItem("video", root / "f", root, frames_per_second=3.0),
        )
    )
    assert (sample.data_type, sample.path, sample.root) == ("video", root / "a.mp4", root)
    assert read(tmp_path, problem="Which?", media=[IMAGE, IMAGE]).data_type == "image"
    text = read(tmp_path, problem="Which?", media=[], data_type="text")
    assert (text.data_type, text.items, text.path) == ("text", (), None)
    # In options too.
    choice = {"problem_type": "multiple choice", "options": ["A. <image>", "B. <image>"]}
    sample = read(
        tmp_path, problem="<video>?", media=[VIDEO, IMAGE, IMAGE], **choice | {"solution": "<answer>A</answer>"}
    )
    assert len(sample.items) == 3


def test_a_conversation_is_read(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "See "}, {"type": "video"}, {"type": "text", "text": "?"}]
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image> What?"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": parts},
    ]
    sample = read(tmp_path, messages=turns, media=[IMAGE, VIDEO], chat_template_kwargs={"x": [1]})
    assert sample.messages == (
        Message("user", "<image> What?"),
        Message("assistant", "A cat."),
        Message("user", "See <video>?"),
    )
    assert (sample.system, sample.problem) == ("Be brief.", "See <video>?")
    assert sample.chat_template_kwargs == {"x": [1]}
    one = read(tmp_path, messages=turns[3:], data_type="video", path="a.mp4", system="Other.")
    assert (one.items, one.system) == (
        (MediaItem("video", tmp_path.resolve() / "a.mp4", tmp_path.resolve()),),
        "Other.",
    )


@pytest.mark.parametrize(
    ("kind", "told", "entry"),
    [
        ("media", "got an empty list", {"media": []}),
        ("wrong_type", "media: expected a list of objects, got a string", {"media": "a.mp4"}),
        ("wrong_type", r"media\[1\]: expected an object, got a string", {"media": [VIDEO, "b.png"]}),
        ("missing_field", r"media\[0\]: missing field 'kind'", {"media": [{"path": "a.mp4"}]}),
        ("media", "did you mean 'video'", {"media": [VIDEO | {"kind": "vidoe"}]}),
        ("media", "kind: expected one of", {"media": [VIDEO | {"kind": 3}]}),
        ("media", "unknown field 'strat'; did you mean 'start'", {"media": [VIDEO | {"strat": 3}]}),
        ("media", "expected path or frames, got neither", {"media": [{"kind": "video"}]}),
        ("media", "expected path or frames, got both", {"media": [VIDEO | FRAMES]}),
        ("media", "0 <= start < end .*got start 3.0 and end 1.0", {"media": [VIDEO | {"start": 3, "end": 1}]}),
        ("media", "0 <= start < end", {"media": [VIDEO | {"start": 1, "end": 1}]}),
        ("media", "0 <= start < end", {"media": [VIDEO | {"start": -1}]}),
        ("media", "start: expected a finite number", {"media": [VIDEO | {"start": float("nan")}]}),
        ("media", "start: expected a finite number", {"media": [VIDEO | {"start": 10**400}]}),
        ("media", "end: expected a finite number", {"media": [VIDEO | {"end": float("inf")}]}),
        ("wrong_type", "start: expected a number, got a string", {"media": [VIDEO | {"start": "1"}]}),
        ("wrong_type", "fps: expected a number, got a boolean", {"media": [VIDEO | {"fps": True}]}),
        ("media", "fps: expected a number above 0", {"media": [VIDEO | {"fps": 0}]}),
        ("media", "max_frames: expected a whole number of 2 or more, even", {"media": [VIDEO | {"max_frames": 7}]}),
        ("media", "max_frames: expected a whole number of 2", {"media": [VIDEO | {"max_frames": 0}]}),
        ("media", "max_pixels: expected a whole number of 1", {"media": [VIDEO | {"max_pixels": 1.5}]}),
        ("media", "max_pixels: .*at most", {"media": [VIDEO | {"max_pixels": 2**40}]}),
        ("media", "start: only a video has these, and this is an image", {"media": [IMAGE | {"start": 0}]}),
        ("media", "frames, timestamps: only a video", {"media": [FRAMES | {"kind": "image"}]}),
        ("media", "at least 2 frames, got 1", {"media": [FRAMES | {"frames": ["a.png"]}]}),
        ("media", "one for each of 2 frames, got 3", {"media": [FRAMES | {"frames": ["a.png", "b.png"]}]}),
        ("media", "need timestamps .* or frames_per_second", {"media": [{"frames": ["a.png", "b.png"]}]}),
        ("media", "timestamps or frames_per_second, got both", {"media": [FRAMES | {"frames_per_second": 2}]}),
        ("media", "ascending", {"media": [FRAMES | {"timestamps": [0, 2, 1]}]}),
        ("media", "ascending", {"media": [FRAMES | {"timestamps": [-1, 0, 1]}]}),
        ("wrong_type", r"timestamps\[1\]: expected a number", {"media": [FRAMES | {"timestamps": [0, None, 1]}]}),
        ("wrong_type", r"frames\[0\]: expected a string", {"media": [FRAMES | {"frames": [1, 2, 3]}]}),
        ("empty_field", r"media\[0\].path: expected text", {"media": [VIDEO | {"path": " "}]}),
        ("outside_root", r"media\[1\].path: .* outside data.root", {"media": [VIDEO, IMAGE | {"path": "../b.png"}]}),
        ("outside_root", r"frames\[2\]: ", {"media": [FRAMES | {"frames": ["a.png", "b.png", "/etc/x.png"]}]}),
        ("bad_path", r"media\[0\].path: .*null byte", {"media": [VIDEO | {"path": "a\0.mp4"}]}),
        ("bad_path", r"media\[0\].path: ", {"media": [VIDEO | {"path": "\ud800.mp4"}]}),
        ("media", "expected path or media, got both", {"media": [VIDEO], "path": "a.mp4"}),
        ("data_type", "the media make it 'video', got 'image'", {"media": [VIDEO, IMAGE], "data_type": "image"}),
        ("placeholders", r"2 \(<video> <image>\), .*got 1 ", {"media": [VIDEO, IMAGE], "problem": "<video>?"}),
        ("placeholders", r"got 3", {"media": [VIDEO, VIDEO], "problem": "<video><video><video>"}),
        ("placeholders", "<video> <image>.* got .*<image>", {"media": [VIDEO, IMAGE], "problem": "<image><video>"}),
        ("placeholders", "expected .* 0, .*got 1", {"media": [], "data_type": "text", "problem": "<video>?"}),
        ("messages", "problem or messages, got both", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)  # fmt: skip
def test_bad_media(kind: str, told: str, entry: dict[str, Any], tmp_path: Path) -> None:
    error = refused(tmp_path, **{"problem": "Which?"} | entry)
    assert error.kind == kind, error
    assert re.search(told, error.message), error.message


USER = {"role": "user", "content": "Which?"}


@pytest.mark.parametrize(
    ("kind", "entry"),
    [
        ("wrong_type", {"messages": "x"}),
        ("messages", {"messages": []}),
        ("wrong_type", {"messages": ["x"]}),
        ("missing_field", {"messages": [{"role": "user"}]}),
        ("missing_field", {"messages": [{"content": "x"}]}),
        ("messages", {"messages": [USER | {"role": "usr"}]}),
        ("messages", {"messages": [USER | {"role": 3}]}),
        ("messages", {"messages": [USER, USER | {"role": "assistant"}]}),
        ("messages", {"messages": [USER, USER | {"role": "system"}, USER]}),
        ("messages", {"messages": [USER | {"role": "system"}]}),
        ("messages", {"messages": [USER | {"role": "system"}, USER], "system": "Both."}),
        ("wrong_type", {"messages": [USER | {"content": 5}]}),
        ("empty_field", {"messages": [USER | {"content": " "}]}),
        ("empty_field", {"messages": [USER | {"content": []}]}),
        ("wrong_type", {"messages": [USER | {"content": ["x"]}]}),
        ("wrong_type", {"messages": [USER | {"content": [{"type": "text"}]}]}),
        ("messages", {"messages": [USER | {"content": [{"type": "audio"}]}]}),
        ("bad_text", {"messages": [USER | {"content": "\ud800"}]}),
        ("placeholders", {"messages": [USER | {"content": "<video>"}]}),
        ("placeholders", {"messages": [USER | {"content": [{"type": "video"}, {"type": "video"}]}], "media": [VIDEO]}),
        ("placeholders", {"messages": [USER], "system": "<video>", "media": [IMAGE]}),
        ("wrong_type", {"messages": [USER], "system": 5}),
        ("wrong_type", {"messages": [USER], "chat_template_kwargs": "x"}),
        ("wrong_type", {"messages": [USER], "chat_template_kwargs": []}),
    ],
)
def test_bad_conversations(kind: str, entry: dict[str, Any], tmp_path: Path) -> None:
    text = {} if "media" in entry else {"data_type": "text"}
    assert refused(tmp_path, **entry | text).kind == kind


WORDS = ["video", "image", "a.mp4", "user", "text"]
NAMES = ["path", "kind", "frames", "timestamps", "start", "role", "content", "type", "text"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), inner, max_size=5)
    ),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None)
@given(media=JSON, messages=JSON, system=JSON, arguments=JSON)
def test_any_json_is_a_sample_or_its_error(media: Any, messages: Any, system: Any, arguments: Any) -> None:
    check = checker(Path("data"))
    fields = {"media": media, "messages": messages, "system": system, "chat_template_kwargs": arguments}
    for problem in ("Which?", None):
        for data_type in ("text", None):
            entry = BASE | fields | {"problem": problem, "data_type": data_type}
            try:
                sample = check(0, "entry 0", entry)
            except SampleError:
                continue
            assert isinstance(sample, Sample)


def test_the_digest_of_entries_without_lists_is_what_it_was(tmp_path: Path) -> None:
    """A run that was begun before goes on; every new field counts."""
    path = tmp_path / "clips/a.mp4"
    old = Sample(
        3, "q", "Which <image>?", "video", "free-form", "<answer>x</answer>", path, tmp_path, data_source="made"
    )
    assert samples_digest([old], tmp_path) == "e998bc2afae52dcc of 1 samples"
    fresh = {"problem": "Which?", "media": [VIDEO, IMAGE]}
    changes: list[dict[str, Any]] = [
        {}, {"media": [IMAGE, VIDEO]}, {"media": [VIDEO, IMAGE, IMAGE]}, {"media": [VIDEO | {"end": 2}, IMAGE]},
        {"media": [VIDEO | {"fps": 1}, IMAGE]}, {"media": [FRAMES, IMAGE]}, {"system": "x"},
        {"media": [FRAMES | {"timestamps": [0, 1, 2]}, IMAGE]}, {"chat_template_kwargs": {"x": 1}},
        {"problem": None, "messages": [USER]}, {"problem": None, "messages": [USER | {"role": "assistant"}, USER]},
    ]  # fmt: skip
    found = {samples_digest([read(tmp_path, **fresh | change)], tmp_path) for change in changes}
    assert len(found) == len(changes)
    moved = tmp_path / "other"
    moved.mkdir()
    assert samples_digest([read(moved, **fresh)], moved) in found


def test_a_stream_reads_the_same(tmp_path: Path) -> None:
    """From JSONL and, with the nulls that its columns hold, from Parquet."""
    rows = [
        BASE | {"problem": "<video> and <image>?", "media": [VIDEO | {"start": 1.5}, IMAGE]},
        BASE | {"messages": [{"role": "system", "content": "Be brief."}, USER], "data_type": "text"},
        BASE | {"problem": "Which?", "data_type": "video", "path": "a.mp4", "chat_template_kwargs": {"x": True}},
    ]
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    names = {name: None for row in rows for name in row} | {"problem_id": "1"}
    table = pyarrow.Table.from_pylist([names | row | {"problem_id": "1"} for row in rows])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    held = load_samples(tmp_path / "rows.jsonl").samples
    for name in ("rows.jsonl", "rows.parquet"):
        stream = RowStream(str(tmp_path / name), DataConfig(stream=True))
        shard, found = stream.read(0)
        samples = [stream.sample(shard, found, row) for row in range(len(found))]
        for ours, theirs in zip(samples, held, strict=True):
            assert isinstance(ours, Sample), ours
            for field in ("items", "messages", "system", "chat_template_kwargs", "problem", "data_type", "path"):
                assert getattr(ours, field) == getattr(theirs, field), (name, field)


def test_a_file_of_bad_entries_alone_says_why(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([BASE | {"problem": "x", "media": []}] * 3))
    with pytest.raises(DataError, match=r"none of its 3 samples can be used \(media 3\)"):
        load_samples(tmp_path / "data.json")


def learned(folder: Path, **entry: Any) -> Sample:
    check = EntryChecker(folder / "data.json", folder.resolve(), True)
    return check(0, "entry 0", {"problem_id": 1, "data_type": "text"} | entry)


ANSWER = {"role": "assistant", "content": "A cup."}


def test_a_conversation_that_ends_with_its_answer(tmp_path: Path) -> None:
    """SFT takes it in place of process and solution; it stands as it is, unless it is said to be a kind of question."""
    sample = learned(tmp_path, messages=[USER, ANSWER, ANSWER])
    assert sample.messages == (Message("user", "Which?"), *2 * [Message("assistant", "A cup.")])
    assert (sample.problem, sample.solution, sample.process, sample.instructed) == ("Which?", "", "", False)
    typed = learned(tmp_path, messages=[USER, ANSWER], problem_type="tracking")
    assert (typed.problem_type, typed.instructed) == ("tracking", True)
    assert learned(tmp_path, messages=[ANSWER, USER, ANSWER], solution=BASE["solution"]).solution == BASE["solution"]
    assert learned(tmp_path, messages=[ANSWER, USER], process="<think>x</think>", **BASE).instructed
    same = {"messages": [USER, ANSWER]}
    told = {
        samples_digest([learned(tmp_path, **same, **more)], tmp_path)
        for more in ({}, {"problem_type": "free-form"}, {"problem_type": "math"})
    }
    assert len(told) == 3


def test_a_conversation_of_text_alone_is_of_our_own_format(tmp_path: Path) -> None:
    """Found by ``data.format`` auto too, though ms-swift's rows have ``messages``."""
    rows = [{"messages": [USER, ANSWER], "data_type": "text"}, {"messages": [USER, ANSWER], "media": [VIDEO]}]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    dataset = load_samples(tmp_path / "data.json", require_process=True, reward=None)
    assert [(len(sample.messages), sample.instructed) for sample in dataset.samples] == [(2, False)] * 2
    with pytest.raises(DataError, match="only SFT learns such an answer"):
        load_samples(tmp_path / "data.json")


@pytest.mark.parametrize(
    ("kind", "told", "entry"),
    [
        ("messages", "last turn of messages or as process and solution, got both", {"process": "<think></think>"}),
        ("messages", "expected a turn of the user", {"messages": [ANSWER]}),
        ("messages", "expected a turn of the user", {"messages": [ANSWER | {"role": "system"}, ANSWER]}),
        ("empty_field", r"messages\[1\].content", {"messages": [USER, ANSWER | {"content": " "}]}),
        ("problem_type", "expected one of", {"problem_type": "x"}),
        ("solution", "holds <answer>", {"solution": "red"}),
        ("missing_field", "'process'", {"messages": [ANSWER, USER]} | BASE),
        ("missing_field", "'problem_type'", {"messages": [ANSWER, USER]}),
        ("placeholders", "the user's turns only, got <video> in the assistant's",
         {"messages": [USER, ANSWER | {"content": "<video>"}], "media": [VIDEO], "data_type": "video"}),
        ("placeholders", "the user's turns only, got <video> in the system's",
         {"messages": [USER, ANSWER], "system": "<video>", "media": [VIDEO], "data_type": "video"}),
        ("placeholders", "expected .* 0, .*got 1", {"messages": [USER | {"content": "<video>"}, ANSWER]}),
    ],
)  # fmt: skip
def test_bad_conversations_of_sft(kind: str, told: str, entry: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=told) as raised:
        learned(tmp_path, **{"messages": [USER, ANSWER]} | entry)
    assert raised.value.kind == kind


def test_answers_are_for_sft_alone(tmp_path: Path) -> None:
    """A row that T-GRPO or an evaluation cannot ask is an error in its place, with what to do."""
    error = refused(tmp_path, messages=[USER, ANSWER], data_type="text")
    assert error.kind == "messages"
    assert "only SFT learns such an answer; leave it out here, and put the true answer in solution" in error.message
