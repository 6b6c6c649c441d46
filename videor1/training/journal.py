"""What a run counts and writes down, and takes up again where it is resumed.

Steps that changed nothing, samples that were skipped, what data loading came through, and the metrics of the steps
since the last line: all of it over the whole run, however often it was interrupted.
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

# Counts of ``PrefetchStats`` that are metrics (data/...), and what the last line of a run calls them.
_SURVIVED = {
    "changed_files": "changed files",
    "worker_deaths": "workers dead or killed",
    "cache_errors": "disk cache errors",
    "cache_damaged": "damaged files of the disk cache",
}


class Journal:
    """The counts of one run of :class:`~videor1.training.loop.Loop`.

    Args:
        saved: the trainer's state of the checkpoint that the run goes on from, which holds what :meth:`state` gave; {}
            where it begins.
        skips: skipped.jsonl.
        progress: where it is said aloud.
        left_out: entries that the data file's check left out, by kind of error; of a run that begins.

    Attributes:
        counters: what stands in every line of metrics as it is.
        rows: the metrics of the steps since the last line.
        accuracy, evaluated_at: of the latest evaluation, and its step; NaN and -1 before the first.
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
        self._nonfinite_in_a_row: int = saved.get("nonfinite_in_a_row", 0)
        self._skipped_before: Counter[str] = Counter(saved.get("skipped", left_out))
        self._survived_before: Counter[str] = Counter(saved.get("survived", {}))

    def follow(self, source: Source[Any]) -> None:
        """Count what this source skips and survives."""
        self._source = source
        self._lap = time.perf_counter(), 0.0  # when the last row was made, and the seconds waited for data until then

    def start_lap(self) -> None:
        """A batch begins; what came between it and the last step (an evaluation, say) is no part of its time."""
        self._lap = time.perf_counter(), self._source.waited_seconds

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {
            "skipped": dict(self._skipped()),
            "survived": {name.removeprefix("data/"): count for name, count in self._survived().items()},
            "counters": self.counters,
            "nonfinite_in_a_row": self._nonfinite_in_a_row,
            "pending_metrics": self.rows,
            "evaluated_at": self.evaluated_at,
            "accuracy": self.accuracy,
        }

    def count_nonfinite(self, step: int, finite: bool, row: dict[str, Any]) -> int:
        """Count a step whose loss or gradient is not finite, in its metrics too; how many there were in a row."""
        self._nonfinite_in_a_row = 0 if finite else self._nonfinite_in_a_row + 1
        if not finite:
            self.counters["nonfinite_steps"] += 1
            row["nonfinite_steps"] = self.counters["nonfinite_steps"]
            self._progress.write(
                f"step {step}: skipped, its loss ({row['loss']}) or gradient norm ({row['grad_norm']}) is not finite"
            )
        return self._nonfinite_in_a_row

    def data_counts(self) -> dict[str, int]:
        """Draws, skipped samples and what data loading came through, over the whole run, of this process."""
        bad = self._skipped()
        kinds = {f"data/skipped/{kind}": count for kind, count in sorted(bad.items())}
        return {"data/draws": self._source.position, "data/skipped": sum(bad.values()), **kinds, **self._survived()}

    def data_times(self) -> dict[str, float]:
        """Seconds since the last row and the share of them spent waiting for data; decodes and hits since the start.

        Here and not in data/*: a resumed run begins with empty memory.
        """
        stats, (then, waited) = self._source.stats, self._lap
        self._lap = time.perf_counter(), stats.waited_seconds
        seconds = self._lap[0] - then
        share = (self._lap[1] - waited) / max(seconds, 1e-9)
        hits = {"time/data_memory_hits": stats.cache_hits, "time/data_disk_hits": stats.disk_hits}
        decoded = {f"time/data_decoded/{backend}": count for backend, count in sorted(stats.backends.items())}
        return {"time/step": seconds, "time/data_share": share, "time/data_decoded": stats.loaded, **decoded, **hits}

    def skip(self, step: int, error: SampleError, draw: int) -> None:
        """A training sample is left out."""
        self._write_skip(step, "train", error, draw)
        self._progress.write(f"skipped: {error}")

    def skip_in_evaluation(self, step: int, error: SampleError) -> None:
        """A held-out sample is left out."""
        self._write_skip(step, "eval", error)
        if self.evaluated_at < 0:  # each evaluation meets the same ones
            self._progress.write(f"skipped in the evaluation: {error}")

    def report_bad_entries(self, train: Dataset | RowStream, held_out: Dataset | None) -> None:
        """Entries that the data files' check left out: all of them in skipped.jsonl, the first few on the screen."""
        for split, dataset in (("train", train), ("eval", held_out)):
            errors = dataset.errors if dataset else []
            for error in errors:
                self._write_skip(0, split, error)
            for error in errors[:5]:
                self._progress.write(f"left out: {error}")
            if dataset and len(errors) > 5:
                self._progress.write(f"left out: {len(errors)} entries in all {dataset.error_counts()}")

    def report_losses(self) -> None:
        """One line at the end, however the run ends, of what was lost or survived; none where nothing was."""
        skipped = self._skipped()
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(skipped.items()))
        parts = [f"skipped {sum(skipped.values())} ({kinds})"] if kinds else []
        parts += [f"{_SURVIVED[name.removeprefix('data/')]} {n}" for name, n in self._survived().items() if n]
        if parts:
            self._progress.write(f"data, over the whole run: {', '.join(parts)}")

    def _skipped(self) -> Counter[str]:
        return self._source.skipped + self._skipped_before

    def _survived(self) -> dict[str, int]:
        """What data loading came through, over the whole run."""
        now = Counter({name: getattr(self._source.stats, name) for name in _SURVIVED})
        return {f"data/{name}": now[name] + self._survived_before[name] for name in _SURVIVED}

    def _write_skip(self, step: int, split: str, error: SampleError, draw: int | None = None) -> None:
        row = {"split": split, "draw": draw, "kind": error.kind, "path": error.path, "message": str(error)}
        self._skips.write(step, row)


def sums(rows: Sequence[dict[str, int]]) -> dict[str, int]:
    """Of the ranks' counts, name by name."""
    return {name: sum(row.get(name, 0) for row in rows) for name in sorted({name for row in rows for name in row})}


def mean_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean of each metric over the steps since the last line; counts and data positions are the last step's."""
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
