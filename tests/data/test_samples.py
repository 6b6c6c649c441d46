"""Data files of the Video-R1 format: what is read, and what each bad entry or file is told."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from videor1.data import load_samples
from videor1.errors import DataError
from videor1.types import ProblemType, SampleError

GOOD = {
    "problem_id": 7,
    "problem": "Which colour comes first?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. red", "B. blue"],
    "solution": "<answer>A</answer>",
    "path": "./clips/one.mp4",
    "data_source": "made",
}
LINE = json.dumps(GOOD)


def entry(**changes: Any) -> dict[str, Any]:
    """GOOD with changes; a field set to ... is left out."""
    return {key: value for key, value in {**GOOD, **changes}.items() if value is not ...}


def write(folder: Path, content: Any, name: str = "data.json") -> Path:
    path = folder / name
    if isinstance(content, list):
        content = "\n".join(map(json.dumps, content)) if name.endswith(".jsonl") else json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def only_error(folder: Path, bad: Any, **options: Any) -> SampleError:
    """The error of ``bad``, loaded between two good entries."""
    dataset = load_samples(write(folder, [GOOD, bad, entry(process="<think>x</think>")]), **options)
    (error,) = [error for error in dataset.errors if "entry 1:" in error.message]
    return error


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_reads_both_formats(tmp_path: Path, name: str) -> None:
    number = {"problem_type": "numerical", "solution": "<answer>7</answer>"}
    entries = [
        GOOD,
        entry(problem_id="x-1", data_type="image", problem_type="OCR", options=[], path="a.png", extra=[1]),
        entry(problem_id=..., data_type="text", path=..., data_source=..., **number, options=...),
        entry(problem_type="free-form", options=None, process="<think>é 视频</think>"),
        entry(problem_type="regression", solution=number["solution"]),
    ]
    dataset = load_samples(write(tmp_path, entries, name))
    assert dataset.errors == []
    assert len(dataset) == len(dataset.samples) == 5
    first, image, text, free, regression = dataset.samples
    assert (first.index, first.problem_id, first.path) == (0, "7", tmp_path.resolve() / "clips/one.mp4")
    assert (first.options, first.data_source, first.process) == (("A. red", "B. blue"), "made", "")
    assert (image.index, image.problem_id, image.data_type, image.options) == (1, "x-1", "image", ())
    assert (text.problem_id, text.path, text.data_type, text.data_source) == ("2", None, "text", "")
    assert free.process == "<think>é 视频</think>"
    assert (free.options, regression.options) == ((), ())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.jsonl", json.dumps([GOOD, GOOD], indent=2)),
        ("data.json", f"{LINE}\n{LINE}\n"),
        ("data.txt", f"{LINE}\n{LINE}"),
        ("data", json.dumps([GOOD, GOOD])),
        ("data.jsonl", f"\n{LINE}\r\n\r\n  \n{LINE}\r\n"),
        ("data.json", f"\ufeff \n[{LINE}, {LINE}]"),
        ("data.jsonl", f"\ufeff{LINE}\n{LINE}"),
    ],
)
def test_content_wins_over_the_name(tmp_path: Path, name: str, content: str) -> None:
    dataset = load_samples(write(tmp_path, content, name))
    assert dataset.errors == []
    assert [sample.index for sample in dataset.samples] == [0, 1]


def test_bad_lines_tell_their_number_and_spare_the_others(tmp_path: Path) -> None:
    lines = [LINE, "", '{"problem": "cut off', json.dumps(entry(solution=...)), LINE]
    content = "\n".join(lines).encode() + b'\n{"problem": "\xff\xfe"}\n' + b"[" * 100_000 + b"\n" + b"1" * 5000
    dataset = load_samples(write(tmp_path, content, "data.jsonl"))
    assert [sample.index for sample in dataset.samples] == [0, 3]
    found = [(error.message.split(":")[0], error.kind) for error in dataset.errors]
    kinds = {3: "bad_json", 4: "missing_field", 6: "bad_json", 7: "bad_json", 8: "bad_json"}
    assert found == [(f"line {number}", kind) for number, kind in kinds.items()]
    assert "not UTF-8" in dataset.errors[2].message
    assert all(error.path == str(tmp_path / "data.jsonl") for error in dataset.errors)
    assert dataset.error_counts() == {"bad_json": 4, "missing_field": 1}


VALID = {"problem_type": str(list(get_args(ProblemType))), "data_type": "['video', 'image', 'text']"}


@pytest.mark.parametrize(
    ("field", "value", "nearest"),
    [
        ("problem_type", "Multiple Choice", "multiple choice"),
        ("problem_type", "multiple-choice", "multiple choice"),
        ("problem_type", "ocr", "OCR"),
        ("problem_type", "free form", "free-form"),
        ("data_type", "videos", "video"),
        ("data_type", "audio", None),
        ("problem_type", "x" * 10_000, None),
    ],
)
def test_unknown_type_lists_the_valid_and_the_nearest(
    tmp_path: Path, field: str, value: str, nearest: str | None
) -> None:
    error = only_error(tmp_path, entry(**{field: value}))
    assert error.kind == field
    assert VALID[field] in error.message
    assert (f"did you mean {nearest!r}?" in error.message) == ("did you mean" in error.message) == bool(nearest)


TAGS = "<answer>...</answer>"
STRINGS = "options: expected a list of strings, got "


@pytest.mark.parametrize(
    ("bad", "kind", "text"),
    [
        ({"options": []}, "options", "options"),
        ({"options": ["A. red", " "]}, "options", "options"),
        ({"options": "A. red"}, "wrong_type", f"{STRINGS}a string"),
        ({"options": ["A", 2]}, "wrong_type", f"{STRINGS}a list"),
        ({"options": None}, "wrong_type", f"{STRINGS}null"),
        ({"solution": "A"}, "solution", f"{TAGS}, got 'A'"),
        ({"solution": "<answer>A"}, "solution", TAGS),
        ({"solution": "</answer>A<answer>"}, "solution", TAGS),
        ({"solution": "<answer> </answer>"}, "solution", TAGS),
        ({"solution": 3}, "wrong_type", "solution: expected a string, got a number (3)"),
        ({"problem": None}, "wrong_type", "problem: expected a string, got null"),
        ({"problem": " \n"}, "empty_field", "problem"),
        ({"problem_type": ["OCR"]}, "wrong_type", "problem_type: expected a string, got a list"),
        ({"problem_id": 1.5}, "wrong_type", "problem_id: expected an integer or a string"),
        ({"problem_id": True}, "wrong_type", "problem_id"),
        ({"data_source": 3}, "wrong_type", "data_source: expected a string"),
        ({"process": {"a": 1}}, "wrong_type", "process: expected a string, got an object"),
        ({"path": ["a.mp4"]}, "wrong_type", "path: expected a string, got a list"),
        ({"path": ""}, "empty_field", "path"),
        ({"path": "a\0b.mp4"}, "bad_path", "null byte"),
        ({"path": "a\ud800b.mp4"}, "bad_path", "path"),
        ({"path": f"a{chr(0xDCFF)}b.mp4"}, "bad_path", "path"),
        ({"problem": "Which \ud83d?"}, "bad_text", "problem: surrogates not allowed at character 6"),
        ({"problem": "\ude00"}, "bad_text", "problem"),
        ({"solution": "<answer>A\ud800</answer>"}, "bad_text", "solution"),
        ({"options": ["A. red", "B. \ud800"]}, "bad_text", "options"),
        ({"problem_id": "\ud800"}, "bad_text", "problem_id"),
        ({"data_source": "\ud800"}, "bad_text", "data_source"),
        ({"process": "<think>\ud800</think>"}, "bad_text", "process"),
        ({"problem_type": "OCR\ud800"}, "bad_text", "problem_type"),
        *((value, "wrong_type", "expected a JSON object") for value in ("text", 3, None, ["a"])),
        *(
            ({field: ...}, "missing_field", repr(field))
            for field in ("problem", "data_type", "problem_type", "solution", "path", "options")
        ),
    ],
)
def test_bad_entry(tmp_path: Path, bad: Any, kind: str, text: str) -> None:
    error = only_error(tmp_path, entry(**bad) if isinstance(bad, dict) else bad)
    assert error.kind == kind
    assert text in error.message
    assert kind != "missing_field" or all(repr(field) in error.message for field in GOOD)


@pytest.mark.parametrize(
    ("process", "kind"),
    [(..., "missing_field"), (None, "wrong_type"), ("", "empty_field"), ("Red.", "process"), ("<think>x", "process")],
)
def test_process_is_checked_where_it_is_needed(tmp_path: Path, process: Any, kind: str) -> None:
    bad = entry(process=process)
    error = only_error(tmp_path, bad, require_process=True)
    assert error.kind == kind
    assert "process" in error.message
    assert load_samples(write(tmp_path, [bad])).errors == []


@pytest.mark.parametrize("path", ["../x.mp4", "clips/../../x.mp4", "/etc/passwd", "clips/../..", "..", "./../root2/x"])
def test_path_outside_root(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    (root / "clips").mkdir(parents=True)
    error = only_error(tmp_path, entry(path=path), root=root)
    assert error.kind == "outside_root"
    assert repr(path) in error.message
    assert str(root) in error.message


def test_symlinks_are_followed_before_the_path_is_judged(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder, name in ((root, "real.mp4"), (outside, "x.mp4")):
        folder.mkdir()
        (folder / name).touch()
    links = {"folder": outside, "file.mp4": outside / "x.mp4", "inner.mp4": root / "real.mp4"}
    for name, target in links.items() | {("loop.mp4", root / "loop.mp4"), ("../alias", root)}:
        (root / name).symlink_to(target)
    paths = ["folder/x.mp4", "folder/", "file.mp4", "inner.mp4", "loop.mp4", "absent.mp4", "folder/../root/real.mp4"]
    data_file = write(tmp_path, [entry(path=path) for path in paths])
    for given in (root, tmp_path / "alias"):
        dataset = load_samples(data_file, root=given)
        assert [error.kind for error in dataset.errors] == ["outside_root"] * 3
        names = [str(sample.path.relative_to(root.resolve())) for sample in dataset.samples if sample.path]
        assert names == ["real.mp4", "loop.mp4", "absent.mp4", "real.mp4"]


def test_path_within_root_may_be_absolute_or_hold_dots(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    paths = [str(tmp_path / "clips/one.mp4"), "clips/../clips/./one.mp4", "clips//one.mp4"]
    dataset = load_samples(write(tmp_path, [entry(path=path) for path in paths]))
    assert [sample.path for sample in dataset.samples] == [tmp_path.resolve() / "clips/one.mp4"] * 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.json", "", "is empty"),
        ("data.jsonl", " \n\n", "is empty"),
        ("data.json", "[]", "holds no samples"),
        ("data.json", '[{"problem": ', "does not parse as JSON: .*line 1"),
        ("data.json", '{\n"problem": ', "does not parse as JSON"),
        ("data.json", "colour,answer\nred,1", "does not parse as JSON"),
        ("data.json", b"\x00\x00\x00\x20ftypisom\xff", "does not parse as JSON: not UTF-8"),
        ("data.json", json.dumps({"data": [GOOD]}), "expected a JSON list .* got an object"),
        ("data.json", "3", "expected a JSON list .* got a number"),
    ],
)
def test_unusable_file(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"{name}.*{message}"):
        load_samples(write(tmp_path, content, name))


def test_missing_file_folder_and_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.json: no such data file"):
        load_samples(tmp_path / "absent.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match="cannot read the data file: Is a directory"):
        load_samples(tmp_path / "folder.json")
    with pytest.raises(DataError, match=r"data\.root: expected a folder, got .*nowhere"):
        load_samples(write(tmp_path, [GOOD]), root=tmp_path / "nowhere")


def test_a_file_without_one_usable_sample_stops_with_one_message(tmp_path: Path) -> None:
    content = [entry(solution="A")] * 5 + [entry(path="../x")] * 2 + [entry(problem=...)]
    with pytest.raises(DataError) as error:
        load_samples(write(tmp_path, content))
    assert "none of its 8 samples can be used (solution 5, outside_root 2, missing_field 1)" in str(error.value)
    assert str(error.value).count("entry ") == 3


# Entries as OneThinker's and EasyVideoR1's published files have them (stvg.json of the latter, in pixels of 640 x 360).
PUBLISHED = [
    {
        "data_type": "video",
        "data_source": "stvg",
        "problem_type": "spatial-temporal grounding",
        "path": "10712559773.mp4",
        "problem": "Who is watching the ball? Please find the corresponding time period in the video.",
        "problem_id": 1,
        "options": [],
        "solution": '<answer>{"time": [17.017017017017018, 18.5185], "boxes": {"18": [440, 135, 493, 246]}}</answer>',
    },
    {
        "data_type": "video",
        "data_source": "got10k",
        "problem_type": "tracking",
        "path": "got/1.mp4",
        "problem": "Track the target.",
        "problem_id": "7",
        "options": [],
        "process": "",
        "solution": '<answer>{"boxes":{"1":[1,2,3,4],"2":[2,3,4,5]}}</answer>',
    },
    {
        "data_type": "video",
        "problem_type": "temporal grounding",
        "path": "a.mp4",
        "problem": "When?",
        "solution": '<answer>{"time": [24.296875, 30.40625], "boxes": {}}</answer>',
    },
    {
        "data_type": "image",
        "problem_type": "spatial grounding",
        "path": "a.png",
        "problem": "Where?",
        "solution": '<answer>{"boxes": [35, 227, 437, 932]}</answer>',
    },
    {"data_type": "text", "problem_type": "boolean", "problem": "Is it?", "solution": "<answer>No</answer>"},
    {"data_type": "text", "problem_type": "math", "problem": "?", "solution": "<answer>$$-\\dfrac{3}{2}$$</answer>"},
    {"data_type": "text", "problem_type": "open-ended", "problem": "?", "solution": "<answer>It is Paris.</answer>"},
    {"data_type": "text", "problem_type": "regression", "problem": "?", "solution": "<answer>42.7</answer>"},
]


def test_published_entries_of_other_trainers_are_read_without_change(tmp_path: Path) -> None:
    write_data = (tmp_path / "data.json").write_text(json.dumps(PUBLISHED), encoding="utf-8")
    assert write_data
    dataset = load_samples(tmp_path / "data.json")
    assert dataset.errors == []
    assert [sample.problem_type for sample in dataset.samples] == [entry["problem_type"] for entry in PUBLISHED]
    assert [sample.solution for sample in dataset.samples] == [entry["solution"] for entry in PUBLISHED]


@pytest.mark.parametrize(
    ("problem_type", "answer"),
    [
        ("temporal grounding", "from 3 to 5"),
        ("temporal grounding", '{"time": [5, 3]}'),
        ("temporal grounding", '{"time": [3, NaN]}'),
        ("temporal grounding", '{"time": [3, 3]}'),
        ("spatial grounding", '{"boxes": [1, 2, 3]}'),
        ("spatial grounding", '{"boxes": [-1, 2, 3, 4]}'),
        ("tracking", '{"boxes": {}}'),
        ("boolean", "perhaps"),
    ],
)
def test_a_truth_that_no_answer_can_match_is_left_out(tmp_path: Path, problem_type: str, answer: str) -> None:
    bad = {"problem": "?", "data_type": "text", "problem_type": problem_type, "solution": f"<answer>{answer}</answer>"}
    error = only_error(tmp_path, bad)
    assert error.kind == "solution"
    assert f"as {problem_type} earns 0 for itself" in error.message
