"""Held-out accuracy from frames in order and from shuffled frames: ``python -m videor1.evaluate``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from videor1.cli import parse, run_main
from videor1.config import EvaluateConfig
from videor1.errors import ConfigError, DataError


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    config = parse(
        EvaluateConfig, argv, prog="python -m videor1.evaluate", description="Accuracy of a model on a data file."
    )
    # Imported here: decode workers import this file again, and must start quickly.
    from videor1.data import load_samples
    from videor1.evaluation import Evaluator
    from videor1.metrics import summary_table
    from videor1.model import load_model

    if not config.dataset_name:
        raise ConfigError("dataset_name: expected a data file in the Video-R1 JSON format, got nothing")
    dataset = load_samples(config.dataset_name, root=config.data.root)
    run_dir = Path(config.output_dir or f"runs/evaluate-{time.strftime('%Y%m%d-%H%M%S')}")
    run_dir.mkdir(parents=True, exist_ok=True)
    with Evaluator(dataset, config, on_skip=lambda error: print(f"skipped: {error}", file=sys.stderr)) as evaluator:
        result = evaluator.run(load_model(config))
    if not result.answers:
        raise DataError(f"{dataset.path}: none of its samples can be used ({dict(result.skipped)})")
    with open(run_dir / "answers.jsonl", "w", encoding="utf-8") as file:
        for answer in result.answers:
            row = {
                "problem_id": answer.sample.problem_id,
                "path": None if answer.sample.path is None else str(answer.sample.path),
                "solution": answer.sample.solution,
                "accuracy": answer.accuracy,
                "shuffled_accuracy": answer.shuffled,
                "text": answer.text,
                "shuffled_text": answer.shuffled_text,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    rows = [[name.removeprefix("eval/"), value] for name, value in result.metrics().items()]
    print(summary_table([["metric", "value"], *rows]))
    unusable = sum(result.skipped.values()) + len(dataset.errors)
    print(f"{unusable} samples could not be used; answers in {run_dir / 'answers.jsonl'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
