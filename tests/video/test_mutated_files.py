"""Damaged videos: frames or a SampleError within seconds, and no crash, no hang, no growing memory."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from mutations import FORMATS, MUTATIONS, Mutation, mutate, read, read_many, summary, write_originals
from patience import PATIENCE

from videor1.data.workers import WorkerPool

PAIRS = len(FORMATS) * len(MUTATIONS)  # of a format and a damage: the seeds go through all of them in turn
SEEDS = (*range(2 * PAIRS), 2468, 5170, 10032, 21100)  # the last four were found among 40,000: each was a bug
KINDS = {"frames", "not_video", "truncated", "zero_frames", "too_few_frames", "decode", "aspect_ratio"}
TIMEOUT = 20.0  # seconds for one file
OPENS, WARM_UP = 900, 300  # files read in one process; its memory settles during the first of them


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_originals(tmp_path_factory.mktemp("originals"))


def run(workers: int, timeout: float, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """The replies of worker processes, which show a crash as ``worker_died`` and a hang as ``timeout``."""
    pool = WorkerPool(workers, timeout)
    try:
        tasks = [pool.submit(function, item) for item in items]
        return [pool.result(task) for task in tasks]
    finally:
        pool.stop()


def test_damaged_files_give_frames_or_a_sample_error(originals: list[Path], tmp_path: Path) -> None:
    items = [mutate(seed, originals, tmp_path) for seed in SEEDS]
    replies = run(2, TIMEOUT, read, items)
    # ``read`` returns a file's SampleErrors: an error of the call is a crash, a hang, or an exception that escaped.
    failed = [f"{item}: {reply.error}" for item, reply in zip(items, replies, strict=True) if reply.error is not None]
    assert not failed, "\n".join(failed)
    outcomes = [reply.value for reply in replies]
    print(f"\n{len(SEEDS)} damaged files: {summary(outcomes)}")
    kinds = {outcome.kind for outcome in outcomes}
    assert kinds <= KINDS
    assert len(kinds) >= 5, "the mutations should reach most kinds of error"
    assert sum(outcome.kind == "frames" for outcome in outcomes) > len(SEEDS) // 4
    assert all(outcome.message for outcome in outcomes if outcome.kind != "frames")
    assert max(outcome.megabytes for outcome in outcomes) < 1000, "a damaged size must not cost memory"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_and_open_files_stay_level(originals: list[Path], tmp_path: Path) -> None:
    good = [Mutation(-1, path, planes) for path in originals for planes in (False, True)]
    damaged = [mutate(seed, originals, tmp_path) for seed in range(200)]
    items = [files[number % len(files)] for number in range(OPENS) for files in [(damaged, good)[number % 3 == 0]]]
    (reply,) = run(1, PATIENCE, read_many, [tuple(items)])
    assert reply.error is None, reply.error
    memory, open_files = zip(*reply.value[WARM_UP // 100 :], strict=True)
    print(f"\n{OPENS} files in one process: {memory} MB")
    assert max(memory) < 1.015 * memory[0], memory
    assert len(set(open_files)) == 1, open_files
