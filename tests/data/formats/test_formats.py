"""Rows as other trainers write them read as the same samples in the Video-R1 format, in memory and as streams."""

import copy
import dataclasses
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from streams import json_lines, parquet, samples, stream_of

from videor1.config import DataConfig
from videor1.data import Dataset, load_samples
from videor1.data.formats import FORMATS, RowReader
from videor1.data.stream import RowStream, open_dataset
from videor1.errors import ConfigError, DataError
from videor1.types import Sample, SampleError

# What each format's rows below say, in the Video-R1 format: a choice about a video, a number about an image, a text.
OWN: list[dict[str, Any]] = [
    {
        "problem_id": 11,
        "problem": "Which comes first?",
        "data_type": "video",
        "path": "clips/a.mp4",
        "problem_type": "multiple choice",
        "options": ["A. red", "B. blue"],
        "solution": "<answer>B</answer>",
        "data_source": "made",
    },
    {
        "problem_id": 12,
        "problem": "How many?",
        "data_type": "image",
        "path": "i.png",
        "problem_type": "numerical",
        "solution": "<answer>3</answer>",
        "data_source": "made",
    },
    {
        "problem_id": 13,
        "problem": "Say a colour.",
        "data_type": "text",
        "problem_type": "free-form",
        "solution": "<answer>red</answer>",
        "data_source": "made",
    },
]
DIGEST = "b76d41e9ff1646ae of 3 samples"  # of OWN, as the versions without other formats have it
CHOICE = "Which comes first?\nOptions:\nA. red\nB. blue"


def known(row: dict[str, Any], number: int) -> dict[str, Any]:
    """A row with the fields that most trainers' rows may have beside their own."""
    own = OWN[number]
    return {"problem_id": own["problem_id"], "data_source": "made", "problem_type": own["problem_type"]} | row


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def verl(number: int, content: str, truth: Any, **media: Any) -> dict[str, Any]:
    own = OWN[number]
    extra = {"split": "train", "problem_id": own["problem_id"], "problem_type": own["problem_type"]}
    row = {"data_source": "made", "prompt": user(content), "ability": "qa", "extra_info": extra}
    return row | {"reward_model": {"style": "rule", "ground_truth": truth}} | media


PEERS: dict[str, list[dict[str, Any]]] = {
    "video-r1": OWN,
    "easyr1": [
        known({"problem": f"<video>{CHOICE}", "answer": "B", "videos": ["clips/a.mp4"]}, 0),
        known({"problem": "<image>\nHow many?", "answer": "3", "images": ["i.png"]}, 1),
        known({"problem": "Say a colour.", "answer": "red"}, 2),
    ],
    "onethinker": [
        known(own | {"problem": f"<{kind}>{own['problem']}" if kind != "text" else own["problem"]}, number)
        | {"solution": ..., "path": ..., "answer": own["solution"], "problem_reserved_text": own["problem"]}
        | {f"{kind}s": [own.get("path")] if kind != "text" else ...}
        for number, own in enumerate(OWN)
        for kind in [own["data_type"]]
    ],
    "verl": [
        verl(0, f"<video>{CHOICE}", "B", videos=[{"type": "video", "video": "clips/a.mp4"}]),
        verl(1, "<image>How many?", "3", images=[{"path": "i.png", "bytes": None}]),
        verl(2, "Say a colour.", "red"),
    ],
    "swift": [
        known({"messages": user(f"<video>{CHOICE}"), "solution": "B", "videos": ["clips/a.mp4"]}, 0),
        known({"messages": user("How many?"), "solution": "<answer>3</answer>", "images": ["i.png"]}, 1),
        known({"messages": [*user("Say a colour."), {"role": "assistant", "content": "red"}]}, 2),
    ],
    "trl": [
        known({"prompt": user([{"type": "video"}, {"type": "text", "text": CHOICE}]), "answer": "B"}, 0)
        | {"videos": ["clips/a.mp4"]},
        known({"prompt": user("How many?"), "solution": "3", "image": "i.png"}, 1),
        known({"prompt": user("Say a colour."), "completion": [{"role": "assistant", "content": "red"}]}, 2),
    ],
}
PEERS = {name: [{k: v for k, v in row.items() if v is not ...} for row in rows] for name, rows in PEERS.items()}
every_format = pytest.mark.parametrize("name", PEERS)


def in_memory(folder: Path, rows: list[Any], **options: Any) -> Dataset:
    path = folder / "data.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return load_samples(path, **options)


def own_samples(folder: Path) -> list[Sample]:
    (folder / "own").mkdir()
    made = in_memory(folder / "own", OWN, root=folder).samples
    assert len(made) == len(OWN)
    return made


def test_the_rows_of_the_docs_all_say_the_same() -> None:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.partition("## Other trainers' data")[2].partition("\n## ")[0]
    rows = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", section, re.DOTALL)]
    read = [RowReader() for _ in rows]
    entries = [reader("row", row, "data.md") for reader, row in zip(read, rows, strict=True)]
    assert [list(reader.took) for reader in read] == [["easyr1"], ["onethinker"], ["verl"], ["swift"], ["trl"]]
    for entry in entries:
        for field in ("problem_id", "data_source"):
            entry.pop(field, None)
        assert entry == entries[0]


def test_every_format_has_its_round_trip() -> None:
    assert set(PEERS) == set(FORMATS)


@every_format
@pytest.mark.parametrize("auto", [True, False])
def test_a_peers_rows_are_the_samples_of_the_video_r1_rows(name: str, auto: bool, tmp_path: Path) -> None:
    dataset = in_memory(tmp_path, PEERS[name], format="auto" if auto else name)
    assert dataset.errors == []
    assert dataset.samples == own_samples(tmp_path)
    assert dataset.format_note == (f"data.format auto: {name} (3 rows)" if auto else "")
    assert dataset.digest() == load_samples(tmp_path / "own" / "data.json", root=tmp_path).digest()


@every_format
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "saved"])
def test_streams_of_a_peers_rows(name: str, kind: str, tmp_path: Path) -> None:
    data, rows = tmp_path / f"data.{kind}", copy.deepcopy(PEERS[name])
    columns = sorted({field for row in rows for field in row})
    full = [{column: row.get(column) for column in columns} for row in rows]
    for row in full if name == "trl" else []:  # a column of Arrow has one type
        for message in [*row["prompt"], *(row["completion"] or [])]:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
    if kind == "parquet":
        parquet(data, full, 2)
    elif kind == "saved":
        import datasets

        datasets.Dataset.from_list(full).save_to_disk(str(data))
    else:
        text = json_lines(rows)
        data.write_bytes(gzip.compress(text) if kind == "jsonl.gz" else text)
    expected = [dataclasses.replace(one, index=0) for one in own_samples(tmp_path)]
    for chosen in ("auto", name):
        stream = stream_of(data, root=str(tmp_path), format=chosen)
        found = samples(stream, 3)
        assert [dataclasses.replace(one, index=0) for one in found] == expected
        assert (name in stream.format_note) == (chosen == "auto")
    if kind == "parquet":  # an evaluation holds it in memory
        assert [dataclasses.replace(s, index=0) for s in load_samples(data, root=tmp_path).samples] == expected


def test_the_own_format_keeps_its_digests_and_unknown_fields(tmp_path: Path) -> None:
    plain = in_memory(tmp_path, OWN).digest()
    assert plain == DIGEST
    more = [own | {"answer": own["solution"], "extra": [1]} for own in OWN]
    more[0]["images"] = ["other.png"]
    dataset = in_memory(tmp_path, more)
    assert dataset.digest() == plain
    assert dataset.format_note == "data.format auto: video-r1 (3 rows)"


def stream_digest(data: Path, **options: Any) -> str:
    stream = open_dataset(str(data), DataConfig(stream=True, **options))
    assert isinstance(stream, RowStream)
    return stream.digest()


def test_a_streams_digest_has_the_format_unless_it_is_the_own(tmp_path: Path) -> None:
    own, peer = tmp_path / "own.jsonl", tmp_path / "peer.jsonl"
    own.write_bytes(json_lines(OWN))
    peer.write_bytes(json_lines(PEERS["easyr1"]))
    assert stream_digest(own) == stream_digest(own, format="video-r1") == stream_digest(own, problem_type="numerical")
    assert stream_digest(own) != stream_digest(own, format="easyr1")
    assert stream_digest(peer) == stream_digest(peer, format="easyr1")
    different = [{}, {"format": "video-r1"}, {"format": "swift"}, {"problem_type": "numerical"}]
    assert len({stream_digest(peer, **options) for options in different}) == 4


def test_rows_of_several_formats_in_one_file(tmp_path: Path) -> None:
    dataset = in_memory(tmp_path, [PEERS[name][1] for name in PEERS])
    assert len(dataset.samples) == len(PEERS)
    assert all(f"{name} (1 row)" in dataset.format_note for name in PEERS)


def only(row: Any, format: str = "auto", problem_type: str | None = None) -> Any:
    return RowReader(format, problem_type)("row 0", row, "data.json")


def error(row: Any, format: str = "auto", problem_type: str | None = None) -> SampleError:
    with pytest.raises(SampleError) as caught:
        only(row, format, problem_type)
    assert caught.value.message.startswith("row 0: ")
    assert caught.value.path == "data.json"
    return caught.value


QUESTION = {"problem": "2 + 2?", "answer": "4", "problem_type": "numerical"}
AMBIGUOUS = [
    QUESTION | {"data_type": "text", "solution": "<answer>5</answer>"},
    QUESTION | {"prompt": user("3 + 3?"), "solution": "6"},
    QUESTION | {"messages": user("3 + 3?"), "solution": "4"},
    {"prompt": user("2?"), "messages": user("3?"), "solution": "4", "problem_type": "numerical"},
    {"prompt": user("2?"), "solution": "4", "reward_model": {"ground_truth": "5"}, "problem_type": "numerical"},
    {"prompt": user("2?"), "solution": "4", "answer": "5", "problem_type": "numerical"},
    QUESTION | {"images": ["i.png"], "videos": ["v.mp4"]},
    QUESTION | {"image": "i.png", "images": ["j.png"]},
    QUESTION | {"videos": [{"video": "v.mp4", "start": 1, "video_start": 2}]},
    {"prompt": user("2?"), "reward_model": {"ground_truth": "4"}, "problem_type": "numerical"}
    | {"extra_info": {"problem_type": "OCR"}},
    {"messages": [*user("2?"), {"role": "assistant", "content": "<think>x</think><answer>3</answer>"}]}
    | {"solution": "4", "problem_type": "numerical"},
    {"problem": [1], "answer": "4", "prompt": "2?", "solution": "4"},
]


@pytest.mark.parametrize("row", AMBIGUOUS)
def test_a_row_that_two_readings_fit_is_an_error_in_its_place(row: dict[str, Any], tmp_path: Path) -> None:
    assert error(row).kind == "ambiguous"
    dataset = in_memory(tmp_path, [QUESTION, row, QUESTION])
    assert dataset.error_counts() == {"ambiguous": 1}
    assert dataset.errors[0].message.startswith("entry 1: ")
    assert [sample.index for sample in dataset.samples] == [0, 2]
    assert "ambiguous (1 row)" in dataset.format_note
    (tmp_path / "data.jsonl").write_bytes(json_lines([QUESTION, row, QUESTION]))
    first, second, third = samples(stream_of(tmp_path / "data.jsonl"), 3)
    assert (second.kind, first.problem, third.problem) == ("ambiguous", "2 + 2?", "2 + 2?")


def test_readings_that_agree_are_not_ambiguous() -> None:
    both = QUESTION | {"messages": user("2 + 2?"), "solution": "4"}
    assert only(both)["solution"] == "<answer>4</answer>"
    own = {"problem": "2 + 2?", "data_type": "text", "problem_type": "numerical", "solution": "<answer>4</answer>"}
    assert only(own | {"answer": "4"}) == own | {"answer": "4"}
    judged = {"prompt": user("2?"), "solution": "4", "reward_model": {"ground_truth": "4"}}
    assert only(judged, problem_type="numerical")["problem"] == "2?"
    assert only(QUESTION | {"prompt": user("3?"), "solution": "9"}, "easyr1")["problem"] == "2 + 2?"


def test_what_a_named_format_does_not_fit_is_an_error_of_that_format() -> None:
    assert error(PEERS["easyr1"][0], "verl").kind == "missing_field"
    assert "'prompt'" in error(PEERS["easyr1"][0], "verl").message
    assert "'data_type'" in error(PEERS["easyr1"][0], "onethinker").message
    assert "'answer'" in error({"problem": "2?", "solution": "<answer>2</answer>"}, "easyr1").message


@pytest.mark.parametrize("options", [{"format": "easyr"}, {"problem_type": "numbers"}])
def test_unknown_options(options: dict[str, str], tmp_path: Path) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ConfigError, match=f"data.{name}: expected one of .* got '{value}'; did you mean"):
        in_memory(tmp_path, OWN, **options)


def test_a_file_of_which_nothing_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of its 1 samples can be used \(problem_type 1\)"):
        in_memory(tmp_path, [{"problem": "2?", "answer": "2"}])


# The kind of question


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"problem_type": "multiple_choice", "options": ["A. 3", "B. 4"]}, "multiple choice"),
        ({"problem_type": "Free Form"}, "free-form"),
        ({"data_source": "OCR"}, "OCR"),
        ({"data_source": "math12k"}, "regression"),  # of the option
        ({"problem_type": "riddle"}, "riddle"),  # which the check of the entries refuses
        ({"problem_type": "Number"}, "numerical"),  # as EasyVideoR1 names it
    ],
)
def test_the_kind_of_question(row: dict[str, Any], kind: str) -> None:
    assert only({"problem": "2?", "answer": "B"} | row, problem_type="regression")["problem_type"] == kind


def test_verl_may_say_the_kind_of_question_in_other_fields() -> None:
    row = {"prompt": user("2?"), "reward_model": {"ground_truth": 2.5, "style": "regression"}, "ability": "count"}
    assert only(row)["problem_type"] == "regression"
    assert only(row)["solution"] == "<answer>2.5</answer>"
    assert only(row | {"extra_info": {"problem_type": "numerical"}})["problem_type"] == "numerical"
    row["reward_model"]["style"] = "rule"
    assert error(row).kind == "problem_type"
    assert "data.problem_type" in error(row).message
    assert only(row, problem_type="numerical")["problem_type"] == "numerical"


# Answers


def test_answers() -> None:
    def solution(answer: Any) -> Any:
        return only(QUESTION | {"answer": answer})["solution"]

    assert solution(" 4 ") == "<answer>4</answer>"
    assert solution(4) == "<answer>4</answer>"
    assert solution("<answer> 4 </answer>") == "<answer> 4 </answer>"
    assert solution({"time": [1.5, 2], "boxes": None}) == '<answer>{"time": [1.5, 2]}</answer>'
    assert only(QUESTION | {"answer": "<think>a</think>\n<answer>4</answer>"}) | {"problem_id": 0} == {
        "problem": "2 + 2?",
        "data_type": "text",
        "problem_type": "numerical",
        "process": "<think>a</think>",
        "solution": "<answer>4</answer>",
        "problem_id": 0,
    }


@pytest.mark.parametrize("answer", [["4"], " ", b"4"])
def test_answers_that_are_none(answer: Any) -> None:
    assert error(QUESTION | {"answer": answer}).kind in ("wrong_type", "empty_field")


def test_a_conversations_last_turn_is_its_answer_and_its_process() -> None:
    turns = [*user("Hi."), {"role": "assistant", "content": "Hello."}, *user("2 + 2?")]
    answered = [*turns, {"role": "assistant", "content": "<think>so</think> <answer>4</answer>"}]
    entry = only({"messages": answered}, problem_type="numerical")
    assert (entry["messages"], entry["process"], entry["solution"]) == (
        turns,
        "<think>so</think>",
        "<answer>4</answer>",
    )
    assert only({"messages": answered, "solution": "4"}, problem_type="numerical") == entry
    completed = {"prompt": turns, "completion": answered[3:]}
    assert only(completed, problem_type="numerical") == entry


def test_a_cold_start_takes_the_process_of_a_trace(tmp_path: Path) -> None:
    answered = [*user("<video>What?"), {"role": "assistant", "content": "<think>so</think> <answer>4</answer>"}]
    rows = [{"messages": answered, "videos": ["v.mp4"]}, QUESTION]
    dataset = in_memory(tmp_path, rows, require_process=True, problem_type="numerical")
    assert [(one.process, one.solution) for one in dataset.samples] == [("<think>so</think>", "<answer>4</answer>")]
    assert dataset.error_counts() == {"missing_field": 1}


@pytest.mark.parametrize("medium", ["image", "video"])
def test_a_table_has_what_lines_have(medium: str, tmp_path: Path) -> None:
    """The one medium of a row, its name where problem_id is null, and the answers that it brings."""
    fields = {medium: "a.png", "problem_id": None, "id": "k7", "completions": [{"text": "x", "source": "t"}]}
    rows: list[dict[str, Any]] = [
        {"problem": "Red?", "answer": "yes", "problem_type": "boolean"},
        {"messages": user("Red?"), "solution": "yes", "problem_type": "boolean"},
        {"prompt": user("Red?"), "answer": "yes", "problem_type": "boolean"},
        {"prompt": user("Red?"), "reward_model": {"ground_truth": "yes"}, "extra_info": {"problem_type": "boolean"}},
    ]
    for row in rows:
        lines = in_memory(tmp_path, [row | fields]).samples
        parquet(tmp_path / "table.parquet", [row | fields])
        assert load_samples(tmp_path / "table.parquet").samples == lines
        (sample,) = lines
        assert (sample.data_type, sample.problem_id) == (medium, "k7")
        assert [(answer.text, answer.source) for answer in sample.completions] == [("x", "t")]


def test_a_thought_before_an_answer_without_tags_is_the_process() -> None:
    """The answer alone is compared; a thought without an end, or without an answer, is an error in its place."""
    for answer in ("<think>It rains.</think>It is wet.", "<think>It rains.</think>\n It is wet. "):
        entry = only(QUESTION | {"answer": answer})
        assert (entry["process"], entry["solution"]) == ("<think>It rains.</think>", "<answer>It is wet.</answer>")
    for answer in ("<think>It rains.", "It rains.</think>wet", "<think>a</think>", "<think>a</think>b</think>c"):
        assert error(QUESTION | {"answer": answer}).kind == "solution"
    assert only(QUESTION | {"answer": True, "problem_type": "boolean"})["solution"] == "<answer>true</answer>"


def test_an_empty_system_turn_is_none() -> None:
    turns = [{"role": "system", "content": ""}, *user("2 + 2?")]
    entry = only({"messages": turns, "solution": "4"}, problem_type="numerical")
    assert entry == only({"messages": turns[1:], "solution": "4"}, problem_type="numerical")


@pytest.mark.parametrize("format", ["auto", "swift"])
def test_a_conversation_without_a_kind_of_question_is_learned_as_it_stands(format: str, tmp_path: Path) -> None:
    """By a cold start, as the same conversation in the Video-R1 format; T-GRPO cannot ask it."""
    chat = [*user("<image>Hi."), {"role": "assistant", "content": "Hello."}, *user("<video>What?")]
    answered = [*chat, {"role": "assistant", "content": "Milk."}]
    rows = [{"messages": answered, "videos": ["v.mp4"], "images": ["i.png"]}]
    dataset = in_memory(tmp_path, rows, require_process=True, format=format)
    media = [{"path": "i.png", "kind": "image"}, {"path": "v.mp4", "kind": "video"}]
    own = in_memory(tmp_path, [{"messages": answered, "media": media}], require_process=True, format="video-r1")
    assert dataset.samples == own.samples
    assert dataset.digest() == own.digest()
    assert not dataset.samples[0].instructed
    (asked,) = in_memory(tmp_path, [*rows, OWN[0]], format="auto").errors
    assert (asked.kind, "only SFT learns such an answer" in asked.message) == ("messages", True)


# Options of a multiple choice


def test_options_are_taken_from_the_end_of_the_question() -> None:
    question = {"answer": "C", "problem_type": "multiple choice"}
    entry = only(question | {"problem": "Why?\n\n(A) x\n(B) y\n\n(C) z\n"})
    assert (entry["problem"], entry["options"]) == ("Why?", ["(A) x", "(B) y", "(C) z"])
    for text in (
        "Why?",
        "Why? A. x B. y",
        "Why?\nA. x",
        "Why?\nB. x\nC. y",
        "Why?\nA. x\nB. y\nSay it.",
        "Why?\nA. x\nC. y",
    ):
        assert error(question | {"problem": text}).kind == "options"
    given = only(question | {"problem": "Why?\nA. x\nB. y", "options": ["A. x", "B. y"]})
    assert given["problem"] == "Why?\nA. x\nB. y"


# Media


def test_several_media_stand_where_the_placeholders_say() -> None:
    row = QUESTION | {"problem": "<image>, <video> and <image>?", "images": ["1.png", "2.png"], "videos": ["v.mp4"]}
    entry = only(row)
    assert [item["path"] for item in entry["media"]] == ["1.png", "v.mp4", "2.png"]
    assert (entry["problem"], entry["data_type"], "path" in entry) == (row["problem"], "video", False)
    middle = only(QUESTION | {"problem": "In <video> here?", "videos": ["v.mp4"]})
    assert (middle["problem"], middle["media"]) == ("In <video> here?", [{"path": "v.mp4", "kind": "video"}])
    alone = only(
        {"messages": [*user("<video>"), {"role": "assistant", "content": "Yes?"}, *user("2?")]}
        | {"videos": ["v.mp4"], "solution": "2", "problem_type": "numerical"}
    )
    assert (alone["messages"][0]["content"], alone["media"]) == ("<video>", middle["media"])
    several = only(QUESTION | {"images": ["1.png", "2.png"]})
    assert [item["path"] for item in several["media"]] == ["1.png", "2.png"]


def test_settings_of_a_medium() -> None:
    video = {
        "video": "file:///d/v.mp4",
        "fps": 1,
        "max_frames": 8,
        "max_pixels": 999,
        "video_start": 2,
        "video_end": 3.5,
    }
    entry = only(
        {"prompt": user([{"type": "video"} | video, {"type": "text", "text": "2?"}]), "answer": "2"}, "trl", "OCR"
    )
    assert entry["media"] == [
        {"path": "/d/v.mp4", "kind": "video", "fps": 1, "max_frames": 8, "max_pixels": 999, "start": 2, "end": 3.5}
    ]
    frames = {"video": ["1.jpg", "2.jpg"], "sample_fps": 2}
    (item,) = only(QUESTION | {"videos": [frames]})["media"]
    assert item == {"frames": ["1.jpg", "2.jpg"], "kind": "video", "frames_per_second": 2}


@pytest.mark.parametrize(
    ("media", "kind", "named"),
    [
        ({"videos": [{"video": "v.mp4", "nframes": 8}]}, "media", "videos[0].nframes"),
        ({"videos": [{"video": "v.mp4", "min_pixels": 8}]}, "media", "videos[0].min_pixels"),
        ({"videos": [{"video": ["1.jpg", "2.jpg"], "fps": 8}]}, "media", "videos[0].fps"),
        ({"images": [{"image": "i.png", "fps": 8}]}, "media", "images[0].fps"),
        ({"images": [{"image": "i.png", "path": "j.png"}]}, "media", "got both"),
        ({"images": [{}]}, "media", "images[0]"),
        ({"images": [{"type": "video", "image": "i.png"}]}, "media", "images[0].type"),
        ({"images": [{"path": "i.png", "bytes": b"x"}]}, "embedded", "images[0]"),
        ({"images": [b"x"]}, "embedded", "images[0]"),
        ({"images": ["data:image/png;base64,AAAA"]}, "embedded", "images[0]"),
        ({"videos": ["https://host/v.mp4"]}, "bad_path", "videos[0]"),
        ({"videos": [" "]}, "empty_field", "videos[0]"),
        ({"videos": "v.mp4"}, "wrong_type", "videos"),
        ({"videos": [3]}, "wrong_type", "videos[0]"),
        ({"problem": "<video>2?"}, "placeholders", "0 videos, got 1"),
        ({"problem": "<video><video>2?", "videos": ["v.mp4"]}, "placeholders", "1 videos, got 2"),
        ({"problem": "<image>2?", "videos": ["v.mp4"]}, "placeholders", "1 videos, got 0"),
        ({"problem": "<video>2?", "videos": ["v.mp4", "w.mp4"]}, "placeholders", "2 videos, got 1"),
        ({"videos": ["v.mp4"], "data_type": "image"}, "data_type", "make it video, got 'image'"),
        ({"problem": None}, "missing_field", "'problem'"),
        ({"problem": " "}, "empty_field", "problem"),
        ({"problem_type": 3}, "wrong_type", "problem_type"),
    ],
)
def test_bad_media(media: dict[str, Any], kind: str, named: str) -> None:
    found = error(QUESTION | media, "easyr1")
    assert found.kind == kind
    assert named in found.message


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "2?",
        ["2?"],
        [{"role": "user"}],
        [{"role": "tool", "content": "2?"}],
        [{"role": ["user"], "content": "2?"}],
        [*user("2?"), {"role": "system", "content": "s"}],
        [{"role": "assistant", "content": "2?"}],
        [{"role": "user", "content": "2?", "tool_calls": [1]}],
        user([{"type": "audio", "audio": "a.wav"}]),
        user([{"type": "text"}]),
        user([3]),
        user([]),
        user(3),
        [*user("2?"), {"role": "assistant", "content": "<image>"}],
    ],
)
def test_bad_conversations(messages: Any) -> None:
    for row in (
        {"messages": messages},
        {"prompt": messages},
        {"prompt": messages, "reward_model": {"ground_truth": "4"}},
    ):
        assert error(row | {"solution": "4", "problem_type": "numerical"}).kind != "problem_type"


def test_what_would_change_the_prompt_is_not_dropped() -> None:
    for field in ("audios", "objects", "tools"):
        row = {"messages": user("2?"), "solution": "4", "problem_type": "numerical", field: ["x"]}
        assert field in error(row).message


# System prompts and arguments of the chat template


def test_a_system_prompt_is_a_turn_or_a_field() -> None:
    system = [{"role": "system", "content": "Be brief."}]
    turn = only({"prompt": [*system, *user("2?")], "solution": "4"}, problem_type="numerical")
    field = only({"prompt": user("2?"), "solution": "4", "system": "Be brief."}, problem_type="numerical")
    assert turn == field
    assert (turn["system"], turn["problem"]) == ("Be brief.", "2?")
    both = {"messages": [*system, *user("2?")], "solution": "4", "problem_type": "numerical"}
    assert only(both | {"system": "Be brief."})["system"] == "Be brief."
    assert only(both | {"system": ""})["system"] == "Be brief."
    assert error(both | {"system": "Be long."}).kind == "ambiguous"
    assert "system" not in only(QUESTION | {"system": ""})


def test_arguments_of_the_chat_template_are_kept(tmp_path: Path) -> None:
    for row in (QUESTION, {"messages": user("2?"), "solution": "4", "problem_type": "numerical"}):
        (sample,) = in_memory(tmp_path, [row | {"chat_template_kwargs": {"enable_thinking": False}}]).samples
        assert sample.chat_template_kwargs == {"enable_thinking": False}
