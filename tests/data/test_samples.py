import hashlib
import itertools
import json
import subprocess
import sys

import pytest
import torch

from videor1.data import load_samples
from videor1.data.order import SampleStream
from videor1.errors import DataError
from videor1.seeding import derive_seed, generator

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


def entry(**changes):
    """GOOD with changes; a field set to ... is left out."""
    return {key: value for key, value in {**GOOD, **changes}.items() if value is not ...}


def write(folder, content, name="data.json"):
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif name.endswith(".jsonl"):
        path.write_text("\n".join(json.dumps(value) for value in content), encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    return path


def only_error(folder, bad, **options):
    """The error of ``bad``, loaded between two good entries."""
    dataset = load_samples(write(folder, [GOOD, bad, entry(process="<think>x</think>")]), **options)
    (error,) = [error for error in dataset.errors if "entry 1:" in error.message]
    return error


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_reads_both_formats(tmp_path, name):
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
        ("data.json", f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}\n"),
        ("data.txt", f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}"),
        ("data", json.dumps([GOOD, GOOD])),
        ("data.jsonl", f"\n{json.dumps(GOOD)}\r\n\r\n  \n{json.dumps(GOOD)}\r\n"),
        ("data.json", b"\xef\xbb\xbf \n" + json.dumps([GOOD, GOOD]).encode()),
        ("data.jsonl", b"\xef\xbb\xbf" + (json.dumps(GOOD) + "\n" + json.dumps(GOOD)).encode()),
    ],
)
def test_content_wins_over_the_name(tmp_path, name, content):
    dataset = load_samples(write(tmp_path, content, name))
    assert dataset.errors == []
    assert [sample.index for sample in dataset.samples] == [0, 1]


def test_bad_lines_tell_their_number_and_spare_the_others(tmp_path):
    lines = [json.dumps(GOOD), "", '{"problem": "cut off', json.dumps(entry(solution=...)), json.dumps(GOOD)]
    content = "\n".join(lines).encode() + b'\n{"problem": "\xff\xfe"}\n' + b"[" * 100_000 + b"\n" + b"1" * 5000
    dataset = load_samples(write(tmp_path, content, "data.jsonl"))
    assert [sample.index for sample in dataset.samples] == [0, 3]
    assert [error.kind for error in dataset.errors] == ["bad_json", "missing_field", "bad_json", "bad_json", "bad_json"]
    messages = [error.message for error in dataset.errors]
    assert [message.split(":")[0] for message in messages] == ["line 3", "line 4", "line 6", "line 7", "line 8"]
    assert "not UTF-8" in messages[2]
    assert all(error.path == str(tmp_path / "data.jsonl") for error in dataset.errors)
    assert dataset.error_counts() == {"bad_json": 4, "missing_field": 1}


@pytest.mark.parametrize("field", ["problem", "data_type", "problem_type", "solution", "path", "options"])
def test_missing_field_is_named_with_the_ones_found(tmp_path, field):
    error = only_error(tmp_path, entry(**{field: ...}))
    assert error.kind == "missing_field"
    assert repr(field) in error.message
    assert all(repr(other) in error.message for other in GOOD)


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
def test_unknown_type_lists_the_valid_and_the_nearest(tmp_path, field, value, nearest):
    error = only_error(tmp_path, entry(**{field: value}))
    assert error.kind == field
    valid = {
        "problem_type": "['multiple choice', 'numerical', 'OCR', 'free-form', 'regression']",
        "data_type": "['video', 'image', 'text']",
    }
    assert valid[field] in error.message
    assert ("did you mean" in error.message) == (nearest is not None)
    if nearest:
        assert f"did you mean {nearest!r}?" in error.message


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"options": []}, "options", "options"),
        ({"options": ["A. red", " "]}, "options", "options"),
        ({"options": "A. red"}, "wrong_type", "options: expected a list of strings, got a string"),
        ({"options": ["A", 2]}, "wrong_type", "options: expected a list of strings, got a list"),
        ({"options": None}, "wrong_type", "options: expected a list of strings, got null"),
        ({"solution": "A"}, "solution", "<answer>...</answer>, got 'A'"),
        ({"solution": "<answer>A"}, "solution", "<answer>...</answer>"),
        ({"solution": "</answer>A<answer>"}, "solution", "<answer>...</answer>"),
        ({"solution": "<answer> </answer>"}, "solution", "<answer>...</answer>"),
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
    ],
)
def test_bad_entry(tmp_path, changes, kind, text):
    error = only_error(tmp_path, entry(**changes))
    assert error.kind == kind
    assert text in error.message


@pytest.mark.parametrize("bad", ["text", 3, None, ["a"]])
def test_entry_that_is_no_object(tmp_path, bad):
    error = only_error(tmp_path, bad)
    assert error.kind == "wrong_type"
    assert "expected a JSON object" in error.message


@pytest.mark.parametrize(
    ("process", "kind"),
    [(..., "missing_field"), (None, "wrong_type"), ("", "empty_field"), ("Red.", "process"), ("<think>x", "process")],
)
def test_process_is_checked_where_it_is_needed(tmp_path, process, kind):
    bad = entry(process=process)
    error = only_error(tmp_path, bad, require_process=True)
    assert error.kind == kind
    assert "process" in error.message
    assert load_samples(write(tmp_path, [bad])).errors == []


@pytest.mark.parametrize("path", ["../x.mp4", "clips/../../x.mp4", "/etc/passwd", "clips/../..", "..", "./../root2/x"])
def test_path_outside_root(tmp_path, path):
    root = tmp_path / "root"
    (root / "clips").mkdir(parents=True)
    error = only_error(tmp_path, entry(path=path), root=root)
    assert error.kind == "outside_root"
    assert repr(path) in error.message
    assert str(root) in error.message


def test_symlinks_are_followed_before_the_path_is_judged(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "x.mp4").touch()
    (root / "real.mp4").touch()
    (root / "folder").symlink_to(outside)
    (root / "file.mp4").symlink_to(outside / "x.mp4")
    (root / "inner.mp4").symlink_to(root / "real.mp4")
    (root / "loop.mp4").symlink_to(root / "loop.mp4")
    (tmp_path / "alias").symlink_to(root)
    paths = ["folder/x.mp4", "folder/", "file.mp4", "inner.mp4", "loop.mp4", "absent.mp4", "folder/../root/real.mp4"]
    data_file = write(tmp_path, [entry(path=path) for path in paths])
    for given in (root, tmp_path / "alias"):
        dataset = load_samples(data_file, root=given)
        assert [error.kind for error in dataset.errors] == ["outside_root"] * 3
        names = [str(sample.path.relative_to(root.resolve())) for sample in dataset.samples]
        assert names == ["real.mp4", "loop.mp4", "absent.mp4", "real.mp4"]


def test_path_within_root_may_be_absolute_or_hold_dots(tmp_path):
    (tmp_path / "clips").mkdir()
    paths = [str(tmp_path / "clips/one.mp4"), "clips/../clips/./one.mp4", "clips//one.mp4"]
    dataset = load_samples(write(tmp_path, [entry(path=path) for path in paths]))
    assert {sample.path for sample in dataset.samples} == {tmp_path.resolve() / "clips/one.mp4"}
    assert len(dataset) == 3


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
def test_unusable_file(tmp_path, name, content, message):
    with pytest.raises(DataError, match=rf"{name}.*{message}"):
        load_samples(write(tmp_path, content, name))


def test_missing_file_folder_and_root(tmp_path):
    with pytest.raises(DataError, match=r"absent\.json: no such data file"):
        load_samples(tmp_path / "absent.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match="cannot read the data file: Is a directory"):
        load_samples(tmp_path / "folder.json")
    with pytest.raises(DataError, match=r"data\.root: expected a folder, got .*nowhere"):
        load_samples(write(tmp_path, [GOOD]), root=tmp_path / "nowhere")


def test_a_file_without_one_usable_sample_stops_with_one_message(tmp_path):
    content = [entry(solution="A")] * 5 + [entry(path="../x")] * 2 + [entry(problem=...)]
    with pytest.raises(DataError) as error:
        load_samples(write(tmp_path, content))
    message = str(error.value)
    assert "none of its 8 samples can be used (solution 5, outside_root 2, missing_field 1)" in message
    assert message.count("entry ") == 3


def test_stream_draws_every_sample_once_an_epoch_in_new_orders():
    stream = SampleStream(10, seed=3)
    epochs = [[stream.at(epoch * 10 + i) for i in range(10)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert epochs[0] != [SampleStream(10, seed=4).at(i) for i in range(10)]


def test_stream_is_stateless():
    straight = [index for _, index in itertools.islice(SampleStream(7, seed=1).iterate(), 50)]
    stream = SampleStream(7, seed=1)
    jumps = torch.randperm(50, generator=torch.Generator().manual_seed(0)).tolist()
    assert {draw: stream.at(draw) for draw in jumps} == dict(enumerate(straight))
    assert list(itertools.islice(SampleStream(7, seed=1).iterate(20), 30)) == list(enumerate(straight))[20:]


def test_stream_follows_its_documented_order():
    order = torch.randperm(5, generator=generator(9, "data", 2)).tolist()
    assert [SampleStream(5, seed=9).at(10 + i) for i in range(5)] == order


def test_stream_in_file_order():
    assert [SampleStream(3, seed=1, shuffle=False).at(draw) for draw in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_stream_refuses_nonsense():
    with pytest.raises(ValueError, match="num_samples: expected at least 1, got 0"):
        SampleStream(0, seed=1)
    with pytest.raises(ValueError, match="draw: expected 0 or more, got -1"):
        SampleStream(3, seed=1).at(-1)


def test_derived_seeds_follow_their_documented_formula():
    # A change here changes the data order and the permutations of every run.
    digest = hashlib.sha256(b"i2:42s11:permutationi1:7s2:\xc3\xa9").digest()
    assert derive_seed(42, "permutation", 7, "é") == int.from_bytes(digest[:8], "big") >> 1
    assert derive_seed(42) == 5957220968500082653


def test_derived_seeds_differ_by_every_name():
    names = [(), ("a",), ("b",), ("a", "b"), ("ab",), ("a", ""), ("1",), (1,), (11,), (1, 1), (-1,), ("a", 1), (1, "a")]
    seeds = {derive_seed(seed, *name) for seed in (0, 1, -1, 2**70) for name in names}
    assert len(seeds) == 4 * len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_are_independent_and_the_same_in_another_process():
    draws = [torch.rand(3, generator=generator(5, "sampling", i)).tolist() for i in (0, 1, 0)]
    assert draws[0] == draws[2] != draws[1]
    code = "import torch; from videor1.seeding import generator; "
    code += "print(torch.rand(3, generator=generator(5, 'sampling', 0)).tolist())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == draws[0]
