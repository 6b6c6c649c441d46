"""Data files of any content: good samples and counted errors, or one message; in memory and as a stream alike."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path
from typing import Any

from fuzzing import changed, check_message, damaged, fuzz
from hypothesis import strategies as st
from streams import order_of
from tiny import make_tokenizer

from videor1.config import DataConfig, RewardConfig
from videor1.data import load_samples
from videor1.data.stream import RowStream, open_dataset
from videor1.errors import DataError
from videor1.logs.jsonl import JsonlWriter, read_jsonl
from videor1.model.prompts import build_input_ids
from videor1.rewards import accuracy_of
from videor1.types import Sample, SampleError

CHOICE = {
    "problem_id": 7,
    "problem": "Which comes first?",
    "data_type": "text",
    "problem_type": "multiple choice",
    "options": ["A. red", "B. blue"],
    "solution": "<answer>A</answer>",
    "data_source": "made",
    "process": "<think>red</think>",
}
VIDEO = CHOICE | {"data_type": "video", "path": "clips/one.mp4"}
NUMBER = {"problem": "2 + 2?", "data_type": "text", "problem_type": "numerical", "solution": "<answer>4 cm</answer>"}
ENTRIES = st.sampled_from(
    [CHOICE, VIDEO, NUMBER, NUMBER | {"problem_type": "free-form", "solution": "<answer>猫</answer>"}]
)
FILES = st.lists(ENTRIES.flatmap(changed), min_size=1, max_size=4)
TOKENIZER = make_tokenizer()


def check_sample(sample: Sample, root: Path, reward: RewardConfig) -> None:
    for text in (
        sample.problem,
        *sample.options,
        sample.solution,
        sample.problem_id,
        sample.data_source,
        sample.process,
    ):
        text.encode()
    assert sample.path is None or sample.path.is_relative_to(root)
    assert (
        accuracy_of(sample.solution, sample, lenient=reward.lenient) > 0.1 or sample.problem_type == "multiple choice"
    )
    if sample.data_type == "text":
        try:
            assert len(build_input_ids(TOKENIZER, sample, None, max_prompt_length=10**6)) > 0
        except SampleError as error:
            if error.kind != "special_token":
                raise


def check_errors(errors: list[SampleError], folder: Path) -> None:
    for error in errors:
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
        check_message(error)
    lines = JsonlWriter(folder / "skipped.jsonl", keep=False)
    lines.append({"kind": error.kind, "message": str(error), "path": error.path} for error in errors)
    lines.close()
    assert len(read_jsonl(lines.path)) == len(errors)


def test_a_list(tmp_path: Path, fuzz_seconds: float) -> None:
    path, root = tmp_path / "data.json", tmp_path.resolve()
    whole = FILES.map(lambda entries: json.dumps(entries).encode())

    def check(example: tuple[bytes, bool]) -> None:
        data, lenient = example
        path.write_bytes(data)
        reward = RewardConfig(lenient=lenient)
        try:
            dataset = load_samples(path, reward=reward)
        except DataError as error:
            check_message(error, most=20_000)
            return
        for sample in dataset.samples:
            check_sample(sample, root, reward)
        check_errors(dataset.errors, tmp_path)

    assert fuzz(fuzz_seconds, st.tuples(damaged(whole), st.booleans()), check) > 0


def test_lines_are_the_same_in_memory_and_as_a_stream(tmp_path: Path, fuzz_seconds: float) -> None:
    path, root = tmp_path / "data.jsonl", tmp_path.resolve()
    whole = FILES.map(lambda entries: b"\n".join(json.dumps(entry).encode() for entry in entries))

    def outcomes(found: list[Any]) -> list[tuple[str, str]]:
        return sorted(("error", one.kind) if isinstance(one, SampleError) else ("sample", one.problem) for one in found)

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            dataset = load_samples(path)
        except DataError:
            dataset = None
        try:
            stream = open_dataset(str(path), DataConfig(stream=True, root=str(root)))
            assert isinstance(stream, RowStream)
            order, count = order_of(stream, shuffle=False), stream.count() or 0
            drawn = [draw.sample for draw in itertools.islice(order.iterate(order.begin(0)), count)]
        except DataError:
            assert dataset is None or data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
            return
        for one in drawn:
            if isinstance(one, Sample):
                check_sample(one, root, RewardConfig())
        check_errors([one for one in drawn if isinstance(one, SampleError)], tmp_path)
        if dataset is not None:
            assert outcomes([*dataset.samples, *dataset.errors]) == outcomes(drawn)

    assert fuzz(fuzz_seconds, damaged(whole), check) > 0
