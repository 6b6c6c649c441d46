"""The files of an evaluation: answers.jsonl, skipped.jsonl, and the state that a resumed evaluation must share."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from videor1.answer import extract_answer, whole_text
from videor1.atomic import write_atomic
from videor1.config import EvaluateConfig
from videor1.config.cli import changed_options, load_run_config, save_run_config
from videor1.data.samples import samples_digest
from videor1.errors import ConfigError, DataError
from videor1.evaluation.evaluator import Answered
from videor1.evaluation.suites.base import Loaded, Question
from videor1.logs.jsonl import JsonlWriter
from videor1.types import Sample, SampleError

# Options that only change how fast an evaluation runs, or where the model and the data lie: what is in these is
# compared by digests. Any other option may change the answers.
FREE = (
    *("data.workers", "data.prefetch", "data.timeout", "data.cache_mb", "data.cache_dir", "data.cache_dir_mb"),
    *("model_name_or_path", "dataset_name", "data.root", "data.changed_ok"),
    *("reward.judge.url", "reward.judge.concurrency", "reward.judge.timeout", "reward.judge.retries"),
    *("reward.judge.api_key_env", "reward.judge.cache_dir"),
)
_MODEL = "model (digest of its weights)"


def answer_row(benchmark: str, question: Question, answered: Answered) -> dict[str, Any]:
    """Return the line of answers.jsonl for a question that was answered."""
    row = _question_fields(benchmark, question) | {
        "problem_type": question.sample.problem_type,
        "solution": question.sample.solution,
        "accuracy": answered.accuracy,
        "shuffled_accuracy": answered.shuffled,
        "finished": answered.finished,
        "shuffled_finished": answered.shuffled_finished,
        "answered": _share_answered(answered.opened, answered.texts),
        "shuffled_answered": _share_answered(answered.opened, answered.shuffled_texts),
        "opened": answered.opened,
        "text": answered.text,
        "shuffled_text": answered.shuffled_text,
    }
    if answered.malformed:
        row["malformed"] = list(answered.malformed)
    if len(answered.texts) > 1:
        row |= {"texts": list(answered.texts), "shuffled_texts": list(answered.shuffled_texts)}
    return row


def skipped_row(benchmark: str, question: Question, error: SampleError) -> dict[str, Any]:
    """Return the line of skipped.jsonl for a question that could not be answered."""
    return _question_fields(benchmark, question) | {"kind": error.kind, "message": error.message}


def _question_fields(benchmark: str, question: Question) -> dict[str, Any]:
    sample = question.sample
    several = {"media": [str(item.named) for item in sample.media]} if sample.media else {}
    return several | {
        "benchmark": benchmark,
        "index": sample.index,
        "problem_id": sample.problem_id,
        "path": None if sample.path is None else str(sample.path),
        "categories": dict(question.categories),
    }


def _share_answered(opened: str, texts: tuple[str, ...]) -> float | None:
    return sum(bool(extract_answer(whole_text(opened, text))) for text in texts) / len(texts) if texts else None


def begin(
    run_dir: Path,
    config: EvaluateConfig,
    benchmarks: Iterable[Loaded],
    model_digest: str,
    *,
    earlier_digest: Callable[[], str] = lambda: "",
) -> JsonlWriter:
    """Open the answers.jsonl of a run folder: a new file, or the existing one to append to it.

    Args:
        run_dir: the run folder.
        config: the options of the evaluation.
        benchmarks: the benchmarks with all of their questions.
        model_digest: a hash of the model's weights.
        earlier_digest: returns the hash by which early versions identified the model.

    Raises:
        ConfigError: the folder holds an evaluation with other options, weights or questions.
        DataError: the state of the evaluation in the folder cannot be read.
    """
    state, path = run_dir / "state.json", run_dir / "answers.jsonl"
    samples = {f"questions of {loaded.name}": [q.sample for q in loaded.questions] for loaded in benchmarks}
    root = config.data.root or Path(config.dataset_name or "").parent
    now = {_MODEL: model_digest} | {name: samples_digest(asked, root) for name, asked in samples.items()}
    if path.exists():
        earlier = {name: functools.partial(_earlier_digest, asked) for name, asked in samples.items()}
        _check_same_evaluation(run_dir, config, now, {_MODEL: earlier_digest} | earlier)
    else:
        save_run_config(config, run_dir, run_dir)
        write_atomic(state, json.dumps(now, indent=2) + "\n")
    return JsonlWriter(path)


def _check_same_evaluation(
    run_dir: Path, config: EvaluateConfig, now: dict[str, str], earlier: dict[str, Callable[[], str]]
) -> None:
    before = load_run_config(EvaluateConfig, run_dir / "config.yaml")
    changes = [line for line in changed_options(before, config) if line.partition(":")[0] not in FREE]
    try:
        then = json.loads((run_dir / "state.json").read_text(encoding="utf-8"))
        if not isinstance(then, dict):
            raise ValueError(f"expected an object, got {then!r:.60}")
    except (OSError, ValueError) as error:
        raise DataError(f"{run_dir / 'state.json'}: cannot be read: {error}; name another folder") from error
    changes += [
        f"{name}: {then.get(name)} -> {now[name]}"
        for name in now
        if then.get(name) != now[name] and then.get(name) != earlier[name]()
    ]
    if changes:
        listed = "".join(f"\n  {change}" for change in changes)
        raise ConfigError(f"resume: {run_dir} holds another evaluation; what differs (then -> now):{listed}")


def _earlier_digest(samples: Iterable[Sample]) -> str:
    """Return a hash of all samples that may be asked about, as early versions computed it, with absolute paths."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr(sample).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()[:16]
