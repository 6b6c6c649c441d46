"""Data files of any content: good samples and counted errors, or one message; in memory and as a stream alike."""

import json
import pickle
from pathlib import Path
from typing import Any

from fuzzing import changed, check_message, damaged, fuzz
from hypothesis import strategies as st
from streams import samples, stream_of
from tiny import make_tokenizer

from videor1.config import RewardConfig
from videor1.data import load_samples
from videor1.errors import DataError
from videor1.logs.jsonl import JsonlWriter, read_jsonl
from videor1.model.prompts import build_input_ids
from videor1.rewards import accuracy_of
from videor1.types import Sample, SampleError

CHOICE = {"problem_id": 7, "problem": "Which comes first?", "data_type": "text", "problem_type": "multiple choice"}
CHOICE |= {"options": ["A. red", "B. blue"], "solution": "<answer>A</answer>", "data_source": "made"}
CHOICE |= {"process": "<think>red</think>"}
VIDEO = CHOICE | {"data_type": "video", "path": "clips/one.mp4"}
NUMBER = {"problem": "2 + 2?", "data_type": "text", "problem_type": "numerical", "solution": "<answer>4 cm</answer>"}
FREE = NUMBER | {"problem_type": "free-form", "solution": "<answer>猫</answer>"}
FILES = st.lists(st.sampled_from([CHOICE, VIDEO, NUMBER, FREE]).flatmap(changed), min_size=1, max_size=4)
TOKENIZER = make_tokenizer()


def check_sample(sample: Sample, root: Path, reward: RewardConfig) -> None:
    fields = ("problem", "solution", "problem_id", "data_source", "process")
    for text in (*sample.options, *(getattr(sample, field) for field in fields)):
        text.encode()
    assert sample.path is None or sample.path.is_relative_to(root)
    if sample.problem_type != "multiple choice":
        assert accuracy_of(sample.solution, sample, lenient=reward.lenient) > 0.1
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


def test_a_list(tmp_path: Path, fuzz_times: int) -> None:
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

    fuzz(300 * fuzz_times, st.tuples(damaged(whole), st.booleans()), check)


def test_lines_are_the_same_in_memory_and_as_a_stream(tmp_path: Path, fuzz_times: int) -> None:
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
            stream = stream_of(path, root=str(root))
            drawn = samples(stream, stream.count() or 0)
        except DataError:
            assert dataset is None or data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
            return
        for one in drawn:
            if isinstance(one, Sample):
                check_sample(one, root, RewardConfig())
        check_errors([one for one in drawn if isinstance(one, SampleError)], tmp_path)
        if dataset is not None:
            assert outcomes([*dataset.samples, *dataset.errors]) == outcomes(drawn)

    fuzz(200 * fuzz_times, damaged(whole), check)
