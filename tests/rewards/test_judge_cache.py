"""A judge's scores on disk: read again after a kill at any byte, by any number of processes."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import PATIENCE
from runs import ENVIRONMENT, largest_file

from videor1.errors import ConfigError
from videor1.rewards.judge_cache import JudgeCache

KEYS = [hashlib.sha256(bytes([i])).hexdigest() for i in range(8)]


def known(folder: Path) -> dict[str, float]:
    cache = JudgeCache(folder)
    return {key: score for key in KEYS if (score := cache.get(key)) is not None}


def test_scores_are_there_again(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    cache = JudgeCache(folder)
    assert not folder.exists()  # before there is a score
    for i, key in enumerate(KEYS):
        assert cache.get(key) is None
        cache.add(key, i / 7)
        assert cache.get(key) == i / 7
    cache.add(KEYS[0], 0.5)  # the first counts
    assert known(folder) == {key: i / 7 for i, key in enumerate(KEYS)}
    cache.close()
    cache.close()


def test_a_kill_at_any_byte_costs_a_line_at_most(tmp_path: Path) -> None:
    cache = JudgeCache(tmp_path)
    for i, key in enumerate(KEYS[:3]):
        cache.add(key, i / 2)
    cache.close()
    (file,) = tmp_path.glob("*.jsonl")
    data = file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for size in range(len(data) + 1):
        file.write_bytes(data[:size])
        whole = sum(end <= size for end in ends)
        assert known(tmp_path) == {key: i / 2 for i, key in enumerate(KEYS[:whole])}
    # The next process goes on, and what the killed one has left is as it was.
    file.write_bytes(data[:-5])
    later = JudgeCache(tmp_path)
    later.add(KEYS[2], 1.0)
    later.close()
    assert file.read_bytes() == data[:-5]
    assert known(tmp_path) == {key: i / 2 for i, key in enumerate(KEYS[:3])}


def test_processes_write_side_by_side(tmp_path: Path) -> None:
    script = (
        "import sys; from videor1.rewards.judge_cache import JudgeCache; cache = JudgeCache(sys.argv[1])\n"
        "for i, key in enumerate(sys.argv[2:]): cache.add(key, i / 7)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), *KEYS], env=os.environ | ENVIRONMENT)
        for _ in range(2)
    ]
    assert [process.wait(PATIENCE) for process in processes] == [0] * 2
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    assert known(tmp_path) == {key: i / 7 for i, key in enumerate(KEYS)}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.sampled_from(
                [
                    json.dumps({"key": key, "score": score}).encode()
                    for key in (KEYS[0], KEYS[0][:-1], KEYS[0].upper(), 5, None)
                    for score in (0.5, 2, -1, float("nan"), "1", True, None, [])
                ]
                + [b"[" * 100, b'{"key": "' + b"a" * 5000, b"1e999"]
            ),
        ),
        max_size=6,
    )
)
def test_what_is_damaged_is_not_read(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("cache")
    good = json.dumps({"key": KEYS[1], "score": 1}).encode()
    (folder / "a.jsonl").write_bytes(b"\n".join([*lines, good, b""]))
    found = known(folder)
    assert found.pop(KEYS[1]) == 1.0
    assert found in ({}, {KEYS[0]: 0.5})


def test_a_disk_that_takes_no_more_is_told_and_stops_nothing(tmp_path: Path) -> None:
    cache = JudgeCache(tmp_path)
    with largest_file(150):
        for i, key in enumerate(KEYS):
            cache.add(key, i / 7)
    assert cache.failure is not None
    assert f"cannot be written to {tmp_path}: File too large" in cache.failure
    assert [cache.get(key) for key in KEYS] == [i / 7 for i in range(8)]
    assert known(tmp_path) == {KEYS[0]: 0.0}
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="expected a folder, got"):
        JudgeCache(tmp_path / "file")
