"""What a run counts: the seconds of a row, steps that are not finite, means over steps, and what a checkpoint keeps."""

import contextlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from videor1.logs.jsonl import JsonlWriter, read_jsonl
from videor1.logs.progress import Progress
from videor1.training.journal import Journal, mean_rows, sum_counts
from videor1.types import SampleError


def source(*skipped: str, **stats: Any) -> Any:
    """Stands in for a ``Source``."""
    none = {"loaded": 0, "cache_hits": 0, "disk_hits": 0, "backends": {}, "waited_seconds": 0.0}
    none |= dict.fromkeys(("changed_files", "worker_deaths", "cache_errors", "cache_damaged"), 0)
    return SimpleNamespace(
        skipped=Counter(skipped), position=0, waited_seconds=0.5, stats=SimpleNamespace(**none | stats)
    )


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Callable[..., Journal]]:
    with contextlib.closing(JsonlWriter(tmp_path / "skipped.jsonl")) as lines:

        def make(attached: Any, saved: dict[str, Any] | None = None, **left_out: int) -> Journal:
            made = Journal(saved or {}, lines, Progress(4, disabled=True), left_out=left_out)
            made.attach(attached)
            return made

        yield make


def test_the_share_waited_is_of_the_step(journal: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of a rollout with two updates: the first has the wait for its data, the second has none."""
    clock = iter([0.0, 90.0, 100.0, 110.0])
    monkeypatch.setattr("videor1.training.journal.time.perf_counter", lambda: next(clock))
    made = journal(source(waited_seconds=2.5, loaded=1, cache_hits=2, disk_hits=3))
    made.start_batch()
    shown = {"time/data_decoded": 1, "time/data_memory_hits": 2, "time/data_disk_hits": 3}
    assert made.data_times() == {"time/step": 10.0, "time/data_share": 0.2} | shown
    assert made.data_times()["time/data_share"] == 0


def test_a_resumed_run_counts_on(journal: Callable[..., Journal], capsys: pytest.CaptureFixture[str]) -> None:
    first = journal(source("decode", changed_files=1), bad_json=2)
    first.counters["num_tokens"] += 70
    first.rows.append({"loss": 0.5})
    first.accuracy, first.evaluated_at = 0.25, 3
    assert first.count_nonfinite(4, False, {"loss": math.nan, "grad_norm": math.nan}) == 1
    second = journal(source("decode", changed_files=2), json.loads(json.dumps(first.state())), bad_json=2)
    skipped = {"data/skipped": 4, "data/skipped/bad_json": 2, "data/skipped/decode": 2}
    recovered = {"data/changed_files": 3, "data/worker_deaths": 0, "data/cache_errors": 0, "data/cache_damaged": 0}
    assert second.data_counts() == {"data/draws": 0} | skipped | recovered
    assert second.counters == {"nonfinite_steps": 1, "failed_checkpoints": 0, "num_tokens": 70}
    assert (second.rows, second.accuracy, second.evaluated_at) == ([{"loss": 0.5}], 0.25, 3)
    row = {"loss": math.inf, "grad_norm": math.nan}
    assert second.count_nonfinite(5, False, row) == 2
    assert row["nonfinite_steps"] == 2
    assert second.count_nonfinite(6, True, row) == 0
    second.report_data_problems()
    expected = "data, over the whole run: skipped 4 (bad_json 2, decode 2), changed files 3"
    assert capsys.readouterr().err.splitlines()[-1] == expected


def test_a_held_out_sample_is_named_once(
    journal: Callable[..., Journal], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = journal(source())
    error = SampleError("decode", "broken", Path("clip.mp4"))
    made.skip(1, error, 7)
    made.skip_in_evaluation(0, error)
    made.evaluated_at = 2
    made.skip_in_evaluation(4, error)
    assert capsys.readouterr().err.splitlines() == [f"skipped: {error}", f"skipped in the evaluation: {error}"]
    rows = read_jsonl(tmp_path / "skipped.jsonl")
    found = [(row["step"], row["split"], row["draw"]) for row in rows]
    assert found == [(1, "train", 7), (0, "eval", None), (4, "eval", None)]


def test_means_are_of_what_is_measured_and_counts_are_the_last() -> None:
    one = {"loss": 1.0, "num": 3, "kl": math.nan, "temporal/p": None}
    two = {"loss": 2.0, "num": 5, "kl": 0.5, "clip": 0.0}
    assert mean_rows([one]) is one
    assert mean_rows([one, two]) == {"loss": 1.5, "num": 5, "kl": 0.5, "temporal/p": None, "clip": 0.0}
    assert sum_counts([{"a": 1, "b": 2}, {"b": 3}]) == {"a": 1, "b": 5}
