"""Damaged videos of any seed: an index and frames, or a SampleError, and no crash and no hang."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

from mutations import mutate, read, write_originals

from videor1.data.workers import WorkerPool

FIRST = 10**6  # the seeds before are those of tests/video/test_mutated_files.py
BATCH = 40


def test_a_damaged_video_is_read_or_refused(tmp_path: Path, fuzz_seconds: float) -> None:
    originals = write_originals(tmp_path)
    end, pool = time.monotonic() + fuzz_seconds, WorkerPool(2, timeout=60.0)
    try:
        for first in itertools.count(FIRST, BATCH):
            folder = tmp_path / str(first)
            folder.mkdir()
            items = [mutate(seed, originals, folder) for seed in range(first, first + BATCH)]
            tasks = [pool.submit(read, item) for item in items]
            replies = [pool.result(task) for task in tasks]
            # An error of the call is a crash, a hang, or an exception that is no SampleError.
            assert [(item, r.error) for item, r in zip(items, replies, strict=True) if r.error is not None] == []
            if time.monotonic() > end:
                break
    finally:
        pool.stop()
