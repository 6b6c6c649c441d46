"""The embedded demonstration: generated clips with questions about time order, a small tokenizer, a tiny Qwen2.5-VL."""

from __future__ import annotations

from pathlib import Path

from videor1.config import TrainConfig


def data_file(run_dir: Path) -> Path:
    """Return the path of the data file that a demonstration trains on."""
    return run_dir / "demo" / "train.json"


def is_demonstration(config: TrainConfig) -> bool:
    """Return whether the options start or resume a demonstration.

    They start one if they name neither a model nor data. They resume one if their data is the data file of the
    demonstration in ``output_dir``, which its config.yaml names.
    """
    if not (config.model_name_or_path or config.dataset_name):
        return True
    if not (config.resume and config.output_dir and config.dataset_name):
        return False
    return Path(config.dataset_name).resolve() == data_file(Path(config.output_dir)).resolve()


def demonstration_argv(config: TrainConfig, argv: list[str]) -> list[str]:
    """Return the command line with the demonstration's recipe put before it.

    When a run is resumed, the command line stays as it is, because the run's config.yaml holds the options.
    """
    resumes = bool(config.resume and config.output_dir) and (Path(str(config.output_dir)) / "config.yaml").is_file()
    return argv if resumes else ["--config", "demo", *argv]
