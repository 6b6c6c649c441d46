"""The counters of a run, which a checkpoint saves and a resumed run continues.

They count steps that changed no weight, samples that were skipped and problems that data loading recovered from, and
hold the metrics of the steps since the last line. All of them cover the whole run, however often it was interrupted.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from videor1.data import Dataset
from videor1.data.source import Source
from videor1.data.stream import RowStream
from videor1.logs.jsonl import JsonlWriter
from videor1.logs.progress import Progress
from videor1.types import SampleError

# The counts of ``PrefetchStats`` that are metrics (data/...), and their names in the last line of a run.
_RECOVERED = {
    "changed_files": "changed files",
    "worker_deaths": "workers dead or killed",
    "cache_errors": "disk cache errors",
    "cache_damaged": "damaged files of the disk cache",
}


class Journal:
    """The counters of one run of :class:`~videor1.training.loop.Loop`.

    Args:
        saved: the trainer state of the checkpoint to resume from, which holds what :meth:`state` returned; {} for a new
            run.
        skips: the writer of skipped.jsonl.
        progress: where messages are printed.
        left_out: number of entries that the data file's check left out, by kind of error; used in a new run only.

    Attributes:
        counters: counts that every line of metrics holds unchanged.
        rows: the metrics of the steps since the last line, one entry per step.
        accuracy, evaluated_at: result and step of the latest evaluation; NaN and -1 before the first.
    """

    def __init__(
        self, saved: Mapping[str, Any], skips: JsonlWriter, progress: Progress, *, left_out: Mapping[str, int]
    ) -> None:
        self._skips, self._progress = skips, progress
        self.counters: dict[str, int] = {"nonfinite_steps": 0, "failed_checkpoints": 0, "num_tokens": 0}
        self.counters |= saved.get("counters", {})
        self.rows: list[dict[str, Any]] = saved.get("pending_metrics", [])
        self.accuracy: float = saved.get("accuracy", math.nan)
        self.evaluated_at: int = saved.get("evaluated_at", -1)
        self._consecutive_nonfinite: int = saved.get("nonfinite_in_a_row", 0)
        self._skipped_before: Counter[str] = Counter(saved.get("skipped", left_out))
        self._recovered_before: Counter[str] = Counter(saved.get("survived", {}))

    def attach(self, source: Source[Any]) -> None:
        """Count what ``source`` skips and recovers from, from now on."""
        self._source = source
        # Time of the last step's end, and the seconds waited for data until then.
        self._step_start = time.perf_counter(), 0.0

    def start_batch(self) -> None:
        """Restart the step timer: time since the last step (an evaluation, for instance) is not the new batch's."""
        self._step_start = time.perf_counter(), self._source.waited_seconds

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the journal, as JSON values."""
        return {
            "skipped": dict(self._skipped()),
            "survived": {name.removeprefix("data/"): count for name, count in self._recovered().items()},
            "counters": self.counters,
            "nonfinite_in_a_row": self._consecutive_nonfinite,
            "pending_metrics": self.rows,
            "evaluated_at": self.evaluated_at,
            "accuracy": self.accuracy,
        }

    def count_nonfinite(self, step: int, finite: bool, row: dict[str, Any]) -> int:
        """Count and report the step if its loss or gradient is not finite.

        Args:
            row: the step's metrics, in which the count is updated.

        Returns:
            The number of such steps in a row, this one included; 0 for a finite step.
        """
        self._consecutive_nonfinite = 0 if finite else self._consecutive_nonfinite + 1
        if not finite:
            self.counters["nonfinite_steps"] += 1
            row["nonfinite_steps"] = self.counters["nonfinite_steps"]
            self._progress.write(
                f"step {step}: skipped, its loss ({row['loss']}) or gradient norm ({row['grad_norm']}) is not finite"
            )
        return self._consecutive_nonfinite

    def finite_step(self, step: int) -> int:
        """Return the last step up to ``step`` whose loss and gradient were finite."""
        return step - self._consecutive_nonfinite

    def data_counts(self) -> dict[str, int]:
        """Return this process's counts of draws, skipped samples and recovered problems over the whole run."""
        bad = self._skipped()
        kinds = {f"data/skipped/{kind}": count for kind, count in sorted(bad.items())}
        return {"data/draws": self._source.position, "data/skipped": sum(bad.values()), **kinds, **self._recovered()}

    def data_times(self) -> dict[str, float]:
        """Return the seconds since the last step, the share of them spent waiting for data, and cache statistics.

        Decodes and cache hits are counted from the start of this process, since a resumed run begins with an empty
        memory cache. That is why they are time/* metrics and not data/*, which count over the whole run.
        """
        stats, (started, waited) = self._source.stats, self._step_start
        self._step_start = time.perf_counter(), stats.waited_seconds
        seconds = self._step_start[0] - started
        share = (self._step_start[1] - waited) / max(seconds, 1e-9)
        hits = {"time/data_memory_hits": stats.cache_hits, "time/data_disk_hits": stats.disk_hits}
        decoded = {f"time/data_decoded/{backend}": count for backend, count in sorted(stats.backends.items())}
        return {"time/step": seconds, "time/data_share": share, "time/data_decoded": stats.loaded, **decoded, **hits}

    def skip(self, step: int, error: SampleError, draw: int) -> None:
        """Record a training sample that was skipped."""
        self._write_skip(step, "train", error, draw)
        self._progress.write(f"skipped: {error}")

    def skip_in_evaluation(self, step: int, error: SampleError) -> None:
        """Record a held-out sample that was skipped."""
        self._write_skip(step, "eval", error)
        if self.evaluated_at < 0:  # Every evaluation skips the same samples, so only the first one reports them.
            self._progress.write(f"skipped in the evaluation: {error}")

    def report_bad_entries(self, train: Dataset | RowStream, held_out: Dataset | None) -> None:
        """Record the entries that the check of the data files left out: all in skipped.jsonl, the first few printed."""
        for split, dataset in (("train", train), ("eval", held_out)):
            errors = dataset.errors if dataset else []
            if dataset and dataset.format_note:
                self._progress.write(f"{dataset.path}: {dataset.format_note}")
            for error in errors:
                self._write_skip(0, split, error)
            for error in errors[:5]:
                self._progress.write(f"left out: {error}")
            if dataset and len(errors) > 5:
                self._progress.write(f"left out: {len(errors)} entries in all {dataset.error_counts()}")
            if dataset and (note := dataset.reward_note()):
                self._progress.write(note)

    def report_data_problems(self) -> None:
        """Print one line of skipped samples and recovered problems at the end of a run, if there were any."""
        skipped = self._skipped()
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(skipped.items()))
        parts = [f"skipped {sum(skipped.values())} ({kinds})"] if kinds else []
        parts += [f"{_RECOVERED[name.removeprefix('data/')]} {n}" for name, n in self._recovered().items() if n]
        if parts:
            self._progress.write(f"data, over the whole run: {', '.join(parts)}")

    def _skipped(self) -> Counter[str]:
        return self._source.skipped + self._skipped_before

    def _recovered(self) -> dict[str, int]:
        """Return the counts of problems that data loading recovered from, over the whole run."""
        now = Counter({name: getattr(self._source.stats, name) for name in _RECOVERED})
        return {f"data/{name}": now[name] + self._recovered_before[name] for name in _RECOVERED}

    def _write_skip(self, step: int, split: str, error: SampleError, draw: int | None = None) -> None:
        row = {"split": split, "draw": draw, "kind": error.kind, "path": error.path, "message": str(error)}
        self._skips.write(step, row)


def sum_counts(rows: Sequence[dict[str, int]]) -> dict[str, int]:
    """Add the ranks' counts, name by name."""
    return {name: sum(row.get(name, 0) for row in rows) for name in sorted({name for row in rows for name in row})}


def mean_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of each float metric over ``rows``; counts and data positions are those of the last row."""
    if len(rows) == 1:
        return rows[0]
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row[key] for row in rows if row.get(key) is not None]
        if all(isinstance(v, float) for v in values) and values:
            known = [v for v in values if not math.isnan(v)]
            merged[key] = sum(known) / len(known) if known else math.nan
        else:
            merged[key] = values[-1] if values else None
    return merged
