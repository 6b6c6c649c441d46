"""Run an evaluation from its options to results.json: load the questions, answer them, and report the results."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from videor1.atomic import write_atomic
from videor1.config import EvaluateConfig
from videor1.config.cli import EARLIER, flat_options, load_run_config, resume_command, save_run_config
from videor1.config.files import flat_tree
from videor1.data import Dataset, load_samples
from videor1.errors import ConfigError, DataError
from videor1.evaluation.evaluator import Evaluator
from videor1.evaluation.files import answer_row, begin, skipped_row
from videor1.evaluation.results import benchmark_results, results_legend, results_table
from videor1.evaluation.suites import Loaded, find_suite, from_dataset
from videor1.logs.jsonl import JsonlWriter, read_jsonl
from videor1.logs.lock import FolderLock
from videor1.logs.progress import Progress
from videor1.model import VideoLM, load_model
from videor1.model.positions import PositionRule
from videor1.model.save import base_digest, sampled_digest
from videor1.rewards.slow import SlowRewards
from videor1.types import SampleError

# Options whose values in training a checkpoint should also be evaluated with.
_TRAINING_OPTIONS = (
    "max_completion_length",
    "video.max_frames",
    "video.fps",
    "video.max_pixels",
    "video.min_pixels",
    "video.image_max_pixels",
    "video.image_min_pixels",
    "model.positions",
)


def run(config: EvaluateConfig) -> int:
    """Answer all questions that have no answer yet and write results.json.

    Returns:
        The exit code.

    Raises:
        ConfigError: an option is wrong, or the output folder cannot be used.
        DataError: a benchmark cannot be read, the output folder cannot be written, or no question could be answered.
    """
    run_dir = _run_dir(config)
    slow = SlowRewards(config.reward, run_dir / "judge_cache", functions=False)
    benchmarks = _load(config)
    with FolderLock(run_dir, "videor1.evaluate"), slow:
        _check_folder(run_dir, config)  # Another process may have begun there before this one had the lock.
        for loaded in benchmarks:
            _report_left_out(loaded)
        config = _restore_positions(config, run_dir)
        model = load_model(config)
        config = _with_positions(config, model.position_rule)
        results = _answer_all(config, run_dir, benchmarks, model, slow)
    print(results_table(results))
    for name, result in results.items():
        _report_unanswered(name, result)
    print(results_legend(results))
    print(f"Saved {run_dir / 'results.json'}. Answers: {run_dir / 'answers.jsonl'}")
    return 0


def _answer_all(
    config: EvaluateConfig, run_dir: Path, benchmarks: Sequence[Loaded], model: VideoLM, slow: SlowRewards
) -> dict[str, dict[str, Any]]:
    """Answer the questions, write the files of the evaluation, and return the results by benchmark."""
    total = sum(len(_selected_questions(loaded, config)) for loaded in benchmarks)
    digest, count = base_digest(model), 0
    try:
        answers = begin(run_dir, config, benchmarks, digest, earlier_digest=lambda: sampled_digest(model))
        count = answers.count
        save_run_config(config, run_dir, run_dir)
        _report_training_options(config)
        # A resumed evaluation tries unreadable questions again, so the list of skipped ones starts empty.
        skipped = JsonlWriter(run_dir / "skipped.jsonl", keep=False)
        with Progress(
            total, initial=answers.count, description="evaluate", unit="question", disabled=config.disable_tqdm
        ) as shown:
            for loaded in benchmarks:
                # A benchmark has rules of its own: the judge scores data files alone.
                _answer(config, loaded, model, answers, skipped, shown, slow if config.dataset_name else None)
                count = answers.count
        answers.close()
        skipped.close()
        results = {
            loaded.name: benchmark_results(
                loaded,
                len(_selected_questions(loaded, config)),
                _rows_of(answers, loaded.name),
                _rows_of(skipped, loaded.name),
            )
            for loaded in benchmarks
        }
        document = {"settings": _settings(config), "benchmarks": results}
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        write_atomic(run_dir / "results.json", text.encode("utf-8", "backslashreplace"), sync=True)
    except (KeyboardInterrupt, OSError) as error:
        count = max(count, _count_lines(run_dir / "answers.jsonl"))
        done = f"{count} of {total} questions are answered; go on with: {resume_command('evaluate', run_dir)}"
        if isinstance(error, OSError):
            raise DataError(f"{run_dir} cannot be written: {error.strerror}; {done}") from error
        raise KeyboardInterrupt(done) from None
    if not answers.count:
        raise DataError(f"none of the {total} questions could be answered; why stands in {skipped.path}")
    return results


def _count_lines(file: Path) -> int:
    """Return the number of whole lines of a file; 0 if it cannot be read."""
    try:
        return file.read_bytes().count(b"\n")
    except OSError:
        return 0


def _run_dir(config: EvaluateConfig) -> Path:
    if config.resume not in (None, "auto"):
        raise ConfigError(f"resume: expected auto (go on with the evaluation in output_dir), got {config.resume!r}")
    if config.resume and not config.output_dir:
        raise ConfigError("resume: auto needs output_dir, the folder of the evaluation to go on with")
    run_dir = Path(config.output_dir or f"runs/evaluate-{time.strftime('%Y%m%d-%H%M%S')}")
    _check_folder(run_dir, config)
    return run_dir


def _check_folder(run_dir: Path, config: EvaluateConfig) -> None:
    """Raise a ConfigError if the folder holds another run, or an evaluation that is not to be resumed."""
    if (run_dir / "metrics.jsonl").exists():
        raise ConfigError(f"output_dir: {run_dir} is the folder of a training run; name another")
    if (run_dir / "answers.jsonl").exists() and not config.resume:
        raise ConfigError(
            f"output_dir: {run_dir} holds an evaluation already; go on with it by --resume auto, or name another folder"
        )


def _restore_positions(config: EvaluateConfig, run_dir: Path) -> EvaluateConfig:
    """Restore the position rule of an evaluation that is resumed, so that the option need not be given again."""
    file = run_dir / "config.yaml"
    if not config.resume or config.model.positions is not None or not file.is_file():
        return config
    return _with_positions(config, load_run_config(EvaluateConfig, file).model.positions)


def _with_positions(config: EvaluateConfig, rule: PositionRule | None) -> EvaluateConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, positions=rule))


def _load(config: EvaluateConfig) -> list[Loaded]:
    if bool(config.benchmark) == bool(config.dataset_name):
        got = "both" if config.benchmark else "neither"
        raise ConfigError(f"expected benchmark (names) or dataset_name (a data file in the Video-R1 format), got {got}")
    if config.dataset_name:
        # The solutions are checked by from_dataset, since an evaluation's scores are not all the reward's.
        data, reward = config.data, config.reward
        dataset = load_samples(
            config.dataset_name, root=data.root, reward=None, format=data.format, problem_type=data.problem_type
        )
        if dataset.format_note:
            print(f"{dataset.path}: {dataset.format_note}", file=sys.stderr)
        judged = reward.judge.problem_types if reward.judge.url is not None else ()
        return [from_dataset(dataset, reward=reward, judged=judged)]
    suites = {suite.name: suite for suite in map(find_suite, config.benchmark)}
    if not config.data.root:
        raise ConfigError(f"data.root: expected the folder that holds {', '.join(suites)}, got nothing")
    found, missing = [], []
    for suite in suites.values():
        try:
            found.append(suite.load(config.data.root))
        except DataError as error:
            missing.append(str(error))
    if missing:
        raise DataError("\n\n".join(missing))
    return found


def _report_training_options(config: EvaluateConfig) -> None:
    """Tell the user if a checkpoint was trained with other frames or lengths than it is now evaluated with.

    A model may do worse on sizes that it has not seen in training.
    """
    model = Path(str(config.model_name_or_path)).resolve()
    if model.parent.name != "checkpoints":
        return
    try:
        tree = yaml.safe_load((model.parent.parent / "config.yaml").read_text(encoding="utf-8"))
        trained = EARLIER | dict(flat_tree(tree))
        if trained["model.positions"] is None:  # The run ended before it loaded a model.
            del trained["model.positions"]
    except (OSError, ValueError, yaml.YAMLError, AttributeError):  # The file is not the config.yaml of a training run.
        return
    current = flat_options(config)
    different = {
        name: trained[name] for name in _TRAINING_OPTIONS if name in trained and trained[name] != current[name]
    }
    if different:
        options = " ".join(f"--{name} {'null' if value is None else value}" for name, value in different.items())
        print(
            f"{config.model_name_or_path} was trained otherwise; to ask it as in its training: {options}",
            file=sys.stderr,
        )


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    """Return the options that have to be quoted with a result."""
    names = ("model_name_or_path", "max_completion_length", "seed")
    sampling = ("eval_temperature", "eval_top_p", "eval_num_samples")
    video = {f"video.{name}": getattr(config.video, name) for name in ("max_frames", "fps", "max_pixels", "min_pixels")}
    positions = {"model.positions": config.model.positions}
    return {name: getattr(config, name) for name in (*names, *sampling)} | video | positions


def _selected_questions(loaded: Loaded, config: EvaluateConfig) -> list[Any]:
    return loaded.questions[: config.eval_samples or None]


def _answer(
    config: EvaluateConfig,
    loaded: Loaded,
    model: VideoLM,
    answers: JsonlWriter,
    skipped: JsonlWriter,
    progress: Progress,
    slow: SlowRewards | None,
) -> None:
    """Answer the questions of a benchmark that have no answer yet, and append the answers to their file."""

    questions = {question.sample.index: question for question in _selected_questions(loaded, config)}
    before = _rows_of(answers, loaded.name)
    right, count = sum(row["accuracy"] for row in before), len(before)
    done = {row["index"] for row in before}
    if done >= set(questions):
        return
    samples = [question.sample for question in questions.values()]
    with Evaluator(
        Dataset(samples, [], Path(loaded.name), Path()),
        config,
        top_p=config.eval_top_p,
        count=config.eval_num_samples,
        rules=model.family.frames,
        score=lambda text, sample: questions[sample.index].score(text),
        slow=slow,
        on_skip=lambda error: progress.write(f"not answered: {error}"),
    ) as evaluator:
        for block in evaluator.answer(model, done):
            rows = [
                answer_row(loaded.name, questions[sample.index], outcome)
                for sample, outcome in block
                if not isinstance(outcome, SampleError)
            ]
            skipped.append(
                skipped_row(loaded.name, questions[sample.index], outcome)
                for sample, outcome in block
                if isinstance(outcome, SampleError)
            )
            answers.append(rows)
            right, count = right + sum(row["accuracy"] for row in rows), count + len(rows)
            progress.update({loaded.name: right / count if count else None}, len(block))


def _rows_of(file: JsonlWriter, benchmark: str) -> list[dict[str, Any]]:
    """Return the lines of a file about one benchmark, in the order of the questions."""
    return sorted((row for row in read_jsonl(file.path) if row["benchmark"] == benchmark), key=lambda row: row["index"])


def _report_left_out(loaded: Loaded) -> None:
    """Tell the user which questions of a benchmark are left out, unusable or without their video."""
    for reason, count in loaded.left_out.items():
        are = "is" if count == 1 else "are"
        print(f"{loaded.name}: {_count(count, 'question')} {are} left out ({reason})", file=sys.stderr)
    if loaded.errors:
        first = loaded.errors[0]
        print(f"{loaded.name}: {_count(len(loaded.errors), 'row')} cannot be used; the first: {first}", file=sys.stderr)
    if loaded.missing:
        print(f"{loaded.name}: the videos of {_count(loaded.missing, 'question')} are not there", file=sys.stderr)


def _report_unanswered(name: str, result: Mapping[str, Any]) -> None:
    """Tell the user how a benchmark's accuracy is defined, and how many questions have no answer and why."""
    print(f"{name}: accuracy is the {result['overall_is']}")
    unreadable, unaskable, unscored = result["unreadable"], result["unaskable"], result["unscored"]
    parts = []
    if unreadable["questions"]:
        parts.append(
            f"{_count(unreadable['videos'], 'video')} ({_count(unreadable['questions'], 'question')}) could not be read"
        )
    if unaskable["questions"]:
        kinds = ", ".join(f"{kind} {count}" for kind, count in unaskable["by_kind"].items())
        parts.append(f"{_count(unaskable['questions'], 'question')} could not be asked ({kinds})")
    if unscored["questions"]:
        parts.append(f"{_count(unscored['questions'], 'question')} got no score of the judge (resume asks again)")
    if parts:
        answered, counted = result["overall"]["questions"], result["accuracy_unanswered_as_wrong"]["value"]
        print(
            f"{name}: {', '.join(parts)}; {answered} of {result['asked']} questions are answered; with the others "
            f"counted as wrong, accuracy is {100 * counted:.1f}"
        )


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"
