"""Damaged videos of any seed: an index and frames, or a SampleError, and no crash and no hang."""

from pathlib import Path

from mutations import mutate, read, write_originals
from patience import PATIENCE

from videor1.data.workers import WorkerPool

FIRST = 10**6  # the seeds before are those of tests/video/test_mutated_files.py


def test_a_damaged_video_is_read_or_refused(tmp_path: Path, fuzz_times: int) -> None:
    originals, pool = write_originals(tmp_path), WorkerPool(2, PATIENCE)
    try:
        for first in range(FIRST, FIRST + 120 * fuzz_times, 40):
            items = [mutate(seed, originals, tmp_path) for seed in range(first, first + 40)]
            tasks = [pool.submit(read, item) for item in items]
            replies = [pool.result(task) for task in tasks]
            # An error of the call is a crash, a hang, or an exception that is no SampleError.
            assert [(item, r.error) for item, r in zip(items, replies, strict=True) if r.error is not None] == []
            for item in items:
                item.path.unlink()
    finally:
        pool.stop()
